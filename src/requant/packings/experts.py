"""The rows of a stack of experts, each expert's by the packing of one matrix.

Also where matrices are stored with their axes exchanged, ``(experts, in, out)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from requant.kernels.repack import transpose_into
from requant.packings.base import Array, Packing, Parts, Rect, Scratch, Triple, WrappedPacking
from requant.quantization.config import Quantization

_UNSIGNED: Final = {1: "U8", 2: "U16", 4: "U32"}


@dataclass(frozen=True, slots=True)
class Place:
    """The place of the part of one expert in the tensor of all."""

    # rows of the last axis that an expert has; 0 where a tensor has one number an expert in a
    # single row, -1 where all experts share it
    height: int
    transposed: bool = False  # whether the last two axes are exchanged


@dataclass(frozen=True)
class StackedExperts(WrappedPacking):
    """The matrices of a stack, one after another, each by the packing of one."""

    layer: Packing  # the packing of one expert
    experts: int
    places: tuple[tuple[str, Place], ...]  # role -> where an expert's part is

    @property
    def rows(self) -> int:  # type: ignore[override]
        return self.experts * self.layer.rows

    @property
    def columns(self) -> int:  # type: ignore[override]
        return self.layer.columns

    @property
    def strided(self) -> bool:  # type: ignore[override]
        return self.layer.strided or self.is_transposed

    @property
    def is_transposed(self) -> bool:
        """Whether matrices are stored ``(in, out)``."""
        return any(place.transposed for _, place in self.places)

    @property
    def encoding(self) -> Quantization | None:
        quantization: Quantization | None = getattr(self.layer, "encoding", None)
        return quantization

    def _within(self, start: int, stop: int) -> tuple[int, int, int]:
        expert, first = divmod(start, self.layer.rows)
        return expert, first, first + stop - start

    def required_rects(self, start: int, stop: int) -> dict[str, Rect]:
        expert, first, last = self._within(start, stop)
        places = dict(self.places)
        cuts = self.layer.required_rects(first, last)
        return {role: _moved(cut, places[role], expert) for role, cut in cuts.items()}

    def _of_one(self, parts: Parts, scratch: Scratch) -> Parts:
        transposed = {role for role, place in self.places if place.transposed}
        return {
            role: _transposed(part, role, scratch) if role in transposed else part
            for role, part in parts.items()
        }

    def repack(self, parts: Parts, start: int, stop: int, out: Triple, scratch: Scratch) -> None:
        _, first, last = self._within(start, stop)
        self.layer.repack(self._of_one(parts, scratch), first, last, out, scratch)

    def decode(self, parts: Parts, start: int, stop: int, out: Array, scratch: Scratch) -> None:
        _, first, last = self._within(start, stop)
        self.layer.decode(self._of_one(parts, scratch), first, last, out, scratch)


def _moved(cut: Rect, place: Place, expert: int) -> Rect:
    """A rectangle of one expert's part as one of the whole tensor."""
    if place.height < 0:
        return cut
    if place.height == 0:
        return Rect((0, 1), (expert, expert + 1))
    rows, columns = (cut.columns, cut.rows) if place.transposed else (cut.rows, cut.columns)
    above = expert * place.height
    return Rect((above + rows[0], above + rows[1]), columns)


def _transposed(stored: Array, role: str, scratch: Scratch) -> Array:
    size = stored.dtype.itemsize
    if size not in _UNSIGNED or not stored.flags.c_contiguous:
        return np.ascontiguousarray(stored.T)
    height, width = stored.shape
    word = _UNSIGNED[size]
    transposed = scratch.take(f"transposed {role}", word, width, height * size)
    transpose_into(stored.view(transposed.dtype), transposed)
    return transposed.view(stored.dtype)
