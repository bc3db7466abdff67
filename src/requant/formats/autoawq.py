"""AutoAWQ folders: 4-bit codes in one of four packings, told by the tensors.

Value: ``w = (code - zero) * scale``, zeros 0 to 15.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from requant.arrays import native
from requant.checkpoint import Checkpoint
from requant.errors import Problem
from requant.formats.awq import NIBBLES
from requant.formats.base import SourceLayer, SourceLayout, dense_layer
from requant.formats.declared import declared
from requant.formats.packing import Cut, IntegerPacking, Parts, Scratch

_PER_WORD = 8


@dataclass(frozen=True)
class AwqGemm(IntegerPacking):
    """Packing "gemm": eight output rows in a word, in the order of NIBBLES.

    ``qweight`` int32 ``[in, out / 8]``, ``qzeros`` ``[in / group, out / 8]``, ``scales``
    ``[in / group, out]``.
    """

    row_unit: ClassVar[int] = _PER_WORD
    strided: ClassVar[bool] = True

    def cuts(self, start: int, stop: int) -> dict[str, Cut]:
        words = (start // _PER_WORD, stop // _PER_WORD)
        cuts = {
            "qweight": Cut((0, self.columns), words),
            "scales": Cut((0, self.groups), (start, stop)),
        }
        return cuts if self.symmetric else cuts | {"qzeros": Cut((0, self.groups), words)}

    def words(self, parts: Parts, start: int, stop: int, out: np.ndarray, scratch: Scratch) -> None:
        out[:] = native.pack_words(self.codes(parts, start, stop, scratch), self.bits)

    def codes(self, parts: Parts, start: int, stop: int, scratch: Scratch) -> np.ndarray:
        return np.ascontiguousarray(_natural_order(parts["qweight"]).T)

    def scales(self, parts: Parts, start: int, stop: int) -> np.ndarray:
        return parts["scales"].T

    def zeros(self, parts: Parts, start: int, stop: int) -> np.ndarray | float:
        if self.symmetric:
            return super().zeros(parts, start, stop)
        return _natural_order(parts["qzeros"]).T.astype(np.float32)


def _natural_order(words: np.ndarray) -> np.ndarray:
    """``[n, w]`` words -> ``[n, 8 w]`` codes."""
    rows, count = words.shape
    shifts = np.array(NIBBLES, np.uint32) * np.uint32(4)
    codes = (words.view(np.uint32)[:, :, None] >> shifts) & np.uint32(15)
    return codes.reshape(rows, count * _PER_WORD).astype(np.uint8)


class AutoAwq:
    """A folder with ``quant_method: awq``."""

    name = "awq"

    def claims(self, checkpoint: Checkpoint) -> str | None:
        found = declared(checkpoint)
        return f"{found.where}: quant_method awq" if found and found.method == "awq" else None

    def read(self, checkpoint: Checkpoint) -> SourceLayout:
        found = declared(checkpoint)
        assert found is not None
        problems: list[Problem] = []
        group_size = found.integer("group_size", problems, 128) or 128
        layers: list[SourceLayer] = []
        tensors = checkpoint.tensors
        taken: set[str] = set()
        for name in tensors:
            if not name.endswith(".qweight"):
                continue
            path = name.removesuffix(".qweight")
            parts = {
                role: tensors[f"{path}.{role}"]
                for role in ("qweight", "qzeros", "scales")
                if f"{path}.{role}" in tensors
            }
            taken |= {part.name for part in parts.values()}
            n_in, words = parts["qweight"].info.shape
            rows = words * _PER_WORD
            group = n_in if group_size < 0 else group_size
            packing = AwqGemm(
                rows, n_in, 4, group, "qzeros" not in parts, parts["scales"].info.dtype
            )
            layers.append(
                SourceLayer(
                    path,
                    parts,
                    packing.encoding,
                    (rows, n_in),
                    parts["scales"].info.dtype,
                    packing,
                    f"awq gemm 4-bit g{group}",
                )
            )
        layers += [dense_layer(t) for t in tensors.values() if t.name not in taken]
        return SourceLayout(tuple(layers), None, tuple(problems))
