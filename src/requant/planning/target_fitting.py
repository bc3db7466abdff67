"""Fit a requested quantization to a layer: whether it can take it, and with which group size.

Pure functions of shapes, dtypes and names; ``target_selection`` decides what is requested.
"""

from __future__ import annotations

import re
from dataclasses import replace

from requant.core.dtypes import FLOATS, KERNEL_FLOATS
from requant.core.reasons import Reason, ReasonCode
from requant.formats import SourceLayer
from requant.quantization.config import Quantization, QuantMode
from requant.quantization.roles import ROLES

Fit = tuple[Quantization | None, Reason | None]
"""The quantization that a layer can take, None for dense; and why it differs from the request."""

# Layers that stay dense unless an override names them: (reason, pattern on the layer path).
# They are small, or no matrix product reads them.
_POSITIONS = r"(^|\.)wpe$|pos(ition)?_?emb|embed_positions|relative_.*bias|rotary"
_DENSE_BY_NAME = (
    (Reason(ReasonCode.CONVOLUTION, "convolution"), re.compile(r"conv")),
    (Reason(ReasonCode.NORM, "norm"), re.compile(r"norm|(^|[._])ln(_|\d|$)")),
    (Reason(ReasonCode.ROUTER, "router"), re.compile(ROLES["router"])),
    (Reason(ReasonCode.POSITION_TABLE, "position table"), re.compile(_POSITIONS)),
)


def fit_dense_layer(
    layer: SourceLayer, requested: Quantization, dtype: str | None, *, any_name: bool = False
) -> Fit:
    """Fit a quantization to a layer that the source stores dense.

    Values are cast to ``dtype`` first, unless it is None. With ``any_name``, layers are quantized
    too that stay dense because of their names.
    """
    shape = layer.shape
    if len(shape) < 2:
        return None, None
    if not layer.is_weight:
        return None, Reason(ReasonCode.NOT_A_WEIGHT, "not named .weight")
    for reason, pattern in _DENSE_BY_NAME:
        if pattern.search(layer.path) and not any_name:
            return None, reason
    if len(shape) > 3:
        text = f"rank {len(shape)}, taken for a convolution"
        return None, Reason(ReasonCode.UNSUPPORTED_RANK, text)
    if layer.dtype not in FLOATS or (layer.dtype not in KERNEL_FLOATS and dtype is None):
        text = f"dtype {layer.dtype} cannot be quantized"
        return None, Reason(ReasonCode.UNSUPPORTED_DTYPE, text)
    if 0 in shape:
        return None, Reason(ReasonCode.EMPTY, "empty")
    return fit_group_size(shape[-1], requested)


def fit_codes(layer: SourceLayer, requested: Quantization, *, own_groups: bool) -> Fit:
    """Fit a quantization to a layer that the source stores quantized.

    With ``own_groups``, no group size was requested: the layer takes the source's where its codes
    then stay as they are.
    """
    target, reason = fit_group_size(layer.shape[-1], requested)
    if target is None or layer.encoding is None or not own_groups or layer.rotation_tensors:
        return target, reason
    own = replace(target, group_size=layer.encoding.group_size)
    if layer.keeps_codes(target) or not layer.keeps_codes(own):
        return target, reason
    text = f"no group size was asked for: keeps its codes in groups of {own.group_size}"
    return own, Reason(ReasonCode.SOURCE_GROUP_SIZE, text)


def fit_group_size(n_in: int, requested: Quantization) -> Fit:
    """Fit a quantization to ``n_in`` inputs: with the largest group size that divides them.

    Affine quantization takes a smaller group size than requested; the other modes have one each.
    """
    if n_in % requested.group_size == 0:
        return requested, None
    if requested.mode is QuantMode.AFFINE:
        for group_size in (64, 32):
            if group_size < requested.group_size and n_in % group_size == 0:
                text = f"last axis {n_in} takes group {group_size}, not {requested.group_size}"
                reason = Reason(ReasonCode.SMALLER_GROUP_SIZE, text)
                return Quantization(group_size, requested.bits, requested.mode), reason
    text = f"last axis {n_in} is not a multiple of group {requested.group_size} or a smaller one"
    return None, Reason(ReasonCode.NO_GROUP_SIZE, text)
