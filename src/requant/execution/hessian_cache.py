"""Hessians of a plan's layers, factored once a layer and shared by the workers.

Knows statistics and GPTQ's arithmetic, and nothing of files of weights.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

from requant.importance.statistics_file import Importance, MatrixStatistics
from requant.kernels.gptq import Compensation, compensation_of


class HessianCache:
    """Compensations by matrix: as many as there are workers stay, the oldest goes."""

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._made: OrderedDict[MatrixStatistics, Compensation | None] = OrderedDict()
        self._lock = threading.Lock()  # one factorisation at a time: LAPACK has threads of its own

    def compensation(self, importance: Importance, matrix: int) -> Compensation | None:
        """What a matrix's Hessian says; None if no token reached it.

        Raises:
            InvariantError: What is stored is not a Hessian.
            CheckpointError: The statistics file is no longer what it was.
        """
        key = importance.entry(matrix)
        with self._lock:
            if key in self._made:
                self._made.move_to_end(key)
                return self._made[key]
            if importance.weights(matrix) is None:
                made = None
            else:
                made = compensation_of(importance.hessian(matrix), importance.in_features)
            self._made[key] = made
            while len(self._made) > self._keep:
                self._made.popitem(last=False)
            return made


def bytes_for(n_in: int, keep: int) -> int:
    """What factoring the widest layer takes: four matrices of float64, and those that stay."""
    return n_in * n_in * (4 * 8 + 4 * (keep + 1))
