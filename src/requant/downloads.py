"""Weight files of a repository on their way to this disk, in the order in which they are needed.

A file grows beside its place (``hub_places``) under a name of its own until its hash is right.
What a killed process, or a network that failed, left there is gone on with. Where it goes, and
whether it is deleted afterwards, is the place's business.
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from requant.errors import HubError
from requant.hub_client import stream_range
from requant.hub_places import Place, RemoteFile

_STREAMS = 2  # files that come at a time
HELD_FILES = 3  # here or on their way, where they are deleted one by one
_SECTION_BYTES = 1 << 30  # of one request: addresses of storage expire
_TRIES = 4  # without a new byte
_FIRST_PAUSE_S = 0.5
_POLL_S = 0.1
_HASHED_BYTES = 1 << 20  # at a time, of what came before


class Downloads:
    """Files that come while others are read; the ``Supply`` of a checkpoint on the hub.

    Args:
        repository: ``org/name``.
        commit: Its hash.
        files: By relative path.
        place: Where they go.
        window: Most files that are here or on their way and not yet released, but for those
            that a step waits for; None lets all come.
    """

    def __init__(
        self,
        repository: str,
        commit: str,
        files: Mapping[str, RemoteFile],
        place: Place,
        window: int | None = None,
    ) -> None:
        self.repository, self.commit = repository, commit
        self.files, self.place, self.window = files, place, window
        self.bytes_expected = self.bytes_here = 0
        self.most_held = 0
        self._changed = threading.Condition()
        self._paths: dict[str, Path] = {}
        self._due: list[str] = []
        self._coming: set[str] = set()
        self._wanted: set[str] = set()
        self._error: BaseException | None = None
        self._ended = threading.Event()
        self._threads: list[threading.Thread] = []

    @property
    def consumed(self) -> bool:
        """Whether a file goes as soon as nothing needs it."""
        return self.place.consumed

    # -- asked by the run ------------------------------------------------------------------

    def begin(self, order: Sequence[str]) -> None:
        """Let files come, those first that are needed first."""
        self._ended.clear()
        self._error, self._coming, self._wanted = None, set(), set()
        found = {name: self.place.find(self.files[name]) for name in order}
        self._paths = {name: path for name, path in found.items() if path is not None}
        self._due = [name for name, path in found.items() if path is None]
        self.bytes_expected = sum(self.files[name].nbytes for name in self._due)
        self.bytes_here = 0
        self._threads = [
            threading.Thread(target=self._work, name=f"requant-download-{n}", daemon=True)
            for n in range(min(_STREAMS, len(self._due)))
        ]
        for thread in self._threads:
            thread.start()

    def take(self, name: str, stop: Callable[[], bool]) -> Path | None:
        """Where a file is, once it is; None if ``stop`` says so before.

        Raises:
            HubError: It cannot be had.
        """
        with self._changed:
            self._wanted.add(name)
            self._changed.notify_all()
            while name not in self._paths:
                if self._error is not None:
                    raise self._error
                if stop() or self._ended.is_set():
                    return None
                self._changed.wait(_POLL_S)
            self._wanted.discard(name)
            return self._paths[name]

    def release(self, name: str) -> None:
        """Nothing will be read of a file any more."""
        self.place.remove(self.files[name])
        with self._changed:
            self._paths.pop(name, None)
            self._changed.notify_all()

    def end(self) -> None:
        """Let nothing come any more; what has come of a file stays for the next time."""
        self._ended.set()
        with self._changed:
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(1.0)  # one that waits for the network ends by itself

    # -- the threads -----------------------------------------------------------------------

    def _work(self) -> None:
        try:
            while (name := self._next()) is not None:
                path = self._fetch(self.files[name])
                with self._changed:
                    self._coming.discard(name)
                    if path is not None:
                        self._paths[name] = path
                    self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                self._error = self._error or error
                self._ended.set()
                self._changed.notify_all()

    def _next(self) -> str | None:
        """The file to fetch, once there is room for one."""
        with self._changed:
            while self._due and not self._ended.is_set():
                waited_for = [name for name in self._due if name in self._wanted]
                held = len(self._paths) + len(self._coming)
                if waited_for or self.window is None or held < self.window:
                    name = waited_for[0] if waited_for else self._due[0]
                    self._due.remove(name)
                    self._coming.add(name)
                    self.most_held = max(self.most_held, held + 1)
                    return name
                self._changed.wait(_POLL_S)
        return None

    def _fetch(self, file: RemoteFile) -> Path | None:
        """Download a file, or the rest of it; None if all is to end.

        Raises:
            HubError: It cannot be had or written, or is not what the hub lists.
        """
        growing = self.place.growing(file)
        try:
            growing.parent.mkdir(parents=True, exist_ok=True)
            fd = self._locked(growing)
            if fd is None:
                return None
            try:
                found = self.place.find(file)  # by another process, meanwhile
                if found is not None:
                    growing.unlink(missing_ok=True)
                    return found
                return self._grow(file, fd)
            finally:
                os.close(fd)
        except OSError as error:
            if isinstance(error, HubError):
                raise
            reason = error.strerror or error
            raise HubError(f"{growing} cannot be written: {reason}. What came is kept") from error

    def _locked(self, path: Path) -> int | None:
        """The file, opened for this process alone; None if all is to end."""
        while not self._ended.is_set():
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            fd = os.open(path, flags, 0o666)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if path.exists() and path.stat().st_ino == os.fstat(fd).st_ino:
                    return fd
            except BlockingIOError:
                self._ended.wait(_POLL_S)
            os.close(fd)
        return None

    def _grow(self, file: RemoteFile, fd: int) -> Path | None:
        """Go on with a file until it is whole; None if all is to end."""
        digest = file.new_hash()
        have = self._take_up(file, fd, digest)
        if not self._receive(file, fd, have, digest):
            return None
        if digest.hexdigest() != file.digest:
            os.ftruncate(fd, 0)
            raise HubError(
                f"{self.repository}: {file.name}: what came has the hash "
                f"{digest.hexdigest()[:12]}..., the hub lists {file.digest[:12]}... at commit "
                f"{self.commit[:12]}: it was changed there, or damaged on its way. It is "
                "dropped: try again"
            )
        os.fsync(fd)
        return self.place.keep(file)

    def _take_up(self, file: RemoteFile, fd: int, digest: Any) -> int:
        """Hash what came before; how many bytes that is."""
        have = os.fstat(fd).st_size
        if have > file.nbytes:
            os.ftruncate(fd, 0)
            have = 0
        for start in range(0, have, _HASHED_BYTES):
            digest.update(os.pread(fd, min(_HASHED_BYTES, have - start), start))
        self._count(have)
        return have

    def _receive(self, file: RemoteFile, fd: int, have: int, digest: Any) -> bool:
        """Append what is missing, after failures that may pass once more; False if all is to end.

        Raises:
            HubError: The hub refuses, or nothing came several times in a row.
        """
        failed = 0
        while have < file.nbytes:
            before = have
            try:
                stop = min(have + _SECTION_BYTES, file.nbytes)
                for block in stream_range(self.repository, self.commit, file.name, have, stop):
                    _write(fd, block, have)
                    digest.update(block)
                    have += len(block)
                    self._count(len(block))
                    if self._ended.is_set():
                        return False
                if have == before:
                    raise HubError(f"{self.repository}: {file.name}: no more bytes came")
            except HubError as error:
                failed = 1 if have > before else failed + 1
                if not error.temporary or failed == _TRIES:
                    raise
                self._ended.wait(_FIRST_PAUSE_S * 2**failed)
            if self._ended.is_set():
                return False
        return True

    def _count(self, nbytes: int) -> None:
        with self._changed:
            self.bytes_here += nbytes


def fetch_all(downloads: Downloads, names: Sequence[str]) -> None:
    """Wait for files that are needed before all else.

    Raises:
        HubError: One cannot be had.
    """
    downloads.begin(names)
    try:
        for name in names:
            downloads.take(name, lambda: False)
    finally:
        downloads.end()


def _write(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written
