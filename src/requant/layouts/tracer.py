"""Run an MLX function without data, and learn which outputs are bytes of its inputs, moved.

``mx.export_function`` traces a function on placeholders and reports every primitive with its
arguments; evaluating anything meanwhile is an error of MLX's, so nothing is read and nothing
can depend on values. Here each primitive is interpreted on byte ranges: those on a short
list only move bytes, and whatever else there is makes its outputs *computed*. The list
is tried out against MLX itself once a process; a primitive that does not do what we think
is taken off it.
"""

from __future__ import annotations

import gc
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate, chain, product
from math import prod
from typing import Any

import mlx.core as mx
import numpy as np

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


def trace(
    function: Callable[[dict[str, mx.array]], Mapping[str, mx.array]],
    arrays: Mapping[str, mx.array],
) -> dict[str, Traced]:
    """Run ``function`` on placeholders of the shapes and dtypes of ``arrays``.

    Args:
        function: Takes a weight map and returns one; called exactly once.
        arrays: The inputs. Nothing of them is evaluated.

    Returns:
        Each output by name.

    Raises:
        ValueError: MLX cannot export it: the function looks at values, or uses what cannot be
            traced.
    """
    return _trace(function, arrays, _verified_rules())


def _trace(
    function: Callable[[dict[str, mx.array]], Mapping[str, mx.array]],
    arrays: Mapping[str, mx.array],
    movers: Mapping[str, ByteMoveRule],
) -> dict[str, Traced]:
    names: list[str] = []

    def flat(*placeholders: mx.array) -> list[mx.array]:
        outputs = dict(function(dict(zip(arrays, placeholders, strict=True))))
        names.extend(outputs)
        return list(outputs.values())

    graph = _Graph(tuple(arrays), movers)
    with _traceable(), _without_collections():
        mx.export_function(graph.event, flat, *arrays.values())
    return {name: graph.values[key] for name, key in zip(names, graph.outputs, strict=True)}


@dataclass
class _Graph:
    """Receives the export's events, and interprets each primitive as it comes."""

    names: tuple[str, ...]
    movers: Mapping[str, ByteMoveRule]
    values: dict[str, Traced] = field(default_factory=dict)
    outputs: list[str] = field(default_factory=list)

    def event(self, event: dict[str, Any]) -> None:
        kind = event["type"]
        if kind == "inputs":
            for name, (key, shape, dtype) in zip(self.names, event["inputs"], strict=True):
                nbytes = prod(shape) * dtype.size
                self.values[key] = Traced(shape, dtype, (Extent(name, 0, nbytes),), (name,))
        elif kind == "outputs":
            self.outputs = [key for key, _, _ in event["outputs"]]
        elif kind == "constants":
            for key, array in event["constants"]:
                self.values[key] = Traced(tuple(array.shape), array.dtype, None)
        elif kind == "primitive":
            self.primitive(event)

    def primitive(self, event: dict[str, Any]) -> None:
        inputs = [self.values[key] for key, _, _ in event["inputs"]]
        outputs = [Traced(shape, dtype, None) for _, shape, dtype in event["outputs"]]
        sources = inputs[0].sources if inputs else ()
        if len(inputs) > 1:
            sources = tuple(dict.fromkeys(chain.from_iterable(x.sources for x in inputs)))
        mover = self.movers.get(event["name"])
        moved: Sequence[tuple[Extent, ...] | None] = [None] * len(outputs)
        if mover is not None and all(x.pieces is not None for x in inputs):
            with suppress(TypeError, ValueError, IndexError):  # arguments of another form
                moved = mover(event["arguments"], inputs, outputs)
        for (key, _, _), output, pieces in zip(event["outputs"], outputs, moved, strict=True):
            if pieces is None or sum(p.nbytes for p in pieces) != output.nbytes:
                self.values[key] = Traced(output.shape, output.dtype, None, sources)
                continue
            needed = sources
            if len(sources) > 1:
                needed = tuple(dict.fromkeys(piece.tensor for piece in pieces))
            self.values[key] = Traced(output.shape, output.dtype, pieces, needed)


# -- primitives that move bytes --------------------------------------------------------------

ByteMoveRule = Callable[
    [Sequence[Any], Sequence[Traced], Sequence[Traced]], Sequence[tuple[Extent, ...] | None]
]


