"""Small models of mlx-vlm with the files of their processors, which work without PyTorch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from requant.libraries import MLX_VLM
from tests.support.class_models import class_checkpoint
from tests.support.library_models import write_tokenizer

IMAGE, EOS = 300, 304


@dataclass(frozen=True)
class ProcessorFiles:
    """What the processor of a family reads.

    Attributes:
        image: The text that stands for an image in a prompt.
        special: Special tokens by their ids.
        preprocessor: ``preprocessor_config.json``.
        processor: ``processor_config.json``; empty: there is none.
        tokenizer: Settings of ``tokenizer_config.json``.
        config: Settings of ``config.json`` that differ from those of the class's small model.
    """

    image: str
    special: Mapping[int, str]
    preprocessor: Mapping[str, Any]
    processor: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)


_QWEN_TOKENS = {
    IMAGE: "<|image_pad|>",
    301: "<|video_pad|>",
    302: "<|vision_start|>",
    303: "<|vision_end|>",
    EOS: "<|im_end|>",
}
_QWEN_CONFIG = {
    "image_token_id": IMAGE,
    "video_token_id": 301,
    "vision_start_token_id": 302,
    "vision_end_token_id": 303,
    "eos_token_id": EOS,
}
_MROPE = {"rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]}}
_QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


def _qwen(name: str, patch: int = 14) -> dict[str, Any]:
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": f"{name}Processor",
        "patch_size": patch,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "min_pixels": 3136,
        "max_pixels": 28224,
    }


def _plain(kind: str, name: str, size: int, **more: Any) -> dict[str, Any]:
    return {
        "image_processor_type": f"{kind}ImageProcessor",
        "processor_class": f"{name}Processor",
        "do_resize": True,
        "size": {"height": size, "width": size},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.25, 0.25, 0.25],
        **more,
    }


_SOFT = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
_SOFT |= {"image_token": "<image_soft_token>"}
_GEMMA_TOKENS = {IMAGE: "<image_soft_token>", 301: "<start_of_image>", 302: "<end_of_image>"}

FAMILIES: dict[str, ProcessorFiles] = {
    "qwen2_vl": ProcessorFiles(
        _QWEN_IMAGE,
        _QWEN_TOKENS,
        _qwen("Qwen2VL"),
        config=_QWEN_CONFIG | _MROPE | {"text_config": _MROPE, "vision_config": {"mlp_ratio": 4}},
    ),
    "qwen2_5_vl": ProcessorFiles(
        _QWEN_IMAGE,
        _QWEN_TOKENS,
        _qwen("Qwen2_5_VL"),
        config=_QWEN_CONFIG | _MROPE | {"text_config": _MROPE},
    ),
    "qwen3_vl": ProcessorFiles(
        _QWEN_IMAGE,
        _QWEN_TOKENS,
        _qwen("Qwen3VL"),
        config=_QWEN_CONFIG
        | {"text_config": {"rope_scaling": {"type": "default", "mrope_section": [6, 5, 5]}}},
    ),
    "llava": ProcessorFiles(
        "<image>",
        {IMAGE: "<image>", EOS: "</s>"},
        _plain("CLIP", "Llava", 56, crop_size={"height": 56, "width": 56})
        | {"size": {"shortest_edge": 56}},
        {
            "processor_class": "LlavaProcessor",
            "patch_size": 14,
            "vision_feature_select_strategy": "default",
            "image_token": "<image>",
            "num_additional_image_tokens": 1,
        },
        config={"eos_token_id": EOS},
    ),
    "gemma3": ProcessorFiles(
        "<start_of_image>",
        {**_GEMMA_TOKENS, EOS: "<end_of_turn>"},
        _plain("Gemma3", "Gemma3", 224),
        {"processor_class": "Gemma3Processor", "image_seq_length": 16},
        {"extra_special_tokens": _SOFT, **_SOFT},
        {"eos_token_id": EOS, "image_token_index": IMAGE, "boi_token_index": 301}
        | {"text_config": {"mm_tokens_per_image": 16}},
    ),
    "mistral3": ProcessorFiles(
        "[IMG]",
        {IMAGE: "[IMG]", 301: "[IMG_BREAK]", 302: "[IMG_END]", EOS: "</s>"},
        _plain("Pixtral", "Pixtral", 56, patch_size={"height": 14, "width": 14})
        | {"size": {"longest_edge": 56}},
        {
            "processor_class": "PixtralProcessor",
            "patch_size": 14,
            "spatial_merge_size": 2,
            "image_token": "[IMG]",
            "image_break_token": "[IMG_BREAK]",
            "image_end_token": "[IMG_END]",
        },
        config={"image_token_index": IMAGE, "image_token_id": IMAGE, "eos_token_id": EOS}
        | {"text_config": {"rope_theta": 10000.0}},
    ),
}


def write_seeing_model(family: str, folder: Path) -> ProcessorFiles:
    """Write a small model of a family with its processor, tokenizer and generation settings."""
    files = FAMILIES[family]
    class_checkpoint(MLX_VLM, f"mlx_vlm.models.{family}", folder, files.config)
    write_tokenizer(folder, files.special, {"eos_token": files.special[EOS], **files.tokenizer})
    documents = {
        "preprocessor_config.json": files.preprocessor,
        "processor_config.json": files.processor,
        "generation_config.json": {"eos_token_id": [EOS, 299], "temperature": 0.5},
    }
    for name, document in documents.items():
        if document:
            (folder / name).write_text(json.dumps(document))
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
        "{% for part in m['content'] %}{% if part['type'] == 'image' %}"
        f"{files.image}{{% else %}}{{{{ part['text'] or part['content'] }}}}{{% endif %}}"
        "{% endfor %}{% endif %}{% endfor %}"
    )
    return files
