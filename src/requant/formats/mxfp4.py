"""MXFP4 folders: experts in gpt-oss's blocks, or bytes and scales as vLLM names them.

Value: ``w = element * 2^(scale - 127)``, 32 inputs a scale; MLX's mxfp4, byte for byte.
"""

from __future__ import annotations

from functools import partial

from requant.checkpoints.checkpoint import Checkpoint, SourceTensor
from requant.core.dtypes import FLOATS
from requant.formats.base import SourceLayer, SourceLayout, Tensors, packed_layer
from requant.formats.float8_layers import EXPONENTS, mx_layer
from requant.formats.layer_names import layer_names
from requant.formats.quantization_block import find_quantization_block
from requant.formats.stacks import Experts, are_transposed
from requant.formats.tensor_sorter import LayerError, TensorSorter, unexpected
from requant.packings.floats import MxBlocks

# Of the blocks, and of the scales next to them: as transformers and as OpenAI name them.
_SUFFIXES = (("_blocks", "_scales"), (".blocks", ".scales"))
_BLOCK_BYTES = 16  # 32 elements of 4 bits


class Mxfp4:
    """A folder with ``quant_method: mxfp4``, or with the tensors of one."""

    name = "mxfp4"
    layer_parts = "PATH_blocks with PATH_scales"

    def claims(self, checkpoint: Checkpoint) -> str | None:
        """The config names it; otherwise blocks with scales next to them decide."""
        block = find_quantization_block(checkpoint)
        if block is not None:
            return f"{block.where}: quant_method mxfp4" if block.method == "mxfp4" else None
        for name in checkpoint.tensors:
            for blocks, scales in _SUFFIXES:
                path = name.removesuffix(blocks)
                if path != name and f"{path}{scales}" in checkpoint.tensors:
                    return f"{name} next to {path}{scales}"
        parts = layer_names(checkpoint.tensors).tensors
        for weight, scale in _pairs(parts).values():
            if _is_flat(weight, scale):
                return f"{weight.name} next to {scale.name}"
        return None

    def read(self, checkpoint: Checkpoint) -> SourceLayout:
        sorter = TensorSorter.by_role(checkpoint)
        for name, tensor in checkpoint.tensors.items():
            for blocks, scales in _SUFFIXES:
                path = name.removesuffix(blocks)
                if path != name:
                    scale = checkpoint.tensors.get(f"{path}{scales}")
                    parts = {"weight": tensor} | ({} if scale is None else {"scale": scale})
                    sorter.make(path, parts, partial(_blocks_layer, sorter, f"{path}{scales}"))
        for path, (weight, scale) in _pairs(sorter.parts).items():
            parts = {"weight": weight, "weight_scale": scale}
            sorter.make(path, parts, lambda path, parts: _flat_layer(sorter, path, parts))
        sorter.drop_runtime_scales()
        if not sorter.quantized:
            sorter.no_layer(
                "config.json: quantization_config",
                "says quant_method mxfp4, but no tensor ends in _blocks, and none has bytes and "
                "scales of MXFP4",
                _advice(checkpoint),
            )
        return sorter.layout()


def _advice(checkpoint: Checkpoint) -> str:
    """Advice on a quantization block to which no tensor belongs."""
    coded = next((x for x in checkpoint.tensors.values() if x.info.dtype not in FLOATS), None)
    if coded is None:
        return "the weights are dense, so remove the block"
    return f"{coded.name} is {coded.info}, whose scales are missing or have another name"


def _pairs(parts: Tensors) -> dict[str, tuple[SourceTensor, SourceTensor]]:
    """Layer path -> bytes and their scales, not cut into blocks: vLLM's ``w13_weight``."""
    found = {}
    for name, tensor in parts.items():
        path = name.removesuffix(".weight_packed").removesuffix(".weight")
        scale = parts.get(f"{path}.weight_scale")
        if path != name and scale is not None and tensor.info.dtype == "U8":
            found[path] = (tensor, scale)
    return found


def _is_flat(weight: SourceTensor, scale: SourceTensor) -> bool:
    """Whether a scale belongs to 16 bytes of a row, 32 elements."""
    *rows, nbytes = weight.info.shape
    grid = (*rows, nbytes // _BLOCK_BYTES)
    whole = nbytes > 0 and nbytes % _BLOCK_BYTES == 0
    return whole and scale.info.shape == grid and scale.info.dtype in EXPONENTS


def _flat_layer(sorter: TensorSorter, path: str, parts: Tensors) -> SourceLayer:
    """A layer or stack of bytes ``(..., out, in / 2)`` with scales ``(..., out, in / 32)``."""
    weight, scale = parts["weight"], parts["weight_scale"]
    if are_transposed(weight.info, scale.info):
        experts = Experts.of(weight.info.shape[0], parts, ("weight", "weight_scale"))
        return experts.stack(_flat_layer(sorter, path, experts.one()))
    if len(weight.info.shape) < 2 or 0 in weight.info.shape or not _is_flat(weight, scale):
        *rows, nbytes = weight.info.shape or (0,)
        expected = f"U8 {[*rows, nbytes // _BLOCK_BYTES]}, a scale for {_BLOCK_BYTES} bytes"
        raise unexpected(scale, f"{expected} of {weight.name}")
    return mx_layer(path, weight, scale, sorter.dtype, bits=4)


def _blocks_layer(
    sorter: TensorSorter, scales: str, path: str, parts: Tensors
) -> SourceLayer | None:
    """A stack of experts in blocks; ``scales`` is the name that their scales have."""
    blocks, scale = parts["weight"], parts.get("scale")
    shape = blocks.info.shape
    fits = blocks.info.dtype == "U8" and len(shape) >= 3 and shape[-1] == _BLOCK_BYTES
    if not fits:
        message = f"{blocks.info}, expected U8 [..., out, in / 32, {_BLOCK_BYTES}]"
        sorter.problem(blocks.name, message)
    if scale is None:
        raise LayerError(blocks.name, f"has no scales: {scales} is missing")
    if scale.info.dtype not in EXPONENTS or scale.info.shape != shape[:-1]:
        raise unexpected(scale, f"U8 {list(shape[:-1])} next to {blocks.name}")
    if not fits:
        return None
    *leading, n_out, groups, _ = shape
    n_in, rows = groups * 32, blocks.info.size // (groups * _BLOCK_BYTES)
    packing = MxBlocks(rows, n_in, n_out, 4, _BLOCK_BYTES)
    shape = (*leading, n_out, n_in)
    return packed_layer(path, parts, shape, packing, dtype=sorter.dtype, stored="mxfp4")
