"""Run an MLX function without data, and determine which outputs are moved bytes of its inputs.

``mx.export_function`` traces a function on placeholders and reports every primitive with its
arguments. Evaluating an array meanwhile raises an error in MLX, so nothing is read and nothing can
depend on values. Each primitive is interpreted on byte ranges: those of ``byte_moves`` only move
bytes; the outputs of any other are *computed*. The rules are compared with MLX itself once a
process, and a rule that does not agree is not used.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from itertools import chain
from math import prod
from typing import Any

import mlx.core as mx
import numpy as np

from requant.core.garbage import without_collections
from requant.layouts.byte_moves import BYTE_MOVE_RULES, ByteMoveRule, Traced
from requant.layouts.outputs import Extent
from requant.libraries.surroundings import lock, replaced


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


def run_without_values(
    function: Callable[[dict[str, mx.array]], object],
    names: Mapping[str, Hashable],
    arrays: Mapping[Hashable, mx.array],
) -> None:
    """Run ``function`` as ``trace`` does, for what it raises: nothing is followed.

    Args:
        function: Takes a weight map; called exactly once.
        names: Name of each input -> its key in ``arrays``.
        arrays: One placeholder is made for each, whatever the number of its names.

    Raises:
        ValueError: It looks at values, or uses what cannot be traced.
    """

    def flat(*placeholders: mx.array) -> list[mx.array]:
        placeholder_of = dict(zip(arrays, placeholders, strict=True))
        function({name: placeholder_of[key] for name, key in names.items()})
        return [mx.zeros(1)]

    with _traceable(), without_collections(), replaced(mx, "stack", _stack_shape):
        mx.export_function(lambda _: None, flat, *arrays.values())


def _trace(
    function: Callable[[dict[str, mx.array]], Mapping[str, mx.array]],
    arrays: Mapping[str, mx.array],
    rules: Mapping[str, ByteMoveRule],
) -> dict[str, Traced]:
    names: list[str] = []

    def flat(*placeholders: mx.array) -> list[mx.array]:
        outputs = dict(function(dict(zip(arrays, placeholders, strict=True))))
        names.extend(outputs)
        return list(outputs.values())

    graph = _Graph(tuple(arrays), rules)
    with _traceable(), without_collections():
        mx.export_function(graph.event, flat, *arrays.values())
    return {name: graph.values[key] for name, key in zip(names, graph.outputs, strict=True)}


@dataclass
class _Graph:
    """Receives the events of the export and interprets each primitive."""

    names: tuple[str, ...]
    rules: Mapping[str, ByteMoveRule]
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
        rule = self.rules.get(event["name"])
        moved: Sequence[tuple[Extent, ...] | None] = [None] * len(outputs)
        if rule is not None and all(x.pieces is not None for x in inputs):
            with suppress(TypeError, ValueError, IndexError):  # arguments of another form
                moved = rule(event["arguments"], inputs, outputs)
        for (key, _, _), output, pieces in zip(event["outputs"], outputs, moved, strict=True):
            if pieces is None or sum(p.nbytes for p in pieces) != output.nbytes:
                self.values[key] = Traced(output.shape, output.dtype, None, sources)
                continue
            needed = sources
            if len(sources) > 1:
                needed = tuple(dict.fromkeys(piece.tensor for piece in pieces))
            self.values[key] = Traced(output.shape, output.dtype, pieces, needed)


# -- what MLX cannot export ------------------------------------------------------------------


def _identity(a: mx.array, *_: Any, **__: Any) -> mx.array:
    """Replace ``mx.contiguous``, which changes strides and no values."""
    return a


def _cast(x: mx.array, dtype: mx.Dtype = mx.bfloat16, **_: Any) -> mx.array:
    """Replace ``mx.from_fp8``: the same shape and dtype, and computed as well."""
    return x.astype(dtype)


_stack = mx.stack


def _stack_shape(arrays: list[mx.array], axis: int = 0, **_: Any) -> mx.array:
    """Replace ``mx.stack`` where only shapes count: one node for hundreds of equal placeholders."""
    first = arrays[0] if arrays else None
    if first is None or any(array is not first for array in arrays):
        return _stack(arrays, axis)
    shape = list(first.shape)
    shape.insert(axis % (len(shape) + 1), len(arrays))
    return mx.broadcast_to(mx.expand_dims(first, axis), shape)


@contextmanager
def _traceable() -> Iterator[None]:
    """Replace the functions whose primitives MLX does not export, while tracing.

    The results have the right shapes, dtypes and dependencies; their values are never computed.
    """
    with lock, replaced(mx, "contiguous", _identity), replaced(mx, "from_fp8", _cast):
        yield


# -- comparison with MLX -----------------------------------------------------------------------

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
    """The rules that agree with this MLX on small arrays."""
    array = mx.arange(72, dtype=mx.uint32).reshape(3, 4, 6)
    data = _bytes(array)
    wrong: set[str] = set()
    for name, trial in _TRIALS.items():

        def run(
            weights: dict[str, mx.array], trial: Callable[[mx.array], Sequence[mx.array]] = trial
        ) -> dict[str, mx.array]:
            return {str(i): out for i, out in enumerate(trial(weights["a"]))}

        expected = {key: _bytes(x) for key, x in run({"a": array}).items()}
        for key, traced in _trace(run, {"a": array}, BYTE_MOVE_RULES).items():
            if traced.pieces is None:
                continue
            ranges = (pair for piece in traced.pieces for pair in piece.ranges)
            if b"".join(data[start:stop] for start, stop in ranges) != expected[key]:
                wrong.add(name)
    return {name: rule for name, rule in BYTE_MOVE_RULES.items() if name not in wrong}
