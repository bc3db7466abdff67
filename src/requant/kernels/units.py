"""Rows of a tensor from files or arrays, through a kernel, to files or arrays.

One call takes many rows and holds blocks of them that stay in a core's cache: it reads, casts,
checks, encodes, measures the error and writes, all without the GIL. ``block_bytes`` is the most
that a block has of stored or of dense values, but for one row; about six times as much is held.

A source is an array, or ranges of open files, one after another; codes have several. A target is an
array, or a place in an open file. Floats are float32, float16 or bfloat16.

A ``StopFlag`` that another thread sets ends a call at its next block, with ``Stopped``; what the
call wrote is not complete then.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from requant.kernels import _native
from requant.kernels._native import StopFlag as StopFlag
from requant.kernels._native import Stopped as Stopped
from requant.kernels.float_views import as_unsigned
from requant.kernels.gguf import BlockType
from requant.kernels.quantize import search_weights
from requant.quantization.config import Quantization

Array = np.ndarray[Any, np.dtype[Any]]

BLOCK_BYTES = 128 << 10
"""A block whose stored, dense and decoded values, and codes, fit a second-level cache."""
BLOCKS_HELD = 6
"""Blocks' worth of memory that a call holds at the most."""


class FileBytes(NamedTuple):
    """Bytes of an open file."""

    fd: int
    offset: int
    nbytes: int


class FilePlace(NamedTuple):
    """A place in an open file, from which on bytes are written."""

    fd: int
    offset: int


Source = Array | Sequence[FileBytes]
Target = Array | FilePlace


class CodeParts(NamedTuple):
    """The sources of rows that are stored in a mode of MLX."""

    words: Source
    scales: Source
    biases: Source | None = None  # in affine mode


class UnitFileError(OSError):
    """A file could not be read or written; ``errno`` is 0 where a source ends too early.

    ``index`` is the number of the target, or of the range among those of all sources.
    """

    def __init__(self, error: _native.FileError) -> None:
        self.is_write, self.index, number, self.offset = error.args
        super().__init__(number, os.strerror(number))


class Found(NamedTuple):
    """What ``encode_rows`` found."""

    nonfinite: int  # values that are NaN or infinite
    first_nonfinite_row: int  # -1 for none
    overflowed: int  # finite values that became infinite in the cast
    flushed_groups: int  # groups too small for an E8M0 scale
    squared_error: float
    squared_values: float
    max_error_steps: float  # the largest error in steps of its group
    weighted_error: float  # with a search: the sums with its weights; else 0
    weighted_values: float
    # whether a scale or bias of the source's codes is NaN or infinite: the rest has no meaning
    is_damaged: bool


class Written(NamedTuple):
    """What ``decode_rows`` found."""

    overflowed: int  # finite values that became infinite in the cast
    nonfinite: int  # values that are NaN or infinite, if they are counted
    is_damaged: bool  # as in ``Found``


class BlockScales(NamedTuple):
    """The scales of E4M3 bytes, one for each block of rows and columns; the last may be cut."""

    scales: Array  # float32, (block rows, block columns)
    block_rows: int
    block_columns: int
    first_row: int  # of the bytes, in the blocks


class MlxCodes(NamedTuple):
    """Rows of words, scales and, in affine mode, biases."""

    quantization: Quantization
    scales: str = ""  # header name of the dtype, in affine mode
    biases: str = ""


class StoredRows(NamedTuple):
    """How rows are stored: as floats, as E4M3 bytes, as codes of MLX, or as blocks of GGUF."""

    dtype: str  # header name, of floats and bytes
    rows: int
    columns: int
    form: BlockScales | MlxCodes | BlockType | None = None  # None for floats

    @property
    def _kind(self) -> tuple[Any, ...]:
        """What the native functions call it."""
        form = self.form
        if isinstance(form, BlockScales):
            return self.dtype, as_unsigned(form.scales), *form[1:]
        if isinstance(form, MlxCodes):
            q = form.quantization
            return q.mode.value, q.group_size, q.bits, form.scales, form.biases
        return (self.dtype,) if form is None else (form.number,)


