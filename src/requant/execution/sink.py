"""Pipeline stage 4: where ``executor`` puts bytes, and notes what is done: the protocols.

``output.folder`` has the one that writes an output; others compare, or keep nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from requant.execution.completed_work import CompletedWork, Stats


class ProgressLog(Protocol):
    """What a run asks before it starts, and reports as it runs."""

    @property
    def state(self) -> CompletedWork:
        """What was done by an earlier run."""

    @property
    def order(self) -> Sequence[int]:
        """Numbers of the plan's steps, as they are to be run."""

    def mark_done(self, step: int, start: int, stop: int, found: Stats) -> Sequence[str]:
        """Note that a range of a step's rows was written; thread-safe.

        Returns:
            Source files that are gone now.
        """


class Sink(Protocol):
    """Where the bytes of a plan's shards go."""

    @property
    def progress_log(self) -> ProgressLog | None:
        """Where to note what is done; None where nothing outlives the process."""

    def write(self, file: str, offset: int, data: memoryview) -> None:
        """Take ``data`` for an absolute offset of a shard; thread-safe, and ``data`` is lent."""


class NullSink:
    """A sink for a run of which only the findings are wanted."""

    progress_log = None

    def write(self, file: str, offset: int, data: memoryview) -> None:
        """Forget the data."""
