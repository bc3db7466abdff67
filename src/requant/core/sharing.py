"""One object for equal values: a model repeats few shapes and kinds of layers, many times."""

from __future__ import annotations

from collections.abc import Hashable
from functools import lru_cache
from typing import TypeVar, cast

Value = TypeVar("Value", bound=Hashable)


def shared(value: Value) -> Value:
    """The first object that was equal to ``value``, which is frozen data, or ``value`` itself.

    Not for data with floats in it: ``0.0`` equals ``-0.0``.
    """
    return cast(Value, _first(value))


@lru_cache(maxsize=1 << 14)
def _first(value: Hashable) -> Hashable:
    return value
