"""transformers' "metal" folders: MLX's affine layers, with ``qbiases`` for ``biases``.

Value: ``w = code * scale + qbias``. Groups may have any size; those that MLX's kernels lack
are repeated where they divide.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Final

import numpy as np

from requant.checkpoints.checkpoint import Checkpoint
from requant.core.dtypes import KERNEL_FLOATS
from requant.formats.base import SourceLayer, SourceLayout, Tensors
from requant.formats.integer_layers import integer_layer
from requant.formats.quantization_block import claim_by_method, find_quantization_block
from requant.formats.tensor_sorter import LayerError, TensorSorter, unexpected
from requant.packings.base import (
    EXACT,
    Array,
    Fidelity,
    IntegerPacking,
    Parts,
    Rect,
    Scratch,
    affine_into,
    is_narrower,
    rounded,
    stream_codes,
)
from requant.text import format_value, join_or

_ROLES: Final = ("weight", "scales", "qbiases")
_WIDTHS: Final = (2, 4, 8)


@dataclass(frozen=True)
class Metal(IntegerPacking):
    """``weight`` uint32 ``[..., out, in * bits / 32]``, ``scales`` and ``qbiases`` a group."""

    def required_rects(self, start: int, stop: int) -> dict[str, Rect]:
        each = Rect((start, stop), (0, self.groups))
        words = Rect((start, stop), (0, self.columns * self.bits // 32))
        return {"weight": words, "scales": each, "qbiases": each}

    def words(self, parts: Parts, start: int, stop: int, out: Array, scratch: Scratch) -> None:
        out[:] = parts["weight"].view(np.uint32)

    def codes(self, parts: Parts, start: int, stop: int, scratch: Scratch) -> Array:
        return stream_codes(parts["weight"], self.bits, self.columns)

    def scales(self, parts: Parts, start: int, stop: int) -> Array:
        return parts["scales"]

    def biases(self, parts: Parts, start: int, stop: int, scales: Array) -> Array:
        return parts["qbiases"]

    def decode(self, parts: Parts, start: int, stop: int, out: Array, scratch: Scratch) -> None:
        """``code * scale + qbias`` in float32, rounded once more."""
        codes = self.codes(parts, start, stop, scratch)
        affine_into(codes, parts["scales"], parts["qbiases"], self.group, out)

    def fidelity(self, dtype: str) -> Fidelity:
        rounds = is_narrower(dtype, self.scale_dtype)
        return rounded("scales and biases", dtype) if rounds else EXACT


class MetalFormat:
    """A folder with ``quant_method: metal``, or with ``qbiases``."""

    name = "metal"
    layer_parts = "PATH.weight with PATH.scales and PATH.qbiases"

    def claims(self, checkpoint: Checkpoint) -> str | None:
        """The config names it; without one, ``qbiases`` tells."""
        names = (name for name in checkpoint.tensors if name.endswith(".qbiases"))
        return claim_by_method(checkpoint, "metal", names)

    def read(self, checkpoint: Checkpoint) -> SourceLayout:
        sorter, block = TensorSorter(checkpoint), find_quantization_block(checkpoint)
        where = "config.json: quantization_config"
        bits = group = None
        if block is not None:
            where = block.where
            bits = block.integer("bits", sorter.problems)
            group = block.integer("group_size", sorter.problems)
        if bits not in _WIDTHS and not sorter.problems:
            sorter.problem(f"{where}.bits", f"is {format_value(bits)}, expected {join_or(_WIDTHS)}")
        elif (group is None or group < 1) and not sorter.problems:
            sorter.problem(
                f"{where}.group_size", f"is {format_value(group)}, expected a count of inputs"
            )
        if bits is None or group is None or sorter.problems:
            return SourceLayout((), None, tuple(sorter.problems))
        width, size = bits, group
        for path, parts in sorter.layers_with(_ROLES).items():
            if parts.keys() != {"weight"}:
                sorter.make(path, parts, lambda p, t: _layer(sorter, p, t, width, size))
        if not sorter.quantized:
            sorter.no_layer(where, "says metal, but no layer has scales")
        return sorter.layout()


def _layer(sorter: TensorSorter, path: str, parts: Tensors, bits: int, group: int) -> SourceLayer:
    for role in _ROLES:
        if role not in parts:
            raise LayerError(path, f"has no {path}.{role} next to its {', '.join(parts)}")
    weight, scales, biases = (parts[role] for role in _ROLES)
    if weight.info.dtype not in ("U32", "I32") or len(weight.info.shape) < 2:
        raise unexpected(weight, f"U32 [out, in * {bits} / 32]")
    *leading, words = weight.info.shape
    columns = words * 32 // bits
    expected = (*leading, columns // group)
    if columns == 0 or columns % group:
        message = f"{weight.info} holds {columns} inputs of {bits} bits, no multiple of {group}"
        raise LayerError(weight.name, message)
    for part in (scales, biases):
        if part.info.shape != expected or part.info.dtype not in KERNEL_FLOATS:
            raise unexpected(part, f"floats {list(expected)}")
    if scales.info.dtype != biases.info.dtype:
        raise unexpected(biases, f"{scales.info.dtype} as its scales")
    dtype = scales.info.dtype
    packing = Metal(prod(leading), columns, bits, group, symmetric=False, scale_dtype=dtype)
    return integer_layer(sorter, path, parts, (*leading, columns), packing, tool="metal")
