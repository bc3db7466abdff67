"""FP8 folders: DeepSeek's blocks, one scale a tensor or channel, fbgemm's experts, mxfp8, FP4.

Value: ``w = e4m3 * scale``; what DeepSeek calls ``weight_scale_inv`` is that factor too.
"""

from __future__ import annotations

from functools import partial

from requant.checkpoints.checkpoint import Checkpoint, SourceTensor
from requant.formats.base import SourceLayer, SourceLayout, Tensors
from requant.formats.float8_layers import EXPONENTS, FLOAT8, block_pair, float8_stack, mx_layer
from requant.formats.layer_names import layer_names
from requant.formats.quantization_block import QuantizationBlock, find_quantization_block
from requant.formats.tensor_sorter import LayerError, TensorSorter, unexpected
from requant.text import format_value

_METHODS = ("fp8", "mxfp8", "fbgemm_fp8")


class Fp8:
    """A folder with ``quant_method`` fp8, mxfp8 or fbgemm_fp8, or with FP8 weights and scales."""

    name = "fp8"
    layer_parts = "PATH.weight with PATH.weight_scale_inv or PATH.weight_scale"

    def claims(self, checkpoint: Checkpoint) -> str | None:
        """The config names it; otherwise an FP8 weight with a scale next to it decide."""
        block = find_quantization_block(checkpoint)
        if block is not None:
            known = block.method in _METHODS
            return f"{block.where}: quant_method {block.method}" if known else None
        parts = layer_names(checkpoint.tensors).tensors
        for name, tensor in parts.items():
            scale, dtype = parts.get(f"{name}_scale"), tensor.info.dtype
            if not name.endswith(".weight") or scale is None:
                continue
            # Plain bytes are FP8 to mx.load; next to a weight_scale other codes are bytes too.
            if dtype in (FLOAT8 if scale.name.endswith("_scale_inv") else FLOAT8[:2]):
                return f"{tensor.name} is {dtype}, with {scale.name}"
        return None

    def read(self, checkpoint: Checkpoint) -> SourceLayout:
        found = find_quantization_block(checkpoint)
        sorter = TensorSorter.by_role(checkpoint)
        block = _block(found, sorter)
        fbgemm = found is not None and found.method == "fbgemm_fp8"
        layers = {
            path: parts
            for path, parts in sorter.layers_with(("weight", "weight_scale")).items()
            if len(parts) == 2 and parts["weight"].info.dtype in (*FLOAT8, "I8")
        }
        sorter.read_ahead(layers.values(), ("weight_scale",))
        for path, parts in layers.items():
            sorter.make(path, parts, partial(_layer, sorter, block, fbgemm))
        sorter.drop_runtime_scales()
        return sorter.layout()


def _block(found: QuantizationBlock | None, sorter: TensorSorter) -> tuple[int, int] | None:
    block = None if found is None else found.get("weight_block_size")
    if block is None or found is None:
        return None
    if pair := block_pair(block):
        return pair
    where = f"{found.where}.weight_block_size"
    sorter.problem(where, f"is {format_value(block)}, expected two whole numbers, rows and columns")
    return None


def _layer(
    sorter: TensorSorter, block: tuple[int, int] | None, fbgemm: bool, path: str, parts: Tensors
) -> SourceLayer:
    weight, scale = parts["weight"], parts["weight_scale"]
    shape = weight.info.shape
    if len(shape) < 2 or 0 in shape:
        raise unexpected(weight, "a matrix or a stack of matrices")
    if weight.info.dtype not in FLOAT8 or _is_fp4(weight, scale):
        return _fp4_layer(sorter, path, weight, scale)
    return float8_stack(sorter, path, weight, scale, block=block, transposed=fbgemm)


def _is_fp4(weight: SourceTensor, scale: SourceTensor) -> bool:
    """Whether bytes, which may be FP8 to mx.load, are two elements each: 16 for a scale."""
    *rows, nbytes = weight.info.shape
    by_group = scale.info.shape == (*rows, nbytes // 16) and scale.info.dtype in EXPONENTS
    return weight.info.dtype == "U8" and by_group


def _fp4_layer(
    sorter: TensorSorter, path: str, weight: SourceTensor, scale: SourceTensor
) -> SourceLayer:
    """DeepSeek V4's experts: two E2M1 elements in a byte that the header calls int8."""
    *leading, n_out, nbytes = weight.info.shape
    groups, ragged = divmod(2 * nbytes, 32)
    expected = (*leading, n_out, groups)
    if ragged or scale.info.shape != expected or scale.info.dtype not in EXPONENTS:
        raise LayerError(
            weight.name,
            f"{weight.info} is read as packed FP4 (two elements a byte); its scale must be "
            f"F8_E8M0 {list(expected)} then, {scale.name} is {scale.info}",
        )
    return mx_layer(path, weight, scale, sorter.dtype, bits=4)
