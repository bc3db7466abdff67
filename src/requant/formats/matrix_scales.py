"""The stored scale of each matrix of a stack whose rows come from several source layers.

NVFP4 has one scale a matrix next to those of the groups. An output keeps them only if all rows of
each of its matrices have the same one in the source.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from requant.formats.base import RowRange, SourceLayer


@dataclass(frozen=True, slots=True)
class MatrixScale:
    """One number of a source layer's tensor of scales."""

    layer: SourceLayer
    index: int  # which of its scales

    def is_same(self, other: MatrixScale) -> bool:
        """Whether both are one number; a layer may occur under several encodings."""
        return (self.layer.path, self.index) == (other.layer.path, other.index)


def scale_of_each_matrix(
    runs: Sequence[RowRange], matrix_rows: int, rows_per_scale: Callable[[SourceLayer], int]
) -> list[MatrixScale] | None:
    """Find the scale of each matrix of an output.

    Args:
        runs: The rows of the output, in order.
        matrix_rows: Rows of one matrix of the output.
        rows_per_scale: Rows of a source layer that share a scale.

    Returns:
        One scale a matrix; None where rows with different scales meet in one matrix.

    Example: a source layer ``gate_up`` of 2 matrices of 8 rows, with scales s0 and s1, whose even
    rows are the gates. ``RowRange(gate_up, start=0, count=8, step=2)`` is rows 0, 2, ..., 14, to be
    2 matrices of 4 rows:

    * row 0 is row 0 of scale 0 (``divmod(0, 8)``). Of the 8 rows of s0, those from 0 on in steps
      of 2 are ceil((8 - 0) / 2) = 4: they fill matrix 0, whose scale is s0.
    * row 8 is row 0 of scale 1: 4 rows again, matrix 1 has s1.

    With matrices of 8 rows instead, matrix 0 would start with s0 and resume with s1: None.
    """
    found: list[MatrixScale] = []
    filled = 0  # rows of the output that have a scale so far
    for run in runs:
        taken = 0  # rows of the run so far
        while taken < run.count:
            share = rows_per_scale(run.layer)
            index, within = divmod(run.start + taken * run.step, share)
            scale = MatrixScale(run.layer, index)
            if filled % matrix_rows == 0:
                found.append(scale)
            elif not found[-1].is_same(scale):
                return None
            with_this_scale = -(-(share - within) // run.step)  # rounded up
            left_in_matrix = matrix_rows - filled % matrix_rows
            rows = min(with_this_scale, run.count - taken, left_in_matrix)
            taken, filled = taken + rows, filled + rows
    return found
