"""Find the rows of source layers that an output consists of, and their byte ranges.

A library is shown dense weights. Where its layout only moves whole rows of these, the rows of
codes, scales and biases can be moved in the same way, though they have other sizes in bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod

import numpy as np

from requant.checkpoints.byte_ranges import FileRange
from requant.checkpoints.checkpoint import JoinedTensor, StoredTensor, cut
from requant.core.dtypes import NUMPY_DTYPE, TensorInfo
from requant.formats.base import RowRange, SourceLayer
from requant.formats.matrix_scales import scale_of_each_matrix
from requant.layouts.outputs import ByteCopy

# The most ranges of strided bytes that are read one by one; more are gathered in memory.
MAX_RANGES = 1024


def row_runs(output: ByteCopy, layers: Mapping[str, SourceLayer]) -> tuple[RowRange, ...] | None:
    """The rows of source layers that an output consists of; None if it is not made of whole rows.

    Args:
        output: Its bytes, as ranges of the dense weights that the library was shown.
        layers: Name that the library was shown -> layer.

    Example: ``a`` is a BF16 weight of shape (4, 8), so that a row has 8 * 2 = 16 bytes.

    * ``Extent("a", 16, 48)`` is bytes 16 to 48: rows 1 and 2, ``RowRange(a, start=1, count=2)``.
    * ``Extent("a", 0, 16, stride=32, times=2)`` is bytes 0 to 16 and 32 to 48: rows 0 and 2,
      ``RowRange(a, start=0, count=2, step=2)``.
    * ``Extent("a", 8, 24)`` begins in the middle of row 0: None.
    * Any of them in an output with rows of 4 values instead of 8: None.
    """
    runs: list[RowRange] = []
    for extent in output.extents:
        layer = layers[extent.tensor]
        columns = layer.shape[-1] if len(layer.shape) > 1 else 0
        row_bytes = columns * NUMPY_DTYPE[layer.dtype].itemsize
        if not row_bytes or columns != output.info.shape[-1] or extent.start % row_bytes:
            return None
        count, rest = divmod(extent.stop - extent.start, row_bytes)
        step, uneven = divmod(extent.stride, row_bytes)
        if rest or uneven:
            return None
        if extent.times > 1 and count == 1:
            runs.append(RowRange(layer, extent.start // row_bytes, extent.times, step))
        elif extent.times > MAX_RANGES:
            return None
        else:
            runs += [RowRange(layer, start // row_bytes, count) for start, _ in extent.ranges]
    return tuple(runs)


def row_byte_ranges(run: RowRange, role: str) -> Iterator[FileRange]:
    """The byte ranges of these rows in one part of a quantized layer.

    Example: codes of 4 bits in a layer of shape (4, 8) have 4 bytes a row, so that
    ``RowRange(a, start=1, count=2)`` is bytes 4 to 12 of ``a.weight``; with ``step=2`` it is rows 1
    and 3, bytes 4 to 8 and 12 to 16.
    """
    part = run.layer.parts[role]
    row_bytes = part.info.nbytes // prod(run.layer.shape[:-1])
    if run.step == 1:
        yield from cut(part, run.start * row_bytes, (run.start + run.count) * row_bytes)
        return
    for row in range(run.start, run.start + run.count * run.step, run.step):
        yield from cut(part, row * row_bytes, (row + 1) * row_bytes)


def coalesced_tensor(
    name: str, info: TensorInfo, ranges: Iterator[FileRange]
) -> StoredTensor | JoinedTensor:
    """A tensor of these bytes; ranges that follow each other in a file become one.

    Example: bytes 0 to 8, 8 to 16 and 32 to 40 of one file become 0 to 16 and 32 to 40.
    """
    joined: list[FileRange] = []
    for piece in ranges:
        last = joined[-1] if joined else None
        if last and (last.file, last.offset + last.nbytes) == (piece.file, piece.offset):
            joined[-1] = FileRange(last.file, last.offset, last.nbytes + piece.nbytes)
        elif piece.nbytes:
            joined.append(piece)
    if len(joined) == 1:
        return StoredTensor(name, info, joined[0].file, joined[0].offset)
    return JoinedTensor(name, info, tuple(joined))


def in_whole_units(run: RowRange) -> bool:
    """Whether a packed layer can give these rows alone.

    Example: a packing that stores 8 rows a word, in matrices of 20 rows, has ``row_unit`` 8; a
    matrix may begin in any row 0, 8, 16 or 20. Rows 8 to 20 are whole units, rows 4 to 8 are not.
    """
    packing = run.layer.packing
    if packing is None:
        return True
    if run.step > 1:
        return packing.row_unit == 1
    # The end of a matrix, 20 % 20 = 0, is the end of a unit too.
    ends = run.start % packing.matrix_rows, (run.start + run.count) % packing.matrix_rows
    return not any(row % packing.row_unit for row in ends)


def stacked_global_scales(
    path: str, shape: tuple[int, ...], runs: Sequence[RowRange]
) -> StoredTensor | JoinedTensor | None:
    """The global scales of a stack, one F32 a matrix; None where rows of two meet in one.

    Args:
        path: Of the stack.
        shape: ``(..., out, in)``.
        runs: The rows that it consists of; each layer has a part ``global_scale``.
    """
    matrices = shape[0] if len(shape) > 2 else 1
    scales = scale_of_each_matrix(runs, prod(shape[:-1]) // matrices, _rows_per_global_scale)
    if scales is None:
        return None
    ranges = (
        piece
        for scale in scales
        for piece in cut(scale.layer.parts["global_scale"], 4 * scale.index, 4 * scale.index + 4)
    )
    return coalesced_tensor(f"{path}.global_scale", TensorInfo("F32", (matrices,)), ranges)


def strided_view(values: np.ndarray, start: int, run: int, stride: int, count: int) -> np.ndarray:
    """A view of ``count`` runs of ``run`` bytes, ``stride`` apart, from byte ``start`` on."""
    assert start + (count - 1) * stride + run <= values.size
    shape, strides = (count, run), (stride, 1)
    return np.lib.stride_tricks.as_strided(values[start:], shape, strides, writeable=False)


def _rows_per_global_scale(layer: SourceLayer) -> int:
    return prod(layer.shape[:-1]) // layer.parts["global_scale"].info.size
