"""Where weight files of a repository come to rest: the hub's cache, or a conversion's own folder.

Places know names and links; bytes are brought by ``downloads``.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

SUFFIX = ".requant.incomplete"


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file as the hub lists it.

    Attributes:
        name: Relative path.
        nbytes: Its size.
        digest: SHA-256 or, for one outside LFS, git's id of a blob; in hex.
    """

    name: str
    nbytes: int
    digest: str

    def new_hash(self) -> Any:
        """What is to give ``digest`` once all bytes went through."""
        if len(self.digest) == 64:
            return hashlib.sha256()
        return hashlib.sha1(f"blob {self.nbytes}\0".encode(), usedforsecurity=False)


class Place(Protocol):
    """Where files go."""

    @property
    def consumed(self) -> bool:
        """Whether a file goes as soon as nothing needs it."""

    def find(self, file: RemoteFile) -> Path | None:
        """A file that is here as a whole."""

    def growing(self, file: RemoteFile) -> Path:
        """Where it is until then."""

    def keep(self, file: RemoteFile) -> Path:
        """Give what has grown its name."""

    def remove(self, file: RemoteFile) -> None:
        """Delete a file, if it is ours to delete."""


class HubCache:
    """The place of huggingface_hub's own cache, where every program finds the files again."""

    consumed = False

    def __init__(self, repository: str, commit: str) -> None:
        from huggingface_hub import constants

        self.repository, self.commit = repository, commit
        cache = Path(constants.HF_HUB_CACHE)
        self.folder = cache / f"models--{repository.replace('/', '--')}"

    @property
    def snapshot(self) -> Path:
        """The folder of the commit."""
        return self.folder / "snapshots" / self.commit

    def find(self, file: RemoteFile) -> Path | None:
        """The file in the snapshot of this commit."""
        import huggingface_hub

        found = huggingface_hub.try_to_load_from_cache(
            self.repository, file.name, revision=self.commit
        )
        if isinstance(found, str):
            return Path(found)
        return self._linked(file) if (self.folder / "blobs" / file.digest).is_file() else None

    def growing(self, file: RemoteFile) -> Path:
        """Beside the cache's blobs."""
        return self.folder / "blobs" / f"{file.digest}{SUFFIX}"

    def keep(self, file: RemoteFile) -> Path:
        """Make a blob of it, and a link in the snapshot."""
        self.growing(file).rename(self.folder / "blobs" / file.digest)
        return self._linked(file)

    def _linked(self, file: RemoteFile) -> Path:
        link = self.snapshot / file.name
        link.parent.mkdir(parents=True, exist_ok=True)
        blob = os.path.relpath(self.folder / "blobs" / file.digest, link.parent)
        with suppress(FileExistsError):
            link.symlink_to(blob)
        return link

    def remove(self, file: RemoteFile) -> None:
        """Nothing: others may use it."""


class Area:
    """A folder of a conversion's own, whose files go one by one; what is in the cache is used."""

    consumed = True

    def __init__(self, folder: Path, cache: HubCache) -> None:
        self.folder, self.cache = folder, cache

    def _path(self, file: RemoteFile) -> Path:
        return self.folder / f"{file.digest[:12]}-{file.name.replace('/', '--')[-150:]}"

    def find(self, file: RemoteFile) -> Path | None:
        """The file here or in the cache."""
        return self._path(file) if self._path(file).is_file() else self.cache.find(file)

    def growing(self, file: RemoteFile) -> Path:
        """In the folder itself."""
        return Path(f"{self._path(file)}{SUFFIX}")

    def keep(self, file: RemoteFile) -> Path:
        """Take the suffix away."""
        return self.growing(file).rename(self._path(file))

    def remove(self, file: RemoteFile) -> None:
        """Delete it here."""
        self._path(file).unlink(missing_ok=True)
