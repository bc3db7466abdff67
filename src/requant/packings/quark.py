"""Layouts of AMD Quark for integers and older MX layers (quark/torch/export).

``w = (code - zero) * scale``. Int codes are two's complement; here half of their range is added
to code and zero, so that none is negative. Eight codes of 4 bits are a word, in order or in
AWQ's order (``pack_method: reorder``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from requant.kernels import quantize as native
from requant.kernels import repack
from requant.packings.base import (
    Array,
    IntegerPacking,
    Packing,
    Parts,
    Rect,
    Scratch,
    Triple,
    stream_codes,
)
from requant.packings.floats import MXFP4, check_exponents
from requant.quantization.config import Quantization


@dataclass(frozen=True)
class _QuarkInteger(IntegerPacking):
    """The fields that both orientations have in common."""

    signed: bool  # whether codes and zeros are two's complement
    reordered: bool  # whether the codes of a word are in AWQ's order
    has_zeros: bool  # whether there is a ``weight_zero_point``

    @property
    def _half(self) -> np.uint8:
        """The number that is added to a signed code; adding it flips the highest bit."""
        return np.uint8(1 << (self.bits - 1) if self.signed else 0)


@dataclass(frozen=True)
class QuarkColumns(_QuarkInteger):
    """per_group: ``weight`` ``[in, out]``, packed along the outputs; scales ``[groups, out]``.

    4 bits: int32 ``[in, out / 8]``, zeros ``[groups, out / 8]``; 8 bits: a byte a code.
    """

    row_unit: ClassVar[int] = 8
    strided: ClassVar[bool] = True

    def required_rects(self, start: int, stop: int) -> dict[str, Rect]:
        words = (start, stop) if self.bits == 8 else (start // 8, stop // 8)
        cuts = {
            "weight": Rect((0, self.columns), words),
            "weight_scale": Rect((0, self.groups), (start, stop)),
        }
        if self.has_zeros:
            cuts["weight_zero_point"] = Rect((0, self.groups), words)
        return cuts

    def _transposed(self, stored: Array, out: Array) -> None:
        """Fill ``out`` with the codes of rows of outputs, uint8, or 4 bits each in uint32."""
        if self.bits == 8:
            repack.transpose_into(stored.view(np.uint8), out)
            out ^= self._half
        else:
            reordered, words = self.reordered, stored.view(np.uint32)
            repack.stream_columns_into(words, 4, out, interleaved=reordered, signed=self.signed)

    def words(self, parts: Parts, start: int, stop: int, out: Array, scratch: Scratch) -> None:
        self._transposed(parts["weight"], out.view(np.uint8) if self.bits == 8 else out)

    def codes(self, parts: Parts, start: int, stop: int, scratch: Scratch) -> Array:
        codes = scratch.take("codes", "U8", stop - start, self.columns)
        self._transposed(parts["weight"], codes)
        return codes

    def scales(self, parts: Parts, start: int, stop: int) -> Array:
        return parts["weight_scale"].T

    def zeros(self, parts: Parts, start: int, stop: int) -> Array | float:
        if not self.has_zeros:
            return super().zeros(parts, start, stop)
        codes = np.empty((stop - start, self.groups), np.uint8)
        self._transposed(parts["weight_zero_point"], codes)
        return codes.astype(np.float32)


@dataclass(frozen=True)
class QuarkRows(_QuarkInteger):
    """per_channel and per_tensor: ``weight`` ``[out, in]``, packed along the inputs."""

    one_scale: bool  # whether one scale (and zero) serves the whole tensor; else a vector

    def required_rects(self, start: int, stop: int) -> dict[str, Rect]:
        width = self.columns if self.bits == 8 else self.columns // 8
        each = Rect((0, 1), (0, 1) if self.one_scale else (start, stop))
        cuts = {"weight": Rect((start, stop), (0, width)), "weight_scale": each}
        return cuts | ({"weight_zero_point": each} if self.has_zeros else {})

    def words(self, parts: Parts, start: int, stop: int, out: Array, scratch: Scratch) -> None:
        stored = parts["weight"].view(np.uint32)
        if self.reordered and self.bits == 4:
            repack.deinterleave_into(stored, out)
        else:
            out[:] = stored
        out ^= np.uint32(int(self._half) * (0x01010101 if self.bits == 8 else 0x11111111))

    def codes(self, parts: Parts, start: int, stop: int, scratch: Scratch) -> Array:
        if self.bits == 8:  # a row may end within a word
            return parts["weight"].view(np.uint8) ^ self._half
        words = np.empty(parts["weight"].shape, np.uint32)
        self.words(parts, start, stop, words, scratch)
        return stream_codes(words, 4, self.columns)

    def _each_row(self, array: Array, start: int, stop: int) -> Array:
        return np.broadcast_to(array.reshape(-1, 1), (stop - start, 1))

    def scales(self, parts: Parts, start: int, stop: int) -> Array:
        return self._each_row(parts["weight_scale"], start, stop)

    def zeros(self, parts: Parts, start: int, stop: int) -> Array | float:
        if not self.has_zeros:
            return super().zeros(parts, start, stop)
        codes = parts["weight_zero_point"].astype(np.int32) + int(self._half)
        return self._each_row(codes.astype(np.float32), start, stop)


@dataclass(frozen=True)
class QuarkMx(Packing):
    """The older ``mx``: ``weight`` uint8 ``[out, 17 * in / 32]``.

    For 32 inputs the exponent, a signed byte, then 16 bytes of E2M1, low nibble first.
    """

    rows: int
    columns: int

    encoding: ClassVar[Quantization] = MXFP4

    def required_rects(self, start: int, stop: int) -> dict[str, Rect]:
        return {"weight": Rect((start, stop), (0, self.columns // 32 * 17))}

    def repack(self, parts: Parts, start: int, stop: int, out: Triple, scratch: Scratch) -> None:
        repack.mx_blocks_into(parts["weight"].view(np.uint8), out["weight"], out["scales"])
        check_exponents(out["scales"])

    def decode(self, parts: Parts, start: int, stop: int, out: Array, scratch: Scratch) -> None:
        words = np.empty((stop - start, self.columns // 8), np.uint32)
        scales = np.empty((stop - start, self.columns // 32), np.uint8)
        self.repack(parts, start, stop, {"weight": words, "scales": scales}, scratch)
        native.dequantize_into(native.QuantizedTensors(words, scales), MXFP4, out)
