"""Pipeline stage 5: the output folder, laid out before data arrives, named when complete.

It grows in the hidden folder that ``staging`` describes. Until the rename OUTPUT does not exist, or
is the folder that was there before. ``OutputFolder`` opens and publishes it; ``ShardFiles`` writes
the weights, and ``JournaledProgress`` records what is done.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from requant.checkpoints.checkpoint import OpenedSource
from requant.checkpoints.folder_files import CONFIG, INDEX, RECORD
from requant.core.files import fsync, open_regular
from requant.errors import InvariantError, OutputError
from requant.execution.completed_work import CompletedWork
from requant.output.journal import Journal, read_journal
from requant.output.journaled_sink import JournaledSink
from requant.output.part_journals import (
    add_run,
    files_deleted_by_parts,
    read_command,
    read_part_journals,
)
from requant.output.preflight import check_output
from requant.output.progress import JournaledProgress
from requant.output.record import build_record, encode_json, version
from requant.output.shard_files import write_error
from requant.output.source_removal import SourceRemoval
from requant.output.staging import bytes_on_disk
from requant.planning.plan import Plan
from requant.planning.release_order import peak_disk_bytes
from requant.text import pluralize_are

_COPIED_BYTES = 1 << 20


class OutputFolder(JournaledSink):
    """The ``Sink`` of a conversion into a folder, which appears under its name when it is complete.

    A context manager. Leaving it without ``publish`` removes what was written; leaving it by an
    error keeps what is done for the next run, and adds a note to the error. ``write``, and
    ``mark_done`` of its ``progress_log``, are called from several threads.

    ``force`` replaces a checkpoint of that name; ``resume`` resumes an earlier run of the same plan
    instead of starting over. ``options``, from which the plan was made, are for ``requant verify``.
    ``consume`` deletes each source file once all that needs it is durable; of a source on the hub,
    what was downloaded of it.
    """

    def __init__(
        self,
        plan: Plan,
        source: OpenedSource,
        output: Path,
        force: bool,
        resume: bool = True,
        options: Mapping[str, Any] | None = None,
        consume: bool = False,
    ) -> None:
        super().__init__(plan, source, output, force)
        self.resume, self.resumed = resume, False
        self.options = dict(options or {})
        self._removal = SourceRemoval(plan, source, self.staging.header_stubs) if consume else None

    # -- opening -------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self._check()  # before anything is made
        try:
            self.staging.lock()
            self._check()  # the disk and the folder as they are now that no other process writes
            self._open()
        except BaseException as error:
            self._cleanup(error)
            if isinstance(error, OSError) and not isinstance(error, OutputError):
                raise write_error(self.output, error) from error
            raise
        return self

    def _check(self) -> None:
        staged = bytes_on_disk(self.staging.staged_output)
        check_output(self.plan, self.output, self.force, staged, self._most_bytes())

    def _most_bytes(self) -> int | None:
        """The most bytes on the disk at a time, where source files make room on the same disk."""
        if self._removal is None:
            return None
        if self.source.downloader is not None:
            downloaded = bytes_on_disk(self.staging.downloads)
            return max(peak_disk_bytes(self.plan) - downloaded, 0)
        path = self.output.absolute()
        existing = next(p for p in (*path.parents, path) if p.exists())
        same_disk = existing.stat().st_dev == self.source.path.stat().st_dev
        return self._removal.release.extra_bytes if same_disk else None

    def _open(self) -> None:
        self._plan_hash = self.plan.hash
        found = self.options.get("nonfinite_layers", ())
        head = journal_header(self.plan, self.source, self._plan_hash, found)
        before, done = read_journal(self.staging.journal)
        if not before and (command := read_command(self.staging.parts)) is not None:
            before = {**head, **{key: command.get(key) for key in ("requant", "plan")}}
        by_parts = files_deleted_by_parts(self.staging.parts)
        deleted = list(dict.fromkeys((*done.deleted_sources, *by_parts)))
        if deleted and not (self.resume and self._removal):
            raise OutputError(
                f"{self.output}: {pluralize_are(len(deleted), 'source file')} deleted already, and "
                f"what was made so far is in {self.staging.path}; "
                "resume with --consume-source --yes"
            )
        if before and self.resume:
            for name in before["sources"].keys() & {*deleted}:
                head["sources"].setdefault(name, before["sources"][name])
            changed = describe_change(before, head)
            if changed:
                raise OutputError(
                    f"{self.output}: a conversion that was stopped is kept in "
                    f"{self.staging.path}, and {changed} since; --no-resume starts over, or give "
                    "the same command as then"
                )
        self.resumed = bool(before) and self.resume and self._files.open()
        if deleted and not self.resumed:
            raise OutputError(
                f"{self.output}: {self.staging.staged_output} was changed, and files of the source "
                "that it was made from are deleted: nothing can be made whole here. It is left as "
                "it is"
            )
        if self.resumed:
            add_run(done, read_part_journals(self.staging.parts, head).done)
        else:
            done = CompletedWork()
            self.staging.clear()
            self._files.create()
        self._journal = Journal(self.staging.journal, head, done, self._sync)
        self._progress = JournaledProgress(self.plan, self._journal, self._files, self._removal)
        if self._removal is not None:
            self._removal.start(self._journal)

    # -- the end -------------------------------------------------------------------------

    def publish(
        self,
        errors: Mapping[str, tuple[float, float]] | None = None,
        rounding: Mapping[str, float] | None = None,
    ) -> None:
        """Write the files that hold no weights, make everything durable, and name the output.

        An output of one file has no others, and no record.

        ``errors`` are quantization errors by layer and ``rounding`` errors of rounded scales, as
        ``build_record`` takes them.

        Raises:
            OutputError: A file cannot be written; OUTPUT is as it was before.
        """
        try:
            hashes = self.progress_log.finish()
            self.progress_log.journal.close()
            self._check_staged()
            if self.plan.is_one_file:
                self._files.finish()
                self.staging.name_file(self.plan.shards[0].name)
                return
            files = {
                INDEX: self._write_file(INDEX, encode_json(self.plan.index())),
                CONFIG: self._write_file(CONFIG, encode_json(dict(self.plan.config))),
                **{name: self._copy_side_file(name) for name in self.plan.side_files},
            }
            record = build_record(
                self.plan,
                self._plan_hash,
                self.options,
                hashes,
                files,
                errors=errors,
                rounding=rounding,
            )
            self._write_file(RECORD, encode_json(record))
            self._check_staged()
            self._files.finish()
            self.staging.name_output()
        except OSError as error:
            if isinstance(error, OutputError):
                raise
            raise write_error(self.output, error) from error

    def _check_staged(self) -> None:
        """Check that the files are still in the hidden folder.

        Where a file system has no locks, another process may have published them.
        """
        if not self._files.are_in_place():
            raise OutputError(
                f"{self.output}: {self.staging.staged_output} was moved or changed by another "
                "process; look whether the output is complete: requant verify "
                f"{shlex.quote(str(self.output))}"
            )

    def _copy_side_file(self, name: str) -> str:
        """Copy a file of the source, or generate it; returns its hash."""
        generate = self.source.generated_files.get(name)
        if generate is not None:
            return self._write_file(name, generate())
        digest = hashlib.sha256()
        target = self.staging.staged_output / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(open_regular(self.source.path / name), "rb") as file, target.open("wb") as copy:
            while block := file.read(_COPIED_BYTES):
                digest.update(block)
                copy.write(block)
        fsync(target)
        return digest.hexdigest()

    def _write_file(self, name: str, data: bytes) -> str:
        path = self.staging.staged_output / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        fsync(path)
        return hashlib.sha256(data).hexdigest()

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._cleanup(error)

    def _cleanup(self, error: BaseException | None) -> None:
        """Close everything; keep what another run can resume from."""
        self._close_files()
        if not self.staging.is_locked:
            return
        has_only_copy = self._has_only_copy()
        # Another run fails on the same data again: there is nothing to resume.
        is_final = error is None or isinstance(error, InvariantError)
        if has_only_copy or (self._has_work() and not is_final):
            if error is not None and self._progress is not None:
                error.add_note(
                    f"{self._progress.share():.0%} is done and kept in {self.staging.path}; the "
                    "same command resumes" + ("" if has_only_copy else ", --no-resume starts over")
                )
        else:
            self.staging.remove()
        self.staging.unlock()

    def _has_work(self) -> bool:
        """Whether the hidden folder has anything that a run can resume from."""
        if bytes_on_disk(self.staging.downloads) > 0:
            return True
        if self._journal is None:
            return self.staging.journal.exists() or self.staging.parts.exists()
        return bool(self._journal.state.rows)

    def _has_only_copy(self) -> bool:
        """Whether the data of deleted source files is in the hidden folder, and nowhere else."""
        if self._journal is None:
            deleted = read_journal(self.staging.journal)[1].deleted_sources
            return bool(deleted or files_deleted_by_parts(self.staging.parts))
        return bool(self._journal.state.deleted_sources) and self.staging.staged_output.exists()


def journal_header(
    plan: Plan, source: OpenedSource, plan_hash: str, nonfinite_layers: Iterable[str]
) -> dict[str, Any]:
    """The values that must be equal for a run to resume another."""
    return {
        "requant": version(),
        "plan": plan_hash,
        "sources": _file_stamps(plan, source),
        "nonfinite_layers": sorted(nonfinite_layers),
    }


def _file_stamps(plan: Plan, source: OpenedSource) -> dict[str, Any]:
    """Values that differ when a source file was changed, found without reading it."""
    if plan.repository is not None:
        return {f.name: [f.nbytes, *plan.repository] for f in plan.files}
    paths = {f.name: source.path / f.name for f in plan.files}
    stats = {name: path.stat() for name, path in paths.items() if path.exists()}
    return {name: [s.st_size, s.st_mtime_ns] for name, s in stats.items()}


def describe_change(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The difference between two runs, in words; "" for none."""
    if before.get("requant") != now["requant"]:
        return f"requant is {now['requant']}, it was {before.get('requant')}"
    old, new = before.get("sources", {}), now["sources"]
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    if names:
        return f"the source's {', '.join(sorted(names)[:3])} changed"
    return "" if before.get("plan") == now["plan"] else "what is asked for changed"
