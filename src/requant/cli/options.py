"""Options and arguments of the commands.

Options that Python has too come from the table of options: ``with_options`` adds them to a command.
Arguments, and options of the command line alone, are the annotations below.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any

import typer

from requant.errors import UsageError
from requant.quantization.option_table import Option, options_of
from requant.quantization.options import ConvertOptions, RunOptions
from requant.quantization.size_budget import parse_size, size_text

TableOptions = dict[str, Any]  # options of the table as keyword arguments of Python


def completion(words: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    """Make typer's completion function, which returns the ``words`` with the typed start."""

    def matching(incomplete: str) -> list[str]:
        return [word for word in words() if word.startswith(incomplete)]

    return matching


def options_of_command(command: str) -> list[str]:
    """Names of the options of the table that a command takes, in the order of its help."""
    table = options_of(ConvertOptions, RunOptions)
    return [name for name, entry in table.items() if entry.is_in_command(command)]


def with_options(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Replace the parameter ``options`` of a command by these options of the table.

    The command gets their values in one dictionary of keyword arguments for Python.
    """
    table = options_of(ConvertOptions, RunOptions)
    entries = {_parameter_name(table[name]): table[name] for name in names}

    def decorated(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(**values: Any) -> None:
            options = {x.name: _argument_of(x, values.pop(name)) for name, x in entries.items()}
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


def _argument_of(entry: Option, typed: Any) -> Any:
    """The argument of Python for a value of the command line."""
    if entry.is_negated:
        return not typed
    kind = entry.type.on_command_line
    return typed or () if kind == "texts" else typed or None if kind == "optional_texts" else typed


_TEXT_FILES = (".txt", ".jsonl")  # a word after an option with an optional text that is its text


def with_optional_texts(words: Iterable[str]) -> list[str]:
    """Command-line words in which each option whose text may be left out has one, "" if none.

    The text follows as a word that ends in .txt or .jsonl, or after ``=``.
    """
    table = options_of(ConvertOptions, RunOptions).values()
    flags = [x.flag for x in table if x.type.on_command_line == "optional_texts"]
    typed = list(words)
    return [
        word + "=" if word in flags and not following.endswith(_TEXT_FILES) else word
        for word, following in zip_longest(typed, typed[1:], fillvalue="")
    ]


_PYTHON_TYPES: Mapping[str, Any] = {
    "flag": bool,
    "int": int,
    "size": int,
    "text": str,
    "path": Path,
    "texts": list[str],
    "optional_texts": list[str],
}


def _parameter(name: str, entry: Option) -> inspect.Parameter:
    """An option of the table as typer takes it."""
    kind = entry.type.on_command_line
    choices = entry.type.choices
    words = entry.type.completions or (choices and (lambda: choices))
    info = typer.Option(
        *(entry.flags or (entry.flag,)),
        metavar=entry.metavar or None,
        help=entry.help or entry.doc,
        min=entry.minimum,
        parser=_size if kind == "size" else None,
        autocompletion=completion(words) if words else None,
    )
    default = entry.default
    if kind == "flag":
        default = False
    elif kind in ("texts", "optional_texts"):
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


# -- arguments, and options of the command line alone ----------------------------------------


def _argument(metavar: str, help: str) -> Any:
    return typer.Argument(metavar=metavar, help=help, show_default=False)


def _value(name: str, metavar: str, help: str, *, short: str = "", min: int | None = None) -> Any:
    return typer.Option(*filter(None, (name, short)), metavar=metavar, help=help, min=min)


_SOURCE = (
    "Folder with config.json and safetensors, a GGUF file, or org/name (for GGUF org/name:Q4_K_M) "
    "on the hub."
)
_TEXTS = (
    'Text to read (.txt, or .jsonl with a text a line, or an object with "text" and "image"); may '
    "be given again. By default what comes with requant: documentation and code, and short pieces "
    "on many subjects."
)
_TEXT = (
    "Evaluate both on this text (.txt, or .jsonl with a text a line, or an object with "
    '"text" and "image"); needs mlx-lm.'
)
_READ_IMAGES = "Image, or folder of images, to read too; may be given again. Needs mlx-vlm."
_PREVIEW = "Print the model card and the files; upload nothing."
_REPOSITORY = "Repository on the hub, org/name; org/ is completed to org/NAME-4bit and the like."
_UPLOAD = (
    "Upload OUTPUT to the hub when it is done: org/name, or org/ for org/NAME-4bit, -6bit, "
    "-mxfp4, -bf16, ... with the name of SOURCE. --force also replaces a README.md there."
)
_BRANCH = "Upload to this branch, created from main if it does not exist."
_PULL_REQUEST = "Open a pull request with the upload instead of a commit to main."
_DRY_RUN = "Check everything, print the plan, write nothing."
_HESSIAN = "Collect what --gptq needs: 4 bytes x inputs^2 a layer."
_LOAD = (
    "Also load OUTPUT with its MLX library, strictly and on the CPU, and run a short forward pass; "
    "needs no requant.json."
)

Source = Annotated[Path, _argument("SOURCE", _SOURCE)]
Output = Annotated[Path, _argument("OUTPUT", "Folder to write; appears when complete.")]
Written = Annotated[Path, _argument("OUTPUT", "Folder that convert wrote.")]
Begun = Annotated[
    Path, _argument("OUTPUT", "The folder, or the statistics file, that was given to the parts.")
]
Verified = Annotated[Path | None, _argument("SOURCE", "The source of OUTPUT; may be left out.")]
AgainstSource = Annotated[Path | None, _argument("OUTPUT", "Folder to check.")]
ModelA = Annotated[Path, _argument("A", "Folder or GGUF file of the reference model.")]
ModelsB = Annotated[
    list[Path], _argument("B...", "The same model in another form, or several of them.")
]
Calibrated = Annotated[Path, _argument("MODEL", "Folder, GGUF file, or org/name on the hub.")]
Repository = Annotated[str, _argument("REPO", _REPOSITORY)]

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print errors and warnings only.")]
DryRun = Annotated[bool, typer.Option("--dry-run", "-n", help=_DRY_RUN)]
Preview = Annotated[bool, typer.Option("--dry-run", "-n", "--preview", help=_PREVIEW)]
Private = Annotated[bool, typer.Option("--private", help="Create a private repository.")]
Raw = Annotated[bool, typer.Option("--raw", help="Use the prompt without the chat template.")]
Hessian = Annotated[bool, typer.Option("--hessian", help=_HESSIAN)]

UploadTo = Annotated[str | None, _value("--upload", "REPO", _UPLOAD)]
Branch = Annotated[str | None, _value("--branch", "BRANCH", _BRANCH)]
PullRequest = Annotated[bool, typer.Option("--pull-request", help=_PULL_REQUEST)]
ReplaceCard = Annotated[
    bool, typer.Option("--force", "-f", help="Replace a README.md that differs.")
]
BaseModel = Annotated[
    str | None, _value("--base-model", "ID", "Source on the hub, for the model card.")
]
MovedSource = Annotated[
    Path | None,
    _value("--source", "SOURCE", "Where SOURCE is here, if not where the parts have found it."),
]
PartOfOutput = Annotated[
    str | None,
    _value(
        "--part",
        "NUMBER/COUNT",
        "Compare one part, as 3/8: its tensors, and all that is not a tensor. Needs SOURCE.",
    ),
]
PartOfText = Annotated[
    str | None,
    _value(
        "--part",
        "NUMBER/COUNT",
        "Run one part of the text, as 3/8 (8 parts at most), with an output in a folder that "
        "several machines share; `requant join FILE` then adds their sums.",
    ),
]
Load = Annotated[bool, typer.Option("--load", help=_LOAD)]
Cache = Annotated[
    Path | None,
    _value(
        "--cache",
        "FOLDER",
        "With several outputs: keep what A predicts in this folder, and use what is there.",
    ),
]
ScoresFile = Annotated[
    Path | None,
    _value(
        "--scores", "FILE", "Add what `requant compare A OUTPUT... --text FILE --json` printed."
    ),
]
Html = Annotated[Path | None, _value("--html", "FILE", "Write one self-contained page.")]
Prompt = Annotated[
    str, _value("--prompt", "TEXT", "The prompt; in the chat template, if any.", short="-p")
]
Images = Annotated[
    list[Path] | None,
    _value("--image", "FILE", "Image that the prompt is about; may be given again."),
]
ReadImages = Annotated[list[Path] | None, _value("--image", "FILE_OR_FOLDER", _READ_IMAGES)]
MaxTokens = Annotated[int, _value("--max-tokens", "N", "Most tokens to generate.", min=1)]
StatisticsFile = Annotated[
    Path, _value("--output", "FILE", "Statistics to write (.safetensors).", short="-o")
]
Texts = Annotated[list[Path] | None, _value("--text", "FILE", _TEXTS)]
Text = Annotated[Path | None, _value("--text", "FILE", _TEXT)]
TextTokens = Annotated[int, _value("--tokens", "N", "Most tokens of the text to read.", min=4)]
TextWindow = Annotated[int, _value("--window", "N", "Tokens per window of the text.", min=2)]
Seed = Annotated[int, _value("--seed", "N", "Seed for the choice of windows of a text.", min=0)]
