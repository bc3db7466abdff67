"""Every 16-bit value under every scale: the float modes' shortcuts work on stored bits.

The kernels compare stored bits with thresholds where MLX divides and searches; 16-bit
dtypes are small enough to try them all.
"""

from functools import lru_cache

import numpy as np
import pytest

from requant.kernels.quantize import quantize
from requant.quantization.config import Quantization
from tests.support import reference
from tests.support.inputs import assert_same_bits
from tests.support.mlx_arrays import mlx_quantize
from tests.support.reference import BF16, F16

pytestmark = pytest.mark.sweep(1)

LARGEST = {"mxfp4": 6.0, "mxfp8": 448.0}


def magnitudes(dtype):
    every = np.arange(0x8000, dtype=np.uint16).view(dtype)
    return every[np.isfinite(every.astype(np.float32))]


def groups_below(tops, dtype, size):
    """For each top, groups that start with it and together hold every value up to it.

    Signs alternate in an order of their own, so that each value meets both.
    """
    every = magnitudes(dtype)
    wide = every.astype(np.float32)
    rows = []
    for k, top in enumerate(tops):
        below = every[wide <= np.float32(top)]
        below = np.concatenate([below, -below])
        padded = np.zeros(-(-len(below) // (size - 1)) * (size - 1), dtype)
        padded[: len(below)] = below
        padded = padded.reshape(-1, size - 1)
        first = np.full((len(padded), 1), top).astype(dtype)
        rows.append(np.concatenate([first if k % 2 else -first, padded], axis=1))
    w = np.concatenate(rows)
    return w if len(w) % 2 == 0 else np.concatenate([w, w[:1]])


@lru_cache(maxsize=1)
def mx_case(mode, dtype):
    low, high = (-127, 127) if dtype == BF16 else (-24, 15)
    scales = np.exp2(np.arange(low, high + 1, dtype=np.float64))
    tops = (scales * LARGEST[mode]).astype(np.float32)
    kept = tops.astype(dtype).astype(np.float32)
    w = groups_below(tops[np.isfinite(kept) & (kept == tops)], dtype, 32)
    return w, mlx_quantize(w, 32, 4 if mode == "mxfp4" else 8, mode)


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("mode", LARGEST)
def test_mx(mode, dtype):
    w, expected = mx_case(mode, dtype)
    words, scales, _ = quantize(w, Quantization(32, 4 if mode == "mxfp4" else 8, mode))
    assert_same_bits(scales, expected[1])
    assert_same_bits(words, expected[0])


@lru_cache(maxsize=1)
def nvfp4_case(dtype):
    """The largest top of each scale byte, and the one below the largest."""
    every = magnitudes(dtype)
    s = reference.rounded(every.astype(np.float32) / np.float32(6), dtype)
    byte = reference.encode_e4m3(s)
    tops = [every[byte == c].astype(np.float32).max() for c in range(0x7F) if (byte == c).any()]
    w = groups_below(tops, dtype, 16)
    return w, mlx_quantize(w, 16, 4, "nvfp4")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [F16, BF16])
def test_nvfp4(dtype):
    w, expected = nvfp4_case(dtype)
    words, scales, _ = quantize(w, Quantization(16, 4, "nvfp4"))
    assert len(np.unique(scales)) == 0x7F
    assert_same_bits(scales, expected[1])
    assert_same_bits(words, expected[0])
