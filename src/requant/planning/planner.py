"""Pipeline stage 3: a checkpoint and the options become a Plan.

Pure: no tensor data is read and nothing is written. The same inputs give the same plan.
``layout_selection`` chooses names and shapes, ``target_selection`` decides about each layer,
``steps`` lists the operations, ``shard_layout`` assigns offsets, ``output_config`` makes the config
and ``notes`` tells the user about consequences.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import PurePath
from typing import Any, NamedTuple

from requant.checkpoints.checkpoint import Checkpoint
from requant.core.garbage import without_collections
from requant.core.reasons import Note, NoteCode, Reason, ReasonCode
from requant.core.regex import regex_time_budget
from requant.core.sharing import shared
from requant.errors import CheckpointError, UsageError
from requant.formats.base import describe_encoding
from requant.formats.stale_blocks import read_source
from requant.importance.reader import read_statistics
from requant.layouts.load_check import why_unloadable
from requant.packings.base import Exactness, rounded
from requant.planning.importance_weights import attach_importance
from requant.planning.layout_selection import LayoutResult, choose_layout, other_layout
from requant.planning.notes import loader_notes, plan_notes, rotated_layers, unloadable_dtypes
from requant.planning.output_config import output_config, output_quantization
from requant.planning.plan import LayerPlan, Plan, Step, Treatment
from requant.planning.plan_source import PlanSource
from requant.planning.requests import (
    check_patterns,
    check_required_choices,
    nothing_quantized,
    unfulfilled,
)
from requant.planning.shard_layout import assign_offsets
from requant.planning.steps import fidelity, intermediate_steps, layer_steps
from requant.planning.target_selection import LayerDecision, TargetSelector
from requant.planning.unnamed_matrices import UnnamedMatrices, find_unnamed_matrices
from requant.quantization.config import Quantization
from requant.quantization.options import ConvertOptions

_CODES_WIDENED = Reason(
    ReasonCode.CODES_WIDENED, "the same codes, scales and biases in more bits or smaller groups"
)


_RANK = {exactness: rank for rank, exactness in enumerate(Exactness)}


class Planned(NamedTuple):
    """A plan and the source that it is executed on."""

    plan: Plan
    source: PlanSource


def make_plan(checkpoint: Checkpoint, options: ConvertOptions, *, is_trial: bool = False) -> Plan:
    """Return the plan of ``plan_with_source`` without its source."""
    return plan_with_source(checkpoint, options, is_trial=is_trial).plan


class LaidOut(NamedTuple):
    """A source whose layers have the names and shapes of the output."""

    checkpoint: Checkpoint  # the source
    format: str
    chosen: LayoutResult

    def selector(self, options: ConvertOptions) -> TargetSelector:
        """Selects the target of each layer by these options."""
        chosen = self.chosen
        return TargetSelector(
            chosen.checkpoint, self.format, chosen.layout, options, chosen.relayout
        )


def plan_with_source(
    checkpoint: Checkpoint, options: ConvertOptions, *, is_trial: bool = False
) -> Planned:
    """Plan the conversion of a checkpoint.

    With ``is_trial``, the options are one candidate of several, and may match no layer.

    Raises:
        CheckpointError: With all problems of the source.
        UsageError: With all options that cannot be met.
    """
    return plan_laid_out(lay_out(checkpoint, options), options, is_trial=is_trial)


@without_collections()
@regex_time_budget()
def lay_out(checkpoint: Checkpoint, options: ConvertOptions) -> LaidOut:
    """Read the layers of a checkpoint and choose their names and shapes in the output.

    Raises:
        CheckpointError: With all problems of the source.
    """
    read = read_source(checkpoint)
    if read.layout.problems:
        raise CheckpointError(str(read.checkpoint.source), read.layout.problems)
    layout = read.layout.without_rotations() if options.fold_rotation else read.layout
    return LaidOut(checkpoint, read.format, choose_layout(read.checkpoint, layout, options))


@without_collections()
@regex_time_budget()
def plan_laid_out(laid_out: LaidOut, options: ConvertOptions, *, is_trial: bool = False) -> Planned:
    """Plan as ``plan_with_source`` does, in a layout that was made for these options."""
    chosen, selector = laid_out.chosen, laid_out.selector(options)
    decisions = selector.select()
    unnamed = _check_decisions(selector, decisions, chosen.rejection, is_trial=is_trial)
    layers, unplaced, notes = _plan_layers(selector, decisions)
    source, relayout = chosen.checkpoint, chosen.relayout
    rotated = bool(rotated_layers(decisions))
    quantization = output_quantization(selector, decisions)
    config = output_config(selector, decisions, quantization, rotated=rotated)
    # Before shards are laid out: less is held meanwhile.
    loading = _loader_notes(layers, unplaced, config, chosen, options)
    is_mlx = relayout is not None or source.metadata.get("format") == "mlx"
    shards, steps = assign_offsets(unplaced, options.shard_size, "mlx" if is_mlx else "pt")
    load_error = "" if relayout is None else relayout.load_error
    is_obstructed = rotated or load_error or unloadable_dtypes(layers)
    copied = relayout.library.copied if relayout is not None else ()
    voices = [x for x, _ in source.left_out if any(PurePath(x).match(y) for y in copied)]
    side_files = (*source.side_files, *voices)
    plan = Plan(
        source=str(source.source),
        format=laid_out.format,
        files=source.files,
        layers=tuple(layers),
        steps=steps,
        shards=shards,
        config=config,
        quantization=quantization,
        side_files=(*side_files, *sorted(source.opened.generated_files)),
        left_out=tuple(x for x in source.left_out if x[0] not in side_files),
        notes=tuple(notes),
        dropped=chosen.layout.dropped,
        layout="keep" if relayout is None else relayout.library.name,
        loads=relayout is not None and not is_obstructed,
        rotated=rotated,
        load_error=load_error,
        repository=source.repository,
        side_bytes=source.opened.size_of(side_files),
        intermediates=intermediate_steps(chosen.layout, relayout, options),
    )
    found = _notes(plan, chosen, selector, decisions, unnamed, loading=loading)
    plan = replace(plan, notes=tuple(found))
    return Planned(plan, PlanSource(source, relayout))


class LayerTrial(NamedTuple):
    """A layer under one of several candidates."""

    plan: LayerPlan
    target: Quantization | None  # its quantization; None for dense
    steps: tuple[Step, ...]  # without files and offsets


@without_collections()
@regex_time_budget()
def try_layers(laid_out: LaidOut, options: ConvertOptions) -> list[LayerTrial]:
    """The layers as a plan would have them, without the rest of the plan.

    Raises:
        UsageError: There is no target, and codes of the source cannot stay.
    """
    selector = laid_out.selector(options)
    decisions = selector.select()
    if options.quantization is None:
        _check_decisions(selector, decisions, laid_out.chosen.rejection, is_trial=False)
    layers, steps, _ = _plan_layers(selector, decisions)
    steps_of = defaultdict[str, list[Step]](list)
    for step in steps:
        steps_of[step.layer].append(step)
    return [
        LayerTrial(layer, decision.target, tuple(steps_of[layer.layer]))
        for layer, decision in zip(layers, decisions, strict=True)
    ]


def _check_decisions(
    selector: TargetSelector, decisions: Sequence[LayerDecision], rejection: str, *, is_trial: bool
) -> UnnamedMatrices | None:
    """Raise all problems of the options; return the matrices whose names are worth a note."""
    source = selector.checkpoint.source
    problems = [
        *check_patterns(selector),
        *(x.problem for x in decisions if x.problem is not None),
        *check_required_choices(selector, decisions),
    ]
    unnamed = find_unnamed_matrices(selector, decisions)
    if unnamed is not None and unnamed.is_most and rejection:
        raise CheckpointError(str(source), [unnamed.problem(rejection)])
    if problems:
        lines = "".join(f"\n  {problem}" for problem in problems)
        raise UsageError(f"{source}: invalid options:{lines}")
    if not is_trial and (why := unfulfilled(selector, decisions)):
        raise UsageError(f"{source}: {why}")
    return unnamed


# -- layers and their steps ------------------------------------------------------------------------


def _plan_layers(
    selector: TargetSelector, decisions: Sequence[LayerDecision]
) -> tuple[list[LayerPlan], list[Step], list[Note]]:
    """The layers, their steps, and notes on the statistics file.

    Where one is given, the steps have the importance of each input.

    Raises:
        CheckpointError: The statistics file is of another model.
    """
    layers: list[LayerPlan] = []
    steps: list[Step] = []
    for decision in decisions:
        dtype = selector.value_dtype(decision.layer)
        own_steps = list(layer_steps(decision.layer, decision.target, dtype, selector.options))
        steps += own_steps
        layers.append(_layer_plan(decision, dtype, own_steps))
    options = selector.options
    if options.statistics is None:
        return layers, steps, []
    statistics = read_statistics(options.statistics)
    shapes = {x.layer: x.shape for x in layers}
    weighted = attach_importance(steps, shapes, statistics, options.gptq)
    layers = [replace(x, reason=x.reason or weighted.reasons.get(x.layer)) for x in layers]
    found = weighted.notes(statistics, is_calibrated=options.calibrate is not None)
    return layers, list(weighted.steps), [*found]


def _layer_plan(decision: LayerDecision, dtype: str, steps: Sequence[Step]) -> LayerPlan:
    """Describe a layer's conversion; ``dtype`` is that of its values."""
    layer, target, reason = decision.layer, decision.target, decision.reason
    is_quantized = layer.is_quantized
    if not is_quantized:
        treatment = Treatment.DENSE if target is None else Treatment.QUANTIZED
    elif layer.keeps_codes(target):
        treatment = Treatment.KEPT
        if target != layer.encoding:
            reason = reason or _CODES_WIDENED
    else:
        treatment = Treatment.DEQUANTIZED if target is None else Treatment.REQUANTIZED
    costs = [fidelity(step) for step in steps]
    if is_quantized and target is None:  # also where a step only moves what was decoded
        costs.append(rounded("values", dtype))
    worst = costs[0] if len(costs) == 1 else max(costs, key=lambda x: _RANK[x.exactness])
    # Steps that write further rows of a tensor have the tensors of the first one.
    outputs = (t for step in steps if not step.rows.output_row for t in step.outputs.values())
    return LayerPlan(
        layer=layer.path,
        shape=layer.shape,
        source=layer.stored_as,
        target=shared(describe_encoding(target, dtype)),
        treatment=treatment,
        exactness=worst.exactness,
        nbytes=sum(tensor.info.nbytes for tensor in outputs),
        is_weight=layer.is_weight,
        reason=reason,
        bound=shared(worst.bound),
    )


