"""What can be typed after a command: each argument and option is said once, here.

The wishes of ``plan`` and ``convert`` are the same annotations, so their names, short forms
and help cannot drift apart.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated

import typer

from requant.specs import SIZE_UNITS

SHARD_SIZE = "5GiB"  # the default of --shard-size, as a user would type it


def parse_size(text: str) -> int:
    """Bytes of a size such as ``500MB``.

    ``KB``, ``MB``, ``GB`` count in thousands, ``KiB``, ``MiB``, ``GiB`` and the bare
    ``K``, ``M``, ``G`` in 1024s; upper or lower case; no unit means bytes.

    Raises:
        typer.BadParameter: The text is no size, or less than a byte.

    Example:
        >>> parse_size("2GB"), parse_size("1.5KiB")
        (2000000000, 1536)
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    unit = SIZE_UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None:
        raise typer.BadParameter(f"{text!r} is no size; write 500MB, 2GB, 1GiB or plain bytes")
    whole, _, part = match[1].partition(".")
    nbytes: int = int(whole + part) * unit // 10 ** len(part)
    if nbytes < 1:
        raise typer.BadParameter(f"{text!r} is less than one byte")
    return nbytes


def offer(words: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    """What a shell offers for a value; ``words`` imports only when it is asked."""

    def matching(incomplete: str) -> list[str]:
        return [word for word in words() if word.startswith(incomplete)]

    return matching


def _modes() -> Iterable[str]:
    from requant.schema import QuantMode

    return [mode.value for mode in QuantMode]


def _choices(name: str) -> Callable[[], Iterable[str]]:
    """A table of `wishes`, by name."""

    def words() -> Iterable[str]:
        from requant import wishes

        known: Iterable[str] = getattr(wishes, name)
        return known

    return words


def known_recipes() -> Iterable[str]:
    from requant.recipes import recipe_names

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
Bits = Annotated[
    int | None, typer.Option("--bits", metavar="N", help="Bits per weight; affine: 1 to 6, 8.")
]
GroupSize = Annotated[
    int | None,
    typer.Option("--group-size", metavar="N", help="Inputs that share a scale; affine: 32 64 128."),
]
Mode = Annotated[
    str | None,
    typer.Option(
        "--mode",
        metavar="MODE",
        autocompletion=offer(_modes),
        help="Quantization mode: affine, mxfp4, mxfp8 or nvfp4.",
    ),
]
Dequantize = Annotated[bool, typer.Option("--dequantize", "-d", help="Write every layer dense.")]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="DTYPE",
        autocompletion=offer(_choices("DTYPES")),
        help="Dtype of floating tensors: float16, bfloat16 or float32.",
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--override",
        metavar="REGEX=SPEC",
        help="For layers whose path REGEX finds: bits (8), bits:group (8:32), a mode, or skip. "
        "Repeatable; the last that matches wins.",
    ),
]
Only = Annotated[
    list[str] | None,
    typer.Option(
        "--only", metavar="REGEX", help="Leave layers that REGEX does not find. Repeatable."
    ),
]
Recipe = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        metavar="NAME|FILE",
        autocompletion=offer(known_recipes),
        help="Bits by role, name and place: a name of `requant recipes`, or a TOML file.",
    ),
]
SizeBudget = Annotated[
    str | None,
    typer.Option(
        "--budget",
        metavar="SIZE",
        help="Choose bits and group of each layer so that the least is lost within 4.5 (bits per "
        "weight) or 12GB; measures the source first.",
    ),
]
SaveRecipe = Annotated[
    Path | None,
    typer.Option(
        "--save-recipe",
        metavar="FILE",
        help="Write what --budget chose as a recipe, to be edited and given to --recipe.",
    ),
]
Layout = Annotated[
    str,
    typer.Option(
        "--layout",
        metavar="LAYOUT",
        autocompletion=offer(_choices("LAYOUTS")),
        help="mlx-lm: what mlx-lm's converter would write; keep: the source's tensor names; "
        "auto: the first where mlx-lm takes the model.",
    ),
]
ActOrder = Annotated[
    str,
    typer.Option(
        "--act-order",
        metavar="WAY",
        autocompletion=offer(_choices("ACT_ORDERS")),
        help="GPTQ layers with inputs out of order: requantize (8 bits), dense or refuse.",
    ),
]
Search = Annotated[
    str,
    typer.Option(
        "--search",
        metavar="LEVEL",
        autocompletion=offer(_choices("SEARCHES")),
        help="Scales of new codes: off (MLX's rule), fast, or best (least error, slower). Same "
        "size, same format.",
    ),
]
Imatrix = Annotated[
    Path | None,
    typer.Option(
        "--imatrix",
        metavar="FILE",
        help="What an error of each input counts in the search: llama.cpp's imatrix (.gguf, .dat), "
        "or the statistics that calibrate wrote.",
    ),
]
Gptq = Annotated[
    bool,
    typer.Option(
        "--gptq",
        help="Hand each column's error on to the next ones, by the Hessians of --imatrix "
        "(requant calibrate --hessian): least error, slower; affine.",
    ),
]
Prompt = Annotated[
    str,
    typer.Option(
        "--prompt", "-p", metavar="TEXT", help="What to go on from; in the chat template, if any."
    ),
]
MaxTokens = Annotated[
    int, typer.Option("--max-tokens", metavar="N", min=1, help="Most tokens to generate.")
]
Raw = Annotated[bool, typer.Option("--raw", help="Use the prompt without the chat template.")]
KeepExtra = Annotated[
    bool,
    typer.Option(
        "--keep-extra",
        help="Keep tensors that mlx-lm's class drops (vision, audio, MTP), as they are. A note "
        "says where its loader refuses them.",
    ),
]
FoldRotation = Annotated[
    bool,
    typer.Option("--fold-rotation", help="ParoQuant: plain 8-bit layers that every loader runs."),
]
ConfigFrom = Annotated[
    Path | None,
    typer.Option(
        "--config-from",
        metavar="FOLDER",
        help="GGUF: take config.json and tokenizer files of the original model's folder.",
    ),
]
ShardSize = Annotated[
    int,
    typer.Option(
        "--shard-size", metavar="SIZE", parser=parse_size, help="Most bytes of one weight file."
    ),
]
MaxMemory = Annotated[
    int | None,
    typer.Option(
        "--max-memory",
        metavar="SIZE",
        parser=parse_size,
        help="Most memory to hold: 500MB, 2GB (thousands), 1GiB, 1G (1024s), or bytes.",
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads", "-j", metavar="N", min=1, help="Worker threads; by default one a processor."
    ),
]
Force = Annotated[bool, typer.Option("--force", "-f", help="Replace an existing OUTPUT.")]
ConsumeSource = Annotated[
    bool,
    typer.Option(
        "--consume-source",
        help="Delete each weight file of SOURCE once all made from it is on the disk. Needs --yes, "
        "but for the hub, of which a few files are here at a time.",
    ),
]
Yes = Annotated[bool, typer.Option("--yes", help="Yes, the weights in SOURCE are to be deleted.")]
NoResume = Annotated[
    bool,
    typer.Option("--no-resume", help="Start over instead of going on where a stopped run was."),
]
AllowNonfinite = Annotated[
    bool,
    typer.Option("--allow-nonfinite", help="Leave layers with NaN or infinity as they are."),
]
AllowOverflow = Annotated[
    bool, typer.Option("--allow-overflow", help="Let values too large for --dtype be infinite.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", "-n", help="Check everything, print the plan, write nothing.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print errors and warnings only.")]
Written = Annotated[Path, typer.Argument(metavar="OUTPUT", help="Folder that convert wrote.")]
Html = Annotated[
    Path | None, typer.Option("--html", metavar="FILE", help="Write one self-contained page.")
]
Revision = Annotated[
    str | None,
    typer.Option(
        "--revision", metavar="REV", help="Of a repository on the hub: branch, tag or commit."
    ),
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
