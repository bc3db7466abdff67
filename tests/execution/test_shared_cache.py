"""Values that workers share are made once, and not too many are kept."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from requant.execution.shared_cache import SharedCache


def test_a_value_is_made_once_for_all_that_wait() -> None:
    made, meeting = [], threading.Event()

    def make() -> int:
        meeting.wait(60)
        made.append(1)
        return 7

    cache: SharedCache[str, int] = SharedCache(2)
    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(cache.get, "a", make) for _ in range(3)]
        meeting.set()
        assert [x.result(60) for x in waiting] == [7, 7, 7]
    assert made == [1]


def test_the_least_recently_used_is_dropped() -> None:
    cache: SharedCache[str, int] = SharedCache(2)
    made: list[str] = []
    for key in "abacab":
        cache.get(key, lambda key=key: len(made.append(key) or made))  # type: ignore[misc, func-returns-value]
    assert made == ["a", "b", "c", "b"]


def test_everyone_gets_the_error() -> None:
    cache: SharedCache[str, int] = SharedCache(2)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            cache.get("a", lambda: 1 // 0)
