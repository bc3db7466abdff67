"""Number formats that NumPy lacks, and random values in them."""

import ml_dtypes
import numpy as np

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)
BF16 = np.dtype(ml_dtypes.bfloat16)
# The value of each code of FP4 E2M1.
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
E2M1 = np.concatenate([E2M1, -E2M1])


def bf16(*shape: int, seed: int = 0, scale: float = 0.02) -> np.ndarray:
    """Normal values in bfloat16."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) * scale).astype(BF16)


def e4m3(*shape: int, seed: int = 0) -> np.ndarray:
    """Random E4M3 bytes without NaN."""
    codes = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    return np.where(codes & 0x7F == 0x7F, 0x30, codes).astype(np.uint8).view(E4M3)


def nibbles(packed: np.ndarray) -> np.ndarray:
    """The codes of 4 bits in bytes along the last axis, low nibble first."""
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
