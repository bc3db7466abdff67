"""What the parts of an output have in common: one command, and a journal for each run of a part.

    parts/command           what every part was made from; the first part writes it
    parts/checked.3-of-8    with --consume-source: part 3 was computed once, without errors
    parts/budget            with --budget: what was asked for before the bits were chosen
    parts/measured.3-of-8.… with --budget: what one run of part 3 has measured
    parts/3-of-8.1f6c02ab   the journal of one run of part 3; a part that ran twice has two

Files are made whole under another name and then linked, which is atomic on network file systems
too. No lock is needed: a run appends to its own journal only.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from requant.core.files import fsync, replace_file
from requant.errors import OutputError
from requant.execution.completed_work import CompletedWork
from requant.output.journal import boot_id, read_journal
from requant.quantization.part import Part

_COMMAND, _BUDGET, _CHECKED = "command", "budget", "checked"


def agree_on_command(parts: Path, command: Mapping[str, Any]) -> dict[str, Any]:
    """Write what the parts are made from, unless another part did; returns what is there then.

    Raises:
        OutputError: What is there is not readable.
    """
    return _agree(parts / _COMMAND, command, read_command)


def agree_on_budget(parts: Path, command: Mapping[str, Any]) -> dict[str, Any]:
    """The same for what was asked for before the bits of layers were chosen."""
    return _agree(parts / _BUDGET, command, read_budget)


def _agree(
    target: Path,
    command: Mapping[str, Any],
    read: Callable[[Path], dict[str, Any] | None],
) -> dict[str, Any]:
    parts = target.parent
    parts.mkdir(exist_ok=True)
    if not target.exists():
        draft = parts / f"{target.name}.{secrets.token_hex(4)}"
        with draft.open("wb") as file:
            file.write(json.dumps(command, separators=(",", ":")).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileExistsError):  # another part was first
            os.link(draft, target)
        draft.unlink()
        fsync(parts)
    found = read(parts)
    if found is None:
        raise OutputError(
            f"{target} is not what a part writes; remove that file and run a part again"
        )
    return found


def command_file(parts: Path) -> Path:
    """Where the parts have written what they are made from."""
    return parts / _COMMAND


def read_command(parts: Path) -> dict[str, Any] | None:
    """What the parts are made from; None where there are none."""
    return _read(parts / _COMMAND, "plan")


def read_budget(parts: Path) -> dict[str, Any] | None:
    """What was asked for before the bits of layers were chosen; None where nothing was."""
    return _read(parts / _BUDGET, "options")


def follows(command: Mapping[str, Any], budget: Mapping[str, Any]) -> bool:
    """Whether a command is what a budget became when the bits were chosen."""

    def asked(options: Mapping[str, Any]) -> dict[str, Any]:
        return {**options, "quantization": None, "recipe": None}

    return asked(command.get("options", {})) == asked(budget["options"])


def _read(path: Path, key: str) -> dict[str, Any] | None:
    try:
        command = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return command if isinstance(command, dict) and key in command else None


def new_journal_path(parts: Path, part: Part) -> Path:
    """A path for the journal of a run that no other run has."""
    return parts / f"{part.number}-of-{part.count}.{secrets.token_hex(4)}"


@dataclass(frozen=True, slots=True)
class PartJournals:
    """The sum of the journals of all parts."""

    done: CompletedWork
    finished: frozenset[Part]  # parts of which a run was completed, as its journal says
    started: frozenset[Part]  # parts that have a journal


def read_part_journals(
    parts: Path, head: Mapping[str, Any], steps: Collection[int] | None = None
) -> PartJournals:
    """Read the journals of all parts; of ``steps`` only, where these are given.

    Of a journal that another machine wrote, or this one before it was started again, the durable
    lines count. Rows that two runs have written are counted once.

    Raises:
        OutputError: A journal is of another plan, or its source was changed.
    """
    done = CompletedWork()
    finished, started = set(), set()
    for path in _journals(parts):
        part = _part_of(path)
        assert part is not None
        before, found = read_journal(path)
        if not before:
            continue  # killed before its first line
        _check_head(path, before, head)
        started.add(part)
        if found.is_finished:
            finished.add(part)
        add_run(done, found, steps)
    return PartJournals(done, frozenset(finished), frozenset(started))


def files_deleted_by_parts(parts: Path) -> list[str]:
    """The source files that parts have deleted, or are about to."""
    found = [read_journal(path)[1] for path in _journals(parts)]
    return sorted({name for done in found for name in done.deleted_sources})


def mark_checked(parts: Path, part: Part) -> None:
    """Note, durably, that a part was computed once and holds no errors: files may be deleted."""
    with replace_file(parts / f"{_CHECKED}.{part.number}-of-{part.count}", secrets.token_hex(4)):
        pass
    fsync(parts)


def unchecked_parts(parts: Path, count: int) -> list[Part]:
    """The parts that were not computed yet."""
    every = (Part(number, count) for number in range(1, count + 1))
    return [x for x in every if not (parts / f"{_CHECKED}.{x.number}-of-{count}").exists()]


def _journals(parts: Path) -> Iterator[Path]:
    for path in sorted(parts.glob("*-of-*.*")) if parts.is_dir() else ():
        if _part_of(path) is not None:
            yield path


def _part_of(path: Path) -> Part | None:
    number, _, rest = path.name.partition("-of-")
    count, _, run = rest.partition(".")
    is_journal = number.isdigit() and count.isdigit() and len(run) == 8
    return Part(int(number), int(count)) if is_journal else None


def _check_head(path: Path, before: Mapping[str, Any], head: Mapping[str, Any]) -> None:
    staging = path.parent.parent
    if before.get("plan") != head["plan"] or before.get("requant") != head["requant"]:
        raise OutputError(
            f"{path} is of another conversion than the parts next to it; remove {staging} to start "
            "over"
        )
    # Another machine may have a copy of the source, with other times of change.
    is_here = before.get("boot") == boot_id()
    old, new = before.get("sources", {}), json.loads(json.dumps(head["sources"]))
    # Parts may have deleted files since; a file that is gone for another reason cannot be planned.
    if is_here and any(old[name] != new[name] for name in old.keys() & new.keys()):
        raise OutputError(
            f"{path}: the source was changed after this part of the output was made; remove "
            f"{staging} to start over"
        )


def add_run(
    done: CompletedWork, found: CompletedWork, steps: Collection[int] | None = None
) -> None:
    """Add what one run did; of ``steps`` only, where these are given.

    Statistics are of all rows of a step that the run has done, so rows that another run has done
    too cannot be taken off: a run counts for a step if its rows are disjoint from those that are
    there, or if they contain them. Otherwise its rows are done again.
    """
    for step, borders in found.rows.items():
        if steps is not None and step not in steps:
            continue
        there = CompletedWork(rows={step: done.rows.get(step, ())})
        both = CompletedWork(rows={step: there.rows[step]})
        both.add({"rows": [step, *borders]})
        rows, here, all_of = (x.done_rows(step) for x in (found, there, both))
        if all_of == rows + here:
            stats = found.stats.get(step)
            done.add({"rows": [step, *borders], "stats": stats and stats.nonzero_fields()})
        elif all_of == rows:
            done.rows[step] = borders
            done.stats.pop(step, None)
            if step in found.stats:
                done.stats[step] = found.stats[step]
    for name, digest in found.hashes.items():
        done.hashes.setdefault(name, digest)
    done.deleted_sources += [x for x in found.deleted_sources if x not in done.deleted_sources]
