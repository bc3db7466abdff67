"""``calibrate``: run windows of a text through a model, and write statistics of its layers' inputs.

What is done is kept in a ``RunFolder`` next to the output, so that the same command resumes.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from requant.calibration.blocks import BlockwiseModel, NotBlockwiseError
from requant.calibration.collector import (
    Collector,
    embedding_layers,
    hessian_bytes,
    observed_layers,
    unobserved_layers,
)
from requant.calibration.image_windows import DrawnImages, ImageWindows
from requant.calibration.run_folder import BlockRunState, RunFolder
from requant.calibration.text_model import (
    TextModel,
    build_empty_text_model,
    load_text_model,
    plan_text_model,
)
from requant.calibration.text_windows import texts_of, windows_of
from requant.core.types import Source
from requant.errors import OutputError, UsageError, error_action
from requant.libraries.loading import check_installed
from requant.mlx_lm import load_tokenizer
from requant.mlx_lm.evaluation import as_backend_errors
from requant.mlx_vlm.image_prompts import image_prompts
from requant.nn.blas_products import blas_products, on_cpu, product_threads
from requant.output.record import version
from requant.planning.planner import Planned

if TYPE_CHECKING:
    import mlx.core as mx

DEFAULT_TOKENS = 32_768
DEFAULT_WINDOW = 512
# Of all Hessians of one layer; a wider layer is left out, and named.
MOST_HESSIAN_BYTES = 4 << 30
_STATE = 3  # changes with what is kept of a stopped run

_T = TypeVar("_T")

ProgressCallback = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Calibration:
    """What a run collected.

    Attributes:
        source: The model.
        output: The file.
        tokens: Tokens that the model read, places of images included.
        windows: Pieces of text and prompts about images, each without context before it.
        images: Prompts about images, among them.
        layers: Layers, or stacks of experts, with statistics of their own.
        hessians: Layers with a Hessian, among them.
        too_wide: Layers that a Hessian was asked for, but that are too wide for one.
        not_observed: Layers whose inputs were not seen: never called, or of a class that also
            multiplies the other way round (mlx-lm's ``MultiLinear``). They will be searched
            without weights.
        without_tokens: Stack of experts -> how many of them saw no token.
        blockwise: One block at a time was in memory; else the whole model, for ``reason``.
        reason: Why the model was run as a whole.
        elapsed_s: Seconds that this call took.
    """

    source: str
    output: str
    tokens: int
    windows: int
    images: int
    layers: int
    hessians: int
    too_wide: tuple[str, ...]
    not_observed: tuple[str, ...]
    without_tokens: dict[str, int]
    blockwise: bool
    reason: str
    elapsed_s: float

    def to_dict(self) -> dict[str, Any]:
        """The calibration as JSON data."""
        return asdict(self)


@error_action("calibrated")
def calibrate(
    model: Source,
    output: Source,
    text: Source | Sequence[Source] | None = None,
    *,
    images: Sequence[Source] = (),
    hessian: bool = False,
    tokens: int = DEFAULT_TOKENS,
    window: int = DEFAULT_WINDOW,
    seed: int = 0,
    revision: str | None = None,
    config_from: Source | None = None,
    threads: int | None = None,
    force: bool = False,
    resume: bool = True,
    progress: ProgressCallback | None = None,
    on_note: Callable[[str], None] | None = None,
) -> Calibration:
    """Run a model over a text, and write what the inputs of its layers look like.

    The file weights the search of ``convert(..., statistics=output)``. The model runs dense: in
    float32 on a CPU, else in the dtype of its source. Where its class allows it, one block's
    weights are in memory at a time, and the text's hidden states are on the disk.

    Args:
        model: Whatever ``requant.mlx_lm.load`` or ``requant.mlx_vlm.load`` takes; of a multimodal
            model the language model is run.
        output: File to write, ``.safetensors``.
        text: Text files, or ``.jsonl`` with a string or an object with ``text`` a line; None for
            a short text that comes with requant. A line that also has ``image`` (a path, relative
            to the file, or a list of them) is a prompt about an image.
        images: Image files, or folders of them, for a model of mlx-vlm: each is a prompt too. The
            statistics are of text and images; the whole model is then in memory.
        hessian: Collect the mean of ``x x^T`` as well, as ``convert(..., gptq=True)`` needs it:
            4 bytes times the square of a layer's inputs.
        tokens: Of the text, at most; and of the prompts about images, those that begin within
            as many.
        window: Tokens that are read in one go.
        seed: Decides which windows of a longer text are taken.
        revision: Of a model on the hub.
        config_from: For GGUF, as in ``convert``.
        threads: Threads that decode the source, and that compute on a CPU.
        force: Replace ``output``.
        resume: Resume the same call after a stop; False starts over.
        progress: Called with what is done, how many, and of how many.
        on_note: Called before the model is run, with what the file will lack.

    Returns:
        How many layers and Hessians were collected, of how many tokens, and what is missing.

    Raises:
        HubError: A repository cannot be reached or denies access.
        CheckpointError: The model cannot be read, or neither mlx-lm nor mlx-vlm has a
            class for it that reads text; with images, it takes none, or its processor cannot be
            loaded.
        UsageError: The text is too short, an image cannot be read, or the output's name is not a
            ``.safetensors``.
        OutputError: The output exists or cannot be written.
    """
    place = Path(output)
    _check_output(place, force)
    task = prepare(
        model,
        text,
        images=images,
        hessian=hessian,
        tokens=tokens,
        window=window,
        seed=seed,
        revision=revision,
        config_from=config_from,
        threads=threads,
    )
    return run(task, place, resume=resume, progress=progress, on_note=on_note)


def prepare(
    model: Source,
    text: Source | Sequence[Source] | None = None,
    *,
    images: Sequence[Source] = (),
    hessian: bool = False,
    tokens: int = DEFAULT_TOKENS,
    window: int = DEFAULT_WINDOW,
    seed: int = 0,
    revision: str | None = None,
    config_from: Source | None = None,
    threads: int | None = None,
) -> Task:
    """What ``calibrate`` is to do, with the same arguments: a model's plan, and a text's tokens.

    Raises:
        HubError, CheckpointError, UsageError: As ``calibrate``.
    """
    if window < 2 or tokens < window:
        raise UsageError(
            f"{tokens:,} tokens in windows of {window:,}: one window is the least; raise --tokens, "
            "or lower --window (2 at the least)"
        )
    texts = texts_of(text)
    prompts = image_prompts(map(Path, images), texts)
    check_installed(model, "mlx-vlm" if prompts else "mlx-lm")
    planned = plan_text_model(model, revision, config_from, with_images=bool(prompts))
    tokenizer = load_tokenizer(model, planned)
    ids = windows_of(tokenizer, texts, tokens, window, seed, may_be_empty=bool(prompts))
    pictures = None
    if prompts:
        network = build_empty_text_model(planned.plan)
        pictures = ImageWindows.of(model, planned, network.whole, prompts).within(tokens, seed)
    return Task(
        model=model,
        planned=planned,
        ids=ids,
        pictures=pictures,
        hessian=hessian,
        seed=seed,
        revision=revision,
        config_from=config_from,
        threads=threads,
    )


def run(
    task: Task,
    output: Path,
    *,
    resume: bool = True,
    progress: ProgressCallback | None = None,
    on_note: Callable[[str], None] | None = None,
) -> Calibration:
    """Calibrate, and write the statistics file ``output``.

    Raises:
        HubError, CheckpointError, OutputError: As ``calibrate``.
    """
    began = time.perf_counter()
    planned, ids, pictures = task.planned, task.ids, task.pictures
    with (
        product_threads(task.threads),
        RunFolder(planned.plan.source, output, task.key, resume) as folder,
    ):
        network = build_empty_text_model(planned.plan)
        if task.hessian and on_note is not None:
            for note in _notes_of_wide_layers(network):
                on_note(note)
        reason = "images are run through all of it" if pictures else ""
        try:
            if not reason:
                run_blockwise(task, network, folder, progress)
        except NotBlockwiseError as error:
            reason = str(error)
        if reason:  # outside of the handler, which would keep the first model's weights
            folder.start_over()
            network = task.load_whole()
            run_whole(task, network, folder, progress)
        numbers = {"tokens": ids.size, "window": ids.shape[1], "seed": task.seed}
        metadata = {key: str(number) for key, number in numbers.items()}
        metadata["text_sha256"] = hashlib.sha256(ids.tobytes()).hexdigest()
        if pictures is not None:
            metadata |= {"images": str(len(pictures.windows.prompts))}
            metadata |= {"image_tokens": str(pictures.tokens), "images_sha256": pictures.digest}
        folder.finish({"requant": version(), **metadata})
    seen = 0 if pictures is None else len(pictures.windows.prompts)
    return Calibration(
        source=str(task.model),
        output=str(output),
        tokens=int(ids.size) + (0 if pictures is None else pictures.tokens),
        windows=len(ids) + seen,
        images=seen,
        blockwise=not reason,
        reason=reason,
        elapsed_s=time.perf_counter() - began,
        **_summary(folder.state, network),
    )


def _summary(state: BlockRunState, model: TextModel) -> dict[str, Any]:
    """The attributes of a ``Calibration`` that say which layers have statistics."""
    seen = {*state.called, *embedding_layers(model).values()}
    watched = [*observed_layers(model).values(), *unobserved_layers(model)]
    without_tokens = {path: x["without_tokens"] for path, x in state.layers.items()}
    return {
        "layers": len(state.layers),
        "hessians": sum(layer["hessian"] for layer in state.layers.values()),
        "too_wide": state.too_wide,
        "not_observed": tuple(path for path in watched if path not in seen),
        "without_tokens": {path: experts for path, experts in without_tokens.items() if experts},
    }


def _check_output(place: Path, force: bool) -> None:
    if place.suffix != ".safetensors":
        raise UsageError(f"{place}: name the statistics file NAME.safetensors")
    if place.exists() and not (force and place.is_file()):
        raise OutputError(f"{place} is there already; --force replaces it")
    if not place.parent.is_dir():
        raise OutputError(f"{place}: there is no folder {place.parent}")


def _notes_of_wide_layers(model: TextModel) -> Iterator[str]:
    """The layers that are too wide for a Hessian."""
    embeddings = embedding_layers(model).values()
    modules = dict(model.named_modules())
    for path in sorted(observed_layers(model).values()):
        *stack, _, n_in = modules[path].weight.shape
        nbytes = hessian_bytes(prod(stack), n_in)
        if nbytes > MOST_HESSIAN_BYTES and path not in embeddings:
            yield (
                f"{path}: its Hessian would take {nbytes:,} bytes, more than "
                f"{MOST_HESSIAN_BYTES:,}: it gets none"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What is to be calibrated: a model, windows of a text ``(windows, tokens)``, and images."""

    model: Source
    planned: Planned
    ids: np.ndarray
    pictures: DrawnImages | None
    hessian: bool
    seed: int
    revision: str | None
    config_from: Source | None
    threads: int | None

    @property
    def key(self) -> str:
        """Hash of everything that the statistics depend on."""
        parts = [_STATE, self.planned.plan.hash, version(), self.hessian, list(self.ids.shape)]
        if self.pictures is not None:
            parts.append(self.pictures.digest)
        return hashlib.sha256(json.dumps(parts).encode() + self.ids.tobytes()).hexdigest()

    def collector(self, model: TextModel) -> Collector:
        """A new collector of the layers of a model."""
        return Collector(observed_layers(model), self.hessian, MOST_HESSIAN_BYTES)

    def load_whole(self) -> TextModel:
        """The model with its weights."""
        model, _ = load_text_model(
            self.model,
            self.planned.plan.layout,
            dequantize=True,
            dtype="float32" if on_cpu() else None,
            revision=self.revision,
            config_from=self.config_from,
            threads=self.threads,
        )
        return model


def run_blockwise(
    task: Task, model: TextModel, folder: RunFolder, progress: ProgressCallback | None
) -> None:
    """Run a model without its weights block by block, from the first block that is not done.

    ``progress`` counts windows through blocks.

    Raises:
        NotBlockwiseError: The model cannot be run so.
    """
    import mlx.core as mx

    ids = task.ids
    layered = BlockwiseModel(model, *task.planned, task.threads)
    layered.load_rest()
    calls = layered.calls(ids[0], ids[-1])
    first = layered.embed(ids[0])
    hidden = folder.hidden_states((*ids.shape, first.shape[-1]))
    steps = (len(calls) + 1) * len(ids)

    began, before = time.perf_counter(), max(folder.state.done, 0) * len(ids)

    def report(what: str, number: int, inputs: Iterable[_T]) -> Iterator[_T]:
        for window, x in enumerate(inputs):
            done = number * len(ids) + window
            if progress is not None:
                share = (done - before) / steps  # of the model's blocks and the text's tokens
                speed = share * ids.size / max(time.perf_counter() - began, 1e-9)
                progress(f"{what}, {speed:,.0f} tokens/s" if share else what, done, steps)
            yield x

    if folder.state.done < 0:
        hidden.write(0, (_to_numpy(layered.embed(row)) for row in ids))
        folder.save_block(Collector({}, False, 0), 0)
    for number in range(folder.state.done, len(calls)):
        what = f"block {number + 1} of {len(calls)}"
        collector = task.collector(model)
        with blas_products(), collector.observing(), layered.block(number) as block:
            step = partial(layered.step, block, call=calls[number])
            rows = report(what, number, hidden.read(number))
            inputs = (mx.array(row[None]).astype(first.dtype) for row in rows)
            hidden.write(number + 1, _block_outputs(step, inputs, collector))
        folder.save_block(collector, number + 1)
    if folder.state.done == len(calls):
        collector = task.collector(model)
        with collector.observing():
            states_of = report("head", len(calls), hidden.read(len(calls)))
            for row, states in zip(ids, states_of, strict=True):
                layered.finish(row, mx.array(states[None]).astype(first.dtype))
                with as_backend_errors():
                    collector.flush()
        folder.save_block(collector, len(calls) + 1)


def _block_outputs(
    step: Callable[[mx.array], mx.array], inputs: Iterable[mx.array], collector: Collector
) -> Iterator[np.ndarray]:
    """Run one block on the hidden states of each window."""
    for hidden in inputs:
        with as_backend_errors():
            output = step(hidden)
            collector.flush(output)
        yield _to_numpy(output)


def run_whole(
    task: Task, model: TextModel, folder: RunFolder, progress: ProgressCallback | None
) -> None:
    """Run a model that has its weights, window by window: the text, then the images."""
    import mlx.core as mx

    collector = task.collector(model)
    with blas_products(), collector.observing():
        for number, row in enumerate(task.ids):
            if progress is not None:
                progress("window of text", number, len(task.ids))
            with as_backend_errors():
                collector.flush(model(mx.array(row[None])))
        prompts = () if task.pictures is None else task.pictures.windows
        for number, prompt in enumerate(prompts):
            if progress is not None:
                progress("prompt about an image", number, len(prompts))
            with as_backend_errors():
                collector.flush(model(mx.array(prompt.ids[None]), prompt.inputs))
    folder.save_block(collector, 0)


def _to_numpy(x: mx.array) -> np.ndarray:
    """The only entry of a batch, in float32."""
    import mlx.core as mx

    row: np.ndarray = np.array(x.astype(mx.float32))[0]
    return row
