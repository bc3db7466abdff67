"""The power of a layer's inputs, estimated from the layer's weights alone; errors weighted by it.

Training leaves a trace of large inputs in the weights. A column whose input is large has small
weights, and few of them are much larger than the others: each step of training changes such a
column most, so that only what helps stays away from zero. With the mean square ``s`` and the mean
magnitude ``a`` of a column the power of its input is estimated as ``(s / a^2)^10 / s``. For normal
weights ``s / a^2`` is 1.57 in every column.

Rows of embeddings and heads belong to tokens. There the columns of large inputs are those without
large weights, and the estimate is ``(s / a^2)^-6``.

The exponents were chosen on two models by the error of layers, weighted with the mean squares of
real inputs (benchmarks/quality.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from requant.core.dtypes import HEADER_NAME
from requant.kernels import _native
from requant.kernels.float_views import as_unsigned

Array = np.ndarray[Any, np.dtype[Any]]

_EXPONENT, _TOKENS_EXPONENT = 10, 6
# With so many rows the exponent is halved: shapes of short columns are mostly chance.
_HALVING_ROWS = 64
# Rows of a matrix that are read at least, if it has as many; in blocks, spread over all rows.
_SAMPLED_ROWS = 2048
BLOCK_ROWS = 64


class ColumnSums:
    """Sums of the magnitudes and squares of each column, over rows that are added in order."""

    def __init__(self, columns: int) -> None:
        self.rows = 0
        self.magnitudes = np.zeros(columns)
        self.squares = np.zeros(columns)

    def add(self, values: Array) -> None:
        """Add rows ``(rows, columns)``, float32, float16 or bfloat16, C-contiguous."""
        sums = self.magnitudes.view(np.uint64), self.squares.view(np.uint64)
        _native.column_sums(as_unsigned(values), HEADER_NAME[values.dtype], *sums)
        self.rows += len(values)


def sampled_blocks(rows: int) -> Iterator[tuple[int, int]]:
    """The rows of a matrix that are read for an estimate: first, last, in blocks.

    Of 8192 rows every fourth block of 64 rows; of up to 4095 all rows, as one block.
    """
    distance = rows // _SAMPLED_ROWS
    if distance < 2:
        yield 0, rows
        return
    for first in range(0, rows, distance * BLOCK_ROWS):
        yield first, min(first + BLOCK_ROWS, rows)


def estimated_power(weight: Array, rows_are_tokens: bool = False) -> Array:
    """The estimated power of each input of one matrix ``(out_features, in_features)``."""
    sums = ColumnSums(weight.shape[1])
    for first, last in sampled_blocks(len(weight)):
        sums.add(np.ascontiguousarray(weight[first:last]))
    return input_power(sums, rows_are_tokens)


def input_power(sums: ColumnSums, rows_are_tokens: bool = False) -> Array:
    """The power of each input, relative to the largest: float32 ``(in_features,)``.

    A column of zeros gets the least power of all. All are 1 where no column has a finite one.
    """
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        shape = sums.rows * sums.squares / sums.magnitudes**2
        if rows_are_tokens:
            power = 1.0 / _raised(shape, _TOKENS_EXPONENT)
        else:
            exponent = round(_EXPONENT * sums.rows / (sums.rows + _HALVING_ROWS))
            power = _raised(shape, exponent) * (sums.rows / sums.squares)
    usable = np.isfinite(power) & (power > 0.0)
    if not usable.any():
        return np.ones(power.size, np.float32)
    relative: Array = np.where(usable, power, power[usable].min()) / power[usable].max()
    return relative.astype(np.float32)


def _raised(x: Array, exponent: int) -> Array:
    """A power by products alone: those of ``**`` differ from machine to machine."""
    power: Array = np.ones_like(x)
    for _ in range(exponent):
        power = power * x
    return power


def weighted_error(
    dense: Array, decoded: Array, group_size: int, columns: Array | None, by_magnitude: bool
) -> tuple[float, float]:
    """The sums of weighted squared errors and of weighted squared values.

    The weights are those that a search of ``dense`` minimizes, up to a factor for each group.

    Args:
        dense: Values that were quantized, ``(rows, in_features)``, C-contiguous.
        decoded: The decoded values, of the same shape and dtype.
        group_size: Values of a group.
        columns: Weights of the inputs, float32 ``(in_features,)``; None for ones.
        by_magnitude: Whether they are multiplied with the magnitude of each value.
    """
    weights = None if columns is None else columns.view(np.uint32)
    name = HEADER_NAME[dense.dtype]
    pair = as_unsigned(dense), as_unsigned(decoded)
    error, values = _native.weighted_errors(*pair, name, group_size, weights, by_magnitude)
    return float(error), float(values)
