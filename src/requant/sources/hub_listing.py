"""List the files of a repository at a commit: from the hub, or from an earlier listing.

Listings are stored under HF_HOME and used if HF_HUB_OFFLINE is set.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

from requant.core.limits import MAX_ENTRIES, MAX_INDEX_BYTES
from requant.errors import HubError
from requant.sources.hub_client import hub_errors
from requant.text import os_error_text

_HASH = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")


@dataclass(frozen=True, slots=True)
class RepositoryListing:
    """The files of a repository."""

    commit: str  # its hash
    sizes: Mapping[str, int]  # relative path -> bytes
    # Relative path -> SHA-256 of a file in LFS, git's id of another, "" unknown.
    digests: Mapping[str, str]


def is_digest(text: str) -> bool:
    """Whether a text is a SHA-256 or SHA-1 in hex."""
    return _HASH.fullmatch(text) is not None


def metadata_dir(repository: str) -> Path:
    """The folder with the metadata of a repository."""
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "requant" / repository.replace("/", "--")


def list_repository(name: str, revision: str | None) -> RepositoryListing:
    """List the files of a repository at a branch, tag or commit; by default of its main branch.

    Raises:
        HubError: There is no such repository or revision, it is gated, the hub cannot be reached
            and there is no stored listing, or the listing is invalid.
    """
    import huggingface_hub
    from huggingface_hub import constants

    stored = metadata_dir(name) / f"{quote(revision or 'main', safe='')}.json"
    if constants.HF_HUB_OFFLINE and (known := _read(stored)) is not None:
        return _checked(name, known)
    with hub_errors(name, revision):
        info = huggingface_hub.HfApi().model_info(name, revision=revision, files_metadata=True)
    siblings = info.siblings or []
    listing = RepositoryListing(
        info.sha or "",
        {x.rfilename: x.size if x.size is not None else -1 for x in siblings},
        {x.rfilename: x.lfs.sha256 if x.lfs else x.blob_id or "" for x in siblings},
    )
    content = json.dumps(asdict(_checked(name, listing))).encode()
    write_metadata(stored, content, len(content), stored.parent)
    return listing


def _checked(name: str, listing: RepositoryListing) -> RepositoryListing:
    """The listing, of which paths, sizes and commit are valid; raises HubError if they are not."""
    if not is_digest(listing.commit):
        raise HubError(f"{name}: the hub gives {listing.commit!r} as its commit, expected a hash")
    if len(listing.sizes) > MAX_ENTRIES:
        held = f"{len(listing.sizes):,} files, at most {MAX_ENTRIES:,} are read"
        raise HubError(f"{name} holds {held}")
    for file, size in listing.sizes.items():
        path = PurePosixPath(file)
        plain = str(path) == file and not path.is_absolute() and ".." not in path.parts
        if not plain or "\\" in file or not file.isprintable() or size < 0:
            raise HubError(f"{name}: the hub lists {file!r} with {size} bytes, which is not a file")
    return listing


def write_metadata(path: Path, content: bytes, size: int, siblings: Path) -> None:
    """Write a file of ``size`` bytes into the folder ``siblings`` and rename it to ``path``.

    What follows ``content`` is a hole. Processes may write the same file at a time.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        siblings.mkdir(exist_ok=True)
        handle, fresh = tempfile.mkstemp(dir=siblings, suffix=".new")
        with open(handle, "wb") as file:
            file.write(content)
            file.truncate(size)
        Path(fresh).rename(path)
    except OSError as error:
        raise HubError(f"{path} cannot be written: {os_error_text(error)}") from error


def _read(path: Path) -> RepositoryListing | None:
    """A stored listing; None if there is none, or it is invalid."""
    try:
        with path.open("rb") as file:
            value: Any = json.loads(file.read(MAX_INDEX_BYTES))
        sizes = {str(name): int(size) for name, size in value["sizes"].items()}
        digests = {str(name): str(digest) for name, digest in value["digests"].items()}
        return RepositoryListing(str(value["commit"]), sizes, digests)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
