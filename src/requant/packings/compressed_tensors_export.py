"""Tensors of compressed-tensors' ``pack-quantized`` that MLX's affine layers do not have.

Words and scales are MLX's own bytes: at 4 and 8 bits both formats store a row as one little-endian
stream of unsigned codes. ``compressed_tensors`` reads what is written here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from requant.errors import InvariantError
from requant.packings.base import Array, Packing, Parts, Rect, Scratch, Triple
from requant.packings.zero_points import integer_zeros


class _Written(Packing):
    """A packing that is only written: there is nothing to decode."""

    def decode(self, parts: Parts, start: int, stop: int, out: Array, scratch: Scratch) -> None:
        raise InvariantError(f"{type(self).__name__} is not decoded")


@dataclass(frozen=True)
class CtZeroPoints(_Written):
    """``weight_zero_point`` int32 ``(out * bits / 32, groups)``, packed along the outputs.

    A row is a row of words: word ``(r, g)`` holds the zero points of group ``g`` of ``32 / bits``
    outputs, the first in the lowest bits. At 4 bits and 10 outputs, the second row of words holds
    those of outputs 8 and 9, then zeros.
    """

    scratch_value_bytes: ClassVar[int] = 128  # scales and biases of 8 outputs, in float32

    rows: int  # rows of words
    columns: int  # groups of one output
    bits: int  # 4 or 8
    out_features: int

    def _outputs(self, start: int, stop: int) -> tuple[int, int]:
        per_word = 32 // self.bits
        return start * per_word, min(stop * per_word, self.out_features)

    def required_rects(self, start: int, stop: int) -> dict[str, Rect]:
        rect = Rect(self._outputs(start, stop), (0, self.columns))
        return {"scales": rect, "biases": rect}

    def repack(self, parts: Parts, start: int, stop: int, out: Triple, scratch: Scratch) -> None:
        """Fill ``out["weight"]`` with rows of words."""
        zeros = integer_zeros(parts["scales"], parts["biases"])
        if ((zeros < 0) | (zeros >= 1 << self.bits)).any():
            raise InvariantError("a zero point is out of range: the source was changed meanwhile")
        per_word = 32 // self.bits
        padded = np.zeros(((stop - start) * per_word, self.columns), np.uint32)
        padded[: zeros.shape[0]] = zeros.astype(np.uint32)
        words = np.zeros((stop - start, self.columns), np.uint32)
        for place in range(per_word):
            words |= padded[place::per_word] << np.uint32(place * self.bits)
        out["weight"][:] = words.view(np.int32)


@dataclass(frozen=True)
class CtShape(_Written):
    """``weight_shape`` int64 ``[2]``: outputs and inputs. Its one row needs no data."""

    shape: tuple[int, int]
    rows: int = 1
    columns: int = 2

    def required_rects(self, start: int, stop: int) -> dict[str, Rect]:
        return {}

    def repack(self, parts: Parts, start: int, stop: int, out: Triple, scratch: Scratch) -> None:
        """Fill ``out["weight"]`` with the shape."""
        out["weight"][:] = self.shape
