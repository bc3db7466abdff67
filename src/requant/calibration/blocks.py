"""A text model that runs block by block, the weights of one block in memory at a time.

The model's own code is run with stubs in place of its blocks. The stubs record how blocks are
called (masks and the like), catch the embedded text, and return the output of the last block to
the layers after it. A model whose blocks cannot be run alone (they return more than one array, or
are called differently for another text) raises ``NotBlockwiseError``, and is run as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from requant.execution.executor import run_plan
from requant.execution.resources import plan_resources
from requant.mlx_lm.loading import ArraySink
from requant.planning.plan import Plan
from requant.planning.plan_source import PlanSource
from requant.planning.release_order import subplan

if TYPE_CHECKING:
    import mlx.core as mx
    from mlx.nn.layers.base import Module

    from requant.calibration.text_model import TextModel

_LISTS = ("layers", "h", "blocks")


class NotBlockwiseError(Exception):
    """The model's blocks cannot be run one by one."""


@dataclass(frozen=True, slots=True)
class _Call:
    """The arguments of a block other than the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class BlockwiseModel:
    """A model that runs one block over all windows before the next."""

    def __init__(
        self, model: TextModel, plan: Plan, source: PlanSource, threads: int | None
    ) -> None:
        """Find the blocks of a model without its weights, which ``plan`` computes.

        Raises:
            NotBlockwiseError: There are none, or names of tensors are not those of the model.
        """
        from mlx.utils import tree_flatten

        self.model, self.plan, self.source, self.threads = model, plan, source, threads
        lists = [
            (module, attribute, f"{path}.{attribute}" if path else attribute)
            for path, module in model.named_modules()
            for attribute in _LISTS
            if isinstance(module.get(attribute), list) and len(module[attribute]) > 0
        ]
        if not lists:
            raise NotBlockwiseError("it has no list of blocks")
        self.owner, self.attribute, path = max(lists, key=lambda found: len(found[0][found[1]]))
        self.blocks: list[Module] = list(self.owner[self.attribute])
        self.prefixes = [f"{path}.{number}." for number in range(len(self.blocks))]
        known = {model.prefix + name for name in dict(tree_flatten(model.module.parameters()))}
        names = {t.name for x in plan.shards for t in x.tensors if t.name.startswith(model.prefix)}
        if unknown := names - known:
            raise NotBlockwiseError(f"its class has no {min(unknown)}")
        if lacking := known - names:
            raise NotBlockwiseError(f"no tensor is {min(lacking)}")

    # -- weights ---------------------------------------------------------------------------

    def load_rest(self) -> None:
        """Load the weights of no block: embedding, norm, head."""
        text, blocks = self.model.prefix, tuple(self.prefixes)
        self._load(lambda name: name.startswith(text) and not name.startswith(blocks))

    @contextmanager
    def block(self, number: int) -> Iterator[Module]:
        """A block with its weights inside the context; they are dropped at its end."""
        import mlx.core as mx
        from mlx.utils import tree_map

        block: Any = self.blocks[number]
        self._load(lambda name: name.startswith(self.prefixes[number]))
        try:
            yield block
        finally:
            block.update(tree_map(lambda _: mx.zeros(1), block.parameters()))

    def _load(self, wanted: Callable[[str], bool]) -> None:
        plan = self.plan
        steps = [s for s in plan.steps if any(wanted(t.name) for t in s.outputs.values())]
        part = subplan(plan, steps)
        shards = tuple(
            replace(shard, tensors=tuple(t for t in shard.tensors if wanted(t.name)))
            for shard in plan.shards
        )
        sink = ArraySink(replace(part, shards=shards))
        run_plan(part, self.source, sink, plan_resources(part, self.threads))
        text = self.model.prefix
        weights = [(name.removeprefix(text), x) for name, x in sink.arrays.items()]
        self.model.module.load_weights(weights, strict=False)

    # -- runs ------------------------------------------------------------------------------

    @contextmanager
    def _stubs(self, acts: Sequence[Callable[..., Any]]) -> Iterator[None]:
        """Replace what blocks do when they are called; ``isinstance`` still holds."""
        kinds = [type(block) for block in self.blocks]

        def stub(kind: type, act: Callable[..., Any]) -> type:
            def call(_: Any, x: mx.array, *args: Any, **kwargs: Any) -> Any:
                return act(x, args, kwargs)

            return type(kind.__name__, (kind,), {"__call__": call})

        for block, kind, act in zip(self.blocks, kinds, acts, strict=True):
            block.__class__ = stub(kind, act)
        try:
            yield
        finally:
            for block, kind in zip(self.blocks, kinds, strict=True):
                block.__class__ = kind

    def calls(self, first: np.ndarray, second: np.ndarray) -> list[_Call]:
        """How each block is called for any window of this length.

        Raises:
            NotBlockwiseError: Two windows are treated differently.
        """
        one, two = self._calls(first), self._calls(second)
        if not all(_alike(a, b) for a, b in zip(one, two, strict=True)):
            raise NotBlockwiseError("its blocks are called with more than the text's hidden states")
        return one

    def _calls(self, ids: np.ndarray) -> list[_Call]:
        found: list[_Call] = []
        passed: list[mx.array] = []

        def act(number: int) -> Callable[..., Any]:
            def keep(x: mx.array, args: tuple[Any, ...], kwargs: dict[str, Any]) -> mx.array:
                if number != len(found):
                    raise NotBlockwiseError("its blocks are not called once each, in order")
                if passed and x is not passed[0]:
                    raise NotBlockwiseError("hidden states change between its blocks")
                found.append(_Call(args, kwargs))
                passed[:] = [x]
                return x

            return keep

        with self._stubs([act(number) for number in range(len(self.blocks))]):
            _run(self.model, ids)
        if len(found) < len(self.blocks):
            raise NotBlockwiseError("not every block is called")
        return found

    def embed(self, ids: np.ndarray) -> mx.array:
        """The input of the first block for a window."""
        taken: list[mx.array] = []

        def act(x: mx.array, args: Any, kwargs: Any) -> mx.array:
            taken.append(x)
            return x

        with self._stubs([act] * len(self.blocks)):
            _run(self.model, ids)
        return taken[0]

    def finish(self, ids: np.ndarray, hidden: mx.array) -> mx.array:
        """The logits from the output of the last block; nothing is evaluated."""
        with self._stubs([lambda x, args, kwargs: hidden] * len(self.blocks)):
            return _run(self.model, ids)

    @staticmethod
    def step(block: Module, hidden: mx.array, call: _Call) -> mx.array:
        """Run one block on a window.

        Raises:
            NotBlockwiseError: It returns something else than hidden states.
        """
        import mlx.core as mx

        output = block(hidden, *call.args, **call.kwargs)
        if not isinstance(output, mx.array) or output.shape != hidden.shape:
            raise NotBlockwiseError("its blocks give more than hidden states")
        return output


def _run(model: TextModel, ids: np.ndarray) -> mx.array:
    import mlx.core as mx

    try:
        return model(mx.array(ids[None]))
    except (AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise NotBlockwiseError(f"its code wants its own blocks: {error}") from error


def _alike(a: _Call, b: _Call) -> bool:
    if len(a.args) != len(b.args) or a.kwargs.keys() != b.kwargs.keys():
        return False
    pairs = [*zip(a.args, b.args, strict=True), *((a.kwargs[k], b.kwargs[k]) for k in a.kwargs)]
    return all(_same(x, y) for x, y in pairs)


def _same(x: Any, y: Any) -> bool:
    import mlx.core as mx

    if isinstance(x, mx.array) and isinstance(y, mx.array):
        return x.shape == y.shape and bool(mx.array_equal(x, y))
    if isinstance(x, tuple | list) and type(x) is type(y):
        return len(x) == len(y) and all(map(_same, x, y))
    if x is None or isinstance(x, str | int | float | bool):
        return bool(x == y)
    return False
