"""Load a folder with an MLX library's own loader: strictly, and without code of the checkpoint.

The loader runs whole, but ``nn.Module.load_weights`` is watched: whatever the library itself checks
(mlx-audio loads some classes without, and leaves random values), each parameter of the class must
get a tensor of its shape, and each tensor a parameter.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from requant.checkpoints.folder_files import CONFIG
from requant.checkpoints.safetensors_folder import read_json
from requant.core.dtypes import TensorInfo
from requant.core.types import Source
from requant.errors import CheckpointError, Problem
from requant.libraries import LIBRARIES, Library
from requant.libraries.modalities import modalities
from requant.libraries.surroundings import (
    cpu,
    lock,
    offline,
    quiet,
    replaced,
    without_checkpoint_code,
)
from requant.text import format_value, join_first, one_line

if TYPE_CHECKING:
    import mlx.core as mx

Module = Any  # MLX ships no types for its Python part
Shapes = dict[str, tuple[int, ...]]


def library_version(library: str) -> str:
    """The version of a library; "" if it is not installed."""
    return "" if LIBRARIES[library].not_installed else version(library)


def find_library(folder: Path) -> str:
    """Return the first library with a class for a folder that does not say for which it is.

    A model with vision or audio goes to mlx-vlm or mlx-audio where these have the class.

    Raises:
        CheckpointError: None of the installed libraries has one.
    """
    config = _config(folder)
    order: Iterable[str] = ("mlx-lm", "mlx-vlm", "mlx-embeddings", "mlx-audio")
    if any(modalities(config)):
        order = ("mlx-vlm", "mlx-audio", "mlx-lm", "mlx-embeddings")
    missing = []
    for library in map(LIBRARIES.__getitem__, order):
        if library.not_installed:
            missing.append(f"{library.name} (requant[{library.extra}])")
        elif not library.missing_class_reason(config):  # found without importing it
            with contextlib.suppress(CheckpointError), quiet():
                _import_class(folder, library, config)
                return library.name
    why = f"no installed library has a class for model_type {format_value(config['model_type'])}"
    if missing:
        why += f"; not installed: {join_first(missing, len(missing))}"
    raise CheckpointError(str(folder), [Problem(CONFIG, why)], "loaded")


def check_installed(source: Source, library: str) -> None:
    """Check that a library is installed.

    Raises:
        CheckpointError: It is not.
    """
    if why := LIBRARIES[library].not_installed:
        raise CheckpointError(str(source), [Problem(library, why)], "loaded")


def load(
    folder: Path,
    library: str,
    weights: Mapping[str, mx.array] | None = None,
    *,
    on_cpu: bool = False,
) -> tuple[Module, dict[str, Any]]:
    """Build a library's class for a folder and load its weights.

    The processor and the tokenizer are not loaded, and nothing is downloaded.

    Args:
        folder: A folder with ``config.json`` and weight files.
        library: Its name.
        weights: Taken instead of the content of the weight files.
        on_cpu: Load on the CPU instead of MLX's default device.

    Returns:
        The model, its parameters evaluated, and the config.

    Raises:
        CheckpointError: The library is not installed or has no class for the model; its loader
            fails; parameters get no tensor or one of another shape, or tensors are not used.
    """
    config = _config(folder)
    check_installed(folder, library)
    with lock, quiet():
        # Before the device is chosen: streams that an import makes are of the default one.
        utils = _import_class(folder, LIBRARIES[library], config)
        device = cpu() if on_cpu else contextlib.nullcontext()
        with (
            device,
            offline(),
            without_checkpoint_code(),
            _weights_from_memory(weights),
            _watched() as watched,
        ):
            try:
                model = LIBRARIES[library].load(utils, folder)
            except (Exception, SystemExit) as error:
                raise _error(folder, library, one_line(error)) from error
    problems = watched.problems(model, library)
    if problems:
        raise CheckpointError(str(folder), problems, "loaded")
    return model, config


def load_from_memory(
    source: Source, library: str, config: Mapping[str, Any], weights: Mapping[str, mx.array]
) -> tuple[Module, dict[str, Any]]:
    """Build a library's class for a config and load weights that are in memory, as ``load`` does.

    Args:
        source: The model, as errors name it.
        library: Its name.
        config: ``config.json`` of the weights.
        weights: All of the model's, under the library's names.
    """
    with _folder_of(config) as folder:
        try:
            return load(folder, library, weights)
        except CheckpointError as error:
            raise CheckpointError(str(source), error.problems, error.action) from error


def build_empty(
    source: Source, library: str, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
) -> Module:
    """Build a library's class for a dense checkpoint whose weights are not read.

    Args:
        source: The model, as errors name it.
        library: Its name.
        config: ``config.json`` of the checkpoint.
        tensors: Its tensors, under the library's names.

    Returns:
        The model; its parameters are random and not evaluated.

    Raises:
        CheckpointError: The library cannot build it.
    """
    import mlx.core as mx
    import mlx.nn

    def stop(module: Module, *_: Any, **__: Any) -> None:
        raise _BuiltError(module)

    zeros = {name: mx.zeros(x.shape) for name, x in tensors.items()}  # never evaluated
    base = vars(mlx.nn)["Module"]
    with (
        _folder_of(config) as folder,
        lock,
        quiet(),
        without_checkpoint_code(),
        offline(),
        _weights_from_memory(zeros),
        replaced(base, "load_weights", stop),
    ):
        try:
            utils = _import_class(folder, LIBRARIES[library], config)
            LIBRARIES[library].load(utils, folder)
        except _BuiltError as built:
            built.module.eval()
            return built.module
        except (Exception, SystemExit) as error:
            problem = Problem(f"{library}, building the model", one_line(error))
            raise CheckpointError(str(source), [problem]) from error
    raise CheckpointError(str(source), [Problem(library, "loads no weights into its class")])


class _BuiltError(BaseException):
    """Ends a loader at its first ``load_weights``; no handler of a library catches it."""

    def __init__(self, module: Module) -> None:
        self.module = module


@contextmanager
def _folder_of(config: Mapping[str, Any]) -> Iterator[Path]:
    """A folder with a config and a weight file, which a loader needs, without its content."""
    import mlx.core as mx

    with tempfile.TemporaryDirectory(prefix="requant-") as name:
        folder = Path(name)
        (folder / CONFIG).write_text(json.dumps(config))
        mx.save_safetensors(str(folder / "model.safetensors"), {"none": mx.zeros(1)})
        yield folder


def _config(folder: Path) -> dict[str, Any]:
    config = read_json(folder, CONFIG)
    if "model_file" in config:
        why = "names code of its own (model_file), which is not run"
        raise CheckpointError(str(folder), [Problem(CONFIG, why)], "loaded")
    return {"model_type": None, **config}


def _import_class(folder: Path, library: Library, config: Mapping[str, Any]) -> Any:
    """Import a library and let it find its class; return its ``utils``."""
    try:
        utils = import_module(f"{library.package}.utils")
    except ImportError as error:
        raise _error(folder, library.name, f"cannot be imported ({one_line(error)})") from error
    try:
        library.import_class(utils, dict(config), folder)
    except (Exception, SystemExit) as error:
        model_type = format_value(config["model_type"])
        why = f"has no class for model_type {model_type} that works here ({one_line(error)})"
        raise _error(folder, library.name, why) from error
    return utils


def _error(folder: Path, library: str, why: str) -> CheckpointError:
    return CheckpointError(str(folder), [Problem(library, why)], "loaded")


# -- watching the loader -----------------------------------------------------------------------


@dataclass
class _Watched:
    """The calls of ``load_weights``: each module with its parameters before, and the tensors."""

    calls: list[tuple[Module, Shapes, Shapes]] = field(default_factory=list)

    def problems(self, model: Module, library: str) -> list[Problem]:
        """What is wrong with names and shapes in the calls for modules of a model."""
        path_of = {id(module): path for path, module in model.named_modules()}
        expected = _shapes(_flatten(model))
        given: Shapes = {}
        for module, before, tensors in self.calls:
            path = path_of.get(id(module))
            if path is not None:
                prefix = f"{path}." if path else ""
                expected |= {prefix + name: shape for name, shape in before.items()}
                given |= {prefix + name: shape for name, shape in tensors.items()}
        found = []
        for name, shape in expected.items():
            if name not in given:
                found.append(Problem(name, f"{library} finds no tensor for it {list(shape)}"))
            elif given[name] != shape:
                found.append(
                    Problem(name, f"shape {list(given[name])}, {library} expects {list(shape)}")
                )
        unused = (name for name in given if name not in expected)
        return found + [Problem(name, f"{library}'s class does not use it") for name in unused]


@contextmanager
def _watched() -> Iterator[_Watched]:
    """Record the calls of ``nn.Module.load_weights``, which check nothing meanwhile."""
    import mlx.core as mx
    import mlx.nn

    watched = _Watched()
    base: Any = vars(mlx.nn)["Module"]
    original = base.load_weights
    read: Any = mx.load

    def load_weights(module: Module, weights: Any, strict: bool = True) -> Module:
        pairs = list(read(weights).items()) if isinstance(weights, str) else list(weights)
        watched.calls.append((module, _shapes(_flatten(module)), _shapes(pairs)))
        return original(module, pairs, strict=False)

    with replaced(base, "load_weights", load_weights):
        yield watched


@contextmanager
def _weights_from_memory(weights: Mapping[str, mx.array] | None) -> Iterator[None]:
    """Let ``mx.load`` return arrays in memory, if there are any."""
    import mlx.core as mx

    if weights is None:
        yield
        return
    with replaced(mx, "load", lambda *_, **__: dict(weights)):
        yield


def _flatten(module: Module) -> list[tuple[str, mx.array]]:
    from mlx.utils import tree_flatten

    return list(dict(tree_flatten(module.parameters())).items())


def _shapes(pairs: Sequence[tuple[str, mx.array]]) -> Shapes:
    return {name: tuple(array.shape) for name, array in pairs}
