"""FP-Quant layers by hand."""

from typing import Any

import numpy as np

from tests.support.number_formats import BF16, E2M1, E4M3


def block(dtype: str = "mxfp4", init: str = "identity") -> dict[str, Any]:
    return {"quant_method": "fp_quant", "forward_dtype": dtype, "transform_init": init}


def layer(divisor: float = 1, nvfp4: bool = False) -> tuple[dict[str, Any], np.ndarray]:
    random = np.random.default_rng(0)
    packed = random.integers(0, 256, (6, 64), np.uint8)
    group = 16 if nvfp4 else 32
    scales: Any = random.integers(100, 140, (6, 4), np.uint8)
    factors: Any = np.exp2(scales.astype(np.float32) - 127)
    if nvfp4:
        factors = random.uniform(1, 4, (6, 8)).astype(E4M3)
        scales, factors = factors.view(np.uint8), factors.astype(np.float32)
        factors = factors / np.float32(divisor)
    tensors = {
        "up.qweight": packed,
        "up.scales": scales,
        "up.weight_global_scale": np.array([divisor], BF16),
        "up.act_global_scale": np.ones(1, BF16),
        "up.forward_hadamard_matrix": np.eye(32, dtype=BF16),
    }
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(6, 128)
    values = E2M1[codes] * factors.repeat(group, axis=1)
    return tensors, values if nvfp4 else values / np.float32(divisor)
