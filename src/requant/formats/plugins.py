"""Formats of other packages: the entry points of group ``requant.formats``.

They are looked for only where none of our own formats knows a checkpoint, so that they can
neither slow down nor change what requant reads by itself.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, cast

from requant.errors import Problem
from requant.formats.base import Format

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUP = "requant.formats"


@cache
def plugged_in() -> tuple[tuple[Format, ...], tuple[Problem, ...]]:
    """Every installed format in the order of names, and what is wrong with those that fail."""
    from importlib.metadata import entry_points

    formats, problems = [], []
    for point in sorted(entry_points(group=GROUP), key=lambda point: (point.name, point.value)):
        found = _load(point)
        if isinstance(found, Problem):
            problems.append(found)
        else:
            formats.append(found)
    return tuple(formats), tuple(problems)


def _load(point: EntryPoint) -> Format | Problem:
    """The format that an entry point names; a class is called without arguments."""
    package = f" of {point.dist.name} {point.dist.version}" if point.dist else ""
    where = f"format plug-in {point.name!r} ({point.value}{package})"
    remedy = "repair or uninstall it"
    try:
        found = point.load()
        made = found() if isinstance(found, type) else found
    except Exception as error:  # whatever the code of another package raises
        return Problem(where, f"cannot be loaded: {type(error).__name__}: {error}; {remedy}")
    named = isinstance(getattr(made, "name", None), str)
    missing = [] if named else ["name (a str)"]
    missing += [f"{name}()" for name in ("claims", "read") if not callable(getattr(made, name, 0))]
    if missing:
        message = (
            f"is {type(made).__name__} without {', '.join(missing)}, expected a requant.formats."
            f"Format; {remedy}"
        )
        return Problem(where, message)
    return cast(Format, made)
