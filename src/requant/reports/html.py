"""``requant report --html``: the figures of a conversion as one self-contained page.

Styles, drawings (SVG) and a few lines of JavaScript are in the page, and its content policy forbids
everything else. Without JavaScript the tables cannot be sorted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from math import ceil, log10
from pathlib import Path
from typing import NamedTuple

from requant.reports.record_summary import Figures, LayerSummary
from requant.reports.scores import Scores, section
from requant.text import format_percent, format_size

_WIDTH = 760
_BAR, _GAP, _NAMES, _NUMBERS = 16, 6, 210, 110
_PLOT_HEIGHT = 220
_WORST = 10
_KINDS = 24
_COLOURS = 6  # of page.css; further treatments reuse them


class _Bar(NamedTuple):
    """A bar with its name, the lengths of its parts, and the text after it."""

    name: str
    parts: Sequence[tuple[float, str]]  # length, CSS class
    text: str


class _Number(NamedTuple):
    """A number of a table: the value that it is sorted by, and its text; None is empty."""

    value: float | None
    text: str


def _bytes(nbytes: int) -> _Number:
    return _Number(nbytes, format_size(nbytes))


def _share(share: float | None) -> _Number:
    return _Number(share, format_percent(share))


def render_page(figures: Figures, scores: Scores | None = None) -> str:
    """The whole page, HTML in UTF-8.

    Args:
        figures: What ``read_figures`` gave; names in it may be anything.
        scores: Outputs against their dense model, what ``read_scores`` gave.
    """
    own = files("requant.reports") / "assets"
    style, script = ((own / name).read_text("utf-8") for name in ("page.css", "page.js"))
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    name = escape(Path(figures.output).absolute().name)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{name}: requant report</title>
<style>
{style}</style>
</head>
<body>
<main>
<h1>{name}</h1>
{_summary(figures)}
{_treatments(figures)}
{_bits(figures)}
{_sizes(figures)}
{_errors(figures)}
{section(scores) if scores is not None else ""}
{_all_layers(figures.layers)}
{_provenance(figures)}
</main>
<script>
{script}</script>
</body>
</html>
"""


# -- sections ------------------------------------------------------------------------------


def _summary(figures: Figures) -> str:
    share = 100 * figures.bytes_out / figures.bytes_in if figures.bytes_in else 100.0
    exact = sum(layer.exactness == "exact" for layer in figures.layers)
    sizes = f"{format_size(figures.bytes_in)} → {format_size(figures.bytes_out)}"
    tiles = [
        (f"{figures.bits_per_weight:.2f}", "bits per weight"),
        (sizes, f"{share:.0f} % of the source"),
        (f"{figures.parameters:,}", "parameters"),
        (f"{exact:,} of {len(figures.layers):,}", "layers and tensors exact"),
    ]
    if figures.measured:
        worst = figures.measured[0]
        tiles.append((format_percent(worst.relative_rms), f"worst error: {worst.layer}"))
    cells = "".join(
        f"<div><strong>{_nonbreaking(number)}</strong><span>{escape(what)}</span></div>"
        for number, what in tiles
    )
    return f'<section class="tiles" aria-label="Summary">{cells}</section>'


def _treatments(figures: Figures) -> str:
    groups = figures.groups
    sizes = Counter[str]()  # of all sources together: the table below distinguishes those
    for group in groups:
        sizes[f"{group.treatment}: {group.target}"] += group.nbytes
    most = max(sizes.values(), default=1)
    bars = [
        _Bar(name, [(nbytes / max(most, 1), f"c{number % _COLOURS}")], format_size(nbytes))
        for number, (name, nbytes) in enumerate(sizes.most_common())
    ]
    rows = [
        (g.treatment, g.source, g.target, g.exactness, g.layers, g.parameters, _bytes(g.nbytes))
        for g in groups
    ]
    header = ("treatment", "from", "to", "exactness", "layers", "parameters", "bytes")
    return _section(
        "Layers by treatment",
        _bars(bars, "Bytes of the output by treatment") + _table(header, rows),
        "Exact: stored codes or values moved bit for bit. Rounded: each rounded once. "
        "Re-encoded: new codes, whose error was measured.",
    )


