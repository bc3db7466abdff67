"""Results of the commands other than ``plan`` and ``convert``, as lines and tables."""

from __future__ import annotations

import shlex
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from requant.cli.plan_tables import describe_load, show_groups
from requant.cli.table_printer import TablePrinter, without_numbers
from requant.errors import MAX_PROBLEMS_SHOWN, Problem
from requant.text import format_percent, format_seconds, format_size, join_first, pluralize

if TYPE_CHECKING:
    from requant.api.compare import Comparison, LayerComparison
    from requant.api.compare_outputs import OutputScores
    from requant.api.inspect import Inspection, Stored
    from requant.api.upload import Upload
    from requant.api.verify import Verification
    from requant.calibration.block_run import Calibration
    from requant.libraries.load_check import LoadCheck
    from requant.mlx_lm import Generation
    from requant.mlx_lm.evaluation import Estimate, Evaluation
    from requant.quantization.recipes import Recipe
    from requant.reports.record_summary import Figures

_WORST_LINES = 5


def describe_generation(generation: Generation) -> str:
    """Speed of a generation, in one line."""
    x = generation
    return (
        f"{x.tokens:,} tokens, {x.tokens_per_s:,.1f} a second; prompt {x.prompt_tokens:,} tokens, "
        f"{x.prompt_tokens_per_s:,.1f} a second; {x.report.bits_per_weight:.2f} bits per weight; "
        f"ready after {x.load_s:.1f} s"
    )


def show_recipes(recipes: Sequence[Recipe]) -> None:
    """Print one line for each recipe."""
    TablePrinter().columns([(recipe.name, recipe.description) for recipe in recipes], right=())


def show_verification(verification: Verification) -> None:
    """Print the problems of a verification, or that there are none."""
    page = TablePrinter()
    if verification.problems:
        _show_problems(page, verification.output, verification.problems)
    elif verification.tensors:
        compared = (
            f"{pluralize(verification.tensors, 'tensor')}, {format_size(verification.nbytes)}"
        )
        against = (
            f"equal to a conversion of {verification.source}"
            if verification.source
            else "as requant.json says"
        )
        part = "" if verification.part is None else f"part {verification.part}, "
        page.line(f"{verification.output}: {part}{compared}, {against}", "bold")
    else:
        page.line(f"{verification.output}: no requant.json, so nothing was compared")
    if verification.load is not None:
        show_load(page, verification.output, verification.load)


def show_load(page: TablePrinter, output: str, load: LoadCheck) -> None:
    """Print whether a library loads an output, and what was run."""
    if load.problems:
        _show_problems(page, f"{output}, loaded", load.problems)
    else:
        page.line(f"{output}: {describe_load(load)}", "bold")
    for text in load.not_run:
        page.line(f"  not run: {text}", "yellow")


def _show_problems(page: TablePrinter, output: str, problems: Sequence[Problem]) -> None:
    page.line(f"{output}: {pluralize(len(problems), 'problem')}", "bold red")
    for problem in problems[:MAX_PROBLEMS_SHOWN]:
        page.line(f"  {problem}")


def show_calibration(calibration: Calibration) -> None:
    """Print what a calibration collected, and the layers without statistics."""
    page = TablePrinter()
    if calibration.part is not None:
        page.line(
            f"part {calibration.part} is done in {format_seconds(calibration.elapsed_s)}; next, "
            f"when all are: requant join {shlex.quote(calibration.output)}"
        )
        return
    page.line(f"{calibration.output}: {pluralize(calibration.layers, 'layer')}", "bold")
    hessians = f", {pluralize(calibration.hessians, 'Hessian')}" if calibration.hessians else ""
    images = f" ({calibration.images:,} with images)" if calibration.images else ""
    page.line(
        f"  {pluralize(calibration.tokens, 'token')} in "
        f"{pluralize(calibration.windows, 'window')}{images}{hessians}, "
        f"{format_seconds(calibration.elapsed_s)}"
    )
    if calibration.reason:
        page.line(f"  The whole model was in memory: {calibration.reason}.")
    for names, what in (
        (calibration.too_wide, "too wide for a Hessian"),
        (calibration.not_observed, "inputs not seen: no statistics"),
    ):
        if names:
            page.line(f"  {join_first(names)}: {what}.", "yellow")
    for name, unseen in calibration.without_tokens.items():
        page.line(
            f"  {name}: {pluralize(unseen, 'expert')} saw no token; more text helps.", "yellow"
        )
    gptq = " --gptq" if calibration.hessians else ""
    page.line(
        f"  Next: requant convert {calibration.source} OUTPUT --bits 3 --imatrix "
        f"{calibration.output}{gptq}"
    )


