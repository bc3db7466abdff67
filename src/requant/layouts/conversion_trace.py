"""Run mlx-lm's own conversion on a checkpoint without data, and record what it does.

A folder with ``config.json`` and a sparse weight file (a header, then a hole of the full length)
goes through ``mlx_lm.utils.load_model`` and ``quantize_model``. Everything is lazy: no parameter
is evaluated, so a model of any size takes no more memory than its Python objects.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn
from mlx.utils import tree_flatten, tree_map_with_path

from requant.checkpoints.safetensors_header import build_header
from requant.core.dtypes import TensorInfo
from requant.core.reasons import Reason, ReasonCode
from requant.errors import RequantError, UsageError
from requant.layouts.availability import LayoutError, UnknownModelError
from requant.layouts.byte_moves import Traced
from requant.layouts.expert_forms import Adapter
from requant.layouts.tracer import trace
from requant.quantization.config import Quantization, QuantMode
from requant.quantization.options import DTYPES
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
_DENSE_BY_MLX_LM = Reason(ReasonCode.DENSE_BY_MLX_LM, "mlx-lm leaves it dense in this model")
# MLX ships no types for its Python part.
Module = Any
_is_module: Callable[[Any], bool] = vars(mlx.nn)["Module"].is_module


@dataclass
class ConversionTrace:
    """The record of one run of mlx-lm's conversion.

    Attributes:
        rule: Builds a fresh model and runs its ``sanitize`` on a weight map.
        traced: The outputs of ``sanitize`` by name.
        loaded: The parameters as loaded, before any cast.
        saved: The parameters as mlx-lm would save them.
        dtype: Header name that floating parameters are cast to, or None.
        keeps_dtype: Parameters that are exempt from it.
        targets: Layers that were quantized, each with its parameters.
        dense_reasons: Layers that could be quantized and were not.
        quantizable: Layers that the class can hold quantized.
        with_global_scale: Those of them that take a global scale.
        config: ``config.json`` as it would be written.
    """

    rule: Callable[[dict[str, mx.array]], dict[str, mx.array]]
    traced: dict[str, Traced]
    loaded: dict[str, TensorInfo]
    saved: dict[str, TensorInfo]
    dtype: str | None
    keeps_dtype: frozenset[str]
    targets: dict[str, Quantization]
    dense_reasons: dict[str, Reason]
    quantizable: frozenset[str]
    with_global_scale: frozenset[str]
    config: dict[str, Any]


def run(
    config: Mapping[str, Any],
    tensors: Mapping[str, TensorInfo],
    quantization: Quantization | None,
    recipe: str | None,
    dtype: str | None,
    global_scale: bool,
    adapt: Adapter | None = None,
) -> ConversionTrace:
    """Run the steps of ``mlx_lm.convert``; see :func:`requant.layouts.layout.mlx_lm_layout`."""
    utils = _import_utils()
    unloadable = [f"{name} ({x.dtype})" for name, x in tensors.items() if x.dtype not in MLX_DTYPE]
    if unloadable:
        count = pluralize(len(unloadable), "tensor")
        names = join_first(unloadable, 10)
        raise LayoutError(f"MLX cannot load {count}, so mlx-lm cannot: {names}")
    rule = _SanitizeRecorder(tuple(tensors), adapt)
    with contextlib.redirect_stdout(io.StringIO()):  # mlx-lm prints as it goes
        model, loaded_config = _load(utils, config, tensors, rule)
        loaded = _infos(model)
        predicate = _recipe(recipe, model, quantization)
        dtype = dtype or _config_dtype(loaded_config)
        keeps_dtype = _cast(model, dtype)
        modules = _modules(model)
        if quantization is not None:
            options: dict[str, Any] = {"mode": quantization.mode.value}
            options |= {"global_scale": True} if global_scale else {}
            options |= {} if predicate is None else {"quant_predicate": predicate}
            with _wrap_mlx_lm_errors(f"quantizing {config['model_type']}"):
                model, loaded_config = utils.quantize_model(
                    model, loaded_config, quantization.group_size, quantization.bits, **options
                )
        written = _written_config(utils, model, loaded_config)
    able = {path: module for path, module in modules.items() if hasattr(module, "to_quantized")}
    targets, reasons = _compare(able, _modules(model), quantization)
    return ConversionTrace(
        rule=rule,
        traced=rule.traced,
        loaded=loaded,
        saved=_infos(model),
        dtype=dtype,
        keeps_dtype=keeps_dtype,
        targets=targets,
        dense_reasons=reasons,
        quantizable=frozenset(able),
        with_global_scale=frozenset(filter(lambda path: _takes_global_scale(able[path]), able)),
        config=written,
    )


# -- the model's rule ------------------------------------------------------------------------


class _SanitizeRecorder:
    """Traces the first run of a model's ``sanitize``, and can run it again.

    Where experts are adapted to the class (``adapt``), that comes before ``sanitize``.
    """

    def __init__(self, order: tuple[str, ...], adapt: Adapter | None = None) -> None:
        self.order = order
        self.traced: dict[str, Traced] = {}
        self.class_names: tuple[str, ...] = ()
        self._adapt = adapt
        self._build: Callable[[], Module] | None = None

    def __call__(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        assert self._build is not None
        return self._of(self._build())(weights)

    def _of(self, model: Module) -> Callable[[dict[str, mx.array]], dict[str, mx.array]]:
        """``sanitize`` of a model, after ``adapt``."""
        sanitize = getattr(model, "sanitize", None) or (lambda given: given)
        adapt = self._adapt or (lambda given: given)
        return lambda weights: dict(sanitize(adapt(weights)))

    def classes(self, get: Callable[..., Any], config: dict[str, Any]) -> tuple[Any, Any]:
        """Replace mlx-lm's class look-up, so that ``sanitize`` of the model is traced."""
        model_class, args_class = get(config=config)

        def build(args: Any) -> Module:
            pristine = copy.deepcopy(args)
            self._build = lambda: model_class(copy.deepcopy(pristine))
            model: Module = model_class(args)
            self.class_names = tuple(dict(tree_flatten(model.parameters())))

            def sanitize(traced: Module, weights: dict[str, mx.array]) -> dict[str, mx.array]:
                return self._traced_sanitize(traced, model_class, weights)

            methods = {"sanitize": sanitize}
            model.__class__ = type(model_class.__name__, (model_class,), methods)
            return model

        return build, args_class

    def _traced_sanitize(
        self, model: Module, model_class: type, weights: dict[str, mx.array]
    ) -> dict[str, mx.array]:
        model.__class__ = model_class
        ordered = {name: weights[name] for name in self.order}
        self.traced = trace(self._of(model), ordered)
        return {name: mx.zeros(x.shape, x.dtype) for name, x in self.traced.items()}


