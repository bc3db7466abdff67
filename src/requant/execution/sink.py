"""Pipeline stage 4: protocols of what receives the bytes of a run, and records what is done.

``output.folder`` writes an output; other sinks compare the bytes, or drop them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from requant.execution.completed_work import CompletedWork, Stats


class ProgressLog(Protocol):
    """The record of what is done, which a run reads before it starts and extends."""

    @property
    def state(self) -> CompletedWork:
        """What is done, by earlier runs too."""

    @property
    def order(self) -> Sequence[int]:
        """Numbers of the plan's steps, in the order in which they are run."""

    def mark_done(self, step: int, start: int, stop: int, found: Stats) -> Sequence[str]:
        """Record that a range of a step's rows was written; thread-safe.

        Returns:
            Source files that are needed no more.
        """


class Sink(Protocol):
    """Where the bytes of a plan's shards go."""

    @property
    def progress_log(self) -> ProgressLog | None:
        """The record of what is done; None where nothing outlives the process."""

    def write(self, file: str, offset: int, data: memoryview) -> None:
        """Take ``data`` for an absolute offset of a shard; thread-safe, and ``data`` is lent."""


class NullSink:
    """A sink for a run of which only the statistics are used."""

    progress_log = None

    def write(self, file: str, offset: int, data: memoryview) -> None:
        """Drop the data."""
