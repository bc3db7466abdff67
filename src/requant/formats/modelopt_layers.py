"""ModelOpt's layers: how each is stored, by the dtypes and shapes of its tensors."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import ClassVar

from requant.checkpoints.checkpoint import SourceTensor
from requant.core.dtypes import KERNEL_FLOATS
from requant.formats.base import SourceLayer, Tensors
from requant.formats.float8_layers import EXPONENTS, FLOAT8, float8_stack, mx_layer, tile_of
from requant.formats.input_scaled import input_scaled
from requant.formats.integer_layers import integer_layer, row_fields
from requant.formats.nvfp4_layers import nvfp4_layer, nvfp4_without_tensor_scale
from requant.formats.stacks import Experts, are_transposed, rows_with_one_scale
from requant.formats.tensor_sorter import LayerError, TensorSorter, unexpected
from requant.kernels.repack import row_pairs_into
from requant.packings.base import Array, IntegerPacking, Parts, Rect, Scratch
from requant.packings.compressed_tensors import CtPlain


@dataclass(frozen=True)
class RowPairs(IntegerPacking):
    """INT4: ``weight`` U8 ``[..., out / 2, in]``, two rows a byte, two's complement.

    The low nibble is row ``2 r``, the high one row ``2 r + 1``. ``weight_scale`` floats
    ``[..., out, groups]``; every zero is 0.
    """

    row_unit: ClassVar[int] = 2

    def required_rects(self, start: int, stop: int) -> dict[str, Rect]:
        return {
            "weight": Rect((start // 2, stop // 2), (0, self.columns)),
            "weight_scale": Rect((start, stop), (0, self.groups)),
        }

    def codes(self, parts: Parts, start: int, stop: int, scratch: Scratch) -> Array:
        codes = scratch.take("codes", "U8", stop - start, self.columns)
        row_pairs_into(parts["weight"], codes)
        return codes

    def scales(self, parts: Parts, start: int, stop: int) -> Array:
        return parts["weight_scale"]


# Scales of NVFP4; arrays in memory may hold them as bytes.
_E4M3 = ("F8_E4M3", "U8")


def stored_kind(path: str, parts: Tensors) -> str:
    """The kind of a layer with a ``weight``: nvfp4, mxfp4, mxfp8, fp8, int4 or int8.

    Raises:
        LayerError: Not as ModelOpt writes them.
    """
    weight, scale = parts["weight"], parts.get("weight_scale")
    if scale is None:
        others = ", ".join(role for role in parts if role != "weight")
        raise LayerError(weight.name, f"has no weight_scale next to it (it has {others})")
    codes, scales = weight.info, scale.info
    if len(codes.shape) < 2 or 0 in codes.shape or 0 in scales.shape:
        raise unexpected(weight, "a matrix or a stack of them")
    *leading, height, width = codes.shape
    by_row = scales.shape[:-1] == codes.shape[:-1]
    group_codes = width / scales.shape[-1] if by_row else 0  # elements of a row with one scale
    if scales.dtype in KERNEL_FLOATS:
        in_pairs = scales.shape[:-1] == (*leading, 2 * height)
        if codes.dtype == "I8":
            return "int8"
        if codes.dtype == "U8" and in_pairs and width % scales.shape[-1] == 0:
            return "int4"
        bytes_in_tiles = codes.dtype == "U8" and tile_of(codes.shape, scales.shape, None)
        if codes.dtype in FLOAT8[:2] or bytes_in_tiles:
            return "fp8"
    elif codes.dtype == "U8" and scales.dtype in _E4M3 and group_codes == 8:
        return "nvfp4"
    elif codes.dtype == "U8" and group_codes == 16 and scales.dtype in EXPONENTS:
        return "mxfp4"
    elif codes.dtype in FLOAT8 and group_codes == 32 and scales.dtype in EXPONENTS:
        return "mxfp8"
    siblings = ", ".join(f"{role} {part.info}" for role, part in parts.items())
    raise LayerError(path, f"is laid out as ModelOpt does not write it: {siblings}")


def transposed_experts(sorter: TensorSorter, path: str, parts: Tensors) -> Experts | None:
    """The experts of a stack of packed codes that is stored ``(experts, in, out)``.

    ModelOpt transposes the stacks of Llama 4 and gpt-oss back after it has quantized them, so that
    bytes and groups run down the axis before the last. FP8 is detected by ``float8_stack``.
    """
    weight, scale = parts["weight"], parts.get("weight_scale")
    if scale is None or not are_transposed(weight.info, scale.info):
        return None
    if weight.info.dtype in FLOAT8[:2] and scale.info.dtype not in EXPONENTS:
        return None
    return Experts.of(weight.info.shape[0], parts, ("weight", "weight_scale"))


def make_layer(sorter: TensorSorter, kind: str, path: str, parts: Tensors) -> SourceLayer:
    """Describe a layer of a kind that ``stored_kind`` found.

    Raises:
        LayerError: Its tensors contradict each other.
    """
    weight, scale = parts["weight"], parts["weight_scale"]
    second, inputs = parts.get("weight_scale_2"), parts.get("pre_quant_scale")
    if kind == "nvfp4" and second is None:
        missing = "weight_scale_2 that multiplies them"
        layer = nvfp4_without_tensor_scale(sorter, path, weight, scale, missing)
    elif kind == "nvfp4":
        layer = nvfp4_layer(sorter, path, weight, scale, second, divides=False)
    elif second is not None:
        raise LayerError(second.name, f"is next to {kind} codes; what it scales is not known")
    elif kind == "fp8":
        layer = float8_stack(sorter, path, weight, scale)
    elif kind in ("mxfp4", "mxfp8"):
        layer = mx_layer(path, weight, scale, sorter.dtype, bits=int(kind[-1]))
    else:
        layer = (_int4 if kind == "int4" else _int8)(sorter, path, weight, scale)
    if inputs is None:
        return layer
    n_in = layer.shape[-1]
    if inputs.info.dtype not in KERNEL_FLOATS or inputs.info.shape != (n_in,):
        raise unexpected(inputs, f"floats [{n_in}], one an input")
    return input_scaled(layer, inputs)


def _int4(
    sorter: TensorSorter, path: str, weight: SourceTensor, scale: SourceTensor
) -> SourceLayer:
    *leading, pairs, n_in = weight.info.shape
    shape, groups = (*leading, 2 * pairs, n_in), scale.info.shape[-1]
    rows, dtype = prod(shape[:-1]), scale.info.dtype
    packing = RowPairs(rows, n_in, 4, n_in // groups, symmetric=True, scale_dtype=dtype)
    parts = {"weight": weight, "weight_scale": scale}
    return integer_layer(sorter, path, parts, shape, packing, tool="modelopt")


def _int8(
    sorter: TensorSorter, path: str, weight: SourceTensor, scale: SourceTensor
) -> SourceLayer:
    shape = weight.info.shape
    found = rows_with_one_scale(shape, scale.info.shape)
    if found is None or found[1] != 1:
        *leading, n_out, _ = shape
        raise unexpected(scale, f"{[*leading, n_out]}, one a row of codes")
    packing = CtPlain(**row_fields(shape, scale.info, scale_rows=found[0]))
    parts = {"weight": weight, "weight_scale": scale}
    return integer_layer(sorter, path, parts, shape, packing, tool="modelopt")