def _bits(figures: Figures) -> str:
    kinds = figures.kinds[:_KINDS]
    bits = {k.kind: 8 * k.bytes_out / k.parameters if k.parameters else 0.0 for k in kinds}
    most = max(bits.values(), default=1) or 1
    bars = [
        _Bar(kind, [(value / most, "c0")], f"{value:.2f} bits × {_count(k.parameters)}")
        for (kind, value), k in zip(bits.items(), kinds, strict=True)
    ]
    return _section(
        "Bits per weight by kind of layer",
        _bars(bars, "Bits per weight by kind of layer"),
        "With scales and biases; most bytes first.",
    )


def _sizes(figures: Figures) -> str:
    kinds = figures.kinds[:_KINDS]
    most = max((max(k.bytes_in, k.bytes_out) for k in kinds), default=1) or 1
    bars = [
        _Bar(
            k.kind,
            [(k.bytes_in / most, "before"), (k.bytes_out / most, "c0")],
            f"{format_size(k.bytes_in)} → {format_size(k.bytes_out)}",
        )
        for k in kinds
    ]
    legend = '<span class="key before"></span> before <span class="key c0"></span> after'
    drawing = _bars(bars, "Bytes before and after by kind of layer", legend)
    return _section("Bytes before and after", drawing)


def _errors(figures: Figures) -> str:
    worst = figures.measured[:_WORST]
    if not worst:
        return _section("Error", "<p>No layer was requantized: there is nothing to measure.</p>")
    kinds = [kind for kind in figures.kinds if kind.median_rms is not None]
    top = worst[0].relative_rms or 1.0
    bars = [
        _Bar(
            k.kind,
            [((k.median_rms or 0) / top, "c1"), ((k.worst_rms or 0) / top, "worst")],
            f"{format_percent(k.median_rms)}, worst {format_percent(k.worst_rms)}",
        )
        for k in sorted(kinds, key=lambda k: -(k.median_rms or 0))[:_KINDS]
    ]
    rows = [(x.layer, x.source, x.target, _share(x.relative_rms), x.max_steps) for x in worst]
    header = ("layer", "from", "to", "error (rms)", "largest, in steps")
    legend = '<span class="key c1"></span> median <span class="key worst"></span> worst'
    return _section(
        "Error by layer",
        _plot([layer for layer in figures.layers if layer.relative_rms is not None]),
        "Root mean square of the quantization error, over that of the values; in the source's "
        "order.",
    ) + _section(
        "Error by kind of layer",
        _bars(bars, "Error by kind of layer", legend)
        + f"<h3>The worst layers</h3>{_table(header, rows)}",
    )


def _all_layers(layers: Iterable[LayerSummary]) -> str:
    header = ["layer", "treatment", "from", "to", "exactness"]
    header += ["bits per weight", "before", "after", "error (rms)", "remark"]
    rows = [
        (
            x.layer,
            x.treatment,
            x.source,
            x.target,
            x.exactness,
            round(x.bits_per_weight, 3),
            _bytes(x.bytes_in),
            _bytes(x.bytes_out),
            _share(x.relative_rms),
            x.reason or x.bound,
        )
        for x in layers
    ]
    return _section(
        "All layers", _table(header, rows), "A heading sorts; Tab reaches it, Enter presses it."
    )


def _provenance(figures: Figures) -> str:
    source_files = [(name, _bytes(nbytes), digest) for name, nbytes, digest in figures.source_files]
    origin = escape(figures.source_format)
    if figures.repository is not None:
        name, commit = map(escape, figures.repository)
        origin += f", {name} at <code>{commit}</code>"
    return _section(
        "Where it comes from",
        f"<dl><dt>Source</dt><dd>{origin}</dd>"
        f"<dt>Written by</dt><dd>requant {escape(figures.requant)}</dd>"
        f"<dt>Plan</dt><dd><code>{escape(figures.plan_hash)}</code></dd>"
        f"<dt>The same again</dt><dd><code>{escape(figures.command())}</code></dd>"
        f"<dt>Check it against its source</dt>"
        f"<dd><code>{escape(figures.verify_command())}</code></dd></dl>"
        + _table(("source file", "bytes", "SHA-256 of its header"), source_files),
    )


# -- parts ---------------------------------------------------------------------------------


