"""Checks of an output folder before anything is written: names, permissions, room on the disk."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from requant.errors import OutputError
from requant.planning.plan import Plan

_GGUF = b"GGUF"  # the first bytes of such a file


def check_output(
    plan: Plan, output: Path, force: bool, spent: int = 0, most: int | None = None
) -> None:
    """Reject an output that must not, or cannot, be written.

    ``spent`` are bytes on the disk that an earlier run wrote already, ``most`` the bytes of weights
    that the disk must take at a time; None for all of them.

    Raises:
        OutputError: As ``check_place``, or the disk has too little room.
    """
    check_place(plan, output, force)
    room = room_for(plan, output, spent, most)
    if room.missing:
        raise OutputError(f"{output}: the disk is too full: {room}")


@dataclass(frozen=True, slots=True)
class DiskRoom:
    """Bytes that an output needs on its disk, and bytes that are free there."""

    needed: int
    free: int

    @property
    def missing(self) -> int:
        """Bytes that are needed beyond those that are free."""
        return max(self.needed - self.free, 0)

    def __str__(self) -> str:
        return f"{self.needed:,} bytes are needed, {self.free:,} are free"


def room_for(plan: Plan, output: Path, spent: int = 0, most: int | None = None) -> DiskRoom:
    """The room that an output needs and has; ``spent`` and ``most`` as in ``check_output``."""
    target = output.resolve()
    existing = next(p for p in (target, *target.parents) if p.exists())
    whole = sum(shard.nbytes for shard in plan.shards)
    needed = max((whole if most is None else most) + plan.side_bytes - spent, 0)
    return DiskRoom(needed, shutil.disk_usage(existing).free)


def check_place(plan: Plan, output: Path, force: bool) -> None:
    """Reject an output that must not be written, or cannot be, whatever room the disk has.

    Raises:
        OutputError: OUTPUT exists and ``force`` is not set, is not a checkpoint folder, lies
            in SOURCE or holds it, or cannot be made.
    """
    source, target = Path(plan.source).resolve(), output.resolve()
    within = target == source or target in source.parents or source in target.parents
    if within and plan.repository is None:
        raise OutputError(f"{output}: the source {source} must not be changed; name another folder")
    if why := _why_not_writable(output, target, is_file=plan.is_one_file):
        raise OutputError(
            f"{output} {why}; name another {'file' if plan.is_one_file else 'folder'}"
        )
    if plan.is_one_file:
        if output.exists() and not force:
            raise OutputError(f"{output} exists; --force replaces it")
        return
    if output.exists() and any(output.iterdir()):
        if not (output / "config.json").is_file():
            raise OutputError(
                f"{output} exists and holds no config.json, so it is not a checkpoint; "
                "--force replaces checkpoints only. Remove it yourself or name another folder"
            )
        if not force:
            raise OutputError(f"{output} exists; --force replaces it")


def _is_gguf_file(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(_GGUF)) == _GGUF


def _why_not_writable(output: Path, target: Path, *, is_file: bool) -> str:
    """Why a folder, or a file, cannot get the name of OUTPUT, or ""; --force changes none of it."""
    if is_file:
        if output.is_symlink() or (output.exists() and not _is_gguf_file(output)):
            return "exists and is not a GGUF file, which --force does not replace"
    elif output.is_symlink() or (output.exists() and not output.is_dir()):
        return "exists and is not a folder, which --force does not replace"
    if not target.name:
        return "is the root of the file system"
    if os.path.ismount(target):
        return "is where a disk is mounted, and cannot be replaced; one inside it can be made"
    with suppress(FileNotFoundError):  # a shell can be in a folder that was deleted
        if target == Path.cwd():
            return "is the folder that this command runs in, and is not replaced"
    above = next(p for p in target.parents if os.path.lexists(p))
    if not above.is_dir():
        return f"cannot be made: {above} is not a folder"
    if not os.access(above, os.W_OK | os.X_OK):
        return f"cannot be made: writing in {above} is not permitted"
    return ""
