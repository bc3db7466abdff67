"""Tables of a plan and of a conversion's report."""

from __future__ import annotations

import shlex
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from requant.cli.table_printer import TablePrinter, without_numbers
from requant.planning.plan import Treatment
from requant.planning.release_order import peak_disk_bytes
from requant.reports.library_usage import command_of
from requant.text import format_percent, format_seconds, format_size, join_first, pluralize

if TYPE_CHECKING:
    from requant.execution.resources import ResourceLimits
    from requant.libraries.load_check import LoadCheck
    from requant.planning.plan import LayerPlan, Plan
    from requant.quantization.part import Part
    from requant.reports.report import LayerError, LayerGroup, Report

_REASON_LINES = 10
# Titles of layers with a reason, by treatment; those that stay dense come before.
_REASON_TITLES = (
    (Treatment.QUANTIZED, "another group size:"),
    (Treatment.KEPT, "kept, but stored otherwise:"),
    (Treatment.REQUANTIZED, "requantized:"),
    (Treatment.DEQUANTIZED, "dequantized:"),
)
_FILE_LINES = 4


def show_plan(
    plan: Plan, budget: ResourceLimits, output: Path | None = None, upload_to: str | None = None
) -> None:
    """Print what a conversion would do; ``output`` and ``upload_to`` are those of ``--dry-run``."""
    page = TablePrinter()
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
    if upload_to is not None:
        page.line(f"would upload to {upload_to}")
    if output is not None:
        page.line("dry run: nothing was written")


def show_report(report: Report) -> None:
    """Print what a conversion did, and what to type next."""
    page, plan = TablePrinter(), report.plan
    if report.unmeasured:
        page.line(
            f"part {report.part} is measured, {pluralize(report.unmeasured, 'layer')} of other "
            "parts not yet; next, when all parts are: the same command again"
        )
        return
    if report.unchecked:
        page.line(
            f"part {report.part} was computed once without errors, "
            f"{pluralize(report.unchecked, 'part')} not yet, and nothing of the source is deleted "
            "before; next, when all are: the same command again"
        )
        return
    part = "" if report.part is None else f", part {report.part}"
    page.line(f"{_title(plan)} -> {report.output}{part}", "bold")
    _show_layers(page, plan)
    for warning in warnings(report):
        page.line(f"warning: {warning}", "yellow")
    page.line()
    if report.errors:
        page.line(_error_summary(report.errors))
    if report.rounding:
        page.line(_rounding_summary(report.rounding))
    rate = format_size(plan.bytes_in / max(report.elapsed_s, 1e-9))
    nbytes = report.bytes_downloaded
    downloaded = f", {format_size(nbytes)} downloaded" if nbytes else ""
    page.line(f"{_sizes(plan)}, {format_seconds(report.elapsed_s)}, {rate}/s{downloaded}")
    if report.part is not None:
        page.line(_next_of_part(report.part, report.output))
        return
    if report.load is not None:
        page.line(describe_load(report.load))
    if command := command_of(plan, report.output):
        page.line(f"next: {command}")


def _next_of_part(part: Part, output: str) -> str:
    """What to type after a part."""
    if part.count == 1:
        return f"next: requant join {shlex.quote(output)}"
    return f"next, when all {part.count} parts are done: requant join {shlex.quote(output)}"


def describe_load(load: LoadCheck) -> str:
    """A check of loading without problems, in one line."""
    loaded = f"loads in {load.library} {load.version}"
    if not load.ran:
        return f"{loaded}; no forward pass was run"
    return f"{loaded}; {'; '.join(load.ran)}: all {load.logits:,} logits finite"


def _title(plan: Plan) -> str:
    return f"{plan.source} ({plan.format}, {pluralize(plan.parameters, 'parameter')})"


def _sizes(plan: Plan) -> str:
    bytes_in, bytes_out = plan.bytes_in, plan.bytes_out
    share = 100 * bytes_out / bytes_in if bytes_in else 100.0
    return (
        f"{plan.bits_per_weight:.2f} bits per weight, {format_size(bytes_in)} -> "
        f"{format_size(bytes_out)} ({share:.0f} %)"
    )


