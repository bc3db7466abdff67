"""The source that a ``Plan`` is executed on: its files, and the functions of an MLX library."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from requant.checkpoints.checkpoint import Checkpoint, OpenedSource
from requant.errors import InvariantError
from requant.layouts.relayout import ReadValues, Relayout


@dataclass(eq=False)
class PlanSource:
    """The part of a planned conversion that is not data."""

    checkpoint: Checkpoint  # the source that the plan was made from
    # A library's layout of it; None where the plan keeps the source's names.
    relayout: Relayout | None = None

    @property
    def opened(self) -> OpenedSource:
        """The source's files."""
        return self.checkpoint.opened

    def compute(self, name: str, fill: ReadValues) -> np.ndarray:
        """The bytes of a ``ComputedTensor``; ``fill`` reads a tensor that it is computed from."""
        if self.relayout is None:
            raise InvariantError("the plan computes this tensor, and its source cannot", layer=name)
        return self.relayout.compute_tensor(name, fill)
