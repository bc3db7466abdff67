"""Files of the image processor of a vision part (mmproj), as far as the part says them.

What no file says (limits of sizes, how images are resized) is what published models have.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from requant.gguf.mmproj_config import TEMPORAL_PATCH
from requant.gguf.mmproj_settings import VisionSettings
from requant.gguf.tokenizer import Files

# What the processors of published models have, and files do not say.
_QWEN_PIXELS = {
    "qwen2_vl": (3136, 12845056),
    "qwen2_5_vl": (3136, 12845056),
    "qwen3_vl": (65536, 16777216),
    "qwen3_vl_moe": (65536, 16777216),
}
_BICUBIC, _BILINEAR, _LANCZOS = 3, 2, 1


def processor_files(settings: VisionSettings, config: Mapping[str, Any]) -> Files:
    """``preprocessor_config.json`` and ``processor_config.json``, as far as files say them."""
    size = settings.need_int("image_size")
    patch = settings.need_int("patch_size")
    images: dict[str, Any] = {
        "do_convert_rgb": True,
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": settings.floats("image_mean"),
        "image_std": settings.floats("image_std"),
    }
    names, more, processor = _PROCESSORS[settings.family.model_type](settings, config, size, patch)
    images |= more | {"image_processor_type": names[0], "processor_class": names[1]}
    processor = {"processor_class": names[1]} | processor
    return {
        "preprocessor_config.json": lambda: _dump(images),
        "processor_config.json": lambda: _dump(processor),
    }


def named_tokens(settings: VisionSettings, files: Files) -> Files:
    """``tokenizer_config.json`` with the tokens that the processor asks for by name."""
    known = settings.family.named_tokens.items()
    tokens = {name: token for name, token in known if settings.token(token) is not None}
    make = files.get("tokenizer_config.json")
    if make is None or not tokens:
        return {}

    def config() -> bytes:
        return _dump(json.loads(make()) | {"extra_special_tokens": tokens})

    return {"tokenizer_config.json": config}


def _dump(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode()


_Processor = tuple[tuple[str, str], dict[str, Any], dict[str, Any]]


def _square(size: int) -> dict[str, int]:
    return {"height": size, "width": size}


def _gemma_3_processor(
    settings: VisionSettings, config: Mapping[str, Any], size: int, patch: int
) -> _Processor:
    tokens = {"image_seq_length": config["mm_tokens_per_image"]}
    images = {"size": _square(size), "resample": _BILINEAR, **tokens}
    return ("Gemma3ImageProcessor", "Gemma3Processor"), images, tokens


def _qwen_processor(
    settings: VisionSettings, config: Mapping[str, Any], size: int, patch: int
) -> _Processor:
    kind = settings.family.model_type
    least, most = _QWEN_PIXELS[kind]
    least = settings.find_int("image_min_pixels") or least
    most = settings.find_int("image_max_pixels") or most
    images = {
        "size": {"shortest_edge": least, "longest_edge": most},
        "patch_size": patch,
        "temporal_patch_size": TEMPORAL_PATCH,
        "merge_size": config["vision_config"]["spatial_merge_size"],
        "resample": _BICUBIC,
    }
    if kind.startswith("qwen2"):
        images |= {"min_pixels": least, "max_pixels": most}
    name = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL"}.get(kind, "Qwen3VL")
    return ("Qwen2VLImageProcessor", f"{name}Processor"), images, {}


def _llava_processor(
    settings: VisionSettings, config: Mapping[str, Any], size: int, patch: int
) -> _Processor:
    is_next = settings.family.model_type == "llava_next"
    images: dict[str, Any] = {
        "size": {"shortest_edge": size},
        "do_center_crop": True,
        "crop_size": _square(size),
        "resample": _BICUBIC,
    }
    if is_next:
        images["image_grid_pinpoints"] = config["image_grid_pinpoints"]
    strategy = config["vision_feature_select_strategy"]
    processor = {
        "patch_size": patch,
        "vision_feature_select_strategy": strategy,
        "num_additional_image_tokens": int(strategy == "default"),
        "image_token": settings.family.tokens["image_token_index"],
    }
    if is_next:
        return ("LlavaNextImageProcessor", "LlavaNextProcessor"), images, processor
    return ("CLIPImageProcessor", "LlavaProcessor"), images, processor


def _idefics_3_processor(
    settings: VisionSettings, config: Mapping[str, Any], size: int, patch: int
) -> _Processor:
    whole = settings.find_int("preproc_image_size") or size
    images = {
        "size": {"longest_edge": whole},
        "max_image_size": {"longest_edge": size},
        "do_image_splitting": True,
        "do_pad": True,
        "resample": _LANCZOS,
    }
    tokens = {"image_seq_len": (settings.patches // config["scale_factor"]) ** 2}
    return ("Idefics3ImageProcessor", "Idefics3Processor"), images, tokens


def _pixtral_processor(
    settings: VisionSettings, config: Mapping[str, Any], size: int, patch: int
) -> _Processor:
    merge = config.get("spatial_merge_size", 1)
    images = {
        "size": {"longest_edge": size},
        "patch_size": _square(patch),
        "resample": _BICUBIC,
    }
    processor = {
        "patch_size": patch,
        "spatial_merge_size": merge,
        "image_token": "[IMG]",
        "image_break_token": "[IMG_BREAK]",
        "image_end_token": "[IMG_END]",
    }
    return ("PixtralImageProcessor", "PixtralProcessor"), images, processor


def _internvl_processor(
    settings: VisionSettings, config: Mapping[str, Any], size: int, patch: int
) -> _Processor:
    images = {
        "size": _square(size),
        "crop_to_patches": True,
        "min_patches": settings.find_int("preproc_min_tiles") or 1,
        "max_patches": settings.find_int("preproc_max_tiles") or 12,
        "resample": _BICUBIC,
    }
    scale = settings.need_int("projector.scale_factor")
    tokens = {"image_seq_length": (settings.patches // scale) ** 2}
    return ("GotOcr2ImageProcessor", "InternVLProcessor"), images, tokens


_PROCESSORS: Mapping[str, Callable[[VisionSettings, Mapping[str, Any], int, int], _Processor]] = {
    "gemma3": _gemma_3_processor,
    "idefics3": _idefics_3_processor,
    **dict.fromkeys(("internvl", "internvl_chat"), _internvl_processor),
    **dict.fromkeys(("llava", "llava_next"), _llava_processor),
    **dict.fromkeys(("pixtral", "mistral3"), _pixtral_processor),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"), _qwen_processor),
}
