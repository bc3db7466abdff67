"""Sums over sections of a calibration's windows, added in one order whoever computes them.

The windows are cut into ``SECTIONS`` sections. Each section is summed by itself, window by window,
and the sums of the sections are added as a binary tree, here 8 of them:

    ((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7))

A process that has the sections 0 to 3 keeps one sum of them, since it is a subtree; another one
that has 3 to 5 keeps two: 3, and 4 + 5. One section at a time is in memory, the others in files.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from requant.calibration.collector import Sums
from requant.core.files import fsync

SECTIONS = 8
_ROWS = 64  # of a triangle that are written at a time


def section_ends(inputs: int) -> list[int]:
    """Numbers of windows, at which the sections end.

    Example:
        >>> section_ends(64), section_ends(3)
        ([8, 16, 24, 32, 40, 48, 56, 64], [1, 2, 3])
    """
    count = min(SECTIONS, inputs)
    return [inputs * number // count for number in range(1, count + 1)]


Run = tuple[int, int]
"""Sections from the first up to, not including, the second."""


class SectionSums:
    """Adds the sums of sections of a block, which come in their order; files are in ``folder``.

    With ``durable`` files outlive a loss of power.
    """

    def __init__(self, folder: Path, block: int, *, durable: bool = False) -> None:
        self._folder, self._block, self._durable = folder, block, durable
        self._runs: list[Run] = []  # those that were added, added together where they are a subtree
        self._held: dict[str, Sums] | None = None  # the last of them, unless it is in its file

    def add(self, run: Run, sums: dict[str, Sums]) -> None:
        """Add the sums of the next sections, which are a whole subtree; they stay in memory."""
        self.save()
        start, stop = run
        while self._runs:
            before, end = self._runs[-1]
            is_sibling = end == start and end - before == stop - start
            if not is_sibling or before % (2 * (end - before)):
                break
            self._add_saved(self._runs.pop(), sums)
            start = before
        self._runs.append((start, stop))
        self._held = sums

    def save(self) -> None:
        """Write what is in memory to its file."""
        if self._held is not None:
            path = self._path(self._runs[-1])
            write_sums(path, self._held)
            if self._durable:
                fsync(path)
            self._held = None

    def total(self) -> dict[str, Sums]:
        """The sums of all sections, the last of which were just added."""
        sums, self._held = self._held, None
        assert sums is not None, "nothing was added"
        self._runs.pop()
        while self._runs:  # where the last sections are less than a subtree
            self._add_saved(self._runs.pop(), sums)
        return sums

    def files(self) -> list[str]:
        """The names of the files of what was added and saved."""
        return [self._path(run).name for run in self._runs]

    def _path(self, run: Run) -> Path:
        return self._folder / f"{self._block:05d}.{run[0]}-{run[1]}"

    def _add_saved(self, run: Run, sums: dict[str, Sums]) -> None:
        """Add a file to sums in memory, and remove it."""
        path = self._path(run)
        for layer, saved in _read(path):
            if layer in sums:
                sums[layer].merge(saved)
            else:
                sums[layer] = saved
        path.unlink()


def block_and_run(name: str) -> tuple[int, Run]:
    """The block and the sections of a file."""
    block, _, run = name.partition(".")
    start, _, stop = run.partition("-")
    return int(block), (int(start), int(stop))


def write_sums(path: Path, sums: Mapping[str, Sums]) -> None:
    """Write sums: for each layer a line of JSON, then its arrays."""
    with path.open("wb") as file:
        for layer, of_layer in sums.items():
            products = of_layer.products
            held = products and [x is not None for x in products]
            head = {"layer": layer, "stacked": of_layer.stacked, "products": held}
            file.write(json.dumps({**head, "shape": of_layer.squares.shape}).encode() + b"\n")
            for array in (of_layer.count, of_layer.squares, of_layer.absolutes):
                file.write(array.data)
            for matrix in products or ():
                if matrix is not None:
                    for rows in _rows_of_triangle(np.asarray(matrix)):
                        file.write(np.ascontiguousarray(rows).data)


def read_sums(path: Path) -> dict[str, Sums]:
    """Read the sums that ``write_sums`` wrote."""
    return dict(_read(path))


def _read(path: Path) -> Iterator[tuple[str, Sums]]:
    """Each layer of a file, one at a time in memory."""
    with path.open("rb") as file:
        while line := file.readline():
            head = json.loads(line)
            experts, n_in = head["shape"]
            held = head["products"]
            sums = Sums(experts, n_in, held is not None, head["stacked"])
            for array in (sums.count, sums.squares, sums.absolutes):
                _read_into(file, array)
            for expert, is_there in enumerate(held or ()):
                if is_there:
                    assert sums.products is not None
                    sums.products[expert] = _read_triangle(file, n_in)
            yield head["layer"], sums


def _read_triangle(file: BinaryIO, n_in: int) -> np.ndarray:
    matrix = np.zeros((n_in, n_in), np.float32)
    for rows in _rows_of_triangle(matrix):
        part = np.empty(rows.shape, np.float32)
        _read_into(file, part)
        rows[:] = part
    return matrix


def _rows_of_triangle(matrix: np.ndarray) -> Iterator[np.ndarray]:
    """Views of the rows of a matrix, from the diagonal of the first of each run of them on."""
    for start in range(0, len(matrix), _ROWS):
        yield matrix[start : start + _ROWS, start:]


def _read_into(file: BinaryIO, array: np.ndarray) -> None:
    if file.readinto(array.data.cast("B")) < array.nbytes:  # type: ignore[attr-defined]
        raise OSError(errno.EIO, "is shorter than it was written", file.name)
