"""For small disks: an order of steps that frees source files early, and what is kept of them.

Of a weight file that goes a *twin* stays: its size, header and what planning looked at. A later
run plans from twins as from the files.
"""

from __future__ import annotations

import json
import os
import struct
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from requant.blueprint import Plan, Step
from requant.checkpoint import (
    COMPARED,
    ComputedTensor,
    FileRange,
    OpenedSource,
    SourceFile,
    SourceTensor,
)
from requant.downloads import HELD_FILES
from requant.errors import OutputError
from requant.safetensors_header import PREFIX_BYTES
from requant.staging import fsync


@dataclass(frozen=True, slots=True)
class Release:
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


def release(plan: Plan) -> Release:
    """Order the steps so that source files become free early.

    Always the file next whose remaining steps write least for what it frees.
    """
    needs = tuple(frozenset(files_of(step, plan)) for step in plan.steps)
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
    return Release(tuple(order), tuple(files), max(peak, 0), needs)


def most_with_consume_source(plan: Plan) -> int:
    """The most that the disk holds at a time with --consume-source.

    Beyond the source itself; with a source on the hub, of which a few files are here, in all.
    """
    if plan.repository is None:
        return release(plan).extra_bytes
    largest = sorted((file.nbytes for file in plan.files), reverse=True)
    return sum(shard.nbytes for shard in plan.shards) + sum(largest[:HELD_FILES])


def _bytes_out(step: Step) -> int:
    """Bytes that a step writes; one of several pieces of a tensor writes its share."""
    return sum(step.row_bytes(out) for out in step.outputs.values()) * step.rows.count


def files_of(step: Step, plan: Plan) -> Iterator[str]:
    """The source files that a step reads; one may come more than once."""
    tensors = [*step.inputs.values(), *([step.global_scale] if step.global_scale else [])]
    for tensor in tensors:
        yield from _files_of_tensor(tensor, plan)


def part_of(plan: Plan, steps: Sequence[Step]) -> Plan:
    """A plan of some of the steps; no file but theirs is opened for it."""
    needed = {name for step in steps for name in files_of(step, plan)}
    files = tuple(file for file in plan.files if file.name in needed)
    return replace(plan, steps=tuple(steps), files=files)


def _files_of_tensor(tensor: SourceTensor, plan: Plan) -> Iterator[str]:
    if isinstance(tensor, ComputedTensor):
        for name in tensor.inputs:
            yield from files_of(plan.materials[name], plan)
    else:
        yield from (part.file for part in tensor.ranges)


def make_twins(source: OpenedSource, files: Sequence[SourceFile], place: Path) -> None:
    """Keep of each weight file its size, its header and what was looked at: holes elsewhere.

    Of tensors that were compared the outcome stays.
    """
    place.mkdir(exist_ok=True)
    for file in files:
        twin = place / file.name
        if twin.exists():
            continue
        twin.parent.mkdir(parents=True, exist_ok=True)
        fresh = twin.with_name(twin.name + ".new")
        with fresh.open("wb") as new:
            new.truncate(file.nbytes)
            for part in (_header_range(source, file.name), *source.small_tensor_ranges):
                if part.file == file.name:
                    new.seek(part.offset)
                    new.write(source.read_range(part))
            new.flush()
            os.fsync(new.fileno())
        fresh.rename(twin)
        fsync(twin.parent)
    kept = place / COMPARED
    fresh = kept.with_name(kept.name + ".new")
    with fresh.open("w", encoding="utf-8") as new:
        json.dump(source.compared, new)
        new.flush()
        os.fsync(new.fileno())
    fresh.rename(kept)
    fsync(place)


def _header_range(source: OpenedSource, name: str) -> FileRange:
    (length,) = struct.unpack("<Q", source.read_range(FileRange(name, 0, PREFIX_BYTES)))
    return FileRange(name, 0, PREFIX_BYTES + length)


def delete_source(path: Path) -> None:
    """Delete a source file that is needed no more, unless it is gone."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{path} cannot be deleted: {error.strerror or error}") from error
