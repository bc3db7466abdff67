"""``join`` of a calibration: the sums of its parts, added in the order of one process."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from requant.calibration.block_run import Calibration
from requant.calibration.collector import Collector
from requant.calibration.run_folder import (
    FINISHED,
    BlockRunState,
    FinishedRun,
    RunFolder,
    as_output_errors,
    part_folders,
)
from requant.calibration.section_sums import (
    Run,
    SectionSums,
    block_and_run,
    read_sums,
    section_ends,
)
from requant.errors import OutputError
from requant.quantization.part import Part
from requant.text import join_first


class _PartRun(NamedTuple):
    """A part that is done."""

    part: Part
    folder: Path
    finished: FinishedRun
    state: BlockRunState


def join_calibration(output: Path, *, force: bool = False) -> Calibration:
    """Write the statistics file of a calibration whose parts are done.

    Raises:
        OutputError: Parts are missing, or of different calibrations; the output exists, or cannot
            be written.
    """
    began = time.perf_counter()
    if output.exists() and not force:
        raise OutputError(f"{output} is there already; --force replaces it")
    done = _finished_parts(output)
    runs = _cover(output, done)
    finished, key = done[0].finished, done[0].state.key
    with RunFolder(finished.source, output, key, resume=False, joins=True) as folder:
        of_block: dict[int, dict[Run, Path]] = defaultdict(dict)
        for part in done:
            for name in part.state.parts:
                block, run = block_and_run(name)
                of_block[block][run] = part.folder / name
        for block in sorted(of_block):
            collector = Collector({}, with_hessians=False, most_hessian_bytes=0)
            for part in done:
                collector.called |= {*part.state.called}
                collector.too_wide |= {*part.state.too_wide}
            with as_output_errors(folder.path):
                sums = SectionSums(folder.path, block)
                for run in runs:
                    sums.add(run, read_sums(of_block[block][run]))
                collector.sums = sums.total()
            folder.save_block(collector, block)
        folder.finish(finished)
    return Calibration.of(finished, output, folder.state, began)


def _finished_parts(output: Path) -> list[_PartRun]:
    """The parts that are done; they must be of one calibration."""
    done = []
    for part, folder in part_folders(output):
        try:
            values = json.loads((folder / FINISHED).read_bytes())
            finished = FinishedRun(**values)
            key = json.loads((folder / "state.json").read_bytes())["key"]
        except (OSError, ValueError, TypeError, KeyError):
            continue
        done.append(
            _PartRun(part, folder, finished, BlockRunState.load(folder / "state.json", key))
        )
    if not done:
        raise OutputError(
            f"{output}: no part of a calibration is done; run requant calibrate MODEL -o {output} "
            "--part 1/2 and 2/2 first"
        )
    others = [str(x.part) for x in done if x.state.key != done[0].state.key]
    if others:
        raise OutputError(
            f"{output}: part {join_first(others)} is of another calibration than part "
            f"{done[0].part}; give the same command to every part, or remove "
            f"{done[0].folder.parent} to start over"
        )
    return done


def _cover(output: Path, done: Sequence[_PartRun]) -> list[Run]:
    """Sections that parts have summed, one after another, each section once."""
    count = len(section_ends(done[0].finished.windows))
    stops: Mapping[int, set[int]] = defaultdict(set)
    for part in done:
        for name in part.state.parts:
            _, (start, stop) = block_and_run(name)
            stops[start].add(stop)
    runs, at = [], 0
    while at < count:
        if not stops[at]:
            parts = max(part.part.count for part in done)
            missing = [f"{n}/{parts}" for n in range(1, parts + 1)]
            here = {str(part.part) for part in done}
            names = join_first([x for x in missing if x not in here])
            raise OutputError(
                f"{output}: the part {names} is not done; give the command of the other parts with "
                "--part for it"
            )
        runs.append((at, max(stops[at])))
        at = runs[-1][1]
    return runs
