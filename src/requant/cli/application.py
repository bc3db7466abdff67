"""The commands and the options of all of them, as typer takes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from requant.cli import print_version
from requant.cli.convert import calibrate, convert, generate, join, plan
from requant.cli.export import export
from requant.cli.inspect import compare, inspect, recipes, report, verify
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
        print_version()
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
_COMMANDS: list[Callable[..., None]] = [convert, plan, inspect, verify, compare, export]
_COMMANDS += [join, calibrate, report, upload, generate, recipes]
for _command in _COMMANDS:
    app.command()(_command)
