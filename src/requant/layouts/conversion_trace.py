"""Run a library's own convert on a checkpoint without data, and record what it does.

The convert runs whole, twice, on a folder with ``config.json``, the side files and a sparse weight
file (a header, then a hole of the full length). Five calls of MLX are watched, and nothing of the
library is imitated:

- ``mx.load`` gives placeholders: the library's renaming, its *rule*, begins.
- ``Module.load_weights``: the first call ends the rule. The first run is traced up to it.
- ``nn.quantize``: the parameters as they were cast, and the layers that it replaces.
- ``mx.save_safetensors``: names, shapes and dtypes of the output. Nothing is written.
- ``mx.eval`` does nothing: no parameter is evaluated, so a model of any size takes no more memory
  than its Python objects.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import re
import shutil
import tempfile
import uuid
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn
from mlx.utils import tree_flatten

from requant.checkpoints.safetensors_header import write_sparse
from requant.core.dtypes import TensorInfo
from requant.core.reasons import Reason, ReasonCode
from requant.errors import RequantError, UsageError
from requant.layouts.byte_moves import Traced
from requant.layouts.expert_forms import Adapter
from requant.layouts.tracer import run_without_values, trace
from requant.libraries import LayoutError, Library, Request, UnknownModelError
from requant.libraries.stand_ins import StandInUsedError
from requant.libraries.surroundings import lock, offline, quiet, replaced
from requant.quantization.config import Quantization, QuantMode
from requant.text import join_first, one_line, pluralize

MLX_DTYPE = {
    "BOOL": mx.bool_,
    "U8": mx.uint8,
    "I8": mx.int8,
    "U16": mx.uint16,
    "I16": mx.int16,
    "U32": mx.uint32,
    "I32": mx.int32,
    "U64": mx.uint64,
    "I64": mx.int64,
    "F16": mx.float16,
    "BF16": mx.bfloat16,
    "F32": mx.float32,
    "C64": mx.complex64,
    # MLX has no float8: it loads these as the bytes they are.
    "F8_E4M3": mx.uint8,
    "F8_E8M0": mx.uint8,
}
HEADER_NAME = {dtype: name for name, dtype in reversed(MLX_DTYPE.items())}
# MLX ships no types for its Python part.
Module = Any
Rule = Callable[[dict[str, mx.array]], dict[str, mx.array]]
_nn: Any = mlx.nn
_WEIGHTS = "model.safetensors"


@dataclass(frozen=True, slots=True)
class Shown:
    """A checkpoint as a library's convert is shown it: everything but the values.

    Attributes:
        config: ``config.json``.
        tensors: Name -> dtype and shape.
        side_files: Name -> file that the library may read next to them, for its own config.
        name: Name of the folder, by which some libraries recognize a model.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    side_files: Mapping[str, Path] = field(default_factory=dict)
    name: str = "model"


@dataclass(eq=False)
class Decisions:
    """What a library's convert decides about a checkpoint.

    Attributes:
        dtypes: Header names that the parameters are cast to before they are quantized or saved.
        saved: Name -> dtype and shape of everything that the library would write.
        targets: Layer path -> the quantization that the library would apply. ``saved`` has a
            ``{layer}.global_scale`` where it comes with one.
        dense_reasons: Layers that could be quantized and stay dense, each with the reason.
        quantizable: Layers that the class can hold quantized, whatever was requested.
        with_global_scale: Those of them that can hold nvfp4 with a global scale.
        config: ``config.json`` as the library would write it.
    """

    dtypes: dict[str, str] = field(default_factory=dict)
    saved: dict[str, TensorInfo] = field(default_factory=dict)
    targets: dict[str, Quantization] = field(default_factory=dict)
    dense_reasons: dict[str, Reason] = field(default_factory=dict)
    quantizable: frozenset[str] = frozenset()
    with_global_scale: frozenset[str] = frozenset()
    config: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ConversionTrace:
    """The record of a library's conversion.

    Attributes:
        rule: Runs the library's convert on a weight map as far as its first ``load_weights``.
        traced: What it then loads, by name.
        decisions: What became of these tensors.
    """

    rule: Rule
    traced: dict[str, Traced]
    decisions: Decisions


def run(
    library: Library, shown: Shown, request: Request, adapt: Adapter | None = None
) -> ConversionTrace:
    """Follow a library's convert; see :func:`requant.layouts.layout.library_layout`."""
    try:
        return _run(library, shown, request, adapt)
    except StandInUsedError:  # once a process: from then on it has the real packages
        return _run(library, shown, request, adapt)


