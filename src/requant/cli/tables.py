"""What a command found, as lines and tables on standard output.

Rich is imported inside functions: ``--help`` and ``--version`` do not wait for it.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from requant.cli.text_format import escape_control_chars, format_seconds, format_size
from requant.errors import MAX_PROBLEMS_SHOWN
from requant.planning.plan import Treatment
from requant.planning.release_order import peak_disk_bytes
from requant.reports.record_summary import percent
from requant.reports.run_command import command_of
from requant.text import join_first, pluralize

if TYPE_CHECKING:
    from rich.console import RenderableType

    from requant.api.compare import Comparison, LayerComparison
    from requant.api.inspect import Inspection, Stored
    from requant.api.upload import Upload
    from requant.api.verify import Verification
    from requant.calibration.block_run import Calibration
    from requant.execution.resources import ResourceLimits
    from requant.mlx_lm import Generation
    from requant.mlx_lm.evaluation import Estimate, Evaluation
    from requant.planning.plan import LayerPlan, Plan
    from requant.quantization.recipes import Recipe
    from requant.reports.record_summary import Figures
    from requant.reports.report import LayerError, LayerGroup, Report

_REASON_LINES = 10
# Layers with a reason, by what becomes of them; those that stay dense come first.
_REASON_TITLES = (
    (Treatment.QUANTIZED, "another group size:"),
    (Treatment.KEPT, "kept, but stored otherwise:"),
    (Treatment.REQUANTIZED, "requantized:"),
)
_FILE_LINES = 4
_NAME_LINES = 40
_WORST_LINES = 5
_GAP = 2  # spaces between columns
_FOLDED_COLUMNS = 24  # a column is not folded to less than this
_NO_WIDTH = 1 << 16


def describe_generation(made: Generation) -> str:
    """How fast a model spoke, in a line."""
    return (
        f"{made.tokens:,} tokens, {made.tokens_per_s:,.1f} a second; prompt {made.prompt_tokens:,} "
        f"tokens, {made.prompt_tokens_per_s:,.1f} a second; "
        f"{made.report.bits_per_weight:.2f} bits per weight; ready after {made.load_s:.1f} s"
    )


def _without_numbers(path: str) -> str:
    """``model.layers.3.mlp.gate`` -> ``model.layers.*.mlp.gate``."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", path)


class _TablePrinter:
    """Lines and aligned columns on standard output."""

    def __init__(self) -> None:
        from rich.console import Console

        class Laying(Console):
            """Lays out; that a pipe is closed is the caller's to answer."""

            def on_broken_pipe(self) -> None:
                raise  # the BrokenPipeError that is being handled

        # A pipe has no width, and on a terminal long lines continue on the next: nothing is cut.
        self.width = Console().width if sys.stdout.isatty() else _NO_WIDTH
        self.console = Laying(markup=False, highlight=False, emoji=False, width=_NO_WIDTH)

    def line(self, text: str = "", style: str | None = None) -> None:
        """Print one line, however long."""
        self._print(escape_control_chars(text), style=style, soft_wrap=True)

    def columns(
        self, rows: Sequence[Sequence[str]], right: Sequence[int], header: Sequence[str] = ()
    ) -> None:
        """Print rows as columns; those whose index is in ``right`` are right-aligned.

        Where a terminal is a bit too narrow, the longest texts continue on a second line.
        """
        from rich.cells import cell_len
        from rich.table import Table

        reported = [*rows, header] if header else rows
        widths = [
            max(cell_len(escape_control_chars(cell)) for cell in cells)
            for cells in zip(*reported, strict=True)
        ]
        texts = [index for index in range(len(widths)) if index not in right]
        longest = max(texts, key=lambda index: widths[index], default=-1)
        excess = sum(widths) + _GAP * (len(widths) - 1) - self.width
        if texts and excess > 0 and widths[longest] - excess >= _FOLDED_COLUMNS:
            widths[longest] -= excess
        table = Table(box=None, pad_edge=False, show_header=bool(header), padding=(0, _GAP, 0, 0))
        for index, width in enumerate(widths):
            table.add_column(
                header[index] if header else "",
                justify="right" if index in right else "left",
                width=width,
                overflow="fold",
            )
        for row in rows:
            table.add_row(*(escape_control_chars(cell) for cell in row))
        self._print(table)

    def _print(self, content: RenderableType, **how: Any) -> None:
        # Rich only lays out: it pads lines with spaces.
        with self.console.capture() as captured:
            self.console.print(content, **how)
        for line in captured.get().splitlines():
            print(line.rstrip())


