"""``compare``: two forms of one model held against each other, layer by layer and on a text.

Each layer of either is decoded by the same stages as ``convert --dequantize``, one at a
time; nothing is written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from math import prod, sqrt
from pathlib import Path
from typing import Any

import numpy as np

from requant.core.dtypes import NUMPY_DTYPE
from requant.core.types import Source
from requant.errors import CheckpointError, Problem, UsageError, error_action
from requant.execution.executor import run_plan
from requant.execution.resources import plan_resources
from requant.mlx_lm.evaluation import (
    DEFAULT_TOKENS,
    DEFAULT_WINDOW,
    Evaluation,
    evaluate,
    load_as_stored,
    read_tokens,
)
from requant.planning.plan import OutputTensor, Plan, Step
from requant.planning.planner import Planned, plan_with_source
from requant.planning.release_order import subplan
from requant.quantization.options import ConvertOptions
from requant.sources.hub_repository import find_repository
from requant.sources.open import read_checkpoint

_BLOCK = 1 << 18  # values that are summed at a time


@dataclass(frozen=True, slots=True)
class LayerComparison:
    """One tensor of both models, as numbers.

    Attributes:
        name: The tensor, under the layout that both have.
        shape: Its shape.
        a: How A stores it.
        b: How B stores it.
        relative_rms: Root of the summed squared differences over A's summed squares; None where
            A is zero and B is not.
        max_error: Largest difference.
        cosine: Of the angle between both; 1 for two zeros, None for one.
        nonfinite: Places where either is NaN or infinite; they count in none of the above.
    """

    name: str
    shape: tuple[int, ...]
    a: str
    b: str
    relative_rms: float | None
    max_error: float
    cosine: float | None
    nonfinite: int = 0


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two models held against each other.

    Attributes:
        a: The model that B is measured by.
        b: The other.
        layout: Of the names: "mlx-lm", or "keep" for those of the files.
        layers: Tensors that both have, in A's order.
        only_a: Names that B lacks.
        only_b: Names that A lacks.
        bits_per_weight_a: Of A's tensors, as ``report`` counts them: without the files' headers.
        bits_per_weight_b: Of B's.
        evaluation: Both on the text; None without one.
    """

    a: str
    b: str
    layout: str
    layers: tuple[LayerComparison, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    bits_per_weight_a: float
    bits_per_weight_b: float
    evaluation: Evaluation | None = None

    def to_dict(self) -> dict[str, Any]:
        """The comparison as JSON data."""
        return asdict(self)


@error_action("compared")
def compare(
    a: Source,
    b: Source,
    *,
    text: Source | None = None,
    tokens: int = DEFAULT_TOKENS,
    window: int = DEFAULT_WINDOW,
    threads: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Comparison:
    """Compare two folders (or GGUF files) of one model, in any formats.

    Memory holds the largest tensor of each in float32; with ``text``, both models.

    Args:
        a: The model that the other is measured by: the dense original, as a rule.
        b: The other.
        text: A text or ``.jsonl`` file, for what both make of it; needs mlx-lm.
        tokens: Most tokens of it to read.
        window: Tokens that are read in one go; each window starts without context.
        threads: Worker threads; every processor by default.
        progress: Called with what is being done, how many are done and how many there are.

    Returns:
        Of every tensor that both have: relative RMS error of ``b``, largest difference and cosine;
        with ``text`` the losses in nats per token and the divergence, with standard errors.

    Raises:
        CheckpointError: What is wrong with either, or every tensor whose shapes differ.
        UsageError: The two share no name, or the text is too short.
        ParseError: The text is not what its name says.
        OSError: There is no such text.

    Example:
        >>> found = compare("Llama-3.2-1B", "Llama-3.2-1B-4bit")  # doctest: +SKIP
        >>> max(found.layers, key=lambda layer: layer.relative_rms or 0)  # doctest: +SKIP
    """
    if text is not None:
        Path(text).open("rb").close()  # before the long work
    planned = _plans(a, b)
    plans = [x.plan for x in planned]
    places = [_places(plan) for plan in plans]
    common = [name for name in places[0] if name in places[1]]
    if not common:
        raise UsageError(f"{a} and {b} share no name of a tensor: not two forms of one model")
    _check_shapes(str(b), common, *places)
    stored = [_stored_as(plan) for plan in plans]
    layers = []
    for number, name in enumerate(common):
        if progress is not None:
            progress(name, number, len(common))
        sides = [
            (
                stored[n].get(places[n][name].layer, ""),
                _values(planned[n], places[n][name], threads),
            )
            for n in (0, 1)
        ]
        layers.append(_compare_tensor(name, places[0][name].tensor.info.shape, *sides))
    evaluation = None
    if text is not None:
        evaluation = _evaluated(
            a, b, Path(text), tokens=tokens, window=window, threads=threads, progress=progress
        )
    return Comparison(
        a=str(a),
        b=str(b),
        layout=plans[0].layout,
        layers=tuple(layers),
        only_a=tuple(name for name in places[0] if name not in places[1]),
        only_b=tuple(name for name in places[1] if name not in places[0]),
        bits_per_weight_a=plans[0].bits_per_weight_in,
        bits_per_weight_b=plans[1].bits_per_weight_in,
        evaluation=evaluation,
    )


def _plans(a: Source, b: Source) -> list[Planned]:
    """Both models dense in float32, under names of one layout."""
    for source in (a, b):
        if find_repository(source, None) is not None:
            raise UsageError(f"compare reads folders and GGUF files; download {source} first")
    options = ConvertOptions.from_arguments(dequantize=True, dtype="float32")
    checkpoints = [read_checkpoint(source) for source in (a, b)]
    plans = [plan_with_source(checkpoint, options) for checkpoint in checkpoints]
    if plans[0].plan.layout != plans[1].plan.layout:
        kept = replace(options, layout="keep")
        plans = [plan_with_source(checkpoint, kept) for checkpoint in checkpoints]
    return plans


@dataclass(frozen=True, slots=True)
class _TensorSource:
    """A tensor of the plan's output, and the steps that make it."""

    layer: str
    tensor: OutputTensor
    steps: tuple[Step, ...]


def _places(plan: Plan) -> dict[str, _TensorSource]:
    found: dict[str, _TensorSource] = {}
    for step in plan.steps:
        for out in step.outputs.values():
            before = found[out.name].steps if out.name in found else ()
            found[out.name] = _TensorSource(step.layer, out, (*before, step))
    return found


def _check_shapes(
    source: str, common: list[str], a: Mapping[str, _TensorSource], b: Mapping[str, _TensorSource]
) -> None:
    problems = []
    for name in common:
        expected, actual = a[name].tensor.info.shape, b[name].tensor.info.shape
        if prod(expected) != prod(actual) or (len(expected) > 1 and expected != actual):
            problems.append(
                Problem(name, f"is {list(actual)}, expected {list(expected)} as in the first")
            )
    if problems:
        raise CheckpointError(source, problems)


def _stored_as(plan: Plan) -> dict[str, str]:
    return {layer.layer: layer.source for layer in plan.layers}


class _TensorSink:
    """Takes the place of the output folder, for the bytes of one tensor."""

    progress_log = None

    def __init__(self, tensor: OutputTensor) -> None:
        self.tensor, self.data = tensor, bytearray(tensor.info.nbytes)

    def write(self, file: str, offset: int, data: memoryview) -> None:
        """Put ``data`` where it belongs, if it is the tensor's."""
        start = offset - self.tensor.offset
        if file == self.tensor.file and 0 <= start < len(self.data):
            self.data[start : start + data.nbytes] = data


def _values(planned: Planned, place: _TensorSource, threads: int | None) -> np.ndarray:
    """A tensor's values, flat, in the dtype that the plan gives it."""
    part = subplan(planned.plan, place.steps)
    sink = _TensorSink(place.tensor)
    run_plan(part, planned.source, sink, plan_resources(part, threads))
    return np.frombuffer(sink.data, NUMPY_DTYPE[place.tensor.info.dtype])


def _compare_tensor(
    name: str,
    shape: tuple[int, ...],
    side_a: tuple[str, np.ndarray],
    side_b: tuple[str, np.ndarray],
) -> LayerComparison:
    """Sums in float64, block by block in the order of the values."""
    (stored_a, a), (stored_b, b) = side_a, side_b
    difference = squares_a = squares_b = product = most = 0.0
    nonfinite = 0
    for start in range(0, a.size, _BLOCK):
        x = a[start : start + _BLOCK].astype(np.float64)
        y = b[start : start + _BLOCK].astype(np.float64)
        sound = np.isfinite(x) & np.isfinite(y)
        if not sound.all():
            nonfinite += int(x.size - sound.sum())
            x, y = np.where(sound, x, 0.0), np.where(sound, y, 0.0)
        d = y - x
        difference += float(d @ d)
        squares_a += float(x @ x)
        squares_b += float(y @ y)
        product += float(x @ y)
        most = max(most, float(np.abs(d).max()))
    same = difference == 0.0
    norm = sqrt(squares_a) * sqrt(squares_b)
    return LayerComparison(
        name=name,
        shape=shape,
        a=stored_a,
        b=stored_b,
        relative_rms=sqrt(difference / squares_a) if squares_a else (0.0 if same else None),
        max_error=most,
        cosine=1.0 if same else min(1.0, max(-1.0, product / norm)) if norm else None,
        nonfinite=nonfinite,
    )


def _evaluated(
    a: Source,
    b: Source,
    text: Path,
    tokens: int,
    window: int,
    threads: int | None,
    progress: Callable[[str, int, int], None] | None,
) -> Evaluation:
    model_a, tokenizer = load_as_stored(a, threads=threads)
    ids = read_tokens(text, tokenizer, tokens, window)
    model_b, _ = load_as_stored(b, threads=threads)
    reported = None if progress is None else lambda done, of: progress("window of text", done, of)
    return evaluate(model_a, model_b, ids, reported)
