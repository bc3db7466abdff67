"""HQQ layers by hand, in every packing."""

from typing import Any

import numpy as np

BLOCK = {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4, "axis": 1}}}


# packing -> bits of a field, shift of each strip of rows, dtype of W_q: as HQQ's document says.
PACKINGS: dict[str, tuple[int, list[int], Any]] = {
    "8bit_u8": (8, [0], np.uint8),
    "4bit_u8": (4, [4, 0], np.uint8),
    "3bit_32": (3, [27, 24, 21, 18, 15, 12, 9, 6, 3, 0], np.int32),
    "2bit_u8": (2, [6, 4, 2, 0], np.uint8),
    "1bit_u8": (1, [7, 6, 5, 4, 3, 2, 1, 0], np.uint8),
}


def text(word: str) -> np.ndarray:
    return np.frombuffer(word.encode(), np.uint8)


def layer(
    view: np.ndarray,
    shape: tuple[int, int],
    packing: str,
    axis: int = 1,
    nbits: Any = None,
    dtype: Any = np.float16,
    seed: int = 0,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """A layer ``up`` that holds the view's codes, and its values in float32."""
    bits, shifts, stored = PACKINGS[packing]
    strip = -(-len(view) // len(shifts))
    w_q = np.zeros((strip, view.shape[1]), np.uint32)
    for row, codes in enumerate(view):
        w_q[row % strip] |= codes.astype(np.uint32) << np.uint32(shifts[row // strip])
    random = np.random.default_rng(seed)
    one = (len(view), 1) if axis else (1, view.shape[1])
    scale = random.uniform(0.01, 0.1, one).astype(dtype)
    zero = random.uniform(-1, 2**bits, one).astype(dtype)
    values = (view.astype(np.float32) - zero.astype(np.float32)) * scale.astype(np.float32)
    declared = bits if nbits is None else nbits
    tensors = {
        "up.W_q": w_q.astype(stored),
        "up.scale": scale,
        "up.zero": zero,
        "up.shape": np.array(shape, np.int64),
        "up.axis": np.array(axis, np.int32),
        "up.nbits": np.array(declared, np.float32 if isinstance(declared, float) else np.int32),
        "up.packing": text(packing),
        "up.view_as_float": np.array(0, np.uint8),
        "up.compute_dtype": text("torch.float16"),
    }
    return tensors, values.reshape(shape)


def random_view(rows: int, columns: int, bits: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1 << bits, (rows, columns), np.uint8)
