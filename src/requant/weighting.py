"""Statistics meet a plan's steps: what an error of each input counts where scales are searched for.

Knows steps and statistics files, and nothing of formats; reads no weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from requant.blueprint import Step
from requant.errors import CheckpointError, Problem
from requant.statistics import Importance, Statistics

WITHOUT_STATISTICS = "no statistics: searched without weights"
_NAMED = 3


@dataclass(frozen=True, slots=True)
class Weighted:
    """Steps with the statistics of their layers.

    Attributes:
        steps: As they came, those that search with what their layer's inputs weigh.
        without: Layers that are searched without statistics.
        unseen: Layer -> its experts that no token reached; they are searched without, too.
    """

    steps: tuple[Step, ...]
    without: tuple[str, ...]
    unseen: Mapping[str, int]

    def notes(self, statistics: Statistics) -> Iterator[str]:
        """What the user should know of them."""
        searched = {step.layer for step in self.steps if step.importance is not None}
        name = statistics.source.rpartition("/")[2]
        yield f"Errors of {len(searched)} layers are weighted by {name} (--imatrix)."
        if self.without:
            yield f"{_listed(self.without)} found no statistics: searched without weights."
        if self.unseen:
            count = sum(self.unseen.values())
            yield (
                f"{count:,} experts of {_listed(tuple(self.unseen))} saw no token: searched "
                "without weights."
            )


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def weighted(
    steps: Iterable[Step], shapes: Mapping[str, tuple[int, ...]], statistics: Statistics
) -> Weighted:
    """Give each step that searches the statistics of its layer.

    Args:
        steps: Of a plan.
        shapes: Layer -> shape of its weight, ``(..., out, in)``.
        statistics: The file.

    Raises:
        CheckpointError: A shape disagrees, or the file knows none of the layers.
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
        known = _listed(tuple(statistics.seen))
        message = f"knows none of the layers that are searched, but {known}: of another model?"
        problems = [Problem("statistics", message)]
    if problems:
        raise CheckpointError(statistics.source, problems)
    unseen = {layer: len(x.unseen) for layer, x in found.items() if x.unseen}
    return Weighted(
        tuple(_with(step, found.get(step.layer)) for step in steps),
        tuple(layer for layer in searched if layer not in found),
        unseen,
    )


def _with(step: Step, importance: Importance | None) -> Step:
    if importance is None or step.search == "off" or step.columns != importance.in_features:
        return step
    return replace(step, importance=importance)
