"""Any supported source as a model of mlx-lm, converted in memory: no weights are written.

The plan and its steps are those of ``convert --layout mlx-lm``, but the bytes are written to
arrays. mlx-lm's own loader builds the model from them.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from requant.bit_allocation.choose import allocate_bits
from requant.core.reasons import NoteCode
from requant.core.types import Source
from requant.errors import CheckpointError, Problem, UsageError
from requant.execution.runner import options_for_retry, run_once
from requant.execution.sink import TensorOffsets
from requant.libraries import MLX_LM
from requant.libraries.loading import check_installed
from requant.planning.layout_selection import vision_part
from requant.planning.plan import Plan
from requant.planning.planner import Planned, plan_with_source
from requant.quantization.config import Quantization
from requant.quantization.option_signatures import read_arguments, takes_options
from requant.reports.report import Report
from requant.sources.hub_repository import find_repository, open_source
from requant.sources.open import as_checkpoint
from requant.text import one_line

if TYPE_CHECKING:
    import mlx.core as mx

    from requant.execution.option_keywords import LoadKeywords


@takes_options("load")
def load(
    source: Source,
    quantization: Quantization | None = None,
    *,
    tokenizer_config: Mapping[str, Any] | None = None,
    **arguments: Unpack[LoadKeywords],
) -> tuple[Any, Any]:
    """Convert a checkpoint in memory and load it, ready for ``mlx_lm.generate``.

    The model is the one that ``mlx_lm.load`` gives for what ``requant.convert`` writes with
    the same options; next to it, memory holds one tensor at a time.

    Args:
        source: Folder of any supported format, a GGUF file, or ``org/name`` on the hub, whose
            weight files stay in huggingface_hub's cache.
        quantization: As in ``requant.convert``: None keeps a quantized source as it is, and
            means affine, 4 bits, group 64 for a dense one.
        tokenizer_config: Options of the tokenizer, as ``mlx_lm.load`` takes them.
        **arguments: The options of ``requant.convert`` that do not concern files, each by its
            name; ``help`` and the reference list them.

    Returns:
        The model and the tokenizer.

    Raises:
        CheckpointError: Every problem of the source; also if mlx-lm is not installed or has no
            class for the model.
        UsageError: Options that contradict each other or match no layer.

    Example:
        >>> import requant.mlx_lm, mlx_lm  # doctest: +SKIP
        >>> model, tokenizer = requant.mlx_lm.load("Qwen3-30B-A3B", bits=4)  # doctest: +SKIP
        >>> mlx_lm.generate(model, tokenizer, prompt="Hello")  # doctest: +SKIP
    """
    loaded = load_with_report(source, quantization, tokenizer_config=tokenizer_config, **arguments)
    return loaded.model, loaded.tokenizer


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model in memory.

    Attributes:
        model: As ``mlx_lm.load`` gives it.
        tokenizer: The same.
        report: The report of the conversion.
        load_s: Seconds for conversion and loading.
    """

    model: Any
    tokenizer: Any
    report: Report
    load_s: float


@takes_options("load")
def load_with_report(
    source: Source,
    quantization: Quantization | None = None,
    *,
    tokenizer_config: Mapping[str, Any] | None = None,
    **arguments: Unpack[LoadKeywords],
) -> Loaded:
    """As ``load``, and return the report of the conversion too."""
    began = time.perf_counter()
    check_installed(source, MLX_LM.name)
    weights, report, planned = convert_in_memory(source, quantization, "mlx-lm", **arguments)
    _check_tokenizer(source, report.plan)
    with as_checkpoint_error(source, "mlx-lm, building the model"):
        model, config = _build(report.plan.config, weights)
    tokenizer = load_tokenizer(source, planned, tokenizer_config, config.get("eos_token_id"))
    return Loaded(model, tokenizer, report, time.perf_counter() - began)


def load_tokenizer(
    source: Source,
    planned: Planned,
    tokenizer_config: Mapping[str, Any] | None = None,
    eos_token_ids: Any = None,
) -> Any:
    """The tokenizer of a plan's source, as mlx-lm loads it.

    Raises:
        CheckpointError: The source has none, or its library rejects it.
    """
    _check_tokenizer(source, planned.plan)
    with as_checkpoint_error(source, "tokenizer"), source_files(planned) as folder:
        return _utils().load_tokenizer(folder, tokenizer_config, eos_token_ids=eos_token_ids)


def _check_tokenizer(source: Source, plan: Plan) -> None:
    """Raise the note of the plan that says why a GGUF file has no usable tokenizer."""
    notes = [note for note in plan.notes if note.code is NoteCode.NO_TOKENIZER]
    if notes:
        raise CheckpointError(str(source), [Problem("tokenizer", notes[0].text)])


@takes_options("load")
def load_weights(
    source: Source, quantization: Quantization | None = None, **arguments: Unpack[LoadKeywords]
) -> tuple[dict[str, mx.array], Report]:
    """Convert a checkpoint into arrays under mlx-lm's names.

    Takes and raises what ``load`` does.

    Returns:
        The weights by name, and the report of the conversion; its plan holds the
        ``config.json`` that belongs to them.
    """
    check_installed(source, MLX_LM.name)
    weights, report, _ = convert_in_memory(source, quantization, "mlx-lm", **arguments)
    return weights, report


