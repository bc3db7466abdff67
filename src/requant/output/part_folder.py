"""The output folder as one part of a plan sees it: other parts write to it at the same time.

Nothing is published, and nothing is removed: ``OutputFolder`` does both when the parts are joined.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from requant.checkpoints.checkpoint import OpenedSource
from requant.errors import OutputError
from requant.execution.completed_work import CompletedWork
from requant.output.folder import describe_change, journal_header
from requant.output.journal import Journal, read_journal
from requant.output.journaled_sink import JournaledSink
from requant.output.part_journals import (
    add_run,
    agree_on_command,
    follows,
    new_journal_path,
    read_budget,
    read_part_journals,
)
from requant.output.preflight import check_output
from requant.output.progress import JournaledProgress
from requant.output.shard_files import write_error
from requant.output.source_removal import SourceRemoval
from requant.output.staging import bytes_on_disk
from requant.planning.parts import steps_of_part
from requant.planning.plan import Plan
from requant.quantization.part import Part


class PartFolder(JournaledSink):
    """The ``Sink`` of one part of a conversion. A context manager.

    ``command`` is what ``join`` repeats the plan from. What earlier runs of the part have done is
    not done again; a run that stops keeps what it did. ``force`` allows an output that exists.
    ``consume`` deletes source files that belong to the part, once all made from them is durable;
    all parts must have been checked before.
    """

    def __init__(
        self,
        plan: Plan,
        source: OpenedSource,
        output: Path,
        part: Part,
        command: Mapping[str, Any],
        force: bool = False,
        consume: bool = False,
    ) -> None:
        super().__init__(plan, source, output, force)
        self.part = part
        self.steps = steps_of_part(plan, part, whole_files=consume)
        self._consume = consume
        self._command = dict(command)

    def __enter__(self) -> Self:
        try:
            self._open(*self._begin())
        except BaseException as error:
            self._close()
            if isinstance(error, OSError) and not isinstance(error, OutputError):
                raise write_error(self.output, error) from error
            raise
        return self

    def begin(self) -> None:
        """Record what the parts are made from, and run none; otherwise as entering."""
        try:
            self._begin()
        except OSError as error:
            if isinstance(error, OutputError):
                raise
            raise write_error(self.output, error) from error
        finally:
            self._close()

    def _begin(self) -> tuple[dict[str, Any], CompletedWork]:
        """Take the lock and agree on the command.

        Returns:
            The header of the part's journal, and what a conversion without parts has done.
        """
        staged = bytes_on_disk(self.staging.staged_output)
        check_output(self.plan, self.output, self.force, staged)
        self.staging.lock(shared=True)
        head = journal_header(self.plan, self.source, self.plan.hash, ())
        whole, done_before = read_journal(self.staging.journal)
        self._check_same(whole, head)
        command = {**self._command, "requant": head["requant"], "plan": head["plan"]}
        budget = read_budget(self.staging.parts)
        if budget is not None and not follows(command, budget):
            self._check_same({**head, "plan": None}, head)
        agreed = agree_on_command(self.staging.parts, command)
        self._check_same(agreed, head)
        if agreed.get("consume") != command.get("consume"):
            raise OutputError(
                f"{self.output}: with --consume-source every part has it, and the same count: "
                f"{agreed.get('consume') or 'none'} in the parts that were begun, here "
                f"{command.get('consume') or 'none'}"
            )
        return head, done_before

    def _open(self, head: dict[str, Any], done_before: CompletedWork) -> None:
        self.staging.staged_output.mkdir(exist_ok=True)
        self._files.open_shared()
        steps = frozenset(self.steps)
        done = read_part_journals(self.staging.parts, head, steps).done
        add_run(done, done_before, steps)
        path = new_journal_path(self.staging.parts, self.part)
        self._journal = Journal(path, head, done, self._sync)
        removal = None
        if self._consume:
            stubs = self.staging.header_stubs
            removal = SourceRemoval(self.plan, self.source, stubs, self.steps)
        self._progress = JournaledProgress(
            self.plan, self._journal, self._files, removal, self.steps
        )
        if removal is not None:
            removal.start(self._journal)

    def _check_same(self, before: Mapping[str, Any], head: Mapping[str, Any]) -> None:
        """Check that what another process began in the folder is the same conversion."""
        # Another machine may have a copy of the source, with other times of change.
        changed = before and describe_change({**before, "sources": head["sources"]}, head)
        if changed:
            raise OutputError(
                f"{self.output}: another conversion to this folder was begun in "
                f"{self.staging.path}, and {changed}; give the same command in every part, or "
                f"remove {self.staging.path} to start over"
            )

    def finish(self) -> None:
        """Hash what is complete, make everything durable, and then record that the part is done.

        Raises:
            OutputError: A file cannot be read back or written.
        """
        log = self.progress_log
        log.finish()
        log.journal.make_durable()
        log.journal.add(CompletedWork.FINISHED, durable=True)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None and self._progress is not None and self._progress.share() > 0:
            error.add_note(
                f"part {self.part}: {self._progress.share():.0%} is done and kept in "
                f"{self.staging.path}; the same command resumes"
            )
        self._close()

    def _close(self) -> None:
        self._close_files()
        self.staging.unlock()
