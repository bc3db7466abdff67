"""A small language model and its vision part as a pair of GGUF files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.gguf_files import ARCHITECTURES, write_gguf
from tests.support.mmproj_files import (
    as_published,
    is_text,
    recorded_weights,
    records,
    values,
    write_mmproj,
)

# model_type of the text alone, and llama.cpp's name of its architecture.
TEXTS = {
    "gemma3": ("gemma3_text", "gemma3"),
    "idefics3": ("llama", "llama"),
    "internvl": ("qwen3", "qwen3"),
    "internvl_chat": ("qwen2", "qwen2"),
    "llava": ("llama", "llama"),
    "llava_next": ("llama", "llama"),
    "mistral3": ("llama", "llama"),
    "pixtral": ("llama", "llama"),
    "qwen2_vl": ("qwen2", "qwen2vl"),
    "qwen2_5_vl": ("qwen2", "qwen2vl"),
    "qwen3_vl": ("qwen3", "qwen3vl"),
    "qwen3_vl_moe": ("qwen3_moe", "qwen3vlmoe"),
}


def text_of(family: str, weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The language model by mlx-lm's names."""
    made = {}
    for name, array in weights.items():
        if not is_text(name):
            continue
        name = name.removeprefix("language_model.")
        for middle in ("language_model.", "text_model."):
            name = name.replace(f"model.{middle}", "model.")
        if name.endswith("experts.gate_up_proj"):  # [experts, in, out] by the authors
            gate, up = np.split(array.swapaxes(1, 2), 2, axis=1)
            path = name.replace("experts.gate_up_proj", "switch_mlp")
            made |= {f"{path}.gate_proj.weight": gate, f"{path}.up_proj.weight": up}
        elif name.endswith("experts.down_proj"):
            path = name.replace("experts.down_proj", "switch_mlp.down_proj.weight")
            made[path] = array.swapaxes(1, 2)
        else:
            made[name] = array
    return made


def text_config(family: str, config: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(config.get("text_config") or config)
    found.setdefault("rope_theta", 10000.0)
    rope = found.pop("rope_scaling", None) or {}
    assert rope.keys() <= {"mrope_section", "rope_type", "type"}
    if family != "gemma3":
        found["sliding_window"] = None
    return {**found, "model_type": TEXTS[family][0]}


def write_pair(
    folder: Path,
    family: str,
    monkeypatch: pytest.MonkeyPatch,
    kind: str = "F32",
    tokens: Mapping[str, int] | None = None,
    **options: Any,
) -> dict[str, np.ndarray]:
    """A language model and its vision part; returns the checkpoint that they are made of."""
    is_llava = "llava" in family
    record = records()["pixtral" if is_llava else family]
    weights = llava(family) if is_llava else recorded_weights(family)
    metadata = llava_metadata(family) if is_llava else record["metadata"]
    config = text_config(family, record["config"])
    if family == "internvl":  # Qwen 3, which has norms of queries and keys, and no biases
        weights = {k: v for k, v in weights.items() if not (is_text(k) and k.endswith(".bias"))}
        for block in range(config["num_hidden_layers"]):
            for part in "qk":
                name = f"language_model.model.layers.{block}.self_attn.{part}_norm.weight"
                weights[name] = values(name, [32])
    numbers = dict(record["tokens"] if tokens is None else tokens)
    if is_llava and tokens is None:
        numbers = {"<image>": 7}
    words = [f"t{number}" for number in range(config["vocab_size"])]
    for token, number in numbers.items():
        words[number] = token
    more: dict[str, Any] = {"!tokenizer.ggml.tokens": words, "!tokenizer.ggml.model": "gpt2"}
    more |= {"!tokenizer.ggml.pre": "qwen2", "!tokenizer.ggml.eos_token_id": 3}
    if "qwen" in family:
        more["rope.dimension_sections"] = [4, 6, 6, 0]
    monkeypatch.setitem(ARCHITECTURES, TEXTS[family][0], TEXTS[family][1])
    folder.mkdir(exist_ok=True)
    text = text_of(family, weights)
    config["tie_word_embeddings"] = "lm_head.weight" not in text
    write_gguf(folder / "model.gguf", text, config, "F32", more=more)
    write_mmproj(folder / "mmproj-model.gguf", family, weights, metadata, kind, **options)
    return as_published(family, weights)


def llava(family: str) -> dict[str, np.ndarray]:
    """LLaVA: the text of Pixtral's fixture, and the tower of CLIP."""
    text = {name: array for name, array in recorded_weights("pixtral").items() if is_text(name)}
    tower = "vision_tower.vision_model"
    shapes: dict[str, list[int]] = {
        f"{tower}.embeddings.class_embedding": [128],
        f"{tower}.embeddings.patch_embedding.weight": [128, 3, 14, 14],
        f"{tower}.embeddings.position_embedding.weight": [17, 128],
        "multi_modal_projector.linear_1.weight": [128, 128],
        "multi_modal_projector.linear_1.bias": [128],
        "multi_modal_projector.linear_2.weight": [128, 128],
        "multi_modal_projector.linear_2.bias": [128],
    }
    norms = [f"{tower}.pre_layrnorm"]
    for block in range(2):
        path = f"{tower}.encoder.layers.{block}"
        norms += [f"{path}.layer_norm1", f"{path}.layer_norm2"]
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes[f"{path}.self_attn.{part}.weight"] = [128, 128]
            shapes[f"{path}.self_attn.{part}.bias"] = [128]
        shapes |= {f"{path}.mlp.fc1.weight": [256, 128], f"{path}.mlp.fc1.bias": [256]}
        shapes |= {f"{path}.mlp.fc2.weight": [128, 256], f"{path}.mlp.fc2.bias": [128]}
    shapes |= {f"{norm}.{suffix}": [128] for norm in norms for suffix in ("weight", "bias")}
    if family == "llava_next":
        shapes["image_newline"] = [128]
    return text | {name: values(name, shape) for name, shape in shapes.items()}


def llava_metadata(family: str) -> dict[str, Any]:
    """As tools/mtmd/legacy-models writes it."""
    vision = {
        "image_size": 56,
        "patch_size": 14,
        "embedding_length": 128,
        "feed_forward_length": 256,
        "projection_dim": 768,
        "attention.head_count": 4,
        "attention.layer_norm_epsilon": 1e-5,
        "block_count": 2,
        "image_mean": [0.48145467042922974, 0.45782750844955444, 0.40821072459220886],
        "image_std": [0.2686295509338379, 0.2613025903701782, 0.27577710151672363],
    }
    if family == "llava_next":
        vision |= {
            "image_grid_pinpoints": [336, 672, 672, 336],
            "mm_patch_merge_type": "spatial_unpad",
        }
        vision["feature_layer"] = [2]
    return {
        "clip.has_text_encoder": False,
        "clip.has_vision_encoder": True,
        "clip.has_llava_projector": True,
        "clip.projector_type": "mlp",
        "clip.use_gelu": False,
        **{f"clip.vision.{key}": value for key, value in vision.items()},
    }
