"""Opening, replacing, syncing and hashing files."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO

_BLOCK_BYTES = 1 << 20


def open_regular(path: Path) -> int:
    """Open a regular file for reading. A pipe under that name is rejected without blocking.

    Raises:
        OSError: It cannot be opened, or is not a regular file.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "is not a regular file any more", str(path))
    return fd


def read_at(fd: int, nbytes: int, offset: int) -> bytes:
    """Read bytes at an offset of an open file; fewer where it ends."""
    data = os.pread(fd, nbytes, offset)
    while 0 < len(data) < nbytes and (more := os.pread(fd, nbytes - len(data), offset + len(data))):
        data += more  # one call reads 2 GiB at most
    return data


def write_at(fd: int, data: memoryview, offset: int) -> None:
    """Write all of ``data`` at an offset of an open file."""
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written


def fsync(path: Path) -> None:
    """Make a file, or the names in a folder, durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def replace_file(path: Path, suffix: str = "new") -> Iterator[BinaryIO]:
    """Write a file whole or not at all: yield a new file that then takes the place of ``path``.

    It is synced before it is renamed; ``fsync(path.parent)`` makes the new name durable too. After
    an error, an OSError if it cannot be written or renamed, ``path`` is as before. ``suffix`` is
    that of the new file; processes that may write one file at a time need different ones.
    """
    fresh = path.with_name(f"{path.name}.{suffix}")
    try:
        with fresh.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


def hash_file(path: Path) -> str:
    """SHA-256, in hex, of a regular file.

    Raises:
        OSError: It cannot be read.
    """
    fd = open_regular(path)
    try:
        return hash_range(fd, 0, os.fstat(fd).st_size)
    finally:
        os.close(fd)


def hash_range(
    fd: int, offset: int, nbytes: int, *, stop: Callable[[], bool] = lambda: False
) -> str:
    """SHA-256, in hex, of a range of an open file; "" once ``stop`` returns true.

    Raises:
        OSError: It cannot be read, or ends before the range does.
    """
    digest = sha256()
    block = memoryview(bytearray(min(_BLOCK_BYTES, max(nbytes, 1))))
    end = offset + nbytes
    while offset < end:
        if stop():
            return ""
        got = os.preadv(fd, [block[: end - offset]], offset)
        if not got:
            raise OSError(f"ends at byte {offset:,}, where more was expected")
        digest.update(block[:got])
        offset += got
    return digest.hexdigest()
