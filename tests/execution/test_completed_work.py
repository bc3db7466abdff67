"""Which rows of a step are left."""

from requant.execution.completed_work import CompletedWork


def test_ranges_that_are_left() -> None:
    done = CompletedWork(rows={0: [(20, 30), (0, 10), (25, 40)]})
    assert list(done.remaining(0, 50)) == [(10, 20), (40, 50)]
    assert list(done.remaining(1, 5)) == [(0, 5)]
    assert list(done.remaining(0, 40)) == [(10, 20)]
    assert list(done.remaining(2, 0)) == []
