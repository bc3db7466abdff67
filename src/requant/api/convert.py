"""``plan`` and ``convert``: the order of the stages of a conversion.

Arguments become options; the source is opened, planned, converted and published. Each stage is in
a package of its own.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from requant.api.parts import check_part, join_command, with_absolute_paths
from requant.bit_allocation.choose import allocate_bits
from requant.bit_allocation.measure import without_budget
from requant.bit_allocation.measurements import measurements_path
from requant.checkpoints.checkpoint import Checkpoint
from requant.checkpoints.folder_files import is_gguf
from requant.cluster.part_task import Job
from requant.cluster.ray_engine import connected, run_on_ray
from requant.core.reasons import Note, NoteCode
from requant.core.types import Source
from requant.errors import CheckpointError, OutputError, UsageError
from requant.execution.layer_stats import RunResult
from requant.execution.runner import Attempt, options_for_retry, run_once
from requant.execution.sink import NullSink
from requant.libraries.load_check import LoadCheck, check_load
from requant.output.folder import OutputFolder
from requant.output.part_folder import PartFolder
from requant.output.preflight import check_output
from requant.output.record import version
from requant.output.staging import (
    StagingLockedError,
    bytes_on_disk,
    downloads_dir,
    header_stubs_dir,
    recorded_nonfinite_layers,
    staged_bytes,
    staging_dir,
)
from requant.planning.layout_selection import vision_part
from requant.planning.parts import part_of
from requant.planning.plan import Plan
from requant.planning.planner import Planned, make_plan, plan_with_source
from requant.planning.release_order import peak_disk_bytes
from requant.quantization.config import Quantization
from requant.quantization.option_signatures import read_arguments, takes_options
from requant.quantization.options import ConvertOptions, RunOptions
from requant.quantization.part import Part
from requant.quantization.recipe_files import to_toml
from requant.reports.report import Report, layer_errors, rounding_errors
from requant.sources.hub_repository import Repository, find_repository, open_source, read_source
from requant.sources.open import as_checkpoint
from requant.text import os_error_text

if TYPE_CHECKING:
    from requant.calibration.cost import CalibrationCost
    from requant.execution.option_keywords import ConvertKeywords, PlanKeywords

_LOCK_WAIT_S = 60.0


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
    if options.budget is not None:
        keep = measurements_path(folder) if run.resume else None
        options = allocate_bits(
            opened, options, run, lambda first: check_output(first, folder, run.force), keep
        )
        write_recipe(run, options)
    # Before the first file of a local source is deleted, everything is computed once.
    stubs = header_stubs_dir(folder) if run.consume_source and remote is None else None
    if stubs is not None and not stubs.is_dir():
        stubs = None
        options = _dry_run(opened, options, run)
    elif run.allow_nonfinite and run.resume:
        options = replace(options, nonfinite_layers=frozenset(recorded_nonfinite_layers(folder)))

    if run.part is not None:
        command = join_command(source, remote, options, run)
        planned, result = convert_part(opened, folder, options, run, command)
    elif run.engine is not None:
        command = join_command(source, remote, options, run)
        planned, result = convert_on_cluster(opened, folder, options, run, command)
    else:
        planned, result = convert_whole(opened, folder, options, run, stubs)

    if options.budget is not None:
        measurements_path(folder).unlink(missing_ok=True)
    if options.calibrate is not None:
        from requant.calibration.conversion import remove_statistics

        remove_statistics(folder)
    return report_of(planned, folder, result, began, run)


def convert_whole(
    opened: Path | Checkpoint,
    output: Path,
    options: ConvertOptions,
    run: RunOptions,
    stubs: Path | None = None,
) -> tuple[Planned, RunResult]:
    """Plan, run and publish; again without the layers that hold NaN or Inf, if that is allowed."""
    while True:
        planned = plan_with_source(_checkpoint(opened, options, stubs), options)
        attempt = _run_and_publish(planned, output, options, run)
        if not attempt.problems:
            return planned, attempt.result
        options = options_for_retry(planned.plan, attempt, options, run)


def _run_and_publish(
    planned: Planned, output: Path, options: ConvertOptions, run: RunOptions
) -> Attempt:
    """Run what of a plan is not done and publish the output; with problems, nothing is kept."""
    with OutputFolder(
        planned.plan,
        planned.source.opened,
        output,
        run.force,
        resume=run.resume,
        options=options.to_dict(),
        consume=run.consume_source,
    ) as sink:
        attempt = run_once(planned, sink, options, run)
        if not attempt.problems:
            measured = (planned.plan, attempt.result)
            errors = {
                layer: (error.relative_rms, error.max_steps)
                for layer, error in layer_errors(*measured).items()
            }
            sink.publish(errors, rounding_errors(*measured))
    # Left without an error and unpublished, the folder has deleted its staging files.
    return attempt


def convert_on_cluster(
    opened: Path | Checkpoint,
    output: Path,
    options: ConvertOptions,
    run: RunOptions,
    command: Mapping[str, Any],
) -> tuple[Planned, RunResult]:
    """Plan once, run the parts on a cluster, and join them.

    Raises:
        ClusterError: The cluster cannot be reached, or a part failed; the same command resumes.
        CheckpointError: Layers hold NaN or Inf.
    """
    options = with_absolute_paths(options)
    with connected(run.address) as ray:
        planned = plan_with_source(_checkpoint(opened, options), options)
        plan = planned.plan
        opened_source = planned.source.opened
        PartFolder(plan, opened_source, output, Part(1, 1), command, force=run.force).begin()
        job = Job(
            plan=plan,
            plan_hash=plan.hash,
            source=command["source"],
            revision=command["revision"],
            output=str(output.absolute()),
            options=options,
            run=replace(run, progress=None),
            command=command,
            requant=version(),
        )
        run_on_ray(ray, job, run.parts, run.progress)
    attempt = _when_unlocked(lambda: _run_and_publish(planned, output, options, run))
    if attempt.problems:
        raise CheckpointError(planned.plan.source, list(attempt.problems))
    return planned, attempt.result


def _when_unlocked(work: Callable[[], Attempt]) -> Attempt:
    """Do ``work`` once no part holds the lock: one whose machine was lost may hold it a while."""
    deadline = time.monotonic() + _LOCK_WAIT_S
    while True:
        try:
            return work()
        except StagingLockedError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.5)


def convert_part(
    opened: Path | Checkpoint,
    output: Path,
    options: ConvertOptions,
    run: RunOptions,
    command: Mapping[str, Any],
) -> tuple[Planned, RunResult]:
    """Plan and run one part; returns the part of the plan.

    Raises:
        CheckpointError: Layers of the part hold NaN or Inf; the other parts are as they were.
    """
    assert run.part is not None
    planned = plan_with_source(_checkpoint(opened, options), options)
    with PartFolder(
        planned.plan, planned.source.opened, output, run.part, command, force=run.force
    ) as sink:
        attempt = run_once(planned, sink, options, run)
        if attempt.problems:
            raise CheckpointError(planned.plan.source, list(attempt.problems))
        sink.finish()
    return planned._replace(plan=part_of(planned.plan, sink.steps)), attempt.result


def report_of(
    planned: Planned, output: Path, result: RunResult, began: float, run: RunOptions
) -> Report:
    """The report of a run that ``began`` at a time of ``perf_counter``."""
    report = Report.build(planned.plan, str(output), result, time.perf_counter() - began)
    if run.part is not None:
        return replace(report, part=run.part)
    if run.verify_load:
        report = replace(report, load=_load_output(output, planned.plan))
    return report


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


def _load_output(output: Path, plan: Plan) -> LoadCheck:
    """Load a published output with its library.

    Raises:
        CheckpointError: It does not load, or gives values that are not finite.
    """
    check = check_load(output, plan.layout)
    if not check.ok:
        error = CheckpointError(str(output), check.problems, "loaded")
        error.add_note(
            f"{output} is complete and stays; requant verify {shlex.quote(str(output))} --load "
            "repeats the check, and --force replaces the folder by another conversion"
        )
        raise error
    return check


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
    if remote is None and not run.yes:
        raise UsageError(
            f"--consume-source deletes the weights in {source}; afterwards nothing can be verified "
            "against them, and no other conversion made of them. --yes says that this is meant"
        )
    if is_gguf(Path(source)):
        raise UsageError("--consume-source is for safetensors; a GGUF file goes as a whole or not")


def _checkpoint(
    opened: Path | Checkpoint, options: ConvertOptions, stubs: Path | None = None
) -> Checkpoint:
    return as_checkpoint(opened, options.config_from, stubs, vision_part(options))


def start_source(
    source: Source,
    remote: Repository | None,
    output: Path,
    options: ConvertOptions,
    run: RunOptions,
) -> Path | Checkpoint:
    """The source of a conversion: a path, or a repository whose download starts.

    Of a repository the headers and the output are checked first.
    """
    if remote is None:
        return Path(source)
    area = downloads_dir(output) if run.consume_source else None
    checkpoint = as_checkpoint(remote.read_headers(options.config_from), options.config_from)
    plan, spent = make_plan(checkpoint, options), staged_bytes(output)
    if area is None:
        most = sum(shard.nbytes for shard in plan.shards) + remote.cache_bytes_on_disk_of(output)
    else:
        spent += bytes_on_disk(area)
        most = peak_disk_bytes(plan)
    check_output(plan, output, run.force, spent, most)
    return remote.start_download(checkpoint, area)


def _dry_run(opened: Path | Checkpoint, options: ConvertOptions, run: RunOptions) -> ConvertOptions:
    """Read and compute everything once, so that errors show before files are deleted.

    Returns:
        The options with the layers that stay dense because of non-finite values.
    """
    while True:
        planned = plan_with_source(_checkpoint(opened, options), options)
        attempt = run_once(planned, NullSink(), options, run)
        if not attempt.problems:
            return options
        options = options_for_retry(planned.plan, attempt, options, run)
