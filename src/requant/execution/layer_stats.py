"""Pipeline stage 4: statistics of the values of each layer, added up over chunks in any order."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from requant.errors import Problem
from requant.text import damage, pluralize_are


@dataclass(slots=True)
class LayerStats:
    """Statistics of one layer, summed over its chunks."""

    nonfinite: int = 0
    first_nonfinite_row: int | None = None
    overflowed: int = 0
    flushed_groups: int = 0
    squared_error: float = 0.0
    squared_values: float = 0.0
    max_error_steps: float = 0.0
    # The same sums with the weights of a search; 0 where there is none.
    weighted_error: float = 0.0
    weighted_values: float = 0.0
    # The number of scales or zero points that the source stores as NaN or infinity, or of values of
    # blocks that decode to it (``damaged_what``); the first is in ``damaged_row`` of
    # ``damaged_tensor``.
    damaged: int = 0
    damaged_tensor: str = ""
    damaged_what: str = ""
    damaged_row: int | None = None

    def nonzero_fields(self) -> dict[str, Any]:
        """The fields that are not zero."""
        zero = LayerStats()
        values = {name: getattr(self, name) for name in self.__slots__}
        return {name: value for name, value in values.items() if value != getattr(zero, name)}

    @property
    def is_not_a_number(self) -> bool:
        """Whether scales or values are NaN or infinite."""
        return bool(self.damaged or self.nonfinite)

    @property
    def damage(self) -> str:
        """What is damaged, and where."""
        return damage(self.damaged_what, self.damaged, self.damaged_row or 0)

    def nonfinite_problem(self, layer: str) -> Problem:
        """The problem of a layer whose scales or values hold NaN or infinity."""
        allowed = "--allow-nonfinite leaves such layers as they are"
        if self.damaged:
            return Problem(
                self.damaged_tensor,
                f"{self.damage}. Take the file from its publisher again, or make it again; "
                f"{allowed}",
            )
        return Problem(
            f"{layer}.weight",
            f"{pluralize_are(self.nonfinite, 'value')} NaN or infinite, first in row "
            f"{self.first_nonfinite_row}; {allowed}",
        )

    def merge(self, other: LayerStats) -> None:
        """Add the statistics of another chunk."""
        self.nonfinite += other.nonfinite
        self.overflowed += other.overflowed
        self.flushed_groups += other.flushed_groups
        self.squared_error += other.squared_error
        self.squared_values += other.squared_values
        self.weighted_error += other.weighted_error
        self.weighted_values += other.weighted_values
        self.max_error_steps = max(self.max_error_steps, other.max_error_steps)
        if other.damaged:
            mine, theirs = ((x.damaged_tensor, x.damaged_row or 0) for x in (self, other))
            if not self.damaged or theirs < mine:
                self.damaged_tensor, self.damaged_row = other.damaged_tensor, other.damaged_row
                self.damaged_what = other.damaged_what
            self.damaged += other.damaged
        rows = [r for r in (self.first_nonfinite_row, other.first_nonfinite_row) if r is not None]
        self.first_nonfinite_row = min(rows, default=None)


@dataclass(slots=True)
class RunResult:
    """Statistics by layer, and how long the run took."""

    findings: dict[str, LayerStats] = field(default_factory=dict)
    elapsed_s: float = 0.0
    bytes_downloaded: int = 0
