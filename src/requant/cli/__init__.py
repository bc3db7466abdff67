"""The command line: arguments become calls, results become text and exit codes.

Only this package prints or exits. ``options`` has the options and arguments; ``convert``,
``inspect`` and ``upload`` the commands; ``plan_tables`` and ``tables`` write to standard output,
``progress`` to standard error; ``error_handling`` has errors, exit codes and JSON.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Annotated, NoReturn

import typer

from requant.cli.convert import calibrate, convert, generate, join, plan
from requant.cli.error_handling import EXIT_TERMINATED
from requant.cli.inspect import compare, inspect, recipes, report, verify
from requant.cli.options import with_optional_texts
from requant.cli.upload import upload

app = typer.Typer(
    name="requant",
    help=(
        "Turn model checkpoints into MLX's quantized formats and back.\n\n"
        "\b\n"
        "Examples:\n"
        "  requant inspect Llama-3.2-1B\n"
        "  requant plan    Llama-3.2-1B --bits 4\n"
        "  requant convert Llama-3.2-1B Llama-3.2-1B-4bit --bits 4\n"
        "  requant verify  Llama-3.2-1B Llama-3.2-1B-4bit\n"
    ),
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"requant {version('requant')}")
        raise typer.Exit


@app.callback()
def _global_options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", "-V", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    pass


# In the order of the help.
_COMMANDS: list[Callable[..., None]] = [convert, plan, inspect, verify, compare, join]
_COMMANDS += [calibrate, report, upload, generate, recipes]
for _command in _COMMANDS:
    app.command()(_command)


def _terminate(*_: object) -> NoReturn:
    """Handle SIGTERM: unwind as with Ctrl-C."""
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
    if words[:1] == ["help"]:  # as with git and pip: help, help convert
        words = [*words[1:], "--help"]
    app(with_optional_texts(words), prog_name="requant")
    raise SystemExit(0)
