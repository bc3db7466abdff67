"""Estimated power of the inputs of layers, computed once each and shared by the workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from requant.execution.chunks import Chunk, contiguous_runs
from requant.execution.shared_cache import SharedCache
from requant.kernels.input_power import BLOCK_ROWS, ColumnSums, input_power, sampled_blocks
from requant.planning.plan import RowsOf, Step
from requant.planning.steps import values_step

INPUT_POWER = "input power"
"""The role of the power of each input ``(matrices, in_features)``, next to a step's inputs."""

DecodeRows = Callable[[Chunk], Iterator[tuple[Chunk, np.ndarray]]]
"""Decodes rows of a step: chunks of them, each with its values ``(rows, columns)``."""


class InputPowers:
    """The input powers of steps; of more than ``keep`` the least recently used is dropped."""

    def __init__(self, keep: int) -> None:
        self._powers: SharedCache[int, np.ndarray] = SharedCache(keep)

    def of(self, chunk: Chunk, decode: DecodeRows) -> np.ndarray:
        """The power of each input of a chunk's step: float32 ``(matrices, in_features)``.

        The first matrix is the one that the step's first row belongs to.
        """
        return self._powers.get(chunk.number, lambda: _powers(chunk.step, decode))


def powers_of_matrix(step: Step, powers: np.ndarray, matrix: int) -> np.ndarray:
    """The power of each input of one matrix of the output, of what ``InputPowers.of`` gives."""
    found: np.ndarray = powers[matrix - step.rows.output_row // step.matrix_rows]
    return found


def _powers(step: Step, decode: DecodeRows) -> np.ndarray:
    """The powers of each matrix that the step has rows of, from these rows."""
    rows, first_row = step.matrix_rows, step.rows.output_row
    before = first_row // rows
    after = -(-(first_row + step.rows.count) // rows)
    sums = [ColumnSums(step.rows.columns) for _ in range(before, after)]
    for sampled in _sampled_rows(values_step(step), rows):
        for chunk, values in decode(sampled):
            for first, stop, row in contiguous_runs(chunk):
                _add(sums, values[first:stop], first_row - before * rows + row, rows)
    return np.stack([input_power(x, step.estimate is RowsOf.TOKENS) for x in sums])


def _add(sums: list[ColumnSums], values: np.ndarray, row: int, rows: int) -> None:
    """Add rows, of which the first is ``row`` of all these matrices, to their sums."""
    while len(values):
        matrix, at = divmod(row, rows)
        taken = min(rows - at, len(values))
        sums[matrix].add(values[:taken])
        values, row = values[taken:], row + taken


def _sampled_rows(step: Step, rows: int) -> Iterator[Chunk]:
    """The rows of a step that are read, of matrices with so many ``rows``.

    All of them where a few are not cheaper to decode than their neighbors.
    """
    packing, count = step.packing, step.rows.count
    if packing is not None and (
        packing.strided
        or step.rows.step > 1
        or BLOCK_ROWS % packing.row_unit
        or step.rows.first % BLOCK_ROWS
        or rows % BLOCK_ROWS
    ):
        yield Chunk(step, 0, count)
        return
    for start in range(0, count, rows):
        for first, last in sampled_blocks(min(rows, count - start)):
            yield Chunk(step, start + first, start + last)
