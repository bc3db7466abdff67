"""Any supported source as a model of mlx-vlm, converted in memory: no weights are written.

mlx-vlm's own loader builds the model from arrays, strictly; the processor comes from the
source's files.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Unpack

from requant.core.types import Source
from requant.libraries.loading import check_installed, load_from_memory
from requant.libraries.surroundings import quiet, without_checkpoint_code
from requant.mlx_lm.loading import as_checkpoint_error, convert_in_memory, source_files
from requant.planning.planner import Planned
from requant.quantization.config import Quantization
from requant.quantization.option_signatures import takes_options
from requant.reports.report import Report
from requant.text import format_value

if TYPE_CHECKING:
    from requant.execution.option_keywords import LoadKeywords


_PACKAGE_HINT = "; install the package that is missing (pip install torch torchvision)"


@takes_options("load")
def load(
    source: Source, quantization: Quantization | None = None, **arguments: Unpack[LoadKeywords]
) -> tuple[Any, Any]:
    """Convert a checkpoint in memory and load it, ready for ``mlx_vlm.generate``.

    Next to the model, memory holds one tensor at a time.

    Args:
        source: Folder of any supported format, a GGUF file, or ``org/name`` on the hub, whose
            weight files stay in huggingface_hub's cache.
        quantization: As in ``requant.convert``: None keeps a quantized source as it is, and
            means affine, 4 bits, group 64 for a dense one.
        **arguments: The options of ``requant.convert`` that do not concern files, each by its
            name; ``help`` and the reference list them.

    Returns:
        The model and the processor, as ``mlx_vlm.load`` returns them.

    Raises:
        CheckpointError: Every problem of the source; also if mlx-vlm is not installed or has no
            class for the model, or the processor cannot be loaded.
        UsageError: Options that contradict each other or match no layer.

    Example:
        >>> import requant.mlx_vlm, mlx_vlm  # doctest: +SKIP
        >>> model, processor = requant.mlx_vlm.load("Qwen2-VL-2B", bits=4)  # doctest: +SKIP
        >>> mlx_vlm.generate(model, processor, "Hello")  # doctest: +SKIP
    """
    loaded = load_with_report(source, quantization, **arguments)
    return loaded.model, loaded.processor


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model in memory.

    Attributes:
        model: As ``mlx_vlm.load`` gives it.
        processor: The same.
        config: The config of the converted model.
        report: The report of the conversion.
        load_s: Seconds for conversion and loading.
    """

    model: Any
    processor: Any
    config: dict[str, Any]
    report: Report
    load_s: float


@takes_options("load")
def load_with_report(
    source: Source, quantization: Quantization | None = None, **arguments: Unpack[LoadKeywords]
) -> Loaded:
    """As ``load``, and return the report of the conversion too."""
    began = time.perf_counter()
    check_installed(source, "mlx-vlm")
    weights, report, planned = convert_in_memory(source, quantization, "mlx-vlm", **arguments)
    model, config = load_from_memory(source, "mlx-vlm", report.plan.config, weights)
    processor = load_processor(source, planned, getattr(model.config, "eos_token_id", None))
    return Loaded(model, processor, config, report, time.perf_counter() - began)


def load_processor(source: Source, planned: Planned, eos_token_ids: Any) -> Any:
    """The processor of a plan's source, as mlx-vlm loads it, but without code of the source.

    Raises:
        CheckpointError: The source has none, its library rejects it, or it needs a package that is
            not installed.
    """
    from mlx_vlm import utils

    model_type = format_value(planned.plan.config.get("model_type"))

    with (
        as_checkpoint_error(source, f"processor of model_type {model_type}", _PACKAGE_HINT),
        source_files(planned) as folder,
        quiet(),
        without_checkpoint_code(),
    ):
        options = {"trust_remote_code": False}
        image_processor = utils.load_image_processor(folder, **options)
        processor = utils.load_processor(folder, True, eos_token_ids=eos_token_ids, **options)
        if image_processor is not None:
            processor.image_processor = image_processor
        return processor
