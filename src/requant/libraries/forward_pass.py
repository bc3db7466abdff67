"""One short forward pass of a loaded model, with the inputs that its class takes.

Token ids run wherever the class takes them. An image or a sound goes through the whole model with
the text, or else through its tower alone. What was not run is named, with the reason.
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from requant.libraries import LIBRARIES
from requant.libraries.generation_step import read_prompt
from requant.libraries.loading import Module
from requant.libraries.sample_inputs import TOKENS, Sample, SampleInputs
from requant.libraries.surroundings import cpu, quiet
from requant.text import one_line, pluralize

if TYPE_CHECKING:
    import mlx.core as mx

# Names under which classes of the libraries take an input; and those that may be None.
_IDS = ("input_ids", "inputs", "tokens")
_GRID = ("image_grid_thw", "grid_thw")
_OMITTED = ("pixel_values", "mask", "attention_mask", "cache")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Modality:
    """How classes take an input other than text.

    Attributes:
        name: What it is.
        part: The part of the config that says that a model takes it.
        package: A library all of whose models may take it.
        inputs: Names of the parameter in a whole model.
        towers: Names of the module for it alone.
        tower_inputs: Names of the parameter there.
        placeholders: Settings with the id of its placeholder token.
    """

    name: str
    part: str
    package: str
    inputs: tuple[str, ...]
    towers: tuple[str, ...]
    tower_inputs: tuple[str, ...]
    placeholders: tuple[str, ...]


_MODALITIES = (
    _Modality(
        name="image",
        part="vision_config",
        package="mlx_vlm",
        inputs=("pixel_values", "images"),
        towers=("vision_tower", "vision_model", "visual", "vision_encoder", "image_encoder"),
        tower_inputs=("pixel_values", "x", "hidden_states"),
        placeholders=("image_token_id", "image_token_index"),
    ),
    _Modality(
        name="sound",
        part="audio_config",
        package="mlx_audio",
        inputs=("input_features", "mel", "input_values", "audio_signal"),
        towers=("audio_tower", "audio_encoder", "audio_model", "encoder"),
        tower_inputs=("input_features", "mel", "x", "input_values", "audio"),
        placeholders=("audio_token_id", "audio_token_index"),
    ),
)


@dataclass
class ForwardPass:
    """What a forward pass gave.

    Attributes:
        ran: Each input that was run, such as "text, 8 tokens".
        not_run: Each that was not, with the reason.
        logits: Number of values that were checked: the logits, or the class's other outputs.
        nonfinite: Each output with NaN or infinite values, with their number.
        fails: The class takes token ids, and no pass with text ran, though it could run here.
        needs_metal: The class computes text with kernels that this machine does not have.
    """

    ran: list[str] = field(default_factory=list)
    not_run: list[str] = field(default_factory=list)
    logits: int = 0
    nonfinite: list[str] = field(default_factory=list)
    fails: bool = False
    needs_metal: bool = False

    def check(self, label: str, outputs: Mapping[str, mx.array]) -> None:
        """Count the logits and the values that are not finite."""
        import mlx.core as mx

        self.ran.append(label)
        logits = {name: x for name, x in outputs.items() if name.endswith("logits")} or outputs
        for name, x in logits.items():
            self.logits += x.size
            bad = x.size - int(mx.isfinite(x).sum())
            if bad:
                total = pluralize(x.size, "value")
                self.nonfinite.append(f"{name} of {label}: {bad:,} of {total} NaN or infinite")


def forward(model: Module, config: Mapping[str, Any]) -> ForwardPass:
    """Run a model on the CPU: text, and an image and a sound where it takes them.

    Args:
        model: As the library's loader gives it.
        config: Its ``config.json``.
    """
    result = ForwardPass()
    samples = SampleInputs(model, config)
    with cpu(), quiet():
        parameters = _parameters(model)
        ids = next((name for name in parameters if name in _IDS), None)
        required = {name for name, p in parameters.items() if p.default is p.empty}
        if ids is not None and required <= {ids, *_OMITTED}:
            _run_first("text", _text_runs(model, ids, samples), result)
        for modality in _MODALITIES:
            if modality.part not in config and modality.package not in type(model).__module__:
                continue
            runs = _runs(model, samples, modality, ids)
            if runs is not None:
                _run_first(modality.name, runs, result)
    ran_text = any("text" in label for label in result.ran)
    result.fails = ids is not None and not (ran_text or result.needs_metal)
    return result


@dataclass(frozen=True, slots=True)
class _Run:
    """A call of a model, or of its tower."""

    module: Module
    label: str
    arguments: dict[str, Any]


def _text_runs(model: Module, ids: str, samples: SampleInputs) -> Iterator[_Run]:
    """Calls of a model with text: of the class, else the step of mlx-vlm's generation."""
    label, tokens = f"text, {TOKENS} tokens", samples.token_ids()
    yield _Run(model, label, {ids: tokens})
    if "mlx_vlm" in type(model).__module__ and hasattr(model, "get_input_embeddings"):
        step = partial(read_prompt, model, inputs={})
        yield _Run(step, label, {"ids": tokens})


