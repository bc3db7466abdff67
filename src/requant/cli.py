"""The command line: arguments become calls, results become text and exit codes.

Exit codes: 0 done; 1 the source or the disk is at fault; 2 wrong usage; 130 interrupted.
A defect of requant keeps its traceback.
"""

from __future__ import annotations

import json as jsonlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from requant.errors import OutOfRangeError, RequantError, UnknownValueError, UsageError
from requant.options import (
    SHARD_SIZE,
    ActOrder,
    AgainstSource,
    AllowNonfinite,
    AllowOverflow,
    BaseModel,
    Bits,
    Calibrated,
    ConfigFrom,
    ConsumeSource,
    Dequantize,
    DryRun,
    Dtype,
    FoldRotation,
    Force,
    Gptq,
    GroupSize,
    Hessian,
    Html,
    Imatrix,
    Json,
    KeepExtra,
    Layout,
    MaxMemory,
    MaxTokens,
    Mode,
    ModelA,
    ModelB,
    NoResume,
    Only,
    Output,
    Overrides,
    Preview,
    Private,
    Prompt,
    Quiet,
    Raw,
    Recipe,
    Repository,
    Revision,
    SaveRecipe,
    Search,
    Seed,
    ShardSize,
    SizeBudget,
    Source,
    StatisticsFile,
    Text,
    Texts,
    TextTokens,
    TextWindow,
    Threads,
    UploadTo,
    Verified,
    Written,
    Yes,
    known_recipes,
    offer,
)

if TYPE_CHECKING:
    from requant.blueprint import Plan

EXIT_FAULT = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143
EXIT_PIPE = 141  # what a shell reports for a process that SIGPIPE ended

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


# -- commands --------------------------------------------------------------------------


