"""One part of a plan that was made elsewhere: what a task of a cluster does.

The plan is shipped and not made again. The exception is a part with tensors that a library computes
from values: the functions for these are not data, so the plan is made again and its hash compared.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from requant.errors import ClusterError, Problem, RequantError
from requant.execution.chunks import computed_inputs
from requant.execution.executor import Progress
from requant.execution.runner import run_once
from requant.output.part_folder import PartFolder
from requant.output.part_journals import read_command
from requant.output.record import version
from requant.output.staging import StagingFolder
from requant.planning.layout_selection import vision_part
from requant.planning.parts import steps_of_part
from requant.planning.plan import Plan
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
    host = socket.gethostname()
    try:
        return _run(job, part, host, progress)
    except RequantError as error:
        failure = "\n".join([str(error), *getattr(error, "__notes__", ())])
        return PartOutcome(part, host, failure=failure)


def _run(
    job: Job, part: Part, host: str, progress: Callable[[Progress], None] | None
) -> PartOutcome:
    output = Path(job.output)
    if version() != job.requant:
        raise ClusterError(
            f"requant is {version()} here, the plan was made by {job.requant}; install that version"
        )
    command = read_command(StagingFolder(output).parts)
    if command is None or command.get("plan") != job.plan_hash:
        raise ClusterError(
            f"{StagingFolder(output).path} is not the folder that the conversion has begun; OUTPUT "
            "must be on a disk that all machines of the cluster share, under the same path"
        )
    steps = steps_of_part(job.plan, part)
    source = _open(job, steps)
    run = replace(job.run, progress=progress)
    with PartFolder(job.plan, source.opened, output, part, job.command, force=run.force) as sink:
        attempt = run_once(Planned(job.plan, source), sink, job.options, run)
        if not attempt.problems:
            sink.finish()
    bytes_in = sum(job.plan.steps[number].bytes_in for number in steps)
    return PartOutcome(part, host, bytes_in, attempt.problems)


def _open(job: Job, steps: Iterable[int]) -> PlanSource:
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
    if not any(computed_inputs(job.plan.steps[number]) for number in steps):
        return PlanSource(checkpoint)
    again = plan_with_source(checkpoint, job.options)
    if again.plan.hash != job.plan_hash:
        raise ClusterError(
            f"{job.source} gives another plan here than where the plan was made; the versions of "
            "the MLX libraries and all files of the source must be the same"
        )
    return again.source
