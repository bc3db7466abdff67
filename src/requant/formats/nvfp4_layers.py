"""NVFP4 layers of any tool: whether MLX's nvfp4 holds them, without their tensor scale or with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod

import ml_dtypes
import numpy as np

from requant.checkpoints.checkpoint import Checkpoint, SourceTensor
from requant.core.dtypes import KERNEL_FLOATS
from requant.core.reasons import Note, NoteCode, Reason, ReasonCode
from requant.formats.base import DefaultPolicy, RowRange, SourceLayer, fallback_for, packed_layer
from requant.formats.matrix_scales import MatrixScale, scale_of_each_matrix
from requant.formats.tensor_sorter import LayerError, TensorSorter, unexpected
from requant.packings.floats import NVFP4, GlobalScales, NvBlocks, apply_tensor_scale, fold_e4m3
from requant.text import format_value

_STORED = "nvfp4 with a tensor scale"
_ENDINGS = (".weight_global_scale", ".weight_scale_2")
_LARGEST = 448.0
_BARE = Note(
    NoteCode.NO_TENSOR_SCALE,
    "Stacks in NVFP4 have no tensor scale: their values are element * group scale.",
)
_REASON = Reason(ReasonCode.TENSOR_SCALE, "MLX's nvfp4 has no place for its tensor scale")


def nvfp4_layer(
    sorter: TensorSorter,
    path: str,
    weight: SourceTensor,
    scale: SourceTensor,
    tensor_scale: SourceTensor | None,
    *,
    divides: bool,
) -> SourceLayer:
    """Describe an NVFP4 layer.

    The tensor scale folds into the group scales where each product is an E4M3 number again.
    Only a power of two can do that for all of them, so the group scales are read for no other.

    ``weight`` is bytes ``(..., out, in / 2)``, ``scale`` E4M3 ``(..., out, in / 16)``, and
    ``tensor_scale`` one number, one for each matrix, or for stacks one each for gate and up,
    ``(experts, 2)``. Group scales are multiplied with it, or divided as in compressed-tensors.

    Raises:
        LayerError: The tensor scale is not what it should be.
    """
    *leading, n_out, nbytes = weight.info.shape
    shape = (*leading, n_out, 2 * nbytes)
    parts = {"weight": weight, "scale": scale}
    matrices = prod(leading)
    halves = tensor_scale is not None and tensor_scale.info.shape == (*leading, 2)
    if halves and matrices > 1 and n_out % 2 == 0:  # gate and up of a stack, one number each
        matrices *= 2
    packing = NvBlocks(prod(leading) * n_out, 2 * nbytes, prod(leading) * n_out // matrices)
    bare = packed_layer(path, parts, shape, packing, dtype=sorter.dtype, stored="nvfp4")
    bare = replace(bare, encoding=NVFP4, policy=DefaultPolicy())
    if tensor_scale is None:
        return bare
    factors = _factors(sorter, tensor_scale, matrices)
    info = tensor_scale.info
    exact = _folds(sorter.checkpoint, scale, factors, divides)
    width = info.shape[-1] if info.shape else 1
    packing = replace(
        packing, tensor_scales=info.size, tensor_scale_width=width, divides=divides, exact=exact
    )
    scaled = replace(bare, parts={**parts, "tensor_scale": tensor_scale}, packing=packing)
    if exact:
        return scaled
    policy = DefaultPolicy(fallback=fallback_for(2 * nbytes), reason=_REASON)
    return replace(scaled, encoding=None, stored_description=_STORED, policy=policy)


def nvfp4_without_tensor_scale(
    sorter: TensorSorter, path: str, weight: SourceTensor, scale: SourceTensor, missing: str
) -> SourceLayer:
    """Describe a stack of NVFP4 matrices whose group scales are all there is.

    Tools that write a tensor scale choose it so that the largest group scale of a matrix is 448,
    E4M3's largest number. A stack whose scales reach that has lost its tensor scale, and so has
    one in a folder where others have theirs, and any single matrix.

    Weight and scale are as in ``nvfp4_layer``; ``missing`` is the name that a tensor scale has.

    Raises:
        LayerError: The layer has lost its tensor scale.
    """
    message = f"has E4M3 scales of NVFP4, but no {missing}"
    other = next((x for end in _ENDINGS for x in sorter.parts if x.endswith(end)), None)
    if len(sorter.checkpoint.tensors[weight.name].info.shape) < 3:
        raise LayerError(path, message, unknown=True)
    if other is not None:
        theirs = f"other layers have theirs ({sorter.parts[other].name})"
        raise LayerError(path, f"{message}; {theirs}", unknown=True)
    stored = sorter.checkpoint.read_small_tensor(scale.name).view(ml_dtypes.float8_e4m3fn)
    if (np.abs(stored.astype(np.float32)) >= _LARGEST).any():
        why = f"and scales of {_LARGEST:g}, as only a tensor scale leaves them"
        message = f"{message}, {why}: the source is incomplete"
        raise LayerError(path, message, unknown=True)
    if _BARE not in sorter.notes:
        sorter.notes.append(_BARE)
    return nvfp4_layer(sorter, path, weight, scale, None, divides=False)


def _factors(sorter: TensorSorter, tensor_scale: SourceTensor, matrices: int) -> np.ndarray:
    """The tensor scales, float32, one or one for each matrix."""
    info = tensor_scale.info
    if info.dtype not in KERNEL_FLOATS or info.size not in (1, matrices):
        each = f", or one for each of {matrices} matrices" if matrices > 1 else ""
        raise unexpected(tensor_scale, f"one F32{each}")
    stored = sorter.checkpoint.read_small_tensor(tensor_scale.name)
    factors = stored.astype(np.float32).reshape(-1)
    sound = np.isfinite(factors) & (factors > 0)
    if not sound.all():
        bad = format_value(float(factors[~sound][0]))
        raise LayerError(tensor_scale.name, f"holds {bad}, expected a finite number above 0")
    return factors


def has_tensor_scale(layer: SourceLayer) -> bool:
    """Whether a layer is NVFP4 whose group scales are not all there is."""
    return isinstance(layer.packing, NvBlocks) and layer.packing.tensor_scales > 0


def kept_separate(
    layer: SourceLayer, path: str, shape: tuple[int, ...], runs: Sequence[RowRange]
) -> SourceLayer | None:
    """A stack of NVFP4 matrices with a tensor scale each, as MLX's nvfp4 with a global scale.

    None where rows of two tensor scales meet in one matrix. ``layer`` is the first of the source's
    layers, which all have a tensor scale; path and shape are those of the stack.
    """
    scales = scale_of_each_matrix(runs, shape[-2], _rows_per_tensor_scale)
    if scales is None:
        return None
    pieces = tuple(replace(run, layer=_separate(run.layer)) for run in runs)
    return replace(
        layer,
        path=path,
        name="",
        shape=shape,
        encoding=NVFP4,
        policy=replace(layer.policy, fallback=None, reason=None),
        stored_description=_STORED,
        row_ranges=pieces,
        global_scale=tuple(_as_rows(scales)),
    )


def _separate(layer: SourceLayer) -> SourceLayer:
    assert isinstance(layer.packing, NvBlocks)
    packing = replace(layer.packing, separate=True, exact=False)
    return replace(layer, packing=packing, encoding=NVFP4)


def _rows_per_tensor_scale(layer: SourceLayer) -> int:
    packing = layer.packing
    assert isinstance(packing, NvBlocks)
    return packing.matrix if packing.tensor_scales > 1 else packing.rows


def _as_rows(scales: Sequence[MatrixScale]) -> tuple[RowRange, ...]:
    """The same numbers as rows of the tensors that hold them, neighbours in one run."""
    runs: list[RowRange] = []
    for scale in scales:
        last = runs[-1] if runs else None
        if last and (last.layer.path, last.start + last.count) == (scale.layer.path, scale.index):
            runs[-1] = replace(last, count=last.count + 1)
        else:
            runs.append(RowRange(_numbers(scale.layer), scale.index, 1))
    return tuple(runs)


def _numbers(layer: SourceLayer) -> SourceLayer:
    """The tensor scales of a layer, as a layer of their own."""
    packing = layer.packing
    assert isinstance(packing, NvBlocks)
    scales = GlobalScales(packing.tensor_scales, packing.tensor_scale_width, packing.divides)
    parts = {"tensor_scale": layer.parts["tensor_scale"]}
    shape = (packing.tensor_scales,)
    return SourceLayer(
        path=layer.path, parts=parts, encoding=None, shape=shape, dtype="F32", packing=scales
    )


def _folds(checkpoint: Checkpoint, scale: SourceTensor, factors: np.ndarray, divides: bool) -> bool:
    """Whether every group scale stays an E4M3 number under its tensor scale."""
    if (factors == 1).all():
        return True
    if (np.frexp(factors)[0] != 0.5).any():
        return False
    groups = checkpoint.read_small_tensor(scale.name).view(ml_dtypes.float8_e4m3fn)
    each = groups.astype(np.float32).reshape(factors.size, -1)
    return fold_e4m3(apply_tensor_scale(each, factors[:, None], divides)) is not None
