"""Order the steps so that source files can be deleted early, and count the disk space needed.

Works on a plan only; ``output.source_removal`` deletes the files.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from requant.checkpoints.checkpoint import ComputedTensor
from requant.planning.plan import Plan, Step
from requant.sources.downloads import MAX_HELD_FILES


@dataclass(frozen=True, slots=True)
class ReleaseOrder:
    """The order in which steps run and source files can be deleted."""

    order: tuple[int, ...]  # numbers of the plan's steps in the order in which they run
    files: tuple[str, ...]  # source files in the order in which no step needs them any more
    # The most bytes on the disk at a time beyond the source itself, if each file is deleted as soon
    # as no step needs it.
    extra_bytes: int
    needs: tuple[frozenset[str], ...]  # step number -> the source files that it reads


def plan_release_order(plan: Plan) -> ReleaseOrder:
    """Order the steps so that source files can be deleted early.

    The next file is always the one whose remaining steps write the fewest bytes beyond its size.
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
    order = [number for number, names in enumerate(needs) if not names]
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
    """The most bytes on the disk at a time with --consume-source.

    For a folder these are beyond the source itself; for a source on the hub, all bytes.
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
    for tensor in (*step.inputs.values(), step.global_scale):
        if isinstance(tensor, ComputedTensor):
            for name in tensor.inputs:
                yield from source_files_of(plan.intermediates[name], plan)
        elif tensor is not None:
            yield from (part.file for part in tensor.ranges)


def subplan(plan: Plan, steps: Sequence[Step]) -> Plan:
    """A plan of some of the steps; no file but theirs is opened for it."""
    needed = {name for step in steps for name in source_files_of(step, plan)}
    files = tuple(file for file in plan.files if file.name in needed)
    return replace(plan, steps=tuple(steps), files=files)
