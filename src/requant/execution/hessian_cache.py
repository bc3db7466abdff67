"""Hessians of a plan's layers, factored once for each matrix and shared by the workers."""

from __future__ import annotations

import threading

from requant.execution.shared_cache import SharedCache
from requant.importance.statistics_file import Importance, MatrixStatistics
from requant.kernels.gptq import Compensation, compensation_of


class HessianCache:
    """Compensations by matrix; of more than ``keep`` the least recently used is dropped.

    Several are factored at a time, at most ``factorizations``. A worker waits if another factors
    the matrix that it needs.
    """

    def __init__(self, keep: int, factorizations: int = 1) -> None:
        self._compensations: SharedCache[MatrixStatistics, Compensation | None]
        self._compensations = SharedCache(keep)
        self._free = threading.Semaphore(factorizations)

    def compensation(self, importance: Importance, matrix: int) -> Compensation | None:
        """The compensation of a matrix; None if no token reached it.

        Raises:
            InvariantError: What is stored is not a Hessian.
            CheckpointError: The statistics file is no longer what it was.
        """
        key = importance.entry(matrix)
        return self._compensations.get(key, lambda: self._factor(importance, matrix))

    def _factor(self, importance: Importance, matrix: int) -> Compensation | None:
        if importance.weights(matrix) is None:
            return None
        with self._free:
            return compensation_of(importance.hessian(matrix), importance.in_features)


def bytes_for(n_in: int, keep: int, factorizations: int) -> int:
    """Bytes for ``n_in`` inputs: two float32 matrices kept, four float64 ones while factored.

    ``keep`` and ``factorizations`` as ``HessianCache`` takes them.
    """
    return n_in * n_in * (4 * 8 * factorizations + 2 * 4 * keep)
