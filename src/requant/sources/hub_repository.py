"""Sources on the model hub: headers by range requests for a plan, whole files for a conversion.

A repository's *mirror* is a folder under HF_HOME with its JSON files and, for every other file, a
sparse file of the right size that holds only the headers of weights. A checkpoint is read from it
as from any folder; the few small tensors that a format reads while planning are fetched with range
requests, too. Whole files are downloaded while others are converted (``downloads``).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO, cast

from requant.checkpoints.adapters import ADAPTER_CONFIG, describe_adapter, is_adapter_file
from requant.checkpoints.byte_ranges import FileRange
from requant.checkpoints.checkpoint import Checkpoint, OpenedSource
from requant.checkpoints.folder_files import (
    CONFIG,
    INDEX,
    QUANTIZATION_FILES,
    describe_pickles,
    is_repository_id,
)
from requant.checkpoints.folder_listing import files_to_download
from requant.checkpoints.safetensors_header import PREFIX_BYTES, header_length
from requant.core.limits import MAX_CONFIG_BYTES, MAX_INDEX_BYTES
from requant.core.strict_json import parse_json_object
from requant.errors import CheckpointError, HubError, Problem, UsageError
from requant.gguf.file_selection import WITHOUT, gguf_models, select_model
from requant.gguf.header import header_nbytes
from requant.gguf.mmproj import choose_mmproj
from requant.gguf.reader import read_gguf
from requant.sources.downloads import MAX_HELD_FILES, Downloads, download_all
from requant.sources.hub_client import hub_errors, read_range
from requant.sources.hub_listing import (
    RepositoryListing,
    is_digest,
    list_repository,
    metadata_dir,
    write_metadata,
)
from requant.sources.hub_ranges import STREAMS, SmallRanges
from requant.sources.hub_storage import SUFFIX, HubCache, RemoteFile, TemporaryStorage
from requant.sources.open import as_checkpoint, read_checkpoint

_FIRST_BYTES = 128 << 10  # of a weight file: most headers are shorter
CARD = "README.md"


def find_repository(
    source: str | os.PathLike[str], revision: str | None, mmproj: str | None = WITHOUT
) -> Repository | None:
    """Return the repository that a source names, or None if it is a path.

    A name of the form ``org/name``, or ``org/name:Q4_K_M`` for a GGUF file of it, is a path if
    anything is there, and if huggingface_hub is not installed.

    Args:
        source: As the user named it.
        revision: Branch, tag or commit.
        mmproj: The vision part of a GGUF model, as ``read_gguf`` takes it.

    Raises:
        HubError: There is no such repository or revision, it is gated, or the hub cannot be
            reached.
        UsageError: A revision of a source that is not on the hub.
    """
    name, _, wanted = os.fspath(source).partition(":")
    if not is_repository_id(source):
        if revision is not None:
            raise UsageError(f"--revision is for repositories on the hub, and {source} is none")
        return None
    if find_spec("huggingface_hub") is None:
        if revision is None:
            return None
        raise HubError(f"{source}: the hub needs huggingface_hub: pip install 'requant[hub]'")
    listing = list_repository(name, revision)
    files = files_to_download(listing.sizes, partial(_small_file, name, listing))
    has_weights = any(x.endswith((".safetensors", ".gguf")) for x in listing.sizes)
    has_weights = has_weights or ADAPTER_CONFIG in listing.sizes
    pickles = "" if has_weights else describe_pickles(listing.sizes)
    if pickles:
        raise CheckpointError(name, [Problem(name, pickles)])
    part = None
    kind = _gguf_kind(name, listing.sizes, wanted, any(x.endswith(".safetensors") for x in files))
    if kind:
        files = [*gguf_models(listing.sizes)[kind], *(x for x in (CARD,) if x in listing.sizes)]
        below = files[0][: files[0].rfind("/") + 1]
        others = {x.removeprefix(below) for x in listing.sizes if x.startswith(below)} - {*files}
        part = choose_mmproj((x for x in others if "/" not in x), mmproj, f"{name}:{kind}")
        files += [below + part] if part else []
    digests = {file: listing.digests.get(file, "") for file in files}
    sizes = {x: listing.sizes[x] for x in files}
    return Repository(name, listing.commit, sizes, digests, gguf=kind, mmproj=part)


def _small_file(name: str, listing: RepositoryListing, file: str) -> bytes:
    """The content of a JSON file of a repository; it is kept in the mirror."""
    mirrored = metadata_dir(name) / listing.commit / file
    with suppress(OSError):
        content = mirrored.read_bytes()
        if content.strip(b"\0"):  # a file that was not fetched is full of zeros
            return content
    size = listing.sizes[file]
    content = read_range(name, listing.commit, file, 0, size) if size else b""
    write_metadata(mirrored, content, size, metadata_dir(name) / "new")
    return content


def open_source(
    source: str | os.PathLike[str],
    remote: Repository | None,
    config_from: str | os.PathLike[str] | None = None,
) -> Path | Checkpoint:
    """Return the source of a conversion: a path, or a repository whose files are downloaded.

    ``remote`` is what ``find_repository`` gave for ``source``; errors are those of
    ``Repository.read_headers`` and ``start_download``.
    """
    if remote is None:
        return Path(source)
    return remote.start_download(remote.read_headers(config_from))


def read_source(
    source: str | os.PathLike[str],
    remote: Repository | None,
    config_from: str | os.PathLike[str] | None = None,
    mmproj: str | None = WITHOUT,
) -> Checkpoint:
    """Return the checkpoint of a source, as ``open_source``, for a plan: nothing is downloaded."""
    found = source if remote is None else remote.read_headers(config_from)
    return as_checkpoint(found, config_from, mmproj=mmproj)


def _gguf_kind(name: str, files: Iterable[str], wanted: str, has_safetensors: bool) -> str:
    """The GGUF model of a repository that is meant; "" where it is not one."""
    models = gguf_models(files)
    if not wanted and (has_safetensors or not models):
        return ""
    if not models:
        raise HubError(f"{name} holds no GGUF files, so there is no {wanted!r} to choose")
    kind = select_model(models, wanted) if wanted else None
    if kind is None and not wanted and len(models) == 1:
        kind = next(iter(models))
    if kind is None:
        asked = f"no GGUF file {wanted!r}" if wanted else f"{len(models)} GGUF models"
        known = ", ".join(models)
        example = f"{name}:{next(iter(models))}"
        raise HubError(f"{name} holds {asked}; write {example}, or one of: {known}")
    return kind


class Repository:
    """A repository at one commit, and the small ranges of its files that were read so far.

    ``sizes`` and ``digests`` are, by relative path, those of the files that a conversion reads:
    SHA-256 of those in LFS, git's id of the others, where the hub lists one. ``gguf`` is which of
    its GGUF models is meant ("Q4_K_M"); "" for safetensors. ``mmproj`` is the file next to this
    model with its vision part.
    """

    def __init__(
        self,
        name: str,
        commit: str,
        sizes: Mapping[str, int],
        digests: Mapping[str, str] | None = None,
        gguf: str = "",
        mmproj: str | None = None,
    ) -> None:
        self.name, self.commit, self.sizes = name, commit, sizes
        self.digests, self.gguf, self.mmproj = digests or {}, gguf, mmproj
        self._fetch = SmallRanges(self._read_part)

    # -- headers -------------------------------------------------------------------------

    @property
    def source(self) -> str:
        """The name for a user: ``org/name``, or ``org/name:Q4_K_M``."""
        return f"{self.name}:{self.gguf}" if self.gguf else self.name

    @property
    def _below(self) -> str:
        """Folder of the repository, with a slash, in which a GGUF model lies."""
        first = next(iter(self.sizes))  # the model's files come before others
        return first[: first.rfind("/") + 1] if self.gguf else ""

    def read_headers(self, config_from: str | os.PathLike[str] | None = None) -> Checkpoint:
        """Fetch headers and JSON files only, and read the checkpoint from them.

        For GGUF config.json and side files are those of the folder ``config_from``, if any.

        Raises:
            HubError: A file cannot be fetched.
            CheckpointError: With all problems of the headers.
        """
        folder = metadata_dir(self.name) / self.commit
        self._check_adapter()
        missing = [file for file in self.sizes if not (folder / file).exists()]
        with ThreadPoolExecutor(STREAMS) as pool:
            list(pool.map(partial(self._write_header_stub, folder), missing))
        if self.gguf:
            taken = None if config_from is None else Path(config_from)
            part = self.mmproj or WITHOUT
            read = partial(read_gguf, config_from=taken, fetch=self._fetch, mmproj=part)
            return self._read_named(read, folder / next(iter(self.sizes)))
        if config_from is not None:
            raise UsageError(f"--config-from is for GGUF files; {self.name} has its own config")
        return self._read_named(read_checkpoint, folder)

    def _check_adapter(self) -> None:
        """Raise a CheckpointError with advice if the repository holds an adapter and no model."""
        files = [x for x in self.sizes if "/" not in x and x.endswith((".safetensors", ".npz"))]
        if self.gguf or INDEX in self.sizes or not all(map(is_adapter_file, files)):
            return
        if ADAPTER_CONFIG in self.sizes or files:
            size = min(self.sizes.get(ADAPTER_CONFIG, 0), MAX_CONFIG_BYTES)
            config, _ = parse_json_object(self._bytes(ADAPTER_CONFIG, 0, size))
            message = describe_adapter(self.name, config, remote=True)
            raise CheckpointError(self.name, [Problem(self.name, message)])

    def _write_header_stub(self, folder: Path, file: str) -> None:
        """Write a file of the right size with the bytes that planning reads."""
        content, size = b"", self.sizes[file]
        most = MAX_INDEX_BYTES if file == INDEX else MAX_CONFIG_BYTES
        if file in (CONFIG, INDEX, *QUANTIZATION_FILES):
            content = self._bytes(file, 0, size) if size <= most else b""
        elif file.endswith(".safetensors") and size:
            content = self._bytes(file, 0, min(size, _FIRST_BYTES))
            length, _ = header_length(content[:PREFIX_BYTES], size)
            if length + PREFIX_BYTES > len(content):
                content += self._bytes(file, len(content), length + PREFIX_BYTES)
        elif file.endswith(".gguf"):
            ahead = _ReadAheadFile(partial(self._bytes, file), size)
            nbytes = header_nbytes(cast(BinaryIO, ahead), size)
            content = ahead.content[:nbytes]
        write_metadata(folder / file, content, size, folder.parent / "new")

    def _read_part(self, part: FileRange) -> bytes:
        """A range of a weight file, by one request."""
        return self._bytes(self._below + part.file, part.offset, part.offset + part.nbytes)

    def _bytes(self, file: str, start: int, stop: int) -> bytes:
        return read_range(self.name, self.commit, file, start, stop)

    # -- whole files ---------------------------------------------------------------------

    def download_summary(self) -> str:
        """A sentence about the files that a conversion downloads."""
        missing = self._missing()
        what = f"{len(missing)} of {len(self.sizes)} files, {sum(missing.values()):,} bytes"
        state = f"convert downloads {what}" if missing else "all of its files are downloaded"
        return f"{self.source} at {self.commit[:12]} on the hub: {state}."

    def start_download(
        self,
        checkpoint: Checkpoint,
        area: Path | None = None,
        needed: Collection[str] | None = None,
    ) -> Checkpoint:
        """Return the checkpoint with a downloader of its weight files.

        Small files are downloaded at once. Files that were downloaded before are not again. Weight
        files go to huggingface_hub's cache, or to the folder ``area``, where each is deleted when
        nothing needs it any more. ``needed`` are the weight files for which there must be room in
        the cache; None for all.

        Raises:
            HubError: A file cannot be downloaded, or the disk has too little room.
        """
        weights = {self._below + file.name for file in checkpoint.files}
        cache = storage = HubCache(self.name, self.commit)
        if area is not None:
            storage = TemporaryStorage(area, self.name, self.commit)
        else:
            self._check_room(cache, needed)
        small = {name: self._remote_file(name) for name in self.sizes if name not in weights}
        download_all(Downloads(small, cache), list(small))
        folder = cache.snapshot if small and not self.gguf else checkpoint.path
        files = {x.name: self._remote_file(self._below + x.name) for x in checkpoint.files}
        downloader = Downloads(files, storage, None if area is None else MAX_HELD_FILES)
        return replace(checkpoint, opened=checkpoint.opened.with_downloader(folder, downloader))

    def _remote_file(self, name: str) -> RemoteFile:
        """A file as the hub lists it, with the hash from its server where the list has none."""
        import huggingface_hub

        digest = self.digests.get(name) or ""
        if not is_digest(digest):
            url = huggingface_hub.hf_hub_url(self.name, name, revision=self.commit)
            with hub_errors(self.name, self.commit, name):
                digest = huggingface_hub.get_hf_file_metadata(url).etag or ""
        if not is_digest(digest):
            raise HubError(f"{self.name}: {name}: the hub tells no hash of it, found {digest!r}")
        return RemoteFile(name, self.sizes[name], digest)

    def _check_room(self, cache: HubCache, needed: Collection[str] | None) -> None:
        free = shutil.disk_usage(_existing(cache.folder)).free
        nbytes = self._bytes_to_download(cache, needed)
        if nbytes > free:
            raise HubError(
                f"{self.name}: the disk of {cache.folder} is too full: {nbytes:,} bytes are to be "
                f"downloaded, {free:,} are free; HF_HOME names another place"
            )

    def _bytes_to_download(self, cache: HubCache, needed: Collection[str] | None) -> int:
        """Bytes that are not yet in the cache; of incomplete files, the rest."""
        here = sum(x.stat().st_blocks * 512 for x in cache.folder.glob(f"blobs/*{SUFFIX}"))
        names = None if needed is None else {self._below + name for name in needed}
        missing = self._missing().items()
        return max(sum(n for name, n in missing if names is None or name in names) - here, 0)

    def cache_bytes_on_disk_of(self, output: Path, needed: Collection[str] | None = None) -> int:
        """Bytes of downloads to the cache if that is on the disk of ``output``; else 0.

        ``needed`` are those weight files that are downloaded; None for all.
        """
        cache = HubCache(self.name, self.commit)
        one, other = (_existing(x.absolute()).stat().st_dev for x in (cache.folder, output))
        return self._bytes_to_download(cache, needed) if one == other else 0

    def _missing(self) -> dict[str, int]:
        cache = HubCache(self.name, self.commit)
        return {file: size for file, size in self.sizes.items() if cache.cached(file) is None}

    def _read_named(self, read: Callable[[Path], Checkpoint], folder: Path) -> Checkpoint:
        """The checkpoint in a folder, with the repository's name in place of the folder's."""
        if CONFIG not in self.sizes and not self.gguf:
            problem = Problem(CONFIG, "is not in the repository, or no model of this kind is")
            raise CheckpointError(self.name, [problem])
        try:
            checkpoint = read(folder)
        except CheckpointError as error:
            problems = [
                replace(x, where=x.where.replace(str(folder), self.name)) for x in error.problems
            ]
            raised = CheckpointError(self.source, problems)
            copy = f"hf download {self.name} --local-dir {self.name.rpartition('/')[2]}"
            raised.add_note(f"To change files of the repository: {copy}, then give that folder")
            raise raised from error
        # Other programs may have added other files of the repository.
        return replace(
            checkpoint,
            side_files=tuple(name for name in checkpoint.side_files if name in self.sizes),
            left_out=tuple(pair for pair in checkpoint.left_out if pair[0] in self.sizes),
            origin=Path(self.source),
            repository=(self.source, self.commit),
            opened=OpenedSource(
                checkpoint.path,
                fetch=self._fetch,
                generated_files=checkpoint.opened.generated_files,
            ),
        )

    @property
    def card(self) -> Path:
        """The path of the model card, if it was downloaded."""
        return HubCache(self.name, self.commit).snapshot / CARD


def _existing(path: Path) -> Path:
    return next(place for place in (path, *path.parents) if place.exists())


class _ReadAheadFile:
    """A file that is read from its start, fetched in pieces that are larger than each read."""

    def __init__(self, fetch: Callable[[int, int], bytes], size: int) -> None:
        self.fetch, self.size = fetch, size
        self.content, self._at = b"", 0

    def read(self, count: int) -> bytes:
        """The next bytes; fewer at the end."""
        start, self._at = self._at, min(self._at + count, self.size)
        have = len(self.content)
        if self._at > have:
            more = max(self._at - have, have, _FIRST_BYTES)
            self.content += self.fetch(have, min(have + more, self.size))
        return self.content[start : self._at]
