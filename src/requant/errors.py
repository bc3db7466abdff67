"""Every error that requant raises on purpose, and ``Problem`` for lists of findings.

RequantError
├── ParseError               a JSON text or block is invalid
├── MissingKeyError          a required tensor is missing
├── KeyCollisionError        a tensor has the name that another needs
├── RankMismatchError        wrong number of axes
├── ShapeMismatchError       two shapes that must agree do not
├── LengthMismatchError      two lengths (or ranks) that must agree do not
├── UnsupportedDtypeError    a dtype that the operation does not take
├── OutOfRangeError          a number outside its legal values
├── DivisibilityError        a number that must divide another does not
├── UnknownValueError        a word that is not one of the valid ones
├── InvariantError           parts of the input contradict each other
├── BackendError             the array library's own quantize or dequantize failed
├── CheckpointError          every problem of a source, in one list
├── HubError                 a request to the model hub failed
├── OutputError              the output cannot be written, or exists
├── ClusterError             a cluster cannot be reached, or a part failed on it
└── UsageError               options that contradict each other

Every error has ``.layer``: the layer path or tensor name it is about, or None.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from requant.text import join_or, pluralize

MAX_PROBLEMS = 1000  # collected in one file or folder; the search ends there
MAX_PROBLEMS_SHOWN = 200  # lines in the text of one error
MAX_PROBLEM_CHARS = 4000  # of one such line


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong in one place."""

    where: str  # a tensor name, a file, or "config.json: quantization.bits"
    message: str  # "F16 (32, 11007), expected F16 (32, 11008)"

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


class RequantError(Exception):
    """Base of every error that requant raises on purpose.

    Attributes:
        layer: Layer path or tensor name that the error is about, or None.
    """

    def __init__(self, message: str, *, layer: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.layer = layer

    def __str__(self) -> str:
        return f"{self.layer}: {self.message}" if self.layer is not None else self.message


class ParseError(RequantError, ValueError):
    """A JSON text, or one block of it, is invalid."""


class MissingKeyError(RequantError, LookupError):
    """A required tensor is missing from the weight map."""

    def __init__(self, message: str, key: str, *, layer: str | None = None) -> None:
        super().__init__(f"{message} (missing: {key})", layer=layer)
        self.key = key


class KeyCollisionError(RequantError, ValueError):
    """A tensor has the name that another one needs."""

    def __init__(self, message: str, key: str, *, layer: str | None = None) -> None:
        super().__init__(f"{message} (in the way: {key})", layer=layer)
        self.key = key


class RankMismatchError(RequantError, ValueError):
    """An array has the wrong number of axes."""

    def __init__(
        self, message: str, rank: int, shape: Iterable[int], *, layer: str | None = None
    ) -> None:
        self.rank, self.shape = rank, tuple(shape)
        super().__init__(f"{message}; got rank {rank}, shape {list(self.shape)}", layer=layer)


class ShapeMismatchError(RequantError, ValueError):
    """Two shapes that must agree do not."""

    def __init__(
        self,
        message: str,
        expected: Iterable[int],
        actual: Iterable[int],
        *,
        layer: str | None = None,
    ) -> None:
        self.expected, self.actual = tuple(expected), tuple(actual)
        super().__init__(
            f"{message}; expected {list(self.expected)}, got {list(self.actual)}", layer=layer
        )


class LengthMismatchError(RequantError, ValueError):
    """Two lengths, or ranks, that must agree do not."""

    def __init__(
        self, message: str, expected: int, actual: int, *, layer: str | None = None
    ) -> None:
        self.expected, self.actual = expected, actual
        super().__init__(f"{message}; expected {expected}, got {actual}", layer=layer)


class UnsupportedDtypeError(RequantError, TypeError):
    """A dtype that the operation does not take; ``dtype`` is a name such as "float32"."""

    def __init__(
        self, message: str, dtype: str, supported: Sequence[str], *, layer: str | None = None
    ) -> None:
        self.dtype, self.supported = dtype, tuple(supported)
        super().__init__(f"{message}: {dtype}, expected {join_or(self.supported)}", layer=layer)


class OutOfRangeError(RequantError, ValueError):
    """A number outside its legal values."""

    def __init__(self, message: str, name: str, value: object, *, layer: str | None = None) -> None:
        self.name, self.value = name, value
        super().__init__(f"{name} = {value}: {message}", layer=layer)


class DivisibilityError(RequantError, ValueError):
    """A number that another must divide is not a multiple of it."""

    def __init__(
        self, message: str, name: str, value: int, divisor: int, *, layer: str | None = None
    ) -> None:
        self.name, self.value, self.divisor = name, value, divisor
        super().__init__(f"{name} = {value} is not a multiple of {divisor}: {message}", layer=layer)


class UnknownValueError(RequantError, ValueError):
    """A word that is not one of the valid ones."""

    def __init__(
        self, message: str, value: str, supported: Sequence[str], *, layer: str | None = None
    ) -> None:
        self.value, self.supported = value, tuple(supported)
        known = ", ".join(repr(word) for word in self.supported)
        super().__init__(f"{message}: {value!r}; known: {known}", layer=layer)


class InvariantError(RequantError, ValueError):
    """Parts of the input contradict each other."""


class BackendError(RequantError, RuntimeError):
    """The quantize or dequantize of the array library rejected its input."""


class CheckpointError(RequantError, ValueError):
    """Every problem of a source, in one list.

    Raised before tensor data is read or a file is written.
    """

    def __init__(self, source: str, problems: Sequence[Problem], action: str = "converted") -> None:
        self.source, self.problems, self.action = source, tuple(problems), action
        shown = (str(problem) for problem in self.problems[:MAX_PROBLEMS_SHOWN])
        lines = "".join(f"\n  {line[:MAX_PROBLEM_CHARS]}" for line in shown)
        more = len(self.problems) - MAX_PROBLEMS_SHOWN
        if more > 0:
            lines += f"\n  and {pluralize(more, 'more problem')}"
        super().__init__(f"{source} cannot be {action}:{lines}")


@contextmanager
def error_action(action: str) -> Iterator[None]:
    """Word a CheckpointError as "cannot be ``action``" instead of "cannot be converted".

    An error that has another action already, such as "cannot be read", is not changed.
    """
    try:
        yield
    except CheckpointError as error:
        if error.action != "converted":
            raise
        raise CheckpointError(error.source, error.problems, action) from error


class OutputError(RequantError, OSError):
    """The output cannot be written, or must not be overwritten."""


class HubError(RequantError, OSError):
    """A request to the model hub failed; if ``temporary``, a retry may succeed."""

    temporary = False


class ClusterError(RequantError, OSError):
    """A cluster cannot be reached, or a part failed on it. Finished work is kept."""


class UsageError(RequantError, ValueError):
    """Options that contradict each other or name nothing."""
