"""Layers with a ``qweight`` in the folder of another format, whose config does not describe them.

Shapes determine the layout, the width and the group of each. No shape says how the zeros of GPTQ
are stored: zeros that are all the middle code, in one of the two ways, do, and else the config
must.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

import numpy as np

from requant.checkpoints.checkpoint import Checkpoint
from requant.errors import Problem
from requant.formats.base import SourceLayer
from requant.formats.gptq_awq import GptqAwqFormat
from requant.formats.quantization_block import QuantizationBlock, with_block
from requant.packings.base import stream_codes
from requant.packings.experts import StackedExperts
from requant.packings.gptq import Gptq

_Block = Mapping[str, Any]

_FORMATS: Final = ("gptq", "gptq_v2", "gptq_p")  # of zeros, and of codes, that a config names
_GROUPS: Final = (32, 64, 128)  # of layouts whose scales are padded
_LAYOUTS: Final[tuple[_Block, ...]] = (
    {"quant_method": "awq", "version": "gemm"},
    *({"quant_method": "awq", "version": "gemv", "group_size": group} for group in _GROUPS),
    *({"quant_method": "awq", "version": "gemv_fast", "group_size": group} for group in _GROUPS),
    {"quant_method": "gptq", "checkpoint_format": "marlin"},
)
_PLACE = QuantizationBlock("", {}, ("quantization_config",))


def read_qweights(
    checkpoint: Checkpoint, found: QuantizationBlock | None
) -> tuple[list[SourceLayer], list[Problem]]:
    """The layers that have one reading, and a problem for each that has several.

    ``checkpoint`` is what is left over, without quantization blocks; the ``checkpoint_format`` of
    ``found``, the block of the folder, decides where tensors do not.
    """
    paths = [n.rpartition(".")[0] for n in checkpoint.tensors if n.endswith((".qweight", ".B"))]
    if not paths:
        return [], []
    readings: dict[str, list[SourceLayer]] = {}
    for block in _LAYOUTS:
        for layer in _read(checkpoint, block):
            readings.setdefault(layer.path, []).append(layer)
    problems = []
    formats = _Formats(checkpoint, found)
    for block in formats.blocks():
        for layer in _read(checkpoint, block):
            if formats.chosen.get(layer.path) == block:
                readings.setdefault(layer.path, []).append(layer)
    for path, message in formats.undecided.items():
        problems.append(Problem(path, message))
        readings.pop(path, None)
    for path, layers in list(readings.items()):
        if any(layer.packing != layers[0].packing for layer in layers):
            words = " or ".join(dict.fromkeys(layer.stored_description for layer in layers))
            message = f"may be {words} by its shapes, and the config does not say which"
            problems.append(Problem(path, message))
            del readings[path]
    return [layers[0] for layers in readings.values()], problems


def _read(checkpoint: Checkpoint, block: _Block) -> Iterator[SourceLayer]:
    view = with_block(checkpoint, _PLACE, block)
    layout = GptqAwqFormat(block["quant_method"]).read(view)
    return (layer for layer in layout.layers if layer.packing is not None)


class _Formats:
    """The storage of the zeros of each layer in GPTQ's layout."""

    def __init__(self, checkpoint: Checkpoint, block: QuantizationBlock | None) -> None:
        self.checkpoint, self.found = checkpoint, block
        written = "" if block is None else block.word("checkpoint_format")
        self.written = written if written in _FORMATS else ""
        self.chosen: dict[str, _Block] = {}  # layer path -> the block that reads it
        self.undecided: dict[str, str] = {}  # layer path -> why none does
        as_stored = {"quant_method": "gptq", "checkpoint_format": "gptq_v2", "sym": False}
        for layer in _read(checkpoint, as_stored):
            packing = layer.packing
            if isinstance(packing, StackedExperts):
                packing = packing.layer
            if isinstance(packing, Gptq):
                self._decide(layer.path, packing, layer.parts["qzeros"].name)
        if len({block["checkpoint_format"] for block in self.chosen.values()}) > 1:
            for path in self.chosen:
                self.undecided[path] = (
                    "and other layers of this folder have zeros that are the middle code in "
                    "both ways that GPTQ stores them, so that neither is certain; "
                    + self._advice(True)
                )
            self.chosen.clear()

    def blocks(self) -> list[_Block]:
        """The different ones that were chosen."""
        found: list[_Block] = []
        for block in self.chosen.values():
            if block not in found:
                found.append(block)
        return found

    def _decide(self, path: str, packing: Gptq, zeros: str) -> None:
        middle = 1 << (packing.bits - 1)
        stored = self.checkpoint.read_small_tensor(zeros)
        stored = stored.reshape(-1, stored.shape[-1])  # of a stack: its experts, one after another
        fields = stream_codes(stored, packing.bits, packing.rows)
        one = np.unique(fields)
        written = self.written
        if not written and packing.bits in (2, 4, 8) and one.size == 1:
            written = {middle - 1: "gptq", middle: "gptq_v2"}.get(int(one[0]), "")
        if not written:
            how = (
                "are stored as they are or less one"
                if packing.bits in (2, 4, 8)
                else "and codes are stored in one of several ways"
            )
            self.undecided[path] = (
                f"is laid out as gptq, {packing.bits}-bit codes in groups of {packing.group}, and "
                f"its tensors do not show whether its zeros {how}; {self._advice(one.size == 1)}"
            )
            return
        zero = middle - (written == "gptq")
        block = {
            "quant_method": "gptq",
            "checkpoint_format": written,
            "sym": bool(one.size == 1 and one[0] == zero),
        }
        meta = None if self.found is None else self.found.get("meta")
        self.chosen[path] = block if meta is None else {**block, "meta": meta}

    def _advice(self, symmetric: bool) -> str:
        named = '"checkpoint_format": "gptq" (version 1, less one) or "gptq_v2" (as they are)'
        if self.found is None:
            return (
                "config.json has no quantization_config that says so: write "
                f'{{"quant_method": "gptq", "sym": {str(symmetric).lower()}, {named}}} into it'
            )
        return f"write {named} into {self.found.where}"
