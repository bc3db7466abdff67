"""Pipeline stage 5: the output folder, laid out before data arrives, named when complete.

It grows in the hidden folder that ``staging`` describes. Until the rename OUTPUT's name is free, or
is that of the folder that was there before. ``OutputFolder`` opens and publishes it; ``ShardFiles``
writes the weights, and ``JournaledProgress`` notes what is done.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from requant.checkpoints.checkpoint import OpenedSource
from requant.checkpoints.folder_files import CONFIG, INDEX, RECORD
from requant.core.files import fsync, hash_range, open_regular
from requant.errors import InvariantError, OutputError
from requant.execution.completed_work import CompletedWork, Stats
from requant.execution.sink import ProgressLog
from requant.output.journal import Journal, read_journal
from requant.output.preflight import check_output
from requant.output.record import build_record, encode_json, version
from requant.output.source_removal import SourceRemoval
from requant.output.staging import StagingFolder, bytes_on_disk
from requant.planning.plan import OutputShard, OutputTensor, Plan
from requant.planning.release_order import peak_disk_bytes
from requant.text import pluralize_are

_COPIED_BYTES = 1 << 20


class ShardFiles:
    """The weight files of an output while they are written, by positioned writes from any thread.

    Args:
        folder: Where they are.
        output: The folder that they will be in; for messages.
        shards: Their headers and sizes.
    """

    def __init__(self, folder: Path, output: Path, shards: Sequence[OutputShard]) -> None:
        self._folder, self._output, self._shards = folder, output, shards
        self._fds: dict[str, int] = {}

    def open(self) -> bool:
        """Open the files of an earlier run; False, and none open, if they are not as planned."""
        try:
            for shard in self._shards:
                fd = os.open(self._folder / shard.name, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
                self._fds[shard.name] = fd
                header = shard.header()
                is_sized = os.fstat(fd).st_size == shard.nbytes
                if not is_sized or os.pread(fd, len(header), 0) != header:
                    self.close()
                    return False
        except FileNotFoundError:
            self.close()
            return False
        return True

    def create(self) -> None:
        """Make the files with their headers, at full size."""
        for shard in self._shards:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            fd = os.open(self._folder / shard.name, flags, 0o666)
            self._fds[shard.name] = fd
            os.ftruncate(fd, shard.nbytes)
            os.pwrite(fd, shard.header(), 0)

    def write(self, file: str, offset: int, data: memoryview) -> None:
        """Write ``data`` at an absolute offset of a shard; thread-safe."""
        fd = self._fds[file]
        try:
            while data:
                written = os.pwrite(fd, data, offset)
                data, offset = data[written:], offset + written
        except OSError as error:
            raise _write_error(self._output, error) from error

    def hash(self, tensor: OutputTensor) -> str:
        """SHA-256, in hex, of a tensor's bytes as they are in its file."""
        try:
            return hash_range(self._fds[tensor.file], tensor.offset, tensor.info.nbytes)
        except OSError as error:
            raise OutputError(
                f"{self._folder / tensor.file} cannot be read back: {error.strerror or error}"
            ) from error

    def sync_data(self) -> None:
        """Make what was written durable."""
        for fd in list(self._fds.values()):
            getattr(os, "fdatasync", os.fsync)(fd)

    def finish(self) -> None:
        """Make the files durable, and close them."""
        for fd in self._fds.values():
            os.fsync(fd)
        self.close()

    def close(self) -> None:
        """Close the files."""
        fds, self._fds = self._fds, {}
        for fd in fds.values():
            os.close(fd)


