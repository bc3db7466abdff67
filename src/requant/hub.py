"""Sources on the model hub: headers by range requests for a plan, whole files for a conversion.

A repository's *mirror* is a folder under HF_HOME with its JSON files and, for everything else,
files of the right size that hold nothing but the headers of weights (sparse: they take no room).
A checkpoint is read from it as from any folder; the few small tensors that a format peeks at
come by range requests too. Whole files go into huggingface_hub's own cache.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

from requant.checkpoint import Checkpoint, FileRange, read_checkpoint
from requant.errors import CheckpointError, HubError, Problem, UsageError
from requant.limits import MAX_CONFIG_BYTES, MAX_ENTRIES, MAX_INDEX_BYTES
from requant.safetensors_header import PREFIX_BYTES, header_length
from requant.source_folder import CONFIG, INDEX, QUANTIZATION_FILES, names_repository, wanted_files

_FIRST_BYTES = 128 << 10  # of a weight file: most headers are within
_TIMEOUT_S = 30.0
_COMMIT = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")


def find_repository(source: str | os.PathLike[str], revision: str | None) -> Repository | None:
    """The repository that a source names, or None where it is a path.

    A name of the form ``org/name`` is a path if anything stands there, and where
    huggingface_hub is not installed.

    Raises:
        HubError: There is no such repository or revision, it is gated, or the hub is not reached.
        UsageError: A revision of something that is not on the hub.
    """
    if not names_repository(source):
        if revision is not None:
            raise UsageError(f"--revision is for repositories on the hub, and {source} is none")
        return None
    try:
        import huggingface_hub
    except ImportError:
        if revision is None:
            return None
        raise HubError(
            f"{source}: the hub needs huggingface_hub: pip install 'requant[hub]'"
        ) from None
    name = os.fspath(source)
    with asking(name, revision):
        found = huggingface_hub.HfApi().model_info(name, revision=revision, files_metadata=True)
    siblings = found.siblings or []
    if not found.sha or not _COMMIT.fullmatch(found.sha):
        raise HubError(f"{name}: the hub gives {found.sha!r} as its commit, expected a hash")
    if len(siblings) > MAX_ENTRIES:
        raise HubError(f"{name} holds {len(siblings):,} files, at most {MAX_ENTRIES:,} are read")
    sizes = {x.rfilename: x.size if x.size is not None else -1 for x in siblings}
    for file, size in sizes.items():
        path = PurePosixPath(file)
        plain = str(path) == file and not path.is_absolute() and ".." not in path.parts
        if not plain or "\\" in file or not file.isprintable() or size < 0:
            raise HubError(f"{name}: the hub lists {file!r} with {size} bytes, which is no file")
    return Repository(name, found.sha, {file: sizes[file] for file in wanted_files(sizes)})


@dataclass(frozen=True, slots=True)
class Repository:
    """A repository at one commit.

    Attributes:
        name: ``org/name``.
        commit: Its hash.
        sizes: Of the files that a conversion reads: relative path -> bytes.
    """

    name: str
    commit: str
    sizes: Mapping[str, int]

    # -- headers -------------------------------------------------------------------------

    def headers(self) -> Checkpoint:
        """The checkpoint, of which only headers and JSON are here.

        Raises:
            HubError: A file cannot be had.
            CheckpointError: Everything that is wrong with what the headers say.
        """
        folder = self._home() / "requant" / self.name.replace("/", "--") / self.commit
        for file, size in self.sizes.items():
            if not (folder / file).exists():
                self._mirror(folder, file, size)
        return self._named(read_checkpoint, folder, fetch=self._fetch)

    def _mirror(self, folder: Path, file: str, size: int) -> None:
        """A file of the right size with the bytes that planning reads; whole or not there."""
        content = b""
        most = MAX_INDEX_BYTES if file == INDEX else MAX_CONFIG_BYTES
        if file in (CONFIG, INDEX, *QUANTIZATION_FILES):
            content = self._bytes(file, 0, size) if size <= most else b""
        elif file.endswith(".safetensors") and size:
            content = self._bytes(file, 0, min(size, _FIRST_BYTES))
            length, _ = header_length(content[:PREFIX_BYTES], size)
            if length + PREFIX_BYTES > len(content):
                content += self._bytes(file, len(content), length + PREFIX_BYTES)
        target = folder / file
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            beside = folder.parent / "new"
            beside.mkdir(exist_ok=True)
            handle, name = tempfile.mkstemp(dir=beside)
            with open(handle, "wb") as out:
                out.write(content)
                out.truncate(size)
            Path(name).rename(target)
        except OSError as error:
            raise HubError(f"{target} cannot be written: {error.strerror or error}") from error

    def _fetch(self, part: FileRange) -> bytes:
        return self._bytes(part.file, part.offset, part.offset + part.nbytes)

    def _bytes(self, file: str, start: int, stop: int) -> bytes:
        """A range of a file, by one request."""
        import huggingface_hub

        utils: Any = huggingface_hub.utils  # not all of its names are exported by the letter

        if stop <= start:
            return b""
        url = huggingface_hub.hf_hub_url(self.name, quote(file), revision=self.commit)
        headers = utils.build_hf_headers()
        headers |= {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        session = utils.get_session()
        with asking(self.name, self.commit, file):
            response = session.get(url, headers=headers, timeout=_TIMEOUT_S)
            utils.hf_raise_for_status(response)
        whole = response.status_code == 200  # a server that knows no ranges
        data = bytes(response.content[start:stop] if whole else response.content)
        if len(data) != stop - start:
            raise HubError(
                f"{self.name}: {file}: {len(data):,} bytes came, expected {stop - start:,}"
            )
        return data

    # -- whole files ---------------------------------------------------------------------

    def announcement(self) -> str:
        """What a conversion downloads, in a sentence."""
        missing = self._missing()
        what = f"{len(missing)} of {len(self.sizes)} files, {sum(missing.values()):,} bytes"
        state = f"convert downloads {what}" if missing else "all of its files are downloaded"
        return f"{self.name} at {self.commit[:12]} on the hub: {state}."

    def download(self) -> Checkpoint:
        """The checkpoint with all its data; what was downloaded before is not again.

        Files come one after another; one that was cut off goes on where it stopped.

        Raises:
            HubError: A file cannot be had, or the disk has too little room.
        """
        import huggingface_hub

        missing = self._missing()
        cache = Path(huggingface_hub.constants.HF_HUB_CACHE)
        existing = next(place for place in (cache, *cache.parents) if place.exists())
        free, needed = shutil.disk_usage(existing).free, sum(missing.values())
        if needed > free:
            raise HubError(
                f"{self.name}: the disk of {cache} is too full: {needed:,} bytes are to be "
                f"downloaded, {free:,} are free; HF_HOME names another place"
            )
        folder = cache
        for file in self.sizes:
            with asking(self.name, self.commit, file):
                found = huggingface_hub.hf_hub_download(self.name, file, revision=self.commit)
            if found.endswith(CONFIG) and file == CONFIG:
                folder = Path(found).parent
        return self._named(read_checkpoint, folder)

    def _missing(self) -> dict[str, int]:
        import huggingface_hub

        def cached(file: str) -> bool:
            found = huggingface_hub.try_to_load_from_cache(self.name, file, revision=self.commit)
            return isinstance(found, str)

        return {file: size for file, size in self.sizes.items() if not cached(file)}

    def _named(self, read: Any, folder: Path, **more: Any) -> Checkpoint:
        """The checkpoint in a folder, under the repository's name also where it is at fault."""
        if CONFIG not in self.sizes:
            problem = Problem(CONFIG, "is not in the repository, or no model of this kind is")
            raise CheckpointError(self.name, [problem])
        try:
            checkpoint: Checkpoint = read(folder)
        except CheckpointError as error:
            problems = [
                replace(x, where=x.where.replace(str(folder), self.name)) for x in error.problems
            ]
            raise CheckpointError(self.name, problems) from error
        # Other programs may have put other files of the repository beside ours.
        return replace(
            checkpoint,
            side_files=tuple(name for name in checkpoint.side_files if name in self.sizes),
            left_out=tuple(pair for pair in checkpoint.left_out if pair[0] in self.sizes),
            origin=Path(self.name),
            repository=(self.name, self.commit),
            **more,
        )

    def _home(self) -> Path:
        import huggingface_hub

        return Path(huggingface_hub.constants.HF_HOME)


