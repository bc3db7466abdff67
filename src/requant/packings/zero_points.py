"""Integer zero points of MLX's affine groups.

MLX has ``w = code * scale + bias``, formats with zero points ``w = (code - zero) * scale``. The two
are equal where ``bias = -zero * scale`` with an integer ``zero`` that the bits of a code hold. A
scale may be negative, and keeps its sign: the same values with a positive one have ``2^bits - 1``
minus the code and minus the zero, which is in the same range.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from requant.packings.base import PRECISION, Array


def integer_zeros(scales: Array, biases: Array) -> Array:
    """The nearest integer to ``-bias / scale`` of each group, float32.

    A scale of zero has the zero point 0.
    """
    scales, biases = scales.astype(np.float32), biases.astype(np.float32)
    zeros = np.zeros(scales.shape, np.float32)
    with np.errstate(over="ignore"):
        np.divide(-biases, scales, out=zeros, where=scales != 0)
    return np.asarray(np.rint(zeros) + np.float32(0))  # 0, not -0


@dataclass(frozen=True, slots=True)
class ZeroPoints:
    """How well integer zero points describe the biases of a layer.

    Attributes:
        groups: Number of groups.
        out_of_range: Groups whose zero point is not in ``0 .. 2^bits - 1``.
        off_grid: Further groups whose bias is not ``-zero * scale`` within one rounding of each.
        rounded: Further groups where ``-zero * scale``, rounded to the dtype, is another bias.
        max_steps: The largest difference of biases in those groups, in steps of the scale.
        all_middle: Whether every zero point is ``2^(bits - 1)``.
        nonfinite: Scales and biases that are NaN or infinite.
    """

    groups: int = 0
    out_of_range: int = 0
    off_grid: int = 0
    rounded: int = 0
    max_steps: float = 0.0
    all_middle: bool = True
    nonfinite: int = 0

    def merged(self, other: ZeroPoints) -> ZeroPoints:
        """Both together."""
        return ZeroPoints(
            groups=self.groups + other.groups,
            out_of_range=self.out_of_range + other.out_of_range,
            off_grid=self.off_grid + other.off_grid,
            rounded=self.rounded + other.rounded,
            max_steps=max(self.max_steps, other.max_steps),
            all_middle=self.all_middle and other.all_middle,
            nonfinite=self.nonfinite + other.nonfinite,
        )


def examine_zeros(scales: Array, biases: Array, bits: int, dtype: str) -> ZeroPoints:
    """Describe the zero points of groups whose scales are stored as ``dtype`` (a header name)."""
    nonfinite = int((~np.isfinite(scales)).sum() + (~np.isfinite(biases)).sum())
    if nonfinite:
        return ZeroPoints(groups=scales.size, all_middle=False, nonfinite=nonfinite)
    zeros = integer_zeros(scales, biases)
    in_range = (zeros >= 0) & (zeros < 1 << bits)
    wide, given = scales.astype(np.float32), biases.astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        product = np.float32(-1) * zeros * wide
        same = product.astype(scales.dtype).astype(np.float32) == given
        # In float64, so that the difference itself does not round.
        difference = np.abs(given.astype(np.float64) + zeros.astype(np.float64) * wide)
    # A scale and a bias, each rounded by half a unit in the last place.
    unit = float(np.finfo(np.float32).tiny if dtype != "F16" else 2.0**-24)
    tolerance = np.abs(given.astype(np.float64)) * 2.0 ** (1 - PRECISION[dtype]) + unit
    on_grid = same | (difference <= tolerance)
    rounded = in_range & on_grid & ~same
    steps = difference[rounded] / np.abs(wide[rounded])
    return ZeroPoints(
        groups=scales.size,
        out_of_range=int((~in_range).sum()),
        off_grid=int((in_range & ~on_grid).sum()),
        rounded=int(rounded.sum()),
        max_steps=float(steps.max(initial=0.0)),
        all_middle=bool((zeros == 1 << (bits - 1)).all()),
    )
