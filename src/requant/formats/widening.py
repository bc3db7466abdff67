"""Codes moved into more bits or smaller groups, and rows of layers that are stored as MLX's.

``w = code * scale + bias`` stays what it is where the same integers lie in wider fields and
each scale and bias is repeated: 4 bits in groups of 64 are 8 bits in groups of 32. mxfp4
becomes mxfp8 value by value under the same scales: every E2M1 number is an E4M3 number.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import ml_dtypes
import numpy as np

from requant.core.sharing import shared
from requant.formats.base import SourceLayer
from requant.kernels import cast as values
from requant.kernels import quantize as native
from requant.kernels import repack
from requant.kernels.units import MlxCodes
from requant.packings.base import (
    EXACT,
    Array,
    Exactness,
    Fidelity,
    Packing,
    Parts,
    Rect,
    Scratch,
    Triple,
    WrappedPacking,
    is_narrower,
)
from requant.quantization.config import Quantization, QuantMode

# E2M1 codes 0 to 15 as E4M3 bytes; bit 3 is the sign.
_E4M3 = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(ml_dtypes.float8_e4m3fn)
_E4M3_BYTES = _E4M3.view(np.uint8)


@dataclass(frozen=True)
class MlxRows(Packing):
    """Rows of words, scales and biases that are stored as MLX stores them."""

    rows: int
    columns: int
    encoding: Quantization  # of the codes
    # header names of the stored scales and biases; bytes have none
    scale_dtypes: tuple[str, ...] = ()

    def required_rects(self, start: int, stop: int) -> dict[str, Rect]:
        words = self.columns * self.encoding.bits // 32
        groups = (0, self.columns // self.encoding.group_size)
        cuts = {"weight": Rect((start, stop), (0, words)), "scales": Rect((start, stop), groups)}
        if self.encoding.mode.has_biases:
            cuts["biases"] = Rect((start, stop), groups)
        return cuts

    def repack(self, parts: Parts, start: int, stop: int, out: Triple, scratch: Scratch) -> None:
        """The rows as they are; scales and biases rounded to another dtype."""
        for role, rows in out.items():
            if role != "weight" and self.encoding.mode.has_biases:
                values.cast_into(parts[role], rows)
            else:
                rows[:] = parts[role].view(rows.dtype)

    @property
    def row_form(self) -> MlxCodes:
        return MlxCodes(self.encoding, *self.scale_dtypes)

    def decode(self, parts: Parts, start: int, stop: int, out: Array, scratch: Scratch) -> None:
        tensors = native.QuantizedTensors.from_roles(parts)
        native.decode_into(tensors, self.encoding, out)

    def fidelity(self, dtype: str) -> Fidelity:
        """Exact where no scale and no bias rounds."""
        rounds = any(is_narrower(dtype, stored) for stored in self.scale_dtypes)
        return Fidelity(Exactness.ROUNDED) if rounds else EXACT


@dataclass(frozen=True)
class DenseRows(Packing):
    """Rows of plain values, next to rows of codes in one layer."""

    holds_codes: ClassVar[bool] = False

    rows: int
    columns: int

    def required_rects(self, start: int, stop: int) -> dict[str, Rect]:
        return {"weight": Rect((start, stop), (0, self.columns))}

    def decode(self, parts: Parts, start: int, stop: int, out: Array, scratch: Scratch) -> None:
        values.cast_into(parts["weight"], out)


@dataclass(frozen=True)
class Widened(WrappedPacking):
    """The codes of another packing in an encoding that holds them."""

    layer: Packing  # the other packing
    encoding: Quantization  # of the rows that its ``repack`` gives
    target: Quantization  # of the rows that this one gives

    @property
    def rows(self) -> int:  # type: ignore[override]  # a field of other packings
        return self.layer.rows

    @property
    def columns(self) -> int:  # type: ignore[override]
        return self.layer.columns

    @property
    def scratch_row_bytes(self) -> int:
        """The codes, the words before them, and the scales before they are repeated."""
        narrow = self.columns * self.encoding.bits // 8
        groups = self.columns // self.encoding.group_size
        return self.layer.scratch_row_bytes + self.columns + narrow + 8 * groups

    def repack(self, parts: Parts, start: int, stop: int, out: Triple, scratch: Scratch) -> None:
        rows, narrow = stop - start, dict(out)
        if self.encoding.bits != self.target.bits:
            width = self.columns * self.encoding.bits // 8
            narrow["weight"] = scratch.take("narrow weight", "U32", rows, width)
        times = self.encoding.group_size // self.target.group_size
        if times > 1:
            for role in out.keys() - {"weight"}:
                groups, size = out[role].shape[1] // times, out[role].itemsize
                room = scratch.take(f"narrow {role}", "U8", rows, groups * size)
                narrow[role] = room.reshape(-1).view(out[role].dtype).reshape(rows, groups)
        self.layer.repack(parts, start, stop, narrow, scratch)
        if narrow["weight"] is not out["weight"]:
            self._widen(narrow["weight"], out["weight"], scratch)
        for role in out.keys() - {"weight"}:
            if narrow[role] is not out[role]:
                bits = f"u{out[role].itemsize}"  # NumPy copies integers faster than bfloat16
                repeated = out[role].view(bits).reshape(rows, -1, times)
                repeated[:] = narrow[role].view(bits)[:, :, None]

    def _widen(self, words: Array, out: Array, scratch: Scratch) -> None:
        codes = scratch.take("wide codes", "U8", out.shape[0], self.columns)
        repack.unpack_into(words, self.encoding.bits, codes)
        if self.target.mode is QuantMode.AFFINE:
            repack.pack_into(codes, self.target.bits, out)
        else:
            np.take(_E4M3_BYTES, codes, out=out.view(np.uint8), mode="clip")

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": type(self).__name__,
            "packing": self.layer.to_dict(),
            "encoding": self.encoding.to_dict(),
            "target": self.target.to_dict(),
        }


def widened(packing: Packing, encoding: Quantization, target: Quantization) -> Packing:
    """A packing that gives ``target``, of one that gives ``encoding``, which ``target`` holds."""
    if encoding == target:
        return packing
    if isinstance(packing, Widened):
        return widened(packing.layer, packing.encoding, target)
    return Widened(packing, encoding, target)


def stored_rows(layer: SourceLayer) -> Packing:
    """The packing of a layer whose tensors are stored as MLX's, or dense."""
    rows, columns = prod(layer.shape[:-1]), layer.shape[-1]
    if layer.encoding is None:
        return shared(DenseRows(rows, columns))
    roles = ("scales", "biases") if layer.encoding.mode.has_biases else ()
    dtypes = tuple(layer.parts[role].info.dtype for role in roles)
    return shared(MlxRows(rows, columns, layer.encoding, dtypes))
