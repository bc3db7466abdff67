"""What of an output is done: rows in the journal, hashes of tensors, source files to delete."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence

from requant.execution.completed_work import CompletedWork
from requant.execution.layer_stats import LayerStats
from requant.output.journal import Journal
from requant.output.shard_files import ShardFiles
from requant.output.source_removal import SourceRemoval
from requant.planning.plan import OutputTensor, Plan


class JournaledProgress:
    """The ``ProgressLog`` of an output: counts rows that are done, hashes complete tensors.

    ``removal`` deletes source files that nothing else needs; None keeps them all.
    """

    def __init__(
        self, plan: Plan, journal: Journal, files: ShardFiles, removal: SourceRemoval | None
    ) -> None:
        self.journal = journal
        self._plan, self._files, self._removal = plan, files, removal
        self._tensors = {t.name: t for shard in plan.shards for t in shard.tensors}
        self._rows_left = Counter[str]()
        self._counting = threading.Lock()
        for number, step in enumerate(plan.steps):
            remaining = self.state.remaining(number, step.rows.count)
            left = sum(stop - start for start, stop in remaining)
            for out in step.outputs.values():
                self._rows_left[out.name] += left
            if removal is not None:
                removal.add_rows(number, left)

    @property
    def state(self) -> CompletedWork:
        """What is done, by this run and earlier ones."""
        return self.journal.state

    @property
    def order(self) -> Sequence[int]:
        """The order of the plan, or one in which source files are free early."""
        if self._removal is not None:
            return self._removal.release.order
        return range(len(self._plan.steps))

    def mark_done(self, step: int, start: int, stop: int, found: LayerStats) -> Sequence[str]:
        """Note a range of rows; hash the tensors, delete the source files that are done."""
        self.journal.mark_done(step, start, stop, found)
        whole = []
        with self._counting:
            free = [] if self._removal is None else self._removal.count(step, stop - start)
            for out in self._plan.steps[step].outputs.values():
                self._rows_left[out.name] -= stop - start
                if not self._rows_left[out.name]:
                    whole.append(self._tensors[out.name])
        for tensor in whole:
            self._hash(tensor)
        for name in free:
            assert self._removal is not None
            self._removal.remove(name, self.journal)
        return free

    def finish(self) -> dict[str, str]:
        """The hash of every tensor; those that a killed run wrote without a hash are hashed now."""
        for tensor in self._tensors.values():
            if tensor.name not in self.state.hashes:
                self._hash(tensor)
        return dict(self.state.hashes)

    def share(self) -> float:
        """The share of the work that is done, from 0 to 1."""
        steps = self._plan.steps
        total = sum(step.rows.count * step.rows.columns for step in steps)
        done = sum(self.state.done_rows(n) * steps[n].rows.columns for n in self.state.rows)
        return done / total if total else 1.0

    def _hash(self, tensor: OutputTensor) -> None:
        self.journal.add({"hash": [tensor.name, self._files.hash(tensor)]})