def _run(
    library: Library, shown: Shown, request: Request, adapt: Adapter | None
) -> ConversionTrace:
    conversion = _start(library, shown, request, adapt)
    with lock:
        placeholders = {
            name: mx.zeros(x.shape, MLX_DTYPE[x.dtype]) for name, x in shown.tensors.items()
        }
        traced = trace(conversion.rule, placeholders)
        return ConversionTrace(conversion.rule, traced, conversion.decisions(placeholders))


def check_load(library: Library, shown: Shown) -> None:
    """Check that a library's class takes these tensors: names, and shapes after its renaming.

    Raises:
        UnknownModelError: The library is not installed or has no class for the model.
        LayoutError: It does not load them.
    """
    try:
        _check_load(library, shown)
    except StandInUsedError:
        _check_load(library, shown)


def _check_load(library: Library, shown: Shown) -> None:
    conversion = _start(library, shown, Request(), None)
    with lock:
        # Names and shapes decide, so that tensors of equal shape are one array.
        kinds: dict[Hashable, TensorInfo] = {x: x for x in shown.tensors.values()}
        arrays = {key: mx.zeros(x.shape, MLX_DTYPE[x.dtype]) for key, x in kinds.items()}
        run_without_values(partial(conversion.rule, loads=True), shown.tensors, arrays)


def _start(library: Library, shown: Shown, request: Request, adapt: Adapter | None) -> _Conversion:
    if why := library.missing_class_reason(shown.config):
        raise UnknownModelError(why, library.name)
    target = request.quantization
    if request.recipe and (target is None or target.mode is not QuantMode.AFFINE):
        raise UsageError(f"recipe {request.recipe} is for the affine mode")
    unreadable = [
        f"{name} ({x.dtype})" for name, x in shown.tensors.items() if x.dtype not in MLX_DTYPE
    ]
    if unreadable:
        count, names = pluralize(len(unreadable), "tensor"), join_first(unreadable, 10)
        raise LayoutError(f"MLX cannot load {count}, so {library.name} cannot: {names}")
    return _Conversion(library, shown, request, adapt)


class _RuleIsOverError(BaseException):
    """Ends a run at the first ``load_weights``; no handler of a library catches it."""

    def __init__(self, weights: dict[str, mx.array]) -> None:
        self.weights = weights


