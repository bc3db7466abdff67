"""FP8 folders: DeepSeek's blocks, one scale a tensor or channel, fbgemm's experts, mxfp8, FP4.

Value: ``w = e4m3 * scale``; what DeepSeek calls ``weight_scale_inv`` is that factor too.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod

from requant.checkpoint import Checkpoint, SourceTensor
from requant.errors import shown
from requant.formats.base import SourceLayer, SourceLayout
from requant.formats.declared import Declared, declared
from requant.formats.float8_layers import (
    EXPONENTS,
    FLOAT8,
    SCALES,
    float8_columns_layer,
    float8_layer,
    tile_of,
)
from requant.formats.float_packings import MxBlocks
from requant.formats.sorting import Sorter

_METHODS = ("fp8", "mxfp8", "fbgemm_fp8")
# Names of the one factor: DeepSeek, vLLM, DeepSeek V4, Mistral.
_ROLES = ("weight_scale_inv", "weight_scale", "scale", "qscale_weight")
_UNREADABLE = ("F8_E5M2", "F8_E5M2FNUZ")


class Fp8:
    """A folder with ``quant_method`` fp8, mxfp8 or fbgemm_fp8, or with FP8 weights and scales."""

    name = "fp8"

    def claims(self, checkpoint: Checkpoint) -> str | None:
        """The config names it; without one, an FP8 weight with a scale beside it tells."""
        found = declared(checkpoint)
        if found is not None:
            known = found.method in _METHODS
            return f"{found.where}: quant_method {found.method}" if known else None
        for name, tensor in checkpoint.tensors.items():
            scale, dtype = _scale_name(checkpoint, name), tensor.info.dtype
            # Plain bytes are FP8 to mx.load; beside a weight_scale other codes are bytes too.
            if scale and dtype in (FLOAT8 if scale.endswith("_scale_inv") else FLOAT8[:2]):
                return f"{name} is {dtype}, with {scale}"
        return None

    def read(self, checkpoint: Checkpoint) -> SourceLayout:
        """Pair each FP8 weight with its scales; everything else is dense."""
        found = declared(checkpoint)
        sorter = Sorter(checkpoint)
        block = _block(found, sorter)
        transposed = found is not None and found.method == "fbgemm_fp8"
        for name, tensor in checkpoint.tensors.items():
            scale = _scale_name(checkpoint, name)
            if tensor.info.dtype in FLOAT8[:2] and scale is None:
                roles = ", ".join(f"{_path(name)}.{role}" for role in _ROLES)
                sorter.problem(name, f"{tensor.info} has no scale; looked for {roles}")
                sorter.claim([name], name)
            elif tensor.info.dtype in _UNREADABLE:
                message = f"{tensor.info}: this dtype has no published use for weights"
                sorter.problem(name, f"{message} and is not read; expected F8_E4M3")
                sorter.claim([name], name)
            elif scale is not None and tensor.info.dtype in (*FLOAT8, "I8"):
                layer = _layer(sorter, tensor, checkpoint.tensors[scale], block, transposed)
                if layer is not None and layer.path == name:  # a stack without .weight
                    layer = replace(layer, name=name)
                sorter.add(layer)
        sorter.drop_runtime_scales()
        _check_scales_alone(sorter)
        if found is not None:
            sorter.check_named_dense(found, ("modules_to_not_convert", "ignored_layers"))
        return sorter.layout()


def _path(name: str) -> str:
    return name.removesuffix(".weight")


def _scale_name(checkpoint: Checkpoint, name: str) -> str | None:
    """The scale that stands beside a weight, under any of its names."""
    path = _path(name)
    if path != name:
        names = [f"{path}.{role}" for role in _ROLES]
    else:  # a stack of experts is no .weight: gate_up_proj beside gate_up_proj_scale_inv
        names = [f"{path}_scale_inv", f"{path}_scale"]
    return next((found for found in names if found in checkpoint.tensors), None)


def _block(found: Declared | None, sorter: Sorter) -> tuple[int, int] | None:
    """``weight_block_size``, checked."""
    block = None if found is None else found.get("weight_block_size")
    if block is None or found is None:
        return None
    if isinstance(block, list) and len(block) == 2:
        high, wide = block
        if all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in block):
            return high, wide
    where = f"{found.where}.weight_block_size"
    sorter.problem(where, f"is {shown(block)}, expected two whole numbers, rows and columns")
    return None


def _layer(
    sorter: Sorter,
    weight: SourceTensor,
    scale: SourceTensor,
    block: tuple[int, int] | None,
    transposed: bool,
) -> SourceLayer | None:
    """One layer, if its tensors fit each other."""
    path, shape, stored = _path(weight.name), weight.info.shape, scale.info.shape
    sorter.claim([weight.name, scale.name], path)
    if len(shape) < 2 or 0 in shape:
        sorter.problem(weight.name, f"{weight.info}, expected a matrix or a stack of matrices")
        return None
    if scale.info.dtype not in SCALES:
        expected = ", ".join(SCALES)
        sorter.problem(scale.name, f"{scale.info}, expected a scale of dtype {expected}")
        return None
    if weight.info.dtype not in FLOAT8:
        return _fp4_layer(sorter, path, weight, scale)
    checkpoint, dtype = sorter.checkpoint, sorter.dtype
    if transposed and len(shape) == 3:
        experts, _, n_out = shape
        if stored not in ((experts, 1, n_out), (experts, n_out, 1)):
            expected_shapes = f"[{experts}, 1, {n_out}] or [{experts}, {n_out}, 1]"
            message = f"{scale.info}, expected {expected_shapes} for {weight.info}"
            sorter.problem(scale.name, f"{message}, stored as fbgemm does: [experts, in, out]")
            return None
        return float8_columns_layer(checkpoint, path, weight, scale, dtype)
    tile = tile_of(shape, stored, block)
    if tile is None:
        high, wide = block or (128, 128)
        grid = [*shape[:-2], -(-shape[-2] // high), -(-shape[-1] // wide)]
        message = f"{scale.info} fits no tiling of {weight.name} {list(shape)}; expected "
        sorter.problem(scale.name, f"{message}{grid} for {high}x{wide} blocks")
        return None
    return float8_layer(checkpoint, path, weight, scale, tile, dtype)


def _fp4_layer(
    sorter: Sorter, path: str, weight: SourceTensor, scale: SourceTensor
) -> SourceLayer | None:
    """DeepSeek V4's experts: two E2M1 elements in a byte that the header calls int8."""
    *leading, n_out, nbytes = weight.info.shape
    groups, ragged = divmod(2 * nbytes, 32)
    expected = (*leading, n_out, groups)
    if ragged or scale.info.shape != expected or scale.info.dtype not in EXPONENTS:
        message = (
            f"{weight.info} is read as packed FP4 (two elements a byte); its scale must be "
            f"F8_E8M0 {list(expected)} then, {scale.name} is {scale.info}"
        )
        sorter.problem(weight.name, message)
        return None
    rows = prod(leading) * n_out
    packing = MxBlocks(rows, 2 * nbytes, n_out, 4, nbytes)
    shape = (*leading, n_out, 2 * nbytes)
    parts = {"weight": weight, "scale": scale}
    return SourceLayer(path, parts, packing.encoding, shape, sorter.dtype, packing, "mxfp4")


def _check_scales_alone(sorter: Sorter) -> None:
    """A scale whose weight is missing, or is no FP8, tells of a damaged checkpoint."""
    for tensor in sorter.left:
        path, _, role = tensor.name.rpartition(".")
        if role in _ROLES[:2] or role == _ROLES[3]:
            weight = sorter.tensors.get(f"{path}.weight")
            what = f"{path}.weight is missing" if weight is None else f"its weight is {weight.info}"
            sorter.problem(tensor.name, f"scales no FP8 weight: {what}")
