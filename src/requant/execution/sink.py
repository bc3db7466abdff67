"""Pipeline stage 4: protocols of what receives the bytes of a run, and records what is done.

``output.folder`` writes an output; other sinks compare the bytes, or drop them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Protocol

from requant.errors import OutputError
from requant.execution.completed_work import CompletedWork
from requant.execution.layer_stats import LayerStats
from requant.planning.plan import OutputTensor, Plan


class ProgressLog(Protocol):
    """The record of what is done, which a run reads before it starts and extends."""

    @property
    def state(self) -> CompletedWork:
        """What is done, by earlier runs too."""

    @property
    def order(self) -> Sequence[int]:
        """Numbers of the plan's steps, in the order in which they are run."""

    def mark_done(self, step: int, start: int, stop: int, found: LayerStats) -> Sequence[str]:
        """Record that a range of rows was written; returns source files that are needed no more.

        Thread-safe.
        """


class OpenShards(Protocol):
    """Shards as open files, which take bytes at the offsets that ``Sink.write`` takes."""

    def fd(self, file: str) -> int:
        """The open file of a shard."""

    def write_error(self, error: OSError) -> OutputError:
        """The error to raise where a shard cannot be written."""


def order_of(steps: Sequence[object], progress_log: ProgressLog | None) -> Sequence[int]:
    """Numbers of the steps that a run has, in its order: all of them without a record."""
    return range(len(steps)) if progress_log is None else progress_log.order


class Sink(Protocol):
    """Where the bytes of a plan's shards go."""

    @property
    def shards(self) -> OpenShards | None:
        """Files that take bytes without ``write``; None where there are none."""

    @property
    def progress_log(self) -> ProgressLog | None:
        """The record of what is done; None where nothing outlives the process."""

    def write(self, file: str, offset: int, data: memoryview) -> None:
        """Take ``data`` for an absolute offset of a shard; thread-safe, and ``data`` is lent."""


class TensorOffsets:
    """The tensors of a plan's shards by their offsets, for sinks that take bytes of tensors."""

    def __init__(self, plan: Plan) -> None:
        self._tensors: dict[str, tuple[list[int], list[OutputTensor]]] = {}
        for shard in plan.shards:
            tensors = sorted((t for t in shard.tensors if t.info.nbytes), key=lambda t: t.offset)
            self._tensors[shard.name] = [t.offset for t in tensors], tensors

    def find(self, file: str, offset: int) -> tuple[OutputTensor, int]:
        """The tensor at an absolute offset of a shard, and the offset within it."""
        offsets, tensors = self._tensors[file]
        tensor = tensors[bisect_right(offsets, offset) - 1]
        return tensor, offset - tensor.offset


class NullSink:
    """A sink for a run of which only the statistics are used."""

    shards = progress_log = None

    def write(self, file: str, offset: int, data: memoryview) -> None:
        """Drop the data."""
