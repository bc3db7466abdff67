"""Tensors of a GGUF file, made from MLX's words, scales and biases, or from values.

A packing here is only written; ``formats.gguf`` reads the same blocks. Every block has 32 values
of a row, and its nibbles are in the order of ggml: byte ``j`` of 16 has value ``j`` in its low bits
and value ``j + 16`` in its high ones.

| type | bytes of a block | value |
|---|---|---|
| Q4_0 | float16 ``d``, 16 bytes of nibbles | ``(q - 8) * d`` |
| Q4_1 | float16 ``d`` and ``m``, 16 bytes of nibbles | ``q * d + m`` |
| Q5_0 | ``d``, 4 bytes with bit 4 of each value, 16 bytes of nibbles | ``(q - 16) * d`` |
| Q5_1 | ``d``, ``m``, 4 bytes with bit 4, 16 bytes of nibbles | ``q * d + m`` |
| Q8_0 | ``d``, 32 int8 | ``q * d`` |
| MXFP4 | E8M0 byte, 16 bytes of nibbles | E2M1 times the scale |

Reference: ggml-org/llama.cpp ggml/src/ggml-common.h, ggml-quants.c.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm
from typing import ClassVar

import numpy as np

from requant.errors import InvariantError
from requant.kernels import cast as values
from requant.kernels import quantize as native
from requant.kernels.gguf import BY_NAME, TYPES, BlockType, values_into
from requant.packings.base import Array, Packing, Parts, Rect, Scratch, Triple, WrappedPacking
from requant.packings.coded_matrix import ExportError
from requant.packings.exported import ByOutputs, Written
from requant.packings.zero_points import integer_zeros
from requant.quantization.config import QuantMode

BLOCK = 32
_MIDDLES = {"Q4_0": 8, "Q5_0": 16, "Q8_0": 0}  # the q of a value 0
_NAN_EXPONENT = 255


def in_pairs(rows: Array, heads: int) -> Array:
    """Rows ``(heads * head_dim, n)`` in llama.cpp's order: halves of a head become neighbours.

    Example:
        A head of 4 rows 0, 1, 2, 3 becomes 0, 2, 1, 3.
    """
    halves = rows.reshape(heads, 2, -1, rows.shape[-1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)


@dataclass(frozen=True)
class BlockRows(ByOutputs):
    """Rows of blocks that hold the codes of a layer as they are; a stack's matrices are rows too.

    Of a type without ``m`` codes are moved so that the zero point of a group is the middle.
    """

    type_number: int  # as files write it
    matrix_height: int  # rows of each matrix
    head: int = 1  # rows of a head whose halves become neighbours; 1 where none do

    _roles: ClassVar[tuple[str, ...]] = ("weight", "scales", "biases")

    @property
    def kind(self) -> BlockType:
        """The type of the blocks."""
        return TYPES[self.type_number]

    @property
    def columns(self) -> int:  # type: ignore[override]
        return self.matrix.in_features

    @property
    def matrix_rows(self) -> int:
        return self.matrix_height

    @property
    def row_unit(self) -> int:  # type: ignore[override]
        return lcm(self.matrix.row_unit, self.head)

    def required_rects(self, start: int, stop: int) -> dict[str, Rect]:
        has_biases = self.matrix.encoding.mode.has_biases
        roles = self._roles if has_biases else self._roles[:2]
        return self.matrix.rects(self._window(start, stop), *roles)

    def repack(self, parts: Parts, start: int, stop: int, out: Triple, scratch: Scratch) -> None:
        """Fill ``out["weight"]``, uint8 ``(rows, in / 32 * bytes of a block)``."""
        made = self.matrix.triple(parts, self._window(start, stop), scratch)
        if self.head > 1:
            heads = (stop - start) // self.head
            made = {role: in_pairs(np.asarray(x), heads) for role, x in made.items()}
        words = np.ascontiguousarray(made["weight"]).view(np.uint32)
        codes = native.unpack_words(words, self.matrix.encoding.bits)
        blocks = out["weight"].view(_FIELDS[self.kind.name])
        if self.matrix.encoding.mode is QuantMode.MXFP4:
            scales = made["scales"].view(np.uint8)
            if (scales == _NAN_EXPONENT).any():
                raise InvariantError("a scale byte is 255, which is NaN: the source is damaged")
            blocks["e"] = scales
            _set_nibbles(blocks, codes)
            return
        self._affine(codes, made["scales"], made["biases"], blocks)

    def _affine(self, codes: Array, scales: Array, biases: Array, blocks: Array) -> None:
        name, times = self.kind.name, blocks.shape[1] // scales.shape[1]
        blocks["d"] = _halves(scales, times)
        if name in _MIDDLES:
            moved = np.repeat(_MIDDLES[name] - integer_zeros(scales, biases), times, axis=1)
            if moved.any():  # modulo 256, as bytes of either sign are added
                grouped = codes.reshape(*blocks.shape, BLOCK)
                grouped += moved.astype(np.int16).astype(np.uint8)[:, :, None]
        else:
            blocks["m"] = _halves(biases, times)
        if name == "Q8_0":
            blocks["q"] = codes.reshape(*blocks.shape, BLOCK)
            return
        if name.startswith("Q5"):
            high = np.packbits((codes >> 4).reshape(-1), bitorder="little")
            blocks["high"] = high.view("<u4").reshape(blocks.shape)
            codes &= 15
        _set_nibbles(blocks, codes)


_NIBBLES = [("first", "<u8"), ("last", "<u8")]
_FIELDS = {  # the parts of a block
    "Q4_0": np.dtype([("d", "<f2"), *_NIBBLES]),
    "Q4_1": np.dtype([("d", "<f2"), ("m", "<f2"), *_NIBBLES]),
    "Q5_0": np.dtype([("d", "<f2"), ("high", "<u4"), *_NIBBLES]),
    "Q5_1": np.dtype([("d", "<f2"), ("m", "<f2"), ("high", "<u4"), *_NIBBLES]),
    "Q8_0": np.dtype([("d", "<f2"), ("q", "u1", (BLOCK,))]),
    "MXFP4": np.dtype([("e", "u1"), *_NIBBLES]),
}


def _set_nibbles(blocks: Array, codes: Array) -> None:
    """Fill the nibbles of blocks with codes of 4 bits, one a byte; eight bytes are one number."""
    eights = codes.view("<u8").reshape(*blocks.shape, 4)
    blocks["first"] = eights[:, :, 0] | eights[:, :, 2] << np.uint64(4)
    blocks["last"] = eights[:, :, 1] | eights[:, :, 3] << np.uint64(4)


def _halves(numbers: Array, times: int) -> Array:
    """Numbers as float16, each ``times`` times."""
    with np.errstate(over="ignore"):
        halves = numbers.astype(np.float32).astype("<f2")
    if not np.isfinite(halves).all():
        raise InvariantError("a scale or bias is out of range: the source was changed meanwhile")
    return np.repeat(halves, times, axis=1)


@dataclass(frozen=True)
class _OfRows(WrappedPacking, Written):
    """Rows of values of another packing; of whole heads where halves become neighbours."""

    scratch_value_bytes: ClassVar[int] = 16  # of a value: float32, and its places

    layer: Packing  # gives the values
    head: int = 1

    @property
    def rows(self) -> int:  # type: ignore[override]
        return self.layer.rows

    @property
    def columns(self) -> int:  # type: ignore[override]
        return self.layer.columns

    @property
    def row_unit(self) -> int:  # type: ignore[override]
        return lcm(self.layer.row_unit, self.head)

    @property
    def scratch_row_bytes(self) -> int:
        return self.layer.scratch_row_bytes + self.layer.scratch_value_bytes * self.columns

    def values(self, parts: Parts, start: int, stop: int, scratch: Scratch) -> Array:
        """Values in float32."""
        wide = scratch.take("values", "F32", stop - start, 4 * self.columns)
        self.layer.decode(parts, start, stop, wide, scratch)
        return wide if self.head == 1 else in_pairs(wide, (stop - start) // self.head)


@dataclass(frozen=True)
class ValueRows(_OfRows):
    """Rows of plain numbers."""

    shift: bool = False  # whether one is added, in float32
    vector_heads: int = 0  # heads to which the values of a vector belong, in llama.cpp's order

    def repack(self, parts: Parts, start: int, stop: int, out: Triple, scratch: Scratch) -> None:
        """Fill ``out["weight"]`` with the values, rounded once."""
        wide = self.values(parts, start, stop, scratch)
        if self.shift:
            wide += np.float32(1)
        if self.vector_heads:
            wide = in_pairs(wide.reshape(-1, 1), self.vector_heads).reshape(wide.shape)
        values.cast_into(wide, out["weight"])


@dataclass(frozen=True)
class EncodedRows(_OfRows):
    """Values encoded again as Q8_0: ``d`` is the largest magnitude of a block over 127."""

    def repack(self, parts: Parts, start: int, stop: int, out: Triple, scratch: Scratch) -> None:
        """Fill ``out["weight"]`` with blocks."""
        wide = self.values(parts, start, stop, scratch).reshape(stop - start, -1, BLOCK)
        out["weight"][:] = encoded(wide).reshape(stop - start, -1)

    def error(self, parts: Parts, start: int, stop: int, scratch: Scratch) -> ExportError:
        wide = self.values(parts, start, stop, scratch)
        blocks = encoded(wide.reshape(stop - start, -1, BLOCK)).reshape(stop - start, -1)
        found = np.empty(wide.shape, np.float32)
        values_into(BY_NAME["Q8_0"], blocks, found)
        found -= wide
        error, size = (float(np.einsum("ij,ij->", x, x, dtype=np.float64)) for x in (found, wide))
        return ExportError(error, size, 0)


def encoded(rows: Array) -> Array:
    """Blocks of Q8_0, uint8 ``(rows, blocks, 34)``, of values float32 ``(rows, blocks, 32)``.

    ``d`` is rounded to float16, and ``q`` is computed with ``d`` before that, as ggml does.
    """
    largest = np.abs(rows).max(axis=2, keepdims=True)
    step = largest / np.float32(127)
    inverse = np.divide(np.float32(1), step, out=np.zeros_like(step), where=step != 0)
    with np.errstate(over="ignore"):
        halves = step.astype("<f2")
    if not np.isfinite(halves).all():
        raise InvariantError("a block has values beyond the range of Q8_0, whose scale is float16")
    scaled = rows * inverse
    # Half away from zero, as roundf.
    codes = np.trunc(scaled + np.copysign(np.float32(0.5), scaled)).astype(np.int8)
    return np.concatenate([halves.view(np.uint8), codes.view(np.uint8)], axis=2)


@dataclass(frozen=True)
class Constant(Written):
    """A vector of float32 that is known while the output is planned; it needs no data."""

    numbers: tuple[float, ...]
    rows: int = 1

    @property
    def columns(self) -> int:  # type: ignore[override]
        return len(self.numbers)

    def required_rects(self, start: int, stop: int) -> dict[str, Rect]:
        return {}

    def repack(self, parts: Parts, start: int, stop: int, out: Triple, scratch: Scratch) -> None:
        """Fill ``out["weight"]`` with the numbers."""
        out["weight"][:] = np.array(self.numbers, np.float32)
