"""Values that workers share: each is made once, by the first worker that needs it."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class SharedCache(Generic[Key, Value]):
    """Values by key; of more than ``keep`` the least recently used is dropped.

    A worker waits if another makes the value that it needs. All that wait get the error that
    making it raised.
    """

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._values: OrderedDict[Key, Future[Value]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Key, make: Callable[[], Value]) -> Value:
        """The value of ``key``; ``make`` is called if it is not there."""
        with self._lock:
            found = self._values.get(key)
            is_new = found is None
            if found is None:
                found = self._values[key] = Future()
            self._values.move_to_end(key)
            while len(self._values) > self._keep:
                self._values.popitem(last=False)
        if is_new:
            try:
                found.set_result(make())
            except BaseException as error:
                found.set_exception(error)
        return found.result()
