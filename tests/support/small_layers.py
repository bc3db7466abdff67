"""One small layer ``up`` in every format, its scales all sound: to be damaged by tests."""

from collections.abc import Callable
from typing import Any

import ml_dtypes
import mlx.core as mx
import numpy as np

from tests.support.layers import bitnet, fp_quant, hqq, metal, modelopt
from tests.support.layers import bitsandbytes as bnb
from tests.support.layers import compressed_tensors as ct_layers
from tests.support.number_formats import BF16, E4M3, e4m3

Tensors = dict[str, np.ndarray]
Folder = tuple[Tensors, dict[str, Any]]
OUT, IN = 64, 128
CODES = np.random.default_rng(0).integers(0, 16, (OUT, IN))


def _words(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).integers(-(2**31), 2**31, shape).astype(np.int32)


def _halves(*shape: int) -> np.ndarray:
    return np.random.default_rng(2).uniform(0.01, 0.1, shape).astype(np.float16)


def _awq() -> Folder:
    tensors = {"up.qweight": _words(IN, OUT // 8), "up.qzeros": _words(IN // 32, OUT // 8)}
    tensors["up.scales"] = _halves(IN // 32, OUT)
    block = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
    return tensors, {"quantization_config": block | {"zero_point": True}}


def _gptq() -> Folder:
    tensors = {"up.qweight": _words(IN // 8, OUT), "up.qzeros": _words(IN // 32, OUT // 8)}
    tensors |= {
        "up.scales": _halves(IN // 32, OUT),
        "up.g_idx": np.arange(IN, dtype=np.int32) // 32,
    }
    block = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
    return tensors, {"quantization_config": block}


def _ct() -> Folder:
    scale = _halves(OUT, IN // 32).astype(BF16)
    block = ct_layers.block(num_bits=4, group_size=32)
    return ct_layers.packed(CODES - 8, 4, scale), {"quantization_config": block}


def _fp8(scale: float) -> Folder:
    tensors = {
        "up.weight": e4m3(OUT, IN),
        "up.weight_scale_inv": np.full((1, 1), scale, np.float32),
    }
    return tensors, {
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}
    }


def _nvfp4() -> Folder:
    scales = np.random.default_rng(3).integers(0x30, 0x50, (OUT, IN // 16)).astype(np.uint8)
    tensors = {
        "up.weight": np.random.default_rng(4).integers(0, 256, (OUT, IN // 2)).astype(np.uint8),
        "up.weight_scale": scales.view(E4M3),
        "up.weight_scale_2": np.array(1, np.float32),
    }
    return tensors, {"quantization_config": modelopt.block("NVFP4")}


def _mxfp4() -> Folder:
    tensors = {
        "experts.up_proj_blocks": np.full((2, OUT, IN // 32, 16), 0x21, np.uint8),
        "experts.up_proj_scales": np.full((2, OUT, IN // 32), 125, np.uint8),
    }
    return tensors, {"quantization_config": {"quant_method": "mxfp4"}}


def _hqq() -> Folder:
    made, _ = hqq.layer(hqq.random_view(2 * OUT, 64, 4), (OUT, IN), "4bit_u8")
    return made, {"quantization_config": hqq.BLOCK}


def _mlx(mode: str, group_size: int, bits: int) -> Folder:
    dense = mx.random.normal((OUT, IN), key=mx.random.key(0))
    parts = mx.quantize(dense, group_size, bits, mode=mode)
    roles = ("weight", "scales", "biases")
    tensors = {f"up.{role}": np.array(x) for role, x in zip(roles, parts, strict=False)}
    return tensors, {"quantization": {"group_size": group_size, "bits": bits, "mode": mode}}


FOLDERS: dict[str, Callable[[], Folder]] = {
    "awq": _awq,
    "gptq": _gptq,
    "compressed-tensors": _ct,
    "fp8": lambda: _fp8(0.25),
    "fp8, no power of two": lambda: _fp8(0.3),
    "modelopt nvfp4": _nvfp4,
    "mxfp4": _mxfp4,
    "hqq": _hqq,
    "bitsandbytes": lambda: (bnb.table((OUT, IN))[0], {"quantization_config": bnb.BLOCK}),
    "bitsandbytes, nested": lambda: (
        bnb.table((OUT, IN), nested=4)[0],
        {"quantization_config": bnb.BLOCK},
    ),
    "bitnet": lambda: (bitnet.layer(OUT, IN)[0], {"quantization_config": bitnet.BLOCK}),
    "metal": lambda: (metal.layer(OUT, IN, 4, 64)[0], {"quantization_config": metal.block()}),
    "fp_quant": lambda: (fp_quant.layer()[0], {"quantization_config": fp_quant.block()}),
    "mlx affine": lambda: _mlx("affine", 64, 4),
    "mlx mxfp8": lambda: _mlx("mxfp8", 32, 8),
    "mlx nvfp4": lambda: _mlx("nvfp4", 16, 4),
    "dense": lambda: ({"up.weight": np.ones((OUT, IN), BF16)}, {}),
}


def make_nonfinite(array: np.ndarray, value: float, name: str = "") -> np.ndarray:
    """The same with NaN or infinity in its middle; bytes take the NaN of the format's scales."""
    nonfinite = array.copy()
    flat = nonfinite.reshape(-1)
    if array.dtype == np.uint8:
        flat[flat.size // 2] = 0x7F if "nvfp4" in name else 0xFF
    elif array.dtype == E4M3:
        flat.view(np.uint8)[flat.size // 2] = 0x7F
    else:
        flat[flat.size // 2] = value
    return nonfinite


def scales_of(tensors: Tensors) -> list[str]:
    """The tensors of scales, biases and float zero points."""
    floats = {np.dtype(x) for x in (np.float16, np.float32, ml_dtypes.bfloat16)}
    named = ("scales", "_scale", "scale_inv", "scale_2", "absmax", "biases", ".zero", ".scale")
    found = [name for name in tensors if name.endswith(named)]
    found = [name for name in found if not name.endswith("act_global_scale")]  # is left out
    return [x for x in found if tensors[x].dtype in (*floats, E4M3) or x.endswith("scales")]