class _Conversion:
    """A library's convert of one checkpoint, which can be run again and again."""

    def __init__(
        self, library: Library, shown: Shown, request: Request, adapt: Adapter | None
    ) -> None:
        self.library, self.shown, self.request = library, shown, request
        self.adapt = adapt or (lambda weights: weights)
        # Some libraries search the whole path for names of models, which do not occur in a
        # hexadecimal name. The folder lives as long as the rule can be run.
        folder = Path(tempfile.gettempdir()) / f"requant-{uuid.uuid4().hex}"
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        # The libraries take the path for a pattern of glob, in which a name may have brackets.
        self._source = folder / re.sub(r"[^\w.+ -]", "-", shown.name)
        self._write_source()

    def _write_source(self) -> None:
        self._source.mkdir(parents=True)
        (self._source / "config.json").write_text(json.dumps(self.shown.config))
        for name, path in self.shown.side_files.items():
            (self._source / name).symlink_to(path)
        with (self._source / _WEIGHTS).open("wb") as file:
            write_sparse(file, self.shown.tensors, {"format": "pt"})

    def rule(self, weights: dict[str, mx.array], loads: bool = False) -> dict[str, mx.array]:
        """From the file's tensors to what the model's parameters become.

        With ``loads`` they are also assigned to the model, which compares their shapes.
        """
        load_weights = _nn.Module.load_weights

        def end(model: Module, items: Any, strict: bool = True) -> None:
            given = dict(items)
            self._check_names(model, given, strict=strict)
            if loads:
                load_weights(model, list(given.items()), strict=strict)
            raise _RuleIsOverError(given)

        try:
            with self._watched(weights, {(_nn.Module, "load_weights"): end}):
                self._convert()
        except _RuleIsOverError as over:
            return over.weights
        raise LayoutError(f"{self.library.name} loads no weights into its class for this model")

    def decisions(self, weights: dict[str, mx.array]) -> Decisions:
        """Run the convert to its end and record what it decides."""
        made = Decisions()
        load_weights, quantize = _nn.Module.load_weights, _nn.quantize
        root: list[Module] = []
        modules: dict[str, Module] = {}

        def watch_load(model: Module, *args: Any, **kwargs: Any) -> Any:
            result = load_weights(model, *args, **kwargs)
            if not root:
                root.append(model)
                modules.update(_modules(model))
            return result

        def watch_quantize(model: Module, *args: Any, **kwargs: Any) -> None:
            if not root:  # a quantized source gets its layers before its weights
                quantize(model, *args, **kwargs)
                return
            made.dtypes = {name: x.dtype for name, x in _infos(model.parameters()).items()}
            if not _infos(root[0].parameters()).keys() <= made.dtypes.keys():
                raise LayoutError(f"{self.library.name} quantizes a part of the model by itself")
            before = _modules(model)
            widths = {p: m.weight.shape[-1] for p, m in before.items() if "weight" in m}
            quantize(model, *args, **kwargs)
            self._compare(made, before, widths, _modules(model))

        def save(_: Any, arrays: dict[str, mx.array], *__: Any, **___: Any) -> None:
            made.saved |= _infos(arrays)

        watched = {
            (_nn.Module, "load_weights"): watch_load,
            (_nn, "quantize"): watch_quantize,
            (mx, "save_safetensors"): save,
        }
        with self._watched(weights, watched), tempfile.TemporaryDirectory() as name:
            output = Path(name) / "output"
            self._convert(output)
            made.config = json.loads((output / "config.json").read_text())
        made.dtypes = made.dtypes or {name: x.dtype for name, x in made.saved.items()}
        able = {path: module for path, module in modules.items() if hasattr(module, "to_quantized")}
        made.quantizable = frozenset(able)
        made.with_global_scale = frozenset(x for x, module in able.items() if _takes_scale(module))
        return made

    def _convert(self, output: Path | None = None) -> None:
        """Run the library's convert, silently; what it raises becomes a LayoutError."""
        created: list[Module] = []
        init = _nn.Module.__init__

        def watch_init(module: Module) -> None:
            if not created:
                created.append(module)  # the model itself: its parts are created in its constructor
            init(module)

        try:
            with quiet(), offline(), replaced(_nn.Module, "__init__", watch_init):
                self.library.convert(self._source, output or self._source / "none", self.request)
        except RequantError:
            raise
        except (Exception, SystemExit) as error:  # olmo exits where a package is missing
            names = tuple(_infos(created[0].parameters())) if created else ()
            doing = "loading" if output is None else "converting"
            raise self._as_layout_error(error, doing, names) from error

    def _as_layout_error(
        self, error: BaseException, doing: str, class_names: tuple[str, ...]
    ) -> RequantError:
        model_type = self.shown.config.get("model_type")
        explained = _explain(error, self._source)
        if explained is None:
            return UnknownModelError(
                f"{self.library.name} has no class for model_type {model_type!r}", self.library.name
            )
        if "NoneType" in explained and (null := [*_null_keys(self.shown.config)]):
            explained += f"; null in config.json: {join_first(null, 5)}"
        result = LayoutError(f"{self.library.name}, {doing} {model_type}: {explained}")
        result.class_names = class_names
        return result

    @contextlib.contextmanager
    def _watched(
        self, weights: dict[str, mx.array], patches: Mapping[tuple[Any, str], Any]
    ) -> Iterator[None]:
        """Replace the watched calls of MLX."""

        def load(file: Any, *_: Any, **__: Any) -> dict[str, mx.array]:
            if Path(str(file)) != self._source / _WEIGHTS:
                name = Path(str(file)).name
                raise LayoutError(f"{self.library.name}'s class reads another file ({name})")
            return dict(self.adapt(dict(weights)))

        every = {(mx, "load"): load, (mx, "eval"): lambda *_: None, **patches}
        with lock, contextlib.ExitStack() as stack:
            for (owner, name), function in every.items():
                stack.enter_context(replaced(owner, name, function))
            yield

    def _check_names(self, model: Module, given: Mapping[str, mx.array], *, strict: bool) -> None:
        """Check that every parameter gets a tensor, which not every library asks for itself.

        Raises:
            LayoutError: With the others, which would keep random values; if the library loads
                strictly, also with the tensors that are not parameters.
        """
        names = tuple(_infos(model.parameters()))
        problems: list[str] = []
        extra = sorted(given.keys() - {*names}) if strict else []
        missing = [name for name in names if name not in given]
        if extra:
            held = pluralize(len(extra), "tensor")
            problems.append(f"has no place for {held}: {join_first(extra)}")
        if missing:
            count = pluralize(len(missing), "parameter")
            problems.append(f"has {count} without a tensor of the source: {join_first(missing)}")
        if problems:
            error = LayoutError(
                f"{self.library.name}, loading {self.shown.config.get('model_type')}: its class "
                f"for this model {'; it '.join(problems)}"
            )
            error.class_names, error.unmatched = names, (*extra, *missing)
            raise error

    def _compare(
        self,
        made: Decisions,
        before: Mapping[str, Module],
        widths: Mapping[str, int],
        after: Mapping[str, Module],
    ) -> None:
        """Record the layers that were quantized, and why the others were not."""
        group_size = self.request.quantization.group_size if self.request.quantization else 1
        left = Reason(
            ReasonCode.DENSE_BY_LIBRARY, f"{self.library.name} leaves it dense in this model"
        )
        for path, module in before.items():
            quantized = after.get(path, module)
            if quantized is not module:
                mode = getattr(quantized, "mode", QuantMode.AFFINE)
                made.targets[path] = Quantization(quantized.group_size, quantized.bits, mode)
            elif not hasattr(module, "to_quantized"):
                continue
            elif widths[path] % group_size:
                text = f"last axis {widths[path]} is not a multiple of group {group_size}"
                made.dense_reasons[path] = Reason(ReasonCode.NO_GROUP_SIZE, text)
            else:
                made.dense_reasons[path] = left


