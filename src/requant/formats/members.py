"""Layers that consist of several kinds of layers: the encoding that holds the codes of all.

The experts of a stack, or the parts of a fused projection, may have other groups, widths or
tools. Codes are moved into the smallest group and the widest code that occur; what no such
encoding holds is encoded with 8 bits, and the other members are moved all the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from requant.core.dtypes import KERNEL_FLOATS
from requant.core.reasons import Reason, ReasonCode
from requant.formats.base import DefaultPolicy, RowRange, SourceLayer, fallback_for
from requant.formats.widening import stored_rows
from requant.packings.base import mlx_group
from requant.quantization.config import Quantization, QuantMode

MEMBERS_MOVED = Reason(
    ReasonCode.MEMBERS_MOVED,
    "members differ: the codes of all in the widest code and the smallest group",
)
MEMBERS_REENCODED = Reason(
    ReasonCode.MEMBERS_REENCODED,
    "members differ: codes are moved, and what has none that fit gets 8 bits",
)


def members_joined(
    path: str, shape: tuple[int, ...], runs: Sequence[RowRange]
) -> SourceLayer | None:
    """Make a layer ``(..., out_features, in_features)`` of rows that are stored differently.

    None where its rows cannot be distinguished: members whose inputs have other rotations, NVFP4
    with a global scale.
    """
    members = list({run.layer.path: run.layer for run in runs}.values())
    if not all(map(_has_rows, members)):
        return None
    encoding = common_encoding([x.encoding for x in members])
    rotations = {tuple(part.name for part in x.rotation_tensors.values()) for x in members}
    if len(rotations) > 1 or (any(rotations) and encoding is None):
        return None
    fallback = None if encoding is not None else reencoded(members, shape[-1])
    if encoding is None and fallback is None:
        return None
    dtypes = {x.dtype for x in members}
    packed = [replace(run, layer=_packed(run.layer)) for run in runs]
    reason = MEMBERS_MOVED if encoding is not None else MEMBERS_REENCODED
    choices = (x.policy.requires_choice for x in members)
    policy = DefaultPolicy(
        fallback=fallback,
        reason=reason if len(members) > 1 else packed[0].layer.policy.reason,
        requires_choice=next(filter(None, choices), ""),
        act_order=any(x.policy.act_order for x in members),
    )
    return replace(
        packed[0].layer,
        path=path,
        encoding=encoding,
        shape=shape,
        dtype=dtypes.pop() if len(dtypes) == 1 else "F32",
        stored_description=" and ".join(dict.fromkeys(x.stored_as for x in members)),
        policy=policy,
        row_order=None,
        row_ranges=tuple(packed),
        name="",
        as_named=None,
    )


def in_float32(layer: SourceLayer) -> SourceLayer:
    """The layer with its values, and its scales in the output, in float32."""
    if layer.packing is None and not layer.is_quantized:
        layer = replace(layer, packing=stored_rows(layer))
    return replace(layer, dtype="F32")


def common_encoding(encodings: Iterable[Quantization | None]) -> Quantization | None:
    """The smallest encoding that holds the codes of all; None where there is none."""
    found = list(dict.fromkeys(encodings))
    known = [x for x in found if x is not None]
    if not known or len(known) < len(found):
        return None
    affine = Quantization.affine(min(x.group_size for x in known), max(x.bits for x in known))
    return next((x for x in (*known, affine) if all(map(x.holds, known))), None)


def reencoded(members: Iterable[SourceLayer], n_in: int) -> Quantization | None:
    """The default target of layers that must be requantized: 8 bits.

    Groups are not made larger. None where no group of MLX divides ``n_in``, the inputs of the
    result.
    """
    groups = [x.default_target.group_size for x in members if x.default_target is not None]
    fallback = fallback_for(n_in)
    if fallback is None or not groups:
        return None
    group = mlx_group(max(min(*groups, fallback.group_size), 32), n_in)
    return None if group is None else Quantization.affine(group, 8)


def recomputed(members: Sequence[SourceLayer], n_in: int) -> Quantization | None:
    """As ``reencoded``, of values that were computed; where all were mxfp8 it may hold them."""
    kept = {x.policy.fallback if x.rotation_tensors else x.default_target for x in members}
    only = kept.pop() if len(kept) == 1 else None
    if only is not None and only.mode is QuantMode.MXFP8 and n_in % only.group_size == 0:
        return only
    return reencoded(members, n_in)


def _has_rows(layer: SourceLayer) -> bool:
    """Whether rows of a layer can be decoded, or their codes moved, one by one."""
    if layer.packing is not None:
        return True
    if layer.encoding is None:
        return layer.dtype in KERNEL_FLOATS
    return "global_scale" not in layer.parts


def _packed(layer: SourceLayer) -> SourceLayer:
    """The layer with a packing, which those that are stored as MLX's lack."""
    return layer if layer.packing is not None else replace(layer, packing=stored_rows(layer))
