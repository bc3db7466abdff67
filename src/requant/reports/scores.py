"""Scores of outputs against their dense model: what ``compare --json`` printed, and its plot.

The plot is SVG, with the size of each output against its divergence from the dense model, both on
logarithmic axes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, isfinite, log10
from pathlib import Path
from typing import Any

from requant.errors import ParseError
from requant.text import format_percent, format_size, os_error_text

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 760, 300, 70, 40, 20, 150
_LEAST_KL = 1e-6  # of a dot; an output without divergence has no logarithm


@dataclass(frozen=True, slots=True)
class Score:
    """One output; divergences in nats per token."""

    name: str
    nbytes: int
    bits_per_weight: float
    divergence: float
    divergence_error: float
    divergence_median: float
    divergence_p99: float
    same_top: float


@dataclass(frozen=True, slots=True)
class Scores:
    """Outputs against one dense model, on one text."""

    dense: str
    text: str
    tokens: int
    scores: tuple[Score, ...]


def read_scores(path: Path) -> Scores:
    """Read the document that ``compare DENSE OUTPUT OUTPUT --text FILE --json`` printed.

    Raises:
        ParseError: It is not such a document.
    """
    try:
        return _parse(json.loads(path.read_bytes()))
    except OSError as error:
        raise ParseError(f"{path}: {os_error_text(error)}") from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ParseError(
            f"{path}: is not what requant compare DENSE OUTPUT OUTPUT --text FILE --json prints"
        ) from error


def _parse(data: Any) -> Scores:
    scores = []
    for entry in data["scores"]:
        found = entry["evaluation"]
        score = Score(
            name=Path(str(entry["output"])).name,
            nbytes=int(entry["nbytes"]),
            bits_per_weight=float(entry["bits_per_weight"]),
            divergence=float(found["divergence"]["value"]),
            divergence_error=float(found["divergence"]["error"]),
            divergence_median=float(found["divergence_median"]["value"]),
            divergence_p99=float(found["divergence_p99"]["value"]),
            same_top=float(found["same_top"]["value"]),
        )
        if score.nbytes < 1 or not isfinite(score.divergence):
            raise ValueError(f"{score.name} has no size or no divergence")
        scores.append(score)
    tokens = int(data["scores"][0]["evaluation"]["tokens"])
    return Scores(Path(str(data["dense"])).name, str(data["text"]), tokens, tuple(scores))


def columns_of(score: Score) -> tuple[str, ...]:
    """The figures of an output as texts, for a table."""
    return (
        score.name,
        format_size(score.nbytes),
        f"{score.bits_per_weight:.2f}",
        f"{score.divergence:.4f} ± {score.divergence_error:.4f}",
        f"{score.divergence_median:.4f}",
        f"{score.divergence_p99:.3f}",
        format_percent(score.same_top),
    )


HEADER = ("output", "size", "bits per weight", "KL", "median", "99th percentile", "same top token")


def markdown(scores: Scores) -> str:
    """A table for a model card."""
    rows = [HEADER, ("---", *["---:"] * (len(HEADER) - 1)), *map(columns_of, scores.scores)]
    lines = "".join(f"| {' | '.join(_in_cell(text) for text in row)} |\n" for row in rows)
    return (
        f"Next-token distributions against those of `{_in_cell(scores.dense)}` on "
        f"{scores.tokens:,} tokens of `{_in_cell(scores.text)}`: Kullback-Leibler divergence in "
        "nats, with its standard error, and how often both find the same token likeliest."
        f"\n\n{lines}"
    )


def _in_cell(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("`", "'").replace("\n", " ")


def section(scores: Scores) -> str:
    """The section of the HTML page: plot and table."""
    head = "".join(f"<th>{escape(title)}</th>" for title in HEADER)
    rows = "".join(
        f"<tr>{''.join(f'<td>{escape(text)}</td>' for text in columns_of(score))}</tr>"
        for score in scores.scores
    )
    return (
        f"<section><h2>Against {escape(scores.dense)}</h2>\n<p>{scores.tokens:,} tokens of "
        f"{escape(scores.text)}; Kullback-Leibler divergence in nats.</p>\n{plot(scores.scores)}\n"
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
        "</div></section>"
    )


def plot(scores: Sequence[Score]) -> str:
    """Size against divergence, SVG: a dot with its name for each output."""
    sizes = [log10(score.nbytes) for score in scores]
    losses = [log10(max(score.divergence, _LEAST_KL)) for score in scores]
    left, right = min(sizes) - 0.05, max(sizes) + 0.05
    low, high = floor(min(losses)), max(ceil(max(losses)), floor(min(losses)) + 1)

    def x_of(size: float) -> float:
        return _LEFT + (size - left) / (right - left) * (_WIDTH - _LEFT - _RIGHT)

    def y_of(loss: float) -> float:
        return _TOP + (high - loss) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    lines = [
        f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y_of(power):.1f}" y2="{y_of(power):.1f}" '
        f'class="grid"/><text x="{_LEFT - 8}" y="{y_of(power) + 4:.1f}" text-anchor="end">'
        f"{10.0**power:g}</text>"
        for power in range(low, high + 1)
    ]
    dots = [
        f'<circle cx="{x_of(size):.1f}" cy="{y_of(loss):.1f}" r="4" class="c1"/>'
        f'<text x="{x_of(size) + 8:.1f}" y="{y_of(loss) + 4:.1f}">{escape(score.name)}</text>'
        for score, size, loss in zip(scores, sizes, losses, strict=True)
    ]
    ends = [
        f'<text x="{x:.1f}" y="{_HEIGHT - 18}" text-anchor="middle">{format_size(10**size)}</text>'
        for x, size in {(x_of(size), size) for size in (min(sizes), max(sizes))}
    ]
    label = f'<text x="{_LEFT}" y="{_HEIGHT - 2}">size, and KL divergence in nats</text>'
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="Size against KL divergence">{"".join([*lines, *dots, *sorted(ends), label])}'
        "</svg>"
    )
