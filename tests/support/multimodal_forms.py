"""Quantized forms of models that see, as their tools publish them.

The linear layers of the text model are coded, towers, projector, embedding and head are dense.
Each form gives the stored tensors of a layer and, computed apart from any reader, the values that
they represent.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from requant.libraries import MLX_VLM
from tests.support.checkpoints import write_checkpoint
from tests.support.class_models import class_checkpoint
from tests.support.layers import compressed_tensors as ct
from tests.support.layers import packers
from tests.support.number_formats import BF16, E2M1, E4M3, nibbles
from tests.support.safetensors_files import read_folder

GROUP = 64
Parts = dict[str, np.ndarray]
Encode = Callable[[np.ndarray], tuple[Parts, np.ndarray]]

# Names of mlx-vlm's class -> those of the published checkpoint.
_QWEN2: tuple[tuple[str, str], ...] = (
    (r"^language_model\.model\.", "model."),
    (r"^language_model\.lm_head", "lm_head"),
    (r"^vision_tower\.", "visual."),
)
_NESTED: tuple[tuple[str, str], ...] = (
    (r"^language_model\.model\.", "model.language_model."),
    (r"^language_model\.lm_head", "lm_head"),
    (r"^vision_tower\.", "model.visual."),
)
_AS_IS: tuple[tuple[str, str], ...] = ()
_IDEFICS3: tuple[tuple[str, str], ...] = (
    (r"^language_model\.lm_head", "lm_head"),
    (r"^language_model\.", "model.text_model."),
    (r"^vision_model\.", "model.vision_model."),
    (r"^connector\.", "model.connector."),
)
FAMILIES: dict[str, tuple[tuple[str, str], ...]] = {
    "aya_vision": _AS_IS,
    "gemma3": _AS_IS,
    "glm4v": _NESTED,
    "idefics3": _IDEFICS3,
    "internvl_chat": _AS_IS,
    "llava": _AS_IS,
    "llava_next": _AS_IS,
    "paligemma": _AS_IS,
    "qwen2_5_vl": _QWEN2,
    "qwen2_vl": _QWEN2,
    "qwen3_vl": _NESTED,
}
_LINEAR = re.compile(r"^language_model\.(model\.)?layers\.\d+\.(self_attn|mlp)\.\w+_proj\.weight$")


def _grouped(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """4-bit codes, zero points and float16 scales a group, and their values in float64."""
    groups = weight.reshape(weight.shape[0], -1, GROUP)
    low, high = np.minimum(groups.min(-1), 0), np.maximum(groups.max(-1), 0)
    scales = (np.maximum(high - low, 1e-4) / 15).astype(np.float16)
    wide = scales.astype(np.float64)[..., None]
    zeros = np.clip(np.round(-low / wide[..., 0]), 1, 15).astype(np.int64)
    codes = np.clip(np.round(groups / wide) + zeros[..., None], 0, 15).astype(np.int64)
    values = (codes - zeros[..., None]) * wide
    return codes.reshape(weight.shape), zeros, scales, values.reshape(weight.shape)


def awq(weight: np.ndarray) -> tuple[Parts, np.ndarray]:
    codes, zeros, scales, values = _grouped(weight)
    return packers.gemm(codes, zeros, scales), values


def gptq(weight: np.ndarray) -> tuple[Parts, np.ndarray]:
    codes, zeros, scales, values = _grouped(weight)
    parts = packers.gptq(codes, zeros, scales, 4, stored_minus=1)
    return parts | {"g_idx": (np.arange(weight.shape[1]) // GROUP).astype(np.int32)}, values


def ct_int4(weight: np.ndarray) -> tuple[Parts, np.ndarray]:
    codes, zeros, scales, values = _grouped(weight)
    parts = ct.packed(codes - 8, 4, scales, zeros - 8)
    return {name.removeprefix("up."): array for name, array in parts.items()}, values


def _float8(weight: np.ndarray, scale: np.ndarray, role: str) -> tuple[Parts, np.ndarray]:
    codes = (weight / scale.astype(np.float64)).astype(E4M3)
    return {"weight": codes, role: scale}, codes.astype(np.float64) * scale.astype(np.float64)


def ct_fp8(weight: np.ndarray) -> tuple[Parts, np.ndarray]:
    scale = (np.abs(weight).max(1, keepdims=True) / 448).astype(BF16)
    return _float8(weight, scale, "weight_scale")


def fp8_tensor(weight: np.ndarray) -> tuple[Parts, np.ndarray]:
    scale = np.array(np.abs(weight).max() / 448, np.float32)
    parts, values = _float8(weight, scale, "weight_scale")
    return parts | {"input_scale": np.array(0.5, np.float32)}, values


def fp8_block(weight: np.ndarray) -> tuple[Parts, np.ndarray]:
    rows, columns = (-(-n // 128) for n in weight.shape)
    scale = np.empty((rows, columns), np.float32)
    for r in range(rows):
        for c in range(columns):
            block = weight[128 * r : 128 * (r + 1), 128 * c : 128 * (c + 1)]
            scale[r, c] = np.exp2(np.ceil(np.log2(np.abs(block).max() / 448)))  # as DeepSeek V3.1
    spread = scale.repeat(128, 0).repeat(128, 1)[: weight.shape[0], : weight.shape[1]]
    parts, values = _float8(weight, spread, "weight_scale_inv")
    return {"weight": parts["weight"], "weight_scale_inv": scale}, values


def ct_mxfp4(weight: np.ndarray) -> tuple[Parts, np.ndarray]:
    groups = weight.reshape(weight.shape[0], -1, 32)
    exponents = np.ceil(np.log2(np.abs(groups).max(-1) / 6)).astype(np.int64)
    factors = np.exp2(exponents.astype(np.float64))[..., None]
    codes = np.abs(groups[..., None] / factors[..., None] - E2M1).argmin(-1).astype(np.uint8)
    codes = codes.reshape(weight.shape)
    packed = codes[:, ::2] | codes[:, 1::2] << 4
    values = E2M1[nibbles(packed)].astype(np.float64).reshape(groups.shape) * factors
    parts = {"weight_packed": packed, "weight_scale": (exponents + 127).astype(np.uint8)}
    return parts, values.reshape(weight.shape)


@dataclass(frozen=True)
class Form:
    """A tool's form.

    Attributes:
        encode: A float64 matrix -> its stored tensors by role, and the values they represent.
        block: ``quantization_config``.
        ignored: The block's setting that lists the dense modules.
        options: For ``requant.convert``; FP8 with any scale fits no mode of MLX.
    """

    encode: Encode
    block: Mapping[str, Any]
    ignored: str
    options: Mapping[str, Any] = field(default_factory=dict)


_GROUPED = {"bits": 4, "group_size": GROUP}
_DENSE = {"dequantize": True}
_FP8_CHANNEL = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
FORMS: dict[str, Form] = {
    "AWQ": Form(
        awq, {"quant_method": "awq", "version": "gemm", **_GROUPED}, "modules_to_not_convert"
    ),
    "GPTQ": Form(gptq, {"quant_method": "gptq", "sym": False, **_GROUPED}, ""),
    "compressed-tensors int4": Form(ct_int4, ct.block(symmetric=False, group_size=GROUP), "ignore"),
    "compressed-tensors FP8": Form(
        ct_fp8, ct.block("float-quantized", **_FP8_CHANNEL), "ignore", _DENSE
    ),
    "FP8, blocks of 128, powers of two": Form(
        fp8_block,
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        "modules_to_not_convert",
    ),
    "FP8, a scale a tensor": Form(fp8_tensor, {"quant_method": "fp8"}, "ignored_layers", _DENSE),
    "compressed-tensors MXFP4": Form(
        ct_mxfp4,
        ct.block("mxfp4-pack-quantized", type="float", group_size=32, scale_dtype="torch.uint8"),
        "ignore",
    ),
}


@dataclass
class Written:
    """A model in a quantized form.

    Attributes:
        folder: The quantized checkpoint.
        dense: The same values in float32, dense, under the same names.
        values: Path of a coded layer in mlx-vlm's class -> its values in float64.
    """

    folder: Path
    dense: Path
    values: dict[str, np.ndarray]


def write_form(family: str, form: Form, work: Path) -> Written:
    """Write a small model of mlx-vlm in a quantized form, and its decoded counterpart.

    Args:
        family: One of ``FAMILIES``.
        form: One of ``FORMS``.
        work: An empty folder.
    """
    package = f"mlx_vlm.models.{family}"
    config = class_checkpoint(MLX_VLM, package, work / "class" / family)
    tensors, plain, values = {}, {}, {}
    ignored = []
    for name, array in read_folder(work / "class" / family).items():
        published = name
        for pattern, new in FAMILIES[family]:
            published = re.sub(pattern, new, published)
        if not _LINEAR.match(name):
            tensors[published] = plain[published] = array
            if name.endswith(".weight") and array.ndim == 2:
                ignored.append(published.removesuffix(".weight"))
            continue
        path = published.removesuffix(".weight")
        parts, decoded = form.encode(array.astype(np.float64))
        tensors |= {f"{path}.{role}": np.ascontiguousarray(x) for role, x in parts.items()}
        plain[published] = decoded.astype(np.float32)
        values[name.removesuffix(".weight")] = decoded
    block = dict(form.block)
    if form.ignored:
        block[form.ignored] = ignored
    config = config | {"torch_dtype": "bfloat16"}
    folder = write_checkpoint(
        work / "coded" / family, tensors, config | {"quantization_config": block}
    )
    dense = write_checkpoint(work / "dense" / family, plain, config | {"torch_dtype": "float32"})
    return Written(folder, dense, values)
