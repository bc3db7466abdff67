"""Layouts of torchao: signed bytes, nibbles with zeros in weight units, swizzled scales.

Layout: pytorch/ao torchao/prototype/safetensors and torchao/quantization/quantize_/workflows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np

from requant.packings.base import (
    Array,
    Fidelity,
    IntegerPacking,
    Packing,
    Parts,
    Rect,
    Scratch,
    Triple,
    WrappedPacking,
    affine_into,
    is_narrower,
    rounded,
)
from requant.packings.compressed_tensors import CtPlain

_TILE: Final = (128, 4)  # of a matrix of scales
_TILE_ROWS: Final = 32  # that a tile takes as stored, 16 bytes each


@dataclass(frozen=True)
class TorchaoInteger(CtPlain):
    """Int8Tensor and IntxUnpackedToInt8Tensor: signed bytes, zeros as signed bytes."""


@dataclass(frozen=True)
class TorchaoInt4(IntegerPacking):
    """Int4Tensor: ``w = code * scale + zero_point``, codes -8 to 7, two a byte.

    ``qdata`` int8 ``[out, in / 2]``, the even input in the low nibble; ``scale`` and
    ``zero_point`` floats ``[in / group, out]``.
    """

    strided: ClassVar[bool] = True

    def required_rects(self, start: int, stop: int) -> dict[str, Rect]:
        each = Rect((0, self.groups), (start, stop))
        return {"qdata": Rect((start, stop), (0, self.columns // 2)), "scale": each} | {
            "zero_point": each
        }

    def words(self, parts: Parts, start: int, stop: int, out: Array, scratch: Scratch) -> None:
        np.bitwise_xor(parts["qdata"].view(np.uint32), np.uint32(0x88888888), out=out)

    def codes(self, parts: Parts, start: int, stop: int, scratch: Scratch) -> Array:
        packed = parts["qdata"].view(np.uint8)
        pairs = np.stack([packed & 15, packed >> 4], axis=-1)
        return pairs.reshape(stop - start, self.columns) ^ np.uint8(8)

    def scales(self, parts: Parts, start: int, stop: int) -> Array:
        return parts["scale"].T

    def biases(self, parts: Parts, start: int, stop: int, scales: Array) -> Array:
        """The value of the code that MLX calls 0: ``zero_point - 8 * scale``, float32."""
        offsets = parts["zero_point"].T.astype(np.float32)
        return np.asarray(offsets - np.float32(8) * scales.astype(np.float32), np.float32)

    def decode(self, parts: Parts, start: int, stop: int, out: Array, scratch: Scratch) -> None:
        """``code * scale + zero_point`` in float32, rounded once more."""
        codes = self.codes(parts, start, stop, scratch).astype(np.float32) - np.float32(8)
        affine_into(codes, parts["scale"].T, parts["zero_point"].T, self.group, out)

    def fidelity(self, dtype: str) -> Fidelity:
        what = "scales and biases" if is_narrower(dtype, self.scale_dtype) else "biases"
        return rounded(what, dtype)


@dataclass(frozen=True)
class Swizzled(WrappedPacking):
    """Another packing whose scales are stored in tiles of 128 rows and 4 groups.

    The scale of row ``r`` and group ``c`` is in tile ``(r // 128, c // 4)``, tiles row by row,
    at ``[r % 32, 4 * (r // 32 % 4) + c % 4]`` of its 32 x 16 bytes; the last tiles are padded.
    """

    rows: int
    columns: int
    layer: Packing  # the packing of the same layer with scales row by row
    groups: int  # scales of a row

    @property
    def _tiles_across(self) -> int:
        return -(-self.groups // _TILE[1])

    def stored_bytes(self) -> int:
        """Bytes of all tiles."""
        return -(-self.rows // _TILE[0]) * self._tiles_across * _TILE[0] * _TILE[1]

    def required_rects(self, start: int, stop: int) -> dict[str, Rect]:
        first, last = start // _TILE[0], -(-stop // _TILE[0])
        tiles = Rect((first * _TILE_ROWS, last * _TILE_ROWS), (0, 16 * self._tiles_across))
        return {**self.layer.required_rects(start, stop), "scale": tiles}

    def _in_rows(self, parts: Parts, start: int, stop: int) -> Parts:
        """The parts with scales row by row."""
        stored = parts["scale"]
        tiles = stored.view(np.uint8).reshape(-1, self._tiles_across, _TILE_ROWS, 4, 4)
        rows = np.ascontiguousarray(tiles.transpose(0, 3, 2, 1, 4))
        rows = rows.reshape(-1, self._tiles_across * _TILE[1])
        first = start // _TILE[0] * _TILE[0]
        wanted = np.ascontiguousarray(rows[start - first : stop - first, : self.groups])
        return {**parts, "scale": wanted.view(stored.dtype)}

    def repack(self, parts: Parts, start: int, stop: int, out: Triple, scratch: Scratch) -> None:
        self.layer.repack(self._in_rows(parts, start, stop), start, stop, out, scratch)

    def decode(self, parts: Parts, start: int, stop: int, out: Array, scratch: Scratch) -> None:
        self.layer.decode(self._in_rows(parts, start, stop), start, stop, out, scratch)
