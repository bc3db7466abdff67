"""Integer zero points of MLX's affine groups.

MLX has ``w = code * scale + bias``, formats with zero points ``w = (code - zero) * scale``. The two
are equal where ``bias = -zero * scale`` with an integer ``zero`` that the bits of a code hold. A
scale may be negative, and keeps its sign: the same values with a positive one have ``2^bits - 1``
minus the code and minus the zero, which is in the same range.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from requant.core.dtypes import NUMPY_DTYPE
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
        off_grid: Groups whose bias is not ``-zero * scale`` within one rounding of each.
        out_of_range: Further groups whose zero point is not in ``0 .. 2^bits - 1``.
        rounded: Groups on the grid where ``-zero * scale``, rounded to the dtype, is another bias.
        max_steps: The largest difference of biases in those groups, in steps of the scale.
        lowest: The lowest zero point of those on the grid; infinity of none.
        highest: The highest one.
        nonfinite: Scales and biases that are NaN or infinite.
        overflowed: Scales that are beyond the range of the dtype in which they are written.
        scales_rounded: Further scales that this dtype rounds.
    """

    groups: int = 0
    off_grid: int = 0
    out_of_range: int = 0
    rounded: int = 0
    max_steps: float = 0.0
    lowest: float = np.inf
    highest: float = -np.inf
    nonfinite: int = 0
    overflowed: int = 0
    scales_rounded: int = 0

    def merged(self, other: ZeroPoints) -> ZeroPoints:
        """Both together."""
        return ZeroPoints(
            groups=self.groups + other.groups,
            off_grid=self.off_grid + other.off_grid,
            out_of_range=self.out_of_range + other.out_of_range,
            rounded=self.rounded + other.rounded,
            max_steps=max(self.max_steps, other.max_steps),
            lowest=min(self.lowest, other.lowest),
            highest=max(self.highest, other.highest),
            nonfinite=self.nonfinite + other.nonfinite,
            overflowed=self.overflowed + other.overflowed,
            scales_rounded=self.scales_rounded + other.scales_rounded,
        )

    def all_middle(self, bits: int) -> bool:
        """Whether every zero point is ``2^(bits - 1)``."""
        return self.lowest == self.highest == 1 << (bits - 1)

    def fit(self, bits: int, wide: int) -> bool:
        """Whether codes of ``bits`` bits and their zero points fit ``wide`` bits.

        A zero point below 0 is moved to 0 and the codes of its group up with it.
        """
        room = (1 << wide) - (1 << bits)
        return not self.off_grid and -room <= self.lowest and self.highest < 1 << wide


def examine_zeros(
    scales: Array, biases: Array, bits: int, dtype: str, written: str = ""
) -> ZeroPoints:
    """Describe the zero points of groups.

    Args:
        scales: One a group.
        biases: Likewise.
        bits: Of a code.
        dtype: Header name of the dtype to which scales and biases were rounded.
        written: Header name of the dtype in which scales are written; theirs by default.
    """
    nonfinite = int((~np.isfinite(scales)).sum() + (~np.isfinite(biases)).sum())
    if nonfinite:
        return ZeroPoints(groups=scales.size, nonfinite=nonfinite)
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
    rounded = on_grid & ~same
    steps = difference[rounded] / np.abs(wide[rounded])
    overflowed = scales_rounded = 0
    if written and NUMPY_DTYPE[written] != scales.dtype:
        with np.errstate(over="ignore"):
            narrow = wide.astype(NUMPY_DTYPE[written]).astype(np.float32)
        overflowed = int((~np.isfinite(narrow)).sum())
        scales_rounded = int((np.isfinite(narrow) & (narrow != wide)).sum())
    return ZeroPoints(
        groups=scales.size,
        off_grid=int((~on_grid).sum()),
        out_of_range=int((on_grid & ~in_range).sum()),
        rounded=int(rounded.sum()),
        max_steps=float(steps.max(initial=0.0)),
        lowest=float(zeros[on_grid].min(initial=np.inf)),
        highest=float(zeros[on_grid].max(initial=-np.inf)),
        overflowed=overflowed,
        scales_rounded=scales_rounded,
    )
