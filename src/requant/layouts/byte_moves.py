"""The rules by which MLX's primitives move bytes: which bytes of the inputs an output consists of.

Each rule takes a primitive's arguments, inputs and outputs as ``mx.export_function`` reports them,
and returns for each output its bytes as ranges of the inputs of the traced function, or None where
the output is not moved bytes.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, product
from math import prod
from typing import Any

import mlx.core as mx

from requant.layouts.outputs import Extent

# A tensor in more pieces than this is computed: a plan would hold one entry for each.
MAX_PIECES = 1024

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Traced:
    """One array of the traced function.

    Attributes:
        shape: Its shape.
        dtype: Its MLX dtype.
        pieces: Its bytes in row-major order, as ranges of inputs; None if it is computed.
        sources: The inputs that it needs, in the order in which they come up.
    """

    shape: Shape
    dtype: mx.Dtype
    pieces: tuple[Extent, ...] | None
    sources: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return prod(self.shape) * self.dtype.size


_Arrays = Sequence[Traced]
_Moved = Sequence[tuple[Extent, ...] | None]
ByteMoveRule = Callable[[Sequence[Any], _Arrays, _Arrays], _Moved]


def _same_bytes(arguments: Sequence[Any], inputs: _Arrays, outputs: _Arrays) -> _Moved:
    """Another shape (or, for View, dtype) of the same bytes."""
    (value,), (output,) = inputs, outputs
    return [value.pieces if value.nbytes == output.nbytes else None]


def _as_type(arguments: Sequence[Any], inputs: _Arrays, outputs: _Arrays) -> _Moved:
    (value,), (output,) = inputs, outputs
    return [value.pieces if value.dtype == output.dtype else None]


def _transpose(arguments: Sequence[Any], inputs: _Arrays, outputs: _Arrays) -> _Moved:
    """Moving axes of length 1 leaves the bytes alone."""
    ((value,), (axes,)) = inputs, arguments
    rank = len(value.shape)
    long = [axis % rank for axis in axes if value.shape[axis] != 1]
    return [value.pieces if long == sorted(long) else None]


def _slice(arguments: Sequence[Any], inputs: _Arrays, outputs: _Arrays) -> _Moved:
    ((value,), (output,), (start, stop, strides)) = inputs, outputs, arguments
    if any(stride < 1 for stride in strides):
        return [None]
    # MLX keeps a stop beyond the end as it was written.
    ranges = list(map(range, start, map(min, stop, value.shape), strides))
    if tuple(map(len, ranges)) != output.shape or len(ranges) != len(value.shape):
        return [None]
    return [_select(value, ranges)]


def _split(arguments: Sequence[Any], inputs: _Arrays, outputs: _Arrays) -> _Moved:
    (value,), (cuts, axis) = inputs, arguments
    edges = [0, *cuts, value.shape[axis]]
    moved = []
    for low, high, output in zip(edges[:-1], edges[1:], outputs, strict=True):
        ranges = [range(n) for n in value.shape]
        ranges[axis] = range(low, high)
        fits = tuple(map(len, ranges)) == output.shape
        moved.append(_select(value, ranges) if fits else None)
    return moved


def _concatenate(arguments: Sequence[Any], inputs: _Arrays, outputs: _Arrays) -> _Moved:
    ((output,), (axis,)) = outputs, arguments
    outer = prod(output.shape[:axis])
    if outer * len(inputs) > MAX_PIECES and outer > 1:
        return [None]
    cutters = [_cutter(value.pieces or ()) for value in inputs]
    steps = [value.nbytes // outer if outer else 0 for value in inputs]
    pieces = (
        cut(index * step, (index + 1) * step)
        for index in range(outer)
        for cut, step in zip(cutters, steps, strict=True)
    )
    return [_join(chain.from_iterable(pieces))]


BYTE_MOVE_RULES: dict[str, ByteMoveRule] = {
    **dict.fromkeys(("Reshape", "Flatten", "Unflatten", "ExpandDims", "Squeeze"), _same_bytes),
    **dict.fromkeys(("View", "Broadcast", "Copy", "StopGradient"), _same_bytes),
    "AsType": _as_type,
    "Transpose": _transpose,
    "Slice": _slice,
    "Split": _split,
    "Concatenate": _concatenate,
}


def _select(value: Traced, ranges: Sequence[range]) -> tuple[Extent, ...] | None:
    """The bytes of a block of ``value``, one range for each axis.

    Example: rows 1 and 3 of a uint8 array of shape (4, 6), ``[range(1, 4, 2), range(6)]``, are two
    runs of 6 bytes that are 12 bytes apart: ``Extent("a", 6, 12, stride=12, times=2)``.
    """
    if not all(ranges):
        return ()
    # Axes after ``last`` are whole, so that an index of ``last`` selects ``inner`` bytes.
    last = len(ranges) - 1
    inner = value.dtype.size
    while last >= 0 and ranges[last] == range(value.shape[last]):
        inner *= value.shape[last]
        last -= 1
    if last < 0:
        return value.pieces
    steps = [inner * prod(value.shape[axis + 1 : last + 1]) for axis in range(last + 1)]
    chosen = ranges[last]
    run, count, stride = inner, len(chosen), inner * chosen.step
    if chosen.step == 1 or count == 1:
        run, count, stride = inner * count, 1, 0
    if prod(len(r) for r in ranges[:last]) > MAX_PIECES:
        return None
    cut = _cutter(value.pieces or ())
    pieces: list[Extent] = []
    for index in product(*ranges[:last], chosen[:1]):
        low = sum(i * step for i, step in zip(index, steps, strict=True))
        spanned = list(cut(low, low + stride * (count - 1) + run))
        if len(spanned) == 1 and spanned[0].times == 1:
            source, start = spanned[0][:2]
            pieces.append(Extent(source, start, start + run, stride, count))
        elif count > MAX_PIECES:
            return None
        else:
            for number in range(count):
                pieces += cut(low + number * stride, low + number * stride + run)
    return _join(pieces)


def _cutter(pieces: Sequence[Extent]) -> Callable[[int, int], Iterator[Extent]]:
    """Return a function that gives the bytes ``low`` to ``high`` of the pieces laid end to end.

    Example: of ``Extent("a", 0, 4, stride=8, times=3)``, bytes 0 to 4, 8 to 12 and 16 to 20 of
    ``a``, ``cut(2, 10)`` gives bytes 2 to 4, 8 to 12 and 16 to 18.
    """
    edges = [0, *accumulate(piece.nbytes for piece in pieces)]

    def cut(low: int, high: int) -> Iterator[Extent]:
        at = bisect_right(edges, low) - 1
        while low < high:
            piece, end = pieces[at], min(high, edges[at + 1])
            run = piece.stop - piece.start
            index, within = divmod(low - edges[at], run)
            begin = piece.start + index * piece.stride + within
            whole = 1 if within else max((end - low) // run, 1)
            if whole > 1:
                yield Extent(piece.tensor, begin, begin + run, piece.stride, whole)
                low += whole * run
            else:
                size = min(run - within, end - low)
                yield Extent(piece.tensor, begin, begin + size)
                low += size
            at += low == edges[at + 1]

    return cut


def _join(pieces: Iterator[Extent] | Sequence[Extent]) -> tuple[Extent, ...] | None:
    """Merge adjacent pieces; None where too many are left."""
    joined: list[Extent] = []
    for piece in pieces:
        merged = _merged(joined[-1], piece) if joined else None
        if merged is not None:
            joined[-1] = merged
        elif piece.nbytes:
            joined.append(piece)
    sources = {piece.tensor for piece in joined}
    # A stack of many whole tensors is allowed: only pieces beyond one for each source count.
    return tuple(joined) if len(joined) <= max(MAX_PIECES, len(sources)) else None


def _merged(left: Extent, right: Extent) -> Extent | None:
    """One piece for two adjacent ones; None where they are not.

    Example: bytes 0 to 4 and 8 to 12 of a tensor become ``Extent("a", 0, 4, stride=8, times=2)``
    only if one of the two already has a stride of 8; bytes 0 to 4 and 4 to 8 become 0 to 8.
    """
    if left.tensor != right.tensor:
        return None
    if left.times == right.times == 1:
        continues = left.stop == right.start
        return Extent(left.tensor, left.start, right.stop) if continues else None
    stride = left.stride or right.stride
    alike = stride == (right.stride or stride)
    alike &= left.stop - left.start == right.stop - right.start
    if not alike or left.start + stride * left.times != right.start:
        return None
    return Extent(left.tensor, left.start, left.stop, stride, left.times + right.times)
