"""``config.json`` of a pair of GGUF files: language model and vision part (mmproj).

The facts are those of llama.cpp's converter and of its reader of vision parts (ggml-org/llama.cpp
conversion/, tools/mtmd/clip.cpp), and of the classes of transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import isqrt
from typing import Any

from requant.gguf.mmproj_settings import VisionSettings
from requant.gguf.settings import ADVICE

_QWEN_EPSILON, _PIXTRAL_EPSILON = 1e-6, 1e-5
TEMPORAL_PATCH = 2
"""Frames that one patch of Qwen's models covers."""
_QWEN_WINDOW = 112


def pair_config(settings: VisionSettings, text: Mapping[str, Any]) -> dict[str, Any]:
    """``config.json`` of a pair; what is missing or has no place is a problem of the metadata.

    Args:
        settings: Of the vision part.
        text: ``config.json`` of the language model alone.
    """
    family = settings.family
    text = {key: value for key, value in text.items() if key != "architectures"}
    text["model_type"] = family.text_types.get(text["model_type"], text["model_type"])
    vision, own = _CONFIGURE[family.model_type](settings, text)
    config: dict[str, Any] = {"architectures": [family.cls], "model_type": family.model_type}
    for key, token in family.tokens.items():
        number = settings.token(token)
        if number is None:
            message = f"has no {token}, which stands for images in {family.model_type}; {ADVICE}"
            settings.text.report("tokenizer.ggml.tokens", message)
        config[key] = number
    if family.text_starts:
        top = ("torch_dtype", "tie_word_embeddings", "vocab_size", "eos_token_id", "bos_token_id")
        config |= {key: text[key] for key in (*top, "pad_token_id") if key in text}
        config["text_config"] = text
    else:
        config = text | config
    config |= own | {"vision_config": vision}
    _check_widths(settings, text)
    return config


def _check_widths(settings: VisionSettings, text: Mapping[str, Any]) -> None:
    """Both files must be of one model."""
    width = settings.find_int("projection_dim")
    if settings.family.model_type.startswith("llava"):
        width = settings.size("mm.2.weight", 0)  # the key is CLIP's own projection
    if width not in (None, text["hidden_size"]):
        message = (
            f"gives vectors of {width:,} values, but those of the language model have "
            f"{text['hidden_size']:,}: the two files are not of one model"
        )
        settings.report("projection_dim", message)


def _tower(settings: VisionSettings, kind: str, activation: str) -> dict[str, Any]:
    """``vision_config`` of CLIP, SigLIP and their like."""
    return {
        "model_type": kind,
        "hidden_size": settings.need_int("embedding_length"),
        "intermediate_size": settings.need_int("feed_forward_length"),
        "num_hidden_layers": settings.need_int("block_count"),
        "num_attention_heads": settings.need_int("attention.head_count"),
        "num_channels": 3,
        "image_size": settings.need_int("image_size"),
        "patch_size": settings.need_int("patch_size"),
        "layer_norm_eps": _epsilon(settings),
        "hidden_act": activation,
    }


def _epsilon(settings: VisionSettings) -> float:
    return settings.metadata.need_float(f"{settings.prefix}attention.layer_norm_epsilon")


def _check_epsilon(settings: VisionSettings, own: float) -> None:
    """Some classes have their own, whatever config.json says."""
    found = settings.find_float("attention.layer_norm_epsilon")
    if found is not None and abs(found - own) > own / 1000:
        message = f"is {found:g}, but the class computes with {own:g}"
        settings.report("attention.layer_norm_epsilon", message)


_Parts = tuple[dict[str, Any], dict[str, Any]]


def _tanh(settings: VisionSettings) -> str:
    """The activation of SigLIP: llama.cpp's gelu is the approximation by tanh."""
    found = settings.activation
    return "gelu_pytorch_tanh" if found == "gelu" else found


def _gemma_3(settings: VisionSettings, text: dict[str, Any]) -> _Parts:
    vision = _tower(settings, "siglip_vision_model", _tanh(settings))
    side = settings.patches // (settings.find_int("projector.scale_factor") or 4)
    tokens = {"mm_tokens_per_image": side * side}
    text |= tokens  # mlx-vlm's class reads it there
    return {**vision, "vision_use_head": False}, tokens


def _idefics_3(settings: VisionSettings, text: dict[str, Any]) -> _Parts:
    vision = _tower(settings, "idefics3_vision", _tanh(settings))
    return vision, {"scale_factor": settings.need_int("projector.scale_factor")}


