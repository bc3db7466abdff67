"""Move codes into MLX's order without computing anything: the same integers, other places.

Every function writes into an array of the caller and takes matrices: two axes, C-contiguous,
unsigned. Stored integers of another kind are passed as a view (``int32`` as ``uint32``). "MLX
words" are uint32 ``(out_features, in_features * bits / 32)``, each row one little-endian bit
stream: code ``k`` takes the bits from ``k * bits`` on.

A shape, dtype or layout that does not fit is a ``ValueError`` that says what was expected.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from requant import _native

Array = NDArray[Any]


def transpose_into(source: Array, out: Array) -> None:
    """Fill ``out`` ``(b, a)`` with the transpose of ``source`` ``(a, b)``.

    Args:
        source: uint8, uint16 or uint32: codes, the bits of float16 scales, words.
        out: The same dtype; overwritten. GPTQ's ``qweight`` of 2, 3, 4 or 8 bits, and
            AutoRound's of 5 and 6, becomes MLX words this way.

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
        out: uint32 ``(out_features, in_features * out_bits / 32)``, or uint8
            ``(out_features, in_features)``; overwritten.
        bits: 4; AutoRound also writes 5 to 7.
        out_bits: As in ``stream_columns_into``.

    Example:
        >>> qweight = np.full((8, 1), 0x75316420, np.uint32)  # outputs 0 to 7 hold 0 to 7
        >>> words = np.empty((8, 1), np.uint32)
        >>> awq_gemm_into(qweight, words)
        >>> [hex(word) for word in words[:3, 0]]
        ['0x0', '0x11111111', '0x22222222']
    """
    stream_columns_into(source, bits, out, out_bits=out_bits, interleaved=True)
