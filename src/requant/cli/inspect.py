"""Commands that only read: inspect, verify, compare, report, recipes."""

from __future__ import annotations

from typing import Annotated

import typer

from requant.cli.error_handling import EXIT_FAULT, handle_errors, print_json, print_stderr
from requant.cli.options import (
    AgainstSource,
    Cache,
    Html,
    Json,
    Load,
    ModelA,
    ModelsB,
    PartOfOutput,
    Quiet,
    ReadImages,
    ScoresFile,
    Source,
    TableOptions,
    Text,
    TextTokens,
    TextWindow,
    Verified,
    Written,
    completion,
    with_options,
)
from requant.cli.progress import counting_display, progress_display
from requant.errors import UsageError
from requant.quantization.recipe_files import load_recipe, recipe_names, recipe_text


@with_options("config_from", "mmproj", "revision")
def inspect(source: Source, *, options: TableOptions, json: Json = False) -> None:
    """Show format, layers, sizes and problems of SOURCE.

    Exits with 1 if there are problems.

    \b
    Example:
      requant inspect Llama-3.2-1B
    """  # noqa: D301
    from requant.api import inspect as inspection
    from requant.cli import tables

    with handle_errors():
        result = inspection.inspect(source, **options)
        if json:
            print_json(result.to_dict())
        else:
            tables.show_inspection(result)
    if result.problems:
        raise typer.Exit(EXIT_FAULT)


@with_options("config_from", "statistics", "max_memory", "threads")
def verify(
    folder: Verified = None,
    output: AgainstSource = None,
    *,
    part: PartOfOutput = None,
    load: Load = False,
    options: TableOptions,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check an OUTPUT of convert, bit for bit.

    With SOURCE and OUTPUT the conversion that requant.json records is repeated and compared
    with OUTPUT. With OUTPUT alone its tensors and files are compared with the hashes in
    requant.json, and index, config and layers with each other. Exits with 1 if anything
    differs, and names the tensor; with --load also if the MLX library that OUTPUT is for
    does not load it, or a logit is NaN or infinite.

    \b
    Examples:
      requant verify Llama-3.2-1B Llama-3.2-1B-4bit
      requant verify Llama-3.2-1B-4bit
      requant verify Llama-3.2-1B-4bit --load
      requant verify Llama-3.2-1B Llama-3.2-1B-4bit --part 3/8
    """  # noqa: D301
    from requant.api import verify as verification
    from requant.cli import tables

    with handle_errors(), progress_display(quiet) as progress:
        if folder is None:
            raise UsageError(
                "give the OUTPUT to check, or SOURCE and OUTPUT: requant verify --help"
            )
        result = verification.verify(
            folder, output, part=part, load=load, **options, progress=progress
        )
    with handle_errors():
        if json:
            print_json(result.to_dict())
        elif not quiet or not result.ok:
            tables.show_verification(result)
    if not result.ok:
        raise typer.Exit(EXIT_FAULT)


@with_options("threads")
def compare(
    a: ModelA,
    b: ModelsB,
    *,
    text: Text = None,
    image: ReadImages = None,
    tokens: TextTokens = 8192,
    window: TextWindow = 256,
    cache: Cache = None,
    options: TableOptions,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare two forms of one model, or several with one.

    Prints relative RMS, largest error and cosine of every tensor; A and B may have any format.
    With --text, both predict its tokens: loss and perplexity of each, how far B's predictions
    diverge from A's and how often both agree, each with its standard error. --image adds prompts
    about images, of which the tokens of the text are predicted. Several outputs after A are
    measured on the text in one run, for which A runs once.

    \b
    Examples:
      requant compare Llama-3.2-1B Llama-3.2-1B-4bit
      requant compare Llama-3.2-1B Llama-3.2-1B-4bit --text held-out.txt
      requant compare Llama-3.2-1B Llama-3.2-1B-Q4_K_M.gguf --json
      requant compare Llama-3.2-1B Llama-3.2-1B-4bit Llama-3.2-1B-3bit --text held-out.txt
    """  # noqa: D301
    from requant.api import compare as comparison
    from requant.api import compare_outputs as scoring
    from requant.cli import tables

    settings: TableOptions = {"tokens": tokens, "window": window, **options}
    if len(b) > 1:
        with handle_errors():
            if text is None or image:
                raise UsageError(
                    "several outputs are compared on a text: "
                    + ("leave --image out" if image else "add --text FILE")
                )
            with counting_display(quiet) as progress:
                scores = scoring.compare_outputs(
                    a, b, text, cache=cache, **settings, progress=progress
                )
            if json:
                print_json(scores.to_dict())
            elif not quiet:
                tables.show_scores(scores)
        return
    with handle_errors():
        if cache is not None:
            raise UsageError("--cache is for several outputs after A")
        with counting_display(quiet) as progress:
            result = comparison.compare(
                a, b[0], text=text, images=image or (), **settings, progress=progress
            )
        if json:
            print_json(result.to_dict())
        elif not quiet:
            tables.show_comparison(result)


def report(
    output: Written, html: Html = None, scores: ScoresFile = None, json: Json = False
) -> None:
    """Show what a conversion did, from the record in its OUTPUT.

    --html writes one self-contained page with drawings: layers by treatment, sizes, errors by
    layer and kind, the worst layers, and the origin of everything; with --scores also the size of
    several outputs against their KL divergence from the dense model.

    \b
    Examples:
      requant report Llama-3.2-1B-4bit
      requant report Llama-3.2-1B-4bit --html report.html
    """  # noqa: D301
    from requant.cli import tables
    from requant.reports import html as page
    from requant.reports.record_summary import read_figures
    from requant.reports.scores import read_scores

    with handle_errors():
        if scores is not None and html is None:
            raise UsageError("--scores is drawn in a page: add --html FILE")
        figures = read_figures(output)
        if html is not None:
            found = None if scores is None else read_scores(scores)
            html.write_text(page.render_page(figures, found), "utf-8", "xmlcharrefreplace")
        if json:
            print_json(figures.to_dict())
        elif html is None:
            tables.show_figures(figures)
        else:
            print_stderr(f"{html} written")


def recipes(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME|FILE", help="Show this one.", autocompletion=completion(recipe_names)
        ),
    ] = None,
    json: Json = False,
) -> None:
    """List the recipes that --recipe takes, or show one.

    A TOML recipe is shown as its file, which can be the start of your own.

    \b
    Examples:
      requant recipes
      requant recipes ends-8 > mine.toml
    """  # noqa: D301
    from requant.cli import tables

    with handle_errors():
        chosen = [load_recipe(x) for x in (recipe_names() if name is None else [name])]
        if json:
            print_json({"recipes": [recipe.to_dict() for recipe in chosen]})
        elif name is not None:
            print(recipe_text(chosen[0]), end="")
        else:
            tables.show_recipes(chosen)
