"""Hessians of a plan's layers, factored once for each matrix and shared by the workers."""

from __future__ import annotations

import threading
from collections import OrderedDict

from requant.importance.statistics_file import Importance, MatrixStatistics
from requant.kernels.gptq import Compensation, compensation_of


class HessianCache:
    """Compensations by matrix; of more than ``keep`` the least recently used is dropped."""

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._compensations: OrderedDict[MatrixStatistics, Compensation | None] = OrderedDict()
        self._lock = threading.Lock()  # one factorisation at a time: LAPACK has threads of its own

    def compensation(self, importance: Importance, matrix: int) -> Compensation | None:
        """The compensation of a matrix; None if no token reached it.

        Raises:
            InvariantError: What is stored is not a Hessian.
            CheckpointError: The statistics file is no longer what it was.
        """
        key = importance.entry(matrix)
        with self._lock:
            if key in self._compensations:
                self._compensations.move_to_end(key)
                return self._compensations[key]
            compensation = None
            if importance.weights(matrix) is not None:
                compensation = compensation_of(importance.hessian(matrix), importance.in_features)
            self._compensations[key] = compensation
            while len(self._compensations) > self._keep:
                self._compensations.popitem(last=False)
            return compensation


def bytes_for(n_in: int, keep: int) -> int:
    """Bytes for factoring ``n_in`` inputs: four float64 matrices, and the ones that are kept."""
    return n_in * n_in * (4 * 8 + 4 * (keep + 1))
