"""JSON output, messages on standard error and exit codes of all commands.

Exit codes: 0 done; 1 an error of the source or the disk; 2 wrong usage; 130 interrupted.
A defect of requant keeps its traceback.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer

from requant.core.json_pieces import indented_pieces
from requant.errors import OutOfRangeError, RequantError, UnknownValueError, UsageError
from requant.text import escape_control_chars, os_error_text

EXIT_FAULT = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143
EXIT_PIPE = 141  # what a shell reports for a process that SIGPIPE ended


def print_json(document: dict[str, Any]) -> None:
    """Print the document of --json, which ``schemas/COMMAND.json`` describes."""
    from requant.reports.record_summary import SCHEMA_VERSION

    for piece in indented_pieces({"schema": SCHEMA_VERSION} | document):
        sys.stdout.write(piece)
    print()


def print_stderr(text: str) -> None:
    print(escape_control_chars(text), file=sys.stderr)


@contextmanager
def handle_errors() -> Iterator[None]:
    """Print errors on standard error and exit with their code; defects of requant pass."""
    try:
        yield
        sys.stdout.flush()
    except KeyboardInterrupt as error:
        print_stderr("; ".join(["interrupted", *getattr(error, "__notes__", ())]))
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except BrokenPipeError:
        # The pipe is closed. Discard what is buffered, so that Python's last flush cannot fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(EXIT_PIPE) from None
    except RequantError as error:
        print_stderr("\n".join([f"error: {error}", *getattr(error, "__notes__", ())]))
        # With a layer, the invalid value is in the source and not in an option.
        option = isinstance(error, OutOfRangeError | UnknownValueError) and error.layer is None
        usage = option or isinstance(error, UsageError)
        raise typer.Exit(EXIT_USAGE if usage else EXIT_FAULT) from None
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print_stderr(f"error: {where}{os_error_text(error)}")
        raise typer.Exit(EXIT_FAULT) from None