def convert_in_memory(
    source: Source,
    quantization: Quantization | None,
    layout: str,
    **arguments: Unpack[LoadKeywords],
) -> tuple[dict[str, mx.array], Report, Planned]:
    """Convert in memory; return the weights, the report, and the plan with its source."""
    began = time.perf_counter()
    options, run = read_arguments("load", quantization, arguments, layout=layout)
    if options.calibrate is not None:
        raise UsageError(
            "a conversion in memory is not calibrated: requant calibrate SOURCE -o "
            "stats.safetensors first, then --imatrix stats.safetensors; or convert"
        )
    opened = open_source(source, find_repository(source, run.revision), options.config_from)
    options = allocate_bits(opened, options, run)
    while True:
        planned = plan_with_source(
            as_checkpoint(opened, options.config_from, mmproj=vision_part(options)), options
        )
        sink = ArraySink(planned.plan)
        attempt = run_once(planned, sink, options, run)
        if not attempt.problems:
            report = Report.build(planned.plan, "", attempt.result, time.perf_counter() - began)
            return sink.arrays, report, planned
        options = options_for_retry(planned.plan, attempt, options, run)


# -- arrays ----------------------------------------------------------------------------------


class ArraySink:
    """A sink that writes the bytes of each tensor into an MLX array."""

    shards = progress_log = None  # there is nothing to resume

    def __init__(self, plan: Plan) -> None:
        from requant.kernels.mlx_backend import empty
        from requant.layouts.conversion_trace import MLX_DTYPE

        self.arrays: dict[str, mx.array] = {}
        self._views: dict[str, memoryview] = {}
        self._offsets = TensorOffsets(plan)
        for shard in plan.shards:
            for tensor in shard.tensors:
                dtype = MLX_DTYPE[tensor.info.dtype]
                array, view = empty(tensor.info.shape, dtype)
                self.arrays[tensor.name], self._views[tensor.name] = array, view

    def write(self, file: str, offset: int, data: memoryview) -> None:
        """Write ``data`` into the tensor at an absolute offset of a shard."""
        tensor, start = self._offsets.find(file, offset)
        self._views[tensor.name][start : start + data.nbytes] = data


@contextmanager
def source_files(planned: Planned) -> Iterator[Path]:
    """Yield the folder with the source's other files; those of a GGUF file are generated."""
    plan, checkpoint = planned.plan, planned.source.checkpoint
    if checkpoint.gguf is None:
        yield checkpoint.path
        return
    with tempfile.TemporaryDirectory(prefix="requant-") as name:
        (Path(name) / "config.json").write_text(json.dumps(plan.config))
        for file, make in checkpoint.opened.generated_files.items():
            target = Path(name) / file
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(make())
        yield Path(name)


# -- the model -------------------------------------------------------------------------------


def _utils() -> Any:  # mlx-lm is only partly typed
    from mlx_lm import utils

    return utils


@contextmanager
def as_checkpoint_error(source: Source, where: str, package_hint: str = "") -> Iterator[None]:
    """Raise errors of mlx-lm or of the tokenizer's library as errors of the source.

    ``package_hint`` follows the error where a package is not installed.
    """
    try:
        yield
    except ImportError as error:
        problem = Problem(where, one_line(error) + package_hint)
        raise CheckpointError(str(source), [problem]) from error
    except Exception as error:
        raise CheckpointError(str(source), [Problem(where, one_line(error))]) from error


def _build(config: Mapping[str, Any], weights: dict[str, mx.array]) -> tuple[Any, dict[str, Any]]:
    """Load a folder with mlx-lm's loader, but with weights from memory."""
    import mlx.core as mx

    utils = _utils()

    def classes(config: dict[str, Any]) -> tuple[Callable[[Any], Any], Any]:
        model_class, args_class = utils._get_classes(config)
        group = (config.get("rotation") or {}).get("group_size")

        def build(args: Any) -> Any:
            return _model_with_weights(model_class, model_class(args), weights, group)

        return build, args_class

    with tempfile.TemporaryDirectory(prefix="requant-") as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(config))
        # The loader needs a weight file; sanitize replaces its content by ``weights``.
        mx.save_safetensors(str(folder / "model.safetensors"), {"none": mx.zeros(1)})
        model, loaded = utils.load_model(folder, get_model_classes=classes)
    return model, loaded


def _model_with_weights(
    model_class: type, model: Any, weights: dict[str, mx.array], rotation_group: int | None
) -> Any:
    """Return the model with a ``sanitize`` that once uses ``weights`` instead of its argument."""

    def sanitize(model: Any, _: Mapping[str, mx.array]) -> Mapping[str, mx.array]:
        model.__class__ = model_class
        own = getattr(model, "sanitize", None)
        result: Mapping[str, mx.array] = weights if own is None else own(weights)
        if rotation_group is not None:
            from requant.nn import rotate_layers

            rotate_layers(model, result, rotation_group)
        return result

    model.__class__ = type(model_class.__name__, (model_class,), {"sanitize": sanitize})
    return model
