"""The entry point of calibration: windows of text through a model, sums over its layers to a file.

A run keeps what it has in ``.OUTPUT.requant-calibrating`` next to OUTPUT: the hidden states after
the last finished block, and a statistics file a block. The same command resumes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from requant.calibration.blocks import BlockwiseModel, NotBlockwiseError
from requant.calibration.collector import Collector, hessian_bytes
from requant.calibration.text_windows import texts_of, windows_of
from requant.core.types import Source
from requant.errors import (
    BackendError,
    CheckpointError,
    OutputError,
    Problem,
    UsageError,
    error_action,
)
from requant.importance.reader import merge_statistics, write_statistics
from requant.mlx_lm import Loaded, load_tokenizer, load_with_report
from requant.mlx_lm.evaluation import on_cpu
from requant.mlx_lm.loading import build_empty_model, check_installed
from requant.output.record import version
from requant.output.staging import lock_staging
from requant.planning.planner import Planned, plan_with_source
from requant.quantization.options import ConvertOptions
from requant.sources.hub_repository import find_repository, open_source
from requant.sources.open import as_checkpoint

if TYPE_CHECKING:
    import mlx.core as mx

DEFAULT_TOKENS = 32_768
DEFAULT_WINDOW = 512
# Of all Hessians of one layer; a wider layer is left out, and named.
MOST_HESSIAN_BYTES = 4 << 30
_STATE = 2  # changes with what is kept of a stopped run

ProgressCallback = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Calibration:
    """What a run collected.

    Attributes:
        source: The model.
        output: The file.
        tokens: Tokens of text that the model read.
        windows: Pieces of text, each without context before it.
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
        model: Whatever ``requant.mlx_lm.load`` takes.
        output: File to write, ``.safetensors``.
        text: Text files, or ``.jsonl`` with a string or an object with ``text`` a line; None for
            a short text that comes with requant.
        hessian: Collect the mean of ``x x^T`` as well, as ``convert(..., gptq=True)`` needs it:
            4 bytes times the square of a layer's inputs.
        tokens: Of the text, at most.
        window: Tokens that are read in one go.
        seed: Decides which windows of a longer text are taken.
        revision: Of a model on the hub.
        config_from: For GGUF, as in ``convert``.
        threads: Threads that decode the source.
        force: Replace ``output``.
        resume: Resume the same call after a stop; False starts over.
        progress: Called with what is done, how many, and of how many.
        on_note: Called before the model is run, with what the file will lack.

    Returns:
        How many layers and Hessians were collected, of how many tokens, and what is missing.

    Raises:
        HubError: A repository cannot be reached or denies access.
        CheckpointError: The model cannot be read, or mlx-lm has no class for it.
        UsageError: The text is too short, or the output's name is not a ``.safetensors``.
        OutputError: The output exists or cannot be written.
    """
    began = time.perf_counter()
    place = Path(output)
    _check_output(place, force)
    if window < 2 or tokens < window:
        raise UsageError(
            f"{tokens:,} tokens in windows of {window:,}: one window is the least; raise --tokens, "
            "or lower --window (2 at the least)"
        )
    check_installed(Path(model))
    options = ConvertOptions.from_arguments(
        dequantize=True,
        dtype="float32" if on_cpu() else None,
        layout="mlx-lm",
        config_from=config_from,
    )
    source = open_source(model, find_repository(model, revision), options.config_from)
    planned = plan_with_source(as_checkpoint(source, options.config_from), options)
    ids = windows_of(load_tokenizer(model, planned), texts_of(text), tokens, window, seed)
    metadata = {
        "requant": version(),
        "tokens": str(ids.size),
        "window": str(window),
        "seed": str(seed),
        "text_sha256": hashlib.sha256(ids.tobytes()).hexdigest(),
    }
    with _Run(
        planned=planned,
        ids=ids,
        hessian=hessian,
        output=place,
        resume=resume,
        threads=threads,
        progress=progress,
        on_note=on_note,
    ) as run:
        try:
            made = run.blockwise()
        except NotBlockwiseError as error:
            run.start_over()
            loaded = load_with_report(
                model,
                dequantize=True,
                dtype=options.dtype and "float32",
                revision=revision,
                config_from=config_from,
                threads=threads,
            )
            made = run.whole(loaded, str(error))
        run.finish(metadata)
    return Calibration(
        source=str(model),
        output=str(place),
        tokens=int(ids.size),
        windows=len(ids),
        elapsed_s=time.perf_counter() - began,
        **made,
    )


def _check_output(place: Path, force: bool) -> None:
    if place.suffix != ".safetensors":
        raise UsageError(f"{place}: name the statistics file NAME.safetensors")
    if place.exists() and not (force and place.is_file()):
        raise OutputError(f"{place} is there already; --force replaces it")
    if not place.parent.is_dir():
        raise OutputError(f"{place}: there is no folder {place.parent}")


class _Run:
    """One calibration: what is kept on the disk, and the two ways to run a model."""

    def __init__(
        self,
        planned: Planned,
        ids: np.ndarray,
        hessian: bool,
        output: Path,
        resume: bool,
        threads: int | None,
        progress: ProgressCallback | None,
        on_note: Callable[[str], None] | None,
    ) -> None:
        self.plan, self.source = planned
        self.ids, self.hessian, self.output = ids, hessian, output
        self.threads, self.progress, self.on_note = threads, progress, on_note
        self.folder = output.with_name(f".{output.name}.requant-calibrating")
        reported = [_STATE, self.plan.hash, version(), hessian, list(ids.shape)]
        self._lock = self._locked()
        self.key = hashlib.sha256(json.dumps(reported).encode() + ids.tobytes()).hexdigest()
        self.state: dict[str, Any] = {}
        self.resume = resume

    def __enter__(self) -> _Run:
        self.state = self._load_state() if self.resume else {}
        if not self.state:
            self.start_over()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        os.close(self._lock)
        done = self.state.get("done", -1)
        if isinstance(error, KeyboardInterrupt | OSError) and done >= 0:
            error.add_note(
                f"blocks done and kept in {self.folder}: {done}; the same command "
                "resumes, --no-resume starts over"
            )

    def _locked(self) -> int:
        with _writing(self.folder):
            return lock_staging(self.folder, self.output)

    def _announce(self, model: Any) -> None:
        """Name the layers that are too wide for a Hessian, once, before the long work."""
        embeddings = _embeddings(model).values()
        modules = dict(model.named_modules())
        for path in (
            sorted(_observed_layers(model).values()) if self.hessian and self.on_note else ()
        ):
            *stack, _, n_in = modules[path].weight.shape
            nbytes = hessian_bytes(prod(stack), n_in)
            if nbytes > MOST_HESSIAN_BYTES and path not in embeddings and self.on_note:
                self.on_note(
                    f"{path}: its Hessian would take {nbytes:,} bytes, more than "
                    f"{MOST_HESSIAN_BYTES:,}: it gets none"
                )
        self.on_note = None

    # -- what is kept ----------------------------------------------------------------------

    def _load_state(self) -> dict[str, Any]:
        """What a stopped run of the same calibration left; {} if there is none."""
        try:
            found = json.loads((self.folder / "state.json").read_text("utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) and found.get("key") == self.key else {}

    def start_over(self) -> None:
        """Forget what an earlier run left."""
        for path in self.folder.iterdir():
            if path.name != "lock":
                path.unlink()
        self.state = {"key": self.key, "done": -1, "parts": [], "layers": {}}
        self.state |= {"too_wide": [], "called": []}

    def _report(self, what: str, done: int, of: int) -> None:
        if self.progress is not None:
            self.progress(what, done, of)

    def _save_block(self, collector: Collector, done: int) -> None:
        """Write the sums of a block; from now on it is done.

        Raises:
            CheckpointError: They hold NaN or infinity.
        """
        nonfinite_layers = [path for path, sums in collector.sums.items() if not sums.are_finite()]
        if nonfinite_layers:
            message = "the text's inputs become NaN or infinite: weights before it hold such values"
            problems = [Problem(path, message) for path in nonfinite_layers]
            raise CheckpointError(str(self.plan.source), problems)
        name = f"{done:05d}.safetensors"
        layers = {path: sums.statistics() for path, sums in collector.sums.items()}
        hessians = {
            path: (sums.hessian_shape, sums.hessian)
            for path, sums in collector.sums.items()
            if sums.products is not None
        }
        if layers:
            with _writing(self.folder / name):
                write_statistics(self.folder / name, layers, hessians)
        parts = [*self.state["parts"], name] if layers else self.state["parts"]
        reported = {
            path: {"without_tokens": int((sums.count == 0).sum()), "hessian": path in hessians}
            for path, sums in collector.sums.items()
        }
        self.state = {
            "key": self.key,
            "done": done,
            "parts": parts,
            "layers": self.state["layers"] | reported,
            "too_wide": sorted({*self.state["too_wide"], *collector.too_wide}),
            "called": sorted({*self.state["called"], *collector.called}),
        }
        hidden = self.folder / "state.new"
        with _writing(hidden), hidden.open("w", encoding="utf-8") as file:
            json.dump(self.state, file)
            file.flush()
            os.fsync(file.fileno())
        hidden.replace(self.folder / "state.json")

    def finish(self, metadata: dict[str, str]) -> None:
        """Put the parts together under the output's name."""
        parts = [self.folder / name for name in self.state["parts"]]
        with _writing(self.output):
            merge_statistics(parts, self.output, metadata)
        shutil.rmtree(self.folder, ignore_errors=True)

    # -- runs ------------------------------------------------------------------------------

    def blockwise(self) -> dict[str, Any]:
        """Run the model block by block.

        Raises:
            NotBlockwiseError: It cannot be.
        """
        import mlx.core as mx

        model = build_empty_model(self.plan)
        layered = BlockwiseModel(model, self.plan, self.source, self.threads)
        watched = _observed_layers(model)
        self._announce(model)
        layered.load_rest()
        calls = layered.calls(self.ids[0], self.ids[-1])
        first = layered.embed(self.ids[0])
        steps = len(layered.blocks) + 2
        shape = (*self.ids.shape, first.shape[-1])
        if self.state["done"] < 0:
            self._write_hidden_states(0, (_numpy(layered.embed(row)) for row in self.ids))
            self._save_block(Collector({}, False, 0), 0)
        for number, call in list(enumerate(calls))[self.state["done"] :]:
            self._report(f"block {number + 1} of {len(calls)}", number + 1, steps)
            collector = self._collector(watched, with_numpy=on_cpu())
            with collector.observing(), layered.block(number) as block:

                def through(row: np.ndarray) -> np.ndarray:
                    hidden = mx.array(row[None]).astype(first.dtype)
                    with _failing():
                        made = layered.step(block, hidden, call)  # noqa: B023
                        collector.flush(made)  # noqa: B023
                    return _numpy(made)

                self._write_hidden_states(
                    number + 1, map(through, self._read_hidden_states(number, shape))
                )
            self._save_block(collector, number + 1)
        if self.state["done"] == len(calls):
            self._report("head", steps - 1, steps)
            collector = self._collector(watched)
            with collector.observing():
                for row, hidden in zip(
                    self.ids, self._read_hidden_states(len(calls), shape), strict=True
                ):
                    layered.finish(row, mx.array(hidden[None]).astype(first.dtype))
                    with _failing():
                        collector.flush()
            self._save_block(collector, len(calls) + 1)
        self._report("writing", steps, steps)
        return self._summary(model, watched, "")

    def whole(self, loaded: Loaded, why: str) -> dict[str, Any]:
        """Run the whole model, window by window."""
        import mlx.core as mx

        watched = _observed_layers(loaded.model)
        self._announce(loaded.model)
        collector = self._collector(watched, with_numpy=on_cpu())
        with collector.observing():
            for number, row in enumerate(self.ids):
                self._report("window of text", number + 1, len(self.ids))
                with _failing():
                    collector.flush(loaded.model(mx.array(row[None])))
        self._save_block(collector, 0)
        return self._summary(loaded.model, watched, why)

    def _collector(self, watched: dict[int, str], *, with_numpy: bool = False) -> Collector:
        return Collector(watched, self.hessian, MOST_HESSIAN_BYTES, with_numpy=with_numpy)

    # Hidden states before a block, float32, a window after the other; two files take turns.

    def _write_hidden_states(self, number: int, states: Iterator[np.ndarray]) -> None:
        path = self.folder / f"hidden-{number % 2}"
        with _writing(path), path.open("wb") as file:
            for row in states:
                file.write(np.ascontiguousarray(row, np.float32).data)
            file.flush()
            os.fsync(file.fileno())

    def _read_hidden_states(self, number: int, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
        path = self.folder / f"hidden-{number % 2}"
        with path.open("rb") as file:
            for _ in range(shape[0]):
                row = np.empty(shape[1:], np.float32)
                if file.readinto(row.data.cast("B")) < row.nbytes:
                    self.state = {}
                    message = "is not what the stopped run left; --no-resume starts over"
                    raise OutputError(f"{path}: {message}")
                yield row

    def _summary(self, model: Any, watched: dict[int, str], why: str) -> dict[str, Any]:
        layers, seen = self.state["layers"], {*self.state["called"], *_embeddings(model).values()}
        return {
            "layers": len(layers),
            "hessians": sum(layer["hessian"] for layer in layers.values()),
            "too_wide": tuple(self.state["too_wide"]),
            "not_observed": tuple(
                path for path in (*watched.values(), *_unwatched(model)) if path not in seen
            ),
            "without_tokens": {
                path: x["without_tokens"] for path, x in layers.items() if x["without_tokens"]
            },
            "blockwise": not why,
            "reason": why,
        }


def _observed_layers(model: Any) -> dict[int, str]:
    """The layers to watch: ``id`` -> path. An embedding is called as one where it is the head."""
    from mlx.nn.layers.linear import Linear
    from mlx_lm.models.switch_layers import SwitchLinear

    kinds = (Linear, SwitchLinear)
    found = {id(m): path for path, m in model.named_modules() if isinstance(m, kinds)}
    return found | _embeddings(model)


def _unwatched(model: Any) -> list[str]:
    """Layers of other classes that mlx-lm quantizes all the same."""
    watched = _observed_layers(model)
    return [
        path
        for path, m in model.named_modules()
        if hasattr(m, "to_quantized") and id(m) not in watched
    ]


def _embeddings(model: Any) -> dict[int, str]:
    from mlx.nn.layers.embedding import Embedding

    return {id(m): path for path, m in model.named_modules() if isinstance(m, Embedding)}


def _numpy(x: mx.array) -> np.ndarray:
    import mlx.core as mx

    made: np.ndarray = np.array(x.astype(mx.float32))[0]
    return made


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Raise errors of the operating system as OutputError."""
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"{path}: {error.strerror or error}") from error


@contextmanager
def _failing() -> Iterator[None]:
    """Raise errors of MLX as RunError."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise BackendError(f"MLX cannot run this model here: {error}") from error
