"""Compare the values of two layers of a checkpoint, read piece by piece.

The comparison stops at the first difference, so that different matrices cost one small read each.
"""

from __future__ import annotations

import numpy as np

from requant.checkpoints.checkpoint import Checkpoint, ComputedTensor, SourceTensor, cut
from requant.core.dtypes import FLOATS, HEADER_NAME, NUMPY_DTYPE
from requant.formats import SourceLayer

# Two different matrices mostly differ in the first piece. Later ones are larger, up to a limit.
_FIRST_VALUES = 1 << 15
_MOST_VALUES = 1 << 22


def same_values(checkpoint: Checkpoint, one: SourceLayer, other: SourceLayer) -> bool:
    """Whether two layers hold equal values.

    Dense layers are compared value by value, whatever their dtypes; quantized ones are equal
    where their codes, scales and all other parts are. Layers stored in two ways are different.
    """
    key = f"{one.path} = {other.path}"
    compared = checkpoint.opened.compared
    if key not in compared:
        compared[key] = _compare(checkpoint, one, other)
    return compared[key]


def _compare(checkpoint: Checkpoint, one: SourceLayer, other: SourceLayer) -> bool:
    if one.shape != other.shape or one.parts.keys() != other.parts.keys():
        return False
    if (one.encoding, one.packing) != (other.encoding, other.packing):
        return False
    pairs = [(one.parts[role], other.parts[role]) for role in one.parts]
    coded = one.is_quantized or other.is_quantized
    if any(a.info != b.info and (coded or not _are_floats(a, b)) for a, b in pairs):
        return False
    return all(_same_tensor(checkpoint, a, b) for a, b in pairs)


def _are_floats(one: SourceTensor, other: SourceTensor) -> bool:
    same_shape = one.info.shape == other.info.shape
    return same_shape and {one.info.dtype, other.info.dtype} <= {*FLOATS}


def _same_tensor(checkpoint: Checkpoint, one: SourceTensor, other: SourceTensor) -> bool:
    if isinstance(one, ComputedTensor) or isinstance(other, ComputedTensor):
        return False
    if one.ranges == other.ranges:
        return True
    dtypes = NUMPY_DTYPE[one.info.dtype], NUMPY_DTYPE[other.info.dtype]
    start, values = 0, _FIRST_VALUES
    while start < one.info.size:
        stop = min(start + values, one.info.size)
        a, b = (
            np.frombuffer(_read(checkpoint, tensor, start * x.itemsize, stop * x.itemsize), x)
            for tensor, x in zip((one, other), dtypes, strict=True)
        )
        if not _equal(a, b):
            return False
        start, values = stop, min(4 * values, _MOST_VALUES)
    return True


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    if a.dtype == b.dtype and a.tobytes() == b.tobytes():
        return True  # NaN too, where it is the same
    if not {HEADER_NAME[a.dtype], HEADER_NAME[b.dtype]} <= {*FLOATS}:
        return False  # codes and the like are equal bit for bit
    wide = np.float64 if np.dtype(np.float64) in (a.dtype, b.dtype) else np.float32
    return bool(np.array_equal(a.astype(wide), b.astype(wide)))


def _read(checkpoint: Checkpoint, tensor: SourceTensor, start: int, stop: int) -> bytes:
    """Bytes ``start`` to ``stop`` of a tensor."""
    return b"".join(map(checkpoint.opened.read_range, cut(tensor, start, stop)))
