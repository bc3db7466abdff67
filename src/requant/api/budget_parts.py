"""``--budget`` in parts: every part measures its share, then the bits are chosen once for all.

What the parts have measured, and the command that they were given, is kept with them in the staging
folder. Whoever finds all layers measured there chooses; the first command of a conversion that
follows from it (``parts/command``) holds for all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from requant.api.parts import Command, read_join_command, with_absolute_paths
from requant.bit_allocation.choose import allocate_bits
from requant.bit_allocation.measure import TrialRun, without_budget
from requant.bit_allocation.measurements import MeasuredErrors, part_measurements_path
from requant.checkpoints.checkpoint import Checkpoint
from requant.cluster.part_task import Job, MeasureJob
from requant.cluster.ray_engine import measure_on_ray
from requant.errors import OutputError
from requant.output.part_journals import agree_on_budget, follows, read_budget, read_command
from requant.output.preflight import check_output
from requant.output.record import version
from requant.output.staging import StagingFolder
from requant.planning.plan import Plan
from requant.quantization.options import ConvertOptions, RunOptions
from requant.quantization.part import Part


def choose_in_parts(
    opened: Path | Checkpoint,
    output: Path,
    options: ConvertOptions,
    run: RunOptions,
    command: Command,
    ray: Any = None,
) -> ConvertOptions:
    """The options with what was chosen for all parts; measures what ``run.part`` has to.

    Args:
        opened: The source.
        output: The folder that all parts share.
        options: With the budget; paths are absolute.
        run: Which part this is; None with ``ray``.
        command: What ``join`` would repeat the choice from.
        ray: A cluster whose tasks measure, instead of this process.

    Raises:
        PartlyMeasuredError: This part is measured, other ones are not: nothing is chosen yet.
        OutputError: Parts of another conversion are in the folder.
        CheckpointError: Layers hold NaN or infinity.
        ClusterError: A task failed.
    """
    options = with_absolute_paths(options)
    staging = StagingFolder(output)
    command = {**command, "requant": version()}
    if (chosen := _chosen_before(staging, command)) is not None:
        return chosen
    keep = part_measurements_path(staging.parts, run.part or Part(1, 1))
    spread = (
        None
        if ray is None
        else partial(_measure_on, ray, options, run, command=command, output=output)
    )
    with _locked_by(staging) as lock:

        def begin(first: Plan) -> None:
            check_output(first, output, run.force)
            lock()
            begun = agree_on_budget(staging.parts, command)
            if _asked(begun) != _asked(command) or read_command(staging.parts) is not None:
                raise OutputError(
                    f"{output}: another conversion to this folder was begun in {staging.path}; "
                    f"give the same command in every part, or remove {staging.path} to start over"
                )

        return allocate_bits(opened, options, run, begin, keep, parts=staging.parts, spread=spread)


@contextmanager
def _locked_by(staging: StagingFolder) -> Iterator[Callable[[], None]]:
    """What takes the lock that parts share; it is given back at the end."""
    try:
        yield partial(staging.lock, shared=True)
    finally:
        staging.unlock()


def _asked(command: Command) -> tuple[Any, ...]:
    """What has to be the same in every part; a source may lie elsewhere on another machine."""
    return command.get("options"), command.get("revision"), command.get("requant")


def _chosen_before(staging: StagingFolder, command: Command) -> ConvertOptions | None:
    """The options that another part has chosen for the same command; None if none has."""
    begun, chosen = read_budget(staging.parts), read_command(staging.parts)
    if begun is None or chosen is None or _asked(begun) != _asked(command):
        return None
    if not follows(chosen, begun):
        return None
    return read_join_command(chosen, staging.path).options


def _measure_on(
    ray: Any,
    options: ConvertOptions,
    run: RunOptions,
    trials: TrialRun,
    kept: MeasuredErrors,
    *,
    command: Command,
    output: Path,
    key: str,
) -> None:
    """Have the tasks of a cluster measure what the parts have not."""
    job = Job.of(trials.base, without_budget(options), run, command, output)
    measure_on_ray(ray, MeasureJob.of(job, key), trials, kept, run.progress)