def show_plan(plan: Plan, budget: ResourceLimits, output: Path | None = None) -> None:
    """Print what a conversion would do.

    Args:
        plan: What would be done.
        budget: The threads and memory it would run with.
        output: Folder that a dry run was asked to write.
    """
    page = _TablePrinter()
    page.line(f"{_title(plan)}{f' -> {output}' if output else ''}", "bold")
    _show_layers(page, plan)
    page.line()
    page.line(_sizes(plan))
    page.line(
        f"memory {format_size(budget.peak_bytes)} at most, {pluralize(budget.threads, 'thread')}"
    )
    page.line(
        f"disk {format_size(sum(shard.nbytes for shard in plan.shards))} next to the source, "
        f"{format_size(peak_disk_bytes(plan))} at a time with --consume-source"
    )
    if output is not None:
        page.line("dry run: nothing was written")


def show_report(report: Report) -> None:
    """Print what a conversion did, and what to type next."""
    page, plan = _TablePrinter(), report.plan
    page.line(f"{_title(plan)} -> {report.output}", "bold")
    _show_layers(page, plan)
    for warning in warnings(report):
        page.line(f"warning: {warning}", "yellow")
    page.line()
    if report.errors:
        page.line(_error_summary(report.errors))
    rate = format_size(plan.bytes_in / max(report.elapsed_s, 1e-9))
    came = report.bytes_downloaded
    downloaded = f", {format_size(came)} downloaded" if came else ""
    page.line(f"{_sizes(plan)}, {format_seconds(report.elapsed_s)}, {rate}/s{downloaded}")
    if command := command_of(plan, report.output):
        page.line(f"next: {command}")


def show_recipes(recipes: Sequence[Recipe]) -> None:
    """Print one line a recipe."""
    _TablePrinter().columns([(recipe.name, recipe.description) for recipe in recipes], right=())


def _title(plan: Plan) -> str:
    return f"{plan.source} ({plan.format}, {pluralize(plan.parameters, 'parameter')})"


def _sizes(plan: Plan) -> str:
    share = 100 * plan.bytes_out / plan.bytes_in if plan.bytes_in else 100.0
    return (
        f"{plan.bits_per_weight:.2f} bits per weight, {format_size(plan.bytes_in)} -> "
        f"{format_size(plan.bytes_out)} ({share:.0f} %)"
    )


