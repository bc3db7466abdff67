"""The weight files of an output while they are written."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from requant.core.files import hash_range, write_at
from requant.errors import OutputError
from requant.planning.plan import OutputShard, OutputTensor
from requant.text import os_error_text


class ShardFiles:
    """The weight files of an output, written at given offsets from any thread.

    They are in ``folder``; messages name ``output``, the folder that they will be in.
    """

    def __init__(self, folder: Path, output: Path, shards: Sequence[OutputShard]) -> None:
        self._folder, self._output, self._shards = folder, output, shards
        self._fds: dict[str, int] = {}

    def open(self) -> bool:
        """Open the files of an earlier run; returns False, with none open, if they differ."""
        try:
            for shard in self._shards:
                fd = os.open(self._folder / shard.name, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
                self._fds[shard.name] = fd
                header = shard.header()
                is_sized = os.fstat(fd).st_size == shard.nbytes
                if not is_sized or os.pread(fd, len(header), 0) != header:
                    self.close()
                    return False
        except FileNotFoundError:
            self.close()
            return False
        return True

    def create(self) -> None:
        """Make the files with their headers, at full size."""
        for shard in self._shards:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            fd = os.open(self._folder / shard.name, flags, 0o666)
            self._fds[shard.name] = fd
            os.ftruncate(fd, shard.nbytes)
            os.pwrite(fd, shard.header(), 0)

    def open_shared(self) -> None:
        """Make the files, or open those that another process made; no byte of theirs is changed.

        Raises:
            OutputError: A file has another size than the plan's.
        """
        for shard in self._shards:
            path = self._folder / shard.name
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            self._fds[shard.name] = fd
            size = os.fstat(fd).st_size
            if size > shard.nbytes:
                raise OutputError(
                    f"{path} has {size:,} bytes, the plan's has {shard.nbytes:,}: it was changed"
                )
            if size < shard.nbytes:
                os.ftruncate(fd, shard.nbytes)
            os.pwrite(fd, shard.header(), 0)

    def are_in_place(self) -> bool:
        """Whether the files that are open still have their names."""
        for name, fd in self._fds.items():
            try:
                named, opened = os.lstat(self._folder / name), os.fstat(fd)
            except FileNotFoundError:
                return False
            if not os.path.samestat(named, opened):
                return False
        return True

    def write(self, file: str, offset: int, data: memoryview) -> None:
        """Write ``data`` at an absolute offset of a shard; thread-safe."""
        try:
            write_at(self.fd(file), data, offset)
        except OSError as error:
            raise self.write_error(error) from error

    def fd(self, file: str) -> int:
        """The open file of a shard."""
        return self._fds[file]

    def write_error(self, error: OSError) -> OutputError:
        """The error to raise where a shard cannot be written."""
        return write_error(self._output, error)

    def hash(self, tensor: OutputTensor) -> str:
        """SHA-256, in hex, of a tensor's bytes as they are in its file."""
        try:
            return hash_range(self._fds[tensor.file], tensor.offset, tensor.info.nbytes)
        except OSError as error:
            raise OutputError(
                f"{self._folder / tensor.file} cannot be read back: {os_error_text(error)}"
            ) from error

    def sync_data(self) -> None:
        """Make what was written durable."""
        for fd in list(self._fds.values()):
            getattr(os, "fdatasync", os.fsync)(fd)

    def finish(self) -> None:
        """Make the files durable, and close them."""
        for fd in self._fds.values():
            os.fsync(fd)
        self.close()

    def close(self) -> None:
        """Close the files."""
        fds, self._fds = self._fds, {}
        for fd in fds.values():
            os.close(fd)


def write_error(output: Path, error: OSError) -> OutputError:
    """An error of the operating system as one that names the file or the output."""
    reason = os_error_text(error)
    return OutputError(f"{error.filename or output} cannot be written: {reason}")
