"""``join``: complete an output whose parts were written by several processes."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from requant.api.budget_parts import choose_in_parts
from requant.api.convert import start_source
from requant.api.parts import read_join_command
from requant.api.runs import convert_rest, report_of
from requant.core.types import Source
from requant.errors import CheckpointError, OutputError, error_action
from requant.execution.executor import Progress
from requant.output.part_journals import command_file, read_budget, read_command, unchecked_parts
from requant.output.record import read_record
from requant.output.staging import StagingFolder
from requant.planning.layout_selection import vision_part
from requant.quantization.options import RunOptions
from requant.reports.report import Report
from requant.sources.hub_repository import find_repository

if TYPE_CHECKING:
    from requant.calibration.block_run import Calibration

STATISTICS_SUFFIX = ".safetensors"  # of the file that ``calibrate`` writes


@error_action("joined")
def join(
    output: Source,
    *,
    source: Source | None = None,
    force: bool = False,
    verify_load: bool = False,
    threads: int | None = None,
    max_memory: int | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Report | Calibration | None:
    """Complete an output that ``convert(..., part="i/n")``, or ``calibrate``, has begun.

    All journals must belong to one plan. What no part has done is done here, then the output is
    published under its name. Parts may have run in any order, twice, or not at all.

    Of a calibration all parts must be done: their sums are added to the file that one process
    writes. Of the other arguments ``force`` is for that.

    Args:
        output: The folder, or the statistics file, that was given to the parts.
        source: Where the source is on this machine, if not where the parts have found it.
        force: Replace an output that exists; as given to the parts by default.
        verify_load: As in ``convert``.
        threads: As in ``convert``.
        max_memory: As in ``convert``.
        progress: As in ``convert``.

    Returns:
        The report of the whole conversion, or the calibration; None if the output is complete
        already.

    Raises:
        OutputError: There are no parts, they are of different conversions, or one is still running.
        CheckpointError: Every problem of the source.

    Example:
        >>> requant.join("output")  # doctest: +SKIP
    """
    began, folder = time.perf_counter(), Path(output)
    if folder.suffix == STATISTICS_SUFFIX:
        from requant.calibration.join_parts import join_calibration

        return join_calibration(folder, force=force)
    staging = StagingFolder(folder)
    command = read_command(staging.parts) or read_budget(staging.parts)
    if command is None:
        if _is_complete(folder):
            return None
        if staging.parts.is_dir():
            raise OutputError(
                f"{command_file(staging.parts)} is missing or not what a part writes; remove it, "
                "run a part again, then join: what the parts have done is kept"
            )
        raise OutputError(
            f"{folder}: there are no parts to join in {staging.path}; run requant convert SOURCE "
            f"{shlex.quote(str(folder))} --part 1/2 and 2/2 first"
        )
    recorded, revision, options, replaces, consume = read_join_command(command, staging.path)
    run = RunOptions.from_arguments(
        force=force or replaces,
        consume_source=consume > 0,
        threads=threads,
        max_memory=max_memory,
        verify_load=verify_load,
        progress=progress,
        revision=revision,
    )
    named = recorded if source is None else str(source)
    remote = find_repository(named, revision, vision_part(options))
    try:
        opened = start_source(named, remote, folder, options, run, joins=True)
        if options.budget is not None:
            options = choose_in_parts(opened, folder, options, run, command)
        is_checked = not unchecked_parts(staging.parts, consume)
        planned, result = convert_rest(opened, folder, options, run, is_checked=is_checked)
    except (CheckpointError, OutputError):  # with --consume-source the source is gone then
        if not _is_complete(folder, command.get("plan", "")):
            raise  # no other process has joined the parts meanwhile
        return None
    planned = planned._replace(plan=replace(planned.plan, source=named))
    return report_of(planned, folder, result, began, run)


def _is_complete(output: Path, plan: str | None = None) -> bool:
    """Whether an output is there, with a record; of a plan with this hash, if one is given."""
    with suppress(CheckpointError):
        record = read_record(output)
        return plan is None or record.get("plan") == plan
    return False
