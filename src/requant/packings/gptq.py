"""Layouts of GPTQ tools: a bit stream down the inputs, or planes of bits.

Value: ``w = (code - zero) * scale``, scale and zero those of the input's group. Layouts:
AutoGPTQ/AutoGPTQ auto_gptq/nn_modules/qlinear, ModelCloud/GPTQModel
gptqmodel/utils/planar_packing.py and docs/gptq_planar.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import ClassVar

import numpy as np

from requant.kernels import quantize as native
from requant.kernels import repack
from requant.kernels.unit_repack import StoredCodes, WordOrder, ZeroOrder
from requant.packings.base import (
    Array,
    IntegerPacking,
    Parts,
    Rect,
    Scratch,
    mlx_bits,
    stream_codes,
)
from requant.quantization.config import Quantization

# Widths of the planes of a block of 32 codes, lowest bits first.
PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}
_MLX_STREAM = (2, 3, 4, 5, 6, 8)


class Zeros(StrEnum):
    """The step from a stored zero field to the zero."""

    AS_STORED = "zero"  # gptq_v2, gptq_p, auto_round
    PLUS_ONE = "zero - 1"  # v1: the field plus one, modulo 2^bits
    WORD_PLUS_ONE = "zero - 1, by words"  # v1 by GPTQModel: carries run through the word


@dataclass(frozen=True)
class Gptq(IntegerPacking):
    """``qweight`` ``[in * bits / 32, out]``, ``qzeros`` ``[groups, out * bits / 32]``."""

    planar: bool = False  # whether blocks of 32 codes are stored plane by plane
    stored_zeros: Zeros = Zeros.AS_STORED  # the meaning of the fields of ``qzeros``
    has_zeros: bool = True  # whether there is a ``qzeros``
    act_order: bool = False  # whether inputs belong to groups in the order of ``g_idx``
    # whether the codes are moved into the order of their groups: the layer's inputs then come in
    # that order
    sorted: bool = False
    word_bits: int = 32  # bits of the integers that hold the streams (GPTQModel's ``pack_dtype``)
    row_unit: ClassVar[int] = 64
    strided: ClassVar[bool] = True

    @property
    def encoding(self) -> Quantization | None:
        """None for inputs out of order: MLX's groups are consecutive."""
        return None if self.act_order and not self.sorted else super().encoding

    def in_order(self) -> Gptq:
        """The same layer with its inputs moved into the order of their groups."""
        return replace(self, sorted=True)

    def required_rects(self, start: int, stop: int) -> dict[str, Rect]:
        """Columns of words and of scales; a multiple of 32 rows starts a word of zeros."""
        cuts = {
            "qweight": Rect((0, -(-self.columns * self.bits // self.word_bits)), (start, stop)),
            "scales": Rect((0, self.groups), (start, stop)),
        }
        if self.has_zeros:
            words = (start * self.bits // self.word_bits, -(-stop * self.bits // self.word_bits))
            cuts["qzeros"] = Rect((0, self.groups), words)
        if self.act_order:
            cuts["g_idx"] = Rect((0, 1), (0, self.columns))
        return cuts

    def stored_codes(self, start: int, stop: int) -> StoredCodes | None:
        """None for inputs out of order, for planes of zeros, and for streams that are unpacked."""
        if self.act_order or self.word_bits != 32 or self.rows % 32:
            return None
        if self.has_zeros if self.planar else self.bits not in _MLX_STREAM:
            return None
        return StoredCodes(
            words="qweight",
            order=WordOrder.PLANES if self.planar else WordOrder.COLUMNS,
            bits=self.bits,
            scales="scales",
            transposed_scales=True,
            group=self.group,
            zeros="qzeros" if self.has_zeros else "",
            zero_order=ZeroOrder.STREAMS if self.has_zeros else ZeroOrder.MIDDLE,
            word_offset=self._ones if self.stored_zeros is Zeros.WORD_PLUS_ONE else 0,
            code_offset=int(self.stored_zeros is Zeros.PLUS_ONE),
            must_be_middle=self.symmetric,
        )

    @property
    def _ones(self) -> int:
        """A word whose fields are one each."""
        return sum(1 << shift for shift in range(0, 32, self.bits))

    def words(self, parts: Parts, start: int, stop: int, out: Array, scratch: Scratch) -> None:
        """A stream of MLX's own width is only transposed."""
        if self.planar and not self.act_order:
            source = parts["qweight"].view(np.uint32)
            repack.planar_columns_into(source, self.bits, out, out_bits=mlx_bits(self.bits))
        elif self.act_order or self.bits not in _MLX_STREAM:
            codes = self.codes(parts, start, stop, scratch)
            out[:] = native.pack_words(codes, mlx_bits(self.bits))
        elif parts["qweight"].itemsize == 4:
            repack.transpose_into(parts["qweight"].view(np.uint32), out)
        else:
            out[:] = np.ascontiguousarray(parts["qweight"].T).view(np.uint32)

    def codes(self, parts: Parts, start: int, stop: int, scratch: Scratch) -> Array:
        """Codes ``(rows, columns)``; in act-order in the order of the groups."""
        qweight = parts["qweight"]
        if qweight.itemsize == 4:
            words = scratch.take("words", "U32", stop - start, 4 * qweight.shape[0])
            repack.transpose_into(qweight.view(np.uint32), words)
        else:
            words = np.ascontiguousarray(qweight.T)
        codes = (plane_codes if self.planar else stream_codes)(words, self.bits, self.columns)
        if not self.act_order:
            return codes
        return np.take(codes, group_order(parts["g_idx"], self.groups), axis=1)

    def scales(self, parts: Parts, start: int, stop: int) -> Array:
        return parts["scales"].T

    def zeros(self, parts: Parts, start: int, stop: int) -> Array | float:
        if not self.has_zeros:
            return super().zeros(parts, start, stop)
        zeros = stored_zeros(parts["qzeros"], self.bits, stop - start, self)
        return zeros.T.astype(np.float32)

    def decode(self, parts: Parts, start: int, stop: int, out: Array, scratch: Scratch) -> None:
        if not self.act_order or self.sorted:
            super().decode(parts, start, stop, out, scratch)
            return
        in_order = np.empty_like(out)
        super().decode(parts, start, stop, in_order, scratch)
        out[:, group_order(parts["g_idx"], self.groups)] = in_order


def stored_zeros(qzeros: Array, bits: int, count: int, packing: Gptq) -> Array:
    """The zeros ``(groups, count)``, whatever the file stores for them."""
    if packing.stored_zeros is Zeros.WORD_PLUS_ONE:
        qzeros = qzeros.view(np.uint32) + np.uint32(packing._ones)  # modulo 2^32
    fields = (plane_codes if packing.planar else stream_codes)(qzeros, bits, count)
    if packing.stored_zeros is Zeros.PLUS_ONE:
        fields = (fields + np.uint8(1)) & np.uint8((1 << bits) - 1)
    return fields


def group_order(g_idx: Array, groups: int) -> Array:
    """The inputs sorted by group, those of one group in their own order.

    A negative group counts from the end, as GPTQModel reads it.
    """
    return np.argsort(g_idx.reshape(-1).astype(np.int64) % groups, kind="stable")


def plane_codes(words: Array, bits: int, count: int) -> Array:
    """Unpack rows of planar words (GPTQModel's ``gptq_p``) into ``count`` codes a row.

    A block of 32 codes is ``bits`` words, low plane first; a plane of width w holds code
    ``i * (32 / w) + j`` at shift ``w * j`` of its word ``i``.
    """
    rows = words.shape[0]
    padded = -(-words.shape[1] // bits) * bits
    blocks = np.zeros((rows, padded), np.uint32)
    blocks[:, : words.shape[1]] = words.view(np.uint32)
    blocks = blocks.reshape(rows, -1, bits)
    codes = np.zeros((rows, blocks.shape[1], 32), np.uint8)
    first = low = 0
    for width in PLANES[bits]:
        plane = np.ascontiguousarray(blocks[:, :, first : first + width])
        fields = native.unpack_words(plane.reshape(rows, -1), width).reshape(codes.shape)
        codes |= fields << np.uint8(low)
        first, low = first + width, low + width
    return np.ascontiguousarray(codes.reshape(rows, -1)[:, :count])
