"""``--budget``: the bits and group size of each layer with the least error within a size.

Unlike every other option this one reads weights before there is a plan: ``measure`` encodes each
layer with each candidate, and ``knapsack`` selects among them. The result is a recipe, so that a
plan, a record and ``verify`` hold a table of layers, which is not measured again.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from hashlib import sha256
from itertools import pairwise
from pathlib import Path

from requant.bit_allocation.knapsack import Allocation, Option, allocate
from requant.bit_allocation.measure import (
    DEFAULT_TARGET,
    GROUP_SIZES,
    measure,
    without_budget,
)
from requant.bit_allocation.measurements import Candidate, Measured, MeasuredErrors
from requant.checkpoints.checkpoint import Checkpoint
from requant.core.regex import regex_time_budget, search
from requant.errors import UsageError
from requant.output.record import version
from requant.planning.layout_selection import vision_part
from requant.planning.plan import Plan
from requant.planning.planner import lay_out, plan_laid_out
from requant.quantization.config import Quantization
from requant.quantization.options import ConvertOptions, RunOptions
from requant.quantization.recipes import Recipe, Rule
from requant.quantization.roles import ROLES, block_positions
from requant.quantization.size_budget import BUDGET_BITS, SizeBudget, parse_budget
from requant.quantization.specs import parse_spec
from requant.sources.open import as_checkpoint

_FORMAT = 2  # of the file that keeps measurements


def allocate_bits(
    source: Path | Checkpoint,
    options: ConvertOptions,
    run: RunOptions,
    check: Callable[[Plan], None] | None = None,
    keep: Path | None = None,
    *,
    parts: Path | None = None,
    spread: Callable[..., None] | None = None,
) -> ConvertOptions:
    """Turn the budget of ``options`` into a recipe that holds one quantization a layer.

    Args:
        source: Folder, or what was read of it.
        options: Returned as they are where they hold no budget.
        run: Threads, memory, progress, the part that is measured, and whether layers may hold NaN
            or infinity.
        check: Called with a plan of the source before anything is measured; may raise.
        keep: File of measurements: those of this source and these options are read, others added.
        parts: Folder of the measurements of parts, which are read too.
        spread: Has other processes measure; called with a ``TrialRun``, what is measured already,
            and the ``key`` of files of measurements.

    Raises:
        CheckpointError: Everything that is wrong with the source.
        UsageError: Not even the smallest candidates fit.
        PartlyMeasuredError: ``run.part`` is measured, the layers of other parts are not.
    """
    if options.budget is None or options.recipe is not None:
        return options
    budget = parse_budget(options.budget)
    checkpoint = as_checkpoint(source, options.config_from, mmproj=vision_part(options))
    laid_out = lay_out(checkpoint, without_budget(options))
    planned = plan_laid_out(laid_out, without_budget(options), is_trial=True)
    if check is not None:
        check(planned.plan)
    key = _key(planned.plan, options)
    kept = MeasuredErrors(keep, key, parts)
    elsewhere = None if spread is None else partial(spread, key=key)
    measured, options = measure(laid_out, planned, options, run, kept, spread=elsewhere)
    default = options.quantization or DEFAULT_TARGET
    recipe = _recipe(measured, budget, options, default)
    return replace(options, quantization=default, recipe=recipe)


def _key(base: Plan, options: ConvertOptions) -> str:
    """A hash of everything that measurements depend on; budget and protection are not among it."""
    asked = options.to_dict() | {"budget": None, "protect": []}
    data = [
        _FORMAT,
        version(),
        BUDGET_BITS,
        GROUP_SIZES,
        asked,
        [asdict(file) for file in base.files],
    ]
    return sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()


def _recipe(
    measured: Measured, budget: SizeBudget, options: ConvertOptions, default: Quantization
) -> Recipe:
    """The choice with the least cost within the budget, as a recipe."""
    limit = budget.limit(measured.parameters)
    measured = _with_least_bits(measured, _protected(measured.layers, options.protect))
    measured = _with_least_bits(measured, _floors(measured, limit))
    positions = block_positions(measured.layers)
    weights = {layer: sensitivity(layer, positions.get(layer)) for layer in measured.layers}
    runs, ways_of_runs = [], []
    for run in measured.tied_groups:
        for layers, ways in _common_candidates(measured, run, weights):
            runs.append((layers, [spec for spec, _ in ways]))
            ways_of_runs.append([option for _, option in ways])
    answer = allocate(ways_of_runs, limit - measured.fixed_bytes)
    if answer is None:
        held = ["--protect"] if options.protect else []
        held += ["--override and --only"] if measured.fixed else []
        raise UsageError(_infeasible_message(budget, measured, ways_of_runs, held))
    specs = dict(measured.fixed)
    for (layers, spelled), index in zip(runs, answer.chosen, strict=True):
        specs |= dict.fromkeys(layers, spelled[index])
    by_spec = defaultdict[str, list[str]](list)
    for layer in sorted(specs):
        by_spec[specs[layer]].append(layer)
    return Recipe(
        f"budget-{budget.text}",
        _describe_allocation(budget, measured, answer, options.search),
        default,
        tuple(Rule(spec, layers=tuple(layers)) for spec, layers in sorted(by_spec.items())),
        is_builtin=False,
        search="" if options.search == "off" else options.search,
    )


def _common_candidates(
    measured: Measured, run: Sequence[str], weights: Mapping[str, float]
) -> list[tuple[tuple[str, ...], list[tuple[str, Option]]]]:
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


@regex_time_budget()
def _protected(layers: Iterable[str], protections: Iterable[tuple[str, int]]) -> dict[str, int]:
    """The least bits of the layers that patterns match."""
    found: dict[str, int] = {}
    for pattern, bits in protections:
        for layer in layers:
            if search(pattern, layer):
                found[layer] = max(bits, found.get(layer, 0))
    return found


def _with_least_bits(measured: Measured, least: Mapping[str, int]) -> Measured:
    """The measurements without candidates of fewer bits; codes that stay have no error."""
    layers = {
        layer: tuple(x for x in candidates if not x.error or _bits(x.spec) >= least.get(layer, 0))
        for layer, candidates in measured.layers.items()
    }
    return replace(measured, layers=layers)


def _floors(measured: Measured, limit: int) -> dict[str, int]:
    """The least bits of each layer: one width below what all layers could have within the limit.

    Example: 3 bits for all would fit, 4 bits would not. No layer then has less than 2 bits.
    """
    floor = 0
    for below, bits in pairwise((0, *BUDGET_BITS)):
        layers = _with_least_bits(measured, dict.fromkeys(measured.layers, bits)).layers
        least = sum(min(x.nbytes for x in candidates) for candidates in layers.values())
        if measured.fixed_bytes + least <= limit:
            floor = below
    return dict.fromkeys(measured.layers, floor)


def _bits(spec: str) -> int:
    """Bits of a candidate."""
    found = parse_spec(spec)
    assert isinstance(found, Quantization)
    return found.bits


# What a relative error of a weight costs a model next to one in a down_proj: the divergence with
# one kind of layer at 3 bits over relative error times weights, in three models, rounded
# (benchmarks/quality.md). The first that fits; any other layer counts 1.
_SENSITIVITY = (
    ("v_proj", 4.5),
    ("q_proj", 0.5),
    ("k_proj", 1.5),
    ("o_proj", 1.25),
    ("gate_proj", 0.7),
    ("up_proj", 0.7),
    ("embedding", 1.5),
    ("head", 1.5),
)
_FIRST_BLOCK = 2.0
# Large errors cost more than in proportion: with some layers at 2 bits, where errors are 0.1 to
# 0.2, a model was worse than with 3 bits throughout (benchmarks/quality.md). 0.1 counts double.
_GROWTH = 10.0


def sensitivity(layer: str, place: tuple[int, int] | None) -> float:
    """How much a relative error counts in a layer; ``place`` is one of ``block_positions``."""
    kind = next((x for role, x in _SENSITIVITY if re.search(ROLES[role], layer)), 1.0)
    return kind * (_FIRST_BLOCK if place is not None and place[0] == 0 else 1.0)


def cost(candidate: Candidate, size: int, weight: float) -> float:
    """The estimated cost of a candidate, from its relative error, size and sensitivity."""
    if not candidate.energy:
        return 0.0
    error = candidate.error / candidate.energy
    return weight * size * error * (1 + _GROWTH * error)


def _describe_allocation(
    budget: SizeBudget, measured: Measured, answer: Allocation, search: str
) -> str:
    """The choice in a sentence."""
    total = answer.nbytes + measured.fixed_bytes
    bits = 8 * total / max(measured.parameters, 1)
    above = 100 * (answer.cost / answer.bound - 1) if answer.bound > 0 else 0.0
    how = "the least" if answer.exact else f"at most {above:.2g} % above the least"
    weights = max(sum(measured.sizes.values()), 1)
    limit = budget.text if budget.is_size else f"{budget.text} bits per weight"
    return (
        f"Chosen within {limit}: {bits:.4f} bits per weight, {total:,} bytes; "
        f"estimated cost a weight {answer.cost / weights:.4g}, {how} "
        f"that its candidates allow (bound {answer.bound / weights:.4g}; search {search})."
    )


def _infeasible_message(
    budget: SizeBudget,
    measured: Measured,
    ways_of_runs: Sequence[Sequence[Option]],
    held: Sequence[str],
) -> str:
    """The smallest possible size, and the budget to type instead; ``held`` are options."""
    least = measured.fixed_bytes + sum(min(x.nbytes for x in ways) for ways in ways_of_runs)
    bits = -(-8 * least * 1000 // measured.parameters) / 1000
    more = f"; {' and '.join(held)} may hold some layers larger" if held else ""
    next_one = f"{least}B" if budget.is_size else f"{bits:.3f}"
    return (
        f"--budget {budget.text} cannot be met: the least possible is {least:,} bytes, "
        f"{bits:.3f} bits per weight{more}. Type --budget {next_one}"
    )