def _internvl(settings: VisionSettings, text: dict[str, Any]) -> _Parts:
    vision = _tower(settings, "internvl_vision", settings.activation)
    size, patch = vision["image_size"], vision["patch_size"]
    vision |= {
        "image_size": [size, size],
        "patch_size": [patch, patch],
        "attention_bias": settings.has("v.blk.0.attn_q.bias"),
        "use_qk_norm": settings.has("v.blk.0.attn_q_norm.weight"),
        "norm_type": _norm_type(settings),
        "use_absolute_position_embeddings": settings.has("v.position_embd.weight"),
        "use_mask_token": False,
    }
    scale = settings.need_int("projector.scale_factor")
    return vision, {
        "downsample_ratio": 1 / scale,
        "image_seq_length": (settings.patches // scale) ** 2,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "projector_hidden_act": "gelu",
    }


def _internvl_chat(settings: VisionSettings, text: dict[str, Any]) -> _Parts:
    vision = _tower(settings, "intern_vit_6b", settings.activation)
    vision |= {
        "qkv_bias": settings.has("v.blk.0.attn_q.bias"),
        "qk_normalization": settings.has("v.blk.0.attn_q_norm.weight"),
        "norm_type": _norm_type(settings),
    }
    own = {
        "downsample_ratio": 1 / settings.need_int("projector.scale_factor"),
        "select_layer": -1,
        "ps_version": "v2",
    }
    for key in ("min", "max"):
        if tiles := settings.find_int(f"preproc_{key}_tiles"):
            own[f"{key}_dynamic_patch"] = tiles
    return vision, own


def _norm_type(settings: VisionSettings) -> str:
    return "layer_norm" if settings.has("v.blk.0.ln1.bias") else "rms_norm"


def _llava(settings: VisionSettings, text: dict[str, Any]) -> _Parts:
    """The file holds the blocks up to the one whose output is used."""
    has_class = settings.has("v.class_embd")
    kind = "clip_vision_model" if has_class else "siglip_vision_model"
    activation = settings.activation if has_class else _tanh(settings)
    vision = _tower(settings, kind, activation)
    layers = settings.whole("feature_layer")
    own: dict[str, Any] = {
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default" if has_class else "full",
        "image_seq_length": settings.patches**2,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": settings.has("mm.0.bias"),
    }
    if layers and layers != [vision["num_hidden_layers"]]:
        own["vision_feature_layer"] = layers if len(layers) > 1 else layers[0]
    if not has_class:
        vision["vision_use_head"] = False
    if settings.family.model_type == "llava_next":
        own["image_grid_pinpoints"] = _pinpoints(settings)
    return vision, own


def _pinpoints(settings: VisionSettings) -> list[list[int]]:
    """Heights and widths of images."""
    key = f"{settings.prefix}image_grid_pinpoints"
    sizes = settings.whole("image_grid_pinpoints") or []
    if not sizes or len(sizes) % 2:
        found = f"is {settings.metadata.shown(key)}" if sizes else "is missing"
        settings.metadata.report(key, f"{found}, expected pairs of whole numbers")
        return []
    return [list(pair) for pair in zip(sizes[::2], sizes[1::2], strict=True)]


def _pixtral(settings: VisionSettings, text: dict[str, Any]) -> _Parts:
    _check_epsilon(settings, _PIXTRAL_EPSILON)
    vision = _tower(settings, "pixtral", settings.activation)
    del vision["layer_norm_eps"]
    vision["head_dim"] = vision["hidden_size"] // vision["num_attention_heads"]
    vision["rope_theta"] = settings.metadata.find_float("clip.rope.freq_base") or 10000.0
    if text["model_type"] == "mistral":
        text["sliding_window"] = None
    own = {
        "vision_feature_layer": -1,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": settings.has("mm.1.bias"),
    }
    if settings.family.model_type == "mistral3":
        merge = settings.find_int("spatial_merge_size")
        return vision, own | {"spatial_merge_size": merge or _merge_by_shape(settings)}
    return vision, own | {"vision_feature_select_strategy": "full"}


def _merge_by_shape(settings: VisionSettings) -> int:
    """Patches along each side of those that are merged, by the matrix that merges them."""
    name = "mm.patch_merger.weight"
    return isqrt(max(settings.size(name, -1) // settings.size(name, 0), 1))


def _qwen(settings: VisionSettings, text: dict[str, Any]) -> _Parts:
    """What all versions have."""
    sections = settings.text.numbers(f"{settings.text.architecture}.rope.dimension_sections")
    if sections is None:
        message = f"is missing: it says which part of a head is for which axis of images; {ADVICE}"
        settings.text.report(f"{settings.text.architecture}.rope.dimension_sections", message)
    else:
        kind = "mrope" if settings.family.model_type.startswith("qwen2") else "default"
        section = [int(x) for x in sections if x]
        text["rope_scaling"] = {"type": kind, "rope_type": "default", "mrope_section": section}
    merged = settings.size("mm.0.weight", -1)
    width = settings.need_int("embedding_length")
    vision = {
        "model_type": settings.family.model_type,
        "depth": settings.need_int("block_count"),
        "hidden_size": width,
        "num_heads": settings.need_int("attention.head_count"),
        "in_channels": 3,
        "patch_size": settings.need_int("patch_size"),
        "spatial_merge_size": isqrt(max(merged // width, 1)),
        "temporal_patch_size": TEMPORAL_PATCH,
    }
    declared = settings.find_int("spatial_merge_size")
    if declared not in (None, vision["spatial_merge_size"]):
        message = f"is {declared}, but mm.0.weight has {merged:,} inputs of patches of {width:,}"
        settings.report("spatial_merge_size", message)
    settings.find_int("image_size")
    return vision, {}


def _qwen_2(settings: VisionSettings, text: dict[str, Any]) -> _Parts:
    vision, own = _qwen(settings, text)
    _check_epsilon(settings, _QWEN_EPSILON)
    settings.find_int("feed_forward_length")  # of the language model, by mistake
    width = vision["hidden_size"]
    name = "v.blk.0.ffn_up.weight"  # or what comes down again: the larger side is between both
    ratio = max(settings.size(name, 0), settings.size(name, 1)) / width
    vision |= {
        "embed_dim": width,
        "hidden_size": text["hidden_size"],
        "hidden_act": settings.activation,
        "mlp_ratio": int(ratio) if ratio.is_integer() else ratio,
    }
    return vision, own


def _qwen_2_5(settings: VisionSettings, text: dict[str, Any]) -> _Parts:
    vision, own = _qwen(settings, text)
    _check_epsilon(settings, _QWEN_EPSILON)
    full = settings.whole("fullatt_block_indexes")
    every = settings.need_int("n_wa_pattern") if full is None else 1
    vision |= {
        "hidden_act": settings.activation,
        "intermediate_size": settings.size("v.blk.0.ffn_gate.weight", 0),
        "out_hidden_size": text["hidden_size"],
        "window_size": settings.find_int("window_size") or _QWEN_WINDOW,
        "fullatt_block_indexes": full or list(range(every - 1, vision["depth"], every)),
        "tokens_per_second": 2,
    }
    settings.find_int("feed_forward_length")
    return vision, own


def _qwen_3(settings: VisionSettings, text: dict[str, Any]) -> _Parts:
    settings.find_float("attention.layer_norm_epsilon")  # of the language model
    vision, own = _qwen(settings, text)
    layers = settings.metadata.flags(f"{settings.prefix}is_deepstack_layers") or []
    vision |= {
        "hidden_act": _tanh(settings),
        "intermediate_size": settings.need_int("feed_forward_length"),
        "out_hidden_size": text["hidden_size"],
        "num_position_embeddings": settings.size("v.position_embd.weight", 0),
        "deepstack_visual_indexes": [block for block, has in enumerate(layers) if has],
    }
    if "rope_scaling" in text:
        text["rope_scaling"]["mrope_interleaved"] = True
    return vision, own


_CONFIGURE: Mapping[str, Callable[[VisionSettings, dict[str, Any]], _Parts]] = {
    "gemma3": _gemma_3,
    "idefics3": _idefics_3,
    "internvl": _internvl,
    "internvl_chat": _internvl_chat,
    **dict.fromkeys(("llava", "llava_next"), _llava),
    **dict.fromkeys(("pixtral", "mistral3"), _pixtral),
    "qwen2_vl": _qwen_2,
    "qwen2_5_vl": _qwen_2_5,
    **dict.fromkeys(("qwen3_vl", "qwen3_vl_moe"), _qwen_3),
}