# -- the steps of mlx_lm.convert -------------------------------------------------------------


def _import_utils() -> Any:
    try:
        from mlx_lm import utils
    except ImportError as error:
        raise UnknownModelError(f"mlx-lm cannot be imported ({error})") from error
    return utils


# mlx-lm and MLX raise built-in exceptions, which only their text tells apart: (class, pattern,
# explanation). The first row that fits counts. "{0}" is the whole message,
# "{1}" and "{2}" are the groups; digits become a count of tensors.
_MLX_LM_ERRORS: tuple[tuple[type[Exception], str, str], ...] = (
    (
        Exception,
        r"Unable to quantize model of type <class '[\w.]*?(\w+)'>",
        "its class holds a layer dense ({1}) that is quantized here",
    ),
    (
        Exception,
        r"ModelArgs.*missing \d+ required .*?arguments?: (.*)",
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
        Exception,
        r"during function transformations",
        "its rule looks at values, which a plan from headers does not have",
    ),
    (Exception, r"Unable to get state", "its rule uses what MLX cannot trace: {0}"),
)


def _explain_mlx_lm_error(error: Exception) -> str:
    """What an exception of mlx-lm or MLX means for a checkpoint; else its text in one line."""
    message = one_line(error)
    for kind, pattern, template in _MLX_LM_ERRORS:
        match = re.search(pattern, message)
        if match is not None and isinstance(error, kind):
            groups = (pluralize(int(x), "tensor") if x.isdigit() else x for x in match.groups())
            return template.format(message, *groups)
    return message


@contextlib.contextmanager
def _wrap_mlx_lm_errors(doing: str) -> Iterator[None]:
    """Turn whatever mlx-lm raises into a LayoutError that says where."""
    try:
        yield
    except RequantError:
        raise
    except Exception as error:
        raise LayoutError(f"mlx-lm, {doing}: {_explain_mlx_lm_error(error)}") from error


