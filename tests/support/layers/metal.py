"""Layers of transformers' metal kernels by hand."""

from typing import Any

import numpy as np

from requant.kernels import quantize as native
from tests.support.number_formats import BF16


def block(bits: Any = 4, group: Any = 64) -> dict[str, Any]:
    return {"quant_method": "metal", "bits": bits, "group_size": group}


def layer(
    rows: int, columns: int, bits: int, group: int, dtype: Any = BF16
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Tensors of ``up``, its codes and its values."""
    random = np.random.default_rng(rows)
    codes = random.integers(0, 1 << bits, (rows, columns), np.uint8)
    scales = random.uniform(-1, 1, (rows, columns // group)).astype(dtype)
    biases = random.uniform(-1, 1, (rows, columns // group)).astype(dtype)
    tensors = {
        "up.weight": native.pack_words(codes, bits),
        "up.scales": scales,
        "up.qbiases": biases,
    }
    spread = [x.astype(np.float32).repeat(group, axis=1) for x in (scales, biases)]
    return tensors, codes, codes * spread[0] + spread[1]
