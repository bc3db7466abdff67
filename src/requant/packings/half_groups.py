"""Scales and biases of affine groups as float16 numbers, in which blocks of GGUF files have them.

``code * scale + bias`` is a block with ``d`` and ``m``. It is one with ``d`` alone where
``bias = -zero * scale`` with an integer ``zero`` by which the codes can be moved.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from requant.packings.base import Array
from requant.packings.zero_points import integer_zeros

# Type -> lowest and highest integer that multiplies ``d``; of a type with ``m`` those are codes.
_WITHOUT_BIAS: Final = {"Q4_0": (-8, 7), "Q5_0": (-16, 15), "Q8_0": (-128, 127)}
_CANDIDATES: Final = {
    **dict.fromkeys((2, 3, 4), ("Q4_0", "Q4_1")),
    5: ("Q5_0", "Q5_1"),
    **dict.fromkeys((6, 8), ("Q8_0",)),
}
_MOST_STEPS: Final = 1 / 8  # what encoding 6 bits again as Q8_0 would cost


@dataclass(frozen=True, slots=True)
class HalfGroups:
    """How well float16 numbers describe the groups of a layer.

    Attributes:
        groups: Number of groups.
        nonfinite: Scales and biases that are NaN or infinite.
        lowest: The lowest zero point.
        highest: The highest one.
        scale_steps: The largest relative difference of a scale and its float16 number; infinity
            where there is none.
        bias_steps: The largest difference of a bias and its float16 number, in scales.
        zero_steps: The largest difference of a bias and ``-zero * scale``, in scales.
    """

    groups: int = 0
    nonfinite: int = 0
    lowest: float = np.inf
    highest: float = -np.inf
    scale_steps: float = 0.0
    bias_steps: float = 0.0
    zero_steps: float = 0.0

    def merged(self, other: HalfGroups) -> HalfGroups:
        """Both together."""
        return HalfGroups(
            groups=self.groups + other.groups,
            nonfinite=self.nonfinite + other.nonfinite,
            lowest=min(self.lowest, other.lowest),
            highest=max(self.highest, other.highest),
            scale_steps=max(self.scale_steps, other.scale_steps),
            bias_steps=max(self.bias_steps, other.bias_steps),
            zero_steps=max(self.zero_steps, other.zero_steps),
        )

    def steps(self, kind: str, bits: int) -> float:
        """The largest difference that a type makes of a value, in scales; infinity if it has none.

        Args:
            kind: Name of the type.
            bits: Of a code.
        """
        codes = (1 << bits) - 1
        if kind not in _WITHOUT_BIAS:
            return codes * self.scale_steps + self.bias_steps
        low, high = _WITHOUT_BIAS[kind]
        if -self.highest < low or codes - self.lowest > high:
            return np.inf
        return max(-low, high) * self.scale_steps + self.zero_steps

    def best(self, bits: int) -> tuple[str, float] | None:
        """The type that differs least, and by how many scales; None where none holds the codes."""
        found = [(self.steps(kind, bits), kind) for kind in _CANDIDATES[bits]]
        steps, kind = min(found, key=lambda pair: pair[0])
        return (kind, steps) if steps <= _MOST_STEPS else None


def examine_halves(scales: Array, biases: Array) -> HalfGroups:
    """Describe groups; scales and biases of any float dtype, equal in shape."""
    nonfinite = int((~np.isfinite(scales)).sum() + (~np.isfinite(biases)).sum())
    if nonfinite or not scales.size:
        return HalfGroups(groups=scales.size, nonfinite=nonfinite)
    zeros = integer_zeros(scales, biases).astype(np.float64)
    wide, given = scales.astype(np.float64), biases.astype(np.float64)
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        halves = [x.astype(np.float32).astype(np.float16).astype(np.float64) for x in (wide, given)]
        # A scale of 0 leaves the bias alone, which then is exact or not at all.
        steps = [
            np.where(difference == 0, 0, np.abs(difference / wide))
            for difference in (wide - halves[0], given - halves[1], given + zeros * wide)
        ]
    scale, bias, zero = (float(np.nan_to_num(x, nan=np.inf).max()) for x in steps)
    return HalfGroups(
        groups=scales.size,
        lowest=float(zeros.min()),
        highest=float(zeros.max()),
        scale_steps=scale,
        bias_steps=bias,
        zero_steps=zero,
    )
