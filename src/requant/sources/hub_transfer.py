"""Resumable download of one file of a repository, whose hash is checked.

The bytes of a file are appended to its partial path (``hub_storage``). A file that a killed
process or a failed network left incomplete is resumed from its last byte. huggingface_hub's own
``hf_hub_download`` no longer resumes: it writes to a file with a random name, deletes it on any
error, and leaves it behind when it is killed (docs/hub.md, "Why the transfer is ours").
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from requant.core.files import write_at
from requant.errors import HubError
from requant.sources.hub_client import stream_range
from requant.sources.hub_storage import HubCache, RemoteFile
from requant.text import os_error_text

_REQUEST_BYTES = 1 << 30  # of one request: the URLs that the hub redirects to expire
_MAX_FAILURES = 4  # in a row, without a new byte
_FIRST_PAUSE_S = 0.5
_POLL_S = 0.1
_HASH_BYTES = 1 << 20


@dataclass(slots=True, eq=False)
class Transfer:
    """Downloads files of one repository to one storage."""

    storage: HubCache  # where they are stored
    # Set to cancel: a transfer then ends after its current block of 256 KiB.
    stopped: threading.Event
    # Called with the number of bytes of each resumed or received piece.
    count: Callable[[int], None]

    def download(self, file: RemoteFile) -> Path | None:
        """Download a file, or the rest of it; None if ``stopped`` was set before its end.

        Two processes that download the same file share one transfer: the second waits for the
        lock of the partial file, then finds the file complete.

        Raises:
            HubError: It cannot be fetched or written, or its hash differs from the hub's.
        """
        partial = self.storage.partial_path(file)
        try:
            partial.parent.mkdir(parents=True, exist_ok=True)
            fd = self._lock(partial)
            if fd is None:
                return None
            try:
                path = self.storage.find(file)
                if path is not None:
                    partial.unlink(missing_ok=True)
                    return path
                return self._download(file, fd)
            finally:
                os.close(fd)
        except OSError as error:
            if isinstance(error, HubError):
                raise
            reason = os_error_text(error)
            raise HubError(f"{partial} cannot be written: {reason}. What came is kept") from error

    def _lock(self, path: Path) -> int | None:
        """Open a file and lock it; None if ``stopped`` was set before."""
        while not self.stopped.is_set():
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            fd = os.open(path, flags, 0o666)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The former owner of the lock may have renamed or deleted the file.
                if path.exists() and path.stat().st_ino == os.fstat(fd).st_ino:
                    return fd
            except BlockingIOError:
                self.stopped.wait(_POLL_S)
            os.close(fd)
        return None

    def _download(self, file: RemoteFile, fd: int) -> Path | None:
        digest = file.new_hash()
        have = self._hash_existing(file, fd, digest)
        if not self._receive(file, fd, have, digest):
            return None
        if digest.hexdigest() != file.digest:
            os.ftruncate(fd, 0)
            raise HubError(
                f"{self.storage.repository}: {file.name}: what came has the hash "
                f"{digest.hexdigest()[:12]}..., the hub lists {file.digest[:12]}... at commit "
                f"{self.storage.commit[:12]}: it was changed there, or damaged on its way. It is "
                "dropped: try again"
            )
        os.fsync(fd)
        return self.storage.finalize(file)

    def _hash_existing(self, file: RemoteFile, fd: int, digest: Any) -> int:
        """Hash the bytes of an earlier transfer; return their number."""
        have = os.fstat(fd).st_size
        if have > file.nbytes:
            os.ftruncate(fd, 0)
            have = 0
        for start in range(0, have, _HASH_BYTES):
            digest.update(os.pread(fd, min(_HASH_BYTES, have - start), start))
        self.count(have)
        return have

    def _receive(self, file: RemoteFile, fd: int, have: int, digest: Any) -> bool:
        """Append the missing bytes, with retries; false if ``stopped`` was set before the end.

        Raises:
            HubError: The hub rejects the request, or nothing came several times in a row.
        """
        repository, commit = self.storage.repository, self.storage.commit
        failures = 0
        while have < file.nbytes:
            before = have
            try:
                stop = min(have + _REQUEST_BYTES, file.nbytes)
                for block in stream_range(repository, commit, file.name, have, stop):
                    write_at(fd, memoryview(block), have)
                    digest.update(block)
                    have += len(block)
                    self.count(len(block))
                    if self.stopped.is_set():
                        return False
                if have == before:
                    raise HubError(f"{repository}: {file.name}: no more bytes came")
            except HubError as error:
                failures = 1 if have > before else failures + 1
                if not error.temporary or failures == _MAX_FAILURES:
                    raise
                self.stopped.wait(_FIRST_PAUSE_S * 2**failures)
            if self.stopped.is_set():
                return False
        return True
