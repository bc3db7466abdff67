"""``compare``: measure how two forms of one model differ, layer by layer and on a text.

Each layer is decoded by the same stages as in ``convert --dequantize``, one at a time. Nothing is
written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import prod, sqrt
from pathlib import Path
from typing import Any

import numpy as np

from requant.calibration.image_windows import ImageWindows
from requant.calibration.text_model import load_as_stored, plan_text_model
from requant.core.dtypes import NUMPY_DTYPE
from requant.core.types import Source
from requant.errors import CheckpointError, Problem, UsageError, error_action
from requant.execution.executor import run_plan
from requant.execution.resources import plan_resources
from requant.mlx_lm.documents import read_documents
from requant.mlx_lm.evaluation import (
    DEFAULT_TOKENS,
    DEFAULT_WINDOW,
    Evaluation,
    Prompt,
    evaluate,
    read_tokens,
)
from requant.mlx_vlm.image_prompts import ImagePrompt, image_prompts
from requant.nn.blas_products import product_threads
from requant.planning.plan import OutputTensor, Plan, Step
from requant.planning.planner import Planned, plan_with_source
from requant.planning.release_order import subplan
from requant.quantization.options import ConvertOptions
from requant.sources.hub_repository import find_repository
from requant.sources.open import read_checkpoint

_BLOCK = 1 << 18  # values that are converted to float64 and summed at a time


@dataclass(frozen=True, slots=True)
class LayerComparison:
    """The difference of one tensor in two models."""

    name: str  # the tensor's name in the common layout
    shape: tuple[int, ...]
    a: str  # how A stores it, such as "affine 4-bit group 64"
    b: str  # how B stores it
    # Root of the summed squared differences over A's summed squares; None if only A is zero.
    relative_rms: float | None
    max_error: float  # largest absolute difference
    cosine: float | None  # cosine similarity; 1 if both are zero, None if one is
    # Number of values that are NaN or infinite in either; the others leave them out.
    nonfinite: int = 0


@dataclass(frozen=True, slots=True)
class Comparison:
    """The differences of two models.

    Attributes:
        a: The reference model.
        b: The other model.
        layout: Layout of the names: "mlx-lm", or "keep" for the names in the files.
        layers: Tensors that both have, in A's order.
        only_a: Names of tensors that only A has.
        only_b: Names of tensors that only B has.
        bits_per_weight_a: Bits per weight of A, without file headers, as in ``report``.
        bits_per_weight_b: Bits per weight of B.
        evaluation: Losses of both on the text; None without one.
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
    images: Sequence[Source] = (),
    tokens: int = DEFAULT_TOKENS,
    window: int = DEFAULT_WINDOW,
    threads: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Comparison:
    """Compare two folders (or GGUF files) of one model, in any formats.

    Memory holds the largest tensor of each in float32; with ``text``, both models.

    Args:
        a: The reference model, usually the dense original.
        b: The other model.
        text: A text or ``.jsonl`` file on which both are evaluated; needs mlx-lm. A line of JSON
            that also has ``image`` is a prompt about an image, as in ``calibrate``.
        images: Image files, or folders of them: prompts too; needs mlx-vlm.
        tokens: Most tokens of the text to read; and of the prompts about images, those that begin
            within as many.
        window: Tokens per window; each window starts without context.
        threads: Worker threads; every processor by default.
        progress: Called with the name at hand, how many are done and how many there are.

    Returns:
        For each tensor of both models the relative RMS error of ``b``, the largest difference and
        the cosine; with ``text`` the losses in nats per token and the divergence, with standard
        errors.

    Raises:
        CheckpointError: Every problem of either source, or every tensor whose shapes differ.
        UsageError: The models have no tensor name in common, or the text is too short.
        ParseError: The text is not valid UTF-8 or JSON.
        OSError: The text cannot be read.

    Example:
        >>> comparison = compare("Llama-3.2-1B", "Llama-3.2-1B-4bit")  # doctest: +SKIP
        >>> max(comparison.layers, key=lambda layer: layer.relative_rms or 0)  # doctest: +SKIP
    """
    texts = [] if text is None else [Path(text)]
    for path in texts:
        path.open("rb").close()  # fail before the long work
    prompts = image_prompts(map(Path, images), texts)
    planned = _plans(a, b)
    plans = [x.plan for x in planned]
    tensors_a, tensors_b = (_tensor_sources(plan) for plan in plans)
    common = [name for name in tensors_a if name in tensors_b]
    if not common:
        raise UsageError(f"{a} and {b} share no name of a tensor: not two forms of one model")
    _check_shapes(str(b), common, tensors_a, tensors_b)
    stored_as = [{x.layer: x.source for x in plan.layers} for plan in plans]
    layers = []
    for number, name in enumerate(common):
        if progress is not None:
            progress(name, number, len(common))
        pair = (tensors_a[name], tensors_b[name])
        stored = [known.get(x.layer, "") for known, x in zip(stored_as, pair, strict=True)]
        values = [_values(p, x, threads) for p, x in zip(planned, pair, strict=True)]
        layers.append(_compare_tensor(name, pair[0].tensor.info.shape, stored, values))
    evaluation = None
    if text is not None or prompts:
        windows = _Windows(texts, tokens, window, prompts)
        count = None if progress is None else partial(progress, "window of text")
        evaluation = _evaluate(a, b, windows, threads, count)
    return Comparison(
        a=str(a),
        b=str(b),
        layout=plans[0].layout,
        layers=tuple(layers),
        only_a=tuple(name for name in tensors_a if name not in tensors_b),
        only_b=tuple(name for name in tensors_b if name not in tensors_a),
        bits_per_weight_a=plans[0].bits_per_weight_in,
        bits_per_weight_b=plans[1].bits_per_weight_in,
        evaluation=evaluation,
    )


