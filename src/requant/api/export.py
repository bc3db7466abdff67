"""``export``: a quantized checkpoint becomes a folder of another tool, with the same codes.

The stages are those of ``convert``: plan, run, publish.
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable
from pathlib import Path

from requant.checkpoints.checkpoint import Checkpoint
from requant.checkpoints.folder_files import RECORD, is_repository_id
from requant.core.types import Source
from requant.errors import CheckpointError, ParseError, UsageError, error_action
from requant.execution.executor import Progress
from requant.execution.runner import run_once
from requant.gguf.file_selection import SUFFIX
from requant.output.folder import OutputFolder
from requant.output.preflight import check_place
from requant.output.record import read_record
from requant.planning.export import plan_export
from requant.planning.export_gguf import model_name, plan_gguf
from requant.planning.plan import Plan
from requant.planning.planner import Planned
from requant.quantization.export_options import EXPORT, ExportFormat, ExportOptions, split_export
from requant.quantization.options import ConvertOptions, RunOptions
from requant.reports.report import Report
from requant.sources.open import read_checkpoint


@error_action("exported")
def export(
    source: Source,
    output: Source,
    *,
    to: str,
    otherwise: str = "refuse",
    force: bool = False,
    resume: bool = True,
    max_memory: int | None = None,
    threads: int | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Report:
    """Write a quantized checkpoint in the format of another tool; its codes stay as they are.

    An affine layer needs integer zero points: it is ``exact`` where ``-zero * scale``, rounded to
    the dtype of the scales, is each of its biases, and ``rounded`` where the two differ by one
    rounding, or where the format's dtype rounds scales. Layers of the modes mxfp4, mxfp8 and nvfp4
    are moved as they are. Embeddings, output heads and routers are written dense.

    GGUF has blocks with biases, and quantized embeddings: layers of 2 to 5 bits are ``exact``
    wherever float16 holds their scales and biases. Metadata and tokenizer are written with them.

    Args:
        source: MLX folder, or a checkpoint of any format that ``convert`` takes; it is never
            modified.
        output: Folder to write, or for "gguf" the file; it appears only when complete.
        to: The format: "compressed-tensors" (4 and 8 bits, mxfp4, mxfp8, nvfp4), "gptq" (2, 3, 4
            and 8 bits), "awq" (4 bits), or compressed-tensors with nothing but "mxfp4" or "nvfp4",
            or "gguf".
        otherwise: What becomes of a layer that the format cannot hold with its codes: "refuse"
            raises an error that lists all of them, "widen" writes the same codes in more bits where
            the format has them, or encodes the values again in 8 bits, "dense" decodes it.
        force: Replace an existing output.
        resume: Resume the same export after a stop; False starts over.
        max_memory: Most bytes to hold in memory.
        threads: Worker threads; every processor by default.
        progress: Called about ten times a second.

    Returns:
        Treatment, exactness and size of each layer.

    Raises:
        CheckpointError: Every problem of the source; nothing was written.
        OutputError: The output exists, is being written by another process, or cannot be written.
        UsageError, UnknownValueError: An option is invalid.

    Example:
        >>> requant.export("mlx-4bit", "for-vllm", to="compressed-tensors")  # doctest: +SKIP
    """
    began = time.perf_counter()
    options = ExportOptions.from_words(to, otherwise)
    run = RunOptions.from_arguments(
        force=force, resume=resume, max_memory=max_memory, threads=threads, progress=progress
    )
    _check_name(Path(output), options)
    planned = plan_folder(source, options)
    conversion = ConvertOptions()
    with OutputFolder(
        planned.plan,
        planned.source.opened,
        Path(output),
        run.force,
        resume=run.resume,
        options=conversion.to_dict() | {EXPORT: options.to_dict()},
    ) as sink:
        attempt = run_once(planned, sink, conversion, run)
        if attempt.problems:
            raise CheckpointError(planned.plan.source, list(attempt.problems), "exported")
        sink.publish()
    return Report.build(planned.plan, str(output), attempt.result, time.perf_counter() - began)


@error_action("exported")
def export_plan(
    source: Source,
    output: Source,
    *,
    to: str,
    otherwise: str = "refuse",
    force: bool = False,
) -> Plan:
    """Plan an export without running it: what ``requant export --dry-run`` prints.

    Args and errors are those of ``export``.
    """
    options = ExportOptions.from_words(to, otherwise)
    _check_name(Path(output), options)
    plan = plan_folder(source, options).plan
    check_place(plan, Path(output), force)
    return plan


def _check_name(output: Path, options: ExportOptions) -> None:
    if options.to is ExportFormat.GGUF and output.suffix != SUFFIX:
        raise UsageError(f"{output}: --to gguf writes one file; name a file that ends in {SUFFIX}")


def plan_folder(source: Source | Checkpoint, options: ExportOptions) -> Planned:
    """The plan of the export of a folder, with its source.

    Raises:
        UsageError: The source is a repository on the hub.
    """
    if not isinstance(source, Checkpoint) and is_repository_id(source):
        name = shlex.quote(os.fspath(source))
        raise UsageError(
            f"{os.fspath(source)}: export reads folders: hf download {name} --local-dir FOLDER, "
            "then requant export FOLDER OUTPUT"
        )
    opened = source if isinstance(source, Checkpoint) else read_checkpoint(source)
    if options.to is ExportFormat.GGUF:
        return plan_gguf(opened, options, model_name(opened.source.resolve(), opened.config))
    place = opened.path if isinstance(source, Checkpoint) else Path(source)
    return plan_export(opened, options, keeps_names=_has_own_names(place))


def _has_own_names(folder: Path) -> bool:
    """Whether the folder's record says that its tensors have the names of a folder for PyTorch."""
    if not (folder / RECORD).is_file():
        return False
    try:
        record = read_record(folder)
        _, options = split_export(record["options"])
        kept = ConvertOptions.from_dict(options).layout == "keep"
        return kept and record["source"]["format"] not in ("mlx", "gguf", "metal")
    except (CheckpointError, ParseError, KeyError, TypeError):
        return False
