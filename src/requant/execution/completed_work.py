"""Which rows of a plan are done, and what was measured on them.

Its size follows the number of steps, not that of chunks: ranges of rows that touch are merged, and
statistics are added up.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from requant.execution.layer_stats import LayerStats

Borders = tuple[int, ...]
"""Disjoint ranges of rows that do not touch, in order: first row, row after the last, and so on."""


@dataclass(slots=True)
class CompletedWork:
    """What of a plan is done."""

    # Step number -> its rows that are done.
    rows: dict[int, Borders] = field(default_factory=dict)
    # Step number -> statistics of the rows that are done; none that are all zero.
    stats: dict[int, LayerStats] = field(default_factory=dict)
    # Output tensor -> SHA-256 of its bytes, in hex.
    hashes: dict[str, str] = field(default_factory=dict)
    # Source files that were removed after all that needed them was durable.
    deleted_sources: list[str] = field(default_factory=list)
    # Whether a run has done all that it was for.
    is_finished: bool = False

    # The last line of the journal of a part.
    FINISHED: ClassVar[Mapping[str, Any]] = {"finished": True}

    def add(self, line: Mapping[str, Any]) -> None:
        """Add a line of a journal."""
        if "rows" in line:
            step, *borders = line["rows"]
            self._add_rows(step, borders, line.get("stats"))
        elif "hash" in line:
            name, digest = line["hash"]
            self.hashes[name] = digest
        elif "deleted_source" in line:
            self.deleted_sources.append(line["deleted_source"])
        elif line == self.FINISHED:
            self.is_finished = True

    def _add_rows(self, step: int, borders: list[int], found: Mapping[str, Any] | None) -> None:
        merged = self.rows.get(step, ())
        for start, stop in zip(borders[::2], borders[1::2], strict=True):
            merged = merge_range(merged, start, stop)
        self.rows[step] = merged
        if found:
            self.stats.setdefault(step, LayerStats()).merge(LayerStats(**found))

    def lines(self) -> Iterator[dict[str, Any]]:
        """Journal lines that add up to this: one for each step, tensor and deleted file.

        Rows of a step and their statistics are one line, so that a part of a journal has both
        or neither.
        """
        for step, borders in self.rows.items():
            yield rows_line(step, borders, self.stats.get(step))
        for name, digest in self.hashes.items():
            yield {"hash": [name, digest]}
        for name in self.deleted_sources:
            yield {"deleted_source": name}

    def done_rows(self, step: int) -> int:
        """How many rows of a step are done."""
        borders = self.rows.get(step, ())
        return sum(borders[1::2]) - sum(borders[::2])

    def remaining(self, step: int, rows: int) -> Iterator[tuple[int, int]]:
        """The ranges of a step's rows that are not done."""
        borders = (0, *self.rows.get(step, ()), rows)
        for start, stop in zip(borders[::2], borders[1::2], strict=True):
            if start < stop:
                yield start, stop


def merge_range(borders: Borders, start: int, stop: int) -> Borders:
    """Ranges with another one, which may touch or overlap them.

    A row lies within a range if the number of borders up to it is odd.

    Example: of ``(0, 10, 30, 40)`` and 10 to 20, the start is within the first range, or touches
    it (one border is less than 10), the stop within none (two borders are at most 20):
    ``(0, 20, 30, 40)``.
    """
    if start >= stop:
        return borders
    first, last = bisect_left(borders, start), bisect_right(borders, stop)
    starts = () if first % 2 else (start,)
    stops = () if last % 2 else (stop,)
    return (*borders[:first], *starts, *stops, *borders[last:])


def rows_line(step: int, borders: Borders, found: LayerStats | None) -> dict[str, Any]:
    """The journal line of rows of a step, with their statistics unless these are all zero."""
    stats = None if found is None else found.nonzero_fields()
    return {"rows": [step, *borders], **({"stats": stats} if stats else {})}