def show_figures(figures: Figures) -> None:
    """Print the figures in the record of an output."""
    page = TablePrinter()
    page.line(f"{figures.output} ({pluralize(figures.parameters, 'parameter')})", "bold")
    page.line()
    show_groups(page, figures.groups)
    measured = [kind for kind in figures.kinds if kind.median_rms is not None]
    if measured:
        page.line()
        header = ("kind", "layers", "before", "after", "median error", "worst")
        rows = [
            (
                k.kind,
                f"{k.layers:,}",
                format_size(k.bytes_in),
                format_size(k.bytes_out),
                format_percent(k.median_rms),
                format_percent(k.worst_rms),
            )
            for k in measured
        ]
        page.columns(rows, right=(1, 2, 3, 4, 5), header=header)
        page.line()
        for layer in figures.measured[:_WORST_LINES]:
            page.line(f"worst: {layer.layer}, {format_percent(layer.relative_rms)}, {layer.target}")
    page.line()
    sizes = f"{format_size(figures.bytes_in)} -> {format_size(figures.bytes_out)}"
    page.line(f"{figures.bits_per_weight:.2f} bits per weight, {sizes}")
    page.line(f"from {figures.source_format}, by requant {figures.requant}")
    page.line(f"again: {figures.command(output=figures.output)}")
    page.line(f"check: {figures.verify_command(output=figures.output)}")


def show_comparison(comparison: Comparison) -> None:
    """Print differences of two models: by tensor name, the worst layers, and on the text."""
    page = TablePrinter()
    alike: dict[tuple[str, str, str], list[LayerComparison]] = defaultdict(list)
    for layer in comparison.layers:
        alike[without_numbers(layer.name), layer.a, layer.b].append(layer)
    rows = [
        (
            name,
            a,
            b,
            f"{len(layers):,}",
            format_percent(_largest(layer.relative_rms for layer in layers)),
            f"{max(layer.max_error for layer in layers):.3g}",
            f"{min(1.0 if x.cosine is None else x.cosine for x in layers):.6f}",
        )
        for (name, a, b), layers in alike.items()
    ]
    page.line(f"{comparison.a} ({comparison.bits_per_weight_a:.2f} bits per weight)", "bold")
    page.line(f"{comparison.b} ({comparison.bits_per_weight_b:.2f} bits per weight)", "bold")
    page.line()
    header = ("tensor", "a", "b", "count", "relative RMS", "largest error", "cosine")
    page.names(rows, right=(3, 4, 5, 6), header=header)
    page.line()
    worst = sorted(comparison.layers, key=lambda layer: -(layer.relative_rms or 0.0))
    for layer in worst[:_WORST_LINES]:
        if layer.relative_rms:
            page.line(f"worst: {layer.name}, {format_percent(layer.relative_rms)}")
    if not any(layer.relative_rms or layer.max_error for layer in comparison.layers):
        page.line(f"all {pluralize(len(comparison.layers), 'tensor')} equal")
    nonfinite_layers = [layer.name for layer in comparison.layers if layer.nonfinite]
    if nonfinite_layers:
        page.line(f"NaN or infinite, not counted: {join_first(nonfinite_layers)}", "bold red")
    for side, names in (("A", comparison.only_a), ("B", comparison.only_b)):
        if names:
            page.line(f"only in {side}: {join_first(names)}")
    if comparison.evaluation is not None:
        page.line()
        _show_evaluation(page, comparison.evaluation)


def _largest(numbers: Iterable[float | None]) -> float | None:
    return max((number for number in numbers if number is not None), default=None)


