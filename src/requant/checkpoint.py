"""Step 1 of the road: what a Checkpoint is, whichever files it was read from.

Frozen data about names, shapes and places of bytes; of the bytes it reads at most the small
tensors that a format peeks at. ``sources.read_checkpoint`` makes one.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from requant.dtypes import NUMPY_DTYPE, TensorInfo
from requant.errors import CheckpointError, Problem
from requant.gguf_model import GgufModel
from requant.limits import MAX_PEEK_BYTES
from requant.source_folder import open_regular


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
class FileRange:
    """A run of bytes of a source file."""

    file: str
    offset: int
    nbytes: int


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


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A weight file; the hash covers its length prefix and header JSON."""

    name: str
    nbytes: int
    header_sha256: str


class Supply(Protocol):
    """Weight files that come while others are read (``downloads``)."""

    @property
    def consumed(self) -> bool:
        """Whether a file goes as soon as nothing needs it."""

    @property
    def bytes_here(self) -> int:
        """How many of the bytes that were missing at the beginning have come."""

    @property
    def bytes_expected(self) -> int:
        """How many were missing."""

    def begin(self, order: Sequence[str]) -> None:
        """Let files come, those first that are needed first."""

    def take(self, name: str, stop: Callable[[], bool]) -> Path | None:
        """Where a file is, once it is; None if ``stop`` says so before."""

    def release(self, name: str) -> None:
        """Nothing will be read of a file any more."""

    def end(self) -> None:
        """Let nothing come any more."""


@dataclass(frozen=True)
class Checkpoint:
    """A source folder with everything that can be known without reading tensor data.

    Attributes:
        path: The folder.
        files: The weight files, in natural order.
        tensors: Every tensor by name, in the order of files, then of offsets.
        config: ``config.json``, parsed.
        config_text: ``config.json`` as it stands.
        side_files: Relative paths of the files that an output carries over unchanged.
        left_out: Relative paths of files that it does not, each with the reason.
        notes: What the user should know of the files: what is read or carried over, and why.
        quantization_files: The JSON files beside config.json in which tools describe their
            quantization, parsed, by name.
        metadata: ``__metadata__`` of the weight files, the first file's word where two differ.
        made_files: Name -> content of files that an output gets and the folder does not have.
        gguf: How tensors are stored, where the source is GGUF.
        origin: What the user named, where it is not the folder.
        twins: A folder with the headers of weight files that a stopped run has consumed.
        peeked: What was read of the weight files so far.
        repository: Of the hub: its id, and the commit.
        fetch: Reads a run of bytes where the files hold headers only (``hub``).
        supply: Brings the weight files, where they are not in the folder.
    """

    path: Path
    files: tuple[SourceFile, ...]
    tensors: Mapping[str, SourceTensor]
    config: Mapping[str, Any]
    config_text: str
    side_files: tuple[str, ...]
    left_out: tuple[tuple[str, str], ...]
    notes: tuple[str, ...] = ()
    quantization_files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    made_files: Mapping[str, Callable[[], bytes]] = field(default_factory=dict)
    gguf: GgufModel | None = None
    origin: Path | None = None
    repository: tuple[str, str] | None = None
    fetch: Callable[[FileRange], bytes] | None = None
    supply: Supply | None = None

    @property
    def source(self) -> Path:
        """What the user named."""
        return self.origin or self.path

    twins: Path | None = None
    peeked: list[FileRange] = field(default_factory=list, compare=False)

    def altered(self, **changes: Any) -> Checkpoint:
        """The same source with other tensors or another config, read as this one is."""
        made = copy.copy(self)
        for name, value in changes.items():
            object.__setattr__(made, name, value)
        return made

    def place_of(self, file: str) -> Path:
        """Where a weight file is read: its twin, where the file itself is gone."""
        return place_of(self.path, self.twins, file)

    def peek(self, name: str) -> np.ndarray:
        """The data of a small tensor that decides what a layer is: a ``g_idx``, block scales.

        Raises:
            CheckpointError: The file cannot be read, or is shorter than its header says, or
                the tensor is too large to look at before the work begins.
        """
        tensor = self.tensors[name]
        assert not isinstance(tensor, ComputedTensor), name
        if tensor.info.nbytes > MAX_PEEK_BYTES:
            message = f"{tensor.info}, at most {MAX_PEEK_BYTES:,} bytes are read while planning"
            raise CheckpointError(str(self.path), [Problem(name, message)])
        data = bytearray()
        for part in tensor.ranges:
            data += self.read_range(part)
            self.peeked.append(part)
        return np.frombuffer(bytes(data), NUMPY_DTYPE[tensor.info.dtype]).reshape(tensor.info.shape)

    def read_range(self, part: FileRange) -> bytes:
        """A run of bytes of a weight file."""
        if self.fetch is not None:
            return self.fetch(part)
        message = ""
        try:
            with open(open_regular(self.place_of(part.file)), "rb", buffering=0) as file:
                file.seek(part.offset)
                data = file.read(part.nbytes)
        except OSError as error:
            message = f"cannot be read: {error.strerror or error}"
        else:
            if len(data) < part.nbytes:
                message = "is shorter than its header says"
        if message:
            raise CheckpointError(str(self.path), [Problem(part.file, message)])
        return data


def place_of(folder: Path, twins: Path | None, file: str) -> Path:
    """Where a weight file of a folder is read: its twin, where the file itself is gone."""
    gone = twins is not None and not os.path.lexists(folder / file)
    return twins / file if twins is not None and gone else folder / file
