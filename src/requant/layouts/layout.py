"""A library's layout of a checkpoint, and how each of its tensors is made."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import mlx.core as mx

from requant.core.dtypes import FLOATS, TensorInfo
from requant.layouts.byte_moves import Traced
from requant.layouts.conversion_trace import HEADER_NAME, MLX_DTYPE, Decisions, Rule, Shown, run
from requant.layouts.expert_forms import Adapter
from requant.layouts.outputs import BATCH_BYTES, ByteCopy, ComputedByRule
from requant.libraries import LayoutError, Library, Request
from requant.libraries.surroundings import lock
from requant.text import join_first, pluralize

__all__ = ["LibraryLayout", "Request", "Shown", "library_layout"]

Output = ByteCopy | ComputedByRule


@dataclass(eq=False, kw_only=True)
class LibraryLayout(Decisions):
    """The result of a library's conversion of a checkpoint, and its functions to compute tensors.

    Attributes:
        library: The library.
        tensors: Name after the library's renaming -> how the tensor is made, before it is cast
            (``dtypes``) or quantized (``targets``).
        dropped: Source tensors that no output needs, in source order.
    """

    library: Library
    tensors: Mapping[str, Output]
    dropped: tuple[str, ...]
    _computer: _Computer = field(repr=False)

    def compute(self, name: str, load: Callable[[str], mx.array]) -> mx.array:
        """Evaluate one :class:`ComputedByRule` tensor with the library's rule on the CPU.

        Small tensors are evaluated several at a time, and the others are kept until they are
        requested, so request them in the order of ``tensors``. Calls of several threads run one
        after another.

        Args:
            name: Its name in ``tensors``.
            load: Returns a source tensor as ``mx.load`` would (float8 as uint8). Called for the
                inputs of ``name`` and of the tensors that are evaluated with it.

        Returns:
            The tensor, evaluated, with the dtype and shape of its ``info``.
        """
        return self._computer.compute(name, load)


def library_layout(
    library: Library, shown: Shown, request: Request | None = None, adapt: Adapter | None = None
) -> LibraryLayout:
    """Determine the result of a library's convert for a checkpoint without its data.

    Args:
        library: The library.
        shown: The checkpoint, under the names and shapes of its dense weights. For a source in
            MLX's quantized format the config's ``quantization`` block describes the triples.
        request: The target, recipe and dtype; a dense output by default.
        adapt: Applied to a weight map before the library's rule.

    Raises:
        UnknownModelError: The library is not installed or has no class for the model.
        LayoutError: The library's own conversion would fail (all missing or unknown tensors are
            named), leaves parameters without a tensor, or looks at values.
        UsageError: A recipe with another mode than affine.
    """
    trace = run(library, shown, request or Request(), adapt)
    decisions, rule, outputs = trace.decisions, trace.rule, {}
    changed = [name for name in decisions.dtypes if name not in trace.traced]
    changed += [
        name
        for name, x in decisions.saved.items()
        if name in trace.traced
        and name.removesuffix(".weight") not in decisions.targets
        and tuple(trace.traced[name].shape) != x.shape
    ]
    if changed:
        raise LayoutError(
            f"{library.name}'s class changes {pluralize(len(changed), 'tensor')} after it has "
            f"loaded them ({join_first(changed, 5)})"
        )
    for name, traced in trace.traced.items():
        if name in decisions.dtypes:
            outputs[name] = _output(traced, decisions.dtypes[name])
    used = {source for x in outputs.values() for source in x.inputs}
    return LibraryLayout(
        **vars(decisions),
        library=library,
        tensors=outputs,
        dropped=tuple(name for name in shown.tensors if name not in used),
        _computer=_Computer(rule, dict(shown.tensors), outputs),
    )


def _output(traced: Traced, dtype: str) -> Output:
    """How a tensor is made.

    A cast between floating dtypes is a part of the conversion; any other is computed.
    """
    info = TensorInfo(HEADER_NAME[traced.dtype], tuple(traced.shape))
    if info.dtype != dtype and not {info.dtype, dtype} <= set(FLOATS):
        return ComputedByRule(TensorInfo(dtype, info.shape), traced.sources)
    if traced.pieces is None:
        return ComputedByRule(info, traced.sources)
    return ByteCopy(info, traced.pieces)


# -- computed tensors ------------------------------------------------------------------------


class _Computer:
    """Runs a library's rule on placeholders for all tensors but the inputs of the requested ones.

    Nothing that depends on a placeholder is evaluated: the trace gives the dependencies, and shows
    that the rule does not depend on values.
    """

    def __init__(
        self,
        rule: Rule,
        tensors: Mapping[str, TensorInfo],
        outputs: Mapping[str, Output],
    ) -> None:
        self._rule = rule
        self._tensors = tensors
        self._outputs = {name: x for name, x in outputs.items() if isinstance(x, ComputedByRule)}
        self._batch_of = self._batches()
        self._ready: dict[str, mx.array] = {}
        self._begun: set[int] = set()
        self._lock = threading.Lock()

    def _batches(self) -> dict[str, tuple[int, tuple[str, ...]]]:
        batches: list[list[str]] = [[]]
        held = 0
        for name, output in self._outputs.items():
            size = output.info.nbytes + sum(self._tensors[x].nbytes for x in output.inputs)
            if batches[-1] and held + size > BATCH_BYTES:
                batches.append([])
                held = 0
            batches[-1].append(name)
            held += size
        return {
            name: (number, tuple(batch)) for number, batch in enumerate(batches) for name in batch
        }

    def compute(self, name: str, load: Callable[[str], mx.array]) -> mx.array:
        with self._lock:
            if name not in self._ready:
                number, batch = self._batch_of[name]
                # A tensor that is requested twice is computed again, alone.
                names = batch if number not in self._begun else (name,)
                self._begun.add(number)
                self._ready |= self._run(names, load)
            return self._ready.pop(name)

    def _run(self, names: tuple[str, ...], load: Callable[[str], mx.array]) -> dict[str, mx.array]:
        needed = {source for name in names for source in self._outputs[name].inputs}
        with lock, mx.stream(mx.cpu):
            weights = {
                name: load(name) if name in needed else mx.zeros(info.shape, MLX_DTYPE[info.dtype])
                for name, info in self._tensors.items()
            }
            outputs = self._rule(weights)
            results = {
                name: mx.contiguous(outputs[name].astype(MLX_DTYPE[self._outputs[name].info.dtype]))
                for name in names
            }
            del weights, outputs
            mx.eval(list(results.values()))
        mx.clear_cache()  # else MLX keeps buffers that do not fit the next tensor
        return results
