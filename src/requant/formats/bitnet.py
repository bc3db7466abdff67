"""BitNet folders: weights of three values, four row blocks to a byte.

Value: ``w = (code - 1) / weight_scale`` (``linear_class: bitlinear``), or times it
(``autobitlinear``). Layout: huggingface/transformers src/transformers/integrations/bitnet.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from requant.checkpoints.checkpoint import Checkpoint
from requant.core.dtypes import KERNEL_FLOATS
from requant.core.reasons import Note, NoteCode
from requant.errors import InvariantError
from requant.formats.base import SourceLayer, SourceLayout, Tensors
from requant.formats.integer_layers import integer_layer
from requant.formats.quantization_block import (
    QuantizationBlock,
    claim_by_method,
    find_quantization_block,
)
from requant.formats.tensor_sorter import TensorSorter, unexpected
from requant.kernels.repack import BITNET
from requant.packings.base import Array, Fidelity, IntegerPacking, Parts, Rect, Scratch, rounded
from requant.packings.row_blocks import NEXT, block_codes, block_cuts
from requant.text import format_value

_CLASSES: Final = ("bitlinear", "autobitlinear")
_ROWS_A_BYTE: Final = 4


@dataclass(frozen=True)
class Ternary(IntegerPacking):
    """``weight`` U8 ``[ceil(out / 4), in]``, codes 0 to 2; ``weight_scale`` one float.

    With R packed rows, row ``i * R + r`` is in bits ``2 i`` and on of packed row ``r``.
    """

    divides: bool  # whether codes are divided by the scale

    def required_rects(self, start: int, stop: int) -> dict[str, Rect]:
        packed = block_cuts("weight", BITNET, self.rows, start=start, stop=stop, width=self.columns)
        return {**packed, "weight_scale": Rect((0, 1), (0, 1))}

    def codes(self, parts: Parts, start: int, stop: int, scratch: Scratch) -> Array:
        codes = scratch.take("codes", "U8", stop - start, self.columns)
        block_codes("weight", BITNET, self.rows, start=start, parts=parts, out=codes)
        if codes.size and codes.max() == 3:
            raise InvariantError("holds code 3, which is none of its three values: 0, 1 and 2")
        return codes

    def scales(self, parts: Parts, start: int, stop: int) -> Array:
        scale = parts["weight_scale"].astype(np.float32)
        scale = np.float32(1) / scale if self.divides else scale
        return np.broadcast_to(scale, (stop - start, self.groups))

    def zeros(self, parts: Parts, start: int, stop: int) -> Array | float:
        return 1.0

    @property
    def computes_scales(self) -> bool:  # type: ignore[override]
        return self.divides

    def fidelity(self, dtype: str) -> Fidelity:
        """The reciprocal of a stored scale rounds; the bias is the scale's negative."""
        if not self.divides:
            return super().fidelity(dtype)
        return rounded("the scale, 1 / weight_scale,", dtype)


class BitNet:
    """A folder with ``quant_method: bitnet``."""

    name = "bitnet"
    layer_parts = "PATH.weight with PATH.weight_scale"

    def claims(self, checkpoint: Checkpoint) -> str | None:
        """The config names it; nothing else tells whether scales divide."""
        return claim_by_method(checkpoint, "bitnet")

    def read(self, checkpoint: Checkpoint) -> SourceLayout:
        sorter, block = TensorSorter(checkpoint), find_quantization_block(checkpoint)
        assert block is not None
        divides = _divides(block, sorter)
        for name, tensor in checkpoint.tensors.items():
            path = name.removesuffix(".weight")
            scale = checkpoint.tensors.get(f"{path}.weight_scale")
            if path != name and scale is not None and tensor.info.dtype in ("U8", "I8"):
                parts = {"weight": tensor, "weight_scale": scale}
                sorter.make(path, parts, lambda p, t: _layer(sorter, p, t, divides))
        if sorter.quantized:
            text = (
                "BitNet rounds activations to 8 bits while it runs; MLX does not, so that outputs "
                "differ a little from the source's."
            )
            sorter.notes.append(Note(NoteCode.ROUNDED_ACTIVATIONS, text))
        else:
            sorter.no_layer(block.where, "says quant_method bitnet, but no weight is U8")
        return sorter.layout()


def _divides(block: QuantizationBlock, sorter: TensorSorter) -> bool:
    """Whether scales divide; what only a runtime of BitNet can do is a problem."""
    kind = block.word("linear_class", "bitlinear")
    if kind not in _CLASSES:
        known = " and ".join(_CLASSES)
        sorter.problem(f"{block.where}.linear_class", f"is {format_value(kind)}; known are {known}")
    if block.word("quantization_mode", "offline") != "offline":
        sorter.problem(
            f"{block.where}.quantization_mode",
            f"is {format_value(block.get('quantization_mode'))}: dense weights, rounded to three "
            "values each time the model runs, which MLX does not; save the model in mode offline",
        )
    if block.get("use_rms_norm"):
        sorter.problem(
            f"{block.where}.use_rms_norm",
            "is true: each layer normalizes its inputs first, which no linear layer of MLX does",
        )
    return kind != "autobitlinear"


def _layer(sorter: TensorSorter, path: str, parts: Tensors, divides: bool) -> SourceLayer:
    weight, scale = parts["weight"], parts["weight_scale"]
    if len(weight.info.shape) != 2 or 0 in weight.info.shape:
        raise unexpected(weight, "U8 [out / 4, in]")
    if scale.info.size != 1 or scale.info.dtype not in KERNEL_FLOATS:
        raise unexpected(scale, "one float")
    sorter.positive_number(scale)
    packed, n_in = weight.info.shape
    n_out = _ROWS_A_BYTE * packed
    bias = sorter.tensors.get(f"{path}.bias")
    if bias is not None and n_out - _ROWS_A_BYTE < bias.info.size < n_out:
        n_out = bias.info.size  # rows are padded to fill the last bytes
    packing = Ternary(
        n_out, n_in, 2, n_in, symmetric=True, scale_dtype=scale.info.dtype, divides=divides
    )
    used = {"weight": weight, f"weight{NEXT}": weight, "weight_scale": scale}
    shape, scales = (n_out, n_in), "a scale a tensor"
    return integer_layer(sorter, path, used, shape, packing, tool="bitnet", scales=scales)
