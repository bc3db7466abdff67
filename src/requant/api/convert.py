"""``plan`` and ``convert``: the order of the stages of a conversion.

Arguments become options; the source is opened, planned, converted and published. Each stage is in
a package of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from requant.api.budget_parts import choose_in_parts
from requant.api.parts import Command, check_part, join_command
from requant.api.runs import (
    PartlyCheckedError,
    convert_on_cluster,
    convert_part,
    convert_whole,
    dry_run,
    report_of,
)
from requant.bit_allocation.choose import allocate_bits
from requant.bit_allocation.measure import without_budget
from requant.bit_allocation.measurements import PartlyMeasuredError, measurements_path
from requant.checkpoints.checkpoint import Checkpoint
from requant.checkpoints.folder_files import is_gguf
from requant.cluster.ray_engine import connected
from requant.core.reasons import Note, NoteCode
from requant.core.types import Source
from requant.errors import OutputError, UsageError
from requant.execution.layer_stats import RunResult
from requant.output.preflight import check_output
from requant.output.staging import (
    StagingFolder,
    bytes_on_disk,
    downloads_dir,
    header_stubs_dir,
    recorded_nonfinite_layers,
    staged_bytes,
    staging_dir,
)
from requant.planning.layout_selection import vision_part
from requant.planning.parts import part_of, steps_of_part
from requant.planning.plan import Plan
from requant.planning.planner import Planned, make_plan
from requant.planning.release_order import peak_disk_bytes, subplan
from requant.quantization.config import Quantization
from requant.quantization.option_signatures import read_arguments, takes_options
from requant.quantization.options import ConvertOptions, RunOptions
from requant.quantization.recipe_files import to_toml
from requant.reports.report import Report
from requant.sources.hub_repository import Repository, find_repository, open_source, read_source
from requant.sources.open import as_checkpoint
from requant.text import os_error_text

if TYPE_CHECKING:
    from requant.calibration.cost import CalibrationCost
    from requant.execution.option_keywords import ConvertKeywords, PlanKeywords


@takes_options("plan")
def plan(
    source: Source, quantization: Quantization | None = None, **arguments: Unpack[PlanKeywords]
) -> Plan:
    """Plan a conversion without running it; only headers and JSON are read.

    The options are those of ``convert`` that do not concern the output folder. With a ``budget``
    the whole source is read, and the error of each layer measured.

    Args:
        source: As in ``convert``.
        quantization: As in ``convert``.
        **arguments: The options of ``ConvertOptions`` and ``RunOptions``, each by its name;
            ``help`` and the reference list them.

    Returns:
        The target of each layer, the tensors to read and to write with files and offsets, sizes
        in bytes and bits per weight; ``requant plan --json`` prints its ``to_dict``.

    Raises:
        CheckpointError: Every problem of the source.
        HubError: A repository cannot be reached or denies access.
        UsageError: Options that contradict each other or match no layer.
        OutOfRangeError, UnknownValueError: The value of an option is invalid.

    Example:
        >>> found = plan("Llama-3.2-1B", bits=4, group_size=32)  # doctest: +SKIP
        >>> found.bits_per_weight, found.bytes_out  # doctest: +SKIP
    """
    options, run = read_arguments("plan", quantization, arguments)
    run.check_save_recipe(options)
    remote = find_repository(source, run.revision, vision_part(options))
    if options.budget is not None:
        if options.calibrate is not None:
            raise UsageError(
                "--budget is planned with the statistics that --calibrate collects: requant "
                "calibrate SOURCE -o stats.safetensors first, then plan with --imatrix "
                "stats.safetensors; or convert"
            )
        opened = open_source(source, remote, options.config_from)
        options = allocate_bits(opened, options, run)
        write_recipe(run, options)
    plan = make_plan(
        read_source(source, remote, options.config_from, vision_part(options)), options
    )
    if remote is None:
        return plan
    return replace(plan, notes=(*plan.notes, Note(NoteCode.DOWNLOAD, remote.download_summary())))


@takes_options("convert")
def convert(
    source: Source,
    output: Source,
    quantization: Quantization | None = None,
    **arguments: Unpack[ConvertKeywords],
) -> Report:
    """Convert a checkpoint folder into an MLX folder.

    Args:
        source: Folder with ``config.json`` and safetensors, or ``org/name`` of one on the hub,
            or a GGUF file (``org/name:Q4_K_M`` on the hub); it is never modified.
        output: Folder to write; it appears only when complete.
        quantization: Target of the chosen layers. None keeps a quantized source as it is
            and means affine, 4 bits, group 64 for a dense one.
        **arguments: The options of ``ConvertOptions`` and ``RunOptions``, each by its name;
            ``help`` and the reference list them.

    Returns:
        Treatment, sizes and errors of each layer.

    Raises:
        CheckpointError: Every problem of the source; nothing was written. With ``verify_load``
            also every problem of the output, which is complete and stays.
        OutputError: The output exists, is being written by another process, or cannot be
            written. Finished work is kept for the next call; a note of the error says where.
        UsageError: Options that contradict each other or match no layer.

    Example:
        >>> report = convert("source", "output", bits=4)  # doctest: +SKIP
        >>> round(report.bits_per_weight, 2)  # doctest: +SKIP
        4.5
    """
    began = time.perf_counter()
    options, run = read_arguments("convert", quantization, arguments)
    run.check_save_recipe(options)
    folder = Path(output)
    remote = find_repository(source, run.revision, vision_part(options))
    _check_consume_source(source, folder, remote, options, run)
    check_part(options, run)

    if options.calibrate is not None:
        options = _with_statistics(source, folder, remote, options, run)
    opened = start_source(source, remote, folder, options, run)
    command_of = partial(join_command, source, remote, run=run)
    if run.part is not None:
        return _run_part(opened, folder, options, run, command_of, began=began)
    if run.engine is not None:
        planned, result = _run_on_cluster(opened, folder, options, run, command_of)
    else:
        planned, result = _run_whole(opened, folder, options, run, is_local=remote is None)
    if options.budget is not None:
        measurements_path(folder).unlink(missing_ok=True)
    if options.calibrate is not None:
        from requant.calibration.conversion import remove_statistics

        remove_statistics(folder)
    return report_of(planned, folder, result, began, run)


def _run_whole(
    opened: Path | Checkpoint,
    output: Path,
    options: ConvertOptions,
    run: RunOptions,
    *,
    is_local: bool,
) -> tuple[Planned, RunResult]:
    """Run all of a conversion in this process."""
    if options.budget is not None:
        keep = measurements_path(output) if run.resume else None
        options = allocate_bits(
            opened,
            options,
            run,
            lambda first: check_output(first, output, run.force),
            keep,
            parts=StagingFolder(output).parts if run.resume else None,
        )
        write_recipe(run, options)
    # Before the first file of a local source is deleted, everything is computed once.
    stubs = header_stubs_dir(output) if run.consume_source and is_local else None
    if stubs is not None and not stubs.is_dir():
        stubs = None
        options = dry_run(opened, options, run)
    elif run.allow_nonfinite and run.resume:
        options = replace(options, nonfinite_layers=frozenset(recorded_nonfinite_layers(output)))
    return convert_whole(opened, output, options, run, stubs)


def _run_part(
    opened: Path | Checkpoint,
    output: Path,
    options: ConvertOptions,
    run: RunOptions,
    command_of: Callable[[ConvertOptions], Command],
    *,
    began: float,
) -> Report:
    """Run one part. With a budget it measures first, and converts once all parts have measured."""
    if options.budget is not None:
        try:
            options = choose_in_parts(opened, output, options, run, command_of(options))
        except PartlyMeasuredError as found:
            report = _report_of_nothing(found.plan, output, run, began)
            return replace(report, unmeasured=found.unmeasured)
    try:
        planned, result = convert_part(opened, output, options, run, command_of(options))
    except PartlyCheckedError as found:
        report = _report_of_nothing(found.plan, output, run, began)
        return replace(report, unchecked=found.unchecked)
    return report_of(planned, output, result, began, run)


def _report_of_nothing(plan: Plan, output: Path, run: RunOptions, began: float) -> Report:
    """The report of a part that has measured or checked, and converted nothing yet."""
    nothing, spent_s = part_of(plan, ()), time.perf_counter() - began
    return replace(Report.build(nothing, str(output), RunResult(), spent_s), part=run.part)


def _run_on_cluster(
    opened: Path | Checkpoint,
    output: Path,
    options: ConvertOptions,
    run: RunOptions,
    command_of: Callable[[ConvertOptions], Command],
) -> tuple[Planned, RunResult]:
    """Run all parts on a cluster; with a budget, they measure first."""
    with connected(run.address) as ray:
        if options.budget is not None:
            options = choose_in_parts(opened, output, options, run, command_of(options), ray=ray)
            write_recipe(run, options)
        command = command_of(options)
        return convert_on_cluster(ray, opened, output, options, run, command=command)


def calibration_cost(
    source: Source, quantization: Quantization | None = None, **arguments: Unpack[PlanKeywords]
) -> CalibrationCost | None:
    """What the calibration of a conversion takes on this machine; only headers are read.

    Args:
        source: As in ``convert``.
        quantization: As in ``convert``.
        **arguments: The options of ``plan``.

    Returns:
        Tokens, time, memory and disk; None where the options calibrate nothing.

    Raises:
        HubError, CheckpointError, UsageError: As ``calibrate``.
    """
    from requant.calibration.conversion import cost_of_calibration

    options, run = read_arguments("plan", quantization, arguments)
    if options.calibrate is None:
        return None
    remote = find_repository(source, run.revision, vision_part(options))
    if not _has_search(_plan_without_statistics(source, remote, options)):
        return None
    return cost_of_calibration(source, options, run.revision)


def _plan_without_statistics(
    source: Source, remote: Repository | None, options: ConvertOptions
) -> Plan:
    """The plan before anything is calibrated or measured."""
    checkpoint = read_source(source, remote, options.config_from, vision_part(options))
    return make_plan(checkpoint, without_budget(options), is_trial=True)


def _has_search(plan: Plan) -> bool:
    """Whether scales of some layer are searched for, which statistics can weight."""
    return any(step.search != "off" for step in plan.steps)


def _with_statistics(
    source: Source,
    output: Path,
    remote: Repository | None,
    options: ConvertOptions,
    run: RunOptions,
) -> ConvertOptions:
    """The options with the statistics of a calibration, which is resumed or run first.

    Where no layer is searched for scales, nothing is calibrated.
    """
    if run.consume_source:
        raise UsageError(
            "--consume-source deletes what --calibrate reads: requant calibrate SOURCE -o "
            "stats.safetensors first, then --imatrix stats.safetensors with --consume-source"
        )
    first = _plan_without_statistics(source, remote, options)
    check_output(first, output, run.force, staged_bytes(output))
    if not _has_search(first):
        return replace(options, calibrate=None, gptq=False, quality=None)
    from requant.calibration.conversion import collect_statistics

    statistics = collect_statistics(source, output, options, run)
    return replace(options, statistics=str(statistics))


def write_recipe(run: RunOptions, options: ConvertOptions) -> None:
    """Write the recipe that a budget chose to the file of ``save_recipe``."""
    if run.save_recipe is None or options.recipe is None:
        return
    try:
        with open(run.save_recipe, "x", encoding="utf-8") as file:
            file.write(to_toml(options.recipe))
    except OSError as error:
        raise OutputError(f"{run.save_recipe}: {os_error_text(error)}") from error


def _check_consume_source(
    source: Source,
    output: Path,
    remote: Repository | None,
    options: ConvertOptions,
    run: RunOptions,
) -> None:
    """Check that the source may be deleted, or that no stopped conversion deletes it."""
    if not run.consume_source:
        if header_stubs_dir(output).is_dir():
            raise OutputError(
                f"{output}: a conversion that deletes its source was stopped, and what it made is "
                f"in {staging_dir(output)}; resume with --consume-source --yes"
            )
        return
    if options.budget is not None:
        raise UsageError(
            "--budget measures the source before it is converted: requant plan SOURCE --budget "
            f"{options.budget} --save-recipe FILE.toml, then --recipe FILE.toml with "
            "--consume-source"
        )
    if remote is not None and run.part is not None:
        raise UsageError(
            "--consume-source with --part is for a folder: what a part downloads from the hub goes "
            "to the cache of its machine; HF_HOME names another place for it"
        )
    if remote is None and not run.yes:
        raise UsageError(
            f"--consume-source deletes the weights in {source}; afterwards nothing can be verified "
            "against them, and no other conversion made of them. --yes says that this is meant"
        )
    if is_gguf(Path(source)):
        raise UsageError("--consume-source is for safetensors; a GGUF file goes as a whole or not")


def start_source(
    source: Source,
    remote: Repository | None,
    output: Path,
    options: ConvertOptions,
    run: RunOptions,
    *,
    joins: bool = False,
) -> Path | Checkpoint:
    """The source of a conversion: a path, or a repository whose download starts.

    Of a repository the headers, the output and the room for downloads are checked first. With
    ``joins``, parts have done most of it, and no room is asked for.
    """
    if remote is None:
        return Path(source)
    area = downloads_dir(output) if run.consume_source else None
    checkpoint = as_checkpoint(remote.read_headers(options.config_from), options.config_from)
    plan, spent = make_plan(checkpoint, options), staged_bytes(output)
    needed: set[str] | None = set() if joins else None
    if run.part is not None and options.budget is None:
        steps = [plan.steps[number] for number in steps_of_part(plan, run.part)]
        needed = {file.name for file in subplan(plan, steps).files}
    if area is None:
        most = sum(shard.nbytes for shard in plan.shards)
        most += remote.cache_bytes_on_disk_of(output, needed)
    else:
        spent += bytes_on_disk(area)
        most = peak_disk_bytes(plan)
    check_output(plan, output, run.force, spent, most)
    return remote.start_download(checkpoint, area, needed)
