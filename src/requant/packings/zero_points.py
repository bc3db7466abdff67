"""Integer zero points of MLX's affine groups.

MLX has ``w = code * scale + bias``, formats with zero points ``w = (code - zero) * scale``. The two
are equal where ``bias = -zero * scale`` with an integer ``zero`` that the bits of a code hold. A
scale may be negative, and keeps its sign: the same values with a positive one have ``2^bits - 1``
minus the code and minus the zero, which is in the same range.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np

from requant.core.dtypes import KERNEL_FLOATS, NUMPY_DTYPE
from requant.kernels.cast import cast_into
from requant.packings.base import PRECISION, Array

_KERNEL_DTYPES: Final = tuple(NUMPY_DTYPE[name] for name in KERNEL_FLOATS)


def integer_zeros(scales: Array, biases: Array) -> Array:
    """The nearest integer to ``-bias / scale`` of each group, float32.

    A scale of zero has the zero point 0.
    """
    wide, zeros = _float32(scales), _float32(biases)
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        zeros = np.divide(zeros, -wide)
    if not wide.all():
        zeros[wide == 0] = 0
    np.rint(zeros, out=zeros)
    return np.asarray(zeros + np.float32(0))  # 0, not -0


def _float32(values: Array) -> Array:
    """The same numbers in float32."""
    return np.asarray(_cast(values, np.float32), np.float32)


def _cast(values: Array, dtype: Any) -> Array:
    """Floats in another dtype: kernels are faster than NumPy with bfloat16."""
    if values.dtype == dtype or values.dtype not in _KERNEL_DTYPES:
        return np.asarray(values.astype(dtype, copy=False))
    found = np.empty(values.shape, dtype)
    cast_into(np.ascontiguousarray(values), found)
    return found


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
        scales: One a group, in any shape.
        biases: Likewise.
        bits: Of a code.
        dtype: Header name of the dtype to which scales and biases were rounded.
        written: Header name of the dtype in which scales are written; theirs by default.
    """
    scales, biases = scales.reshape(-1), biases.reshape(-1)
    nonfinite = int((~np.isfinite(scales)).sum() + (~np.isfinite(biases)).sum())
    if nonfinite:
        return ZeroPoints(groups=scales.size, nonfinite=nonfinite)
    zeros = integer_zeros(scales, biases)
    wide, given = _float32(scales), _float32(biases)
    with np.errstate(over="ignore", invalid="ignore"):
        product = np.float32(-1) * zeros
        product *= wide
        other = np.flatnonzero(_float32(_cast(product, scales.dtype)) != given)
    found = _examine_others(wide[other], given[other], zeros[other], dtype)
    on_grid = zeros if found.off_grid is None else np.delete(zeros, other[found.off_grid])
    overflowed = scales_rounded = 0
    if written and NUMPY_DTYPE[written] != scales.dtype:
        with np.errstate(over="ignore"):
            narrow = _float32(_cast(wide, NUMPY_DTYPE[written]))
        changed = narrow[narrow != wide]
        overflowed = int((~np.isfinite(changed)).sum())
        scales_rounded = changed.size - overflowed
    lowest = float(on_grid.min(initial=np.inf))
    highest = float(on_grid.max(initial=-np.inf))
    limit, outside = 1 << bits, 0
    if lowest < 0 or highest >= limit:
        outside = int(((on_grid < 0) | (on_grid >= limit)).sum())
    return ZeroPoints(
        groups=scales.size,
        off_grid=scales.size - on_grid.size,
        out_of_range=outside,
        rounded=other.size - (scales.size - on_grid.size),
        max_steps=found.max_steps,
        lowest=lowest,
        highest=highest,
        overflowed=overflowed,
        scales_rounded=scales_rounded,
    )


class _Others(NamedTuple):
    """Groups whose bias is not ``-zero * scale`` as it would be stored."""

    off_grid: Array | None  # which of them are not within one rounding of each; None for none
    max_steps: float  # the largest difference of the others, in steps of the scale


def _examine_others(wide: Array, given: Array, zeros: Array, dtype: str) -> _Others:
    # In float64, so that the difference itself does not round.
    with np.errstate(invalid="ignore"):
        difference = np.abs(given.astype(np.float64) + zeros.astype(np.float64) * wide)
    # A scale and a bias, each rounded by half a unit in the last place.
    unit = float(np.finfo(np.float32).tiny if dtype != "F16" else 2.0**-24)
    tolerance = np.abs(given.astype(np.float64)) * 2.0 ** (1 - PRECISION[dtype]) + unit
    off = ~(difference <= tolerance)
    steps = difference[~off] / np.abs(wide[~off])
    return _Others(np.flatnonzero(off) if off.any() else None, float(steps.max(initial=0.0)))
