"""BitNet layers by hand."""

from typing import Any

import numpy as np

from tests.support.number_formats import BF16

BLOCK = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline"}


def pack(ternary: np.ndarray) -> np.ndarray:
    """Four row blocks a byte, the first in the lowest bits, value + 1."""
    packed = -(-len(ternary) // 4)
    codes = np.zeros((4 * packed, ternary.shape[1]), np.uint8)
    codes[: len(ternary)] = ternary + 1
    blocks = codes.reshape(4, packed, -1)
    return blocks[0] | blocks[1] << 2 | blocks[2] << 4 | blocks[3] << 6


def layer(rows: int, columns: int, scale: float = 0.25) -> tuple[dict[str, Any], np.ndarray]:
    ternary = np.random.default_rng(rows).integers(-1, 2, (rows, columns))
    tensors = {"up.weight": pack(ternary), "up.weight_scale": np.array([scale], BF16)}
    return tensors, ternary.astype(np.float32)