# MLX's libraries raise built-in exceptions, which only their text tells apart: (class, pattern,
# explanation). The first row that fits counts; None: there is no class for the model. "{0}" is
# the whole message, "{1}" and "{2}" are the groups; digits become a count of tensors.
_ERRORS: tuple[tuple[type[BaseException], str, str | None], ...] = (
    (ValueError, r"^Model type .* not supported", None),
    (
        Exception,
        r"Unable to quantize model of type <class '[\w.]*?(\w+)'>",
        "its class holds a layer dense ({1}) that is quantized here",
    ),
    (
        Exception,
        r"__init__\(\) missing \d+ required .*?arguments?: (.*)",
        "config.json lacks what its class for this model needs: {1}",
    ),
    (
        Exception,
        r"Received (\d+) parameters not in model: (.*)",
        "its class for this model has no place for {1}: {2}",
    ),
    (
        Exception,
        r"(\w+)\.\w+\(\) got an unexpected keyword argument '(\w+)'",
        "its own layer, {1}, does not take the setting '{2}'",
    ),
    (KeyError, r"", "the tensor or setting {0} is missing"),
    (
        AttributeError,
        r"'\w+' object has no attribute|object is not",
        "a setting of config.json may be missing or of another type ({0})",
    ),
    (
        TypeError,
        r"'NoneType'",
        "a setting of config.json may be missing or of another type ({0})",
    ),
    (
        Exception,
        r"during function transformations",
        "its rule looks at values, which a plan from headers does not have",
    ),
    (Exception, r"Unable to get state", "its rule uses what MLX cannot trace: {0}"),
)


def _explain(error: BaseException, folder: Path) -> str | None:
    """What an exception of a library or MLX means for a checkpoint; else its text in one line.

    The temporary folder, which no reader knows, is called by its name alone.
    """
    message = one_line(error).replace(str(folder), folder.name)
    for kind, pattern, template in _ERRORS:
        match = re.search(pattern, message)
        if match is not None and isinstance(error, kind):
            groups = (pluralize(int(x), "tensor") if x.isdigit() else x for x in match.groups())
            return None if template is None else template.format(message, *groups)
    return message


def _null_keys(config: Mapping[str, Any]) -> Iterator[str]:
    """The keys of a config whose value is null, those of its sections with a dot."""
    for key, value in config.items():
        if value is None:
            yield key
        elif isinstance(value, Mapping):
            yield from (f"{key}.{inner}" for inner in _null_keys(value))


def _modules(model: Module) -> dict[str, Module]:
    is_module = _nn.Module.is_module
    leaves: Any = tree_flatten(model.leaf_modules(), is_leaf=is_module)
    return {path: module for path, module in leaves if is_module(module)}


def _takes_scale(module: Module) -> bool:
    return "global_scale" in inspect.signature(module.to_quantized).parameters


def _infos(parameters: Any) -> dict[str, TensorInfo]:
    flat: Any = tree_flatten(parameters)
    return {name: TensorInfo(HEADER_NAME[x.dtype], tuple(x.shape)) for name, x in flat}
