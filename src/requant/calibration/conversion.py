"""The calibration that is a part of a conversion: ``convert(..., calibrate=...)``.

The statistics are a file next to the output, whose name holds the hash of everything that they
depend on. It stays until the output is complete: the same command finds it, or resumes what was
stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from requant.calibration.block_run import DEFAULT_TOKENS, prepare, run
from requant.calibration.cost import CalibrationCost, cost_of
from requant.calibration.text_model import plan_text_model
from requant.core.types import Source
from requant.errors import error_action
from requant.execution.executor import Progress
from requant.quantization.options import ConvertOptions, RunOptions

_NAME = ".{output}.requant-statistics-{key}.safetensors"


@error_action("calibrated")
def collect_statistics(
    source: Source, output: Path, options: ConvertOptions, run_options: RunOptions
) -> Path:
    """The statistics file of a conversion, which is made unless it is there.

    Raises:
        HubError, CheckpointError, UsageError, OutputError: As ``calibrate``.
    """
    task = prepare(
        source,
        options.calibrate or None,
        hessian=options.gptq,
        revision=run_options.revision,
        config_from=options.config_from,
        threads=run_options.threads,
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    complete = output.with_name(_NAME.format(output=output.name, key=task.key[:16]))
    if not (run_options.resume and complete.is_file()):
        remove_statistics(output)
        progress = None if run_options.progress is None else _as_progress(run_options.progress)
        fresh = output.with_name(_NAME.format(output=output.name, key="new"))
        run(task, fresh, resume=run_options.resume, progress=progress)
        fresh.rename(complete)
    return complete


def remove_statistics(output: Path) -> None:
    """Delete the statistics of a conversion."""
    start, end = _NAME.format(output=output.name, key="\n").split("\n")
    for path in output.parent.iterdir():
        if path.name.startswith(start) and path.name.endswith(end):
            path.unlink()


def cost_of_calibration(
    source: Source, options: ConvertOptions, revision: str | None = None
) -> CalibrationCost:
    """What the calibration of a conversion takes; only headers are read.

    Raises:
        HubError, CheckpointError: As ``calibrate``.
    """
    planned = plan_text_model(source, revision, options.config_from)
    return cost_of(planned.plan, DEFAULT_TOKENS, hessians=options.gptq)


def _as_progress(update: Callable[[Progress], None]) -> Callable[[str, int, int], None]:
    """Report counts as a ``Progress``."""
    began = time.perf_counter()
    before: list[int] = []

    def report(what: str, done: int, of: int) -> None:
        if not before:
            before.append(done)
        update(
            Progress(
                layer=what,
                bytes_done=0,
                bytes_total=0,
                elapsed_s=time.perf_counter() - began,
                steps_done=done,
                steps_total=of,
                steps_before=before[0],
            )
        )

    return report
