"""Values behind stored codes: float32 arithmetic, then one rounding to the dtype of the result.

Every function writes into an array of the caller and takes matrices: two axes, C-contiguous.
``out`` is float32, float16 or bfloat16; roundings are to nearest even and keep subnormals,
whatever state the thread's processor is in.

A shape, dtype or layout that does not fit is a ``ValueError`` that says what was expected.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from requant.core.dtypes import NUMPY_DTYPE
from requant.errors import UnknownValueError, UnsupportedDtypeError
from requant.kernels import _native
from requant.kernels.float_views import as_unsigned, float_name

Array = NDArray[Any]

_SCALE_FORMATS = ("F8_E8M0", "F8_E4M3", "F8_E4M3FNUZ")


def integer_values_into(
    codes: Array, scales: Array, zeros: Array, group: int, out: Array, *, difference: str = "F32"
) -> None:
    """Fill ``out`` with ``(code - zero) * scale``.

    Args:
        codes: uint8 ``(rows, columns)``.
        scales: float32 ``(rows, ceil(columns / group))``.
        zeros: float32, like the scales.
        group: Columns with one scale; the last group of a row may be shorter.
        out: ``(rows, columns)``; overwritten.
        difference: ``"F32"``, ``"F16"`` or ``"BF16"``: what ``code - zero`` is rounded to
            before it is multiplied (HQQ computes in the dtype of its scales).
    """
    bits, name = float_bits(out, "out")
    _native.integer_values(
        codes, _float32(scales, "scales"), _float32(zeros, "zeros"), group, bits, name, difference
    )


def e4m3_values_into(
    codes: Array,
    scales: Array,
    block_rows: int,
    block_columns: int,
    out: Array,
    *,
    first_row: int = 0,
    fnuz: bool = False,
) -> int:
    """Fill ``out`` with ``float8_e4m3fn(byte) * scale``, a scale for each block.

    Args:
        codes: uint8 (or a float8 of ml_dtypes) ``(rows, columns)``: rows ``first_row`` and on
            of the tensor that the grid of blocks covers.
        scales: float32 ``(block rows of the tensor, ceil(columns / block_columns))``. One scale a
            row is ``block_rows=1, block_columns=columns``; one for all a block as large as all.
        block_rows: Rows of a block; the last block may be shorter, here and across.
        block_columns: Columns of a block.
        out: ``(rows, columns)``; overwritten.
        first_row: Where the rows of ``codes`` begin in the tensor.
        fnuz: The bytes are float8_e4m3fnuz (bias 8, 0x80 is the only NaN).

    Returns:
        How many bytes are NaN.
    """
    bits, name = float_bits(out, "out")
    scales_bits = _float32(scales, "scales")
    return _native.float8_values(
        codes.view(np.uint8), scales_bits, block_rows, block_columns, first_row, bits, name, fnuz
    )


def lut_values_into(
    codes: Array,
    codebook: Array,
    absmax: Array,
    block: int,
    out: Array,
    *,
    first: int = 0,
    high_first: bool = True,
) -> None:
    """Fill ``out`` with ``codebook[code] * absmax`` (bitsandbytes nf4 and fp4).

    Args:
        codes: uint8, any shape: two codes a byte of the flattened matrix.
        codebook: float32 ``(16,)``.
        absmax: float32, flat: of the block that the first value lies in, and on.
        block: Values of the flattened matrix with one absmax, an even number.
        out: As many values, any shape; overwritten.
        first: Which value of its block the first one is, an even number below ``block``.
        high_first: The high nibble of a byte is the first code.
    """
    bits, name = float_bits(out, "out")
    if not out.flags.c_contiguous:  # else reshaping would copy it
        raise ValueError("out: expected a C-contiguous array")
    table, scales = _float32(codebook, "codebook"), _float32(absmax, "absmax").reshape(-1)
    codes, bits = codes.reshape(-1), bits.reshape(-1)
    _native.lut_values(codes, table, scales, block, first, high_first, bits, name)


def scale_values(scales: Array, format: str) -> Array:
    """Scale bytes, uint8 or a float8 of ml_dtypes, as float32 of the same shape.

    They are bytes of ``"F8_E8M0"`` (``2 ** (byte - 127)``, 255 is NaN), ``"F8_E4M3"`` or
    ``"F8_E4M3FNUZ"`` by ``format``, whatever dtype the array has.
    """
    if format not in _SCALE_FORMATS:
        raise UnknownValueError("[decode] unknown format of scales", format, _SCALE_FORMATS)
    every = np.arange(256, dtype=np.uint8).view(NUMPY_DTYPE[format]).astype(np.float32)
    return np.take(every, scales.view(np.uint8))


def float_bits(array: Array, where: str) -> tuple[Array, str]:
    """The values as unsigned integers of their size, and the name of their dtype."""
    name = float_name(array.dtype, f"[decode] {where}")
    return as_unsigned(array), name


def _float32(array: Array, where: str) -> Array:
    if array.dtype != np.float32:
        raise UnsupportedDtypeError(f"[decode] {where}", array.dtype.name, ("float32",))
    return array.view(np.uint32)