@app.command()
def convert(
    source: Source,
    output: Output,
    bits: Bits = None,
    group_size: GroupSize = None,
    mode: Mode = None,
    dequantize: Dequantize = False,
    dtype: Dtype = None,
    override: Overrides = None,
    only: Only = None,
    recipe: Recipe = None,
    layout: Layout = "auto",
    keep_extra: KeepExtra = False,
    act_order: ActOrder = "requantize",
    fold_rotation: FoldRotation = False,
    search: Search = "off",
    imatrix: Imatrix = None,
    gptq: Gptq = False,
    config_from: ConfigFrom = None,
    budget: SizeBudget = None,
    save_recipe: SaveRecipe = None,
    max_memory: MaxMemory = None,
    threads: Threads = None,
    shard_size: ShardSize = SHARD_SIZE,  # type: ignore[assignment]  # parsed by parse_size
    force: Force = False,
    no_resume: NoResume = False,
    consume_source: ConsumeSource = False,
    yes: Yes = False,
    allow_nonfinite: AllowNonfinite = False,
    allow_overflow: AllowOverflow = False,
    revision: Revision = None,
    upload_to: UploadTo = None,
    private: Private = False,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write SOURCE as an MLX checkpoint folder OUTPUT.

    A quantized source is kept as it is unless --bits, --mode or --dequantize say
    otherwise; a dense one becomes affine, 4 bits, group 64 unless they do.

    \b
    Examples:
      requant convert Llama-3.2-1B out --bits 4
      requant convert Llama-3.2-1B out --mode mxfp4
      requant convert Llama-3.2-1B out --bits 4 --override 'lm_head=6'
      requant convert Mixtral-8x7B out --bits 4 --layout mlx-lm
      requant convert Qwen3-30B-A3B out --recipe mixed_3_6
      requant convert Llama-3.2-1B out --bits 3 --search best
      requant convert Llama-3.2-1B out --bits 3 --imatrix imatrix.gguf
      requant convert Llama-3.2-1B out --bits 3 --gptq --imatrix stats.safetensors
      requant convert Llama-3.2-1B out --budget 4 --search best
      requant convert Llama-3-8B-AWQ out
      requant convert Llama-3.2-1B-Q4_K_M.gguf out
      requant convert mlx-4bit out --dequantize --dtype bfloat16

    SOURCE may be a repository on the hub; it is downloaded once its headers hold no problem.
    Stopped (Ctrl-C, kill, a full disk), the same command goes on where it was.
    """  # noqa: D301
    from requant import console, conversion, publishing

    wishes = _wishes(
        bits,
        group_size,
        mode,
        dequantize,
        dtype,
        override,
        only,
        recipe,
        act_order,
        fold_rotation,
        layout,
        shard_size,
    )
    wishes |= {"keep_extra": keep_extra, "search": search, "config_from": config_from}
    wishes |= {"statistics": imatrix, "gptq": gptq}
    wishes["revision"] = revision
    wishes |= {"budget": budget, "save_recipe": save_recipe}
    if dry_run:
        with _answering_errors():
            with console.progress_display(quiet or json or budget is None) as progress:
                plan = conversion.plan(
                    source, **wishes, threads=threads, max_memory=max_memory, progress=progress
                )
            _print_plan(plan, threads, max_memory, json, quiet, output, force)
        return
    with _answering_errors():
        if upload_to is not None:
            publishing.check_ready(upload_to)
    with (
        _answering_errors(),
        console.progress_display(quiet) as progress,
    ):
        report = conversion.convert(
            source,
            output,
            **wishes,
            max_memory=max_memory,
            threads=threads,
            force=force,
            resume=not no_resume,
            consume_source=consume_source,
            yes=yes,
            allow_nonfinite=allow_nonfinite,
            allow_overflow=allow_overflow,
            progress=progress,
        )
    if upload_to is not None:
        _upload(output, upload_to, None, private, quiet or json)
    with _answering_errors():
        if json:
            _print_json(report.to_dict())
        elif not quiet:
            console.show_report(report)
        if json or quiet:
            for warning in console.warnings(report):
                _say(f"warning: {warning}")


@app.command()
def plan(
    source: Source,
    bits: Bits = None,
    group_size: GroupSize = None,
    mode: Mode = None,
    dequantize: Dequantize = False,
    dtype: Dtype = None,
    override: Overrides = None,
    only: Only = None,
    recipe: Recipe = None,
    layout: Layout = "auto",
    keep_extra: KeepExtra = False,
    act_order: ActOrder = "requantize",
    fold_rotation: FoldRotation = False,
    search: Search = "off",
    imatrix: Imatrix = None,
    gptq: Gptq = False,
    config_from: ConfigFrom = None,
    budget: SizeBudget = None,
    save_recipe: SaveRecipe = None,
    max_memory: MaxMemory = None,
    threads: Threads = None,
    shard_size: ShardSize = SHARD_SIZE,  # type: ignore[assignment]  # parsed by parse_size
    revision: Revision = None,
    json: Json = False,
) -> None:
    """Show what convert would write: layers, modes, sizes and memory.

    Reads headers and config.json only; --budget reads the weights too, and measures. --json
    prints the whole plan: every tensor to read and to write, with its place.

    \b
    Examples:
      requant plan Llama-3.2-1B --bits 4
      requant plan Llama-3.2-1B --bits 4 --only 'mlp' --override 'down_proj=6'
      requant plan Llama-3.2-1B --budget 4.5 --save-recipe mine.toml
    """  # noqa: D301
    from requant import console, conversion

    wishes = _wishes(
        bits,
        group_size,
        mode,
        dequantize,
        dtype,
        override,
        only,
        recipe,
        act_order,
        fold_rotation,
        layout,
        shard_size,
    )
    wishes |= {"keep_extra": keep_extra, "search": search, "config_from": config_from}
    wishes |= {"statistics": imatrix, "gptq": gptq}
    wishes["revision"] = revision
    wishes |= {"budget": budget, "save_recipe": save_recipe}
    with _answering_errors():
        with console.progress_display(json or budget is None) as progress:
            made = conversion.plan(
                source, **wishes, threads=threads, max_memory=max_memory, progress=progress
            )
        _print_plan(made, threads, max_memory, json)


@app.command()
def inspect(
    source: Source, config_from: ConfigFrom = None, revision: Revision = None, json: Json = False
) -> None:
    """Show what a folder holds: format, layers, dtypes, sizes, problems.

    Exits with 1 if there are problems.

    \b
    Example:
      requant inspect Llama-3.2-1B
    """  # noqa: D301
    from requant import console, inspection

    with _answering_errors():
        found = inspection.inspect(source, config_from, revision)
        if json:
            _print_json(found.to_dict())
        else:
            console.show_inspection(found)
    if found.problems:
        raise typer.Exit(EXIT_FAULT)


@app.command()
def verify(
    folder: Verified,
    output: AgainstSource = None,
    config_from: ConfigFrom = None,
    imatrix: Imatrix = None,
    max_memory: MaxMemory = None,
    threads: Threads = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check an OUTPUT of convert, bit for bit.

    With SOURCE and OUTPUT the conversion that requant.json records is repeated and compared
    with what is there. With OUTPUT alone its tensors and files are held against the hashes
    in requant.json, and index, config and layers against each other. Exits with 1 where
    anything differs, and names the tensor.

    \b
    Examples:
      requant verify Llama-3.2-1B Llama-3.2-1B-4bit
      requant verify Llama-3.2-1B-4bit
    """  # noqa: D301
    from requant import console, verification

    with _answering_errors(), console.progress_display(quiet) as progress:
        found = verification.verify(
            folder,
            output,
            config_from=config_from,
            statistics=imatrix,
            threads=threads,
            max_memory=max_memory,
            progress=progress,
        )
    with _answering_errors():
        if json:
            _print_json(found.to_dict())
        elif not quiet or found.problems:
            console.show_verification(found)
    if found.problems:
        raise typer.Exit(EXIT_FAULT)


@app.command()
def compare(
    a: ModelA,
    b: ModelB,
    text: Text = None,
    tokens: TextTokens = 8192,
    window: TextWindow = 256,
    threads: Threads = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Hold two forms of one model against each other, layer by layer.

    Relative RMS, largest error and cosine of every tensor, in whatever formats A and B are.
    With --text, both predict its tokens: loss and perplexity of each, how far B's predictions
    diverge from A's and how often both agree, each with its standard error.

    \b
    Examples:
      requant compare Llama-3.2-1B Llama-3.2-1B-4bit
      requant compare Llama-3.2-1B Llama-3.2-1B-4bit --text held-out.txt
      requant compare Llama-3.2-1B Llama-3.2-1B-Q4_K_M.gguf --json
    """  # noqa: D301
    from requant import comparison, console

    with _answering_errors():
        with console.counting_display(quiet or json) as progress:
            found = comparison.compare(
                a, b, text=text, tokens=tokens, window=window, threads=threads, progress=progress
            )
        if json:
            _print_json(found.to_dict())
        elif not quiet:
            console.show_comparison(found)


@app.command()
def calibrate(
    model: Calibrated,
    output: StatisticsFile,
    text: Texts = None,
    hessian: Hessian = False,
    tokens: TextTokens = 32_768,
    window: TextWindow = 512,
    seed: Seed = 0,
    revision: Revision = None,
    config_from: ConfigFrom = None,
    threads: Threads = None,
    force: Force = False,
    no_resume: NoResume = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run a model over a text and write what the inputs of its layers look like.

    The file weighs the search of convert: --imatrix FILE. Give text like that which the
    model will see, and not the text that you judge it by. Needs mlx-lm; one block's weights
    are in memory at a time. Stopped, the same command goes on where it was.

    \b
    Examples:
      requant calibrate Llama-3.2-1B -o stats.safetensors --text notes.txt
      requant calibrate Llama-3.2-1B -o stats.safetensors --text chats.jsonl --hessian
      requant convert Llama-3.2-1B out --bits 3 --imatrix stats.safetensors
    """  # noqa: D301
    from requant import calibration, console

    with _answering_errors():
        with console.counting_display(quiet or json) as progress:
            found = calibration.calibrate(
                model,
                output,
                text,
                hessian=hessian,
                tokens=tokens,
                window=window,
                seed=seed,
                revision=revision,
                config_from=config_from,
                threads=threads,
                force=force,
                resume=not no_resume,
                progress=progress,
                on_note=lambda note: _say(f"warning: {note}"),
            )
        if json:
            _print_json(found.to_dict())
        elif not quiet:
            console.show_calibration(found)


@app.command()
def report(output: Written, html: Html = None, json: Json = False) -> None:
    """Show what a conversion did, from the record in its OUTPUT.

    --html writes one page with drawings that needs no network: layers by treatment, sizes,
    errors by layer and kind, the worst layers, and where everything comes from.

    \b
    Examples:
      requant report Llama-3.2-1B-4bit
      requant report Llama-3.2-1B-4bit --html report.html
    """  # noqa: D301
    from requant import console, page
    from requant.figures import read_figures

    with _answering_errors():
        figures = read_figures(output)
        if html is not None:
            html.write_text(page.render_page(figures), "utf-8", "xmlcharrefreplace")
        if json:
            _print_json(figures.to_dict())
        elif html is None:
            console.show_figures(figures)
        else:
            _say(f"{html} written")


@app.command()
def upload(
    output: Written,
    repository: Repository,
    base_model: BaseModel = None,
    private: Private = False,
    preview: Preview = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Upload an OUTPUT of convert to the hub, with a model card.

    The card says where the model comes from, the exact command, the figures, how to run and
    how to check it; --dry-run prints it. Stopped, the same command goes on: weight files that
    are on the hub already are not sent again.

    \b
    Examples:
      requant upload Llama-3.2-1B-4bit me/Llama-3.2-1B-4bit --dry-run
      requant upload Llama-3.2-1B-4bit me/Llama-3.2-1B-4bit --base-model meta-llama/Llama-3.2-1B
    """  # noqa: D301
    if not preview:
        _upload(output, repository, base_model, private, quiet, json)
        return
    from requant import console, publishing

    with _answering_errors():
        found = publishing.upload(output, repository, base_model=base_model, preview=True)
        if json:
            _print_json(found.to_dict())
        else:
            console.show_upload(found)


def _upload(
    output: Path,
    repository: str,
    base_model: str | None,
    private: bool,
    quiet: bool,
    json: bool = False,
) -> None:
    from requant import publishing

    with _answering_errors():
        shown = not (quiet or json) and sys.stderr.isatty()
        done = publishing.upload(
            output, repository, base_model=base_model, private=private, show_progress=shown
        )
        if json:
            _print_json(done.to_dict())
        elif not quiet:
            _say(f"uploaded: {done.url}")


@app.command()
def generate(
    source: Source,
    prompt: Prompt,
    max_tokens: MaxTokens = 100,
    raw: Raw = False,
    bits: Bits = None,
    group_size: GroupSize = None,
    mode: Mode = None,
    dequantize: Dequantize = False,
    dtype: Dtype = None,
    override: Overrides = None,
    only: Only = None,
    recipe: Recipe = None,
    act_order: ActOrder = "requantize",
    fold_rotation: FoldRotation = False,
    search: Search = "off",
    imatrix: Imatrix = None,
    gptq: Gptq = False,
    config_from: ConfigFrom = None,
    budget: SizeBudget = None,
    revision: Revision = None,
    max_memory: MaxMemory = None,
    threads: Threads = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Let a model say something: convert SOURCE in memory, go on from a prompt.

    A look at what a conversion is worth, before or after it is written; needs mlx-lm.
    The wishes are those of convert, and so are the weights. The likeliest token is taken
    each time, so the same model says the same.

    \b
    Examples:
      requant generate Llama-3.2-1B-4bit --prompt "What is a file?"
      requant generate Llama-3.2-1B --bits 4 --prompt "What is a file?" --max-tokens 50
    """  # noqa: D301
    from requant import console, mlx_lm

    wishes = _wishes(
        bits, group_size, mode, dequantize, dtype, override, only, recipe, act_order, fold_rotation
    )
    wishes |= {"search": search, "config_from": config_from, "revision": revision}
    wishes |= {"statistics": imatrix, "gptq": gptq}
    wishes["budget"] = budget

    def show(text: str) -> None:
        print(console.printable(text.expandtabs(4)), end="", flush=True)

    with _answering_errors():
        with console.progress_display(quiet or json) as progress:
            loaded = mlx_lm.load_with_report(
                source, **wishes, max_memory=max_memory, threads=threads, progress=progress
            )
        for warning in console.warnings(loaded.report):
            _say(f"warning: {warning}")
        made = mlx_lm.generate(
            loaded, prompt, max_tokens=max_tokens, raw=raw, on_text=None if json else show
        )
        if json:
            _print_json(made.to_dict())
            return
        print(flush=True)
        if not quiet:
            _say(console.describe_generation(made))


@app.command()
def recipes(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME|FILE]", help="Show this one.", autocompletion=offer(known_recipes)
        ),
    ] = None,
    json: Json = False,
) -> None:
    """List the recipes that --recipe takes, or show one.

    What is shown of a TOML recipe is its file: a start for one of your own.

    \b
    Examples:
      requant recipes
      requant recipes ends-8 > mine.toml
    """  # noqa: D301
    from requant import console
    from requant.recipes import load_recipe, recipe_names, recipe_text

    with _answering_errors():
        if name is not None:
            found = [load_recipe(name)]
        else:
            found = [load_recipe(known) for known in recipe_names()]
        if json:
            _print_json({"recipes": [recipe.to_dict() for recipe in found]})
        elif name is not None:
            print(recipe_text(found[0]), end="")
        else:
            console.show_recipes(found)


