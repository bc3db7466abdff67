"""Schedule downloads: which file of a repository is next, and how many are on the disk.

Files are downloaded in the order in which they are needed, a few at a time, while others are
read. ``hub_transfer`` downloads one file, ``hub_storage`` decides where it is stored.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from requant.sources.hub_storage import HubCache, RemoteFile
from requant.sources.hub_transfer import Transfer

_STREAMS = 2  # files that are downloaded at a time
MAX_HELD_FILES = 3  # on the disk or being downloaded, where they are deleted one by one
_POLL_S = 0.1


class Downloads:
    """Downloads files while others are read; the ``WeightFileProvider`` of a checkpoint on the hub.

    ``window`` bounds the files that are on the disk or being downloaded, and not yet released; a
    file that a step waits for is downloaded in any case. None sets no bound.
    """

    def __init__(
        self, files: Mapping[str, RemoteFile], storage: HubCache, window: int | None = None
    ) -> None:
        self.files, self.storage, self.window = files, storage, window
        self.bytes_expected = self.bytes_here = 0
        self._changed = threading.Condition()
        self._paths: dict[str, Path] = {}
        self._due: list[str] = []
        self._coming: set[str] = set()
        self._wanted: set[str] = set()
        self._error: BaseException | None = None
        self._ended = threading.Event()
        self._transfer = Transfer(storage, self._ended, self._count)
        self._threads: list[threading.Thread] = []

    @property
    def consumed(self) -> bool:
        """Whether a file is deleted as soon as nothing needs it."""
        return self.storage.consumed

    # -- called by the conversion ----------------------------------------------------------

    def start(self, order: Sequence[str]) -> None:
        """Start to download files, in the order given, that are not stored yet."""
        self._ended.clear()
        self._error, self._coming, self._wanted = None, set(), set()
        paths = {name: self.storage.find(self.files[name]) for name in order}
        self._paths = {name: path for name, path in paths.items() if path is not None}
        self._due = [name for name, path in paths.items() if path is None]
        self.bytes_expected = sum(self.files[name].nbytes for name in self._due)
        self.bytes_here = 0
        self._threads = [
            threading.Thread(target=self._work, name=f"requant-download-{n}", daemon=True)
            for n in range(min(_STREAMS, len(self._due)))
        ]
        for thread in self._threads:
            thread.start()

    def wait_for(self, name: str, stop: Callable[[], bool]) -> Path | None:
        """Wait for a file and return its path; None if ``stop`` returns true before.

        Raises:
            HubError: It cannot be downloaded.
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
        """Delete a file that is not read any more, if it is not in the cache."""
        self.storage.remove(self.files[name])
        with self._changed:
            self._paths.pop(name, None)
            self._changed.notify_all()

    def stop(self) -> None:
        """Stop all downloads; incomplete files are kept and resumed later."""
        self._ended.set()
        with self._changed:
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(1.0)  # one that waits for the network ends by itself

    # -- the threads -----------------------------------------------------------------------

    def _work(self) -> None:
        try:
            while (name := self._next()) is not None:
                path = self._transfer.download(self.files[name])
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
        """Wait until the window has room; return the next file to download, None at the end."""
        with self._changed:
            while self._due and not self._ended.is_set():
                waited_for = [name for name in self._due if name in self._wanted]
                held = len(self._paths) + len(self._coming)
                if waited_for or self.window is None or held < self.window:
                    name = waited_for[0] if waited_for else self._due[0]
                    self._due.remove(name)
                    self._coming.add(name)
                    return name
                self._changed.wait(_POLL_S)
        return None

    def _count(self, nbytes: int) -> None:
        with self._changed:
            self.bytes_here += nbytes


def download_all(downloads: Downloads, names: Sequence[str]) -> None:
    """Download files and wait for all of them.

    Raises:
        HubError: One cannot be downloaded.
    """
    downloads.start(names)
    try:
        for name in names:
            downloads.wait_for(name, lambda: False)
    finally:
        downloads.stop()
