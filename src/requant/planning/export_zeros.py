"""Read the scales and biases of a layer while an export is planned, block by block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod

import numpy as np

from requant.checkpoints.checkpoint import Checkpoint, ComputedTensor, SourceTensor, cut
from requant.core.dtypes import NUMPY_DTYPE
from requant.formats import SourceLayer
from requant.packings.base import Array, IntegerPacking, Rect
from requant.packings.half_groups import HalfGroups, examine_halves
from requant.packings.zero_points import ZeroPoints, examine_zeros

_BLOCK_VALUES = 1 << 20  # scales, and as many biases, that are held at a time
_BLOCK_BYTES = 32 << 20  # of a packed layer


def stored_scale_dtype(layer: SourceLayer) -> str:
    """Header name of the dtype that the affine scales of a layer have in the source."""
    if layer.packing is None:
        return layer.parts["scales"].info.dtype
    if isinstance(layer.packing, IntegerPacking):
        return layer.packing.scale_dtype
    return layer.dtype


def read_zeros(source: Checkpoint, layer: SourceLayer, written: str) -> ZeroPoints:
    """Read the zero points of an affine layer whose scales are written as ``written``.

    Of a packed layer scales and biases are compared in float32, in which ``-zero * scale`` does not
    round.
    """
    assert layer.encoding is not None
    bits, dtype, found = layer.encoding.bits, stored_scale_dtype(layer), ZeroPoints()
    for scales, biases in group_blocks(source, layer):
        found = found.merged(examine_zeros(scales, biases, bits, dtype, written))
    return found


def read_halves(source: Checkpoint, layer: SourceLayer) -> HalfGroups:
    """Read how well float16 numbers describe the scales and biases of an affine layer."""
    found = HalfGroups()
    for scales, biases in group_blocks(source, layer):
        found = found.merged(examine_halves(scales, biases))
    return found


def group_blocks(source: Checkpoint, layer: SourceLayer) -> Iterator[tuple[Array, Array]]:
    """The scales and biases of an affine layer, block by block; of a packed one in float32."""
    return _stored(source, layer) if layer.packing is None else _repacked(source, layer)


def _stored(source: Checkpoint, layer: SourceLayer) -> Iterator[tuple[Array, Array]]:
    scales, biases = layer.parts["scales"], layer.parts["biases"]
    for start in range(0, scales.info.size, _BLOCK_VALUES):
        stop = min(start + _BLOCK_VALUES, scales.info.size)
        yield _values(source, scales, start, stop), _values(source, biases, start, stop)


def _values(source: Checkpoint, tensor: SourceTensor, start: int, stop: int) -> Array:
    """Values ``start`` to ``stop`` of a tensor, flat."""
    dtype = NUMPY_DTYPE[tensor.info.dtype]
    ranges = list(cut(tensor, start * dtype.itemsize, stop * dtype.itemsize))
    return np.frombuffer(b"".join(source.opened.read_ranges(ranges)), dtype)


def _repacked(source: Checkpoint, layer: SourceLayer) -> Iterator[tuple[Array, Array]]:
    packing, encoding = layer.packing, layer.encoding
    assert packing is not None and encoding is not None
    rows, columns = prod(layer.shape[:-1]), layer.shape[-1]
    nbytes = sum(part.info.nbytes for part in layer.parts.values())
    step = max(_BLOCK_BYTES * rows // max(nbytes, 1) // packing.row_unit, 1) * packing.row_unit
    for matrix in range(0, rows, packing.matrix_rows):
        end = matrix + packing.matrix_rows
        for start in range(matrix, end, step):
            stop = min(start + step, end)
            shapes = (stop - start, columns // encoding.group_size)
            if isinstance(packing, IntegerPacking):
                rects = packing.group_rects(start, stop)
                parts = _read(source, layer, rects)
                scales = np.asarray(packing.scales(parts, start, stop), np.float32)
                yield scales, packing.biases(parts, start, stop, scales)
                continue
            parts = _read(source, layer, packing.required_rects(start, stop))
            made = {role: np.empty(shapes, np.float32) for role in ("scales", "biases")}
            made["weight"] = np.empty((stop - start, columns * encoding.bits // 32), np.uint32)
            packing.repack(parts, start, stop, made, _Scratch())
            yield made["scales"], made["biases"]


class _Scratch:
    """Memory for one block."""

    def take(self, role: str, dtype: str, rows: int, row_bytes: int) -> Array:
        return np.empty(rows * row_bytes, np.uint8).view(NUMPY_DTYPE[dtype]).reshape(rows, -1)


def _read(source: Checkpoint, layer: SourceLayer, rects: Mapping[str, Rect]) -> dict[str, Array]:
    """The rectangles of the parts of a layer."""
    found = {}
    for role, rect in rects.items():
        tensor = layer.parts[role]
        assert not isinstance(tensor, ComputedTensor)
        width = tensor.info.shape[-1] if tensor.info.shape else 1
        first, last = (row * width for row in rect.rows)
        rows = _values(source, tensor, first, last).reshape(-1, width)
        found[role] = np.ascontiguousarray(rows[:, slice(*rect.columns)])
    return found