@contextmanager
def asking(repository: str, revision: str | None = None, file: str = "") -> Iterator[None]:
    """Turn what huggingface_hub and the network raise into a HubError that says what to do."""
    from huggingface_hub import errors

    where = f"{repository}: {file}" if file else repository
    neither = f"{where}:" if file else f"{where} is no folder here, and"
    page = f"the page of {repository} on the hub"
    try:
        yield
    except HubError:
        raise
    except errors.GatedRepoError as error:
        message = (
            f"{where} is gated: accept its terms on {page}, then log in with `hf auth login` or "
            "set HF_TOKEN"
        )
        raise HubError(message) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"{repository} has no revision {revision!r}: see {page}") from error
    except errors.RepositoryNotFoundError as error:
        message = (
            f"there is no folder {repository}, and no such model on the hub, or it is private; "
            "for a private one log in with `hf auth login` or set HF_TOKEN"
        )
        raise HubError(message) from error
    except errors.EntryNotFoundError as error:
        raise HubError(f"{where} is not on the hub at {revision}") from error
    except errors.OfflineModeIsEnabled as error:
        message = f"{neither} HF_HUB_OFFLINE forbids to ask the hub for it"
        raise HubError(message) from error
    except errors.HfHubHTTPError as error:
        code = error.response.status_code if error.response is not None else "?"
        said = (error.server_message or str(error)).splitlines()[0]
        hint = "; log in with `hf auth login` or set HF_TOKEN" if code in (401, 403) else ""
        raise HubError(f"{where}: the hub answers {code}: {said}{hint}") from error
    except errors.HFValidationError as error:
        raise HubError(f"{where}: {error}") from error
    except Exception as error:
        # Connections fail with the classes of whichever HTTP library huggingface_hub uses.
        if isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _HTTP:
            what = f"{type(error).__name__}: {error}".splitlines()[0]
            message = f"{neither} the hub cannot be reached ({what}). What came is kept: try again"
            raise HubError(message) from error
        if isinstance(error, RuntimeError) and error.__cause__ is not None:  # of one file of many
            with asking(repository, revision, str(error).splitlines()[0]):
                raise error.__cause__ from error
        raise


_HTTP = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")