def _error_summary(errors: Mapping[str, LayerError]) -> str:
    """The quantization error of new codes: of the median layer, and of the worst with its name."""
    ranked = sorted(errors, key=lambda layer: errors[layer].relative_rms)
    middle, worst = (errors[ranked[n]].relative_rms for n in (len(ranked) // 2, -1))
    weighted = sorted(x.weighted_rms for x in errors.values() if x.weighted_rms is not None)
    searched = ""
    if weighted:
        middle_weighted = weighted[len(weighted) // 2]
        searched = f"; {100 * middle_weighted:.2g} % in the median as the search weights errors"
    return (
        f"re-encoded with a relative error (rms) of {100 * middle:.2g} % in the median layer, "
        f"{100 * worst:.2g} % in the worst ({ranked[-1]}){searched}"
    )


def _rounding_summary(errors: Mapping[str, float]) -> str:
    """The error of rounded scales: of the median layer, and of the worst with its name."""
    ranked = sorted(errors, key=lambda layer: errors[layer])
    middle, worst = (format_percent(errors[ranked[n]]) for n in (len(ranked) // 2, -1))
    return (
        f"rounded with a relative error (rms) of {middle} in the median layer, {worst} in the "
        f"worst ({ranked[-1]})"
    )


def _show_layers(page: TablePrinter, plan: Plan) -> None:
    """Print the part that plan and report share: treatment of the layers, reasons and notes."""
    from requant.reports.report import group_layers, quantizable_but_dense

    page.line()
    show_groups(page, group_layers(plan.layers))
    _show_reasons(page, "stays dense:", quantizable_but_dense(plan.layers))
    for treatment, title in _REASON_TITLES:
        layers = [x for x in plan.layers if x.reason and x.treatment is treatment]
        _show_reasons(page, title, layers)
    _show_reasons(page, "rounded:", [x for x in plan.layers if x.bound], bounds=True)
    if plan.notes or plan.left_out or plan.dropped:
        page.line()
    for note in plan.notes:
        page.line(f"note: {note.text}")
    dropped: dict[str, list[str]] = defaultdict(list)
    for name, reason in plan.dropped:
        dropped[reason].append(name)
    for reason, names in dropped.items():
        kinds = list(dict.fromkeys(map(without_numbers, names)))
        page.line(f"dropped: {pluralize(len(names), 'tensor')} ({reason}): {join_first(kinds, 3)}")
    for name, reason in plan.left_out[:_FILE_LINES]:
        page.line(f"left out: {name} ({reason})")
    if len(plan.left_out) > _FILE_LINES:
        page.line(f"left out: {pluralize(len(plan.left_out) - _FILE_LINES, 'more file')}")


def show_groups(page: TablePrinter, groups: Iterable[LayerGroup]) -> None:
    """Print one line for each group of layers with the same treatment."""
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


def _show_reasons(
    page: TablePrinter, title: str, layers: Sequence[LayerPlan], *, bounds: bool = False
) -> None:
    """Print one line for each reason, or bound, largest first: number of layers, size, names."""
    if not layers:
        return
    alike: dict[str, list[LayerPlan]] = defaultdict(list)
    for layer in layers:
        reason = layer.reason.text if layer.reason else ""
        alike[layer.bound if bounds else reason].append(layer)
    reasons = sorted(alike.items(), key=lambda item: -sum(x.nbytes for x in item[1]))
    rows = [
        (
            f"  {pluralize(len(group), 'layer')}",
            format_size(sum(x.nbytes for x in group)),
            reason,
            join_first(list(dict.fromkeys(without_numbers(x.layer) for x in group)), 2),
        )
        for reason, group in reasons[:_REASON_LINES]
    ]
    page.line()
    page.line(title)
    page.columns(rows, right=(0, 1))
    more = sum(len(group) for _, group in reasons[_REASON_LINES:])
    if more:
        page.line(f"  and {pluralize(more, 'more layer')}")


def warnings(report: Report) -> list[str]:
    """Findings of the kernels that change values, one sentence for each kind."""
    sentences = {
        "overflowed": ("value", "became infinite: too large for the dtype asked for"),
        "flushed_groups": ("group", "became zero: too small for the scales of the mode"),
        "nonfinite": ("value", "NaN or infinite: the layer stays dense"),
        "damaged": ("scale or value", "NaN or infinite in the source, and left so"),
    }
    warnings = []
    for key, (word, what) in sentences.items():
        counts = {layer: x[key] for layer, x in report.findings.items() if x.get(key)}
        if counts:
            names = join_first(sorted(counts, key=lambda layer: -counts[layer]))
            warnings.append(f"{pluralize(sum(counts.values()), word)} {what} (in {names})")
    return warnings
