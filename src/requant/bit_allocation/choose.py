"""Bits and group size layer by layer, with the least quantization error within a size.

``--budget``.

Unlike every other option this one reads data before there is a plan: each layer is encoded with
each candidate, and the errors are kept. ``allocation`` then chooses, and the choice is a recipe:
what a plan, a record and ``verify`` see is a table of layers, which nobody measures again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from hashlib import sha256
from itertools import product
from math import prod
from pathlib import Path

from requant.bit_allocation.knapsack import Allocation, Option, allocate
from requant.bit_allocation.measurements import Candidate, Measured
from requant.checkpoints.checkpoint import Checkpoint
from requant.core.reasons import ReasonCode
from requant.errors import CheckpointError, Problem, UsageError
from requant.execution.executor import Progress, run_plan
from requant.execution.layer_stats import LayerStats
from requant.execution.resources import plan_resources
from requant.execution.sink import NullSink
from requant.output.record import version
from requant.planning.plan import LayerPlan, Plan, Step, Treatment
from requant.planning.planner import make_plan, plan_with_source
from requant.quantization.config import Quantization
from requant.quantization.options import ConvertOptions
from requant.quantization.recipes import Recipe, Rule
from requant.quantization.roles import ROLES, block_positions
from requant.quantization.size_budget import parse_budget
from requant.quantization.specs import format_spec
from requant.sources.open import as_checkpoint

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
_FORMAT = 1  # of the file that keeps measurements


def allocate_bits(
    source: Path | Checkpoint,
    options: ConvertOptions,
    *,
    check: Callable[[Plan], None] | None = None,
    keep: Path | None = None,
    threads: int | None = None,
    max_memory: int | None = None,
    allow_nonfinite: bool = False,
    progress: Callable[[Progress], None] | None = None,
    chunk_bytes: int | None = None,
) -> ConvertOptions:
    """Turn the budget of ``options`` into a recipe that holds one quantization a layer.

    Args:
        source: Folder, or what was read of it.
        options: Returned as they are where they hold no budget.
        check: Called with a plan of the source before anything is measured; raises what forbids
            to continue.
        keep: File for what was measured: read if it is of this source and these options, else
            written.
        threads: Worker threads; every processor by default.
        max_memory: Most bytes to hold in memory.
        allow_nonfinite: Leave a layer with NaN or infinity as it is instead of stopping.
        progress: Called about ten times a second with a ``Progress``.
        chunk_bytes: Bytes of one worker's chunk.

    Raises:
        CheckpointError: Everything that is wrong with the source.
        UsageError: Not even the smallest candidates fit.
    """
    if options.budget is None or options.recipe is not None:
        return options
    checkpoint = as_checkpoint(source, options.config_from)
    base, plan_source = plan_with_source(checkpoint, _without_budget(options), is_trial=True)
    if check is not None:
        check(base)
    key = _key(base, options)
    measured = None if keep is None else Measured.load(keep, key)
    while measured is None:
        trial = _TrialRun(base, plan_source.checkpoint, options)
        run = plan_resources(trial.plan, threads, max_memory, chunk_bytes)
        found = run_plan(trial.plan, plan_source, NullSink(), run, progress).findings
        problems = trial.problems(found)
        if not problems:
            measured = trial.collect(found)
            if keep is not None and not options.nonfinite_layers:
                measured.save(keep, key)
        elif not allow_nonfinite:
            raise CheckpointError(base.source, list(problems.values()))
        else:
            options = replace(options, nonfinite_layers=options.nonfinite_layers.union(problems))
            trial_options = _without_budget(options)
            base, plan_source = plan_with_source(
                plan_source.checkpoint, trial_options, is_trial=True
            )
    default = _without_budget(options).quantization
    return replace(options, quantization=default, recipe=_recipe(measured, options, default))


def _without_budget(options: ConvertOptions) -> ConvertOptions:
    """The options without the budget: what can be planned before anything is measured."""
    default = options.quantization or Quantization.affine(64, 4)
    return replace(options, budget=None, quantization=default)


# -- measuring -------------------------------------------------------------------------------


class _TrialRun:
    """Every candidate of every layer as the steps of one plan, which is run for its errors.

    Attributes:
        plan: Those steps, one layer after the other.
        tried: Layer -> spec -> bytes.
        named: Name of a step -> layer and spec.
    """

    def __init__(self, base: Plan, checkpoint: Checkpoint, options: ConvertOptions) -> None:
        self.base = base
        self.tried: dict[str, dict[str, int]] = {x.layer: {} for x in base.layers}
        self.named: dict[str, tuple[str, str]] = {}
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
        """The layers that hold what no code represents."""
        reported = {self.named[name][0]: x for name, x in found.items() if x.is_not_a_number}
        return {layer: x.nonfinite_problem(layer) for layer, x in reported.items()}

    def collect(self, found: Mapping[str, LayerStats]) -> Measured:
        """Put the errors to the candidates."""
        errors: dict[str, dict[str, LayerStats]] = {layer: {} for layer in self.tried}
        for name, finding in found.items():
            layer, spec = self.named[name]
            errors[layer][spec] = finding
        layers: dict[str, tuple[Candidate, ...]] = {}
        for layer, specs in self.tried.items():
            known = errors[layer]
            energy = _round_significant(
                max((x.squared_values for x in known.values()), default=0.0)
            )
            if len(specs) > 1:
                layers[layer] = tuple(
                    Candidate(
                        spec,
                        nbytes,
                        _round_significant(known[spec].squared_error) if spec in known else 0.0,
                        energy,
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
        """What a recipe must say of a layer that the options determine; "" for nothing."""
        if layer.layer in free or not layer.is_weight or len(layer.shape) < 2:
            return ""
        is_excluded = layer.reason is not None and layer.reason.code in _EXCLUDED
        return _spec_of(self.base, layer) or ("skip" if is_excluded else "")


def _candidate_plans(base: Plan, checkpoint: Checkpoint, options: ConvertOptions) -> Iterator[Plan]:
    """A plan for each candidate of every layer; codes that stay have no error."""
    if any(x.treatment not in (Treatment.DENSE, Treatment.QUANTIZED) for x in base.layers):
        with suppress(UsageError):  # not all of this source's codes can stay
            yield make_plan(checkpoint, _with_uniform_target(options, None))
    groups = GROUP_SIZES if options.quantization is None else (options.quantization.group_size,)
    for group_size, bits in product(groups, BITS):
        candidate = _with_uniform_target(options, Quantization.affine(group_size, bits))
        yield make_plan(checkpoint, candidate, is_trial=True)


def _with_uniform_target(options: ConvertOptions, target: Quantization | None) -> ConvertOptions:
    """The options with one candidate for all; what ``config_from`` names has been read."""
    return replace(options, budget=None, quantization=target, config_from=None)


def _spec_of(plan: Plan, layer: LayerPlan) -> str:
    """A layer's quantization as an override spells it; "" for a dense one."""
    if plan.quantization is None or layer.treatment in (Treatment.DENSE, Treatment.DEQUANTIZED):
        return ""
    target = plan.quantization.quantization_for(layer.layer)
    return "" if target is None else format_spec(target)


