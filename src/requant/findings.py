"""Step 4 of the road: what a run found in the values of each layer, and took to do it.

Plain data that adds up over chunks, in any order; knows neither threads nor files.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from requant.errors import Problem, count_are


@dataclass(slots=True)
class Finding:
    """What the kernels saw in one layer; sums over its chunks."""

    nonfinite: int = 0
    first_nonfinite_row: int | None = None
    overflowed: int = 0
    flushed_groups: int = 0
    squared_error: float = 0.0
    squared_values: float = 0.0
    max_error_steps: float = 0.0

    def told(self) -> dict[str, float]:
        """What is not nothing."""
        nothing = Finding()
        return {k: v for k, v in asdict(self).items() if v != getattr(nothing, k)}

    def nonfinite_problem(self, layer: str) -> Problem:
        """What to say of a layer whose values are not all numbers."""
        return Problem(
            f"{layer}.weight",
            f"{count_are(self.nonfinite, 'value')} NaN or infinite, first in row "
            f"{self.first_nonfinite_row}; --allow-nonfinite leaves such layers as they are",
        )

    def add(self, other: Finding) -> None:
        """Merge what another chunk saw."""
        self.nonfinite += other.nonfinite
        self.overflowed += other.overflowed
        self.flushed_groups += other.flushed_groups
        self.squared_error += other.squared_error
        self.squared_values += other.squared_values
        self.max_error_steps = max(self.max_error_steps, other.max_error_steps)
        rows = [r for r in (self.first_nonfinite_row, other.first_nonfinite_row) if r is not None]
        self.first_nonfinite_row = min(rows, default=None)


@dataclass(slots=True)
class Outcome:
    """What a run did: findings by layer, and how long it took."""

    findings: dict[str, Finding] = field(default_factory=dict)
    elapsed_s: float = 0.0
    bytes_downloaded: int = 0