def _load(
    utils: Any,
    config: Mapping[str, Any],
    tensors: Mapping[str, TensorInfo],
    rule: _SanitizeRecorder,
) -> tuple[Module, dict[str, Any]]:
    if "model_file" in config:
        raise UnknownModelError("config.json names code of its own (model_file), which is not run")
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise UnknownModelError("config.json has no model_type")
    try:
        utils._get_classes(dict(config))
    except ValueError as error:
        raise UnknownModelError(f"mlx-lm has no class for model_type {model_type!r}") from error
    except (Exception, SystemExit) as error:  # olmo exits where a package is missing
        raise UnknownModelError(f"mlx-lm's class for {model_type!r} fails: {error}") from error

    def get_model_classes(config: dict[str, Any]) -> tuple[Any, Any]:
        return rule.classes(utils._get_classes, config)

    with tempfile.TemporaryDirectory(prefix="requant-") as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(config))
        header = build_header(dict(tensors), {"format": "pt"})[0]
        with (folder / "model.safetensors").open("wb") as file:
            file.write(header)
            file.truncate(len(header) + sum(info.nbytes for info in tensors.values()))
        try:
            with _wrap_mlx_lm_errors(f"loading {model_type}"):
                model, loaded = utils.load_model(
                    folder, lazy=True, get_model_classes=get_model_classes
                )
        except LayoutError as error:
            error.class_names = rule.class_names
            raise
    return model, loaded


def _recipe(
    recipe: str | None, model: Module, quantization: Quantization | None
) -> Callable[..., Any] | None:
    if recipe is None:
        return None
    if quantization is None or quantization.mode is not QuantMode.AFFINE:
        raise UsageError(f"recipe {recipe} is for the affine mode")
    from mlx_lm.convert import mixed_quant_predicate_builder

    predicate: Callable[..., Any]
    with _wrap_mlx_lm_errors(f"recipe {recipe}"):
        predicate = mixed_quant_predicate_builder(recipe, model, quantization.group_size)
    return predicate


def _config_dtype(config: Mapping[str, Any]) -> str | None:
    """The dtype that mlx-lm casts to by default; keys and order are its own."""
    word = config.get("torch_dtype")
    if word is None and (text_config := config.get("text_config")):
        word = text_config.get("dtype")
    return DTYPES.get(word) if isinstance(word, str) else None


def _cast(model: Module, dtype: str | None) -> frozenset[str]:
    """Cast as mlx-lm does; returns the floating parameters that the model exempts."""
    predicate = getattr(model, "cast_predicate", lambda _: True)
    kept: set[str] = set()

    def cast(path: str, array: mx.array) -> mx.array:
        if not mx.issubdtype(array.dtype, mx.floating):
            return array
        if not predicate(path):
            kept.add(path)
            return array
        return array if dtype is None else array.astype(MLX_DTYPE[dtype])

    model.update(tree_map_with_path(cast, model.parameters()))
    return frozenset(kept)


def _written_config(utils: Any, model: Module, config: dict[str, Any]) -> dict[str, Any]:
    options = {}
    if "keep_vision_config" in inspect.signature(utils.save_config).parameters:
        options["keep_vision_config"] = "vision_tower" in getattr(model, "model", {})
    with tempfile.TemporaryDirectory(prefix="requant-") as name:
        path = Path(name) / "config.json"
        utils.save_config(copy.deepcopy(config), path, **options)
        written: dict[str, Any] = json.loads(path.read_text())
    return written


# -- what became of the layers ---------------------------------------------------------------


def _modules(model: Module) -> dict[str, Module]:
    leaves: Any = tree_flatten(model.leaf_modules(), is_leaf=_is_module)
    return {path: module for path, module in leaves if _is_module(module)}


def _takes_global_scale(module: Module) -> bool:
    return "global_scale" in inspect.signature(module.to_quantized).parameters


def _infos(model: Module) -> dict[str, TensorInfo]:
    parameters: Any = tree_flatten(model.parameters())
    return {name: TensorInfo(HEADER_NAME[x.dtype], tuple(x.shape)) for name, x in parameters}


def _compare(
    before: Mapping[str, Module], after: Mapping[str, Module], option: Quantization | None
) -> tuple[dict[str, Quantization], dict[str, Reason]]:
    """The layers that were quantized with their parameters, and why the others were not."""
    targets: dict[str, Quantization] = {}
    reasons: dict[str, Reason] = {}
    if option is None:
        return targets, reasons
    for path, module in before.items():
        quantized, n_in = after.get(path, module), module.weight.shape[-1]
        if quantized is not module:
            mode = getattr(quantized, "mode", QuantMode.AFFINE)
            targets[path] = Quantization(quantized.group_size, quantized.bits, mode)
        elif n_in % option.group_size:
            text = f"last axis {n_in} is not a multiple of group {option.group_size}"
            reasons[path] = Reason(ReasonCode.NO_GROUP_SIZE, text)
        else:
            reasons[path] = _DENSE_BY_MLX_LM
    return targets, reasons
