"""Integer codes as compressed-tensors stores them.

``w = (code - zero) * scale``. Packed codes are offset by ``2^(bits - 1)`` so that none is
negative; since version 0.18 a row is one little-endian bit stream, MLX's own order, before it
a word held as many whole codes as fit. Zero points are packed the same way, along the rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from requant.errors import InvariantError
from requant.kernels.unit_repack import StoredCodes, WordOrder, ZeroOrder
from requant.packings.base import (
    Array,
    IntegerPacking,
    Parts,
    Rect,
    Scratch,
    flat_cut,
    mlx_bits,
    stream_codes,
)
from requant.quantization.config import Quantization
from requant.text import format_range


class Zeros(StrEnum):
    """The place of the zero points of a layer."""

    MIDDLE = "middle"  # none stored: every zero is the middle of the codes
    PACKED = "packed"  # int32 words along the rows, offset like the codes
    SIGNED = "signed"  # int8, one each a scale (up to version 0.9.3, and for int8 codes)


def packed_words(count: int, bits: int, padded: bool) -> int:
    """Words that hold ``count`` codes."""
    return -(-count // (32 // bits)) if padded else -(-count * bits // 32)


@dataclass(frozen=True)
class _CtInteger(IntegerPacking):
    """The scales and zeros that packed and plain codes have in common.

    ``weight_scale`` ``[..., out, groups]``, or a number for each row, matrix or run of rows.
    """

    matrix: int  # output rows of one matrix
    scale_rows: int  # rows that share their scales (and zeros): 1, those of a matrix, or all
    scale_width: int  # last axis of the stored scales
    zero_points: Zeros  # where the zeros are

    @property
    def matrix_rows(self) -> int:
        return self.matrix

    def _scale_cut(self, start: int, stop: int) -> Rect:
        first, last = start // self.scale_rows, -(-stop // self.scale_rows)
        return flat_cut(first * self.groups, last * self.groups, self.scale_width)

    def required_rects(self, start: int, stop: int) -> dict[str, Rect]:
        cuts = {"weight_scale": self._scale_cut(start, stop)}
        if self.zero_points is Zeros.SIGNED:
            cuts["weight_zero_point"] = self._scale_cut(start, stop)
        return cuts

    def _each_row(self, array: Array, start: int, stop: int) -> Array:
        rows = array.reshape(-1, self.groups)
        if self.scale_rows == 1:
            return rows
        return rows[np.arange(start, stop) // self.scale_rows - start // self.scale_rows]

    def scales(self, parts: Parts, start: int, stop: int) -> Array:
        return self._each_row(parts["weight_scale"], start, stop)

    def zeros(self, parts: Parts, start: int, stop: int) -> Array | float:
        if self.zero_points is Zeros.MIDDLE:
            return super().zeros(parts, start, stop)
        signed = parts["weight_zero_point"].astype(np.float32)
        return self._each_row(signed + np.float32(1 << (self.bits - 1)), start, stop)


@dataclass(frozen=True)
class CtPacked(_CtInteger):
    """``pack-quantized``: ``weight_packed`` int32 ``[..., out, words]``."""

    padded: bool  # whether a word holds whole codes only (before version 0.18)

    def _zero_rows(self, start: int, stop: int) -> tuple[int, int]:
        """The words along the rows that hold the zeros of these rows of one matrix."""
        if self.padded:
            per_word = 32 // self.bits
            return start // per_word, -(-stop // per_word)
        first = start // 32 * self.bits  # 32 codes end with a word, whatever their width
        return first, -(-stop * self.bits // 32)

    def required_rects(self, start: int, stop: int) -> dict[str, Rect]:
        cuts = {**super().required_rects(start, stop)}
        words = packed_words(self.columns, self.bits, self.padded)
        cuts["weight_packed"] = Rect((start, stop), (0, words))
        if self.zero_points is Zeros.PACKED:
            expert, within = divmod(start, self.matrix)
            first, last = self._zero_rows(within, within + stop - start)
            above = expert * packed_words(self.matrix, self.bits, self.padded)
            cuts["weight_zero_point"] = Rect((above + first, above + last), (0, self.groups))
        return cuts

    def _unpacked(self, words: Array, count: int) -> Array:
        """``count`` codes of each row of words."""
        if not self.padded:
            return stream_codes(words, self.bits, count)
        per_word = 32 // self.bits
        shifts = np.arange(per_word, dtype=np.uint32) * np.uint32(self.bits)
        codes = (words.view(np.uint32)[:, :, None] >> shifts) & np.uint32((1 << self.bits) - 1)
        return codes.reshape(words.shape[0], -1)[:, :count].astype(np.uint8)

    def stored_codes(self, start: int, stop: int) -> StoredCodes | None:
        """None where rows share scales, or zeros are bytes."""
        if self.scale_width != self.groups or self.scale_rows != 1:
            return None
        if self.zero_points is Zeros.SIGNED:
            return None
        is_packed = self.zero_points is Zeros.PACKED
        return StoredCodes(
            words="weight_packed",
            order=WordOrder.ROWS,
            bits=self.bits,
            padded=self.padded,
            scales="weight_scale",
            group=self.group,
            zeros="weight_zero_point" if is_packed else "",
            zero_order=ZeroOrder.COLUMNS if is_packed else ZeroOrder.MIDDLE,
            skipped_zeros=self._skipped_zeros(start) if is_packed else 0,
            must_be_middle=self.symmetric and is_packed,
        )

    def _skipped_zeros(self, start: int) -> int:
        """Zeros in the first word, or block of 32, that lie before that of a row."""
        return start % self.matrix % (32 // self.bits if self.padded else 32)

    def words(self, parts: Parts, start: int, stop: int, out: Array, scratch: Scratch) -> None:
        if not self.padded and mlx_bits(self.bits) == self.bits:
            out[:] = parts["weight_packed"].view(np.uint32)
        else:
            super().words(parts, start, stop, out, scratch)

    def codes(self, parts: Parts, start: int, stop: int, scratch: Scratch) -> Array:
        return np.ascontiguousarray(self._unpacked(parts["weight_packed"], self.columns))

    def zeros(self, parts: Parts, start: int, stop: int) -> Array | float:
        if self.zero_points is not Zeros.PACKED:
            return super().zeros(parts, start, stop)
        words = np.ascontiguousarray(parts["weight_zero_point"].T)
        skipped = self._skipped_zeros(start)
        zeros = self._unpacked(words, skipped + stop - start)[:, skipped:]
        return zeros.T.astype(np.float32)


@dataclass(frozen=True)
class CtActOrder(CtPacked):
    """The same with inputs that take their scale from any group.

    ``weight_g_idx`` int32 ``[in]``, or ``[experts, in]``: the group of each input.
    """

    index_of_each: bool = False  # whether each expert has an order of its own

    @property
    def encoding(self) -> Quantization | None:
        """None: a group of MLX's is a run of inputs."""
        return None

    def required_rects(self, start: int, stop: int) -> dict[str, Rect]:
        which = start // self.matrix if self.index_of_each else 0
        index = Rect((which, which + 1), (0, self.columns))
        return {**super().required_rects(start, stop), "weight_g_idx": index}

    def stored_codes(self, start: int, stop: int) -> None:
        """None, as for ``encoding``."""

    def decode(self, parts: Parts, start: int, stop: int, out: Array, scratch: Scratch) -> None:
        of = parts["weight_g_idx"].reshape(-1)
        scales = np.asarray(self.scales(parts, start, stop), np.float32)
        zeros = np.asarray(self.zeros(parts, start, stop), np.float32)
        zeros = np.broadcast_to(zeros, scales.shape)
        codes = self.codes(parts, start, stop, scratch)
        with np.errstate(over="ignore"):
            out[:] = (codes - zeros[:, of]) * scales[:, of]


@dataclass(frozen=True)
class CtPlain(_CtInteger):
    """``int-quantized``: ``weight`` int8 ``[..., out, in]``, signed codes of up to 8 bits."""

    def required_rects(self, start: int, stop: int) -> dict[str, Rect]:
        return {
            **super().required_rects(start, stop),
            "weight": Rect((start, stop), (0, self.columns)),
        }

    def words(self, parts: Parts, start: int, stop: int, out: Array, scratch: Scratch) -> None:
        if self.bits == 8:
            np.bitwise_xor(parts["weight"].view(np.uint32), np.uint32(0x80808080), out=out)
        else:
            super().words(parts, start, stop, out, scratch)

    def codes(self, parts: Parts, start: int, stop: int, scratch: Scratch) -> Array:
        middle = np.uint8(1 << (self.bits - 1))
        codes = parts["weight"].view(np.uint8) + middle  # modulo 256
        if self.bits < 8 and (codes >> self.bits).any():
            low, high = int(parts["weight"].min()), int(parts["weight"].max())
            raise InvariantError(
                f"its codes are {format_range(low, high)}, but the config says {self.bits} bits: "
                f"{-int(middle)} to {int(middle) - 1}"
            )
        return np.asarray(codes)
