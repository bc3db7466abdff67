"""Rows of codes from files to files: into MLX's order, in one call for many rows.

As ``kernels.units``, without the GIL; the work of ``kernels.repack`` and of ``kernels.gguf``. Codes
that are spread over a tensor are read in panels: some inputs of all rows, so that reads are long,
and the outputs of many rows are held until they are complete.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

import numpy as np

from requant.kernels import _native
from requant.kernels.gguf import BlockType
from requant.kernels.units import FileBytes, FilePlace, StopFlag, UnitFileError
from requant.quantization.config import Quantization

Array = np.ndarray[Any, np.dtype[Any]]


class StoredRect(NamedTuple):
    """A rectangle of a matrix of bytes."""

    ranges: Sequence[FileBytes]  # the rows, whole
    rows: int
    row_bytes: int
    left: int  # the first byte of each row
    width: int  # bytes of each row
    dtype: str  # header name

    @property
    def _bytes(self) -> tuple[Any, ...]:
        return self[:5]


class WordOrder(StrEnum):
    """Where integer codes lie."""

    ROWS = "rows"  # each row is a bit stream along the inputs, MLX's order
    COLUMNS = "columns"  # bit streams down the inputs, ``[in * bits / 32, out]``
    STREAMS = "streams"  # bit streams along the outputs, ``[in, out * bits / 32]``
    PLANES = "planes"  # GPTQModel's planes down the inputs
    QUADS = "quads"  # AutoAWQ's gemv_fast, ``[out / 4, in]``


class ZeroOrder(StrEnum):
    """Where zero points lie, as codes of the same width."""

    MIDDLE = "middle"  # nowhere: each is ``2 ** (bits - 1)``
    ROWS = "rows"  # each row a bit stream
    COLUMNS = "columns"  # bit streams down the rows, ``[out * bits / 32, groups]``
    STREAMS = "streams"  # bit streams along the rows, ``[groups, out * bits / 32]``
    BIASES = "biases"  # the biases themselves, floats ``[groups, out]``


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredCodes:
    """How integer codes, scales and zero points are stored: ``w = (code - zero) * scale``.

    ``words``, ``scales`` and ``zeros`` are the roles of the tensors.
    """

    words: str
    order: WordOrder
    bits: int
    scales: str
    group: int  # inputs that share a scale and a zero
    transposed_scales: bool = False  # whether scales are ``[groups, out]``
    padded: bool = False  # whether codes do not cross words, in ROWS and COLUMNS
    interleaved: bool = False  # whether STREAMS hold outputs in AutoAWQ's order
    zeros: str = ""
    zero_order: ZeroOrder = ZeroOrder.MIDDLE
    skipped_zeros: int = 0  # in COLUMNS, the zeros before that of the first row
    word_offset: int = 0  # is added to each word of zeros, modulo 2^32
    code_offset: int = 0  # is added to each zero, modulo 2^bits
    must_be_middle: bool = False  # whether stored zeros are as MIDDLE says

    @property
    def float_roles(self) -> list[str]:
        """The tensors that must be float32, float16 or bfloat16."""
        return [self.scales] + ([self.zeros] if self.zero_order is ZeroOrder.BIASES else [])

    @property
    def roles(self) -> list[str]:
        """The tensors, in the order of their ranges in an error."""
        return [self.words, self.scales] + ([self.zeros] if self.zeros else [])


class RepackTarget(NamedTuple):
    """What codes become, and where it goes."""

    quantization: Quantization
    dtype: str  # header name, of scales and biases
    places: Sequence[FilePlace | Array]  # of words, scales and, in affine mode, biases
    room: Array  # uint8: memory for a block of outputs, 64 bytes at least


class UnitRows(NamedTuple):
    """The rows of a unit."""

    rows: int
    columns: int
    row_unit: int = 1  # blocks begin at multiples of it
    first_row: int = 0  # number of the first row in the step
    measures: bool = (
        False  # whether the error of rounding is measured, in every 16th row of the step
    )


def repack_integers(
    stored: StoredCodes,
    rects: Mapping[str, StoredRect],
    rows: UnitRows,
    target: RepackTarget,
    stop: StopFlag | None = None,
) -> tuple[float, float] | None:
    """Move codes into MLX's words; scales and biases are rounded once, and repeated.

    Returns:
        The sums of squares of what rounding changes, and of values, in the rows that are measured.
        None if a scale, bias or zero is not finite or not as it should be: what is written is not
        complete, and ``packing.repack`` says what is wrong.

    Raises:
        UnitFileError: A file cannot be read or written.
        Stopped: ``stop`` was set.
    """
    words, scales, zeros = (rects.get(x) for x in (stored.words, stored.scales, stored.zeros))
    assert words is not None and scales is not None
    quantization = target.quantization
    try:
        return _native.repack_integers(
            (
                words._bytes,
                stored.order.value,
                stored.bits,
                stored.padded,
                stored.interleaved,
            ),
            (scales._bytes, scales.dtype, stored.transposed_scales),
            (
                stored.zero_order.value,
                None if zeros is None else zeros._bytes,
                stored.padded,
                stored.interleaved,
                stored.skipped_zeros,
                stored.word_offset,
                stored.code_offset,
                stored.must_be_middle,
                "" if zeros is None else zeros.dtype,
            ),
            stored.group,
            rows.rows,
            rows.columns,
            quantization.group_size,
            quantization.bits,
            target.dtype,
            list(target.places),
            rows.row_unit,
            rows.first_row,
            rows.measures,
            target.room,
            stop,
        )
    except _native.FileError as error:
        raise UnitFileError(error) from None


def repack_blocks(
    kind: BlockType,
    blocks: StoredRect,
    rows: UnitRows,
    target: RepackTarget,
    stop: StopFlag | None = None,
) -> tuple[float, float] | None:
    """The same for rows of GGUF's blocks, as ``kernels.gguf.words_into`` moves them."""
    try:
        return _native.repack_gguf(
            blocks._bytes,
            kind.number,
            rows.rows,
            rows.columns,
            target.quantization.mode.value,
            target.dtype,
            list(target.places),
            rows.first_row,
            rows.measures,
            target.room,
            stop,
        )
    except _native.FileError as error:
        raise UnitFileError(error) from None
