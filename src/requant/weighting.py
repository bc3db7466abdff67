"""Statistics meet a plan's steps: what an error of each input counts where scales are searched for.

Knows steps and statistics files, and nothing of formats; reads no weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from requant.blueprint import Step
from requant.errors import Problem, count, few
from requant.limits import MAX_GPTQ_INPUTS
from requant.schema import QuantMode
from requant.statistics import Importance, Statistics, refused

WITHOUT_STATISTICS = "no statistics: searched without weights"


@dataclass(frozen=True, slots=True)
class Weighted:
    """Steps with the statistics of their layers.

    Attributes:
        steps: As they came, those that search with what their layer's inputs weigh.
        without: Layers that are searched without statistics.
        unseen: Layer -> its experts that no token reached; they are searched without, too.
        alone: Layer -> why GPTQ, where it is wished, does not work on it.
    """

    steps: tuple[Step, ...]
    without: tuple[str, ...]
    unseen: Mapping[str, int]
    alone: Mapping[str, str] = field(default_factory=dict)

    @property
    def reasons(self) -> dict[str, str]:
        """Layer -> what is to be said of it in the table."""
        return {**self.alone, **dict.fromkeys(self.without, WITHOUT_STATISTICS)}

    def notes(self, statistics: Statistics) -> Iterator[str]:
        """What the user should know of them."""
        searched = {step.layer for step in self.steps if step.importance is not None}
        name = statistics.source.rpartition("/")[2]
        yield f"Errors of {count(len(searched), 'layer')} are weighted by {name} (--imatrix)."
        if self.without:
            yield f"{few(self.without)} found no statistics: searched without weights."
        compensated = {step.layer for step in self.steps if step.gptq}
        if compensated:
            held = count(len(compensated), "layer")
            yield f"Errors of {held} are handed on column by column (--gptq)."
        for why in dict.fromkeys(self.alone.values()):
            names = tuple(layer for layer, reason in self.alone.items() if reason == why)
            yield f"{few(names)}: {why}."
        if self.unseen:
            experts = count(sum(self.unseen.values()), "expert")
            yield (
                f"{experts} of {few(tuple(self.unseen))} saw no token: searched without weights."
            )


def weighted(
    steps: Iterable[Step],
    shapes: Mapping[str, tuple[int, ...]],
    statistics: Statistics,
    gptq: bool = False,
) -> Weighted:
    """Give each step that searches the statistics of its layer.

    Args:
        steps: Of a plan.
        shapes: Layer -> shape of its weight, ``(..., out, in)``.
        statistics: The file.
        gptq: Hand errors on, wherever the file has Hessians.

    Raises:
        CheckpointError: A shape disagrees, the file knows none of the layers, or it has no
            Hessian at all.
    """
    steps = tuple(steps)
    searched = dict.fromkeys(step.layer for step in steps if step.search != "off")
    found: dict[str, Importance] = {}
    problems: list[Problem] = []
    for layer in searched:
        answer = statistics.find(layer, shapes[layer])
        if isinstance(answer, str):
            problems.append(Problem(layer, answer))
        elif answer is not None:
            found[layer] = answer
    if searched and not found and not problems:
        known = few(tuple(statistics.seen))
        message = f"knows none of the layers searched, but {known}: is it of another model?"
        problems = [Problem("statistics", message)]
    if gptq and not problems and not any(entry.hessian for entry in statistics.seen.values()):
        message = (
            "holds no Hessians, which --gptq needs: requant calibrate MODEL --hessian makes them"
        )
        problems = [Problem("statistics", message)]
    if problems:
        raise refused(statistics.source, problems)
    alone = {}
    for step in steps if gptq else ():
        why = _why_alone(step, found.get(step.layer))
        if why and step.search != "off":
            alone[step.layer] = why
    unseen = {layer: len(x.unseen) for layer, x in found.items() if x.unseen}
    return Weighted(
        tuple(
            _with(step, found.get(step.layer), gptq and step.layer not in alone) for step in steps
        ),
        tuple(layer for layer in searched if layer not in found),
        unseen,
        alone,
    )


def _with(step: Step, importance: Importance | None, gptq: bool) -> Step:
    if importance is None or step.search == "off" or step.columns != importance.in_features:
        return step
    return replace(step, importance=importance, gptq=gptq)


def _why_alone(step: Step, importance: Importance | None) -> str:
    """Why GPTQ does not work on a layer that is searched; "" where it does."""
    if step.target is None or step.target.mode is not QuantMode.AFFINE:
        return "not affine: searched without --gptq"
    if importance is None or not importance.has_hessians:
        return "no Hessian: searched without --gptq"
    if importance.in_features > MAX_GPTQ_INPUTS:
        return f"more than {MAX_GPTQ_INPUTS:,} inputs: searched without --gptq"
    return ""