def _wishes(
    bits: int | None,
    group_size: int | None,
    mode: str | None,
    dequantize: bool,
    dtype: str | None,
    override: list[str] | None,
    only: list[str] | None,
    recipe: str | None,
    act_order: str,
    fold_rotation: bool,
    layout: str | None = None,
    shard_size: int | None = None,
) -> dict[str, Any]:
    """The keyword arguments that the Python doors share; those of files where they are given."""
    files = {"layout": layout, "shard_size": shard_size}
    return {
        "bits": bits,
        "group_size": group_size,
        "mode": mode,
        "dequantize": dequantize,
        "dtype": dtype,
        "overrides": override or (),
        "only": only or (),
        "recipe": recipe,
        "act_order": act_order,
        "fold_rotation": fold_rotation,
        **{name: value for name, value in files.items() if value is not None},
    }


def _print_plan(
    made: Plan,
    threads: int | None,
    max_memory: int | None,
    json: bool,
    quiet: bool = False,
    output: Path | None = None,
    force: bool = False,
) -> None:
    from requant import console
    from requant.consuming import most_with_consume_source
    from requant.execute import make_budget
    from requant.writer import check_output

    budget = make_budget(made, threads, max_memory)
    if output is not None:
        check_output(made, output, force)
    if json:
        memory = {
            "peak_bytes": budget.peak_bytes,
            "threads": budget.threads,
            "chunk_bytes": budget.chunk_bytes,
        }
        disk = {
            "extra_bytes": sum(shard.nbytes for shard in made.shards),
            "extra_bytes_with_consume_source": most_with_consume_source(made),
        }
        _print_json(made.to_dict() | {"memory": memory, "disk": disk})
    elif not quiet:
        console.show_plan(made, budget, output)


