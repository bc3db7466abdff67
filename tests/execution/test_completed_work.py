"""Which rows of a step are left, and what was measured on the others."""

import json
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from requant.execution.completed_work import CompletedWork, merge_range, rows_line
from requant.execution.layer_stats import LayerStats

RANGES = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=20)


def rows_of(ranges: list[tuple[int, int]]) -> set[int]:
    return {row for start, stop in ranges for row in range(start, stop)}


def test_ranges_that_are_left() -> None:
    done = CompletedWork()
    for start, stop in ((20, 30), (0, 10), (25, 40)):
        done.add({"rows": [0, start, stop]})
    assert done.rows == {0: (0, 10, 20, 40)}
    assert list(done.remaining(0, 50)) == [(10, 20), (40, 50)]
    assert list(done.remaining(1, 5)) == [(0, 5)]
    assert list(done.remaining(0, 40)) == [(10, 20)]
    assert list(done.remaining(2, 0)) == []
    assert [done.done_rows(n) for n in (0, 1)] == [30, 0]


@given(RANGES)
def test_merged_ranges_are_the_same_rows(ranges: list[tuple[int, int]]) -> None:
    """Against a set of rows; and the borders rise, so that no ranges touch or are empty."""
    borders: tuple[int, ...] = ()
    for start, stop in ranges:
        borders = merge_range(borders, start, stop)
    merged = list(zip(borders[::2], borders[1::2], strict=True))
    assert rows_of(merged) == rows_of(ranges)
    assert list(borders) == sorted(set(borders))


@given(RANGES, st.integers(40, 45))
def test_what_is_left_are_the_other_rows(ranges: list[tuple[int, int]], rows: int) -> None:
    done = CompletedWork()
    for start, stop in ranges:
        done.add({"rows": [3, start, stop]})
    left = list(done.remaining(3, rows))
    assert rows_of(left) == set(range(rows)) - rows_of(ranges)
    assert done.done_rows(3) == len(rows_of(ranges))


@given(st.permutations(range(50)), st.integers(1, 7))
def test_chunks_in_any_order_leave_one_range(order: list[int], rows: int) -> None:
    """As many borders as chunks meanwhile at most; two in the end."""
    borders: tuple[int, ...] = ()
    for number in order:
        borders = merge_range(borders, number * rows, (number + 1) * rows)
    assert borders == (0, 50 * rows)


FOUND = st.builds(
    LayerStats,
    nonfinite=st.integers(0, 3),
    first_nonfinite_row=st.none() | st.integers(0, 9),
    overflowed=st.integers(0, 3),
    squared_error=st.floats(0, 9),
    max_error_steps=st.floats(0, 9),
    damaged=st.integers(1, 3),
    damaged_tensor=st.sampled_from("ab"),
    damaged_row=st.integers(0, 9),
)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9), FOUND), max_size=12))
def test_lines_add_up_to_the_same(chunks: list[tuple[int, int, LayerStats]]) -> None:
    """One line a step, through JSON; and the statistics are those of the chunks, added up."""
    done = CompletedWork(hashes={"a": "1"}, deleted_sources=["b"])
    expected: dict[int, LayerStats] = {}
    for step, start, found in chunks:
        done.add(rows_line(step, (start, start + 1), found))
        expected.setdefault(step, LayerStats()).merge(found)
    lines = [json.loads(json.dumps(line)) for line in done.lines()]
    assert len(lines) == len({step for step, _, _ in chunks}) + 2
    again = CompletedWork()
    for line in lines:
        again.add(line)
    assert again == done
    for step, stats in expected.items():
        for key, value in asdict(stats).items():
            assert getattr(again.stats[step], key) == pytest.approx(value), key
