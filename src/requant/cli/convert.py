"""Commands that convert or run a model: convert, plan, generate, calibrate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from requant.cli import options as arg
from requant.cli.error_handling import handle_errors, print_json, print_stderr
from requant.cli.options import TableOptions, options_of_command, with_options
from requant.cli.progress import counting_display, progress_display
from requant.cli.upload import send
from requant.errors import UsageError
from requant.text import escape_control_chars

if TYPE_CHECKING:
    from requant.calibration.block_run import Calibration
    from requant.reports.report import Report


@with_options(*options_of_command("convert"))
def convert(
    source: arg.Source,
    output: arg.Output,
    *,
    options: TableOptions,
    upload_to: arg.UploadTo = None,
    private: arg.Private = False,
    branch: arg.Branch = None,
    pull_request: arg.PullRequest = False,
    dry_run: arg.DryRun = False,
    json: arg.Json = False,
    quiet: arg.Quiet = False,
) -> None:
    """Write SOURCE as an MLX checkpoint folder OUTPUT.

    A quantized source is kept as it is unless --bits, --mode or --dequantize say
    otherwise; a dense one becomes affine, 4 bits, group 64 unless they do.

    \b
    Examples:
      requant convert Llama-3.2-1B out --bits 4
      requant convert Llama-3.2-1B out --mode mxfp4
      requant convert Llama-3.2-1B out --bits 4 --override 'embed_tokens=6'
      requant convert Mixtral-8x7B out --bits 4 --layout mlx-lm
      requant convert Qwen3-30B-A3B out --recipe mixed_3_6
      requant convert Llama-3.2-1B out --bits 3 --calibrate
      requant convert Llama-3.2-1B out --bits 4 --quality balanced
      requant convert Llama-3.2-1B out --bits 3 --search best
      requant convert Llama-3.2-1B out --bits 3 --imatrix imatrix.gguf
      requant convert Llama-3.2-1B out --bits 3 --gptq --imatrix stats.safetensors
      requant convert Llama-3.2-1B out --budget 4 --search best
      requant convert Llama-3-8B-AWQ out
      requant convert Llama-3.2-1B-Q4_K_M.gguf out
      requant convert mlx-4bit out --dequantize --dtype bfloat16
      requant convert Llama-3.2-1B out --bits 4 --upload mlx-community/ --dry-run
      requant convert Llama-3.2-1B out --bits 4 --part 3/8

    SOURCE may be a repository on the hub; it is downloaded once its headers hold no problem.
    Stopped (Ctrl-C, kill, a full disk), the same command resumes where it was.
    """  # noqa: D301
    from requant.api import convert as conversion
    from requant.api import upload as publishing

    uploading: TableOptions = {"private": private, "branch": branch, "pull_request": pull_request}
    with handle_errors():
        for name, value in uploading.items():
            if value and upload_to is None:
                flag = f"--{name.replace('_', '-')}"
                raise UsageError(f"{flag} is for an upload: add --upload ORG/NAME")
        publishing.check_branch(branch, pull_request)
        if upload_to is not None and options["part"] is not None:
            raise UsageError("--part writes no whole OUTPUT: requant upload OUTPUT after the join")
        if options["yes"] and not options["consume_source"]:
            raise UsageError("--yes confirms --consume-source: add that")
    uploading["force"] = force = options["force"]
    if dry_run:
        _show_plan(
            source, _options_of_plan(options), json, quiet, output, force=force, upload_to=upload_to
        )
        return
    with handle_errors():
        if upload_to is not None:
            is_completed = upload_to.endswith("/")
            upload_to = publishing.planned_name(upload_to, source, output, **options)
            if is_completed and not quiet:
                print_stderr(f"will upload to {upload_to}")
            publishing.check_ready(upload_to, **uploading)
    with handle_errors():
        cost = conversion.calibration_cost(source, **_options_of_plan(options))
        if cost is not None and not quiet:
            print_stderr(str(cost))
    with handle_errors(), progress_display(quiet) as progress:
        report = conversion.convert(source, output, **options, progress=progress)
    if upload_to is not None:
        send(output, upload_to, uploading, quiet=quiet, resumes=False)
    with handle_errors():
        _show_result(report, json, quiet)


def _show_result(report: Report, json: bool, quiet: bool) -> None:
    """Print the report of a conversion."""
    from requant.cli import plan_tables

    if json:
        print_json(report.to_dict())
    elif not quiet:
        plan_tables.show_report(report)
    if json or quiet:
        for warning in plan_tables.warnings(report):
            print_stderr(f"warning: {warning}")


@with_options("force", "verify_load", "max_memory", "threads")
def join(
    output: arg.Begun,
    *,
    source: arg.MovedSource = None,
    options: TableOptions,
    json: arg.Json = False,
    quiet: arg.Quiet = False,
) -> None:
    """Complete an OUTPUT that parts of convert or calibrate began.

    Checks that all parts are of one conversion, does what is missing, and publishes OUTPUT
    under its name. Parts may have run in any order, twice, or not at all: the result has the
    same bytes as a conversion by one process. Stopped, the same command resumes. Of a
    calibration all parts must be done.

    \b
    Examples:
      requant convert Llama-3.2-1B out --bits 4 --part 1/2
      requant convert Llama-3.2-1B out --bits 4 --part 2/2
      requant join out
      requant join stats.safetensors
    """  # noqa: D301
    from requant.api import join as joining
    from requant.reports.report import Report

    with handle_errors(), progress_display(quiet) as progress:
        report = joining.join(output, source=source, **options, progress=progress)
    with handle_errors():
        if isinstance(report, Report):
            _show_result(report, json, quiet)
        elif report is not None:
            _show_calibration(report, json, quiet)
        elif not quiet:
            print_stderr(f"{output} is complete already")


@with_options(*options_of_command("plan"))
def plan(source: arg.Source, *, options: TableOptions, json: arg.Json = False) -> None:
    """Show what convert would write: layers, modes, sizes and memory.

    Reads headers and config.json only; --budget also reads and measures the weights. --json
    prints the whole plan: every tensor to read and to write, with file and offset.

    \b
    Examples:
      requant plan Llama-3.2-1B --bits 4
      requant plan Llama-3.2-1B --bits 4 --only 'mlp' --override 'down_proj=6'
      requant plan Llama-3.2-1B --budget 4.5 --save-recipe mine.toml
    """  # noqa: D301
    _show_plan(source, options, json)


@with_options(*options_of_command("generate"))
def generate(
    source: arg.Source,
    prompt: arg.Prompt,
    *,
    image: arg.Images = None,
    max_tokens: arg.MaxTokens = 100,
    raw: arg.Raw = False,
    options: TableOptions,
    json: arg.Json = False,
    quiet: arg.Quiet = False,
) -> None:
    """Convert SOURCE in memory and continue a prompt with it.

    Shows the quality of a conversion before or after it is written; needs mlx-lm, and with
    --image mlx-vlm. Options and weights are those of convert. The most likely token is taken
    at each step, so the same model gives the same text.

    \b
    Examples:
      requant generate Llama-3.2-1B-4bit --prompt "What is a file?"
      requant generate Llama-3.2-1B --bits 4 --prompt "What is a file?" --max-tokens 50
      requant generate Qwen2-VL-2B --bits 4 --image cat.png --prompt "What is this?"
    """  # noqa: D301
    from requant import mlx_lm
    from requant.cli import plan_tables, tables

    def show(text: str) -> None:
        print(escape_control_chars(text.expandtabs(4)), end="", flush=True)

    with handle_errors():
        library: Any = mlx_lm
        images: dict[str, list[Path]] = {}
        if image:
            library, images = _mlx_vlm(source), {"images": image}
            library.check_images(image)
        with progress_display(quiet) as progress:
            loaded = library.load_with_report(source, **options, progress=progress)
        for warning in plan_tables.warnings(loaded.report):
            print_stderr(f"warning: {warning}")
        generation = library.generate(
            loaded,
            prompt,
            **images,
            max_tokens=max_tokens,
            raw=raw,
            on_text=None if json else show,
        )
        if json:
            print_json(generation.to_dict())
            return
        print(flush=True)
        if not quiet:
            print_stderr(tables.describe_generation(generation))


@with_options("revision", "config_from", "threads", "force", "resume")
def calibrate(
    model: arg.Calibrated,
    output: arg.StatisticsFile,
    *,
    text: arg.Texts = None,
    image: arg.ReadImages = None,
    hessian: arg.Hessian = False,
    tokens: arg.TextTokens = 32_768,
    window: arg.TextWindow = 512,
    seed: arg.Seed = 0,
    part: arg.PartOfText = None,
    options: TableOptions,
    json: arg.Json = False,
    quiet: arg.Quiet = False,
) -> None:
    """Run a model over a text and write statistics of its layers.

    The statistics describe the inputs of each layer and weight the scale search of convert
    --imatrix FILE. Give text like that which the model will process, but not the text of an
    evaluation. Needs mlx-lm; of a model that takes images, the language model is run, in mlx-vlm
    if mlx-lm has no class for it. One block's weights are in memory at a time. Stopped, the same
    command resumes where it was. With --image, or with images in a .jsonl, the statistics are of
    text and images, and the whole model is in memory.

    \b
    Examples:
      requant calibrate Llama-3.2-1B -o stats.safetensors --text notes.txt
      requant calibrate Llama-3.2-1B -o stats.safetensors --text chats.jsonl --hessian
      requant calibrate Llama-3.2-1B -o stats.safetensors --hessian --part 1/8
      requant calibrate Qwen2-VL-2B -o stats.safetensors --text notes.txt --image photos/
      requant convert Llama-3.2-1B out --bits 3 --imatrix stats.safetensors
    """  # noqa: D301
    from requant.calibration import block_run

    with handle_errors():
        with counting_display(quiet) as progress:
            calibration = block_run.calibrate(
                model,
                output,
                text,
                images=image or (),
                hessian=hessian,
                tokens=tokens,
                window=window,
                seed=seed,
                part=part,
                **options,
                progress=progress,
                on_note=lambda note: print_stderr(f"warning: {note}"),
            )
        _show_calibration(calibration, json, quiet)


def _show_calibration(calibration: Calibration, json: bool, quiet: bool) -> None:
    """Print what was collected."""
    from requant.cli import tables

    if json:
        print_json(calibration.to_dict())
    elif not quiet:
        tables.show_calibration(calibration)


def _mlx_vlm(source: Path) -> Any:
    """``requant.mlx_vlm``, if the library is installed."""
    from requant import mlx_vlm
    from requant.libraries.loading import check_installed

    check_installed(source, "mlx-vlm")
    return mlx_vlm


def _options_of_plan(options: TableOptions) -> TableOptions:
    """Of the options of ``convert`` those that ``plan`` has."""
    return {name: options[name] for name in options_of_command("plan")}


def _show_plan(
    source: Path,
    options: TableOptions,
    json: bool,
    quiet: bool = False,
    output: Path | None = None,
    force: bool = False,
    upload_to: str | None = None,
) -> None:
    """Plan and print the plan; with an ``output``, check too that it can be written."""
    from requant.api import convert as conversion
    from requant.api import upload as publishing
    from requant.cli import plan_tables
    from requant.execution.resources import plan_resources
    from requant.output.preflight import check_place, room_for
    from requant.planning.release_order import peak_disk_bytes

    with handle_errors():
        with progress_display(quiet or options["budget"] is None) as progress:
            plan = conversion.plan(source, **options, progress=progress)
        if upload_to is not None and output is not None:
            upload_to = publishing.planned_name(upload_to, source, output, plan, **options)
        cost = conversion.calibration_cost(source, **options)
        limits = plan_resources(plan, options["threads"], options["max_memory"])
        room = None
        if output is not None:
            check_place(plan, output, force)
            room = room_for(plan, output)
        if json:
            disk = {
                "extra_bytes": sum(shard.nbytes for shard in plan.shards),
                "extra_bytes_with_consume_source": peak_disk_bytes(plan),
                **({"missing_bytes": room.missing} if room and room.missing else {}),
            }
            memory = {x: getattr(limits, x) for x in ("peak_bytes", "threads", "chunk_bytes")}
            more: TableOptions = {} if upload_to is None else {"upload": upload_to}
            more |= {} if cost is None else {"calibration": cost.to_dict()}
            print_json(plan.document() | {"memory": memory, "disk": disk} | more)
        elif not quiet:
            plan_tables.show_plan(plan, limits, output, upload_to)
            if cost is not None:
                print(cost)
        if room is not None and room.missing:
            print_stderr(f"warning: the disk is too full: {room}, {room.missing:,} are missing")