def _round_significant(figure: float) -> float:
    """Six digits: the last ones of a sum depend on how rows were cut into chunks."""
    return float(f"{figure:.6g}")


_EXPERT = re.compile(r"(?<=\.experts\.)\d+(?=\.)")
# Layers that the options exclude: a recipe must skip them too.
_EXCLUDED = (
    ReasonCode.SKIPPED_BY_OVERRIDE,
    ReasonCode.SKIPPED_BY_RECIPE,
    ReasonCode.NOT_IN_ONLY,
)


def _tied_layer_groups(layers: Iterable[str]) -> tuple[tuple[str, ...], ...]:
    """Layers that must agree: the experts of one stack. A tied head is not a layer of its own."""
    runs: dict[str, list[str]] = {}
    for layer in layers:
        runs.setdefault(_EXPERT.sub("*", layer), []).append(layer)
    return tuple(tuple(run) for run in runs.values())


def _key(base: Plan, options: ConvertOptions) -> str:
    """A hash of all that decides a measurement; not of the budget."""
    reported = options.to_dict() | {"budget": None}
    data = [_FORMAT, version(), BITS, GROUP_SIZES, reported, [asdict(file) for file in base.files]]
    return sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()


# -- choosing --------------------------------------------------------------------------------


def _recipe(
    measured: Measured, convert_options: ConvertOptions, default: Quantization | None
) -> Recipe:
    """The best choice within the budget, as a recipe.

    Raises:
        UsageError: Nothing fits.
    """
    assert convert_options.budget is not None
    budget = parse_budget(convert_options.budget)
    limit = budget.limit(measured.parameters)
    remains = block_positions(measured.layers)
    weights = {layer: sensitivity(layer, remains.get(layer)) for layer in measured.layers}
    runs, options = [], []
    for run in measured.tied_groups:
        for layers, ways in _common_candidates(measured, run, weights):
            runs.append((layers, [spec for spec, _ in ways]))
            options.append([option for _, option in ways])
    answer = allocate(options, limit - measured.fixed_bytes)
    if answer is None:
        raise UsageError(_infeasible_message(budget.text, budget.is_size, measured, options))
    specs = dict(measured.fixed)
    for (layers, spelled), index in zip(runs, answer.chosen, strict=True):
        specs |= dict.fromkeys(layers, spelled[index])
    by_spec: dict[str, list[str]] = {}
    for layer in sorted(specs):
        by_spec.setdefault(specs[layer], []).append(layer)
    return Recipe(
        f"budget-{budget.text}",
        _describe_allocation(budget.text, budget.is_size, measured, answer, convert_options.search),
        default,
        tuple(Rule(spec, layers=tuple(by_spec[spec])) for spec in sorted(by_spec)),
        is_builtin=False,
        search="" if convert_options.search == "off" else convert_options.search,
    )


