"""A statistics file: finds the statistics of each layer, and reads them when they are needed."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from requant.core.files import open_regular
from requant.errors import CheckpointError, Problem
from requant.importance.layer_names import LayerKey, layer_key, same_input
from requant.text import os_error_text


@dataclass(frozen=True, slots=True)
class StatisticsEntry:
    """The position of the statistics of one layer, or of a stack of experts, in a file."""

    name: str  # the layer's name in the file
    size: int  # number of values of all experts together
    offset: int  # of the first value: float32, experts one after another
    # The divisor of each expert's sums, float64 ``(experts,)``, or ``(1,)`` for all. It is 0 for an
    # expert that no token reached.
    divisors: np.ndarray = field(compare=False)
    # Their number; None where the file does not have it (llama.cpp's older form).
    experts: int | None
    # Offset of float32 ``(experts, in, in)``, or of their upper triangles; None if there is none.
    hessian: int | None = None
    has_triangles: bool = False  # only the upper triangles are stored, row by row


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """A statistics file as it was when a plan was made."""

    path: str  # as the user named it
    sha256: str  # of the whole file; part of every plan that uses it
    stamp: tuple[int, int]  # size and time of change, by which a changed file is recognized


@dataclass(frozen=True, slots=True)
class MatrixStatistics:
    """The position of the statistics of one matrix in a file."""

    name: str  # the layer's name in the file
    expert: int  # number of the matrix in its stack
    divisor: float  # the divisor of the sums; 0 if no token reached the matrix
    offset: int  # of its float32 ``(in,)`` sums of squares
    hessian: int | None  # of its float32 ``(in, in)`` or upper triangle; None if there is none
    is_triangle: bool  # only the upper triangle is stored, row by row


@dataclass(frozen=True, slots=True)
class Importance:
    """The weights of the squared error of each input, for the matrices of one layer.

    Plain data, as a part of a plan: the numbers are read from the file when they are needed.
    """

    file: FileIdentity
    entries: tuple[MatrixStatistics, ...]  # one for each matrix of the layer, or one for all
    in_features: int

    def entry(self, matrix: int) -> MatrixStatistics:
        """The position of the statistics of a matrix."""
        return self.entries[matrix if len(self.entries) > 1 else 0]

    def weights(self, matrix: int) -> np.ndarray | None:
        """Mean squares of the inputs of one matrix, float32 ``(in_features,)``.

        None if no token reached it, or every input was 0.

        Raises:
            CheckpointError: The file was changed.
        """
        entry = self.entry(matrix)
        if not entry.divisor:
            return None
        sums = _read(self.file, entry.offset, self.in_features)
        if not sums.any():
            return None
        return (sums.astype(np.float64) / entry.divisor).astype(np.float32)

    @property
    def matrices_without_tokens(self) -> list[int]:
        """Matrices that no token reached."""
        return [number for number, entry in enumerate(self.entries) if not entry.divisor]

    @property
    def has_hessians(self) -> bool:
        """Whether each matrix has a Hessian."""
        return all(entry.hessian is not None for entry in self.entries)

    def hessian(self, matrix: int) -> np.ndarray:
        """The mean of ``x x^T`` over the inputs of one matrix, float32 ``(in, in)``.

        Only the upper triangle is to be read; what is below may be zero.

        Raises:
            CheckpointError: The file was changed.
        """
        entry, n_in = self.entry(matrix), self.in_features
        assert entry.hessian is not None
        if not entry.is_triangle:
            return _read(self.file, entry.hessian, n_in * n_in).reshape(n_in, n_in)
        values = _read(self.file, entry.hessian, triangle(n_in))
        full, start = np.zeros((n_in, n_in), np.float32), 0
        for row in range(n_in):
            full[row, row:] = values[start : start + n_in - row]
            start += n_in - row
        return full

    def to_dict(self) -> dict[str, Any]:
        """The JSON data for plans: equal data give equal weights."""
        return {
            "sha256": self.file.sha256,
            "places": [f"{entry.name}[{entry.expert}]" for entry in self.entries],
        }


class StatisticsFile:
    """The layers of a statistics file, by their names in it; numbers are read when needed."""

    def __init__(self, file: FileIdentity, seen: Sequence[StatisticsEntry]) -> None:
        self.source, self.file = file.path, file
        self.seen = {entry.name: entry for entry in seen}
        self._by_key: dict[LayerKey, str] = {}
        for name in self.seen:
            key = layer_key(name)
            if key is not None:
                self._by_key.setdefault(key, name)

    def divisor(self, name: str, expert: int) -> float:
        """The divisor of an expert's sums; 0 if no token reached it."""
        divisors = self.seen[name].divisors
        return float(divisors[expert if divisors.size > 1 else 0])

    def find(self, path: str, shape: Sequence[int]) -> Importance | str | None:
        """Find the importance of a layer in the names of Hugging Face, mlx-lm or llama.cpp.

        Returns None if the file does not have the layer; a message if the shape of its weight,
        ``(..., out, in)``, differs.
        """
        matrices, n_in = prod(shape[:-2]), shape[-1]
        if path in self.seen:
            return self._fit(path, None, matrices, n_in)
        key = layer_key(path)
        for candidate in () if key is None else same_input(key):
            if candidate in self._by_key:
                return self._fit(self._by_key[candidate], None, matrices, n_in)
            if candidate.expert is not None:
                stack = candidate._replace(expert=None)
                if stack in self._by_key:
                    return self._fit(self._by_key[stack], candidate.expert, matrices, n_in)
            singles = [candidate._replace(expert=number) for number in range(matrices)]
            if candidate.expert is None and all(one in self._by_key for one in singles):
                names = [self._by_key[one] for one in singles]
                return self._singles(names, n_in)
        return None

    def _fit(self, name: str, expert: int | None, matrices: int, n_in: int) -> Importance | str:
        """The importance of a layer, or of one expert of its stack; a message if shapes differ."""
        entry = self.seen[name]
        held = entry.size // n_in if entry.size % n_in == 0 else 0
        if expert is not None:
            experts = held if entry.experts is None else entry.experts
            if experts == held > expert and matrices == 1:
                return self._importance([(name, expert)], n_in)
        elif held == matrices and entry.experts in (None, matrices):
            return self._importance([(name, number) for number in range(matrices)], n_in)
        stack = f"{matrices} experts of " if matrices > 1 else ""
        wanted = f"{stack}{n_in} inputs" if expert is None else f"expert {expert} of {n_in} inputs"
        return f"{self.source}: {name} has {_sizes(entry)}, the layer has {wanted}"

    def _singles(self, names: Sequence[str], n_in: int) -> Importance | str:
        for name in names:
            if self.seen[name].size != n_in:
                found = _sizes(self.seen[name])
                return f"{self.source}: {name} has {found}, the layer has {n_in} inputs"
        return self._importance([(name, 0) for name in names], n_in)

    def _importance(self, matrices: Iterable[tuple[str, int]], n_in: int) -> Importance:
        """The importance of matrices, each a name and the number of an expert."""

        def entry(name: str, expert: int) -> MatrixStatistics:
            stored = self.seen[name]
            packed, hessian = stored.has_triangles, stored.hessian
            if hessian is not None:
                hessian += 4 * expert * (triangle(n_in) if packed else n_in * n_in)
            return MatrixStatistics(
                name=name,
                expert=expert,
                divisor=self.divisor(name, expert),
                offset=stored.offset + 4 * n_in * expert,
                hessian=hessian,
                is_triangle=packed,
            )

        return Importance(self.file, tuple(entry(*matrix) for matrix in matrices), n_in)


