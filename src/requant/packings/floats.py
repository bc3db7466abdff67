"""Float codes as published tools store them: FP8 under any grid of scales, FP4 and FP6 blocks.

Elements are E4M3 bytes, E2M1 nibbles (the low one first, MLX's own order), and E2M3 and E3M2
fields of 6 bits. Where the scales are powers of two over groups of 32 inputs, or E4M3 over 16,
MLX has a mode of the same numbers and bytes are moved; elsewhere values are computed in float32
and rounded once.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import ml_dtypes
import numpy as np

from requant.errors import InvariantError
from requant.kernels import quantize as native
from requant.kernels.decode import e4m3_values_into
from requant.kernels.units import BlockScales
from requant.packings.base import (
    Array,
    Exactness,
    Fidelity,
    MatrixPacking,
    Packing,
    Parts,
    Rect,
    Scratch,
    Triple,
    flat_cut,
)
from requant.quantization.config import Quantization, QuantMode
from requant.text import pluralize_are

MXFP4 = Quantization(32, 4, QuantMode.MXFP4)
MXFP8 = Quantization(32, 8, QuantMode.MXFP8)
NVFP4 = Quantization(16, 4, QuantMode.NVFP4)
_NAN_EXPONENT = 255
_ONE_BYTE = np.arange(256, dtype=np.uint8)
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_E2M1 = np.concatenate([_E2M1, -_E2M1])
_E2M1_PAIRS = np.stack([_E2M1[_ONE_BYTE & 15], _E2M1[_ONE_BYTE >> 4]], axis=1)
_SIX_BITS = np.arange(64, dtype=np.uint8)
# ml_dtypes reads such a field from a byte; float8 of the same value, by field.
_E4M3_OF = {
    name: _SIX_BITS.view(kind).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    for name, kind in (("e2m3", ml_dtypes.float6_e2m3fn), ("e3m2", ml_dtypes.float6_e3m2fn))
}


def exponent_bytes(scales: Array) -> Array | None:
    """Scales as E8M0 bytes, ``2^(byte - 127)``; None if one is not a power of two.

    Args:
        scales: E8M0 (ml_dtypes, or the bytes as uint8), or floats of any width.
    """
    if scales.dtype == np.uint8 or scales.dtype == np.dtype(ml_dtypes.float8_e8m0fnu):
        return scales.view(np.uint8)
    mantissa, exponent = np.frexp(scales.astype(np.float64))
    exponent += 126
    if ((mantissa != 0.5) | (exponent < 0) | (exponent >= _NAN_EXPONENT)).any():
        return None
    return exponent.astype(np.uint8)


def scale_values(scales: Array) -> Array:
    """Scales as float32; uint8 holds E8M0."""
    stored = scales.view(ml_dtypes.float8_e8m0fnu) if scales.dtype == np.uint8 else scales
    return stored.astype(np.float32)


def check_exponents(scales: Array) -> Array:
    """Bytes of E8M0 scales, none of them NaN (which MLX would read as infinity)."""
    found = scales.view(np.uint8)
    bad = int((found == _NAN_EXPONENT).sum())
    if bad:
        raise InvariantError(
            f"{pluralize_are(bad, 'scale byte')} 255, which is NaN in E8M0: the source is damaged"
        )
    return found


def _as_float8(stored: Array) -> Array:
    """Plain bytes, as ``mx.load`` gives FP8, are E4M3."""
    return stored.view(ml_dtypes.float8_e4m3fn) if stored.dtype == np.uint8 else stored


@dataclass(frozen=True)
class Float8(MatrixPacking):
    """FP8 bytes times a scale for each tile of a matrix; the last tile may be cut.

    ``weight`` FP8 ``[..., out, in]``; ``scale``: one number a tile, in the order of the
    matrices, tile rows and tile columns, in whatever shape.
    """

    # rows and columns that share a scale: ``(1, columns)`` for a scale a channel,
    # ``(matrix, columns)`` for one a matrix
    tile: tuple[int, int]
    scale_width: int  # last axis of the stored scales
    # whether every scale is a power of two and MLX's mxfp8 holds the same numbers
    exact: bool = False
    has_byte_rows: ClassVar[bool] = True
    scratch_value_bytes: ClassVar[int] = 0

    @property
    def grid(self) -> tuple[int, int]:
        """Tiles of one matrix, down and across."""
        return -(-self.matrix // self.tile[0]), -(-self.columns // self.tile[1])

    @property
    def fits_mxfp8(self) -> bool:
        """Whether MLX's groups of 32 inputs lie within tiles and fill a row."""
        one = self.grid[1] == 1
        return self.columns % 32 == 0 and (one or self.tile[1] % 32 == 0)

    def _tiles(self, start: int, stop: int) -> tuple[int, int]:
        """The rows of tiles that rows of one matrix need.

        Matrices of 5 rows in tiles of 2 have 3 rows of tiles: row 6 is row 1 of matrix 1, in row 3.
        """
        expert, first = divmod(start, self.matrix)
        last = first + stop - start - 1
        above = expert * self.grid[0]
        return above + first // self.tile[0], above + last // self.tile[0] + 1

    def required_rects(self, start: int, stop: int) -> dict[str, Rect]:
        first, last = self._tiles(start, stop)
        across = self.grid[1]
        return {
            "weight": Rect((start, stop), (0, self.columns)),
            "scale": flat_cut(first * across, last * across, self.scale_width),
        }

    def repack(self, parts: Parts, start: int, stop: int, out: Triple, scratch: Scratch) -> None:
        out["weight"][:] = _as_float8(parts["weight"]).view(np.uint32)
        found = exponent_bytes(parts["scale"])
        if found is None:
            raise InvariantError("its scales are not powers of two any more: the source changed")
        groups = np.arange(self.columns // 32) * 32 // self.tile[1]
        tiles = check_exponents(found).reshape(-1, self.grid[1])
        first = start % self.matrix
        down = np.arange(first, first + stop - start) // self.tile[0]
        out["scales"][:] = tiles[:, groups][down - down[0]]  # counted from the first that was read

    def decode(self, parts: Parts, start: int, stop: int, out: Array, scratch: Scratch) -> None:
        """``byte * scale`` in float32, rounded once."""
        codes, blocks = _as_float8(parts["weight"]), self.block_scales(parts, start)
        # What is not a number is counted where the values are stored or encoded.
        e4m3_values_into(
            codes.view(np.uint8),
            blocks.scales,
            *self.tile,
            out,
            first_row=blocks.first_row,
            fnuz=codes.dtype == np.dtype(ml_dtypes.float8_e4m3fnuz),
        )

    def block_scales(self, parts: Parts, start: int) -> BlockScales:
        scales = scale_values(parts["scale"]).reshape(-1, self.grid[1])
        return BlockScales(scales, *self.tile, start % self.matrix % self.tile[0])


@dataclass(frozen=True)
class _ExponentBlocks(MatrixPacking):
    """Groups of 32 inputs with an E8M0 scale each, in the part ``scale``, as MLX has them too."""

    @property
    def encoding(self) -> Quantization:
        """The mode of MLX that holds every element."""
        return MXFP8

    @abstractmethod
    def _words(self, parts: Parts, rows: int) -> Array:
        """Rows of elements as ``encoding`` stores them, uint32."""

    def repack(self, parts: Parts, start: int, stop: int, out: Triple, scratch: Scratch) -> None:
        out["weight"][:] = self._words(parts, stop - start)
        out["scales"][:] = check_exponents(parts["scale"])

    def decode(self, parts: Parts, start: int, stop: int, out: Array, scratch: Scratch) -> None:
        words, scales = self._words(parts, stop - start), check_exponents(parts["scale"])
        native.dequantize_into(native.QuantizedTensors(words, scales), self.encoding, out)


@dataclass(frozen=True)
class MxBlocks(_ExponentBlocks):
    """Groups of 32 inputs with an E8M0 scale: MLX's mxfp4 or mxfp8, byte for byte.

    ``weight``: bytes, ``[..., in / 2]`` or ``[..., in]``, or cut into blocks along its last
    axis; ``scale``: bytes ``[..., in / 32]``.
    """

    bits: int  # 4 for mxfp4, 8 for mxfp8
    weight_width: int  # bytes in the last axis of the stored weight

    @property
    def encoding(self) -> Quantization:
        return MXFP4 if self.bits == 4 else MXFP8

    def required_rects(self, start: int, stop: int) -> dict[str, Rect]:
        row_bytes = self.columns * self.bits // 8
        return {
            "weight": flat_cut(start * row_bytes, stop * row_bytes, self.weight_width),
            "scale": Rect((start, stop), (0, self.columns // 32)),
        }

    def _words(self, parts: Parts, rows: int) -> Array:
        return parts["weight"].view(np.uint8).reshape(rows, -1).view(np.uint32)


@dataclass(frozen=True)
class NvBlocks(MatrixPacking):
    """E2M1 in groups of 16 inputs with an E4M3 scale, and one float32 scale over a matrix.

    ``weight``: bytes ``[..., in / 2]``; ``scale``: E4M3 ``[..., in / 16]``; ``tensor_scale``:
    one number for all matrices, or one for each; absent where it is 1.
    """

    tensor_scales: int = 0  # numbers in ``tensor_scale``; 0 where there is none
    tensor_scale_width: int = 1  # last axis of the stored ``tensor_scale``
    divides: bool = False  # whether group scales are divided by it, not multiplied
    # whether every group scale times the tensor scale is an E4M3 number again, so that MLX's nvfp4
    # holds the same numbers
    exact: bool = False
    separate: bool = False  # whether ``repack`` leaves the tensor scale to :class:`GlobalScales`

    def required_rects(self, start: int, stop: int) -> dict[str, Rect]:
        cuts = {
            "weight": Rect((start, stop), (0, self.columns // 2)),
            "scale": Rect((start, stop), (0, self.columns // 16)),
        }
        if self.tensor_scales:
            which = start // self.matrix if self.tensor_scales > 1 else 0
            cuts["tensor_scale"] = flat_cut(which, which + 1, self.tensor_scale_width)
        return cuts

    def _scales(self, parts: Parts) -> Array:
        """Group scales with the tensor scale applied, float32."""
        scales = np.asarray(parts["scale"].view(ml_dtypes.float8_e4m3fn), np.float32)
        if not self.tensor_scales:
            return scales
        return apply_tensor_scale(scales, parts["tensor_scale"].reshape(-1)[0], self.divides)

    def repack(self, parts: Parts, start: int, stop: int, out: Triple, scratch: Scratch) -> None:
        out["weight"][:] = parts["weight"].view(np.uint32)
        folds = self.tensor_scales and not self.separate
        folded = fold_e4m3(self._scales(parts)) if folds else parts["scale"]
        if folded is None:
            raise InvariantError("its scales do not fold into E4M3 any more: the source changed")
        out["scales"][:] = folded.view(np.uint8)

    def decode(self, parts: Parts, start: int, stop: int, out: Array, scratch: Scratch) -> None:
        """``element * (group scale * tensor scale)`` in float32, rounded once."""
        values = _E2M1_PAIRS[parts["weight"].view(np.uint8)]
        with np.errstate(over="ignore", invalid="ignore"):
            groups = values.reshape(stop - start, -1, 16) * self._scales(parts)[:, :, None]
        out[:] = groups.reshape(out.shape)

    def fidelity(self, dtype: str) -> Fidelity:
        if not self.separate:
            return super().fidelity(dtype)
        return Fidelity(Exactness.ROUNDED, "tensor scale: 1/8388608 (float32) of itself")


@dataclass(frozen=True)
class GlobalScales(Packing):
    """Tensor scales of NVFP4 in MLX's convention: the greatest magnitude of a matrix.

    MLX computes ``element * group scale * (global_scale / 2688)``, 2688 being the largest
    element (6) times the largest group scale (448). A row is one number.
    """

    rows: int  # numbers in ``tensor_scale``
    width: int  # its last axis as stored
    divides: bool  # whether group scales are divided by it, not multiplied
    columns: int = 1

    holds_codes: ClassVar[bool] = False

    def required_rects(self, start: int, stop: int) -> dict[str, Rect]:
        # Whole rows of the stored tensor: a range that begins inside of one is cut from it.
        rows = start // self.width, -(-stop // self.width)
        return {"tensor_scale": Rect(rows, (0, self.width))}

    def decode(self, parts: Parts, start: int, stop: int, out: Array, scratch: Scratch) -> None:
        """``2688 / scale`` or ``scale * 2688``, in float32."""
        first = start % self.width
        stored = parts["tensor_scale"].reshape(-1)[first : first + stop - start].astype(np.float32)
        largest = np.float32(2688)
        out[:, 0] = largest / stored if self.divides else stored * largest


def apply_tensor_scale(scales: Array, factor: Array, divides: bool) -> Array:
    """Group scales (float32) times a tensor scale, or divided by it; rounded once."""
    factor = factor.astype(np.float32)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        product = scales / factor if divides else scales * factor
    return np.asarray(product, np.float32)


def fold_e4m3(scales: Array) -> Array | None:
    """Float32 scales as E4M3; None if one of them is none."""
    with np.errstate(over="ignore", invalid="ignore"):
        folded = scales.astype(ml_dtypes.float8_e4m3fn)
    return folded if np.array_equal(folded.astype(np.float32), scales) else None


@dataclass(frozen=True)
class Mxfp6Blocks(_ExponentBlocks):
    """E2M3 or E3M2 in groups of 32 inputs with an E8M0 scale: MLX's mxfp8 holds each of them.

    ``weight``: bytes ``[..., 3 in / 4]``, one little-endian stream of 6-bit fields a row;
    ``scale``: bytes ``[..., in / 32]``. E4M3 has the three fraction bits of the one and the range
    of the other, so every element becomes the E4M3 byte of the same value under the same scale.
    """

    element: str = "e2m3"  # "e2m3" or "e3m2"

    def required_rects(self, start: int, stop: int) -> dict[str, Rect]:
        return {
            "weight": Rect((start, stop), (0, self.columns * 3 // 4)),
            "scale": Rect((start, stop), (0, self.columns // 32)),
        }

    def _words(self, parts: Parts, rows: int) -> Array:
        fields = native.unpack_words(parts["weight"].view(np.uint8).view(np.uint32), 6)
        elements: Array = _E4M3_OF[self.element][fields]
        return elements.view(np.uint32)
