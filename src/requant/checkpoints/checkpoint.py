"""Pipeline stage 1: the Checkpoint, whichever files it was read from.

A ``Checkpoint`` is frozen data about names, shapes and byte ranges, and refers to an
``OpenedSource``: the object that reads bytes, whose state changes meanwhile. Tensor data are read
only of the small tensors that formats need to describe a layer. ``sources.open.read_checkpoint``
makes a Checkpoint.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np

from requant.checkpoints.byte_ranges import FileRange, ReadAhead, ReadRanges, read_runs, runs_of
from requant.checkpoints.gguf_tensors import GgufModel
from requant.core.dtypes import FLOATS, NUMPY_DTYPE, TensorInfo
from requant.core.files import open_regular, read_at
from requant.core.limits import MAX_SMALL_TENSOR_BYTES
from requant.core.reasons import Note
from requant.errors import CheckpointError, Problem
from requant.text import damage, os_error_text

Key = tuple[str, ...]
"""The path of a value of a config: ("text_config", "tie_word_embeddings")."""

COMPARED: Final = "compared.json"
"""A file next to header stubs: which tensors were equal or not, before files were deleted."""

_GAP_BYTES: Final = 4096  # between ranges that are read at once: no more than a page
_RUN_BYTES: Final = 1 << 20

REMOVED: Final = object()
"""A value for ``with_changes``: the key is removed."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies: a file of the checkpoint and an absolute byte offset in it."""

    name: str
    info: TensorInfo
    file: str
    offset: int

    @property
    def ranges(self) -> tuple[FileRange, ...]:
        """Where its bytes lie, in order."""
        return (FileRange(self.file, self.offset, self.info.nbytes),)


@dataclass(frozen=True, slots=True)
class JoinedTensor:
    """A tensor whose bytes are those of several places, one after another."""

    name: str
    info: TensorInfo
    ranges: tuple[FileRange, ...]


@dataclass(frozen=True, slots=True)
class ComputedTensor:
    """A tensor that a model's own rule computes from others when it is needed."""

    name: str
    info: TensorInfo
    inputs: tuple[str, ...]


SourceTensor = StoredTensor | JoinedTensor | ComputedTensor


