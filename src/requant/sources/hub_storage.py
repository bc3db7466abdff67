"""The places of downloaded files: huggingface_hub's cache, or a folder of one conversion.

The classes determine paths and links; ``hub_transfer`` writes the bytes. The cache has the layout
that huggingface_hub documents ("Understand caching"); it has no function that adds a file.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SUFFIX = ".requant.incomplete"


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file as the hub lists it."""

    name: str  # relative path
    nbytes: int
    digest: str  # SHA-256 or, for a file outside LFS, git's id of the blob; in hex

    def new_hash(self) -> Any:
        """A hash object that gives ``digest`` after all bytes of the file."""
        if len(self.digest) == 64:
            return hashlib.sha256()
        return hashlib.sha1(f"blob {self.nbytes}\0".encode(), usedforsecurity=False)


class HubCache:
    """The cache of huggingface_hub, in which every program finds the files."""

    consumed = False  # whether a file is deleted as soon as nothing needs it

    def __init__(self, repository: str, commit: str) -> None:
        from huggingface_hub import constants

        self.repository, self.commit = repository, commit
        cache = Path(constants.HF_HUB_CACHE)
        self.folder = cache / f"models--{repository.replace('/', '--')}"
        self.snapshot = self.folder / "snapshots" / commit

    def cached(self, name: str) -> Path | None:
        """The path of a file in the snapshot of this commit."""
        import huggingface_hub

        found = huggingface_hub.try_to_load_from_cache(self.repository, name, revision=self.commit)
        return Path(found) if isinstance(found, str) else None

    def find(self, file: RemoteFile) -> Path | None:
        """The path of a complete file; one that another commit shares is linked first."""
        path = self.cached(file.name)
        if path is None and (self.folder / "blobs" / file.digest).is_file():
            return self._linked(file)
        return path

    def partial_path(self, file: RemoteFile) -> Path:
        """The path of a file until it is complete."""
        return self.folder / "blobs" / f"{file.digest}{SUFFIX}"

    def finalize(self, file: RemoteFile) -> Path:
        """Rename a complete file to its final path, which is returned."""
        self.partial_path(file).rename(self.folder / "blobs" / file.digest)
        return self._linked(file)

    def remove(self, file: RemoteFile) -> None:
        """Do nothing: other programs may use the file."""

    def _linked(self, file: RemoteFile) -> Path:
        link = self.snapshot / file.name
        link.parent.mkdir(parents=True, exist_ok=True)
        blob = os.path.relpath(self.folder / "blobs" / file.digest, link.parent)
        with suppress(FileExistsError):
            link.symlink_to(blob)
        return link


class TemporaryStorage(HubCache):
    """A folder of one conversion, whose files are deleted one by one; the cache is only read."""

    consumed = True

    def __init__(self, area: Path, repository: str, commit: str) -> None:
        super().__init__(repository, commit)
        self.area = area

    def find(self, file: RemoteFile) -> Path | None:
        """The path of a complete file in the folder or in the cache."""
        return self._path(file) if self._path(file).is_file() else super().find(file)

    def partial_path(self, file: RemoteFile) -> Path:
        """The path of a file until it is complete."""
        return Path(f"{self._path(file)}{SUFFIX}")

    def finalize(self, file: RemoteFile) -> Path:
        """Rename a complete file to its final path, which is returned."""
        return self.partial_path(file).rename(self._path(file))

    def remove(self, file: RemoteFile) -> None:
        """Delete a file from the folder."""
        self._path(file).unlink(missing_ok=True)

    def _path(self, file: RemoteFile) -> Path:
        return self.area / f"{file.digest[:12]}-{file.name.replace('/', '--')[-150:]}"
