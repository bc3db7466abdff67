"""Measuring for ``--budget``: the error of each layer with each candidate quantization."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from itertools import product
from math import prod

from requant.bit_allocation.measurements import Candidate, Measured
from requant.checkpoints.checkpoint import Checkpoint
from requant.core.reasons import ReasonCode
from requant.errors import CheckpointError, Problem, UsageError
from requant.execution.executor import run_plan
from requant.execution.layer_stats import LayerStats
from requant.execution.resources import plan_resources
from requant.execution.sink import NullSink
from requant.planning.plan import LayerPlan, Plan, Step, Treatment
from requant.planning.planner import Planned, make_plan, plan_with_source
from requant.quantization.config import Quantization
from requant.quantization.options import ConvertOptions, RunOptions
from requant.quantization.specs import format_spec

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
DEFAULT_TARGET = Quantization.affine(64, 4)  # of what no candidate is chosen for

_EXPERT = re.compile(r"(?<=\.experts\.)\d+(?=\.)")
# Layers that the options exclude: a recipe must skip them too.
_EXCLUDED = (ReasonCode.SKIPPED_BY_OVERRIDE, ReasonCode.SKIPPED_BY_RECIPE, ReasonCode.NOT_IN_ONLY)


def measure(
    planned: Planned,
    options: ConvertOptions,
    run: RunOptions,
) -> tuple[Measured, ConvertOptions]:
    """Encode each layer of a source with each candidate; ``planned`` is without the budget.

    Returns:
        The measurements, and the options with the layers that are left as they are.

    Raises:
        CheckpointError: A layer holds NaN or infinity.
    """
    while True:
        base, plan_source = planned
        trial = _TrialRun(base, plan_source.checkpoint, options)
        limits = plan_resources(trial.plan, run.threads, run.max_memory, run.chunk_bytes)
        found = run_plan(trial.plan, plan_source, NullSink(), limits, run.progress).findings
        problems = trial.problems(found)
        if not problems:
            return trial.collect(found), options
        if not run.allow_nonfinite:
            raise CheckpointError(base.source, list(problems.values()))
        options = replace(options, nonfinite_layers=options.nonfinite_layers.union(problems))
        planned = plan_with_source(plan_source.checkpoint, without_budget(options), is_trial=True)


def without_budget(options: ConvertOptions) -> ConvertOptions:
    """The options that can be planned before anything is measured."""
    return replace(options, budget=None, quantization=options.quantization or DEFAULT_TARGET)


class _TrialRun:
    """A plan that encodes every layer with every candidate, to be run for the errors."""

    def __init__(self, base: Plan, checkpoint: Checkpoint, options: ConvertOptions) -> None:
        self.base = base
        # Layer -> spec of a candidate -> bytes.
        self.tried: dict[str, dict[str, int]] = {x.layer: {} for x in base.layers}
        self.named: dict[str, tuple[str, str]] = {}  # name of a step -> layer and spec
        steps: dict[str, list[Step]] = {layer: [] for layer in self.tried}
        for plan in _candidate_plans(base, checkpoint, options):
            new = {}
            for layer in plan.layers:
                spec = _spec_of(plan, layer)
                if spec and spec not in self.tried[layer.layer]:
                    new[layer.layer] = spec
                    self.tried[layer.layer][spec] = layer.nbytes
            for step in plan.steps:
                if step.layer in new and step.encode is not None:
                    name = f"{step.layer} as {new[step.layer]}"
                    self.named[name] = step.layer, new[step.layer]
                    encode = replace(step.encode, gptq=False, weighted_error=True)
                    trial = replace(step, layer=name, encode=encode)
                    steps[step.layer].append(trial)
        free = [layer for layer, specs in self.tried.items() if len(specs) > 1]
        self.plan = replace(base, steps=tuple(step for layer in free for step in steps[layer]))

    def problems(self, found: Mapping[str, LayerStats]) -> dict[str, Problem]:
        """A problem for each layer that holds NaN or infinity."""
        stats = {self.named[name][0]: x for name, x in found.items() if x.is_not_a_number}
        return {layer: x.nonfinite_problem(layer) for layer, x in stats.items()}

    def collect(self, found: Mapping[str, LayerStats]) -> Measured:
        """The candidates with their errors."""
        errors: dict[str, dict[str, LayerStats]] = {layer: {} for layer in self.tried}
        for name, stats in found.items():
            layer, spec = self.named[name]
            errors[layer][spec] = stats
        layers: dict[str, tuple[Candidate, ...]] = {}
        for layer, specs in self.tried.items():
            squares = {spec: x.squared_error for spec, x in errors[layer].items()}
            energy = max((x.squared_values for x in errors[layer].values()), default=0.0)
            if len(specs) > 1:
                layers[layer] = tuple(
                    Candidate(
                        spec, nbytes, _six_digits(squares.get(spec, 0.0)), _six_digits(energy)
                    )
                    for spec, nbytes in specs.items()
                )
        free = [x for x in self.base.layers if x.layer in layers]
        return Measured(
            parameters=self.base.parameters,
            fixed_bytes=self.base.bytes_out - sum(x.nbytes for x in free),
            fixed={x.layer: spec for x in self.base.layers if (spec := self._fixed(x, layers))},
            layers=layers,
            sizes={x.layer: prod(x.shape) for x in free},
            tied_groups=_tied_layer_groups(layers),
        )

    def _fixed(self, layer: LayerPlan, free: Mapping[str, object]) -> str:
        """The spec in the recipe of a layer that the options determine; "" for none."""
        if layer.layer in free or not layer.is_weight or len(layer.shape) < 2:
            return ""
        is_excluded = layer.reason is not None and layer.reason.code in _EXCLUDED
        return _spec_of(self.base, layer) or ("skip" if is_excluded else "")


def _candidate_plans(base: Plan, checkpoint: Checkpoint, options: ConvertOptions) -> Iterator[Plan]:
    """A plan for each candidate, applied to all layers; codes that stay have no error."""
    if any(x.treatment not in (Treatment.DENSE, Treatment.QUANTIZED) for x in base.layers):
        with suppress(UsageError):  # not all of this source's codes can stay
            yield make_plan(checkpoint, _with_uniform_target(options, None))
    groups = GROUP_SIZES if options.quantization is None else (options.quantization.group_size,)
    for group_size, bits in product(groups, BITS):
        candidate = _with_uniform_target(options, Quantization.affine(group_size, bits))
        yield make_plan(checkpoint, candidate, is_trial=True)


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