def cut(tensor: SourceTensor, start: int, stop: int) -> Iterator[FileRange]:
    """Where bytes ``start`` to ``stop`` of a tensor lie."""
    assert not isinstance(tensor, ComputedTensor)
    for piece in tensor.ranges:
        low, high = max(start, 0), min(stop, piece.nbytes)
        if low < high:
            yield FileRange(piece.file, piece.offset + low, high - low)
        start, stop = start - piece.nbytes, stop - piece.nbytes


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A weight file; the hash covers its length prefix and header JSON."""

    name: str
    nbytes: int
    header_sha256: str


class WeightFileProvider(Protocol):
    """Provides weight files that are downloaded while others are read (``sources.downloads``)."""

    @property
    def consumed(self) -> bool:
        """Whether a file is deleted as soon as nothing needs it."""

    @property
    def bytes_here(self) -> int:
        """How many of ``bytes_expected`` are downloaded."""

    @property
    def bytes_expected(self) -> int:
        """Bytes that were missing at the start."""

    def start(self, order: Sequence[str]) -> None:
        """Start to download files in this order."""

    def wait_for(self, name: str, stop: Callable[[], bool]) -> Path | None:
        """Wait for a file and return its path; None if ``stop`` returns true before."""

    def release(self, name: str) -> None:
        """Declare that a file is not read any more."""

    def stop(self) -> None:
        """Stop all downloads."""


class OpenedSource:
    """The files of one checkpoint while they are read. Not data: its state grows with the reads.

    It reads ranges of bytes and small tensors, records which, and holds the functions of a source:
    the one that fetches bytes from the hub, the downloader of weight files, and those that generate
    files. A ``Plan`` refers to none of them.

    Args:
        path: The folder of the files.
        header_stubs: A folder with the headers of weight files that a stopped run has deleted.
        fetch: Reads ranges of bytes where the files hold headers only (``hub_repository``).
        downloader: Provides the weight files, where they are not in the folder.
        generated_files: Name -> content of files that an output gets and the folder does not have.
        compared: Results of tensor comparisons of an earlier run.
    """

    def __init__(
        self,
        path: Path,
        *,
        header_stubs: Path | None = None,
        fetch: ReadRanges | None = None,
        downloader: WeightFileProvider | None = None,
        generated_files: Mapping[str, Callable[[], bytes]] | None = None,
        compared: Mapping[str, bool] | None = None,
    ) -> None:
        self.path = path
        self.header_stubs = header_stubs
        self.fetch = fetch
        self.downloader = downloader
        self.generated_files = dict(generated_files or {})
        self.small_tensors: dict[str, SourceTensor] = {}  # those that were read so far, by name
        self.damaged: dict[str, Problem] = {}  # of these tensors, those with NaN or infinity
        self.compared = dict(compared or {})  # names of two tensors -> whether they are equal
        self._ahead = ReadAhead(self.read_ranges)

    def with_downloader(self, path: Path, downloader: WeightFileProvider) -> OpenedSource:
        """The same source in another folder, to which the downloader adds the weight files."""
        opened = OpenedSource(
            path,
            header_stubs=self.header_stubs,
            fetch=self.fetch,
            downloader=downloader,
            generated_files=self.generated_files,
            compared=self.compared,
        )
        opened.small_tensors |= self.small_tensors
        opened.damaged |= self.damaged
        return opened

    def size_of(self, files: Iterable[str]) -> int:
        """Bytes of files of the folder together."""
        return sum((self.path / file).stat().st_size for file in files)

    def read_ahead(self, tensors: Iterable[SourceTensor]) -> None:
        """Say which small tensors will be read, in the order of the reads.

        The first read takes those that follow with it, neighbours in one run. Tensors that are not
        read after all cost the bytes of a window at most; those too large are left out.
        """
        self._ahead.expect(
            tensor
            for tensor in tensors
            if not isinstance(tensor, ComputedTensor)
            and tensor.info.nbytes <= MAX_SMALL_TENSOR_BYTES
        )

    def read_small_tensor(self, tensor: SourceTensor) -> np.ndarray:
        """The data of a small tensor that describes a layer: a ``g_idx``, block scales.

        Raises:
            CheckpointError: The file cannot be read, or is shorter than its header says, or
                the tensor is too large to be read while planning.
        """
        name = tensor.name
        assert not isinstance(tensor, ComputedTensor), name
        if tensor.info.nbytes > MAX_SMALL_TENSOR_BYTES:
            message = (
                f"{tensor.info}, at most {MAX_SMALL_TENSOR_BYTES:,} bytes are read while planning"
            )
            raise CheckpointError(str(self.path), [Problem(name, message)])
        values = np.frombuffer(self._ahead.read(tensor), NUMPY_DTYPE[tensor.info.dtype])
        self.small_tensors[name] = tensor
        if tensor.info.dtype in FLOATS and not np.isfinite(values).all():
            bad = ~np.isfinite(values)
            row = int(bad.argmax()) // (tensor.info.shape or (1,))[-1]
            self.damaged[name] = Problem(name, damage("scales", int(bad.sum()), row))
        return values.reshape(tensor.info.shape)

    def small_tensor_ranges(self) -> Iterator[FileRange]:
        """Where the small tensors lie that were read so far."""
        for tensor in self.small_tensors.values():
            assert not isinstance(tensor, ComputedTensor)
            yield from tensor.ranges

    def read_range(self, part: FileRange) -> bytes:
        """A range of bytes of a weight file."""
        (data,) = self.read_ranges([part])
        return data

    def read_ranges(self, parts: Sequence[FileRange]) -> Sequence[bytes]:
        """Ranges of bytes of weight files, in the order of ``parts``.

        A file is opened once, and ranges that lie close to each other are read at once.

        Raises:
            CheckpointError: A file cannot be read, or is shorter than its header says.
        """
        if self.fetch is not None:
            return self.fetch(parts)
        with _OpenFile(self.path, self.header_stubs) as file:
            return read_runs(parts, runs_of(parts, _GAP_BYTES, _RUN_BYTES), file.read)


class _OpenFile:
    """One weight file of a folder at a time, for positioned reads."""

    def __init__(self, folder: Path, stubs: Path | None) -> None:
        self.folder, self.stubs = folder, stubs
        self._name, self._descriptor = "", -1

    def __enter__(self) -> _OpenFile:
        return self

    def __exit__(self, *_: object) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def read(self, part: FileRange) -> bytes:
        """A range of bytes; the file stays open for the next."""
        message = "is shorter than its header says"
        try:
            if part.file != self._name or self._descriptor < 0:
                self.__exit__()
                self._descriptor = open_regular(weight_path(self.folder, self.stubs, part.file))
                self._name = part.file
            data = read_at(self._descriptor, part.nbytes, part.offset)
            if len(data) == part.nbytes:
                return data
        except OSError as error:
            message = f"cannot be read: {os_error_text(error)}"
        raise CheckpointError(str(self.folder), [Problem(part.file, message)])


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A source with everything that is known of it without reading tensor data.

    Frozen data but for ``opened``, which reads the source's files and does not count when two
    checkpoints are compared.
    """

    files: tuple[SourceFile, ...]  # the weight files, in natural order
    # Every tensor by name, in the order of files, then of offsets.
    tensors: Mapping[str, SourceTensor]
    config: Mapping[str, Any]  # config.json, parsed
    config_text: str  # config.json as it is in the file
    # Relative paths of the files that are copied to an output unchanged.
    side_files: tuple[str, ...]
    # Relative paths of files that are not, each with the reason.
    left_out: tuple[tuple[str, str], ...]
    notes: tuple[Note, ...] = ()  # notes on the files: which are read or copied, and why
    # The JSON files next to config.json in which tools describe their quantization, parsed, by
    # name.
    quantization_files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    # ``__metadata__`` of the weight files, the first file's entry where two differ.
    metadata: Mapping[str, str] = field(default_factory=dict)
    # Key of ``config`` -> its value by the tensors, where the file disagrees.
    corrections: Mapping[Key, Any] = field(default_factory=dict)
    gguf: GgufModel | None = None  # how tensors are stored, where the source is GGUF
    origin: Path | None = None  # the source as the user named it, where that is not the folder
    repository: tuple[str, str] | None = None  # of a source on the hub: its id, and the commit
    opened: OpenedSource = field(compare=False, repr=False)  # reads the files

    @property
    def path(self) -> Path:
        """The folder."""
        return self.opened.path

    @property
    def source(self) -> Path:
        """The source as the user named it."""
        return self.origin or self.path

    def corrected(self, changes: Mapping[Key, Any]) -> Checkpoint:
        """The same with other values in its config; ``REMOVED`` removes a key."""
        if not changes:
            return self
        config = with_changes(self.config, changes)
        return replace(self, config=config, corrections={**self.corrections, **changes})

    def read_ahead(self, names: Iterable[str]) -> None:
        """Say which small tensors will be read, in order, as ``OpenedSource.read_ahead`` takes."""
        self.opened.read_ahead(self.tensors[name] for name in names)

    def read_small_tensor(self, name: str) -> np.ndarray:
        """The data of a small tensor, as ``OpenedSource.read_small_tensor`` reads it."""
        return self.opened.read_small_tensor(self.tensors[name])


def with_changes(config: Mapping[str, Any], changes: Mapping[Key, Any]) -> dict[str, Any]:
    """A config with other values under some of its keys; ``config`` stays as it is."""
    changed = dict(config)
    for (key, *rest), value in changes.items():
        if rest:
            changed[key] = with_changes(changed.get(key) or {}, {tuple(rest): value})
        elif value is REMOVED:
            changed.pop(key, None)
        else:
            changed[key] = value
    return changed


def weight_path(folder: Path, stubs: Path | None, file: str) -> Path:
    """The path of a weight file, or of its header stub where the file is deleted."""
    if stubs is None or os.path.lexists(folder / file):
        return folder / file
    return stubs / file
