"""Layouts of bitsandbytes: int8 rows, or a table of 16 values over the flat weight.

Layout: bitsandbytes-foundation/bitsandbytes bitsandbytes/functional.py (QuantState,
int8_vectorwise_dequant) and nn/modules.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from requant.kernels.decode import lut_values_into
from requant.packings.base import Array, Fidelity, Packing, Parts, Rect, Scratch, flat_cut, rounded
from requant.packings.compressed_tensors import CtPlain

_ONE_PART = np.float32(1 / 127)


@dataclass(frozen=True)
class BnbInt8(CtPlain):
    """LLM.int8: ``w = code * SCB / 127``, SCB the largest magnitude of a row, float32."""

    computes_scales: ClassVar[bool] = True

    def scales(self, parts: Parts, start: int, stop: int) -> Array:
        largest = super().scales(parts, start, stop).astype(np.float32)
        return largest / np.float32(127)

    def decode(self, parts: Parts, start: int, stop: int, out: Array, scratch: Scratch) -> None:
        """``code * SCB``, then times float32(1 / 127), as bitsandbytes multiplies."""
        values = parts["weight"].astype(np.float32)
        values *= super().scales(parts, start, stop).astype(np.float32)
        values *= _ONE_PART
        with np.errstate(over="ignore"):  # the caller counts infinities
            out[:] = values

    def fidelity(self, dtype: str) -> Fidelity:
        return rounded("scales SCB / 127", dtype)


@dataclass(frozen=True)
class BnbTable(Packing):
    """nf4 and fp4: two codes a byte of the flattened weight, the first in the high nibble.

    ``weight``: the bytes, under any dtype, ``[n, 1]``; ``quant_map`` float32 ``[16]``;
    ``absmax`` float32, one a block; nested: uint8, with ``nested_quant_map`` ``[256]`` and
    ``nested_absmax``, one for ``nested_block`` blocks.
    """

    rows: int
    columns: int
    block: int  # values of the flattened weight with one absmax
    storage_bytes: int  # bytes of an element of ``weight`` as stored
    nested_block: int = 0  # blocks with one ``nested_absmax``; 0 where absmax is stored as floats
    nested_offset: float = 0.0  # added to each nested absmax

    @property
    def _blocks(self) -> int:
        return -(-self.rows * self.columns // self.block)

    def _block_range(self, start: int, stop: int) -> tuple[int, int]:
        return start * self.columns // self.block, -(-stop * self.columns // self.block)

    def required_rects(self, start: int, stop: int) -> dict[str, Rect]:
        held = 2 * self.storage_bytes
        elements = (start * self.columns // held, -(-stop * self.columns // held))
        first, last = self._block_range(start, stop)
        cuts = {
            "weight": Rect(elements, (0, 1)),
            "quant_map": Rect((0, 1), (0, 16)),
            "absmax": flat_cut(first, last, self._blocks),
        }
        if self.nested_block:
            above = -(-self._blocks // self.nested_block)
            nested = (first // self.nested_block, -(-last // self.nested_block))
            cuts["nested_quant_map"] = Rect((0, 1), (0, 256))
            cuts["nested_absmax"] = flat_cut(*nested, above)
        return cuts

    def _absmax(self, parts: Parts, start: int, stop: int) -> Array:
        """Float32, one for each block that the rows touch."""
        stored = parts["absmax"].reshape(-1)
        if not self.nested_block:
            return stored
        first, last = self._block_range(start, stop)
        above = np.arange(first, last) // self.nested_block - first // self.nested_block
        nested = parts["nested_absmax"].reshape(-1)[above]
        values = parts["nested_quant_map"].reshape(-1)[stored] * nested
        return np.asarray(values + np.float32(self.nested_offset), np.float32)

    def decode(self, parts: Parts, start: int, stop: int, out: Array, scratch: Scratch) -> None:
        """``quant_map[code] * absmax`` in float32, rounded once."""
        codes = parts["weight"].view(np.uint8).reshape(-1)
        skipped = start * self.columns % (2 * self.storage_bytes)
        book = parts["quant_map"].reshape(-1)
        absmax = self._absmax(parts, start, stop)
        within = start * self.columns % self.block
        if skipped % 2 == 0 and out.size % 2 == 0:
            here = codes[skipped // 2 : (skipped + out.size) // 2]
            lut_values_into(here, book, absmax, self.block, out, first=within)
            return
        # Rows of an odd number of inputs: a byte holds the end of one and the start of the next.
        pairs = np.stack([codes >> 4, codes & 15], axis=1).reshape(-1)
        blocks = (within + np.arange(out.size)) // self.block
        values = book[pairs[skipped : skipped + out.size]] * absmax[blocks]
        with np.errstate(over="ignore"):
            out[:] = values.reshape(out.shape)
