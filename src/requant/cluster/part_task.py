"""One part of a plan that was made elsewhere: what a task of a cluster does.

The plan is shipped and not made again. The exception is a part with tensors that a library computes
from values: the functions for these are not data, so the plan is made again and its hash compared.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from requant.bit_allocation.measure import run_trials
from requant.bit_allocation.measurements import MeasuredErrors, part_measurements_path
from requant.errors import ClusterError, Problem, RequantError
from requant.execution.candidate_errors import Trial
from requant.execution.chunks import computed_inputs
from requant.execution.executor import Progress
from requant.execution.runner import run_once
from requant.output.part_folder import PartFolder
from requant.output.part_journals import read_budget, read_command
from requant.output.record import version
from requant.output.shard_files import write_error
from requant.output.staging import StagingFolder
from requant.planning.layout_selection import vision_part
from requant.planning.parts import steps_of_part
from requant.planning.plan import Plan, Step
from requant.planning.plan_source import PlanSource
from requant.planning.planner import Planned, plan_with_source
from requant.quantization.options import ConvertOptions, RunOptions
from requant.quantization.part import Part
from requant.sources.hub_repository import find_repository, open_source
from requant.sources.open import as_checkpoint
from requant.text import join_first


@dataclass(frozen=True, slots=True)
class Job:
    """What all tasks of a conversion share: plain data, shipped once. Paths are absolute."""

    plan: Plan
    plan_hash: str
    source: str
    revision: str | None  # the commit of a repository on the hub
    output: str
    options: ConvertOptions  # what the plan was made from
    run: RunOptions  # threads and memory of a task; no progress
    command: Mapping[str, Any]  # what ``join`` repeats the plan from
    requant: str  # the version that made the plan

    @classmethod
    def of(
        cls,
        plan: Plan,
        options: ConvertOptions,
        run: RunOptions,
        command: Mapping[str, Any],
        output: Path,
    ) -> Self:
        """The job of a plan that was made here."""
        return cls(
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


@dataclass(frozen=True, slots=True)
class MeasureJob:
    """What all tasks that measure for ``--budget`` share."""

    job: Job  # of the plan without the budget, whose steps are not shipped
    key: str  # of the files of measurements

    @classmethod
    def of(cls, job: Job, key: str) -> Self:
        """The job of a plan, of which a task needs what is not of its steps."""
        return cls(replace(job, plan=replace(job.plan, steps=(), layers=(), shards=())), key)


@dataclass(frozen=True, slots=True)
class PartOutcome:
    """How a part ended: without ``problems`` and ``failure``, it is done and durable."""

    part: Part
    host: str
    bytes_in: int = 0  # of the part
    problems: tuple[Problem, ...] = ()  # of values: NaN, infinity
    failure: str = ""  # why it could not run


def run_part(
    job: Job, part: Part, progress: Callable[[Progress], None] | None = None
) -> PartOutcome:
    """Run a part into the folder that all machines share.

    An error is returned and not raised, since a cluster would wrap it in one of its own.
    """
    return _outcome(part, lambda: _run(job, part, progress))


def measure_part(
    job: MeasureJob,
    part: Part,
    trials: Sequence[Trial],
    progress: Callable[[Progress], None] | None = None,
) -> PartOutcome:
    """Measure some layers for ``--budget``, into the folder that all machines share."""
    return _outcome(part, lambda: _measure(job, part, trials, progress))


def _outcome(part: Part, work: Callable[[], tuple[int, tuple[Problem, ...]]]) -> PartOutcome:
    """Do the work of a part, which returns bytes that were read and problems of values."""
    host = socket.gethostname()
    try:
        return PartOutcome(part, host, *work())
    except RequantError as error:
        failure = "\n".join([str(error), *getattr(error, "__notes__", ())])
        return PartOutcome(part, host, failure=failure)


def _run(
    job: Job, part: Part, progress: Callable[[Progress], None] | None
) -> tuple[int, tuple[Problem, ...]]:
    output = Path(job.output)
    command = read_command(StagingFolder(output).parts)
    _check_machine(job, is_begun=command is not None and command.get("plan") == job.plan_hash)
    numbers = steps_of_part(job.plan, part)
    steps = [job.plan.steps[number] for number in numbers]
    source = _open(job, steps)
    run = replace(job.run, progress=progress)
    with PartFolder(job.plan, source.opened, output, part, job.command, force=run.force) as sink:
        attempt = run_once(Planned(job.plan, source), sink, job.options, run)
        if not attempt.problems:
            sink.finish()
    return sum(step.bytes_in for step in steps), attempt.problems


def _measure(
    job: MeasureJob,
    part: Part,
    trials: Sequence[Trial],
    progress: Callable[[Progress], None] | None,
) -> tuple[int, tuple[Problem, ...]]:
    shared = job.job
    staging = StagingFolder(Path(shared.output))
    _check_machine(shared, is_begun=read_budget(staging.parts) == shared.command)
    steps = [trial.dense_step(number) for number, trial in enumerate(trials)]
    source = _open(shared, steps, is_trial=True)
    staging.lock(shared=True)
    try:
        kept = MeasuredErrors(part_measurements_path(staging.parts, part), job.key, staging.parts)
        left = [trial for trial in trials if trial.layer not in kept.layers]
        run = replace(shared.run, progress=progress)
        problems = run_trials(shared.plan, source, left, run, kept)
        kept.make_durable()
    except OSError as error:
        if isinstance(error, RequantError):
            raise
        raise write_error(staging.output, error) from error
    finally:
        staging.unlock()
    return sum(step.bytes_in for step in steps), tuple(problems.values())


def _check_machine(job: Job, *, is_begun: bool) -> None:
    """Check the version of requant, and that the folder is that of the command.

    Raises:
        ClusterError: One is another.
    """
    if version() != job.requant:
        raise ClusterError(
            f"requant is {version()} here, the plan was made by {job.requant}; install that version"
        )
    if not is_begun:
        raise ClusterError(
            f"{StagingFolder(Path(job.output)).path} is not the folder that the conversion has "
            "begun; OUTPUT must be on a disk that all machines of the cluster share, under the "
            "same path"
        )


def _open(job: Job, steps: Iterable[Step], *, is_trial: bool = False) -> PlanSource:
    """The source of the plan on this machine, for some of its steps.

    Raises:
        ClusterError: It is another source than the plan's.
    """
    remote = find_repository(job.source, job.revision, vision_part(job.options))
    opened = open_source(job.source, remote, job.options.config_from)
    checkpoint = as_checkpoint(opened, job.options.config_from, mmproj=vision_part(job.options))
    here = {file.name: file for file in checkpoint.files}
    other = [file.name for file in job.plan.files if here.get(file.name) != file]
    if other:
        raise ClusterError(
            f"{job.source}: {join_first(other)} is another file here than where the plan was made"
        )
    if not any(map(computed_inputs, steps)):
        return PlanSource(checkpoint)
    again = plan_with_source(checkpoint, job.options, is_trial=is_trial)
    if again.plan.hash != job.plan_hash:
        raise ClusterError(
            f"{job.source} gives another plan here than where the plan was made; the versions of "
            "the MLX libraries and all files of the source must be the same"
        )
    return again.source
