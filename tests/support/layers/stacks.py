"""Sizes and scales of stacks of experts."""

import numpy as np

from tests.support.number_formats import E4M3

EXPERTS, OUT, IN = 3, 64, 128


PLACE = "model.layers.0.mlp.experts"


def small_e4m3(*shape: int) -> np.ndarray:
    """E4M3 from 2^-6 to 240: no layer whose largest scale is 448 could be without another."""
    return np.random.default_rng(7).integers(0x08, 0x77, shape, np.uint8).view(E4M3)