def _run_first(what: str, runs: Iterator[_Run], result: ForwardPass) -> None:
    """Do the first of several runs that the class takes; name ``what`` if it takes none."""
    import mlx.core as mx

    why = "the config does not have its sizes"
    for run in runs:
        parameters = _parameters(run.module)
        omitted = {n: None for n, p in parameters.items() if n in _OMITTED and p.default is p.empty}
        try:
            outputs = dict(_outputs(run.module(**omitted | run.arguments)))
            mx.eval(list(outputs.values()))
        except Exception as error:  # of the class, for an input of another form
            if _needs_metal(error):
                result.needs_metal = True
                why = f"needs Metal, which this machine does not have{_place_of(error)}"
                break
            why = f"{type(error).__name__}: {one_line(error)}{_place_of(error)}"
            continue
        result.check(run.label, outputs)
        return
    result.not_run.append(f"{what} ({why})")


def _needs_metal(error: Exception) -> bool:
    """Whether a class called a kernel of its own for Metal where MLX has none."""
    return isinstance(error, RuntimeError) and str(error).startswith("[metal_kernel] No Metal")


def _place_of(error: Exception) -> str:
    """The last line of a library's own code that an exception went through, after a comma."""
    found = ""
    packages = {library.package for library in LIBRARIES.values()}
    for frame in traceback.extract_tb(error.__traceback__):
        parts = Path(frame.filename).parts
        start = next((at for at, part in enumerate(parts) if part in packages), None)
        if start is not None:
            found = f", in {'/'.join(parts[start:])}, line {frame.lineno}"
    return found


def _runs(
    model: Module, samples: SampleInputs, modality: _Modality, ids: str | None
) -> Iterator[_Run] | None:
    """The calls that may run an input of a modality; None if the model has no place for it."""
    forms = samples.images if modality.name == "image" else samples.sounds
    parameters = _parameters(model)
    name = next((x for x in modality.inputs if x in parameters), None)
    tower = _tower(model, modality)
    if tower is None and name is None:
        return None

    def calls() -> Iterator[_Run]:
        if name is not None:
            for sample in forms():
                yield from _whole(model, samples, sample, modality, (name, ids))
        if tower is not None:
            path, module = tower
            known = _parameters(module)
            for name_in_tower in (x for x in modality.tower_inputs if x in known):
                for sample in forms():
                    arguments = {name_in_tower: sample.array} | _grid(sample, known)
                    yield _Run(module, f"{sample.label} ({path} alone)", arguments)

    return calls()


def _whole(
    model: Module,
    samples: SampleInputs,
    sample: Sample,
    modality: _Modality,
    names: tuple[str, str | None],
) -> Iterator[_Run]:
    """Calls of the whole model with a sample, and with text if it takes that."""
    import mlx.core as mx

    name, ids = names
    arguments = {name: sample.array} | _grid(sample, _parameters(model))
    if ids is None:
        yield _Run(model, sample.label, arguments)
        return
    for count in sample.tokens or (0,):
        tokens = samples.token_ids(count, modality.placeholders)
        if tokens is not None:
            label = f"{sample.label} and text, {tokens.size} tokens"
            for mask in ({"mask": mx.ones_like(tokens)}, {}):  # a processor gives one
                yield _Run(model, label, arguments | {ids: tokens} | mask)


def _tower(model: Module, modality: _Modality) -> tuple[str, Module] | None:
    """The outermost module for a modality, with its path."""
    found = [
        (path, module)
        for path, module in model.named_modules()
        if path.rpartition(".")[2] in modality.towers and _parameters(module)
    ]
    return min(found, key=lambda pair: pair[0].count("."), default=None)


def _grid(sample: Sample, known: Mapping[str, inspect.Parameter]) -> dict[str, mx.array]:
    """The grid of a sample under the name that a class has for it."""
    import mlx.core as mx

    if sample.grid is None:
        return {}
    name = next((x for x in _GRID if x in known), _GRID[0])
    return {name: mx.array([sample.grid], mx.int32)}


def _parameters(module: Module) -> dict[str, inspect.Parameter]:
    """The parameters of a module's ``__call__`` by name; none if it cannot be called."""
    if not callable(module):
        return {}
    parameters = inspect.signature(module).parameters.values()
    return {p.name: p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}


def _outputs(value: Any, name: str = "output") -> Iterator[tuple[str, mx.array]]:
    """The floating arrays in what a class returns, each with a name."""
    import mlx.core as mx

    if isinstance(value, mx.array):
        if mx.issubdtype(value.dtype, mx.floating):
            yield name, value
    elif isinstance(value, Mapping):
        for key, x in value.items():
            yield from _outputs(x, str(key))
    elif isinstance(value, list | tuple):
        for at, x in enumerate(value):
            yield from _outputs(x, f"{name} {at}" if at else name)
    elif hasattr(value, "__dataclass_fields__"):
        yield from _outputs(vars(value))
