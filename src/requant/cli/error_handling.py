"""How every command answers: a JSON document, a line on standard error, an exit code.

Exit codes: 0 done; 1 the source or the disk is at fault; 2 wrong usage; 130 interrupted.
A defect of requant keeps its traceback.
"""

from __future__ import annotations

import json as jsonlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer

from requant.cli.text_format import escape_control_chars
from requant.errors import OutOfRangeError, RequantError, UnknownValueError, UsageError

EXIT_FAULT = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143
EXIT_PIPE = 141  # what a shell reports for a process that SIGPIPE ended


def print_json(document: dict[str, Any]) -> None:
    """Print what --json asks for; ``schemas/COMMAND.json`` says what is in it."""
    from requant.reports.record_summary import SCHEMA_VERSION

    print(jsonlib.dumps({"schema": SCHEMA_VERSION} | document, indent=2))


def print_stderr(text: str) -> None:
    print(escape_control_chars(text), file=sys.stderr)


@contextmanager
def handle_errors() -> Iterator[None]:
    """Turn what is not our defect into a line on standard error and an exit code."""
    try:
        yield
        sys.stdout.flush()
    except KeyboardInterrupt as error:
        print_stderr("; ".join(["interrupted", *error_notes(error)]))
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except BrokenPipeError:
        # The reader left. What is still buffered goes nowhere, so that Python's own last
        # flush cannot fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(EXIT_PIPE) from None
    except RequantError as error:
        print_stderr("\n".join([f"error: {error}", *error_notes(error)]))
        # With a layer, the number or word at fault is the source's and not the user's.
        option = isinstance(error, OutOfRangeError | UnknownValueError) and error.layer is None
        usage = option or isinstance(error, UsageError)
        raise typer.Exit(EXIT_USAGE if usage else EXIT_FAULT) from None
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print_stderr(f"error: {where}{error.strerror or error}")
        raise typer.Exit(EXIT_FAULT) from None


def error_notes(error: BaseException) -> list[str]:
    """What was added to an error on its way, such as how to resume."""
    return list(getattr(error, "__notes__", ()))
