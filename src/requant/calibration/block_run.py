"""``calibrate``: run windows of a text through a model, and write statistics of its layers' inputs.

What is done is kept in a ``RunFolder`` next to the output, so that the same command resumes.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import deque
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
from requant.calibration.run_folder import (
    BlockRunState,
    FinishedRun,
    RunFolder,
    as_output_errors,
)
from requant.calibration.section_sums import SectionSums, section_ends
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
from requant.quantization.part import Part
from requant.text import pluralize

if TYPE_CHECKING:
    import mlx.core as mx

DEFAULT_TOKENS = 32_768
DEFAULT_WINDOW = 512
# Of all Hessians of one layer; a wider layer is left out, and named.
MOST_HESSIAN_BYTES = 4 << 30
_STATE = 4  # changes with what is kept of a stopped run

_AHEAD = 8  # windows whose computation on a GPU is begun before the first is waited for

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
        part: The part of the windows that was run; its sums are kept for ``join``. Tokens and
            windows are those of the whole text. None for the whole.
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
    part: Part | None = None

    @classmethod
    def of(
        cls,
        finished: FinishedRun,
        output: Path,
        state: BlockRunState,
        began: float,
        part: Part | None = None,
    ) -> Calibration:
        """What a run that ``began`` at a time of ``perf_counter`` collected."""
        seen = {*state.called, *finished.embeddings}
        without_tokens = {path: x["without_tokens"] for path, x in state.layers.items()}
        return cls(
            source=finished.source,
            output=str(output),
            tokens=finished.tokens,
            windows=finished.windows,
            images=finished.images,
            layers=len(state.layers),
            hessians=sum(layer["hessian"] for layer in state.layers.values()),
            too_wide=state.too_wide,
            not_observed=tuple(path for path in finished.watched if path not in seen),
            without_tokens={path: count for path, count in without_tokens.items() if count},
            blockwise=not finished.reason,
            reason=finished.reason,
            elapsed_s=time.perf_counter() - began,
            part=part,
        )

    def to_dict(self) -> dict[str, Any]:
        """The calibration as JSON data."""
        return asdict(self) | {"part": None if self.part is None else str(self.part)}


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
    part: Part | str | None = None,
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
        part: "3/8" runs one part of the windows, of 8 at most; others may run at the same time on
            other machines that share the folder of ``output``. ``join(output)`` then adds their
            sums; the file is the same as that of one process.
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
        part=None if part is None else Part.parse(part),
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
    part: Part | None = None,
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
    task = Task(
        model=model,
        planned=planned,
        ids=ids,
        pictures=pictures,
        hessian=hessian,
        seed=seed,
        revision=revision,
        config_from=config_from,
        threads=threads,
        part=part,
    )
    task.check_part()
    return task


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
        RunFolder(planned.plan.source, output, task.key, resume, task.part) as folder,
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
        images = 0 if pictures is None else len(pictures.windows.prompts)
        finished = FinishedRun(
            source=str(task.model),
            tokens=int(ids.size) + (0 if pictures is None else pictures.tokens),
            windows=task.inputs,
            images=images,
            reason=reason,
            metadata={"requant": version(), **metadata},
            watched=(*observed_layers(network).values(), *unobserved_layers(network)),
            embeddings=tuple(embedding_layers(network).values()),
        )
        folder.finish(finished)
    return Calibration.of(finished, output, folder.state, began, task.part)


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
    part: Part | None = None

    @property
    def key(self) -> str:
        """Hash of everything that the statistics depend on."""
        parts = [_STATE, self.planned.plan.hash, version(), self.hessian, list(self.ids.shape)]
        if self.pictures is not None:
            parts.append(self.pictures.digest)
        return hashlib.sha256(json.dumps(parts).encode() + self.ids.tobytes()).hexdigest()

    @property
    def inputs(self) -> int:
        """How many windows and prompts about images there are."""
        return len(self.ids) + (0 if self.pictures is None else len(self.pictures.windows.prompts))

    def check_part(self) -> None:
        """Raise UsageError where there are more parts than sections."""
        count = len(section_ends(self.inputs))
        if self.part is not None and self.part.count > count:
            raise UsageError(
                f"--part {self.part}: {pluralize(self.inputs, 'window')} of text can be cut into "
                f"{pluralize(count, 'part')} at most; give fewer parts, or more --tokens"
            )

    @property
    def windows(self) -> range:
        """Those that this process runs."""
        ends = [0, *section_ends(self.inputs)]
        count, part = len(ends) - 1, self.part or Part(1, 1)
        first, last = (count * number // part.count for number in (part.number - 1, part.number))
        return range(ends[first], ends[last])

    def sections(self, model: TextModel, folder: RunFolder, done: int) -> BlockSections:
        """What collects the sums of a block."""
        collector = Collector(observed_layers(model), self.hessian, MOST_HESSIAN_BYTES)
        return BlockSections(self, collector, folder, done)

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


class BlockSections:
    """Collects the sums of one block, section by section; ``done`` counts the blocks with it."""

    def __init__(self, task: Task, collector: Collector, folder: RunFolder, done: int) -> None:
        self.collector, self._task, self._folder, self._done = collector, task, folder, done
        self._sums = SectionSums(folder.path, done, durable=task.part is not None)

    def of(self, inputs: Iterable[_T]) -> Iterator[_T]:
        """The inputs of the windows; sums begin at zero with each section."""
        windows, ends = self._task.windows, section_ends(self._task.inputs)
        for window, x in zip(windows, inputs, strict=True):
            if window in ends and window > windows.start:
                self._end(ends.index(window))
            yield x
        self._end(ends.index(windows.stop), is_last=True)

    def _end(self, section: int, *, is_last: bool = False) -> None:
        sums = self.collector.take()
        self._folder.check_finite(sums)
        with as_output_errors(self._folder.path):
            self._sums.add((section, section + 1), sums)
            if is_last and self._task.part is None:
                self.collector.sums = self._sums.total()
            else:
                self._sums.save()

    def save(self) -> None:
        """Write the sums of the block; from now on it is done."""
        self._folder.save_block(self.collector, self._done, self._sums.files())


def run_blockwise(
    task: Task, model: TextModel, folder: RunFolder, progress: ProgressCallback | None
) -> None:
    """Run a model without its weights block by block, from the first block that is not done.

    ``progress`` counts windows through blocks.

    Raises:
        NotBlockwiseError: The model cannot be run so.
    """
    import mlx.core as mx

    layered = BlockwiseModel(model, *task.planned, task.threads)
    layered.load_rest()
    calls = layered.calls(task.ids[0], task.ids[-1])
    first = layered.embed(task.ids[0])
    ids = task.ids[task.windows.start : task.windows.stop]
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
        sections = task.sections(model, folder, number + 1)
        collector = sections.collector
        with blas_products(), collector.observing(), layered.block(number) as block:
            step = partial(layered.step, block, call=calls[number])
            rows = report(what, number, hidden.read(number))
            inputs = (mx.array(row[None]).astype(first.dtype) for row in sections.of(rows))
            hidden.write(number + 1, _block_outputs(step, inputs, collector))
        sections.save()
    if folder.state.done == len(calls):
        sections = task.sections(model, folder, len(calls) + 1)
        collector = sections.collector
        with collector.observing():
            states_of = sections.of(report("head", len(calls), hidden.read(len(calls))))
            for row, states in zip(ids, states_of, strict=True):
                layered.finish(row, mx.array(states[None]).astype(first.dtype))
                with as_backend_errors():
                    collector.flush()
        sections.save()


def _block_outputs(
    step: Callable[[mx.array], mx.array], inputs: Iterable[mx.array], collector: Collector
) -> Iterator[np.ndarray]:
    """Run one block on the hidden states of each window; a GPU works on some windows ahead."""
    import mlx.core as mx

    ahead = 0 if on_cpu() else _AHEAD
    begun: deque[mx.array] = deque()
    for hidden in inputs:
        with as_backend_errors():
            begun.append(step(hidden).astype(mx.float32))
            collector.flush(begun[-1])
            if len(begun) <= ahead:
                continue
            output = _to_numpy(begun.popleft())
        yield output
    with as_backend_errors():
        rest = [_to_numpy(output) for output in begun]
    yield from rest


def run_whole(
    task: Task, model: TextModel, folder: RunFolder, progress: ProgressCallback | None
) -> None:
    """Run a model that has its weights, window by window: the text, then the images."""
    import mlx.core as mx

    prompts = () if task.pictures is None else task.pictures.windows

    def inputs() -> Iterator[tuple[Any, ...]]:
        for number, row in enumerate(task.ids):
            if number in task.windows:
                if progress is not None:
                    progress("window of text", number, len(task.ids))
                yield (mx.array(row[None]),)
        for number, prompt in enumerate(prompts):
            if number + len(task.ids) in task.windows:
                if progress is not None:
                    progress("prompt about an image", number, len(prompts))
                yield mx.array(prompt.ids[None]), prompt.inputs

    sections = task.sections(model, folder, 0)
    with blas_products(), sections.collector.observing():
        for arguments in sections.of(inputs()):
            with as_backend_errors():
                sections.collector.flush(model(*arguments))
    sections.save()


def _to_numpy(x: mx.array) -> np.ndarray:
    """The only entry of a batch, in float32."""
    import mlx.core as mx

    row: np.ndarray = np.array(x.astype(mx.float32))[0]
    return row