def _show_evaluation(page: TablePrinter, evaluation: Evaluation) -> None:
    def cells(estimate: Estimate, scale: float = 1.0, unit: str = "") -> tuple[str, str]:
        return f"{scale * estimate.value:.4f}{unit}", f"+- {scale * estimate.error:.4f}"

    page.columns(
        [
            ("loss of A, nats", *cells(evaluation.loss_a)),
            ("loss of B, nats", *cells(evaluation.loss_b)),
            ("loss gap, nats", *cells(evaluation.gap)),
            ("perplexity of A", *cells(evaluation.perplexity_a)),
            ("perplexity of B", *cells(evaluation.perplexity_b)),
            ("KL divergence, nats", *cells(evaluation.divergence)),
            ("median of it", *cells(evaluation.divergence_median)),
            ("99th percentile", *cells(evaluation.divergence_p99)),
            ("same likeliest token", *cells(evaluation.same_top, 100, " %")),
        ],
        right=(1, 2),
        header=(f"{evaluation.tokens:,} tokens", "mean", "standard error"),
    )


def show_scores(scores: OutputScores) -> None:
    """Print a line for each output, and how far its predictions are from the dense model's."""
    page = TablePrinter()
    page.line(f"{scores.dense} ({format_size(scores.nbytes)})", "bold")
    page.line()
    rows = [
        (
            score.output,
            format_size(score.nbytes),
            f"{score.bits_per_weight:.2f}",
            _with_error(score.evaluation.divergence, 4),
            _with_error(score.evaluation.divergence_median, 4),
            _with_error(score.evaluation.divergence_p99, 3),
            f"{100 * score.evaluation.same_top.value:.2f} %",
            _with_error(score.evaluation.gap, 4),
        )
        for score in scores.scores
    ]
    header = (
        "output",
        "size",
        "bits",
        "KL",
        "median KL",
        "99th percentile",
        "same top",
        "loss gap",
    )
    page.columns(rows, right=tuple(range(1, len(header))), header=header)
    page.line()
    tokens = scores.scores[0].evaluation.tokens
    page.line(f"{pluralize(tokens, 'token')} of {scores.text}; nats, with standard errors")


def _with_error(estimate: Estimate, digits: int) -> str:
    return f"{estimate.value:.{digits}f} +- {estimate.error:.{digits}f}"


def show_upload(upload: Upload) -> None:
    """Print the card and the files of an upload preview."""
    page = TablePrinter()
    page.line(upload.card)
    page.line(f"would upload to {upload.repository}:", "bold")
    page.columns([(name, format_size(size)) for name, size in upload.files.items()], right=(1,))


def show_inspection(inspection: Inspection) -> None:
    """Print layers, files and problems of a checkpoint."""
    page = TablePrinter()
    model = f", model_type {inspection.model_type}" if inspection.model_type else ""
    page.line(f"{inspection.source}: {inspection.format} ({inspection.evidence}){model}", "bold")
    if inspection.layers:
        page.line()
        page.columns(
            [
                (encoding, f"{layers:,}", f"{parameters:,}", format_size(nbytes))
                for encoding, (layers, parameters, nbytes) in inspection.encodings.items()
            ],
            right=(1, 2, 3),
            header=("stored as", "layers", "parameters", "size"),
        )
        page.line()
        _show_names(page, inspection.layers)
        page.line()
        bits = 8 * inspection.nbytes / inspection.parameters if inspection.parameters else 0.0
        page.line(
            f"{bits:.2f} bits per weight, {pluralize(inspection.parameters, 'parameter')}, "
            f"{format_size(inspection.nbytes)} in {pluralize(len(inspection.files), 'weight file')}"
        )
    if inspection.side_files:
        page.line(f"other files: {join_first(inspection.side_files, 8)}")
    for name, reason in inspection.left_out:
        page.line(f"not copied: {name} ({reason})")
    if inspection.problems:
        page.line()
        page.line(f"{pluralize(len(inspection.problems), 'problem')}:", "bold red")
        for problem in inspection.problems:
            page.line(f"  {problem}")
    else:
        page.line("no problems found")


def _show_names(page: TablePrinter, layers: Sequence[Stored]) -> None:
    """Print the names that ``--only`` and ``--override`` match, with ``*`` for numbers."""
    alike: dict[tuple[str, str, tuple[int, ...]], list[Stored]] = defaultdict(list)
    for layer in layers:
        alike[without_numbers(layer.layer), layer.encoding, layer.shape].append(layer)
    rows = [
        (
            name,
            encoding,
            " x ".join(map(str, shape)) or "scalar",
            f"{len(group):,}",
            format_size(sum(layer.nbytes for layer in group)),
        )
        for (name, encoding, shape), group in alike.items()
    ]
    header = ("name", "stored as", "shape", "layers", "size")
    page.names(rows, right=(3, 4), header=header)