def _same_bytes(
    arguments: Sequence[Any], inputs: Sequence[Traced], outputs: Sequence[Traced]
) -> Sequence[tuple[Extent, ...] | None]:
    """Another shape (or, for View, dtype) of the same bytes."""
    (value,), (output,) = inputs, outputs
    return [value.pieces if value.nbytes == output.nbytes else None]


def _as_type(
    arguments: Sequence[Any], inputs: Sequence[Traced], outputs: Sequence[Traced]
) -> Sequence[tuple[Extent, ...] | None]:
    (value,), (output,) = inputs, outputs
    return [value.pieces if value.dtype == output.dtype else None]


def _transpose(
    arguments: Sequence[Any], inputs: Sequence[Traced], outputs: Sequence[Traced]
) -> Sequence[tuple[Extent, ...] | None]:
    """Moving axes of length 1 leaves the bytes alone."""
    ((value,), (axes,)) = inputs, arguments
    rank = len(value.shape)
    long = [axis % rank for axis in axes if value.shape[axis] != 1]
    return [value.pieces if long == sorted(long) else None]


def _slice(
    arguments: Sequence[Any], inputs: Sequence[Traced], outputs: Sequence[Traced]
) -> Sequence[tuple[Extent, ...] | None]:
    ((value,), (output,), (start, stop, strides)) = inputs, outputs, arguments
    if any(stride < 1 for stride in strides):
        return [None]
    # MLX keeps a stop beyond the end as it was written.
    ranges = list(map(range, start, map(min, stop, value.shape), strides))
    if tuple(map(len, ranges)) != output.shape or len(ranges) != len(value.shape):
        return [None]
    return [_select(value, ranges)]


def _split(
    arguments: Sequence[Any], inputs: Sequence[Traced], outputs: Sequence[Traced]
) -> Sequence[tuple[Extent, ...] | None]:
    (value,), (cuts, axis) = inputs, arguments
    edges = [0, *cuts, value.shape[axis]]
    moved = []
    for low, high, output in zip(edges[:-1], edges[1:], outputs, strict=True):
        ranges = [range(n) for n in value.shape]
        ranges[axis] = range(low, high)
        fits = tuple(map(len, ranges)) == output.shape
        moved.append(_select(value, ranges) if fits else None)
    return moved


def _concatenate(
    arguments: Sequence[Any], inputs: Sequence[Traced], outputs: Sequence[Traced]
) -> Sequence[tuple[Extent, ...] | None]:
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


_BYTE_MOVE_RULES: dict[str, ByteMoveRule] = {
    **dict.fromkeys(("Reshape", "Flatten", "Unflatten", "ExpandDims", "Squeeze"), _same_bytes),
    **dict.fromkeys(("View", "Broadcast", "Copy", "StopGradient"), _same_bytes),
    "AsType": _as_type,
    "Transpose": _transpose,
    "Slice": _slice,
    "Split": _split,
    "Concatenate": _concatenate,
}


def _select(value: Traced, ranges: Sequence[range]) -> tuple[Extent, ...] | None:
    """The bytes of a block of ``value``, one range an axis."""
    if not all(ranges):
        return ()
    # Axes behind ``last`` are whole: what it selects are runs of ``inner`` bytes.
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
    """A function that gives the bytes ``low..high`` of ``row_ranges`` laid end to end."""
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
    """Melt neighbours together; None where too many are left."""
    joined: list[Extent] = []
    for piece in pieces:
        melted = _melted(joined[-1], piece) if joined else None
        if melted is not None:
            joined[-1] = melted
        elif piece.nbytes:
            joined.append(piece)
    sources = {piece.tensor for piece in joined}
    # Stacking many whole tensors is not shredding: only pieces beyond one a source count.
    return tuple(joined) if len(joined) <= max(MAX_PIECES, len(sources)) else None


def _melted(left: Extent, right: Extent) -> Extent | None:
    """One piece for two adjacent ones."""
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


# -- what MLX cannot export ------------------------------------------------------------------

_lock = threading.RLock()


def _identity(a: mx.array, *_: Any, **__: Any) -> mx.array:
    """Replaces ``mx.contiguous``, which changes where values lie and never what they are."""
    return a


