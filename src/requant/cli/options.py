"""What can be typed after a command.

The options that Python takes too come from the table of options (``with_options`` puts them into
a command); arguments, and options of the command line alone, are the annotations below.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from requant.errors import UsageError
from requant.quantization.option_table import Option, options_of
from requant.quantization.options import ConvertOptions, RunOptions
from requant.quantization.size_budget import parse_size, size_text

TableOptions = dict[str, Any]  # what a command's options of the table are in Python


def completion(words: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    """What a shell offers for a value; ``words`` imports only when it is asked."""

    def matching(incomplete: str) -> list[str]:
        return [word for word in words() if word.startswith(incomplete)]

    return matching


def options_of_command(command: str) -> list[str]:
    """Names of the options of the table that a command takes, in the order of its help."""
    table = options_of(ConvertOptions, RunOptions)
    return [name for name, entry in table.items() if entry.is_in_command(command)]


def with_options(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Put options of the table where a command has its parameter ``options``.

    Args:
        *names: Names of the options. The command gets what was typed as keyword arguments for
            Python, in one dictionary.
    """
    table = options_of(ConvertOptions, RunOptions)
    entries = {_parameter_name(table[name]): table[name] for name in names}

    def decorated(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(**values: Any) -> None:
            typed = {name: values.pop(name) for name in entries}
            options = dict(_argument(entries[name], value) for name, value in typed.items())
            command(**values, options=options)

        parameters: list[inspect.Parameter] = []
        for parameter in inspect.signature(command, eval_str=True).parameters.values():
            if parameter.name == "options":
                parameters += (_parameter(name, entry) for name, entry in entries.items())
            else:
                parameters.append(parameter.replace(kind=parameter.KEYWORD_ONLY))
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {x.name: x.annotation for x in parameters}
        return run

    return decorated


def _parameter_name(entry: Option) -> str:
    """The name of an option as the command line knows it: imatrix, no_resume."""
    return entry.flag.lstrip("-").replace("-", "_")


def _argument(entry: Option, value: Any) -> tuple[str, Any]:
    """The keyword argument that something typed represents."""
    if entry.is_negated:
        return entry.name, not value
    if entry.type.on_command_line == "texts":
        return entry.name, value or ()
    return entry.name, value


_PYTHON_TYPES: Mapping[str, Any] = {
    "flag": bool,
    "int": int,
    "size": int,
    "text": str,
    "path": Path,
    "texts": list[str],
}


def _parameter(name: str, entry: Option) -> inspect.Parameter:
    """An option of the table as typer takes it."""
    kind = entry.type.on_command_line
    words = entry.completions or (lambda: entry.type.choices)
    has_words = entry.completions is not None or bool(entry.type.choices)
    info = typer.Option(
        *(entry.flags or (entry.flag,)),
        metavar=entry.metavar or None,
        help=entry.help or entry.doc,
        min=entry.minimum,
        parser=_size if kind == "size" else None,
        autocompletion=completion(words) if has_words else None,
    )
    default = entry.default
    if kind == "flag":
        default = False
    elif kind == "texts":
        default = None
    elif kind == "size" and default is not None:
        default = size_text(default)
    annotation = _PYTHON_TYPES[kind]
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[annotation if default is not None else annotation | None, info],
    )


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except UsageError as error:
        raise typer.BadParameter(str(error)) from error


def known_recipes() -> Iterable[str]:
    from requant.quantization.recipe_files import recipe_names

    return recipe_names()


Source = Annotated[
    Path,
    typer.Argument(
        metavar="SOURCE",
        help="Folder with config.json and safetensors, a GGUF file, or org/name (for GGUF "
        "org/name:Q4_K_M) on the hub.",
    ),
]
Output = Annotated[
    Path, typer.Argument(metavar="OUTPUT", help="Folder to write; appears when complete.")
]
Verified = Annotated[
    Path | None,
    typer.Argument(
        metavar="SOURCE", help="What OUTPUT was made from; may be left out.", show_default=False
    ),
]
AgainstSource = Annotated[
    Path | None, typer.Argument(metavar="OUTPUT", help="Folder to check.", show_default=False)
]
Prompt = Annotated[
    str,
    typer.Option(
        "--prompt", "-p", metavar="TEXT", help="The prompt; in the chat template, if any."
    ),
]
MaxTokens = Annotated[
    int, typer.Option("--max-tokens", metavar="N", min=1, help="Most tokens to generate.")
]
Raw = Annotated[bool, typer.Option("--raw", help="Use the prompt without the chat template.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", "-n", help="Check everything, print the plan, write nothing.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print errors and warnings only.")]
Written = Annotated[Path, typer.Argument(metavar="OUTPUT", help="Folder that convert wrote.")]
Html = Annotated[
    Path | None, typer.Option("--html", metavar="FILE", help="Write one self-contained page.")
]
Repository = Annotated[str, typer.Argument(metavar="REPO", help="Repository on the hub, org/name.")]
UploadTo = Annotated[
    str | None,
    typer.Option("--upload", metavar="REPO", help="Upload OUTPUT to the hub when it is done."),
]
BaseModel = Annotated[
    str | None,
    typer.Option("--base-model", metavar="ID", help="Source on the hub, for the model card."),
]
Private = Annotated[bool, typer.Option("--private", help="Create a private repository.")]
Preview = Annotated[
    bool,
    typer.Option(
        "--dry-run", "-n", "--preview", help="Print the model card and the files; upload nothing."
    ),
]
ModelA = Annotated[
    Path, typer.Argument(metavar="A", help="Folder or GGUF file: what the other is measured by.")
]
ModelB = Annotated[Path, typer.Argument(metavar="B", help="The same model in another form.")]
Calibrated = Annotated[
    Path,
    typer.Argument(metavar="MODEL", help="Folder, GGUF file, or org/name on the hub."),
]
StatisticsFile = Annotated[
    Path,
    typer.Option("--output", "-o", metavar="FILE", help="Statistics to write (.safetensors)."),
]
Texts = Annotated[
    list[Path] | None,
    typer.Option(
        "--text",
        metavar="FILE",
        help="Text to read (.txt, or .jsonl with a text a line); may be given again. By default a "
        "short one in English and Python that comes with requant.",
    ),
]
Hessian = Annotated[
    bool,
    typer.Option("--hessian", help="Collect what --gptq needs: 4 bytes x inputs^2 a layer."),
]
Seed = Annotated[
    int,
    typer.Option("--seed", metavar="N", min=0, help="Which windows of a longer text are read."),
]
Text = Annotated[
    Path | None,
    typer.Option(
        "--text",
        metavar="FILE",
        help="Also what both make of this text (.txt, or .jsonl with a text a line); needs mlx-lm.",
    ),
]
TextTokens = Annotated[
    int, typer.Option("--tokens", metavar="N", min=4, help="Most tokens of the text to read.")
]
TextWindow = Annotated[
    int,
    typer.Option("--window", metavar="N", min=2, help="Tokens that are read in one go."),
]
