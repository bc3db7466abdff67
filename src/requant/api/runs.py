"""How a plan is carried out: as a whole, one part of it, or all parts on a cluster.

What comes before, from arguments to a source and options that can be planned, is in ``convert``.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from requant.api.parts import Command, with_absolute_paths
from requant.checkpoints.checkpoint import Checkpoint
from requant.cluster.part_task import Job
from requant.cluster.ray_engine import run_on_ray
from requant.errors import CheckpointError
from requant.execution.layer_stats import RunResult
from requant.execution.runner import Attempt, options_for_retry, run_once
from requant.execution.sink import NullSink
from requant.libraries.load_check import LoadCheck, check_load
from requant.output.folder import OutputFolder
from requant.output.part_folder import PartFolder
from requant.output.part_journals import mark_checked, unchecked_parts
from requant.output.staging import StagingLockedError, header_stubs_dir
from requant.planning.layout_selection import vision_part
from requant.planning.parts import check_whole_files, part_of
from requant.planning.plan import Plan
from requant.planning.planner import Planned, plan_with_source
from requant.planning.release_order import subplan
from requant.quantization.options import ConvertOptions, RunOptions
from requant.quantization.part import Part
from requant.reports.report import Report, layer_errors, rounding_errors
from requant.sources.open import as_checkpoint

_LOCK_WAIT_S = 60.0


def convert_whole(
    opened: Path | Checkpoint,
    output: Path,
    options: ConvertOptions,
    run: RunOptions,
    stubs: Path | None = None,
) -> tuple[Planned, RunResult]:
    """Plan, run and publish; again without the layers that hold NaN or Inf, if that is allowed."""
    while True:
        planned = plan_with_source(opened_checkpoint(opened, options, stubs), options)
        attempt = run_and_publish(planned, output, options, run)
        if not attempt.problems:
            return planned, attempt.result
        options = options_for_retry(planned.plan, attempt, options, run)


def run_and_publish(
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
    ray: Any,
    opened: Path | Checkpoint,
    output: Path,
    options: ConvertOptions,
    run: RunOptions,
    command: Command,
) -> tuple[Planned, RunResult]:
    """Plan once, run the parts on a cluster, and join them; ``ray`` is what ``connected`` gives.

    Raises:
        ClusterError: A part failed; the same command resumes.
        CheckpointError: Layers hold NaN or Inf.
    """
    options = with_absolute_paths(options)
    planned = plan_with_source(opened_checkpoint(opened, options), options)
    plan, source = planned.plan, planned.source.opened
    PartFolder(plan, source, output, Part(1, 1), command, force=run.force).begin()
    run_on_ray(ray, Job.of(plan, options, run, command, output), run.parts, run.progress)
    attempt = _when_unlocked(lambda: run_and_publish(planned, output, options, run))
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


class PartlyCheckedError(Exception):
    """A part was computed without errors, others were not yet; no file is deleted until then."""

    def __init__(self, plan: Plan, unchecked: int) -> None:
        super().__init__(f"{unchecked} parts are not checked yet")
        self.plan, self.unchecked = plan, unchecked  # how many parts


def _check_in_parts(
    planned: Planned, part: PartFolder, options: ConvertOptions, run: RunOptions
) -> None:
    """Compute a part once before a file of the source is deleted; all parts have to be."""
    plan = planned.plan
    check_whole_files(plan, part.part)
    part.begin()
    if (
        part.staging.header_stubs.is_dir()
    ):  # a part, or a join, deletes files: all was computed once
        return
    parts, count = part.staging.parts, part.part.count
    if part.part in unchecked_parts(parts, count):
        of_part = subplan(plan, [plan.steps[number] for number in part.steps])
        attempt = run_once(planned._replace(plan=of_part), NullSink(), options, run)
        if attempt.problems:
            raise CheckpointError(plan.source, list(attempt.problems))
        mark_checked(parts, part.part)
    if unchecked := len(unchecked_parts(parts, count)):
        raise PartlyCheckedError(plan, unchecked)


def _plan_of_part(
    opened: Path | Checkpoint, output: Path, options: ConvertOptions, run: RunOptions
) -> Planned:
    """Plan a part, of whose source other parts may delete files meanwhile."""

    def plan() -> Planned:
        stubs = _stubs_of(output) if run.consume_source else None
        return plan_with_source(opened_checkpoint(opened, options, stubs), options)

    try:
        return plan()
    except CheckpointError:
        if not run.consume_source or _stubs_of(output) is None:
            raise
    return plan()


def _stubs_of(output: Path) -> Path | None:
    """The headers of source files that were deleted; None before the first is."""
    stubs = header_stubs_dir(output)
    return stubs if stubs.is_dir() else None


def convert_rest(
    opened: Path | Checkpoint,
    output: Path,
    options: ConvertOptions,
    run: RunOptions,
    *,
    is_checked: bool,
) -> tuple[Planned, RunResult]:
    """Run and publish what parts have not done, as ``convert_whole``.

    Where the source is deleted, and not all parts were checked, everything is computed once before.
    """
    if not run.consume_source:
        return convert_whole(opened, output, options, run)
    stubs = _stubs_of(output)  # they are written when all was checked
    try:
        if stubs is None and not is_checked:
            options = dry_run(opened, options, run)
        return convert_whole(opened, output, options, run, stubs)
    except CheckpointError:
        found = _stubs_of(output)
        if stubs is not None or found is None:
            raise
    # Another process has begun to delete files meanwhile.
    return convert_whole(opened, output, options, run, found)


def convert_part(
    opened: Path | Checkpoint,
    output: Path,
    options: ConvertOptions,
    run: RunOptions,
    command: Command,
) -> tuple[Planned, RunResult]:
    """Plan and run one part; returns the part of the plan.

    Raises:
        CheckpointError: Layers of the part hold NaN or Inf; the other parts are as they were.
        PartlyCheckedError: The source is to be deleted, and other parts are to be checked before.
        UsageError: It is, and a file of it belongs to several parts.
    """
    assert run.part is not None
    consumes = run.consume_source
    planned = _plan_of_part(opened, output, options, run)
    part = PartFolder(
        planned.plan,
        planned.source.opened,
        output,
        run.part,
        command,
        force=run.force,
        consume=consumes,
    )
    if consumes:
        _check_in_parts(planned, part, options, run)
    with part as sink:
        attempt = run_once(planned, sink, options, run)
        if attempt.problems:
            raise CheckpointError(planned.plan.source, list(attempt.problems))
        sink.finish()
    return planned._replace(plan=part_of(planned.plan, sink.steps)), attempt.result


def dry_run(opened: Path | Checkpoint, options: ConvertOptions, run: RunOptions) -> ConvertOptions:
    """Read and compute everything once, so that errors show before files are deleted.

    Returns:
        The options with the layers that stay dense because of non-finite values.
    """
    while True:
        planned = plan_with_source(opened_checkpoint(opened, options), options)
        attempt = run_once(planned, NullSink(), options, run)
        if not attempt.problems:
            return options
        options = options_for_retry(planned.plan, attempt, options, run)


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


def opened_checkpoint(
    opened: Path | Checkpoint, options: ConvertOptions, stubs: Path | None = None
) -> Checkpoint:
    return as_checkpoint(opened, options.config_from, stubs, vision_part(options))
