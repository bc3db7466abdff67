"""Step 4 of the road: the plan's steps, cut into chunks of rows that a worker takes one by one.

Counts rows only: nothing here reads or computes. Chunks share nothing, so their order and number
change no byte of an output.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from requant.blueprint import Step
from requant.checkpoint import ComputedTensor
from requant.journal import Done
from requant.memory import Budget
from requant.sink import Ledger


@dataclass(frozen=True, slots=True)
class Chunk:
    """A range of a step's rows.

    Attributes:
        step: What is done to them.
        start: First row.
        stop: The row after the last one.
        number: Of the step in the plan; -1 for one that only computes a tensor for another.
    """

    step: Step
    start: int
    stop: int
    number: int = -1

    @property
    def rows(self) -> int:
        """How many they are."""
        return self.stop - self.start

    def parts(self, chunk_bytes: int) -> Iterator[Chunk]:
        """The same rows in pieces that a worker's buffers hold."""
        step = self.step
        rows = max(1, chunk_bytes // max(1, step.work_bytes_per_row))
        if step.packing is None:
            for start in range(self.start, self.stop, rows):
                yield replace(self, start=start, stop=min(start + rows, self.stop))
            return
        rows = max(rows // step.packing.row_unit, 1) * step.packing.row_unit
        start = self.start  # rows of a piece count from the packed layer's first_row
        while start < self.stop:
            within = step.rows.stored_rows(start, start + 1)[0] % step.packing.matrix_rows
            left = -(-(step.packing.matrix_rows - within) // step.rows.step)
            room = min(rows if step.rows.step > 1 else rows - within % rows, left)
            yield replace(self, start=start, stop=min(start + room, self.stop))
            start += room


def runs_of(chunk: Chunk) -> Iterator[tuple[int, int, int]]:
    """Rows of a chunk that stay together: first, last, and the place of the first."""
    if chunk.step.rows.order is None:
        yield 0, chunk.rows, chunk.start
        return
    places = chunk.step.rows.order.inverse[chunk.start : chunk.stop]
    borders = [0, *(np.flatnonzero(np.diff(places) != 1) + 1).tolist(), len(places)]
    for first, last in pairwise(borders):
        yield first, last, int(places[first])


def runs_of_a_matrix(chunk: Chunk) -> Iterator[tuple[int, int, int]]:
    """Rows of a chunk that belong to one matrix of a stack: first, last, and which it is."""
    step, count = chunk.step, chunk.rows
    if step.importance is None:  # nothing asks which
        yield 0, count, 0
        return
    rows = np.arange(chunk.start, chunk.stop)
    places = rows if step.rows.order is None else step.rows.order.inverse[rows]
    matrices = (places + step.rows.output_row) // step.outputs["weight"].info.shape[-2]
    borders = [0, *(np.flatnonzero(np.diff(matrices)) + 1).tolist(), count]
    for first, last in pairwise(borders):
        yield first, last, int(matrices[first])


def chunks_left(steps: Sequence[Step], budget: Budget, ledger: Ledger | None) -> Iterator[Chunk]:
    """What workers take one by one; a computed tensor stays with the worker that has it."""
    before = Done() if ledger is None else ledger.state
    for number in range(len(steps)) if ledger is None else ledger.order:
        step = steps[number]
        for start, stop in list(before.left(number, step.rows.count)):
            whole = Chunk(step, start, stop, number)
            if any(isinstance(tensor, ComputedTensor) for tensor in step.inputs.values()):
                yield whole
            else:
                yield from whole.parts(budget.chunk_of(step))
