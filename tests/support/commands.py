"""The commands as the command line's own parser knows them, for tests that go over all of them."""

import re
import shlex
from dataclasses import dataclass
from typing import Any

import typer

from requant.cli.application import app
from requant.cli.options import with_optional_texts

COMMANDS: dict[str, Any] = dict(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def check_usage(line: str) -> None:
    """Parse a line such as ``requant plan A --bits 4``; nothing is run.

    What a shell takes for itself (a comment, a pipe, a file to write to) ends the line.
    """
    words = shlex.split(re.split(r" [|>&#]", line)[0])
    assert words[0] == "requant", line
    if len(words) == 2 and words[1].startswith("-"):
        return
    assert words[1] in COMMANDS, f"{line}: no such command"
    if "--help" in words or "-h" in words:
        return
    try:
        COMMANDS[words[1]].make_context(words[1], with_optional_texts(words[2:]))
    except Exception as error:
        message = getattr(error, "message", error)
        raise AssertionError(f"{line}: {message}") from None


@dataclass
class Result:
    """What a command left behind."""

    code: object
    out: str
    err: str