def _error_summary(errors: Mapping[str, LayerError]) -> str:
    """The quantization error of new codes: the layer in the middle, and the worst one by name."""
    ranked = sorted(errors, key=lambda layer: errors[layer].relative_rms)
    middle, worst = (errors[ranked[n]].relative_rms for n in (len(ranked) // 2, -1))
    return (
        f"re-encoded with a relative error (rms) of {100 * middle:.2g} % in the median layer, "
        f"{100 * worst:.2g} % in the worst ({ranked[-1]})"
    )


def _show_layers(page: _TablePrinter, plan: Plan) -> None:
    """The part that a plan and a report share: what becomes of the layers, and why."""
    from requant.reports.report import group_layers, quantizable_but_dense

    page.line()
    _show_groups(page, group_layers(plan.layers))
    _show_reasons(page, "stays dense:", quantizable_but_dense(plan.layers))
    for treatment, title in _REASON_TITLES:
        found = [x for x in plan.layers if x.reason and x.treatment is treatment]
        _show_reasons(page, title, found)
    rounded = [x for x in plan.layers if x.bound]
    _show_reasons(page, "rounded:", rounded, lambda layer: layer.bound)
    if plan.notes or plan.left_out or plan.dropped:
        page.line()
    for note in plan.notes:
        page.line(f"note: {note.text}")
    for reason, names in _by_reason(plan.dropped).items():
        kinds = list(dict.fromkeys(map(_without_numbers, names)))
        page.line(f"dropped: {pluralize(len(names), 'tensor')} ({reason}): {join_first(kinds, 3)}")
    for name, reason in plan.left_out[:_FILE_LINES]:
        page.line(f"left out: {name} ({reason})")
    if len(plan.left_out) > _FILE_LINES:
        page.line(f"left out: {pluralize(len(plan.left_out) - _FILE_LINES, 'more file')}")


def _show_groups(page: _TablePrinter, groups: Iterable[LayerGroup]) -> None:
    """Layers that were treated alike, a line each."""
    header = ("treatment", "from", "to", "exactness", "layers", "parameters", "size")
    rows = [
        (
            group.treatment,
            group.source,
            group.target,
            group.exactness,
            f"{group.layers:,}",
            f"{group.parameters:,}",
            format_size(group.nbytes),
        )
        for group in groups
    ]
    page.columns(rows, right=(4, 5, 6), header=header)


def _by_reason(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for name, reason in pairs:
        found[reason].append(name)
    return found


def _reason_text(layer: LayerPlan) -> str:
    return layer.reason.text if layer.reason else ""


def _show_reasons(
    page: _TablePrinter,
    title: str,
    layers: Sequence[LayerPlan],
    text_of: Callable[[LayerPlan], str] = _reason_text,
) -> None:
    """One line a reason, largest first: how many layers, how large, which names."""
    if not layers:
        return
    alike: dict[str, list[LayerPlan]] = defaultdict(list)
    for layer in layers:
        alike[text_of(layer)].append(layer)
    found = sorted(alike.items(), key=lambda item: -sum(x.nbytes for x in item[1]))
    rows = [
        (
            f"  {pluralize(len(group), 'layer')}",
            format_size(sum(x.nbytes for x in group)),
            reason,
            join_first(list(dict.fromkeys(_without_numbers(x.layer) for x in group)), 2),
        )
        for reason, group in found[:_REASON_LINES]
    ]
    page.line()
    page.line(title)
    page.columns(rows, right=(0, 1))
    more = sum(len(group) for _, group in found[_REASON_LINES:])
    if more:
        page.line(f"  and {pluralize(more, 'more layer')}")


def warnings(report: Report) -> list[str]:
    """What the kernels found on the way that changes values, one sentence a kind."""
    sentences = {
        "overflowed": ("value", "became infinite: too large for the dtype asked for"),
        "flushed_groups": ("group", "became zero: too small for the scales of the mode"),
        "nonfinite": ("value", "NaN or infinite: the layer stays dense"),
        "damaged": ("scale or value", "NaN or infinite in the source, and left so"),
    }
    found = []
    for key, (word, what) in sentences.items():
        hits = {layer: c[key] for layer, c in report.findings.items() if c.get(key)}
        if hits:
            names = join_first(sorted(hits, key=lambda layer: -hits[layer]))
            found.append(f"{pluralize(sum(hits.values()), word)} {what} (in {names})")
    return found


def show_verification(verification: Verification) -> None:
    """Print what a verification found."""
    page = _TablePrinter()
    compared = f"{pluralize(verification.tensors, 'tensor')}, {format_size(verification.nbytes)}"
    if verification.problems:
        page.line(
            f"{verification.output}: {pluralize(len(verification.problems), 'problem')}", "bold red"
        )
        for problem in verification.problems[:MAX_PROBLEMS_SHOWN]:
            page.line(f"  {problem}")
        return
    against = (
        f"equal to a conversion of {verification.source}"
        if verification.source
        else "as requant.json says"
    )
    page.line(f"{verification.output}: {compared}, {against}", "bold")


def show_calibration(calibration: Calibration) -> None:
    """Print what a calibration collected, and what it did not."""
    page = _TablePrinter()
    page.line(f"{calibration.output}: {pluralize(calibration.layers, 'layer')}", "bold")
    hessians = f", {pluralize(calibration.hessians, 'Hessian')}" if calibration.hessians else ""
    page.line(
        f"  {pluralize(calibration.tokens, 'token')} in "
        f"{pluralize(calibration.windows, 'window')}{hessians}, "
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
    """Print what the record of an output says."""
    page = _TablePrinter()
    page.line(f"{figures.output} ({pluralize(figures.parameters, 'parameter')})", "bold")
    page.line()
    _show_groups(page, figures.groups)
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
                percent(k.median_rms),
                percent(k.worst_rms),
            )
            for k in measured
        ]
        page.columns(rows, right=(1, 2, 3, 4, 5), header=header)
        page.line()
        for layer in figures.measured[:_WORST_LINES]:
            page.line(f"worst: {layer.layer}, {percent(layer.relative_rms)}, {layer.target}")
    page.line()
    sizes = f"{format_size(figures.bytes_in)} -> {format_size(figures.bytes_out)}"
    page.line(f"{figures.bits_per_weight:.2f} bits per weight, {sizes}")
    page.line(f"from {figures.source_format}, by requant {figures.requant}")
    page.line(f"again: {figures.command(output=figures.output)}")
    page.line(f"check: {figures.verify_command(output=figures.output)}")


def show_comparison(comparison: Comparison) -> None:
    """Print how two models differ: layers of a name together, the worst, and the text."""
    page = _TablePrinter()
    alike: dict[tuple[str, str, str], list[LayerComparison]] = defaultdict(list)
    for layer in comparison.layers:
        alike[_without_numbers(layer.name), layer.a, layer.b].append(layer)
    rows = [
        (
            name,
            a,
            b,
            f"{len(layers):,}",
            percent(_largest(layer.relative_rms for layer in layers)),
            f"{max(layer.max_error for layer in layers):.3g}",
            f"{min(1.0 if x.cosine is None else x.cosine for x in layers):.6f}",
        )
        for (name, a, b), layers in alike.items()
    ]
    page.line(f"{comparison.a} ({comparison.bits_per_weight_a:.2f} bits per weight)", "bold")
    page.line(f"{comparison.b} ({comparison.bits_per_weight_b:.2f} bits per weight)", "bold")
    page.line()
    header = ("tensor", "a", "b", "count", "relative RMS", "largest error", "cosine")
    page.columns(rows[:_NAME_LINES], right=(3, 4, 5, 6), header=header)
    if len(rows) > _NAME_LINES:
        page.line(f"and {len(rows) - _NAME_LINES:,} more names; --json lists all")
    page.line()
    worst = sorted(comparison.layers, key=lambda layer: -(layer.relative_rms or 0.0))
    for layer in worst[:_WORST_LINES]:
        if layer.relative_rms:
            page.line(f"worst: {layer.name}, {percent(layer.relative_rms)}")
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


def _show_evaluation(page: _TablePrinter, found: Evaluation) -> None:
    def reported(estimate: Estimate, scale: float = 1.0, unit: str = "") -> tuple[str, str]:
        return f"{scale * estimate.value:.4f}{unit}", f"+- {scale * estimate.error:.4f}"

    page.columns(
        [
            ("loss of A, nats", *reported(found.loss_a)),
            ("loss of B, nats", *reported(found.loss_b)),
            ("loss gap, nats", *reported(found.gap)),
            ("perplexity of A", *reported(found.perplexity_a)),
            ("perplexity of B", *reported(found.perplexity_b)),
            ("KL divergence, nats", *reported(found.divergence)),
            ("same likeliest token", *reported(found.same_top, 100, " %")),
        ],
        right=(1, 2),
        header=(f"{found.tokens:,} tokens", "mean", "standard error"),
    )


def show_upload(found: Upload) -> None:
    """Print what an upload would send."""
    page = _TablePrinter()
    page.line(found.card)
    page.line(f"would upload to {found.repository}:", "bold")
    page.columns([(name, format_size(size)) for name, size in found.files.items()], right=(1,))


def show_inspection(inspection: Inspection) -> None:
    """Print what a folder holds."""
    page = _TablePrinter()
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


def _show_names(page: _TablePrinter, layers: Sequence[Stored]) -> None:
    """The names that ``--only`` and ``--override`` can match, numbers as ``*``."""
    alike: dict[tuple[str, str, tuple[int, ...]], list[Stored]] = defaultdict(list)
    for layer in layers:
        alike[_without_numbers(layer.layer), layer.encoding, layer.shape].append(layer)
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
    page.columns(rows[:_NAME_LINES], right=(3, 4), header=header)
    if len(rows) > _NAME_LINES:
        page.line(f"and {len(rows) - _NAME_LINES:,} more names; --json lists all")
