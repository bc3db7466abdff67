"""A plan cut into parts of about equal cost, for processes on several machines.

Parts share nothing but the output folder: rows of one output tensor are in one part, and so are
layers that share a Hessian. The cut depends on the plan and the number of parts only.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate

from requant.errors import UsageError
from requant.planning.plan import Plan, Step
from requant.planning.release_order import source_files_of
from requant.planning.step_cost import step_cost
from requant.quantization.part import Part
from requant.text import join_first, pluralize


def steps_of_part(plan: Plan, part: Part, *, whole_files: bool = False) -> tuple[int, ...]:
    """Numbers of the steps that a part runs, ascending; none where there are too few steps.

    Steps that belong together are one group. The groups, in the order of their first steps, are cut
    by ``indices_of_part``. With ``whole_files``, steps that read one source file belong together.
    """
    groups = _groups(plan, whole_files=whole_files)
    costs = [sum(step_cost(plan.steps[number]) for number in group) for group in groups]
    return tuple(sorted(n for group in indices_of_part(costs, part) for n in groups[group]))


def indices_of_part(costs: Sequence[float], part: Part) -> list[int]:
    """Which of several pieces of work with these costs a part does, ascending.

    The pieces are laid end to end on a line by their cost, which is divided into ``part.count``
    equal lengths. A piece belongs to the length in which its middle lies.

    Example:
        The middles are at 0.5, 1.5, 4 and 7 of 8; the first part has those before 4.

        >>> indices_of_part([1, 1, 4, 2], Part(1, 2)), indices_of_part([1, 1, 4, 2], Part(2, 2))
        ([0, 1], [2, 3])
    """
    ends = list(accumulate(costs))
    total = ends[-1] if ends else 0.0
    borders = [total * number / part.count for number in range(1, part.count)]
    return [
        index
        for index, (end, cost) in enumerate(zip(ends, costs, strict=True))
        if bisect_right(borders, end - cost / 2) == part.number - 1
    ]


def check_whole_files(plan: Plan, part: Part) -> None:
    """Check that each source file can belong to one part.

    Raises:
        UsageError: There are more parts than files, or groups of files with layers in common.
    """
    most = len(_groups(plan, whole_files=True))
    if part.count <= most:
        return
    readers: dict[str, list[int]] = {}
    for number in range(1, part.count + 1):
        for step in steps_of_part(plan, Part(number, part.count)):
            for name in source_files_of(plan.steps[step], plan):
                if number not in readers.setdefault(name, []):
                    readers[name].append(number)
    name, numbers = max(readers.items(), key=lambda found: len(found[1]))
    of = join_first([f"{number}/{part.count}" for number in numbers])
    raise UsageError(
        f"--consume-source deletes {name}, which the parts {of} read: files of this source can be "
        f"cut into {pluralize(most, 'part')}. Give that many at most, or no --consume-source"
    )


def _groups(plan: Plan, *, whole_files: bool = False) -> list[list[int]]:
    """Steps that one part has to run together, in the order of their first steps."""
    parent = list(range(len(plan.steps)))

    def find(number: int) -> int:
        while parent[number] != number:
            parent[number] = parent[parent[number]]
            number = parent[number]
        return number

    first: dict[Hashable, int] = {}
    for number, step in enumerate(plan.steps):
        keys = list(_shared(step))
        if whole_files:
            keys += [("file", name) for name in source_files_of(step, plan)]
        for key in keys:
            one, other = sorted((find(first.setdefault(key, number)), find(number)))
            parent[other] = one
    groups: dict[int, list[int]] = {}
    for number in range(len(plan.steps)):
        groups.setdefault(find(number), []).append(number)
    return list(groups.values())


def _shared(step: Step) -> Iterator[Hashable]:
    """What a step has in common with the others of its group."""
    for out in step.outputs.values():
        yield "output", out.name
    if step.gptq and step.importance is not None:
        for entry in step.importance.entries:
            yield "Hessian", entry


def part_of(plan: Plan, steps: Sequence[int]) -> Plan:
    """The plan with the layers and tensors of some steps only, for the report of a part."""
    chosen = [plan.steps[number] for number in steps]
    layers = {step.layer for step in chosen}
    tensors = {out.name for step in chosen for out in step.outputs.values()}
    shards = (
        replace(shard, tensors=tuple(t for t in shard.tensors if t.name in tensors))
        for shard in plan.shards
    )
    return replace(
        plan,
        steps=tuple(chosen),
        layers=tuple(layer for layer in plan.layers if layer.layer in layers),
        shards=tuple(shard for shard in shards if shard.tensors),
    )
