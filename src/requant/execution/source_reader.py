"""Pipeline stage 4: positioned reads of the source's files, from any thread.

Waits for files that are being downloaded. Reads bytes and knows no formats.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np

from requant.checkpoints.byte_ranges import FileRange
from requant.checkpoints.checkpoint import (
    JoinedTensor,
    OpenedSource,
    SourceFile,
    StoredTensor,
    cut,
)
from requant.core.files import open_regular
from requant.errors import CheckpointError, Problem
from requant.kernels.units import FileBytes, StopFlag, UnitFileError, read_spaced
from requant.packings.base import Rect
from requant.text import os_error_text


class RunCancelled(Exception):
    """The run ends: what this worker waits for, or does, is not completed."""


class SourceReader:
    """The source's files, open for positioned reads from any thread.

    Needed files of a folder are opened at once, those of the hub when they are downloaded.
    """

    def __init__(
        self,
        files: Iterable[SourceFile],
        opened: OpenedSource,
        consumed: Collection[str],
        needed: Sequence[str],
    ) -> None:
        self.consumed, self.needed = consumed, needed
        self.path, self.sizes = opened.path, {f.name: f.nbytes for f in files}
        self.downloader = opened.downloader
        self.stop = StopFlag()
        self.fds: dict[str, int] = {}
        self._opening = threading.Lock()

    def __enter__(self) -> SourceReader:
        if self.downloader is not None:
            self.downloader.start(self.needed)
            return self
        try:
            for name in self.needed:
                if name not in self.consumed:
                    self._open(name, self.path / name)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _open(self, name: str, path: Path) -> None:
        try:
            self.fds[name] = open_regular(path)
        except OSError as error:
            self._fail(name, os_error_text(error))
        actual, planned = os.fstat(self.fds[name]).st_size, self.sizes[name]
        if actual != planned:
            self._fail(name, f"has {actual:,} bytes now, {planned:,} when it was planned")

    def __exit__(self, *_: object) -> None:
        if self.downloader is not None:
            self.downloader.stop()
        for fd in self.fds.values():
            os.close(fd)
        self.fds.clear()

    def close_file(self, name: str) -> None:
        """Close a file that is needed no more."""
        fd = self.fds.pop(name, None)
        if fd is not None:
            os.close(fd)
        if self.downloader is not None:
            self.downloader.release(name)

    def _fd(self, name: str) -> int:
        """An open file; waits for one that is being downloaded."""
        fd = self.fds.get(name)
        if fd is not None or self.downloader is None:
            return self.fds[name]
        path = self.downloader.wait_for(name, self.stop.is_set)
        if path is None:
            raise RunCancelled
        with self._opening:
            if name not in self.fds:
                self._open(name, path)
            return self.fds[name]

    def read_tensor(
        self, tensor: StoredTensor | JoinedTensor, start: int, into: memoryview
    ) -> None:
        """Fill ``into`` with a tensor's bytes from ``start`` on, wherever they lie."""
        for part in tensor.ranges:
            if not into:
                return
            if start < part.nbytes:
                size = min(part.nbytes - start, len(into))
                self.read(part.file, part.offset + start, into[:size])
                into, start = into[size:], part.nbytes
            start -= part.nbytes

    def open_ranges(
        self, tensor: StoredTensor | JoinedTensor, start: int, stop: int
    ) -> list[FileBytes]:
        """Bytes ``start`` to ``stop`` of a tensor, in open files."""
        return [
            FileBytes(self._fd(part.file), part.offset, part.nbytes)
            for part in cut(tensor, start, stop)
        ]

    def fail(self, part: FileRange, error: UnitFileError) -> NoReturn:
        """Raise the error of a part of a tensor that could not be read."""
        self._fail(part.file, os_error_text(error) if error.errno else _cut_short(error.offset))

    def read_cut(self, tensor: StoredTensor | JoinedTensor, rect: Rect, into: np.ndarray) -> None:
        """Fill ``into`` with a rectangle of a tensor; whole rows are one read."""
        width = tensor.info.shape[-1] if tensor.info.shape else 1
        size = into.dtype.itemsize
        (first, last), (left, right) = rect.rows, rect.columns
        if right - left == width:
            self.read_tensor(tensor, first * width * size, bytes_of(into))
            return
        stride, row_bytes = width * size, into[0].nbytes
        if len(tensor.ranges) > 1:
            for number, row in enumerate(range(first, last)):
                self.read_tensor(tensor, row * stride + left * size, bytes_of(into[number]))
            return
        (part,) = tensor.ranges
        rows = into.view(np.uint8).reshape(last - first, row_bytes)
        try:
            read_spaced(
                self._fd(part.file), part.offset + first * stride + left * size, stride, rows
            )
        except UnitFileError as error:
            self.fail(part, error)

    def read(self, file: str, offset: int, into: memoryview) -> None:
        """Fill ``into`` with the bytes at ``offset``."""
        fd = self._fd(file)
        while into:
            try:
                got = os.preadv(fd, [into], offset)
            except OSError as error:
                self._fail(file, os_error_text(error))
            if got == 0:
                self._fail(file, _cut_short(offset))
            into, offset = into[got:], offset + got

    def _fail(self, file: str, message: str) -> NoReturn:
        raise CheckpointError(str(self.path), [Problem(file, message)])


def _cut_short(offset: int) -> str:
    return f"ends at byte {offset:,}: it was cut while it was read"


def bytes_of(array: np.ndarray) -> memoryview:
    """The memory of a C-contiguous array, flat."""
    return array.reshape(-1).view(np.uint8).data