def triangle(n_in: int) -> int:
    """Number of values of a triangle with the diagonal, of a matrix of ``n_in`` columns."""
    return n_in * (n_in + 1) // 2


def _read(file: FileIdentity, offset: int, count: int) -> np.ndarray:
    """Read float32 numbers of a statistics file, if it was not changed."""
    values = np.empty(count, "<f4")
    view = values.view(np.uint8).data
    try:
        fd = open_regular(Path(file.path))
        try:
            if file_stamp(fd) != file.stamp:
                message = "is another file now than when it was planned"
                raise statistics_error(file.path, [Problem("statistics", message)])
            while view:
                got = os.preadv(fd, [view], offset)
                if not got:
                    message = f"ends at byte {offset:,}"
                    raise statistics_error(file.path, [Problem("statistics", message)])
                view, offset = view[got:], offset + got
        finally:
            os.close(fd)
    except OSError as error:
        raise unreadable(file.path, error) from error
    return values


def file_stamp(fd: int) -> tuple[int, int]:
    """Size and time of change of an open file, by which changes are recognized."""
    status = os.fstat(fd)
    return status.st_size, status.st_mtime_ns


def statistics_error(source: str, problems: Sequence[Problem]) -> CheckpointError:
    """The error about the problems of a statistics file."""
    return CheckpointError(source, problems, "used as statistics")


def unreadable(source: str, error: OSError) -> CheckpointError:
    """The error about a file that cannot be read."""
    return statistics_error(source, [Problem("file", f"cannot be read: {os_error_text(error)}")])


def _sizes(entry: StatisticsEntry) -> str:
    if entry.experts is None or entry.experts == 1:
        return f"{entry.size} inputs"
    return f"{entry.experts} experts of {entry.size // entry.experts} inputs"
