"""The hidden folder next to OUTPUT in which it is written: its parts, its lock, the renames.

It is next to OUTPUT, so that the last rename is within one file system:

    .OUTPUT.requant-partial/
      lock       held by the process that writes; released when the process ends
      journal    what is done: the same command resumes
      output/    becomes OUTPUT
      replaced/  the folder that --force replaces, between two renames
      source/    with --consume-source: headers of the source's files, which are deleted one by one
      hub/       with --consume-source and a repository: its weight files, which come and go
      parts/     with --part: the command that all parts share, and a journal for each run of a part

The lock is exclusive for a conversion and for ``join``; parts share it. Where a file system has no
locks (some of clusters have none), two processes write the same bytes to the same places, and the
second of two renames finds the output complete.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import socket
from contextlib import suppress
from pathlib import Path

from requant.core.files import fsync
from requant.errors import OutputError
from requant.output.journal import read_journal


class StagingLockedError(OutputError):
    """Another process has the lock of the staging folder."""


def staging_dir(output: Path) -> Path:
    """The hidden folder in which OUTPUT grows."""
    return output.parent / f".{output.name}.requant-partial"


def header_stubs_dir(output: Path) -> Path:
    """Where the headers of source files are kept that OUTPUT's conversion deletes."""
    return staging_dir(output) / "source"


def downloads_dir(output: Path) -> Path:
    """Where weight files of the hub are that OUTPUT's conversion deletes."""
    return staging_dir(output) / "hub"


# What ``flock`` says on a file system without locks.
_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL})


def lock_staging(staging: Path, output: Path, *, shared: bool = False) -> int:
    """Make the folder and take its lock; the system gives it back when the process ends.

    A ``shared`` lock is that of a part: others may have it too.

    Raises:
        StagingLockedError: Another process has it.
        OutputError: The folder is a link.
    """
    if staging.is_symlink():
        raise OutputError(f"{staging} is a link, which is not written through; remove it")
    while True:
        staging.mkdir(exist_ok=True)
        try:
            fd = os.open(staging / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:  # the owner has just removed the folder
            continue
        try:
            fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                owner = os.pread(fd, 200, 0).decode("utf-8", "replace") or "it does not say which"
                os.close(fd)
                raise StagingLockedError(
                    f"{output} is being written by another process ({owner}); "
                    "wait for it, or name another folder"
                ) from None
        with suppress(FileNotFoundError):
            if (staging / "lock").stat().st_ino == os.fstat(fd).st_ino:
                with suppress(OSError):  # who it is matters less than that it is locked
                    os.ftruncate(fd, 0)
                    os.pwrite(fd, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
                return fd
        os.close(fd)


class StagingFolder:
    """The hidden folder of one output: the parts named above, its lock, the renames at the end."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.path = staging_dir(output)
        self.staged_output = self.path / "output"
        self.replaced = self.path / "replaced"
        self.header_stubs = header_stubs_dir(output)
        self.downloads = downloads_dir(output)
        self.journal = self.path / "journal"
        self.parts = self.path / "parts"
        self._lock: int | None = None

    @property
    def is_locked(self) -> bool:
        """Whether this process holds the lock."""
        return self._lock is not None

    def lock(self, *, shared: bool = False) -> None:
        """Make the folder, take its lock, and undo a replacement that a killed run left half done.

        Raises:
            OutputError: Another process has the lock.
        """
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self._lock = lock_staging(self.path, self.output, shared=shared)
        if shared or not self.replaced.exists():
            return
        if self.output.exists():  # the second rename was done, the removal was not
            shutil.rmtree(self.replaced)
        else:
            self.replaced.rename(self.output)

    def unlock(self) -> None:
        """Give the lock back."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def clear(self) -> None:
        """Remove what an earlier run wrote, and make the folder in which the output grows."""
        for name in ("journal", "journal.new"):
            (self.path / name).unlink(missing_ok=True)
        for folder in (self.parts, self.staged_output):
            if folder.exists():
                shutil.rmtree(folder)
        self.staged_output.mkdir()

    def sync_names(self) -> None:
        """Make the names of all files so far durable."""
        for folder in (self.staged_output, self.path, self.output.parent):
            fsync(folder)

    def name_file(self, name: str) -> None:
        """Give the output, one file of the staged folder, its name; what is there is replaced."""
        (self.staged_output / name).rename(self.output)
        fsync(self.output.parent)
        self.remove()

    def name_output(self) -> None:
        """Sync the staged folders and give the output its name; what is there is replaced."""
        for folder, _, _ in os.walk(self.staged_output):
            fsync(Path(folder))
        if self.output.exists():
            self.output.rename(self.replaced)
            try:
                self.staged_output.rename(self.output)
            except OSError:
                self.replaced.rename(self.output)
                raise
        else:
            self.staged_output.rename(self.output)
        fsync(self.output.parent)
        self.remove()

    def remove(self) -> None:
        """Remove the folder with all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)


def recorded_nonfinite_layers(output: Path) -> list[str]:
    """Layers that a stopped run of this output had found to hold NaN or infinity."""
    head, _ = read_journal(staging_dir(output) / "journal")
    layers = head.get("nonfinite_layers", [])
    return [x for x in layers if isinstance(x, str)] if isinstance(layers, list) else []


def staged_bytes(output: Path) -> int:
    """Bytes that a stopped run has put on the disk for OUTPUT."""
    return bytes_on_disk(staging_dir(output) / "output")


def bytes_on_disk(folder: Path) -> int:
    """Bytes that the files of a folder take on the disk."""
    with suppress(OSError):
        return sum(entry.stat().st_blocks * 512 for entry in folder.iterdir())
    return 0
