"""Pipeline stage 4: the plan's steps, cut into chunks of rows that a worker takes one by one.

Counts rows only: nothing here reads or computes. Chunks share nothing, so their order and number
change no byte of an output.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from requant.checkpoints.checkpoint import ComputedTensor
from requant.execution.completed_work import CompletedWork
from requant.execution.resources import ResourceLimits
from requant.execution.sink import ProgressLog, order_of
from requant.planning.plan import Step


@dataclass(frozen=True, slots=True)
class Chunk:
    """A range of a step's rows."""

    step: Step
    start: int
    stop: int  # the row after the last one
    number: int = -1  # of the step in the plan; -1 for one that only computes a tensor for another

    @property
    def rows(self) -> int:
        """How many rows it has."""
        return self.stop - self.start

    def parts(self, chunk_bytes: int) -> Iterator[Chunk]:
        """The same rows in pieces that a worker's buffers hold.

        Rows of a packed layer have two kinds of borders. A piece never spans two matrices of a
        stack, and it starts and ends at whole units of the packing (``row_unit`` rows), counted
        from the start of the matrix, or at the matrix's end.

        Example: matrices of 10 rows, units of 2, room for 5 rows. Pieces take 4 rows, the whole
        units that fit. The rows 6 to 24 become 6-8, 8-10, then 10-14, 14-18, 18-20, then 20-24:
        each piece ends at the next multiple of 4 from the start of its matrix, at most at its end.

        With ``rows.step`` 2 and ``rows.first`` 1 the rows 0, 1, 2, ... are the stored rows 1, 3,
        5, 7, 9 of the first matrix, then 11, 13, ... of the second. With room for 4 rows, the rows
        0 to 7 become 0-4 (stored 1 to 7), 4-5 (stored 9) and 5-7 (stored 11 and 13).
        """
        step, packing = self.step, self.step.packing
        rows = max(1, chunk_bytes // max(1, step.work_bytes_per_row))
        if packing is None:
            for start in range(self.start, self.stop, rows):
                yield replace(self, start=start, stop=min(start + rows, self.stop))
            return
        rows = max(rows // packing.row_unit, 1) * packing.row_unit
        start = self.start
        while start < self.stop:
            stored, _ = step.rows.stored_rows(start, start + 1)
            in_matrix = stored % packing.matrix_rows
            # Rows of the step until the matrix ends; rounded up: 9 stored rows in steps of 2 are 5.
            to_matrix_end = -(-(packing.matrix_rows - in_matrix) // step.rows.step)
            # A strided layer has units of one row, so its pieces may end anywhere.
            to_border = rows - in_matrix % rows if step.rows.step == 1 else rows
            stop = min(start + to_border, start + to_matrix_end, self.stop)
            yield replace(self, start=start, stop=stop)
            start = stop


def contiguous_runs(chunk: Chunk) -> Iterator[tuple[int, int, int]]:
    """Rows of a chunk that stay together in the output: first, last, and the first's output row.

    First and last count from the chunk's first row; ``rows.output_row`` is not added.

    Example: the rows 2 to 6 of a step go to the output rows 7, 8, 0 and 1 (``order.inverse``).
    These are the runs (0, 2, 7) and (2, 4, 0).
    """
    order = chunk.step.rows.order
    if order is None:
        yield 0, chunk.rows, chunk.start
        return
    output_rows = order.inverse[chunk.start : chunk.stop]
    borders = [0, *(np.flatnonzero(np.diff(output_rows) != 1) + 1).tolist(), len(output_rows)]
    for first, last in pairwise(borders):
        yield first, last, int(output_rows[first])


def matrix_runs(chunk: Chunk) -> Iterator[tuple[int, int, int]]:
    """Rows of a chunk that belong to one matrix of a stack: first, last, and which it is.

    First and last count from the chunk's first row.

    Example: an output of 3 matrices with 4 rows each, and a step whose ``output_row`` is 6. Its
    rows 0 to 5 are the output rows 6 to 11: the runs (0, 2, 1) and (2, 5, 2).
    """
    step, count = chunk.step, chunk.rows
    # Only weights of the errors differ from matrix to matrix.
    if step.importance is None and step.estimate is None:
        yield 0, count, 0
        return
    rows = np.arange(chunk.start, chunk.stop)
    output_rows = rows if step.rows.order is None else step.rows.order.inverse[rows]
    matrices = (output_rows + step.rows.output_row) // step.matrix_rows
    borders = [0, *(np.flatnonzero(np.diff(matrices)) + 1).tolist(), count]
    for first, last in pairwise(borders):
        yield first, last, int(matrices[first])


def remaining_units(
    steps: Sequence[Step], limits: ResourceLimits, progress_log: ProgressLog | None
) -> Iterator[Chunk]:
    """The units of work that are not done: rows that one worker takes, chunk by chunk.

    A step with a computed tensor, or a Hessian to factor (GPTQ), is one unit: one worker makes
    what its rows need, while the others work on other steps.
    """
    before = CompletedWork() if progress_log is None else progress_log.state
    for number in order_of(steps, progress_log):
        step = steps[number]
        for start, stop in list(before.remaining(number, step.rows.count)):
            whole = Chunk(step, start, stop, number)
            if step.gptq or computed_inputs(step):
                yield whole
            else:
                yield from whole.parts(limits.unit_bytes_for(step))


def computed_inputs(step: Step) -> list[ComputedTensor]:
    """The inputs of a step that a model's own rule computes."""
    return [tensor for tensor in step.inputs.values() if isinstance(tensor, ComputedTensor)]
