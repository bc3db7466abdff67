"""Byte ranges and rows, with the numbers that the docstrings of ``row_ranges`` give."""

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from requant.checkpoints.byte_ranges import FileRange
from requant.checkpoints.checkpoint import JoinedTensor, StoredTensor
from requant.core.dtypes import TensorInfo
from requant.formats.base import RowRange, SourceLayer, dense_layer
from requant.formats.matrix_scales import MatrixScale, scale_of_each_matrix
from requant.layouts.outputs import ByteCopy, Extent
from requant.layouts.row_ranges import coalesced_tensor, in_whole_units, row_byte_ranges, row_runs

A = dense_layer(StoredTensor("a.weight", TensorInfo("BF16", (4, 8)), "f", 100))


def output(columns: int, *extents: Extent) -> ByteCopy:
    rows = sum(extent.nbytes for extent in extents) // (2 * columns)
    return ByteCopy(TensorInfo("BF16", (rows, columns)), extents)


@pytest.mark.parametrize(
    ("extent", "runs"),
    [
        (Extent("a", 16, 48), (RowRange(A, 1, 2),)),
        (Extent("a", 0, 16, 32, 2), (RowRange(A, 0, 2, 2),)),
        (Extent("a", 0, 32, 32, 2), (RowRange(A, 0, 2), RowRange(A, 2, 2))),
        (Extent("a", 8, 24), None),
        (Extent("a", 0, 8), None),
        (Extent("a", 0, 16, 24, 2), None),
    ],
)
def test_rows_of_bytes(extent: Extent, runs: tuple[RowRange, ...] | None) -> None:
    assert row_runs(output(8, extent), {"a": A}) == runs


def test_rows_of_another_width_are_not_rows() -> None:
    assert row_runs(output(4, Extent("a", 0, 16)), {"a": A}) is None


@pytest.mark.parametrize(
    ("run", "bytes_of_run"),
    [((0, 4, 1), [(100, 64)]), ((1, 2, 1), [(116, 32)]), ((1, 2, 2), [(116, 16), (148, 16)])],
)
def test_bytes_of_rows(run: tuple[int, int, int], bytes_of_run: list[tuple[int, int]]) -> None:
    start, count, step = run
    found = list(row_byte_ranges(RowRange(A, start, count, step), "weight"))
    assert found == [FileRange("f", offset, nbytes) for offset, nbytes in bytes_of_run]


def test_ranges_that_follow_each_other_become_one() -> None:
    info = TensorInfo("U8", (24,))
    pieces = [FileRange("f", 0, 8), FileRange("f", 8, 8), FileRange("f", 32, 8)]
    made = coalesced_tensor("x", info, iter(pieces))
    assert made == JoinedTensor("x", info, (FileRange("f", 0, 16), FileRange("f", 32, 8)))
    assert coalesced_tensor("x", info, iter(pieces[:2])) == StoredTensor("x", info, "f", 0)
    separate = [FileRange("f", 0, 8), FileRange("g", 8, 8), FileRange("g", 16, 0)]
    assert coalesced_tensor("x", info, iter(separate)).ranges == tuple(separate[:2])


@dataclass(frozen=True)
class Packed:
    """What ``in_whole_units`` reads of a packing."""

    row_unit: int = 8
    matrix_rows: int = 20


@pytest.mark.parametrize(
    ("run", "whole"),
    [
        ((8, 12, 1), True),
        ((20, 8, 1), True),
        ((0, 40, 1), True),
        ((4, 4, 1), False),
        ((0, 4, 1), False),
        ((0, 5, 2), False),
    ],
)
def test_whole_units(run: tuple[int, int, int], whole: bool) -> None:
    start, count, step = run
    layer = replace(A, packing=cast(Any, Packed()))
    assert in_whole_units(RowRange(layer, start, count, step)) is whole
    assert in_whole_units(RowRange(A, start, count, step))


GATE_UP = cast(SourceLayer, SimpleNamespace(path="gate_up"))


@pytest.mark.parametrize(
    ("runs", "matrix_rows", "scales"),
    [
        ([(0, 8, 2)], 4, [0, 1]),
        ([(0, 8, 2)], 8, None),
        ([(0, 16, 1)], 8, [0, 1]),
        ([(0, 16, 1)], 4, [0, 0, 1, 1]),
        ([(8, 8, 1), (0, 8, 1)], 8, [1, 0]),
        ([(1, 2, 3), (3, 2, 3)], 4, [0]),
        ([(6, 4, 1)], 4, None),
    ],
)
def test_the_scale_of_each_matrix(
    runs: list[tuple[int, int, int]], matrix_rows: int, scales: list[int] | None
) -> None:
    """A layer of 2 matrices of 8 rows, one scale each."""
    rows = [RowRange(GATE_UP, start, count, step) for start, count, step in runs]
    found = scale_of_each_matrix(rows, matrix_rows, lambda _: 8)
    expected = None if scales is None else [MatrixScale(GATE_UP, index) for index in scales]
    assert found == expected