def _loader_notes(
    layers: Sequence[LayerPlan],
    steps: Sequence[Step],
    config: Mapping[str, Any],
    chosen: LayoutResult,
    options: ConvertOptions,
) -> list[Note]:
    """Notes on what loaders make of the source's names; none under a library's layout."""
    if chosen.relayout is not None:
        return []
    infos = {tensor.name: tensor.info for step in steps for tensor in step.outputs.values()}
    return [
        *loader_notes(
            layers,
            config,
            lambda: why_unloadable(config, infos),
            lambda: other_layout(chosen, options).library,
        )
    ]


def _notes(
    plan: Plan,
    chosen: LayoutResult,
    selector: TargetSelector,
    decisions: Sequence[LayerDecision],
    unnamed: UnnamedMatrices | None,
    *,
    loading: Sequence[Note],
) -> Iterator[Note]:
    """All notes in the order in which they are printed; those that ``plan`` has come last."""
    options = selector.options
    if unnamed is not None:
        yield unnamed.note(other_layout(chosen, options))
    if chosen.rejection:
        text = f"Tensors keep the source's names (--layout keep): {chosen.rejection}"
        yield Note(NoteCode.LAYOUT_KEPT, text)
    yield from (*chosen.notes, *chosen.checkpoint.notes, *chosen.layout.notes, *selector.notes)
    yield from plan_notes(selector, decisions, plan.layers, plan.steps)
    yield from loading
    yield from nothing_quantized(selector, decisions)
    yield from plan.notes
