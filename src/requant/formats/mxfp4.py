"""gpt-oss folders: experts in MXFP4 blocks.

Value: ``w = element * 2^(scale - 127)``, 32 inputs a scale; MLX's mxfp4, byte for byte.
"""

from __future__ import annotations

from requant.checkpoint import Checkpoint, SourceTensor
from requant.formats.base import SourceLayer, SourceLayout
from requant.formats.declared import declared
from requant.formats.float_packings import MxBlocks
from requant.formats.sorting import Sorter

# Of the blocks, and of the scales beside them: as transformers and as OpenAI name them.
_SUFFIXES = (("_blocks", "_scales"), (".blocks", ".scales"))
_BLOCK_BYTES = 16  # 32 elements of 4 bits


class Mxfp4:
    """A folder with ``quant_method: mxfp4``, or with the tensors of one."""

    name = "mxfp4"
    layer_parts = "PATH_blocks with PATH_scales"

    def claims(self, checkpoint: Checkpoint) -> str | None:
        """The config names it; without one, blocks with scales beside them tell."""
        found = declared(checkpoint)
        if found is not None:
            return f"{found.where}: quant_method mxfp4" if found.method == "mxfp4" else None
        for name in checkpoint.tensors:
            for blocks, scales in _SUFFIXES:
                path = name.removesuffix(blocks)
                if path != name and f"{path}{scales}" in checkpoint.tensors:
                    return f"{name} beside {path}{scales}"
        return None

    def read(self, checkpoint: Checkpoint) -> SourceLayout:
        """Pair blocks with scales; everything else is dense."""
        sorter = Sorter(checkpoint)
        for name, tensor in checkpoint.tensors.items():
            for blocks, scales in _SUFFIXES:
                path = name.removesuffix(blocks)
                if path != name:
                    sorter.add(_layer(sorter, path, tensor, f"{path}{scales}"))
        if not sorter.quantized:
            sorter.no_layer(
                "config.json: quantization_config",
                "says quant_method mxfp4, but no tensor ends in _blocks: if the weights are "
                "dense, remove the block",
            )
        return sorter.layout()


def _layer(sorter: Sorter, path: str, blocks: SourceTensor, scales: str) -> SourceLayer | None:
    """One stack of experts, if its tensors fit each other."""
    scale, shape = sorter.tensors.get(scales), blocks.info.shape
    sorter.claim([blocks.name], path)
    if blocks.info.dtype != "U8" or len(shape) < 3 or shape[-1] != _BLOCK_BYTES:
        message = f"{blocks.info}, expected U8 [..., out, in / 32, {_BLOCK_BYTES}]"
        sorter.problem(blocks.name, message)
    if scale is None:
        sorter.problem(blocks.name, f"has no scales: {scales} is missing")
        return None
    sorter.claim([scales], path)
    if scale.info.dtype not in ("U8", "F8_E8M0") or scale.info.shape != shape[:-1]:
        sorter.problem(scales, f"{scale.info}, expected U8 {list(shape[:-1])} beside {blocks.name}")
    if any(problem.where in (blocks.name, scales) for problem in sorter.problems):
        return None
    *leading, n_out, groups, _ = shape
    n_in, rows = groups * 32, blocks.info.size // (groups * _BLOCK_BYTES)
    packing = MxBlocks(rows, n_in, n_out, 4, _BLOCK_BYTES)
    logical = (*leading, n_out, n_in)
    parts = {"weight": blocks, "scale": scale}
    return SourceLayer(path, parts, packing.encoding, logical, sorter.dtype, packing, "mxfp4")