def _cast(x: mx.array, dtype: mx.Dtype = mx.bfloat16, **_: Any) -> mx.array:
    """Replaces ``mx.from_fp8``: same shape and dtype, and computed as well."""
    return x.astype(dtype)


@contextmanager
def _traceable() -> Iterator[None]:
    """Replace, while tracing, the functions whose primitives MLX does not export.

    The results represent shapes, dtypes and dependencies only; no value comes of them.
    """
    with _lock:
        kept = {"contiguous": mx.contiguous, "from_fp8": mx.from_fp8}
        mx.contiguous, mx.from_fp8 = _identity, _cast
        try:
            yield
        finally:
            for name, function in kept.items():
                setattr(mx, name, function)


@contextmanager
def _without_collections() -> Iterator[None]:
    """Keep the cycle collector from walking the growing graph: half the time of a big one."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


# -- trial against MLX -----------------------------------------------------------------------

_TRIALS: dict[str, Callable[[mx.array], Sequence[mx.array]]] = {
    "Reshape": lambda a: [a.reshape(4, 6, 3), a.reshape(-1)],
    "Flatten": lambda a: [mx.flatten(a, 1, 2), mx.flatten(a, 0, 1)],
    "Unflatten": lambda a: [mx.unflatten(a, 1, (2, 2)), mx.unflatten(a, -1, (3, 2))],
    "ExpandDims": lambda a: [a[:, None], mx.expand_dims(a, -1)],
    "Squeeze": lambda a: [a[1:2].squeeze(0), a[:, 2:3].squeeze()],
    "View": lambda a: [a.view(mx.uint16), a.view(mx.uint8)[:, 1]],
    "Broadcast": lambda a: [mx.broadcast_to(a, (1, 3, 4, 6)), mx.broadcast_to(a[:1], (3, 4, 6))],
    "Copy": lambda a: [mx.array(a)],
    "StopGradient": lambda a: [mx.stop_gradient(a)],
    "AsType": lambda a: [a.astype(mx.uint16), a.astype(mx.int32)],
    "Transpose": lambda a: [
        mx.transpose(a[:, :1], (1, 0, 2)),
        mx.moveaxis(a[:, None], 1, 2),
        mx.swapaxes(a, 1, 2),
        mx.transpose(a, (2, 0, 1)),
    ],
    "Slice": lambda a: [
        a[:, 1::2][1:, :1],
        a[:, ::2].reshape(-1)[9:31],
        a[:2],
        a[:, 1:3],
        a[..., 1::2],
        a[1:, ::2, 2:5],
        a[::2, -3:, :-1],
        a[::-1],
    ],
    "Split": lambda a: [*mx.split(a, 3), *mx.split(a, 2, axis=1), *mx.split(a, [1, 4], axis=-1)],
    "Concatenate": lambda a: [
        mx.concatenate([a, a[1:]]),
        mx.concatenate([a[:, :1], a], axis=1),
        mx.concatenate([a, a[..., 3:]], axis=-1),
        mx.stack([a, a], axis=1),
    ],
}


def _bytes(array: mx.array) -> bytes:
    return np.array(array).tobytes()


@cache
def _verified_rules() -> dict[str, ByteMoveRule]:
    """The movers that, on small arrays, give what this MLX computes."""
    array = mx.arange(72, dtype=mx.uint32).reshape(3, 4, 6)
    data = _bytes(array)
    wrong: set[str] = set()
    for name, trial in _TRIALS.items():

        def run(
            weights: dict[str, mx.array], trial: Callable[[mx.array], Sequence[mx.array]] = trial
        ) -> dict[str, mx.array]:
            return {str(i): out for i, out in enumerate(trial(weights["a"]))}

        expected = {key: _bytes(x) for key, x in run({"a": array}).items()}
        for key, traced in _trace(run, {"a": array}, _BYTE_MOVE_RULES).items():
            if traced.pieces is None:
                continue
            ranges = (pair for piece in traced.pieces for pair in piece.ranges)
            if b"".join(data[start:stop] for start, stop in ranges) != expected[key]:
                wrong.add(name)
    return {name: mover for name, mover in _BYTE_MOVE_RULES.items() if name not in wrong}
