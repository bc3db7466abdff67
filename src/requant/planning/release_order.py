"""For small disks: an order of steps that frees source files early, and the disk space it takes.

Looks at a plan only; ``source_removal`` deletes the files.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from requant.checkpoints.checkpoint import ComputedTensor, SourceTensor
from requant.planning.plan import Plan, Step
from requant.sources.downloads import MAX_HELD_FILES


@dataclass(frozen=True, slots=True)
class ReleaseOrder:
    """When source files are free to go.

    Attributes:
        order: Numbers of the plan's steps, as they are to be run.
        files: Source files in the order in which they become free.
        extra_bytes: The most that the disk holds at a time beyond the source itself, if each
            file goes as soon as it is free.
        needs: Step number -> the source files that it reads.
    """

    order: tuple[int, ...]
    files: tuple[str, ...]
    extra_bytes: int
    needs: tuple[frozenset[str], ...]


def plan_release_order(plan: Plan) -> ReleaseOrder:
    """Order the steps so that source files become free early.

    Always the file next whose remaining steps write least for what it frees.
    """
    needs = tuple(frozenset(source_files_of(step, plan)) for step in plan.steps)
    written = [_bytes_out(step) for step in plan.steps]
    steps_of: dict[str, list[int]] = defaultdict(list)
    pending = Counter[str]({file.name: 0 for file in plan.files})
    for number, names in enumerate(needs):
        for name in names:
            steps_of[name].append(number)
            pending[name] += written[number]
    sizes = {file.name: file.nbytes for file in plan.files}
    order: list[int] = [number for number, names in enumerate(needs) if not names]
    held = peak = sum(written[number] for number in order)
    done, files = set(order), []
    left = dict.fromkeys(sizes)
    while left:
        name = min(left, key=lambda file: pending[file] - sizes[file])
        del left[name]
        for number in steps_of[name]:
            if number in done:
                continue
            done.add(number)
            order.append(number)
            held += written[number]
            for other in needs[number]:
                pending[other] -= written[number]
        peak = max(peak, held)
        held -= sizes[name]
        files.append(name)
    return ReleaseOrder(tuple(order), tuple(files), max(peak, 0), needs)


def peak_disk_bytes(plan: Plan) -> int:
    """The most that the disk holds at a time with --consume-source.

    Beyond the source itself; with a source on the hub, of which a few files are here, in all.
    """
    if plan.repository is None:
        return plan_release_order(plan).extra_bytes
    largest = sorted((file.nbytes for file in plan.files), reverse=True)
    return sum(shard.nbytes for shard in plan.shards) + sum(largest[:MAX_HELD_FILES])


def _bytes_out(step: Step) -> int:
    """Bytes that a step writes; one of several pieces of a tensor writes its share."""
    return sum(step.row_bytes(out) for out in step.outputs.values()) * step.rows.count


def source_files_of(step: Step, plan: Plan) -> Iterator[str]:
    """The source files that a step reads; one may come more than once."""
    tensors = [*step.inputs.values(), *([step.global_scale] if step.global_scale else [])]
    for tensor in tensors:
        yield from _files_of_tensor(tensor, plan)


def subplan(plan: Plan, steps: Sequence[Step]) -> Plan:
    """A plan of some of the steps; no file but theirs is opened for it."""
    needed = {name for step in steps for name in source_files_of(step, plan)}
    files = tuple(file for file in plan.files if file.name in needed)
    return replace(plan, steps=tuple(steps), files=files)


def _files_of_tensor(tensor: SourceTensor, plan: Plan) -> Iterator[str]:
    if isinstance(tensor, ComputedTensor):
        for name in tensor.inputs:
            yield from source_files_of(plan.intermediates[name], plan)
    else:
        yield from (part.file for part in tensor.ranges)
