"""One run of a plan, and whether its result may be kept."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from requant.errors import CheckpointError, Problem
from requant.execution.executor import run_plan
from requant.execution.layer_stats import LayerStats, RunResult
from requant.execution.resources import plan_resources
from requant.execution.sink import Sink
from requant.planning.plan import Plan
from requant.planning.planner import Planned
from requant.quantization.options import ConvertOptions, RunOptions
from requant.text import pluralize_are


@dataclass(frozen=True, slots=True)
class Attempt:
    """The outcome of one run."""

    result: RunResult  # statistics of each layer; complete only without problems
    # Reasons to discard the output: NaN, Inf, or values that would become Inf.
    problems: tuple[Problem, ...]
    nonfinite_layers: frozenset[str]  # layers with NaN or Inf that the options did not know of


def run_once(planned: Planned, sink: Sink, options: ConvertOptions, run: RunOptions) -> Attempt:
    """Run a plan into ``sink``; problems of the values are returned, not raised.

    ``options`` are what the plan was made from; ``run`` has threads, memory and what is allowed.
    """
    plan, source = planned.plan, planned.source
    limits = plan_resources(plan, run.threads, run.max_memory, run.chunk_bytes)
    downloader = source.opened.downloader

    def is_fatal(found: LayerStats) -> bool:
        return found.is_not_a_number or bool(found.overflowed and not run.allow_overflow)

    # Files that are deleted after use are not downloaded to the end for a run that fails anyway.
    is_deleted = downloader is not None and downloader.consumed
    stop_at = is_fatal if is_deleted and not run.allow_nonfinite else None
    result = run_plan(plan, source, sink, limits=limits, progress=run.progress, stop_at=stop_at)
    found = result.findings
    nonfinite = frozenset(layer for layer, x in found.items() if x.is_not_a_number)
    return Attempt(
        result,
        tuple(_find_fatal_values(found, options.nonfinite_layers, run.allow_overflow)),
        nonfinite - options.nonfinite_layers,
    )


def options_for_retry(
    plan: Plan, attempt: Attempt, options: ConvertOptions, run: RunOptions
) -> ConvertOptions:
    """The options that leave the layers with NaN or Inf as they are.

    The layout of the output changes with a layer that stays dense: it has to be planned again.

    Raises:
        CheckpointError: There are none, or they are not allowed.
    """
    if not attempt.nonfinite_layers or not run.allow_nonfinite:
        raise CheckpointError(plan.source, list(attempt.problems))
    return replace(
        options, nonfinite_layers=options.nonfinite_layers.union(attempt.nonfinite_layers)
    )


def _find_fatal_values(
    findings: Mapping[str, LayerStats], nonfinite_layers: Collection[str], allow_overflow: bool
) -> list[Problem]:
    """Reasons to discard an output: NaN or infinite values, or values that would become so."""
    problems = []
    for layer, found in findings.items():
        if found.is_not_a_number and layer not in nonfinite_layers:
            problems.append(found.nonfinite_problem(layer))
        if found.overflowed and not allow_overflow:
            message = (
                f"{pluralize_are(found.overflowed, 'value')} too large for the dtype asked for and "
                "would become infinite; --dtype bfloat16 holds them, "
                "--allow-overflow takes infinities"
            )
            problems.append(Problem(layer, message))
    return problems