_CandidateOption = tuple[str, Option]


def _common_candidates(
    measured: Measured, run: Sequence[str], weights: Mapping[str, float]
) -> list[tuple[tuple[str, ...], list[_CandidateOption]]]:
    """The candidates that all layers of a run have, summed over them.

    Layers without a common one cannot agree: each is then chosen for itself.
    """
    found = {layer: {x.spec: x for x in measured.layers[layer]} for layer in run}
    common = [spec for spec in found[run[0]] if all(spec in other for other in found.values())]
    if not common:
        return [pair for layer in run for pair in _common_candidates(measured, (layer,), weights)]
    ways = []
    for spec in common:
        members = [(layer, found[layer][spec]) for layer in run]
        nbytes = sum(x.nbytes for _, x in members)
        costs = (cost(x, measured.sizes[layer], weights[layer]) for layer, x in members)
        ways.append((spec, Option(nbytes, sum(costs))))
    return [(tuple(run), ways)]


# What a relative error of a layer costs a model next to one of the same size elsewhere: measured
# on one model (benchmarks/quality.md), rounded; the first that fits. Any other layer counts 1.
_SENSITIVITY = (
    ("v_proj", 6.0),
    ("q_proj", 1 / 3),
    ("k_proj", 1.5),
    ("o_proj", 1.5),
    ("up_proj", 0.5),
    ("embedding", 1.5),
    ("head", 1.5),
)
_FIRST_BLOCK = 3.0


def sensitivity(layer: str, place: tuple[int, int] | None) -> float:
    """How much a relative error counts in a layer.

    Args:
        layer: Its path.
        place: Index of its block, and how many its stack has; None outside of blocks.
    """
    kind = next((x for role, x in _SENSITIVITY if re.search(ROLES[role], layer)), 1.0)
    return kind * (_FIRST_BLOCK if place is not None and place[0] == 0 else 1.0)


def cost(candidate: Candidate, size: int, weight: float) -> float:
    """What a candidate is held to cost a model.

    Args:
        candidate: With its error.
        size: Weights of the layer.
        weight: As ``sensitivity`` gives it.
    """
    return weight * size * candidate.error / candidate.energy if candidate.energy else 0.0


def _describe_allocation(
    text: str, is_size: bool, measured: Measured, answer: Allocation, search: str
) -> str:
    """What was chosen, in a sentence."""
    total = answer.nbytes + measured.fixed_bytes
    bits = 8 * total / max(measured.parameters, 1)
    above = 100 * (answer.cost / answer.bound - 1) if answer.bound > 0 else 0.0
    how = "the least" if answer.exact else f"at most {above:.2g} % above the least"
    weights = max(sum(measured.sizes.values()), 1)
    return (
        f"Chosen within {text}{'' if is_size else ' bits per weight'}: {bits:.4f} bits per weight, "
        f"{total:,} bytes; weighted relative squared error {answer.cost / weights:.4g}, {how} "
        f"that its candidates allow (bound {answer.bound / weights:.4g}; search {search})."
    )


def _infeasible_message(
    text: str, is_size: bool, measured: Measured, options: Sequence[Sequence[Option]]
) -> str:
    """The least that is possible, and what to type next."""
    least = measured.fixed_bytes + sum(min(x.nbytes for x in ways) for ways in options)
    bits = -(-8 * least * 1000 // measured.parameters) / 1000
    more = "; --override and --only hold some layers larger" if measured.fixed else ""
    next_one = f"{least}B" if is_size else f"{bits:.3f}"
    return (
        f"--budget {text} cannot be met: the least possible is {least:,} bytes, "
        f"{bits:.3f} bits per weight{more}. Type --budget {next_one}"
    )
