"""Ranges of bytes of weight files: neighbours joined to runs, small tensors read some in advance.

A source reads many small ranges while it is planned: a shape, zero points or scales of each layer.
Ranges that lie next to each other, or nearly, are read as one *run*.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

_WINDOW_BYTES = 4 << 20  # of tensors that are held until they are asked for
_WINDOW_TENSORS = 4096


@dataclass(frozen=True, slots=True)
class FileRange:
    """A run of bytes of a source file."""

    file: str
    offset: int
    nbytes: int


ReadRanges = Callable[[Sequence[FileRange]], Sequence[bytes]]
"""Reads ranges and returns their bytes in the same order."""


@dataclass(frozen=True, slots=True)
class RangeRun:
    """Ranges of one file that are read at once, and the range around all of them."""

    whole: FileRange
    members: tuple[int, ...]  # positions in the sequence that ``runs_of`` was given


def runs_of(parts: Sequence[FileRange], gap: int, max_bytes: int) -> list[RangeRun]:
    """Join ranges to runs, in the order of files and offsets.

    Two ranges of a file are in one run if at most ``gap`` bytes lie between them and the run has at
    most ``max_bytes``, what lies between counted. Ranges may overlap, and be longer than that.
    """
    runs: list[RangeRun] = []
    file, start, stop = "", 0, 0
    members: list[int] = []
    for position in sorted(range(len(parts)), key=lambda x: (parts[x].file, parts[x].offset)):
        part = parts[position]
        end = part.offset + part.nbytes
        joins = members and part.file == file and part.offset - stop <= gap
        if not joins or max(end, stop) - start > max_bytes:
            if members:
                runs.append(_run(parts, file, start, stop, members))
            file, start, stop, members = part.file, part.offset, part.offset, []
        members.append(position)
        stop = max(stop, end)
    if members:
        runs.append(_run(parts, file, start, stop, members))
    return runs


def _run(
    parts: Sequence[FileRange], file: str, start: int, stop: int, members: Sequence[int]
) -> RangeRun:
    whole = parts[members[0]] if len(members) == 1 else FileRange(file, start, stop - start)
    return RangeRun(whole, tuple(members))


def read_runs(
    parts: Sequence[FileRange], runs: Iterable[RangeRun], read: Callable[[FileRange], bytes]
) -> list[bytes]:
    """Read each run with ``read`` and return the bytes of each range, in the order of ``parts``."""
    found = [b""] * len(parts)
    for run in runs:
        data = read(run.whole)
        for position in run.members:
            start = parts[position].offset - run.whole.offset
            found[position] = data[start : start + parts[position].nbytes]
    return found


class _Tensor(Protocol):
    """A tensor and where its bytes lie (``checkpoint.StoredTensor`` and ``JoinedTensor``)."""

    @property
    def name(self) -> str: ...
    @property
    def ranges(self) -> tuple[FileRange, ...]: ...


class ReadAhead:
    """Tensors that will be read, in this order: each read takes those that follow with it.

    At most ``_WINDOW_TENSORS`` tensors or ``_WINDOW_BYTES`` bytes are held; those that were skipped
    are read alone.
    """

    def __init__(self, read: ReadRanges) -> None:
        self._read = read
        self._order: list[_Tensor] = []
        self._next = 0  # position in ``_order`` of the first that is not read
        self._expected: set[str] = set()  # names in ``_order`` from there on
        self._held: dict[str, bytes] = {}

    def expect(self, tensors: Iterable[_Tensor]) -> None:
        """Say which tensors are read next, and in which order; earlier ones are forgotten."""
        self._order, self._next = list(tensors), 0
        self._expected = {tensor.name for tensor in self._order}
        self._held = {}

    def read(self, tensor: _Tensor) -> bytes:
        """The bytes of a tensor."""
        if tensor.name in self._held:
            return self._held.pop(tensor.name)
        if tensor.name not in self._expected:
            return b"".join(self._read(tensor.ranges))
        while self._order[self._next].name != tensor.name:
            self._skip()
        window: list[tuple[str, tuple[FileRange, ...]]] = []
        nbytes = 0
        while self._next < len(self._order) and len(window) < _WINDOW_TENSORS:
            ranges = self._order[self._next].ranges
            nbytes += sum(part.nbytes for part in ranges)
            if window and nbytes > _WINDOW_BYTES:
                break
            window.append((self._order[self._next].name, ranges))
            self._skip()
        pieces = iter(self._read([part for _, ranges in window for part in ranges]))
        self._held = {name: b"".join(next(pieces) for _ in ranges) for name, ranges in window}
        if self._next == len(self._order):
            self._order, self._next, self._expected = [], 0, set()
        return self._held.pop(tensor.name)

    def _skip(self) -> None:
        self._expected.discard(self._order[self._next].name)
        self._next += 1
