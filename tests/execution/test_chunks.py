"""The row arithmetic of steps and chunks, against a reference that handles one row at a time."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from requant.checkpoints.checkpoint import StoredTensor
from requant.core.dtypes import TensorInfo
from requant.execution.chunks import Chunk, contiguous_runs, matrix_runs
from requant.execution.hessian_cache import HessianCache
from requant.execution.operations import WorkerBuffers, make_outputs
from requant.execution.source_reader import bytes_of
from requant.formats.base import RowOrder
from requant.packings.base import Packing, Rect
from requant.planning.plan import EncodeParams, Operation, OutputTensor, RowMapping, Step
from requant.quantization.config import Quantization

COLUMNS = 32


@dataclass(frozen=True)
class Numbered(Packing):
    """Every value of a row is the number of the row."""

    rows: int
    columns: int
    matrix: int
    unit: int

    @property
    def matrix_rows(self) -> int:
        return self.matrix

    @property
    def row_unit(self) -> int:  # type: ignore[override]
        return self.unit

    def required_rects(self, start: int, stop: int) -> dict[str, Rect]:
        check_range(self, start, stop)
        return {"rows": Rect((start, stop), (0, self.columns))}

    def decode(
        self, parts: Mapping[str, np.ndarray], start: int, stop: int, out: np.ndarray, scratch: Any
    ) -> None:
        check_range(self, start, stop)
        assert out.shape == parts["rows"].shape == (stop - start, self.columns)
        out[:] = parts["rows"]


def check_range(packing: Numbered, start: int, stop: int) -> None:
    """What a packing may rely on: one matrix, and whole units but for the end of the matrix."""
    assert 0 <= start < stop <= packing.rows
    assert start // packing.matrix == (stop - 1) // packing.matrix
    assert start % packing.matrix % packing.unit == 0
    assert stop % packing.matrix % packing.unit == 0 or stop % packing.matrix == 0


@st.composite
def steps(draw: st.DrawFn) -> tuple[Step, int]:
    """A step that decodes rows of a packed stack, and how many rows a worker has room for."""
    matrices, matrix = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    stored = matrices * matrix
    strided = draw(st.booleans())
    unit = 1 if strided else draw(st.integers(1, 5))
    packing = Numbered(stored, COLUMNS, matrix, unit)
    if strided:
        first, step = draw(st.integers(0, stored - 1)), draw(st.integers(2, 4))
        count = draw(st.integers(1, -(-(stored - first) // step)))
    else:
        borders = sorted(
            {n * matrix + at for n in range(matrices) for at in range(0, matrix, unit)} | {stored}
        )
        first = draw(st.sampled_from(borders[:-1]))
        count = draw(st.sampled_from([x for x in borders if x > first])) - first
        step = 1
    output_row = draw(st.integers(0, 5))
    order = None
    if draw(st.booleans()):
        order = RowOrder.of(np.array(draw(st.permutations(range(count)))))
    total = output_row + count + draw(st.integers(0, 3))
    made = Step(
        layer="x",
        operation=Operation.DECODE,
        rows=RowMapping(
            count=count, columns=COLUMNS, first=first, step=step, output_row=output_row, order=order
        ),
        inputs={"rows": StoredTensor("x.rows", TensorInfo("F32", (stored, COLUMNS)), "m", 0)},
        outputs={"weight": OutputTensor("x.weight", TensorInfo("F32", (total, COLUMNS)))},
        dtype="F32",
        packing=packing,
    )
    return made, draw(st.integers(1, 20))


def starts(chunk: Chunk) -> Iterator[int]:
    """Rows at which a run that was stopped may resume: where a piece ended."""
    yield from {part.stop for part in chunk.parts(3 * chunk.step.work_bytes_per_row)}


def run(chunk: Chunk, room: int, written: dict[int, int]) -> None:
    """Decode a chunk piece by piece as ``executor`` does: output row -> the stored row in it."""
    step, buffers = chunk.step, WorkerBuffers(HessianCache(1))
    assert isinstance(step.packing, Numbered)
    tensor = np.repeat(np.arange(step.packing.rows, dtype=np.float32), COLUMNS).reshape(-1, COLUMNS)
    for part in chunk.parts(room * step.work_bytes_per_row):
        assert part.rows <= max(room, step.packing.row_unit)
        cuts = step.packing.required_rects(*step.rows.stored_rows(part.start, part.stop))
        inputs = {role: tensor[slice(*cut.rows)].copy() for role, cut in cuts.items()}
        outputs, finding = make_outputs(part, inputs, buffers)
        assert not finding.nonzero_fields()
        data = np.frombuffer(bytes_of(outputs["weight"]), np.float32).reshape(-1, COLUMNS)
        for first, last, row in contiguous_runs(part):
            for number, values in enumerate(data[first:last]):
                at = step.rows.output_row + row + number
                assert at not in written
                assert (values == values[0]).all()
                written[at] = int(values[0])


def expected(step: Step, start: int, stop: int) -> dict[int, int]:
    """One row at a time, as ``RowMapping`` defines them."""
    rows, found = step.rows, {}
    for row in range(start, stop):
        to = row if rows.order is None else list(rows.order.rows).index(row)
        found[rows.output_row + to] = rows.first + row * rows.step
    return found


@given(steps())
def test_every_row_lands_once_where_it_belongs(drawn: tuple[Step, int]) -> None:
    step, room = drawn
    written: dict[int, int] = {}
    run(Chunk(step, 0, step.rows.count), room, written)
    assert written == expected(step, 0, step.rows.count)


@given(steps(), st.integers(1, 20), st.data())
def test_a_run_that_was_stopped_and_resumed_in_other_chunks(
    drawn: tuple[Step, int], other_room: int, data: st.DataObject
) -> None:
    step, room = drawn
    stop = data.draw(st.sampled_from(sorted(starts(Chunk(step, 0, step.rows.count)))))
    written: dict[int, int] = {}
    run(Chunk(step, 0, stop), room, written)
    assert written == expected(step, 0, stop)
    if stop < step.rows.count:
        run(Chunk(step, stop, step.rows.count), other_room, written)
    assert written == expected(step, 0, step.rows.count)


class NoStatistics:
    """Represents an ``Importance``: only that there is one matters here."""


@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 6), st.integers(1, 12), st.booleans())
def test_each_row_is_counted_to_the_matrix_that_it_is_written_to(
    matrices: int, matrix_rows: int, output_row: int, count: int, ordered: bool
) -> None:
    shape = (matrices, matrix_rows, COLUMNS // 8)
    count = max(1, min(count, prod(shape[:2]) - output_row))
    order = RowOrder.of(np.random.default_rng(count).permutation(count)) if ordered else None
    importance: Any = NoStatistics()
    step = Step(
        layer="x",
        operation=Operation.ENCODE,
        rows=RowMapping(count=count, columns=COLUMNS, output_row=output_row, order=order),
        inputs={},
        outputs={"weight": OutputTensor("x.weight", TensorInfo("U32", shape))},
        encode=EncodeParams(target=Quantization.affine(32, 4), importance=importance),
    )
    for start in range(count):
        chunk = Chunk(step, start, count)
        found = [n for first, last, n in matrix_runs(chunk) for _ in range(first, last)]
        to = [row if order is None else int(order.inverse[row]) for row in range(start, count)]
        assert found == [(output_row + row) // matrix_rows for row in to]


# -- the examples of the docstrings ----------------------------------------------------------
def pieces(packing: Numbered, rows: RowMapping, start: int, stop: int, room: int) -> list[Any]:
    step = Step(
        layer="x",
        operation=Operation.DECODE,
        rows=rows,
        inputs={},
        outputs={"weight": OutputTensor("x", TensorInfo("F32", (rows.count, COLUMNS)))},
        dtype="F32",
        packing=packing,
    )
    parts = Chunk(step, start, stop).parts(room * step.work_bytes_per_row)
    return [(part.start, part.stop) for part in parts]


def test_pieces_end_at_units_and_matrices() -> None:
    rows = RowMapping(count=30, columns=COLUMNS)
    found = pieces(Numbered(30, COLUMNS, 10, 2), rows, 6, 24, room=5)
    assert found == [(6, 8), (8, 10), (10, 14), (14, 18), (18, 20), (20, 24)]


def test_pieces_of_every_other_row() -> None:
    rows = RowMapping(count=10, columns=COLUMNS, first=1, step=2)
    found = pieces(Numbered(20, COLUMNS, 10, 1), rows, 0, 7, room=4)
    assert found == [(0, 4), (4, 5), (5, 7)]
    assert [rows.stored_rows(*piece) for piece in found] == [(1, 8), (9, 10), (11, 14)]


@pytest.mark.parametrize("start, stop, stored", [(0, 1, (1, 2)), (1, 3, (3, 6)), (0, 4, (1, 8))])
def test_rows_of_a_step_in_the_packed_layer(start: int, stop: int, stored: tuple[int, int]) -> None:
    """Up of gate and up that take turns: the stored rows 1, 3, 5 and 7."""
    up = RowMapping(count=4, columns=COLUMNS, first=1, step=2, output_row=4)
    assert up.stored_rows(start, stop) == stored
