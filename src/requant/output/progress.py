"""What of an output is done: rows in the journal, hashes of tensors, source files to delete."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Sequence

from requant.execution.completed_work import CompletedWork
from requant.execution.layer_stats import LayerStats
from requant.output.journal import Journal
from requant.output.shard_files import ShardFiles
from requant.output.source_removal import SourceRemoval
from requant.planning.plan import OutputTensor, Plan


class JournaledProgress:
    """The ``ProgressLog`` of an output: counts rows that are done, hashes complete tensors.

    ``removal`` deletes source files that nothing else needs; None keeps them all. ``steps`` are the
    numbers of the steps to run; None for all.
    """

    def __init__(
        self,
        plan: Plan,
        journal: Journal,
        files: ShardFiles,
        removal: SourceRemoval | None = None,
        steps: Sequence[int] | None = None,
    ) -> None:
        self.journal = journal
        self._plan, self._files, self._removal = plan, files, removal
        self._steps = range(len(plan.steps)) if steps is None else steps
        self._own = frozenset(self._steps)
        written = None if steps is None else set(_output_names(plan, steps))
        self._tensors = {
            t.name: t
            for shard in plan.shards
            for t in shard.tensors
            if written is None or t.name in written
        }
        self._rows_left = Counter[str]()
        self._counting = threading.Lock()
        for number in self._steps:
            step = plan.steps[number]
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
            return [number for number in self._removal.release.order if number in self._own]
        return self._steps

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
        total = sum(steps[n].rows.count * steps[n].rows.columns for n in self._steps)
        done = sum(self.state.done_rows(n) * steps[n].rows.columns for n in self._steps)
        return done / total if total else 1.0

    def _hash(self, tensor: OutputTensor) -> None:
        self.journal.add({"hash": [tensor.name, self._files.hash(tensor)]})


def _output_names(plan: Plan, steps: Sequence[int]) -> Iterator[str]:
    for number in steps:
        for out in plan.steps[number].outputs.values():
            yield out.name
