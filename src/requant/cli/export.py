"""The command that writes another tool's format: export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from requant.cli import options as arg
from requant.cli.error_handling import handle_errors, print_json
from requant.cli.options import TableOptions, completion, with_options
from requant.cli.progress import progress_display
from requant.quantization.export_options import ExportFormat, Otherwise
from requant.text import join_or

_To = Annotated[
    str,
    typer.Option(
        "--to",
        metavar="FORMAT",
        help=f"Format to write: {join_or([*map(str, ExportFormat)])}.",
        autocompletion=completion(lambda: [*ExportFormat]),
    ),
]
_Otherwise = Annotated[
    str,
    typer.Option(
        "--otherwise",
        metavar="CHOICE",
        help="What becomes of a layer that the format cannot hold with its codes: refuse writes "
        "nothing and lists all of them, widen writes its codes, or where they do not fit "
        "new ones, in more bits, dense decodes it.",
        autocompletion=completion(lambda: [*Otherwise]),
    ),
]


@with_options("force", "resume", "max_memory", "threads")
def export(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE",
            help="MLX folder, or a checkpoint of any quantized format.",
            show_default=False,
        ),
    ],
    output: arg.Output,
    *,
    to: _To,
    otherwise: _Otherwise = "refuse",
    options: TableOptions,
    dry_run: arg.DryRun = False,
    json: arg.Json = False,
    quiet: arg.Quiet = False,
) -> None:
    """Write a quantized checkpoint in another tool's format.

    Codes and scales stay as they are. The scales and biases of every layer are read first:
    a layer is exact where the format's integer zero points give each bias, rounded where the
    two differ by one rounding. Embeddings, output heads and routers are written dense.
    Stopped, the same command resumes.

    \b
    Examples:
      requant export Llama-3.2-1B-4bit for-vllm --to compressed-tensors
      requant export Llama-3.2-1B-4bit for-vllm --to compressed-tensors --dry-run
      requant export Qwen3-4B-mixed for-vllm --to gptq --otherwise widen
      requant export Llama-3.2-1B-AWQ gptq --to gptq
      requant export Llama-3.2-1B-4bit model.gguf --to gguf
    """  # noqa: D301
    from requant.api import export as exporting
    from requant.cli import plan_tables
    from requant.execution.resources import plan_resources

    if dry_run:
        with handle_errors():
            plan = exporting.export_plan(
                source, output, to=to, otherwise=otherwise, force=options["force"]
            )
            if json:
                print_json(plan.document())
            else:
                limits = plan_resources(plan, options["threads"], options["max_memory"])
                plan_tables.show_plan(plan, limits, output)
        return
    with handle_errors(), progress_display(quiet) as progress:
        report = exporting.export(
            source, output, to=to, otherwise=otherwise, **options, progress=progress
        )
    with handle_errors():
        if json:
            print_json(report.to_dict())
        elif not quiet:
            plan_tables.show_report(report)
