"""Small models of the MLX libraries, made from the libraries' own classes with random weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

_TEXT = {
    "vocab_size": 384,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
_VISION = {
    "model_type": "qwen2_vl",
    "depth": 2,
    "embed_dim": 128,
    "hidden_size": 128,
    "mlp_ratio": 2,
    "num_heads": 4,
    "in_channels": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
_AUDIO = {
    "model_type": "qwen2_audio_encoder",
    "num_mel_bins": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 256,
    "d_model": 128,
    "max_source_positions": 50,
}
_BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,
}
# Library -> the module of its class, the name of the class of its config, and a config.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mlx-lm": ("mlx_lm.models.llama", "ModelArgs", {"model_type": "llama", **_TEXT}),
    "mlx-vlm": (
        "mlx_vlm.models.qwen2_vl",
        "ModelConfig",
        {
            "model_type": "qwen2_vl",
            **_TEXT,
            "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
            "vision_config": _VISION,
            "image_token_id": 300,
            "video_token_id": 301,
            "vision_start_token_id": 302,
            "vision_end_token_id": 303,
            "eos_token_id": 304,
        },
    ),
    "mlx-audio": (
        "mlx_audio.stt.models.qwen2_audio",
        "ModelConfig",
        {
            "model_type": "qwen2_audio",
            "text_config": {"model_type": "qwen2", **_TEXT},
            "audio_config": _AUDIO,
            "audio_token_index": 201,
        },
    ),
    "mlx-embeddings": (
        "mlx_embeddings.models.xlm_roberta",
        "ModelArgs",
        {
            "model_type": "xlm-roberta",
            **_TEXT,
            "type_vocab_size": 2,
            "layer_norm_eps": 1e-5,
            "pad_token_id": 1,
        },
    ),
}


def write_model(library: str, folder: Path) -> dict[str, mx.array]:
    """Write a small model of a library; skip the test where it is not installed.

    Returns:
        The weights of the file.
    """
    module, args, config = MODELS[library]
    pytest.importorskip(module.partition(".")[0], reason=f"{library} is not installed")
    package = import_module(module)
    made = getattr(package, args).from_dict(json.loads(json.dumps(config)))
    if library == "mlx-vlm":
        utils = import_module("mlx_vlm.utils")
        made = utils.update_module_configs(
            made, package, {"text_config": config, **config}, ["text", "vision"]
        )
    parameters = tree_flatten(package.Model(made).parameters())
    weights = {
        name: (mx.random.normal(x.shape, key=mx.random.key(at)) * 0.05).astype(mx.bfloat16)
        for at, (name, x) in enumerate(parameters)
    }
    if library == "mlx-audio":  # its class takes PyTorch's order of axes, and transposes
        weights = {n: x.transpose(0, 2, 1) if x.ndim == 3 else x for n, x in weights.items()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "pt"})
    return weights


def write_tokenizer(
    folder: Path, special: Mapping[int, str], settings: Mapping[str, object]
) -> None:
    """Write a tokenizer of bytes.

    Args:
        folder: Where to.
        special: Special tokens by their ids, above those of the bytes; between them are unused
            ones, without which the ids would be other ones.
        settings: Of ``tokenizer_config.json``.
    """
    alphabet = [*map(chr, range(ord("!"), ord("~") + 1)), "Ġ", "Ċ"]
    vocabulary = {token: at for at, token in enumerate(alphabet)}
    vocabulary |= {f"t{at}": at for at in range(len(alphabet), min(special))}
    unused = {at: f"<unused{at}>" for at in range(min(special), max(special))}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [
            {
                "id": at,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for at, token in sorted({**unused, **special}.items())
        ],
        "pre_tokenizer": _BYTE_LEVEL,
        "decoder": _BYTE_LEVEL,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_processor(folder: Path) -> None:
    """Write a tokenizer of bytes, an image processor and a chat template of Qwen2-VL."""
    special = {
        300: "<|image_pad|>",
        301: "<|video_pad|>",
        302: "<|vision_start|>",
        303: "<|vision_end|>",
        304: "<|im_end|>",
    }
    write_tokenizer(folder, special, {"eos_token": "<|im_end|>"})
    preprocessor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2VLProcessor",
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "min_pixels": 3136,
        "max_pixels": 28224,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
        "{% for part in m['content'] %}{% if part['type'] == 'image' %}"
        "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
        "{% endfor %}{% endif %}{% endfor %}"
    )
