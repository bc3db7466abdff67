"""Layouts of AWQ tools for 4-bit layers: gemm, gemv, gemv_fast (llm-awq) and marlin.

Value in all of them: ``w = (code - zero) * scale``. Layouts: casper-hansen/AutoAWQ
awq/modules/linear, mit-han-lab/llm-awq awq/quantize/qmodule.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from requant.kernels import repack
from requant.kernels.unit_repack import StoredCodes, WordOrder, ZeroOrder
from requant.packings.base import (
    EXACT,
    Array,
    Fidelity,
    IntegerPacking,
    Parts,
    Rect,
    Scratch,
    affine_into,
    mlx_bits,
    stream_codes,
)

_PER_WORD = 8


@dataclass(frozen=True)
class AwqGemm(IntegerPacking):
    """Packing "gemm": eight output rows at a time, interleaved.

    ``qweight`` int32 ``[in, out * bits / 32]``, ``qzeros`` likewise ``[groups, ...]``,
    ``scales`` ``[groups, out]``. AutoAWQ writes 4 bits; AutoRound up to 8, as one bit
    stream along the outputs.
    """

    has_zeros: bool = True
    row_unit: ClassVar[int] = 32
    strided: ClassVar[bool] = True

    def required_rects(self, start: int, stop: int) -> dict[str, Rect]:
        words = (start * self.bits // 32, stop * self.bits // 32)
        cuts = {
            "qweight": Rect((0, self.columns), words),
            "scales": Rect((0, self.groups), (start, stop)),
        }
        return cuts | {"qzeros": Rect((0, self.groups), words)} if self.has_zeros else cuts

    def stored_codes(self, start: int, stop: int) -> StoredCodes | None:
        if self.rows % 32:
            return None
        return StoredCodes(
            words="qweight",
            order=WordOrder.STREAMS,
            bits=self.bits,
            interleaved=True,
            scales="scales",
            transposed_scales=True,
            group=self.group,
            zeros="qzeros" if self.has_zeros else "",
            zero_order=ZeroOrder.STREAMS if self.has_zeros else ZeroOrder.MIDDLE,
            must_be_middle=self.symmetric,
        )

    def words(self, parts: Parts, start: int, stop: int, out: Array, scratch: Scratch) -> None:
        """Put the columns in order, transpose, pack: one kernel."""
        source = parts["qweight"].view(np.uint32)
        repack.awq_gemm_into(source, out, self.bits, mlx_bits(self.bits))

    def codes(self, parts: Parts, start: int, stop: int, scratch: Scratch) -> Array:
        codes = scratch.take("codes", "U8", stop - start, self.columns)
        repack.awq_gemm_into(parts["qweight"].view(np.uint32), codes, self.bits)
        return codes

    def scales(self, parts: Parts, start: int, stop: int) -> Array:
        return parts["scales"].T

    def zeros(self, parts: Parts, start: int, stop: int) -> Array | float:
        if not self.has_zeros:
            return super().zeros(parts, start, stop)
        zeros = np.empty((stop - start, self.groups), np.uint8)
        repack.awq_gemm_into(parts["qzeros"].view(np.uint32), zeros, self.bits)
        return zeros.astype(np.float32)


@dataclass(frozen=True)
class AwqGemv(IntegerPacking):
    """Packing "gemv" (llm-awq v1): MLX's words already.

    ``qweight`` int32 ``[out, in / 8]``; ``qzeros`` ``[out, width]`` and ``scales``
    ``[out, 8 * width]`` are padded with zeros to ``gemv_width`` words a row.
    """

    def required_rects(self, start: int, stop: int) -> dict[str, Rect]:
        rows = (start, stop)
        return {
            "qweight": Rect(rows, (0, self.columns // _PER_WORD)),
            "qzeros": Rect(rows, (0, -(-self.groups // _PER_WORD))),
            "scales": Rect(rows, (0, self.groups)),
        }

    def stored_codes(self, start: int, stop: int) -> StoredCodes | None:
        return StoredCodes(
            words="qweight",
            order=WordOrder.ROWS,
            bits=self.bits,
            scales="scales",
            group=self.group,
            zeros="qzeros",
            zero_order=ZeroOrder.ROWS,
            must_be_middle=self.symmetric,
        )

    def words(self, parts: Parts, start: int, stop: int, out: Array, scratch: Scratch) -> None:
        out[:] = parts["qweight"].view(np.uint32)

    def codes(self, parts: Parts, start: int, stop: int, scratch: Scratch) -> Array:
        return stream_codes(parts["qweight"], 4, self.columns)

    def scales(self, parts: Parts, start: int, stop: int) -> Array:
        return parts["scales"]

    def zeros(self, parts: Parts, start: int, stop: int) -> Array | float:
        return stream_codes(parts["qzeros"], 4, self.groups).astype(np.float32)


def gemv_width(groups: int, group: int) -> int | None:
    """Words of zeros in a row of a gemv layer; None where AutoAWQ knows no such group size."""
    multiple = {64: 2, 32: 4}.get(group, 1 if group >= 128 else 0)
    words = -(-groups // _PER_WORD)
    return -(-words // multiple) * multiple if multiple else None


class _FourBits(IntegerPacking):
    """A layout of 4-bit codes that one kernel turns into MLX's words."""

    def codes(self, parts: Parts, start: int, stop: int, scratch: Scratch) -> Array:
        words = scratch.take("code words", "U32", stop - start, self.columns // 2)
        self.words(parts, start, stop, words, scratch)
        codes = scratch.take("codes", "U8", stop - start, self.columns)
        repack.unpack_into(words, self.bits, codes)
        return codes


@dataclass(frozen=True)
class AwqFast(_FourBits):
    """Packing "gemv_fast" (llm-awq v2): four rows interleaved, and MLX's biases as they are.

    ``qweight`` int16 ``[out / 4, in]``; ``scales`` ``[8 * width, out]`` and, of the same
    shape, ``-(scale * zero)`` under the name ``qzeros`` (AutoAWQ) or ``scaled_zeros``.
    """

    bias_role: str = "qzeros"  # the name of the biases
    row_unit: ClassVar[int] = 4

    def required_rects(self, start: int, stop: int) -> dict[str, Rect]:
        groups = Rect((0, self.groups), (start, stop))
        rows = Rect((start // 4, stop // 4), (0, self.columns))
        return {"qweight": rows, "scales": groups, self.bias_role: groups}

    def stored_codes(self, start: int, stop: int) -> StoredCodes | None:
        return StoredCodes(
            words="qweight",
            order=WordOrder.QUADS,
            bits=self.bits,
            scales="scales",
            transposed_scales=True,
            group=self.group,
            zeros=self.bias_role,
            zero_order=ZeroOrder.BIASES,
        )

    def words(self, parts: Parts, start: int, stop: int, out: Array, scratch: Scratch) -> None:
        repack.gemv_fast_into(parts["qweight"].view(np.uint16), out)

    def scales(self, parts: Parts, start: int, stop: int) -> Array:
        return parts["scales"].T

    def biases(self, parts: Parts, start: int, stop: int, scales: Array) -> Array:
        return parts[self.bias_role].T.astype(np.float32)

    def decode(self, parts: Parts, start: int, stop: int, out: Array, scratch: Scratch) -> None:
        """``code * scale + bias`` in float32, rounded once."""
        codes = self.codes(parts, start, stop, scratch)
        affine_into(codes, parts["scales"].T, parts[self.bias_role].T, self.group, out)

    def fidelity(self, dtype: str) -> Fidelity:
        """The biases are stored: only another dtype rounds them."""
        exact = dtype in (self.scale_dtype, "F32")
        return EXACT if exact else super().fidelity(dtype)


@dataclass(frozen=True)
class Marlin(_FourBits):
    """Marlin tiles of AutoAWQ (``qweight``, ``scales``) and AutoGPTQ (``B``, ``s``).

    int32 ``[in / 16, 2 * out]``: 16 inputs by 64 outputs are 128 words; zeros are 8.
    Scales ``[groups, out]`` are permuted within 64 columns, or 32 with one group a row.
    """

    weight_role: str = "qweight"
    scale_role: str = "scales"
    row_unit: ClassVar[int] = 64
    strided: ClassVar[bool] = True

    def required_rects(self, start: int, stop: int) -> dict[str, Rect]:
        return {
            self.weight_role: Rect((0, self.columns // 16), (2 * start, 2 * stop)),
            self.scale_role: Rect((0, self.groups), (start, stop)),
        }

    def words(self, parts: Parts, start: int, stop: int, out: Array, scratch: Scratch) -> None:
        repack.marlin_into(parts[self.weight_role].view(np.uint32), out)

    def scales(self, parts: Parts, start: int, stop: int) -> Array:
        """In the order of the outputs again."""
        stored = parts[self.scale_role]
        if self.groups > 1:
            blocks = stored.reshape(self.groups, -1, 8, 8)
            return blocks.transpose(0, 1, 3, 2).reshape(self.groups, -1).T
        order = (2 * np.arange(4)[:, None] + [0, 1, 8, 9, 16, 17, 24, 25]).reshape(-1)
        found = np.empty_like(stored).reshape(1, -1, 32)
        found[..., order] = stored.reshape(1, -1, 32)
        return found.reshape(1, -1).T