@dataclass(frozen=True, slots=True)
class RowEncoding:
    """How rows are encoded and the error is measured.

    ``search``, ``weights`` and ``by_magnitude`` are those of ``kernels.quantize``. The step of a
    group is the magnitude of its scale: the distance of neighbouring codes in affine mode, and the
    value of element 1.0 in the others.
    """

    target: Quantization
    dtype: str  # header name of the dtype that values are cast to
    search: str | None = None
    weights: Array | None = None
    by_magnitude: bool = False


def copy_rows(
    source: Source,
    target: Target,
    nbytes: int,
    *,
    block_bytes: int = BLOCK_BYTES,
    stop: StopFlag | None = None,
) -> None:
    """Copy bytes.

    Raises:
        UnitFileError: A file cannot be read or written.
        Stopped: ``stop`` was set.
    """
    try:
        _native.copy_rows(_bits(source), _bits(target), nbytes, block_bytes, stop)
    except _native.FileError as error:
        raise UnitFileError(error) from None


def decode_rows(
    source: Source | CodeParts,
    stored: StoredRows,
    target: Target,
    dtype: str,
    *,
    counts_nonfinite: bool = False,
    block_bytes: int = BLOCK_BYTES,
    stop: StopFlag | None = None,
) -> Written:
    """Compute the values of rows, rounded once to ``dtype`` (a header name), and write them.

    It ends early at a scale or bias of codes that is NaN or infinite. Values of codes of MLX are
    those of ``kernels.quantize.decode_into``.

    Raises:
        UnitFileError: A file cannot be read or written.
        Stopped: ``stop`` was set.
    """
    _, rows, columns, _ = stored
    try:
        return Written(
            *_native.write_values(
                _sources(source),
                stored._kind,
                _bits(target),
                dtype,
                rows,
                columns,
                counts_nonfinite,
                block_bytes,
                stop,
            )
        )
    except _native.FileError as error:
        raise UnitFileError(error) from None


def encode_rows(
    source: Source | CodeParts,
    stored: StoredRows,
    targets: Sequence[Target],
    encoding: RowEncoding,
    *,
    is_encoded: bool = False,
    block_bytes: int = BLOCK_BYTES,
    stop: StopFlag | None = None,
) -> Found:
    """Cast rows, or decode them, encode them, and measure the error of the codes.

    A block with NaN or infinity is counted and gets codes of zeros. It ends early at a scale or
    bias of the source's codes that is NaN or infinite.

    Args:
        source: The rows as stored; an array is ``(rows, columns)``.
        stored: What they are.
        targets: For words, scales and, in affine mode, biases. Arrays are ``(rows, ...)``.
        encoding: How they are encoded.
        is_encoded: The targets are arrays that hold the codes already: only measure.
        block_bytes: As the module describes.
        stop: Likewise.

    Raises:
        UnitFileError: A file cannot be read or written.
        Stopped: ``stop`` was set.
    """
    target = encoding.target
    _, rows, columns, _ = stored
    try:
        return Found(
            *_native.encode_rows(
                _sources(source),
                stored._kind,
                encoding.dtype,
                rows,
                columns,
                target.mode.value,
                target.group_size,
                target.bits,
                [_bits(place) for place in targets],
                encoding.search,
                search_weights(encoding.search, encoding.weights, columns),
                encoding.by_magnitude,
                is_encoded,
                block_bytes,
                stop,
            )
        )
    except _native.FileError as error:
        raise UnitFileError(error) from None


def read_spaced(fd: int, offset: int, stride: int, into: Array) -> None:
    """Fill the rows of ``into``, uint8 ``(rows, n)``, with bytes that lie ``stride`` apart.

    Raises:
        UnitFileError: The file cannot be read, or ends too early.
    """
    try:
        _native.read_spaced(fd, offset, stride, into)
    except _native.FileError as error:
        raise UnitFileError(error) from None


def _sources(source: Source | CodeParts) -> list[Any]:
    """All sources, in the order of ``CodeParts``."""
    if not isinstance(source, CodeParts):
        return [_bits(source)]
    return [_bits(part) for part in source if part is not None]


def _bits(place: Source | Target) -> Any:
    """An array as unsigned integers; a place in a file as it is."""
    if not isinstance(place, np.ndarray):
        return place
    return place.view(np.uint8) if place.itemsize == 1 else as_unsigned(place)
