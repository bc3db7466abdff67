"""NVFP4 layers of any tool: whether MLX's nvfp4 holds them without their tensor scale."""

from __future__ import annotations

from math import prod

import ml_dtypes
import numpy as np

from requant.checkpoint import Checkpoint, SourceTensor
from requant.formats.base import SourceLayer, fallback_for
from requant.formats.float_packings import NVFP4, NvBlocks, apply_tensor_scale, fold_e4m3
from requant.formats.sorting import Sorter

_REASON = "MLX's nvfp4 has no place for its tensor scale"


def nvfp4_layer(
    checkpoint: Checkpoint,
    sorter: Sorter,
    path: str,
    weight: SourceTensor,
    scale: SourceTensor,
    tensor_scale: SourceTensor | None,
    *,
    divides: bool,
) -> SourceLayer | None:
    """Describe an NVFP4 layer, or report what is wrong with its tensor scale.

    The tensor scale folds into the group scales where each product is an E4M3 number again.
    Only a power of two can do that for all of them, so the group scales are read for no other.

    Args:
        checkpoint: For the scales.
        sorter: Takes the problems.
        path: Layer path.
        weight: Bytes ``(..., out, in / 2)``.
        scale: E4M3 ``(..., out, in / 16)``.
        tensor_scale: One number, or one for each matrix; None where there is none.
        divides: Whether group scales are divided by it, as compressed-tensors does.
    """
    *leading, n_out, nbytes = weight.info.shape
    shape = (*leading, n_out, 2 * nbytes)
    rows, matrices = prod(leading) * n_out, prod(leading)
    parts = {"weight": weight, "scale": scale}
    if tensor_scale is None:
        plain = NvBlocks(rows, 2 * nbytes, n_out)
        return SourceLayer(path, parts, NVFP4, shape, sorter.dtype, plain, "nvfp4")
    info = tensor_scale.info
    if info.dtype not in ("F32", "BF16", "F16") or info.size not in (1, matrices):
        each = f", or one for each of {matrices} experts" if matrices > 1 else ""
        sorter.problem(tensor_scale.name, f"{info}, expected one F32{each}")
        return None
    factors = checkpoint.peek(tensor_scale.name).astype(np.float32).reshape(-1)
    if not (np.isfinite(factors) & (factors > 0)).all():
        worst = factors[~(np.isfinite(factors) & (factors > 0))][0]
        message = f"holds {worst}, expected a finite number above 0"
        sorter.problem(tensor_scale.name, message)
        return None
    parts["tensor_scale"] = tensor_scale
    width = info.shape[-1] if info.shape else 1
    exact = _folds(checkpoint, scale, factors, divides)
    packing = NvBlocks(rows, 2 * nbytes, n_out, info.size, width, divides, exact)
    if exact:
        return SourceLayer(path, parts, NVFP4, shape, sorter.dtype, packing, "nvfp4")
    return SourceLayer(
        path,
        parts,
        None,
        shape,
        sorter.dtype,
        packing,
        "nvfp4 with a tensor scale",
        fallback_for(2 * nbytes),
        _REASON,
    )


def _folds(checkpoint: Checkpoint, scale: SourceTensor, factors: np.ndarray, divides: bool) -> bool:
    """Whether every group scale stays an E4M3 number under its tensor scale."""
    if (factors == 1).all():
        return True
    if (np.frexp(factors)[0] != 0.5).any():
        return False
    groups = checkpoint.peek(scale.name).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    each = groups.reshape(factors.size, -1)
    return fold_e4m3(apply_tensor_scale(each, factors[:, None], divides)) is not None
