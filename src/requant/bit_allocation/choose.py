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

_FORMAT = 3  # of the file that keeps measurements


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
    weights = sensitivities(measured.tied_groups)
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
        costs = (cost(x, weights[layer]) for layer, x in members)
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


# What a relative error of a layer costs a model next to one of a gate_proj: the divergence with one
# kind of layer at 3 bits over the sum of its relative errors, in two small models, to the power of
# 0.7, because other models are more alike in their layers (benchmarks/quality.md). The first that
# fits; any other layer counts 1. The number of weights does not matter: a layer's output is as
# wrong as its weights are in proportion.
_SENSITIVITY = (
    ("q_proj", 0.25),
    ("k_proj", 0.32),
    ("v_proj", 0.86),
    ("o_proj", 0.7),
    ("up_proj", 0.86),
    ("down_proj", 1.1),
)
# Each block adds to what an embedding begins with and a head reads: these count as much as such a
# layer in every block. An embedding that is the head too counts as both.
_EMBEDDING, _HEAD = 0.9, 0.7
_FIRST_BLOCK = 1.75


def sensitivities(tied_groups: Sequence[Sequence[str]]) -> dict[str, float]:
    """How much a relative error counts in each layer, of layers in groups that must agree.

    The experts of a group are one layer in parts: each counts its share.
    """
    layers = [layer for group in tied_groups for layer in group]
    places = block_positions(layers)
    blocks = max((count for _, count in places.values()), default=1)
    has_head = any(_has_role(layer, "head") for layer in layers)
    found = {}
    for group in tied_groups:
        for layer in group:
            if _has_role(layer, "embedding"):
                weight = blocks * (_EMBEDDING if has_head else _EMBEDDING + _HEAD)
            elif _has_role(layer, "head"):
                weight = blocks * _HEAD
            else:
                weight = next((x for role, x in _SENSITIVITY if _has_role(layer, role)), 1.0)
                weight *= _FIRST_BLOCK if places.get(layer, (1, 0))[0] == 0 else 1.0
            found[layer] = weight / len(group)
    return found


def _has_role(layer: str, role: str) -> bool:
    return re.search(ROLES[role], layer) is not None


def cost(candidate: Candidate, weight: float) -> float:
    """The estimated cost of a candidate, from its relative error and its layer's sensitivity."""
    return weight * candidate.error / candidate.energy if candidate.energy else 0.0


def _describe_allocation(
    budget: SizeBudget, measured: Measured, answer: Allocation, search: str
) -> str:
    """The choice in a sentence."""
    total = answer.nbytes + measured.fixed_bytes
    bits = 8 * total / max(measured.parameters, 1)
    above = 100 * (answer.cost / answer.bound - 1) if answer.bound > 0 else 0.0
    how = "the least" if answer.exact else f"at most {above:.2g} % above the least"
    limit = budget.text if budget.is_size else f"{budget.text} bits per weight"
    return (
        f"Chosen within {limit}: {bits:.4f} bits per weight, {total:,} bytes; "
        f"estimated cost {answer.cost:.4g}, {how} "
        f"that its candidates allow (bound {answer.bound:.4g}; search {search})."
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
