"""Which chunks of a plan are done, and what was measured on them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

Stats = Mapping[str, float]


@dataclass(slots=True)
class CompletedWork:
    """What of a plan is done."""

    # Step number -> ranges of its rows, in any order.
    rows: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    # Step number and statistics of a range of its rows, one entry a range.
    stats: list[tuple[int, Stats]] = field(default_factory=list)
    # Output tensor -> SHA-256 of its bytes, in hex.
    hashes: dict[str, str] = field(default_factory=dict)
    # Source files that were removed after all that needed them was durable.
    deleted_sources: list[str] = field(default_factory=list)

    def add(self, line: Mapping[str, Any]) -> None:
        """Add a line of a journal."""
        if "rows" in line:
            step, start, stop = line["rows"]
            self.rows.setdefault(step, []).append((start, stop))
            if line.get("stats"):
                self.stats.append((step, line["stats"]))
        elif "hash" in line:
            name, digest = line["hash"]
            self.hashes[name] = digest
        elif "deleted_source" in line:
            self.deleted_sources.append(line["deleted_source"])

    def remaining(self, step: int, rows: int) -> Iterator[tuple[int, int]]:
        """The ranges of a step's rows that are not done."""
        start = 0
        for first, last in sorted(self.rows.get(step, ())):
            if first > start:
                yield start, first
            start = max(start, last)
        if start < rows:
            yield start, rows
