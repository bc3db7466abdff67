"""Hessians are factored once each, side by side, and not too many are kept."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from pytest import MonkeyPatch

from requant.errors import InvariantError
from requant.execution import hessian_cache
from requant.execution.hessian_cache import HessianCache, bytes_for


class Layer:
    """Stands for the statistics of a layer with one matrix."""

    in_features = 4

    def __init__(self, name: str, tokens: bool = True) -> None:
        self.name, self.tokens = name, tokens

    def entry(self, matrix: int) -> tuple[str, int]:
        return self.name, matrix

    def weights(self, matrix: int) -> np.ndarray | None:
        return np.ones(4) if self.tokens else None

    def hessian(self, matrix: int) -> np.ndarray:
        return np.eye(4)


def compensations(cache: HessianCache, layers: list[Any]) -> list[Any]:
    """What each of as many threads gets."""
    with ThreadPoolExecutor(len(layers)) as pool:
        return [x.result(60) for x in [pool.submit(cache.compensation, y, 0) for y in layers]]


@pytest.fixture
def factored(monkeypatch: MonkeyPatch) -> Callable[[Callable[[], Any]], None]:
    return lambda made: monkeypatch.setattr(hessian_cache, "compensation_of", lambda *_: made())


def test_different_matrices_are_factored_side_by_side(factored: Any) -> None:
    """None of three ends before all have begun."""
    meeting = threading.Barrier(3, timeout=60)
    factored(meeting.wait)
    made = compensations(HessianCache(3, 3), [Layer(name) for name in "abc"])
    assert sorted(made) == [0, 1, 2]


def test_not_more_than_memory_holds_at_a_time(factored: Any) -> None:
    busy, most, lock = 0, 0, threading.Lock()

    def factor() -> None:
        nonlocal busy, most
        with lock:
            busy += 1
            most = max(most, busy)
        threading.Event().wait(0.02)
        with lock:
            busy -= 1

    factored(factor)
    compensations(HessianCache(6, 2), [Layer(name) for name in "abcdef"])
    assert most == 2


def test_a_matrix_that_several_need_is_factored_once(factored: Any) -> None:
    made: list[int] = []

    def factor() -> object:
        threading.Event().wait(0.05)
        made.append(1)
        return object()

    factored(factor)
    cache = HessianCache(2, 4)
    assert len(set(compensations(cache, [Layer("a")] * 4))) == 1
    cache.compensation(Layer("b"), 0)  # type: ignore[arg-type]
    cache.compensation(Layer("a"), 0)  # type: ignore[arg-type]
    assert len(made) == 2
    cache.compensation(Layer("c"), 0)  # type: ignore[arg-type]  # drops b, used before a
    cache.compensation(Layer("a"), 0)  # type: ignore[arg-type]
    assert len(made) == 3
    cache.compensation(Layer("b"), 0)  # type: ignore[arg-type]
    assert len(made) == 4


def test_all_who_wait_get_the_error(factored: Any) -> None:
    def factor() -> None:
        threading.Event().wait(0.05)
        raise InvariantError("no Hessian")

    factored(factor)
    cache = HessianCache(2, 2)
    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(cache.compensation, Layer("a"), 0) for _ in range(3)]
        assert all(isinstance(x.exception(60), InvariantError) for x in waiting)


def test_a_matrix_without_tokens_has_none(factored: Any) -> None:
    factored(lambda: pytest.fail("factored"))
    assert compensations(HessianCache(1), [Layer("a", tokens=False)]) == [None]


def test_bytes() -> None:
    """Four float64 matrices for each that is factored, one float32 for each that is kept."""
    assert bytes_for(100, 3, 2) == 2 * 4 * 80_000 + 3 * 80_000
