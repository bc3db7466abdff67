"""Measuring for ``--budget``: the error of each layer with each candidate quantization."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from itertools import chain

from requant.bit_allocation.measurements import (
    Candidate,
    Errors,
    Measured,
    MeasuredErrors,
    PartlyMeasuredError,
)
from requant.core.reasons import ReasonCode
from requant.errors import CheckpointError, Problem, UsageError
from requant.execution.candidate_errors import CandidateErrors, Trial, trials_of
from requant.execution.executor import run_plan
from requant.execution.resources import plan_resources
from requant.planning.layout_selection import with_target
from requant.planning.parts import indices_of_part
from requant.planning.plan import LayerPlan, Plan, Step, Treatment
from requant.planning.plan_source import PlanSource
from requant.planning.planner import (
    LaidOut,
    LayerTrial,
    Planned,
    lay_out,
    plan_laid_out,
    try_layers,
)
from requant.planning.step_cost import step_cost
from requant.quantization.config import Quantization
from requant.quantization.options import ConvertOptions, RunOptions
from requant.quantization.part import Part
from requant.quantization.size_budget import BUDGET_BITS
from requant.quantization.specs import format_spec

GROUP_SIZES = (32, 64, 128)
DEFAULT_TARGET = Quantization.affine(64, 4)  # of what no candidate is chosen for

_EXPERT = re.compile(r"(?<=\.experts\.)\d+(?=\.)")
# Layers that the options exclude: a recipe must skip them too.
_EXCLUDED = (ReasonCode.SKIPPED_BY_OVERRIDE, ReasonCode.SKIPPED_BY_RECIPE, ReasonCode.NOT_IN_ONLY)


def measure(
    laid_out: LaidOut,
    planned: Planned,
    options: ConvertOptions,
    run: RunOptions,
    kept: MeasuredErrors,
    spread: Callable[[TrialRun, MeasuredErrors], None] | None = None,
) -> tuple[Measured, ConvertOptions]:
    """Encode each layer of a source with each candidate, in one pass over the source.

    Args:
        laid_out: The source, laid out for the options without the budget.
        planned: Its plan without the budget.
        options: With the budget.
        run: Threads, memory, progress, the part that is to be measured, and whether layers may
            hold NaN or infinity.
        kept: The errors of an earlier run, which are not measured again; new ones are added.
        spread: Has other processes measure, instead of this one; ``kept`` reads their files.

    Returns:
        The measurements, and the options with the layers that are left as they are.

    Raises:
        CheckpointError: A layer holds NaN or infinity.
        PartlyMeasuredError: The part is measured, the layers of other parts are not.
    """
    while True:
        trial = TrialRun(laid_out, planned, options)
        if spread is None:
            problems = trial.run(run, kept)
        else:
            spread(trial, kept)
            problems = {}
        if run.part is not None and not problems:
            kept.make_durable()
        kept.read_parts()
        if not problems:
            if unmeasured := len(trial.unmeasured(kept)):
                raise PartlyMeasuredError(planned.plan, unmeasured)
            return trial.collect(kept.layers), options
        if not run.allow_nonfinite:
            raise CheckpointError(planned.plan.source, list(problems.values()))
        options = replace(options, nonfinite_layers=options.nonfinite_layers.union(problems))
        planned = plan_laid_out(laid_out, without_budget(options), is_trial=True)


def without_budget(options: ConvertOptions) -> ConvertOptions:
    """The options that can be planned before anything is measured."""
    return replace(options, budget=None, quantization=options.quantization or DEFAULT_TARGET)


class TrialRun:
    """The candidates of every layer, and the run that measures their errors."""

    def __init__(self, laid_out: LaidOut, planned: Planned, options: ConvertOptions) -> None:
        self.base, self.source = planned
        # Layer -> spec of a candidate -> bytes.
        self.tried: dict[str, dict[str, int]] = {x.layer: {} for x in self.base.layers}
        # Layer -> spec of a candidate -> the steps that encode it; none where codes stay.
        self.steps: dict[str, dict[str, list[Step]]] = defaultdict(dict)
        for layers in _candidates(laid_out, self.base, options):
            for layer, target, steps in layers:
                spec = "" if target is None else format_spec(target)
                if not spec or spec in self.tried[layer.layer]:
                    continue
                self.tried[layer.layer][spec] = layer.nbytes
                encoding = [step for step in steps if step.encode is not None]
                if encoding:
                    self.steps[layer.layer][spec] = encoding

    def run(self, run: RunOptions, kept: MeasuredErrors) -> dict[str, Problem]:
        """Measure the layers that were not, of a part if one is given.

        Returns:
            A problem for each layer with NaN or infinity.
        """
        chosen = set(self.tried if run.part is None else self.layers_of_part(run.part))
        layers = [layer for layer in self.unmeasured(kept) if layer in chosen]
        return run_trials(self.base, self.source, self.trials(layers), run, kept)

    def unmeasured(self, kept: MeasuredErrors) -> list[str]:
        """The layers that have several candidates, and not yet the error of each."""
        return [
            layer
            for layer, specs in self.tried.items()
            if len(specs) > 1 and not kept.layers.get(layer, {}).keys() >= self.steps[layer].keys()
        ]

    def layers_of_part(self, part: Part) -> list[str]:
        """The layers that a part measures; it does not depend on what is measured already."""
        layers = list(self._costs)
        return [layers[index] for index in indices_of_part(list(self._costs.values()), part)]

    @cached_property
    def _costs(self) -> dict[str, float]:
        """What measuring costs, of each layer that has several candidates."""
        return {
            layer: sum(map(step_cost, chain(*self.steps[layer].values())))
            for layer, specs in self.tried.items()
            if len(specs) > 1
        }

    def trials(self, layers: Iterable[str]) -> list[Trial]:
        """The trials of some layers."""
        return [trial for layer in layers for trial in trials_of(layer, self.steps[layer])]

    def collect(self, errors: Mapping[str, Errors]) -> Measured:
        """The candidates with their errors."""
        layers: dict[str, tuple[Candidate, ...]] = {}
        for layer, specs in self.tried.items():
            if len(specs) < 2:
                continue
            found = {spec: errors[layer][spec] for spec in self.steps[layer]}
            layers[layer] = tuple(
                Candidate(spec, nbytes, *map(_six_digits, found.get(spec, (0.0, 0.0))))
                for spec, nbytes in specs.items()
            )
        free = [x for x in self.base.layers if x.layer in layers]
        return Measured(
            parameters=self.base.parameters,
            fixed_bytes=self.base.bytes_out - sum(x.nbytes for x in free),
            fixed={x.layer: spec for x in self.base.layers if (spec := self._fixed(x, layers))},
            layers=layers,
            tied_groups=_tied_layer_groups(layers),
        )

    def _fixed(self, layer: LayerPlan, free: Mapping[str, object]) -> str:
        """The spec in the recipe of a layer that the options determine; "" for none."""
        if layer.layer in free or not layer.is_weight or len(layer.shape) < 2:
            return ""
        is_excluded = layer.reason is not None and layer.reason.code in _EXCLUDED
        return _spec_of(self.base, layer) or ("skip" if is_excluded else "")


def run_trials(
    base: Plan,
    source: PlanSource,
    trials: Sequence[Trial],
    run: RunOptions,
    kept: MeasuredErrors,
) -> dict[str, Problem]:
    """Run trials, and add the errors to ``kept``; ``base`` is the plan without the budget.

    Returns:
        A problem for each layer with NaN or infinity.
    """
    if not trials:
        return {}
    steps = tuple(trial.dense_step(number) for number, trial in enumerate(trials))
    plan = replace(base, steps=steps)
    sink = CandidateErrors(trials, kept.add)
    limits = plan_resources(plan, run.threads, run.max_memory, run.chunk_bytes)
    try:
        found = run_plan(
            plan, source, sink, limits, run.progress, take_powers=sink.take_powers
        ).findings
    finally:
        kept.save()
    stats = {layer: x for layer, x in found.items() if x.is_not_a_number}
    stats = sink.nonfinite | stats  # stored scales say more than the values behind them
    return {layer: x.nonfinite_problem(layer) for layer, x in stats.items()}


def _candidates(
    laid_out: LaidOut, base: Plan, options: ConvertOptions
) -> Iterator[list[LayerTrial]]:
    """The layers under each candidate, applied to all of them; codes that stay have no error."""
    made_for = without_budget(options).quantization
    assert made_for is not None
    if any(x.treatment not in (Treatment.DENSE, Treatment.QUANTIZED) for x in base.layers):
        with suppress(UsageError):  # not all of this source's codes can stay
            yield try_layers(laid_out, _with_uniform_target(options, None))
    groups = GROUP_SIZES if options.quantization is None else (options.quantization.group_size,)
    for group_size in groups:
        first, layout = made_for, laid_out
        for bits in BUDGET_BITS:
            target = Quantization.affine(group_size, bits)
            candidate = _with_uniform_target(options, target)
            same = with_target(layout.chosen, first, target)
            if same is None:  # once for this group size
                first, layout = target, lay_out(laid_out.checkpoint, candidate)
                same = layout.chosen
            yield try_layers(layout._replace(chosen=same), candidate)


def _with_uniform_target(options: ConvertOptions, target: Quantization | None) -> ConvertOptions:
    """The options with one candidate for all layers; ``config_from`` has been read."""
    return replace(options, budget=None, quantization=target, config_from=None)


def _spec_of(plan: Plan, layer: LayerPlan) -> str:
    """A layer's quantization as an override spells it; "" for a dense one."""
    if plan.quantization is None or layer.treatment in (Treatment.DENSE, Treatment.DEQUANTIZED):
        return ""
    target = plan.quantization.quantization_for(layer.layer)
    return "" if target is None else format_spec(target)


def _six_digits(figure: float) -> float:
    """Round to six digits: the last ones of a sum depend on how rows were cut into chunks."""
    return float(f"{figure:.6g}")


def _tied_layer_groups(layers: Iterable[str]) -> tuple[tuple[str, ...], ...]:
    """Layers that must agree: the experts of one stack. A tied head is not a layer of its own."""
    runs = defaultdict[str, list[str]](list)
    for layer in layers:
        runs[_EXPERT.sub("*", layer)].append(layer)
    return tuple(tuple(run) for run in runs.values())
