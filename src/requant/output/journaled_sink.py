"""What sinks that write into a staging folder share: shards, and the journal of what is done."""

from __future__ import annotations

from pathlib import Path

from requant.checkpoints.checkpoint import OpenedSource
from requant.output.journal import Journal
from requant.output.progress import JournaledProgress
from requant.output.shard_files import ShardFiles
from requant.output.staging import StagingFolder
from requant.planning.plan import Plan


class JournaledSink:
    """A ``Sink`` whose shards are files in the staging folder of ``output``, with a journal.

    A subclass opens the files, and sets the journal and the progress, when it is entered.
    """

    def __init__(self, plan: Plan, source: OpenedSource, output: Path, force: bool) -> None:
        self.plan, self.source, self.output, self.force = plan, source, output, force
        self.staging = StagingFolder(output)
        self._files = ShardFiles(self.staging.staged_output, output, plan.shards)
        self._journal: Journal | None = None
        self._progress: JournaledProgress | None = None

    @property
    def progress_log(self) -> JournaledProgress:
        """Where a run records what is done."""
        assert self._progress is not None, "the folder was not entered"
        return self._progress

    @property
    def shards(self) -> ShardFiles:
        """The shards as open files, where a run may write without ``write``."""
        return self._files

    def write(self, file: str, offset: int, data: memoryview) -> None:
        """Write ``data`` at an absolute offset of a shard; thread-safe."""
        self._files.write(file, offset, data)

    def _sync(self) -> None:
        """Make durable what was written so far."""
        self._files.sync_data()
        self.staging.sync_names()

    def _close_files(self) -> None:
        if self._journal is not None:
            self._journal.close()
        self._files.close()
