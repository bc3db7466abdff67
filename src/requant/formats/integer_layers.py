"""Layers of integer codes of any tool: their encoding, or why MLX has none for them."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from requant.core.dtypes import TensorInfo
from requant.core.reasons import Reason, ReasonCode
from requant.core.sharing import shared
from requant.formats.base import SourceLayer, Tensors, packed_layer, scale_dtype
from requant.formats.tensor_sorter import TensorSorter
from requant.packings.base import IntegerPacking
from requant.packings.compressed_tensors import Zeros

_SMALLEST_GROUP = 8


def groups_of(n_in: int, scales: int) -> list[int]:
    """The groups that ``scales`` scales of a row may represent: equal parts, or a power of two.

    The last group of a power of two may be short.
    """
    if scales < 1:
        return []
    if scales == 1:
        return [n_in]
    found = [n_in // scales] if n_in % scales == 0 else []
    group = _SMALLEST_GROUP
    while group < n_in:
        if -(-n_in // group) == scales and group not in found:
            found.append(group)
        group *= 2
    return found


def row_fields(
    shape: Sequence[int],
    scale: TensorInfo,
    scale_rows: int,
    *,
    bits: int = 8,
    group: int | None = None,
    zero_points: Zeros = Zeros.MIDDLE,
) -> dict[str, Any]:
    """The arguments of ``CtPlain`` and ``CtPacked`` for codes ``(..., out, in)``.

    ``scale_rows`` rows share their scales; without ``group`` a row has one.
    """
    return {
        "rows": prod(shape[:-1]),
        "columns": shape[-1],
        "bits": bits,
        "group": shape[-1] if group is None else group,
        "symmetric": zero_points is Zeros.MIDDLE,
        "scale_dtype": scale.dtype,
        "matrix": shape[-2],
        "scale_rows": scale_rows,
        "scale_width": scale.shape[-1] if scale.shape else 1,
        "zero_points": zero_points,
    }


def integer_layer(
    sorter: TensorSorter,
    path: str,
    parts: Tensors,
    shape: tuple[int, ...],
    packing: IntegerPacking,
    tool: str,
    scales: str = "a scale a row",
) -> SourceLayer:
    """Describe a layer of integer codes, ``(..., out, in)``.

    The words for how it is stored begin with ``tool``, and call scales that are not one a group
    ``scales``.
    """
    packing = shared(packing)
    group = f"g{packing.group}" if packing.groups > 1 else scales
    reason = None
    if packing.encoding is None:
        text = f"no group of MLX's fits groups of {packing.group} in {packing.columns} inputs"
        reason = Reason(ReasonCode.NO_MLX_GROUP, text)
    dtype = scale_dtype(packing.scale_dtype, sorter.dtype)
    stored = f"{tool} {packing.bits}-bit {group}"
    return packed_layer(path, parts, shape, packing, dtype=dtype, stored=stored, reason=reason)