@dataclass(frozen=True, slots=True)
class _Windows:
    """What two models are evaluated on: at most one text, and prompts about images."""

    texts: Sequence[Path]
    tokens: int
    window: int
    prompts: Sequence[ImagePrompt]


def _evaluate(
    a: Source,
    b: Source,
    windows: _Windows,
    threads: int | None,
    progress: Callable[[int, int], None] | None,
) -> Evaluation:
    """Load both models with the weights that they store, and evaluate them.

    Raises:
        UsageError: There are less than two windows.
    """
    with_images = bool(windows.prompts)
    model_a, tokenizer = load_as_stored(a, with_images=with_images, threads=threads)
    prompts: list[Prompt] = []
    if with_images:
        planned = plan_text_model(a, with_images=True)
        drawn = ImageWindows.of(a, planned, model_a.whole, windows.prompts)
        prompts = list(drawn.within(windows.tokens, seed=0).windows)
    ids = np.zeros((0, windows.window), np.int64)
    if any(True for path in windows.texts for _ in read_documents(path)):
        ids = read_tokens(windows.texts[0], tokenizer, windows.tokens, windows.window)
    if len(ids) + len(prompts) < 2:
        raise UsageError("a standard error needs two windows: give a text or more images")
    model_b, _ = load_as_stored(b, with_images=with_images, threads=threads)
    with product_threads(threads):
        return evaluate(model_a, model_b, [*ids, *prompts], progress)


def _plans(a: Source, b: Source) -> list[Planned]:
    """Plan both models dense in float32, with names of the same layout."""
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
    """An output tensor of a plan, and the steps that compute it."""

    layer: str
    tensor: OutputTensor
    steps: tuple[Step, ...]


def _tensor_sources(plan: Plan) -> dict[str, _TensorSource]:
    sources: dict[str, _TensorSource] = {}
    for step in plan.steps:
        for out in step.outputs.values():
            before = sources[out.name].steps if out.name in sources else ()
            sources[out.name] = _TensorSource(step.layer, out, (*before, step))
    return sources


def _check_shapes(
    source: str, common: list[str], a: Mapping[str, _TensorSource], b: Mapping[str, _TensorSource]
) -> None:
    problems = []
    for name in common:
        expected, actual = a[name].tensor.info.shape, b[name].tensor.info.shape
        if prod(expected) != prod(actual) or (len(expected) > 1 and expected != actual):
            message = f"is {list(actual)}, expected {list(expected)} as in the first"
            problems.append(Problem(name, message))
    if problems:
        raise CheckpointError(source, problems)


class _TensorSink:
    """A sink that keeps the bytes of one tensor."""

    shards = progress_log = None

    def __init__(self, tensor: OutputTensor) -> None:
        self.tensor, self.data = tensor, bytearray(tensor.info.nbytes)

    def write(self, file: str, offset: int, data: memoryview) -> None:
        """Store ``data`` if it belongs to the tensor."""
        start = offset - self.tensor.offset
        if file == self.tensor.file and 0 <= start < len(self.data):
            self.data[start : start + data.nbytes] = data


def _values(planned: Planned, source: _TensorSource, threads: int | None) -> np.ndarray:
    """Compute a tensor's values: a flat array in the dtype of the plan."""
    part = subplan(planned.plan, source.steps)
    sink = _TensorSink(source.tensor)
    run_plan(part, planned.source, sink, plan_resources(part, threads))
    return np.frombuffer(sink.data, NUMPY_DTYPE[source.tensor.info.dtype])


def _compare_tensor(
    name: str, shape: tuple[int, ...], stored: Sequence[str], values: Sequence[np.ndarray]
) -> LayerComparison:
    """Compare the values of A and B, summed in float64 and block by block."""
    a, b = values
    difference = squares_a = squares_b = product = largest = 0.0
    nonfinite = 0
    for start in range(0, a.size, _BLOCK):
        x = a[start : start + _BLOCK].astype(np.float64)
        y = b[start : start + _BLOCK].astype(np.float64)
        finite = np.isfinite(x) & np.isfinite(y)
        if not finite.all():
            nonfinite += int(x.size - finite.sum())
            x, y = np.where(finite, x, 0.0), np.where(finite, y, 0.0)
        d = y - x
        difference += float(d @ d)
        squares_a += float(x @ x)
        squares_b += float(y @ y)
        product += float(x @ y)
        largest = max(largest, float(np.abs(d).max()))
    same = difference == 0.0
    norm = sqrt(squares_a) * sqrt(squares_b)
    return LayerComparison(
        name=name,
        shape=shape,
        a=stored[0],
        b=stored[1],
        relative_rms=sqrt(difference / squares_a) if squares_a else (0.0 if same else None),
        max_error=largest,
        cosine=1.0 if same else min(1.0, max(-1.0, product / norm)) if norm else None,
        nonfinite=nonfinite,
    )
