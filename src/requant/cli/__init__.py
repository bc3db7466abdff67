"""The command line: arguments become calls, results become text and exit codes.

Only this package prints or exits. ``application`` has the commands, ``options`` their options and
arguments; ``convert``, ``export``, ``inspect`` and ``upload`` run them; ``plan_tables`` and
``tables`` write to standard output, ``progress`` to standard error; ``error_handling`` has errors,
exit codes and JSON.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Sequence
from typing import NoReturn


def print_version() -> None:
    """Print the version."""
    from requant import __version__

    print(f"requant {__version__}")


def _terminate(*_: object) -> NoReturn:
    """Handle SIGTERM: unwind as with Ctrl-C."""
    from requant.cli.error_handling import EXIT_TERMINATED

    raise SystemExit(EXIT_TERMINATED)


def run(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit.

    Args:
        arguments: What follows the program's name; None for the process's own.
    """
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:  # escape names that the terminal cannot encode
            reconfigure(errors="backslashreplace")
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words in (["--version"], ["-V"]):  # answered without the import of typer
        print_version()
        raise SystemExit(0)
    if words[:1] == ["help"]:  # as with git and pip: help, help convert
        words = [*words[1:], "--help"]
    from requant.cli.application import app
    from requant.cli.options import with_optional_texts

    app(with_optional_texts(words), prog_name="requant")
    raise SystemExit(0)
