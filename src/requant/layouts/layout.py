"""mlx-lm's layout of a checkpoint, and how each of its tensors is made."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from requant.core.dtypes import TensorInfo
from requant.core.reasons import Reason
from requant.layouts.availability import LayoutError
from requant.layouts.byte_moves import Traced
from requant.layouts.conversion_trace import HEADER_NAME, MLX_DTYPE, run
from requant.layouts.expert_forms import Adapter
from requant.layouts.outputs import BATCH_BYTES, ByteCopy, ComputedBySanitize
from requant.quantization.config import Quantization
from requant.text import join_first, pluralize

__all__ = ["MlxLmLayout", "mlx_lm_layout"]


@dataclass(eq=False)
class MlxLmLayout:
    """The result of mlx-lm's conversion of a checkpoint, and its functions to compute tensors.

    Attributes:
        tensors: Name after mlx-lm's renaming -> how the tensor is made, before it is cast
            (``dtype``, ``keeps_dtype``) or quantized (``targets``).
        dropped: Source tensors that no output needs, in source order.
        targets: Layer path -> the quantization that mlx-lm would apply. ``saved`` has a
            ``{layer}.global_scale`` where it comes with one.
        dense_reasons: Layers that could be quantized and stay dense, each with the reason.
        dtype: Header name that floating tensors are cast to before they are quantized; None
            leaves each as it is. It is the requested one, else what mlx-lm takes from the config.
        keeps_dtype: Floating tensors that are exempt from the cast.
        config: ``config.json`` as mlx-lm would write it.
        saved: Name -> dtype and shape of everything that mlx-lm would write.
        quantizable: Layers that the class can hold quantized, whatever was requested.
        with_global_scale: Those of them that can hold nvfp4 with a global scale.
    """

    tensors: Mapping[str, ByteCopy | ComputedBySanitize]
    dropped: tuple[str, ...]
    targets: Mapping[str, Quantization]
    dense_reasons: Mapping[str, Reason]
    dtype: str | None
    keeps_dtype: frozenset[str]
    config: dict[str, Any]
    saved: Mapping[str, TensorInfo]
    quantizable: frozenset[str]
    with_global_scale: frozenset[str]
    _computer: _Computer = field(repr=False)

    def compute(self, name: str, load: Callable[[str], mx.array]) -> mx.array:
        """Evaluate one :class:`ComputedBySanitize` tensor with the model's ``sanitize`` on the CPU.

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


def mlx_lm_layout(
    config: Mapping[str, Any],
    tensors: Mapping[str, TensorInfo],
    *,
    quantization: Quantization | None = None,
    recipe: str | None = None,
    dtype: str | None = None,
    global_scale: bool = False,
    adapt: Adapter | None = None,
) -> MlxLmLayout:
    """Determine the result of ``mlx_lm.convert`` for a checkpoint without its data.

    Args:
        config: ``config.json`` as ``mlx_lm.utils.load_config`` gives it (with the
            ``eos_token_id`` of ``generation_config.json``). For a source in MLX's quantized
            format its ``quantization`` block describes the triples in ``tensors``.
        tensors: Name -> dtype and shape of every source tensor, dense or parts of triples.
        quantization: The target; None for a dense output.
        recipe: One of mlx-lm's mixed recipes (``mixed_2_6``); affine only.
        dtype: Header name ("BF16") to cast floating tensors to; None takes the config's.
        global_scale: Whether each expert gets a global scale, nvfp4 only.
        adapt: Applied to a weight map before the class's ``sanitize``.

    Raises:
        UnknownModelError: mlx-lm is not installed or has no class for the model.
        LayoutError: mlx-lm's own conversion would fail (all missing or unknown tensors are
            named), or ``sanitize`` looks at values.
        UsageError: A recipe with another mode than affine.
    """
    trace = run(
        config,
        tensors,
        quantization,
        recipe=recipe,
        dtype=dtype,
        global_scale=global_scale,
        adapt=adapt,
    )
    given = {name: _info(x) for name, x in trace.traced.items()}
    if given != trace.loaded:  # a legacy method that repacks weights after the rule
        unlike = [x for x in {**given, **trace.loaded} if given.get(x) != trace.loaded.get(x)]
        raise LayoutError(
            f"mlx-lm changes {pluralize(len(unlike), 'tensor')} after its renaming "
            f"({join_first(unlike, 5)}): turn the source into MLX triples first"
        )
    outputs = {name: _output(x) for name, x in trace.traced.items()}
    used = {source for x in trace.traced.values() for source in x.sources}
    return MlxLmLayout(
        tensors=outputs,
        dropped=tuple(name for name in tensors if name not in used),
        targets=trace.targets,
        dense_reasons=trace.dense_reasons,
        dtype=trace.dtype,
        keeps_dtype=trace.keeps_dtype,
        config=trace.config,
        saved=trace.saved,
        quantizable=trace.quantizable,
        with_global_scale=trace.with_global_scale,
        _computer=_Computer(trace.rule, dict(tensors), outputs),
    )


def _info(traced: Traced) -> TensorInfo:
    return TensorInfo(HEADER_NAME[traced.dtype], tuple(traced.shape))


def _output(traced: Traced) -> ByteCopy | ComputedBySanitize:
    info = _info(traced)
    if traced.pieces is None:
        return ComputedBySanitize(info, traced.sources)
    return ByteCopy(info, traced.pieces)


# -- computed tensors ------------------------------------------------------------------------


class _Computer:
    """Runs ``sanitize`` on placeholders for all tensors but the inputs of the requested ones.

    Nothing that depends on a placeholder is evaluated: the trace gives the dependencies, and shows
    that ``sanitize`` does not depend on values.
    """

    def __init__(
        self,
        rule: Callable[[dict[str, mx.array]], dict[str, mx.array]],
        tensors: Mapping[str, TensorInfo],
        outputs: Mapping[str, ByteCopy | ComputedBySanitize],
    ) -> None:
        self._rule = rule
        self._tensors = tensors
        self._outputs = {
            name: x for name, x in outputs.items() if isinstance(x, ComputedBySanitize)
        }
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
        with mx.stream(mx.cpu):
            weights = {
                name: load(name) if name in needed else mx.zeros(info.shape, MLX_DTYPE[info.dtype])
                for name, info in self._tensors.items()
            }
            outputs = self._rule(weights)
            results = {name: mx.contiguous(outputs[name]) for name in names}
            del weights, outputs
            mx.eval(list(results.values()))
        mx.clear_cache()  # else MLX keeps buffers that do not fit the next tensor
        return results
