"""Attach the importance of each input to the steps of a plan that search for scales.

Works on steps and statistics files; knows no formats and reads no weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from requant.core.limits import MAX_GPTQ_INPUTS
from requant.core.reasons import Note, NoteCode, Reason, ReasonCode
from requant.errors import Problem
from requant.importance.statistics_file import Importance, StatisticsFile, statistics_error
from requant.planning.plan import Step
from requant.quantization.config import QuantMode
from requant.text import join_first, pluralize

WITHOUT_STATISTICS = Reason(ReasonCode.WITHOUT_STATISTICS, "no statistics: importance is estimated")


@dataclass(frozen=True, slots=True)
class WeightedSteps:
    """Steps with the statistics of their layers."""

    # All steps; those that search have the importance of their layer's inputs.
    steps: tuple[Step, ...]
    layers_without_statistics: tuple[str, ...]  # layers that are searched with estimates
    # Layer -> number of its experts that no token reached; they are searched with estimates, too.
    experts_without_tokens: Mapping[str, int]
    # Layer -> why GPTQ, where it is requested, cannot be applied.
    gptq_skipped: Mapping[str, Reason]

    @property
    def reasons(self) -> dict[str, Reason]:
        """Layer -> the reason in the table of layers."""
        unweighted = dict.fromkeys(self.layers_without_statistics, WITHOUT_STATISTICS)
        return {**self.gptq_skipped, **unweighted}

    def notes(self, statistics: StatisticsFile, *, is_calibrated: bool) -> Iterator[Note]:
        """The notes for the user; ``is_calibrated``: the conversion made the file itself."""
        searched = {step.layer for step in self.steps if step.importance is not None}
        name = statistics.source.rpartition("/")[2]
        by = "the calibration (--calibrate)" if is_calibrated else f"{name} (--imatrix)"
        text = f"Errors of {pluralize(len(searched), 'layer')} are weighted by {by}."
        yield Note(NoteCode.IMPORTANCE, text)
        if self.layers_without_statistics:
            layers = join_first(self.layers_without_statistics)
            text = f"{layers} found no statistics: importance is estimated from their weights."
            yield Note(NoteCode.WITHOUT_STATISTICS, text)
        compensated = {step.layer for step in self.steps if step.gptq}
        if compensated:
            held = pluralize(len(compensated), "layer")
            text = f"Errors of {held} are propagated column by column, then refined (--gptq)."
            yield Note(NoteCode.GPTQ, text)
        for why in dict.fromkeys(self.gptq_skipped.values()):
            names = tuple(layer for layer, reason in self.gptq_skipped.items() if reason == why)
            yield Note(NoteCode.GPTQ_SKIPPED, f"{join_first(names)}: {why.text}.")
        if self.experts_without_tokens:
            experts = pluralize(sum(self.experts_without_tokens.values()), "expert")
            layers = join_first(tuple(self.experts_without_tokens))
            text = (
                f"{experts} of {layers} saw no token: importance is estimated from their weights."
            )
            yield Note(NoteCode.EXPERTS_WITHOUT_TOKENS, text)


def attach_importance(
    steps: Iterable[Step],
    shapes: Mapping[str, tuple[int, ...]],
    statistics: StatisticsFile,
    gptq: bool = False,
) -> WeightedSteps:
    """Attach to each step that searches the statistics of its layer, and its Hessian for GPTQ.

    ``shapes`` has the shape of each layer's weight, ``(..., out, in)``.

    Raises:
        CheckpointError: A shape disagrees, or the file has none of the layers or no Hessian.
    """
    steps = tuple(steps)
    searched = dict.fromkeys(step.layer for step in steps if step.search != "off")
    importance: dict[str, Importance] = {}
    problems: list[Problem] = []
    for layer in searched:
        found = statistics.find(layer, shapes[layer])
        if isinstance(found, str):
            problems.append(Problem(layer, found))
        elif found is not None:
            importance[layer] = found
    if searched and not importance and not problems:
        known = join_first(tuple(statistics.seen))
        message = f"knows none of the layers searched, but {known}: is it of another model?"
        problems = [Problem("statistics", message)]
    if gptq and not problems and not any(entry.hessian for entry in statistics.seen.values()):
        message = (
            "holds no Hessians, which --gptq needs: requant calibrate MODEL --hessian makes them"
        )
        problems = [Problem("statistics", message)]
    if problems:
        raise statistics_error(statistics.source, problems)
    skipped = {}
    for step in steps if gptq else ():
        why = _gptq_skip_reason(step, importance.get(step.layer))
        if why and step.search != "off":
            skipped[step.layer] = why
    weighted = (
        _step_with_importance(x, importance.get(x.layer), gptq and x.layer not in skipped)
        for x in steps
    )
    unseen = {layer: len(x.matrices_without_tokens) for layer, x in importance.items()}
    return WeightedSteps(
        steps=tuple(weighted),
        layers_without_statistics=tuple(layer for layer in searched if layer not in importance),
        experts_without_tokens={layer: number for layer, number in unseen.items() if number},
        gptq_skipped=skipped,
    )


def _step_with_importance(step: Step, importance: Importance | None, gptq: bool) -> Step:
    if importance is None or step.encode is None or step.search == "off":
        return step
    if step.rows.columns != importance.in_features:  # rows that were cut at group borders
        return step
    estimate = step.encode.estimate if importance.matrices_without_tokens else None
    encode = replace(step.encode, importance=importance, estimate=estimate, gptq=gptq)
    return replace(step, encode=encode)


def _gptq_skip_reason(step: Step, importance: Importance | None) -> Reason | None:
    """Return why GPTQ cannot be applied to a layer that is searched; None where it can."""
    if step.target is None or step.target.mode is not QuantMode.AFFINE:
        text = "not affine: searched without --gptq"
    elif importance is None or not importance.has_hessians:
        text = "no Hessian: searched without --gptq"
    elif importance.in_features > MAX_GPTQ_INPUTS:
        text = f"more than {MAX_GPTQ_INPUTS:,} inputs: searched without --gptq"
    else:
        return None
    return Reason(ReasonCode.GPTQ_SKIPPED, text)
