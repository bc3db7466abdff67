"""Values of a GGUF file's metadata by key and type; the keys that were asked for are kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np

from requant.errors import Problem
from requant.text import format_value

_T = TypeVar("_T")


class Metadata:
    """The metadata of one model; what is missing or of a wrong type becomes a problem."""

    def __init__(self, file: str, values: Mapping[str, Any]) -> None:
        self.file, self.values = file, values
        self.problems: list[Problem] = []
        self.read: set[str] = set()  # keys that were asked for
        self.reported: set[str] = set()  # keys with a problem

    @property
    def architecture(self) -> str:
        """``general.architecture``; "" where it is none."""
        return self.word("general.architecture")

    def word(self, key: str, default: str = "") -> str:
        """A string."""
        value = self._find(key)
        return value if isinstance(value, str) else default

    def words(self, key: str) -> tuple[str, ...]:
        """An array of strings; empty where there is none."""
        value = self._find(key)
        if value is None or (isinstance(value, np.ndarray) and not value.size):
            return ()
        return self._checked(key, tuple, "an array of strings") or ()

    def numbers(self, key: str) -> np.ndarray | None:
        """An array of numbers, or None."""
        value = self._find(key)
        if isinstance(value, tuple) and not value:
            return None
        return self._checked(key, np.ndarray, "an array of numbers")

    def flag(self, key: str) -> bool | None:
        """A boolean, or None."""
        return self._checked(key, bool, "a boolean")

    def flags(self, key: str) -> list[bool] | None:
        """An array of yes and no, or None."""
        value = self.numbers(key)
        if value is None:
            return None
        if value.dtype.kind in "bui" and np.isin(value, (0, 1)).all():
            return [bool(item) for item in value]
        self._wrong(key, "an array of booleans")
        return None

    def is_array(self, key: str) -> bool:
        """Whether a key has several values."""
        return isinstance(self.values.get(key), (tuple, np.ndarray))

    def find_int(self, key: str) -> int | None:
        """A whole number that is not negative, or None; an array of one number is that number."""
        value = self._find(key)
        if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
            value = value[0].item()  # one for each layer, all the same
        if value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 0):
            return value
        self._wrong(key, "a whole number")
        return None

    def common_int(self, key: str) -> int | None:
        """The number of all layers that have one, where a file has one for each, 0 for none."""
        value = self._find(key)
        if not isinstance(value, np.ndarray):
            return self.find_int(key)
        found = {int(x) for x in value if x}
        if len(found) == 1:
            return found.pop()
        self._wrong(key, "one whole number, the same for all layers")
        return None

    def layer_ints(self, key: str, blocks: int) -> list[int] | None:
        """A whole number for each of ``blocks`` layers, or None; one number is that of all."""
        if not self.is_array(key):
            value = self.find_int(key)
            return None if value is None else [value] * blocks
        found = self.numbers(key)
        if found is None or found.dtype.kind not in "bui" or len(found) < blocks:
            self._wrong(key, f"a whole number for each of {blocks:,} blocks")
            return [0] * blocks
        return [int(x) for x in found[:blocks]]

    def find_float(self, key: str) -> float | None:
        """A finite number in its shortest form as float32, or None."""
        value = self._find(key)
        if value is None:
            return None
        if isinstance(value, (int, float)) and not isinstance(value, bool) and np.isfinite(value):
            return float(str(np.float32(value)))
        self._wrong(key, "a finite number")
        return None

    def need_int(self, key: str) -> int:
        """A whole number that must be there and is positive."""
        value = self.find_int(key)
        if not value and key not in self.reported:
            self._wrong(key, "a positive whole number")
        return value or 1

    def need_float(self, key: str) -> float:
        """A number that must be there."""
        value = self.find_float(key)
        if value is None and key not in self.reported:
            self._wrong(key, "a number")
        return value or 0.0

    def shown(self, key: str) -> str:
        """The value of a key in a few characters."""
        value = self.values.get(key)
        if isinstance(value, (tuple, np.ndarray)):
            return f"an array of {len(value):,}"
        return format_value(value)

    def report(self, key: str, message: str) -> None:
        """Add a problem with a key."""
        self.reported.add(key)
        self.problems.append(Problem(f"{self.file}: {key}", message))

    def _find(self, key: str) -> Any:
        self.read.add(key)
        return self.values.get(key)

    def _checked(self, key: str, kind: type[_T], expected: str) -> _T | None:
        """The value of a key; None if it is missing, or of another type, which is a problem."""
        value = self._find(key)
        if value is None or isinstance(value, kind):
            return value
        self._wrong(key, expected)
        return None

    def _wrong(self, key: str, expected: str) -> None:
        value = self._find(key)
        found = "is missing" if value is None else f"is {self.shown(key)}"
        self.report(key, f"{found}, expected {expected}")