def _section(title: str, body: str, remark: str = "") -> str:
    note = f"<p>{escape(remark)}</p>" if remark else ""
    return f"<section><h2>{escape(title)}</h2>{note}{body}</section>"


def _table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A sortable table; cells of numbers have the value to sort by as an attribute."""
    heads = "".join(f'<th scope="col"><button>{escape(name)}</button></th>' for name in header)
    body = "".join("<tr>" + "".join(map(_cell, row)) for row in rows)
    return (
        f'<div class="wide"><table class="sortable"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _cell(value: object) -> str:
    if isinstance(value, int | float):
        value = _Number(value, f"{value:,}")
    if value is None:
        value = _Number(None, "")
    if not isinstance(value, _Number):
        return f"<td>{escape(str(value))}</td>"
    if value.value is None:
        return '<td class="n" data-value="-1"></td>'
    return f'<td class="n" data-value="{value.value}">{value.text}</td>'


def _bars(bars: Sequence[_Bar], label: str, legend: str = "") -> str:
    height = len(bars) * (_BAR + _GAP) + _GAP
    room = _WIDTH - _NAMES - _NUMBERS - 60
    shapes = []
    for number, bar in enumerate(bars):
        top = _GAP + number * (_BAR + _GAP)
        thick = _BAR / len(bar.parts)
        shapes.append(_text(_NAMES - 8, top + 12, bar.name, "end", cut=30))
        end = _NAMES
        for place, (length, kind) in enumerate(bar.parts):
            width = max(length * room, 1)
            end = max(end, ceil(_NAMES + width))
            shapes.append(
                f'<rect class="{kind}" x="{_NAMES}" y="{top + place * thick:.1f}" '
                f'width="{width:.1f}" height="{thick:.1f}"/>'
            )
        shapes.append(_text(end + 8, top + 12, bar.text, "start"))
    drawing = _drawing(label, height, "".join(shapes))
    return drawing + (f'<p class="legend">{legend}</p>' if legend else "")


def _plot(layers: Sequence[LayerSummary]) -> str:
    """One dot for each layer, in the order of the source."""
    errors = [layer.relative_rms or 0.0 for layer in layers]
    top = _round_up(max(errors)) or 1.0
    left, right, base = 56, _WIDTH - 8, _PLOT_HEIGHT - 12
    shapes = []
    for part in range(5):
        y = base - part / 4 * (base - 12)
        shapes.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        shapes.append(_text(left - 6, y + 4, f"{25 * part * top:g} %", "end"))
    step = (right - left - 16) / max(len(layers) - 1, 1)
    for place, (layer, error) in enumerate(zip(layers, errors, strict=True)):
        x, y = left + 8 + place * step, base - error / top * (base - 12)
        title = f"<title>{escape(layer.layer)}: {format_percent(error)}</title>"
        shapes.append(f'<circle class="c1" cx="{x:.1f}" cy="{y:.1f}" r="3.5">{title}</circle>')
    return _drawing("Error of each layer", _PLOT_HEIGHT, "".join(shapes))


def _drawing(label: str, height: int, content: str) -> str:
    return (
        f'<div class="wide"><svg role="img" aria-label="{escape(label)}" '
        f'viewBox="0 0 {_WIDTH} {height}">{content}</svg></div>'
    )


def _text(x: float, y: float, text: str, anchor: str, cut: int | None = None) -> str:
    short = text if cut is None or len(text) <= cut else f"…{text[1 - cut :]}"
    title = "" if short == text else f"<title>{escape(text)}</title>"
    where = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f"<text {where}>{escape(short)}{title}</text>"


def _nonbreaking(numbers: str) -> str:
    """Keep numbers together with their units: lines break before an arrow only."""
    return escape(numbers).replace(" ", "&nbsp;").replace("&nbsp;→", " →")


# -- numbers -------------------------------------------------------------------------------


def _round_up(value: float) -> float:
    """Round up to 1, 2 or 5 times a power of ten: 0.034 to 0.05."""
    if value <= 0:
        return 0.0
    unit = float(10 ** int(log10(value) // 1))
    return next((unit * step for step in (1, 2, 5) if value <= unit * step), unit * 10)


def _count(number: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"
