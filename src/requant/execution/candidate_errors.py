"""Pipeline stage 4: errors of several encodings of the same rows, which are read once.

A *trial* is a range of a layer's rows and the steps that encode it, one for each candidate. Its
``dense_step`` gives the rows as values; ``CandidateErrors`` is the sink that they are run into: it
encodes each chunk with every candidate while that is in the cache, and adds up the errors. A search
has the weights that it has in a conversion: statistics, or the powers of inputs that the run
estimates (``take_powers``). The errors themselves are not weighted: powers of inputs compare the
inputs of one layer, and mislead about one layer next to another (benchmarks/quality.md).
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from requant.core.dtypes import NUMPY_DTYPE, TensorInfo
from requant.execution.chunks import Chunk
from requant.execution.hessian_cache import HessianCache
from requant.execution.layer_stats import LayerStats
from requant.execution.operations import WorkerBuffers, encode_rows
from requant.planning.plan import OutputTensor, Step
from requant.planning.steps import output_tensor_infos, values_operation

ErrorSums = Mapping[str, tuple[float, float]]
"""Candidate -> squared error and squared values of a layer, summed."""


@dataclass(frozen=True, slots=True)
class Trial:
    """Rows of a layer, and how they may be encoded."""

    layer: str
    candidates: Mapping[str, Step]  # candidate -> its step, which reads the same rows as the others

    @property
    def bytes_in(self) -> int:
        """Bytes of the source that are read for it."""
        return next(iter(self.candidates.values())).bytes_in

    def dense_step(self, number: int) -> Step:
        """The step that gives the rows as values, as trial ``number`` of a ``CandidateErrors``."""
        step = next(iter(self.candidates.values()))
        words, target = step.outputs["weight"].info.shape, step.target
        assert target is not None
        info = TensorInfo(step.dtype, (*words[:-1], words[-1] * 32 // target.bits))
        # ``encode`` stays: powers of inputs are estimated, and memory for encoding is counted.
        return replace(
            step,
            operation=values_operation(step),
            rows=replace(step.rows, order=None),
            outputs={"weight": OutputTensor(f"{self.layer}.weight", info, str(number))},
        )


def trials_of(layer: str, steps: Mapping[str, Sequence[Step]]) -> list[Trial]:
    """Join the encoding steps of candidates that read the same rows to trials.

    ``steps`` has those of each candidate. GPTQ is left out.
    """
    groups: list[tuple[Step, dict[str, Step]]] = []
    for candidate, own in steps.items():
        for step in own:
            assert step.encode is not None
            encode = replace(step.encode, gptq=False)
            trial = replace(step, encode=encode)
            read = replace(step, encode=None, outputs={})
            found = next((x for first, x in groups if first == read), None)
            if found is None:
                found = {}
                groups.append((read, found))
            found[candidate] = trial
    return [Trial(layer, candidates) for _, candidates in groups]


class CandidateErrors:
    """A sink for the values of trials, of which it sums the errors.

    Args:
        trials: In the order of their numbers.
        completed: Called with a layer and its errors when all of its rows are measured; one call
            at a time.
    """

    shards = progress_log = None

    def __init__(
        self, trials: Sequence[Trial], completed: Callable[[str, ErrorSums], None]
    ) -> None:
        self.nonfinite: dict[str, LayerStats] = {}  # layers with values that are NaN or infinite
        self._trials, self._completed = trials, completed
        self._rows_left: dict[str, int] = defaultdict(int)
        for trial in trials:
            step = next(iter(trial.candidates.values()))
            self._rows_left[trial.layer] += step.rows.count
        self._powers: dict[int, np.ndarray] = {}
        self._sums: dict[str, dict[str, LayerStats]] = defaultdict(dict)
        self._lock, self._local = threading.Lock(), threading.local()

    def take_powers(self, step: int, powers: np.ndarray) -> None:
        """Take the powers of inputs of a trial, before its rows."""
        self._powers[step] = powers

    def write(self, file: str, offset: int, data: memoryview) -> None:
        """Take rows of trial number ``file`` from byte ``offset`` on."""
        trial = self._trials[int(file)]
        step = next(iter(trial.candidates.values()))
        columns, dtype = step.rows.columns, NUMPY_DTYPE[step.dtype]
        dense = np.frombuffer(data, np.uint8).view(dtype).reshape(-1, columns)
        start = offset // (columns * dtype.itemsize) - step.rows.output_row
        found = self._encode(trial, dense, start, self._powers.get(int(file)))
        with self._lock:
            self._add(trial.layer, found, dense.shape[0])

    def _encode(
        self, trial: Trial, dense: np.ndarray, start: int, powers: np.ndarray | None
    ) -> dict[str, LayerStats]:
        """Statistics of rows from ``start`` on by candidate; of one only if they are not finite."""
        buffers = self._buffers()
        found: dict[str, LayerStats] = {}
        for candidate, step in trial.candidates.items():
            rows, columns = dense.shape
            outputs = {
                role: buffers.take(f"out {role}", info.dtype, rows, info.nbytes)
                for role, info in output_tensor_infos((1, columns), step.dtype, step.target).items()
            }
            chunk = Chunk(step, start, start + rows)
            stats = encode_rows(chunk, dense, outputs, buffers.hessians, powers=powers)
            found[candidate] = stats
            if stats.first_nonfinite_row is not None:
                stats.first_nonfinite_row += step.rows.output_row + start
                break
        return found

    def _buffers(self) -> WorkerBuffers:
        """The arrays of this thread."""
        held: WorkerBuffers | None = getattr(self._local, "buffers", None)
        if held is None:
            held = self._local.buffers = WorkerBuffers(HessianCache(0))
        return held

    def _add(self, layer: str, found: Mapping[str, LayerStats], rows: int) -> None:
        sums = self._sums[layer]
        for candidate, stats in found.items():
            sums.setdefault(candidate, LayerStats()).merge(stats)
            if stats.nonfinite:
                self.nonfinite.setdefault(layer, LayerStats()).merge(stats)
        self._rows_left[layer] -= rows
        if not self._rows_left[layer]:
            errors = {x: (s.squared_error, s.squared_values) for x, s in sums.items()}
            del self._sums[layer]
            if layer not in self.nonfinite:
                self._completed(layer, errors)