def _print_json(document: dict[str, Any]) -> None:
    """Print what --json asks for; ``schemas/COMMAND.json`` says what is in it."""
    from requant.figures import SCHEMA_VERSION

    print(jsonlib.dumps({"schema": SCHEMA_VERSION} | document, indent=2))


# -- errors and the end ----------------------------------------------------------------


def _say(text: str) -> None:
    from requant.console import printable

    print(printable(text), file=sys.stderr)


@contextmanager
def _answering_errors() -> Iterator[None]:
    """Turn what is not our defect into a line on standard error and an exit code."""
    try:
        yield
        sys.stdout.flush()
    except KeyboardInterrupt as error:
        _say("; ".join(["interrupted", *notes_of(error)]))
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except BrokenPipeError:
        # The reader left. What is still buffered goes nowhere, so that Python's own last
        # flush cannot fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(EXIT_PIPE) from None
    except RequantError as error:
        _say("\n".join([f"error: {error}", *notes_of(error)]))
        # With a layer, the number or word at fault is the source's and not the user's.
        wish = isinstance(error, OutOfRangeError | UnknownValueError) and error.layer is None
        usage = wish or isinstance(error, UsageError)
        raise typer.Exit(EXIT_USAGE if usage else EXIT_FAULT) from None
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _say(f"error: {where}{error.strerror or error}")
        raise typer.Exit(EXIT_FAULT) from None


def notes_of(error: BaseException) -> list[str]:
    """What was added to an error on its way, such as how to go on."""
    return list(getattr(error, "__notes__", ()))


def _terminate(*_: object) -> NoReturn:
    """SIGTERM unwinds like Ctrl-C."""
    raise SystemExit(EXIT_TERMINATED)


def run(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit.

    Args:
        arguments: What follows the program's name; None for the process's own.
    """
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:  # a name that the terminal cannot spell is no error
            reconfigure(errors="backslashreplace")
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)
    app(arguments, prog_name="requant")
    raise SystemExit(0)
