"""FP-Quant folders: MXFP4 and NVFP4 codes of weights that may be rotated.

Value: ``w = element * scale / weight_global_scale``, then rotated back. Only weights whose
rotation is the identity are read: what undoes another depends on the runtime's kernels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from requant.checkpoints.checkpoint import Checkpoint
from requant.core.dtypes import KERNEL_FLOATS
from requant.core.reasons import Reason, ReasonCode
from requant.formats.base import SourceLayer, SourceLayout, Tensors, fallback_for, named_parts
from requant.formats.float8_layers import mx_layer
from requant.formats.nvfp4_layers import nvfp4_layer
from requant.formats.quantization_block import (
    QuantizationBlock,
    claim_by_method,
    find_quantization_block,
)
from requant.formats.tensor_sorter import LayerError, TensorSorter, unexpected
from requant.packings.base import Array, Packing, Parts, Rect, Scratch, WrappedPacking
from requant.text import format_value

_CODES: Final = ("qweight", "scales", "weight_global_scale")
_MATRICES: Final = ("forward_hadamard_matrix", "backward_hadamard_matrix")
_GROUPS: Final = {"mxfp4": 32, "nvfp4": 16}
_LARGEST_ROTATION: Final = 1024


@dataclass(frozen=True)
class Divided(WrappedPacking):
    """A packed layer divided by one number, ``divisor``."""

    rows: int
    columns: int
    layer: Packing

    def required_rects(self, start: int, stop: int) -> dict[str, Rect]:
        return {**self.layer.required_rects(start, stop), "divisor": Rect((0, 1), (0, 1))}

    def decode(self, parts: Parts, start: int, stop: int, out: Array, scratch: Scratch) -> None:
        """The layer's values in float32, divided, rounded once more."""
        values = scratch.take("undivided", "F32", stop - start, 4 * self.columns)
        self.layer.decode(parts, start, stop, values, scratch)
        values /= parts["divisor"].astype(np.float32)
        with np.errstate(over="ignore"):  # the caller counts infinities
            out[:] = values


class FpQuant:
    """A folder with ``quant_method: fp_quant``."""

    name = "fp-quant"
    layer_parts = "PATH.qweight with PATH.scales and PATH.weight_global_scale"

    def claims(self, checkpoint: Checkpoint) -> str | None:
        """The config names it; nothing else tells."""
        return claim_by_method(checkpoint, "fp_quant")

    def read(self, checkpoint: Checkpoint) -> SourceLayout:
        sorter, block = TensorSorter(checkpoint), find_quantization_block(checkpoint)
        assert block is not None
        for name in sorter.tensors:
            path = name.removesuffix(".qweight")
            if path != name:
                parts = named_parts(sorter.tensors, path, (*_CODES, *_MATRICES))
                sorter.make(path, parts, lambda p, t: _layer(sorter, block, p, t))
        for tensor in sorter.left:
            path, _, role = tensor.name.rpartition(".")
            if role == "act_global_scale":
                sorter.drop(tensor.name, "a scale of activations, which MLX does not quantize")
            elif role in _MATRICES:
                sorter.drop(tensor.name, "the identity, which changes nothing")
            elif role == "dqweight":
                message = "holds values of a rotated weight (pseudoquantization), which is not read"
                sorter.problem(tensor.name, message)
        if not sorter.quantized:
            sorter.no_layer(block.where, "says fp_quant, but no tensor is a qweight")
        return sorter.layout()


def _check_rotation(
    sorter: TensorSorter, block: QuantizationBlock, path: str, tensors: Tensors
) -> None:
    """A rotation must be the identity: by its matrix, or by the config where none is stored."""
    kind = block.word("transform_init", "hadamard")
    matrices = [tensors[role] for role in _MATRICES if role in tensors]
    if not matrices and kind != "identity":
        where = f"{block.where}.transform_init"
        message = (
            f"is {format_value(kind)}: weights are stored rotated, and only 'identity' is read"
        )
        raise LayerError(where, message)
    for matrix in matrices:
        square = len(matrix.info.shape) == 2 and len(set(matrix.info.shape)) == 1
        floats = matrix.info.dtype in KERNEL_FLOATS
        if not floats or not square or matrix.info.shape[0] > _LARGEST_ROTATION:
            raise unexpected(matrix, "a square matrix of floats")
        stored = sorter.checkpoint.read_small_tensor(matrix.name).astype(np.float64)
        if not np.array_equal(stored, np.eye(matrix.info.shape[0])):
            raise LayerError(
                matrix.name,
                f"rotates the weight of {path} (transform_init {format_value(kind)}); its inputs "
                "would have to be rotated too, which MLX does not, and only the identity is read",
            )


def _layer(
    sorter: TensorSorter, block: QuantizationBlock, path: str, tensors: Tensors
) -> SourceLayer:
    dtype = block.word("forward_dtype", "mxfp4")
    if dtype not in _GROUPS:
        raise LayerError(f"{block.where}.forward_dtype", f"is {dtype!r}; read are mxfp4 and nvfp4")
    _check_rotation(sorter, block, path, tensors)
    weight, scale, divisor = (tensors.get(role) for role in _CODES)
    assert weight is not None
    if scale is None or divisor is None:
        missing = "scales" if scale is None else "weight_global_scale"
        raise LayerError(weight.name, f"has no {path}.{missing} next to it")
    if weight.info.dtype != "U8" or len(weight.info.shape) != 2 or 0 in weight.info.shape:
        raise unexpected(weight, "U8 [out, in / 2]")
    rows, nbytes = weight.info.shape
    groups, ragged = divmod(2 * nbytes, _GROUPS[dtype])
    if ragged or scale.info.shape != (rows, groups) or scale.info.dtype != "U8":
        raise unexpected(scale, f"U8 [{rows}, {groups}], unpadded, for {dtype}")
    if divisor.info.size != 1 or divisor.info.dtype not in KERNEL_FLOATS:
        raise unexpected(divisor, "one float")
    if dtype == "nvfp4":
        return nvfp4_layer(sorter, path, weight, scale, divisor, divides=True)
    number = sorter.positive_number(divisor)
    layer = mx_layer(path, weight, scale, sorter.dtype, bits=4)
    assert layer.packing is not None
    if number == 1:
        sorter.drop(divisor.name, "is 1, which changes nothing")
        return layer
    return replace(
        layer,
        parts={**layer.parts, "divisor": divisor},
        encoding=None,
        packing=Divided(rows, 2 * nbytes, layer.packing),
        stored_description="mxfp4 with a global scale",
        policy=replace(
            layer.policy,
            fallback=fallback_for(2 * nbytes),
            reason=Reason(ReasonCode.TENSOR_SCALE, "MLX's mxfp4 has no place for its global scale"),
        ),
    )
