"""Move codes into MLX's packing; the codes themselves do not change.

Every function writes into an array of the caller and takes matrices: two axes, C-contiguous,
unsigned. Stored integers of another kind are passed as a view (``int32`` as ``uint32``). "MLX
words" are uint32 ``(out_features, in_features * bits / 32)``, each row one little-endian bit
stream: code ``k`` takes the bits from ``k * bits`` on.

A shape, dtype or layout that does not fit is a ``ValueError`` that says what was expected.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from requant.kernels import _native

Array = NDArray[Any]


def transpose_into(source: Array, out: Array) -> None:
    """Fill ``out`` ``(b, a)`` with the transpose of ``source`` ``(a, b)``, both of one dtype.

    They are uint8, uint16 or uint32: codes, the bits of float16 scales, words. GPTQ's ``qweight``
    of 2, 3, 4 or 8 bits, and AutoRound's of 5 and 6, becomes MLX words this way.

    Example:
        >>> qweight = np.array([[0x11111111, 0x22222222], [0x33333333, 0x44444444]], np.uint32)
        >>> words = np.empty((2, 2), np.uint32)
        >>> transpose_into(qweight, words)
        >>> [hex(word) for word in words[0]]
        ['0x11111111', '0x33333333']
    """
    _native.transpose(source, out)


def stream_columns_into(
    source: Array,
    bits: int,
    out: Array,
    *,
    out_bits: int | None = None,
    interleaved: bool = False,
    signed: bool = False,
) -> None:
    """Turn rows of inputs, packed along the outputs, into rows of outputs.

    Args:
        source: uint32 ``(in_features, out_features * bits / 32)``: the codes of one input for
            all outputs are one little-endian bit stream.
        bits: Width of a stored code, 1 to 8.
        out: MLX words, uint32 ``(out_features, in_features * out_bits / 32)``, or codes, uint8
            ``(out_features, in_features)``; overwritten.
        out_bits: Width of a code in words, ``bits`` or more; by default ``bits``.
        interleaved: Of eight stored codes, number ``i`` is output ``[0, 2, 4, 6, 1, 3, 5, 7][i]``
            (AutoAWQ, and Quark's ``pack_method: reorder``); else output ``i``.
        signed: Codes are two's complement; ``2 ** (bits - 1)`` is added to each.

    Both feature counts fill whole words and are multiples of 8; for codes the inputs may be any.
    """
    wide = 0 if out.dtype == np.uint8 else bits if out_bits is None else out_bits
    _native.stream_columns(source, bits, out, wide, interleaved, signed)


def awq_gemm_into(source: Array, out: Array, bits: int = 4, out_bits: int | None = None) -> None:
    """Turn an AWQ "gemm" ``qweight`` into MLX words, or ``qweight`` or ``qzeros`` into codes.

    Args:
        source: uint32 ``(in_features, out_features * bits / 32)``, any range of whole eights of
            outputs; for zeros groups take the place of the inputs.
        bits: 4; AutoRound also writes 5 to 7.
        out: As in ``stream_columns_into``.
        out_bits: Likewise.

    Example:
        >>> qweight = np.full((8, 1), 0x75316420, np.uint32)  # outputs 0 to 7 hold 0 to 7
        >>> words = np.empty((8, 1), np.uint32)
        >>> awq_gemm_into(qweight, words)
        >>> [hex(word) for word in words[:3, 0]]
        ['0x0', '0x11111111', '0x22222222']
    """
    stream_columns_into(source, bits, out, out_bits=out_bits, interleaved=True)


def planar_columns_into(
    source: Array, bits: int, out: Array, *, out_bits: int | None = None
) -> None:
    """Turn GPTQModel's planes (``gptq_p``, always at 5, 6 and 7 bits) into rows of outputs.

    Args:
        source: uint32 ``(in_features * bits / 32, out_features)``; 32 inputs are ``bits`` words
            down the rows, the plane of the lowest bits first. In a plane of width w, word i
            holds codes ``32 / w * i`` and on.
        bits: 2 to 8: planes 2, 2+1, 4, 4+1, 4+2, 4+2+1, 8.
        out: As in ``stream_columns_into``.
        out_bits: Likewise.

    ``qzeros`` lie along the other axis: transposed, they are such a source.
    """
    wide = 0 if out.dtype == np.uint8 else bits if out_bits is None else out_bits
    _native.planar_columns(source, bits, out, wide)


def marlin_into(source: Array, out: Array) -> None:
    """Turn the 4-bit tiles of marlin (AutoAWQ's ``qweight``, AutoGPTQ's ``B``) into MLX words.

    ``source``: uint32 ``(in_features / 16, 2 * out_features)``, any range of whole tiles of 64
    outputs. ``out``: uint32 ``(out_features, in_features / 8)``.
    """
    _native.marlin_words(source, out)


def gemv_fast_into(source: Array, out: Array) -> None:
    """Turn the 4-bit codes of AutoAWQ's gemv_fast and of llm-awq into MLX words.

    ``source``: uint16 ``(out_features / 4, in_features)``, a multiple of 64 inputs. ``out``: uint32
    ``(out_features, in_features / 8)``.
    """
    _native.awq_gemv_fast_words(source, out)


def stream_codes_into(
    words: Array, bits: int, out: Array, *, axis: int = 1, padded: bool = False
) -> None:
    """Unpack streams of any length into codes.

    Args:
        words: uint32; with ``axis`` 1 each row, with 0 each column is one little-endian bit
            stream of at least as many codes as ``out`` has along that axis.
        bits: Width of a code, 1 to 8.
        out: uint8, codes; as many rows (columns, with ``axis`` 0) as ``words``; overwritten.
        axis: Along which the codes are packed.
        padded: ``32 // bits`` codes lie in the low bits of each word and none crosses to the
            next: compressed-tensors before 0.18.

    Example:
        >>> codes = np.empty((1, 10), np.uint8)
        >>> stream_codes_into(np.array([[0x08FAC688]], np.uint32), 3, codes, padded=True)
        >>> codes.tolist()
        [[0, 1, 2, 3, 4, 5, 6, 7, 0, 1]]
    """
    if axis == 1:
        _native.stream_codes(words, bits, out, padded)
        return
    transposed = np.empty(words.shape[::-1], np.uint32)
    _native.transpose(words, transposed)
    codes = np.empty(out.shape[::-1], np.uint8)
    _native.stream_codes(transposed, bits, codes, padded)
    _native.transpose(codes, out)


def unpack_into(words: Array, bits: int, out: Array) -> None:
    """Unpack uint32 ``(rows, n * bits / 32)``, n a multiple of 32, into uint8 ``(rows, n)``."""
    _native.unpack_words(words, bits, out)


def pack_into(codes: Array, bits: int, out: Array) -> None:
    """Pack uint8 ``(rows, n)``, n a multiple of 32, into uint32 ``(rows, n * bits / 32)``."""
    _native.pack_words(codes, bits, out)


def deinterleave_into(words: Array, out: Array) -> None:
    """Put nibbles stored in the order 0, 2, 4, 6, 1, 3, 5, 7 along a row into MLX's order.

    Words are uint32 with eight codes along the inputs (Quark's ``pack_method: reorder``).
    """
    _native.deinterleave_words(words, out)


@dataclass(frozen=True, slots=True)
class RowBlocks:
    """A matrix cut into blocks of rows that lie in different bits of the same elements.

    Row ``r`` of the matrix is in the bits from ``shifts[r // block]`` on of packed row
    ``r % block``, where a block has ``block`` rows.
    """

    bits: int
    shifts: tuple[int, ...]

    def block(self, rows: int) -> int:
        """Packed rows of a matrix of ``rows`` rows."""
        return -(-rows // len(self.shifts))


HQQ = {
    "8bit_u8": RowBlocks(8, (0,)),
    "4bit_u8": RowBlocks(4, (4, 0)),
    "3bit_32": RowBlocks(3, (27, 24, 21, 18, 15, 12, 9, 6, 3, 0)),
    "2bit_u8": RowBlocks(2, (6, 4, 2, 0)),
    "1bit_u8": RowBlocks(1, (7, 6, 5, 4, 3, 2, 1, 0)),
}
"""HQQ's ``packing`` -> how ``W_q`` holds the rows of the reshaped weight."""

BITNET = RowBlocks(2, (0, 2, 4, 6))


def row_blocks_into(
    packed: Array, blocks: RowBlocks, rows: int, start: int, out: Array, *, first: int = 0
) -> None:
    """Take rows ``start`` and on out of packed row blocks.

    Args:
        packed: uint8 or uint32 ``(packed rows, columns)``: packed rows ``first`` and on.
        blocks: Where the rows lie.
        rows: Rows of the whole matrix.
        start: The first row wanted.
        out: uint8 ``(rows wanted, columns)``, codes; overwritten.
        first: The packed row that ``packed`` begins with.

    Raises:
        ValueError: Rows beyond the matrix, or that ``packed`` does not hold.
    """
    block = blocks.block(rows)
    stop = start + out.shape[0]
    if not 0 <= start <= stop <= rows:
        raise ValueError(f"out: rows {start} to {stop} lie beyond the {rows} of the matrix")
    row = start
    while row < stop:
        number, inner = divmod(row, block)
        count = min(block - inner, stop - row)
        held = packed[inner - first : inner - first + count] if inner >= first else packed[:0]
        if held.shape[0] != count:
            raise ValueError(
                f"packed: expected packed rows {inner} to {inner + count}, "
                f"got {first} to {first + packed.shape[0]}"
            )
        _native.extract_bitfield(held, blocks.shifts[number], blocks.bits, 0, out, row - start, 1)
        row += count


def row_pairs_into(packed: Array, out: Array) -> None:
    """Take 4-bit two's complement codes out of bytes that hold two rows (ModelOpt INT4).

    ``packed``: uint8 ``(rows / 2, columns)``: row ``2 r`` in the low nibble, ``2 r + 1`` in the
    high one. ``out``: uint8 ``(rows, columns)``, codes with 8 added.
    """
    if out.shape[0] != 2 * packed.shape[0]:
        raise ValueError(f"out: expected {2 * packed.shape[0]} rows, got {out.shape[0]}")
    for half in range(2):
        _native.extract_bitfield(packed, 4 * half, 4, 8, out, half, 2)


def mx_blocks_into(blocks: Array, words: Array, scales: Array) -> None:
    """Split Quark's older ``mx`` blocks into mxfp4 words and scales.

    ``blocks``: uint8 ``(rows, 17 * groups)``: for 32 values the exponent, a signed byte, and 16
    bytes of E2M1 codes, low nibble first. ``words``: uint32 ``(rows, 4 * groups)``. ``scales``:
    uint8 ``(rows, groups)``, E8M0.
    """
    if not words.flags.c_contiguous:  # else reshaping would copy it
        raise ValueError("words: expected a C-contiguous array")
    rows, groups = scales.shape
    split = blocks.reshape(rows, groups, 17)
    np.add(split[:, :, 0], np.uint8(127), out=scales)  # modulo 256
    words.view(np.uint8).reshape(rows, groups, 16)[:] = split[:, :, 1:]
