"""Layouts of HQQ: groups are rows, or columns, of a reshaped weight.

Value: ``w = (code - zero) * scale``; zeros are floats. The weight is seen as a matrix, the
*view*: along axis 1 ``weight.reshape(-1, group)``, a scale a row; along axis 0
``weight.reshape(group, -1)``, a scale a column. Its rows are packed in blocks
(``repack.HQQ``). Layout: mobiusml/hqq hqq/core/quantize.py and bitpack.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np

from requant.core.dtypes import NUMPY_DTYPE
from requant.errors import InvariantError
from requant.kernels.decode import integer_values_into
from requant.kernels.repack import HQQ, RowBlocks
from requant.packings.base import (
    DTYPE_NAME,
    EXACT,
    PRECISION,
    Array,
    Exactness,
    Fidelity,
    IntegerPacking,
    Packing,
    Parts,
    Rect,
    Scratch,
    is_narrower,
    rounded,
)
from requant.packings.row_blocks import NEXT, block_codes, block_cuts
from requant.quantization.config import Quantization

W_Q: Final = "W_q"


def element(packing: str) -> np.dtype:
    """The dtype of the elements of ``W_q``."""
    return np.dtype(np.uint32 if packing == "3bit_32" else np.uint8)


def _check_codes(codes: Array, bits: int) -> None:
    """Hold codes that have a byte each against their width."""
    if bits < 8 and codes.size and int(codes.max()) >> bits:
        raise InvariantError(
            f"its codes reach {int(codes.max())}, but nbits says {bits}: 0 to {(1 << bits) - 1}"
        )


@dataclass(frozen=True)
class HqqRows(IntegerPacking):
    """Axis 1: groups of inputs, the rows of the view.

    ``W_q`` packed view rows; ``scale`` and ``zero`` floats ``[view rows, 1]``. A group that does
    not divide the inputs spans two rows of the weight; such a layer has no encoding.
    """

    packing: str  # HQQ's name of the packing
    packed_width: int  # last axis of ``W_q`` as stored (``view_as_float`` stores it as floats)
    zero_dtype: str  # header name of the stored zeros

    @property
    def encoding(self) -> Quantization | None:
        return None if self.columns % self.group else super().encoding

    @property
    def _blocks(self) -> RowBlocks:
        return HQQ[self.packing]

    @property
    def _view_rows(self) -> int:
        return self.rows * self.columns // self.group

    def _groups_of(self, start: int, stop: int) -> tuple[int, int]:
        """The view rows that rows of the weight lie in."""
        return start * self.columns // self.group, -(-stop * self.columns // self.group)

    def required_rects(self, start: int, stop: int) -> dict[str, Rect]:
        first, last = self._groups_of(start, stop)
        each = Rect((first, last), (0, 1))
        packed = block_cuts(
            W_Q, self._blocks, self._view_rows, start=first, stop=last, width=self.packed_width
        )
        return {**packed, "scale": each, "zero": each}

    def _view(self, parts: Parts, start: int, stop: int, scratch: Scratch) -> Array:
        """Codes of whole groups, uint8 ``(view rows, group)``."""
        first, last = self._groups_of(start, stop)
        dtype = element(self.packing)
        packed = {role: part.view(dtype) for role, part in parts.items() if role.startswith(W_Q)}
        codes = scratch.take("codes", "U8", last - first, self.group)
        block_codes(W_Q, self._blocks, self._view_rows, start=first, parts=packed, out=codes)
        if self._blocks.bits > self.bits:
            _check_codes(codes, self.bits)
        return codes

    def codes(self, parts: Parts, start: int, stop: int, scratch: Scratch) -> Array:
        view = self._view(parts, start, stop, scratch).reshape(-1)
        skipped = start * self.columns % self.group
        count = (stop - start) * self.columns
        return view[skipped : skipped + count].reshape(stop - start, self.columns)

    def scales(self, parts: Parts, start: int, stop: int) -> Array:
        return parts["scale"].reshape(stop - start, -1)

    def zeros(self, parts: Parts, start: int, stop: int) -> Array | float:
        return parts["zero"].reshape(stop - start, -1).astype(np.float32)

    def decode(self, parts: Parts, start: int, stop: int, out: Array, scratch: Scratch) -> None:
        codes = self._view(parts, start, stop, scratch)
        scales, zeros = (
            np.ascontiguousarray(parts[role].reshape(-1, 1), np.float32)
            for role in ("scale", "zero")
        )
        if out.size == codes.size:
            integer_values_into(codes, scales, zeros, self.group, out.reshape(-1, self.group))
            return
        values = np.empty(codes.shape, out.dtype)
        integer_values_into(codes, scales, zeros, self.group, values)
        skipped = start * self.columns % self.group
        out[:] = values.reshape(-1)[skipped : skipped + out.size].reshape(out.shape)

    def fidelity(self, dtype: str) -> Fidelity:
        """A bias is a product of two floats: rounded unless both fit ``dtype`` together."""
        relative, middle = 2.0 ** -PRECISION[dtype], 1 << (self.bits - 1)
        steps = (
            f"biases by at most {relative:.2g} of themselves, {relative * middle:.2g} steps for a "
            f"zero of {middle}"
        )
        if is_narrower(dtype, self.scale_dtype):
            return rounded("scales", dtype, f"; then {steps}")
        wanted = PRECISION.get(self.scale_dtype, 53) + PRECISION.get(self.zero_dtype, 53)
        if wanted <= PRECISION[dtype]:
            return EXACT
        return Fidelity(Exactness.ROUNDED, f"rounded to {DTYPE_NAME[dtype]}: {steps}")


class _Piece(NamedTuple):
    """A run of values that lie in one row of the view, and the cut that holds them."""

    ending: str  # of the roles
    row: int  # of the view
    left: int
    right: int
    rows: tuple[int, int]  # of packed rows
    columns: tuple[int, int]  # of the view


@dataclass(frozen=True)
class HqqColumns(Packing):
    """Axis 0: a group is a column of the view, so that scales vary from input to input.

    ``W_q`` packed view rows of ``rows * columns / group`` codes; ``scale`` and ``zero`` floats
    ``[1, rows * columns / group]``.
    """

    rows: int
    columns: int
    bits: int  # bits of a code
    group: int  # rows of the view: values with one scale
    packing: str  # HQQ's name of the packing
    stored_dtype: str  # header name of the dtype of ``W_q``

    @property
    def _width(self) -> int:
        return self.rows * self.columns // self.group

    @property
    def matrix_rows(self) -> int:
        """Output rows in a row of the view, so that a range seldom lies in two."""
        return self._width // self.columns or self.rows

    def _segments(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """Row and columns of the view, for each run of values in one row of it.

        Row 1 of 6 inputs in a view of 4 columns, values 6 to 12: ``[(1, 2, 4), (2, 0, 4)]``.
        """
        found, at, end = [], start * self.columns, stop * self.columns
        while at < end:
            row, left = divmod(at, self._width)
            right = min(left + end - at, self._width)
            found.append((row, left, right))
            at += right - left
        return found

    def _cut_columns(self, left: int, right: int) -> tuple[int, int]:
        """Columns of the view in elements of ``W_q`` as stored, rounded outward."""
        size = element(self.packing).itemsize
        stored = NUMPY_DTYPE[self.stored_dtype].itemsize
        return left * size // stored, -(-right * size // stored)

    def _pieces(self, start: int, stop: int) -> Iterator[_Piece]:
        """The segments, each in a cut of its own where there are no more than two."""
        segments = self._segments(start, stop)
        block, width = HQQ[self.packing].block(self.group), self._width
        # Neighbours from two rows: the end of the first lies right of the second.
        alone = len(segments) == 1 or (len(segments) == 2 and segments[1][2] <= segments[0][1])
        for number, (row, left, right) in enumerate(segments):
            packed = row % block
            if alone:
                ending, rows, columns = NEXT * number, (packed, packed + 1), (left, right)
            else:
                ending, rows, columns = "", (0, block), (0, width)
            yield _Piece(ending, row, left, right, rows=rows, columns=columns)

    def required_rects(self, start: int, stop: int) -> dict[str, Rect]:
        found = {}
        for piece in self._pieces(start, stop):
            found[f"{W_Q}{piece.ending}"] = Rect(piece.rows, self._cut_columns(*piece.columns))
            for role in ("scale", "zero"):
                found[f"{role}{piece.ending}"] = Rect((0, 1), piece.columns)
        return found

    def _codes(self, cut: Array, piece: _Piece) -> Array:
        """The codes of a segment, uint8 ``(1, n)``."""
        dtype, blocks = element(self.packing), HQQ[self.packing]
        block = blocks.block(self.group)
        held = cut[piece.row % block - piece.rows[0]].view(np.uint8)
        first = self._cut_columns(*piece.columns)[0] * cut.itemsize
        stored = np.ascontiguousarray(
            held[piece.left * dtype.itemsize - first : piece.right * dtype.itemsize - first]
        )
        fields = stored.view(dtype) >> blocks.shifts[piece.row // block]
        codes = (fields & ((1 << blocks.bits) - 1)).astype(np.uint8)
        if blocks.bits > self.bits:
            _check_codes(codes, self.bits)
        return codes.reshape(1, -1)

    def decode(self, parts: Parts, start: int, stop: int, out: Array, scratch: Scratch) -> None:
        """``(code - zero) * scale`` in float32, rounded once."""
        values, at = out.reshape(1, -1), 0
        for piece in self._pieces(start, stop):
            here = slice(piece.left - piece.columns[0], piece.right - piece.columns[0])
            scales, zeros = (
                np.ascontiguousarray(parts[f"{role}{piece.ending}"][:, here], np.float32)
                for role in ("scale", "zero")
            )
            codes = self._codes(parts[f"{W_Q}{piece.ending}"], piece)
            integer_values_into(codes, scales, zeros, 1, values[:, at : at + codes.size])
            at += codes.size