class JournaledProgress:
    """The ``ProgressLog`` of an output: counts rows that are done, hashes tensors that are whole.

    Args:
        plan: What is written.
        journal: The open journal.
        files: The weight files.
        removal: Deletes source files that nothing else needs; None to keep them all.
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
            left = sum(
                stop - start for start, stop in self.state.remaining(number, step.rows.count)
            )
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
        """As the plan has them, or so that source files are free early."""
        if self._removal is not None:
            return self._removal.release.order
        return range(len(self._plan.steps))

    def mark_done(self, step: int, start: int, stop: int, found: Stats) -> Sequence[str]:
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
        """The hash of every tensor; of those too that a killed run wrote and did not hash."""
        for tensor in self._tensors.values():
            if tensor.name not in self.state.hashes:
                self._hash(tensor)
        return dict(self.state.hashes)

    def share(self) -> float:
        """How much of the work is done, from 0 to 1."""
        steps = self._plan.steps
        total = sum(step.rows.count * step.rows.columns for step in steps)
        done = sum(
            (stop - start) * steps[number].rows.columns
            for number, ranges in self.state.rows.items()
            for start, stop in ranges
        )
        return done / total if total else 1.0

    def _hash(self, tensor: OutputTensor) -> None:
        self.journal.add({"hash": [tensor.name, self._files.hash(tensor)]})


class OutputFolder:
    """An output that appears under its name only when it is whole: the ``Sink`` of a conversion.

    Used as a context manager. Leaving it without ``publish`` removes what was written; leaving it
    by an error keeps what is done for the next run, and says so in a note of the error. ``write``,
    and ``mark_done`` of its ``progress_log``, are called from several threads.

    Args:
        plan: What is written.
        source: The opened files that it is made from.
        output: The folder to be.
        force: Replace a checkpoint of that name.
        resume: Resume an earlier run of the same plan; else start over.
        options: The options that the plan was made from, for ``requant verify``.
        consume: Delete each source file once all that needs it is durable; of a source on the
            hub, what was downloaded of it.
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
        self.plan, self.source, self.output = plan, source, output
        self.force, self.resume = force, resume
        self.options = dict(options or {})
        self.staging = StagingFolder(output)
        self.resumed = False
        self._files = ShardFiles(self.staging.staged_output, output, plan.shards)
        self._removal = SourceRemoval(plan, source, self.staging.header_stubs) if consume else None
        self._journal: Journal | None = None
        self._progress: JournaledProgress | None = None

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
                raise _write_error(self.output, error) from error
            raise
        return self

    def _check(self) -> None:
        staged = bytes_on_disk(self.staging.staged_output)
        check_output(self.plan, self.output, self.force, staged, self._most_bytes())

    def _most_bytes(self) -> int | None:
        """What the disk must take at a time, where source files make room on the same disk."""
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
        head = self._journal_header()
        before, entries = read_journal(self.staging.journal)
        deleted = [line["consumed"] for line in entries if "consumed" in line]
        if deleted and not (self.resume and self._removal):
            raise OutputError(
                f"{self.output}: {pluralize_are(len(deleted), 'source file')} deleted already, and "
                f"what was made so far is in {self.staging.path}; "
                "resume with --consume-source --yes"
            )
        if before and self.resume:
            for name in deleted:
                head["sources"].setdefault(name, before["sources"].get(name))
            changed = _describe_change(before, head)
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
        if not self.resumed:
            entries = []
            self.staging.clear()
            self._files.create()
        self._journal = Journal(self.staging.journal, head, entries, self._sync)
        self._progress = JournaledProgress(self.plan, self._journal, self._files, self._removal)
        if self._removal is not None:
            self._removal.start(self._journal)

    def _journal_header(self) -> dict[str, Any]:
        """What must be the same for a run to resume another."""
        return {
            "requant": version(),
            "plan": self.plan.hash,
            "sources": self._file_stamps(),
            "nonfinite_layers": sorted(self.options.get("nonfinite_layers", ())),
        }

    def _file_stamps(self) -> dict[str, Any]:
        """What tells a source file from a changed one, without reading it."""
        if self.plan.repository is not None:
            return {f.name: [f.nbytes, *self.plan.repository] for f in self.plan.files}
        paths = {f.name: self.source.path / f.name for f in self.plan.files}
        stats = {name: path.stat() for name, path in paths.items() if path.exists()}
        return {name: [s.st_size, s.st_mtime_ns] for name, s in stats.items()}

    def _sync(self) -> None:
        self._files.sync_data()
        self.staging.sync_names()

    # -- running -------------------------------------------------------------------------

    @property
    def progress(self) -> JournaledProgress:
        """What is done, once the folder was entered."""
        assert self._progress is not None, "the folder was not entered"
        return self._progress

    @property
    def progress_log(self) -> ProgressLog:
        """Where a run notes what is done."""
        return self.progress

    def write(self, file: str, offset: int, data: memoryview) -> None:
        """Write ``data`` at an absolute offset of a shard; thread-safe."""
        self._files.write(file, offset, data)

    # -- the end -------------------------------------------------------------------------

    def publish(self, errors: Mapping[str, tuple[float, float]] | None = None) -> None:
        """Add everything that is not a weight, make it durable, and give it its name.

        Args:
            errors: Quantization errors by layer, as ``build_record`` takes them.

        Raises:
            OutputError: A file cannot be written; OUTPUT is as it was before.
        """
        try:
            hashes = self.progress.finish()
            self.progress.journal.close()
            self._files.finish()
            files = {
                INDEX: self._write_json(INDEX, self.plan.index()),
                CONFIG: self._write_json(CONFIG, dict(self.plan.config)),
                **{name: self._carry_over(name) for name in self.plan.side_files},
            }
            record = build_record(self.plan, self.options, hashes, files, errors)
            self._write_json(RECORD, record)
            self.staging.name_output()
        except OSError as error:
            if isinstance(error, OutputError):
                raise
            raise _write_error(self.output, error) from error

    def _carry_over(self, name: str) -> str:
        """Copy a file of the source, or generate it; its hash."""
        target = self.staging.staged_output / name
        target.parent.mkdir(parents=True, exist_ok=True)
        generate = self.source.generated_files.get(name)
        if generate is not None:
            data = generate()
            target.write_bytes(data)
            fsync(target)
            return hashlib.sha256(data).hexdigest()
        digest = hashlib.sha256()
        path = self.source.path / name
        with open(open_regular(path), "rb") as source, target.open("wb") as file:
            while block := source.read(_COPIED_BYTES):
                digest.update(block)
                file.write(block)
        fsync(target)
        return digest.hexdigest()

    def _write_json(self, name: str, value: object) -> str:
        path, data = self.staging.staged_output / name, encode_json(value)
        path.write_bytes(data)
        fsync(path)
        return hashlib.sha256(data).hexdigest()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._cleanup(error)

    def _cleanup(self, error: BaseException | None) -> None:
        """Close everything; keep what another run can resume from."""
        if self._journal is not None:
            self._journal.close()
        self._files.close()
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
            return self.staging.journal.exists()
        return bool(self._journal.state.rows)

    def _has_only_copy(self) -> bool:
        """Whether the data of deleted source files is in the hidden folder, and nowhere else."""
        if self._journal is None:
            return any("consumed" in line for line in read_journal(self.staging.journal)[1])
        return bool(self._journal.state.consumed) and self.staging.staged_output.exists()


def _write_error(output: Path, error: OSError) -> OutputError:
    reason = error.strerror or str(error)
    return OutputError(f"{error.filename or output} cannot be written: {reason}")


def _describe_change(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs between two runs, in words; "" where nothing does."""
    if before.get("requant") != now["requant"]:
        return f"requant is {now['requant']}, it was {before.get('requant')}"
    old, new = before.get("sources", {}), now["sources"]
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    if names:
        return f"the source's {', '.join(sorted(names)[:3])} changed"
    return "" if before.get("plan") == now["plan"] else "what is asked for changed"
