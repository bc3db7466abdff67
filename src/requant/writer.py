"""Step 5 of the road: the output folder, laid out before data arrives, named when complete.

It grows in the hidden folder that ``staging`` describes. Until the rename nothing stands under
OUTPUT's name, or what stood there before.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from requant.blueprint import OutputTensor, Plan
from requant.consuming import delete_source, make_twins, most_with_consume_source, release
from requant.errors import InvariantError, OutputError, count_are
from requant.journal import Done, Found, Journal, read_journal
from requant.record import hash_range, make_record, spelled, version
from requant.sink import Ledger
from requant.source_folder import CONFIG, INDEX, RECORD, open_regular
from requant.staging import bytes_on_disk, downloads_of, fsync, lock_staging, staging_of, twins_of

_COPIED_BYTES = 1 << 20


class OutputFolder:
    """An output that appears under its name only when it is whole.

    Used as a context manager. Leaving it without ``publish`` removes what was written;
    leaving it by an error keeps what is done for the next run, and says so in a note of the
    error. ``write`` and ``done`` are called from several threads.

    Args:
        plan: What is written.
        output: The folder to be.
        force: Replace a checkpoint that stands there.
        resume: Go on where an earlier run of the same plan stopped; else start over.
        wishes: What the plan was made from, for ``requant verify``.
        consume: Delete each source file once all that needs it is durable; of a source on the
            hub, what was downloaded of it.
    """

    def __init__(
        self,
        plan: Plan,
        output: Path,
        force: bool,
        resume: bool = True,
        wishes: Mapping[str, Any] | None = None,
        consume: bool = False,
    ) -> None:
        self.plan, self.output, self.force, self.resume = plan, output, force, resume
        self.wishes = dict(wishes or {})
        self.staging = staging_of(output)
        self.inside = self.staging / "output"
        self.replaced = self.staging / "replaced"
        self.twins = twins_of(output)
        self.resumed = False
        self.release = release(plan) if consume else None
        self._source_rows = Counter[str]()
        self._files: dict[str, int] = {}
        self._lock: int | None = None
        self._journal: Journal | None = None
        self._tensors = {t.name: t for shard in plan.shards for t in shard.tensors}
        self._rows_left = Counter[str]()
        self._counting = threading.Lock()

    # -- opening -------------------------------------------------------------------------

    def __enter__(self) -> Self:
        check_output(
            self.plan, self.output, self.force, bytes_on_disk(self.inside), self._most_bytes()
        )
        try:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            self._lock = lock_staging(self.staging, self.output)
            self._put_back()
            check_output(
                self.plan, self.output, self.force, bytes_on_disk(self.inside), self._most_bytes()
            )
            self._open()
        except BaseException as error:
            self._leave(error)
            if isinstance(error, OSError) and not isinstance(error, OutputError):
                raise self._failure(error) from error
            raise
        return self

    def _most_bytes(self) -> int | None:
        """What the disk must take at a time, where source files make room on the same disk."""
        if self.release and self._remote:
            here = bytes_on_disk(downloads_of(self.output))
            return max(most_with_consume_source(self.plan) - here, 0)
        place = self.output.absolute()
        existing = next(p for p in (*place.parents, place) if p.exists())
        same = existing.stat().st_dev == self.plan.checkpoint.path.stat().st_dev
        return self.release.extra_bytes if self.release and same else None

    @property
    def _remote(self) -> bool:
        """Whether the source is on the hub: then nothing here is the only copy."""
        return self.plan.checkpoint.supply is not None

    def _put_back(self) -> None:
        """Undo a replacement that a killed process left half done."""
        if not self.replaced.exists():
            return
        if self.output.exists():
            shutil.rmtree(self.replaced)
        else:
            self.replaced.rename(self.output)

    def _open(self) -> None:
        head = self._head()
        before, entries = read_journal(self.staging / "journal")
        consumed = [line["consumed"] for line in entries if "consumed" in line]
        if consumed and not (self.resume and self.release):
            raise OutputError(
                f"{self.output}: {count_are(len(consumed), 'source file')} deleted already, and "
                f"what was made so far is in {self.staging}; "
                "go on with --consume-source --yes"
            )
        if before and self.resume:
            for name in consumed:
                head["sources"].setdefault(name, before["sources"].get(name))
            changed = _changed(before, head)
            if changed:
                raise OutputError(
                    f"{self.output}: a conversion that was stopped is kept in {self.staging}, and "
                    f"{changed} since; --no-resume starts over, or give the same command as then"
                )
        self.resumed = bool(before) and self.resume and self._open_shards()
        if consumed and not self.resumed:
            raise OutputError(
                f"{self.output}: {self.inside} was changed, and files of the source that it was "
                "made from are deleted: nothing can be made whole here. It is left as it is"
            )
        if not self.resumed:
            entries = []
            self._lay_out()
        self._journal = Journal(self.staging / "journal", head, entries, self._sync)
        for number, step in enumerate(self.plan.steps):
            left = sum(stop - start for start, stop in self._journal.state.left(number, step.rows))
            for out in step.outputs.values():
                self._rows_left[out.name] += left
            for name in self.release.needs[number] if self.release else ():
                self._source_rows[name] += left
        if self.release is not None:
            self._begin_consuming()

    def _begin_consuming(self) -> None:
        """Keep what a later plan needs of files that go; finish what a killed run began."""
        checkpoint = self.plan.checkpoint
        if checkpoint.supply is not None:
            for file in self.plan.files:
                if not self._source_rows[file.name]:
                    checkpoint.supply.release(file.name)
            return
        for file in self.plan.files:
            path = checkpoint.path / file.name
            if file.name in self.state.consumed:
                delete_source(path)  # killed after the journal said so
            elif path.is_symlink():
                raise OutputError(
                    f"{path} is a link: deleting it would free nothing, or what others use; "
                    "--consume-source wants the file itself"
                )
        make_twins(checkpoint, self.plan.files, self.twins)
        for file in self.plan.files:  # what the last run had no time to delete
            if not self._source_rows[file.name] and file.name not in self.state.consumed:
                self._consume(file.name)

    def _consume(self, name: str) -> None:
        """Delete a source file: all that was made from it is on the disk."""
        if self._remote:  # the run tells the supply; what is needed again comes again
            self.journal.make_durable()
            return
        self.journal.add({"consumed": name}, durable=True)
        delete_source(self.plan.checkpoint.path / name)

    def _head(self) -> dict[str, Any]:
        """What must be the same for a run to go on where another stopped."""
        return {
            "requant": version(),
            "plan": self.plan.hash,
            "sources": self._stamps(),
            "nonfinite_layers": sorted(self.wishes.get("nonfinite_layers", ())),
        }

    def _stamps(self) -> dict[str, Any]:
        """What tells a source file from a changed one, without reading it."""
        checkpoint = self.plan.checkpoint
        if checkpoint.repository is not None:
            return {f.name: [f.nbytes, *checkpoint.repository] for f in self.plan.files}
        places = {f.name: checkpoint.path / f.name for f in self.plan.files}
        stats = {name: path.stat() for name, path in places.items() if path.exists()}
        return {name: [s.st_size, s.st_mtime_ns] for name, s in stats.items()}

    def _open_shards(self) -> bool:
        """Open the files of an earlier run, if they are what they should be."""
        try:
            for shard in self.plan.shards:
                fd = os.open(self.inside / shard.name, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
                self._files[shard.name] = fd
                header = shard.header()
                sound = os.fstat(fd).st_size == shard.nbytes
                if not sound or os.pread(fd, len(header), 0) != header:
                    self._close_files()
                    return False
        except FileNotFoundError:
            self._close_files()
            return False
        return True

    def _lay_out(self) -> None:
        for name in ("journal", "journal.new"):
            (self.staging / name).unlink(missing_ok=True)
        if self.inside.exists():
            shutil.rmtree(self.inside)
        self.inside.mkdir()
        for shard in self.plan.shards:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            fd = os.open(self.inside / shard.name, flags, 0o666)
            self._files[shard.name] = fd
            os.ftruncate(fd, shard.nbytes)
            os.pwrite(fd, shard.header(), 0)

    # -- running -------------------------------------------------------------------------

    @property
    def ledger(self) -> Ledger:
        """The folder itself: it hashes each tensor whose last rows are done."""
        return self

    @property
    def state(self) -> Done:
        """What an earlier run did."""
        return self.journal.state

    @property
    def journal(self) -> Journal:
        """The open journal."""
        assert self._journal is not None, "the folder was not entered"
        return self._journal

    def write(self, file: str, offset: int, data: memoryview) -> None:
        """Write ``data`` at an absolute offset of a shard; thread-safe."""
        fd = self._files[file]
        try:
            while data:
                written = os.pwrite(fd, data, offset)
                data, offset = data[written:], offset + written
        except OSError as error:
            raise self._failure(error) from error

    @property
    def order(self) -> Sequence[int]:
        """As the plan has them, or so that source files are free early."""
        return self.release.order if self.release else range(len(self.plan.steps))

    def done(self, step: int, start: int, stop: int, found: Found) -> Sequence[str]:
        """Note a range of rows; hash the tensors, delete the source files that are done."""
        self.journal.done(step, start, stop, found)
        whole, free = [], []
        with self._counting:
            for name in self.release.needs[step] if self.release else ():
                self._source_rows[name] -= stop - start
                if not self._source_rows[name]:
                    free.append(name)
            for out in self.plan.steps[step].outputs.values():
                self._rows_left[out.name] -= stop - start
                if not self._rows_left[out.name]:
                    whole.append(out.name)
        for name in whole:
            self._hash(self._tensors[name])
        for name in free:
            self._consume(name)
        return free

    def _hash(self, tensor: OutputTensor) -> None:
        try:
            digest = hash_range(self._files[tensor.file], tensor.offset, tensor.info.nbytes)
        except OSError as error:
            raise OutputError(
                f"{self.inside / tensor.file} cannot be read back: {error.strerror or error}"
            ) from error
        self.journal.add({"hash": [tensor.name, digest]})

    def _sync(self) -> None:
        for fd in list(self._files.values()):
            _fdatasync(fd)
        for folder in (self.inside, self.staging, self.output.parent):
            fsync(folder)

    # -- the end -------------------------------------------------------------------------

    def publish(self, errors: Mapping[str, tuple[float, float]] | None = None) -> None:
        """Add everything that is no weight, make it durable, and give it its name.

        Args:
            errors: What new codes lost, by layer, as ``make_record`` takes it.

        Raises:
            OutputError: A file cannot be written; OUTPUT is as it was before.
        """
        try:
            for tensor in self._tensors.values():  # what a killed run wrote and did not hash
                if tensor.name not in self.state.hashes:
                    self._hash(tensor)
            hashes = dict(self.state.hashes)
            self.journal.close()
            for shard_fd in self._files.values():
                os.fsync(shard_fd)
            self._close_files()
            files = {
                INDEX: self._write_json(INDEX, self.plan.index()),
                CONFIG: self._write_json(CONFIG, dict(self.plan.config)),
                **{name: self._carry_over(name) for name in self.plan.side_files},
            }
            record = make_record(self.plan, self.wishes, hashes, files, errors)
            self._write_json(RECORD, record)
            for folder, _, _ in os.walk(self.inside):
                fsync(Path(folder))
            self._rename()
            fsync(self.output.parent)
            shutil.rmtree(self.staging, ignore_errors=True)
        except OSError as error:
            if isinstance(error, OutputError):
                raise
            raise self._failure(error) from error

    def _rename(self) -> None:
        if not self.output.exists():
            self.inside.rename(self.output)
            return
        self.output.rename(self.replaced)
        try:
            self.inside.rename(self.output)
        except OSError:
            self.replaced.rename(self.output)
            raise

    def _carry_over(self, name: str) -> str:
        """Copy a file of the source; its hash."""
        target = self.inside / name
        target.parent.mkdir(parents=True, exist_ok=True)
        made = self.plan.checkpoint.made_files.get(name)
        if made is not None:
            data = made()
            target.write_bytes(data)
            fsync(target)
            return hashlib.sha256(data).hexdigest()
        digest = hashlib.sha256()
        path = self.plan.checkpoint.path / name
        with open(open_regular(path), "rb") as source, target.open("wb") as file:
            while block := source.read(_COPIED_BYTES):
                digest.update(block)
                file.write(block)
        fsync(target)
        return digest.hexdigest()

    def _write_json(self, name: str, value: object) -> str:
        path, data = self.inside / name, spelled(value)
        path.write_bytes(data)
        fsync(path)
        return hashlib.sha256(data).hexdigest()

    def _failure(self, error: OSError) -> OutputError:
        reason = error.strerror or str(error)
        return OutputError(f"{error.filename or self.output} cannot be written: {reason}")

    def _close_files(self) -> None:
        files, self._files = self._files, {}
        for fd in files.values():
            os.close(fd)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._leave(error)

    def _leave(self, error: BaseException | None) -> None:
        """Close everything; keep what another run can go on from."""
        entered, journal = self._journal is not None, self._journal
        if journal is not None:
            journal.close()
        self._close_files()
        if self._lock is None:
            return
        kept = bool(journal.state.rows) if journal is not None else self._has_journal()
        kept = kept or bytes_on_disk(downloads_of(self.output)) > 0
        # What a layer's own data contradicts, no further run can do better.
        keep = error is not None and kept and not isinstance(error, InvariantError)
        if keep or self._holds_the_source():
            if entered:
                share = f"{self._share_done():.0%} is done and kept in {self.staging}"
                (error or KeyboardInterrupt()).add_note(
                    f"{share}; the same command goes on from there"
                    + ("" if self._holds_the_source() else ", --no-resume starts over")
                )
        else:
            shutil.rmtree(self.staging, ignore_errors=True)
        os.close(self._lock)
        self._lock = None

    def _holds_the_source(self) -> bool:
        """Whether the only copy of something is in the hidden folder."""
        consumed = read_journal(self.staging / "journal")[1] if self._journal is None else []
        if self._journal is not None:
            return bool(self.state.consumed) and self.staging.exists() and self.inside.exists()
        return any("consumed" in line for line in consumed)

    def _has_journal(self) -> bool:
        return (self.staging / "journal").exists()

    def _share_done(self) -> float:
        total = sum(step.rows * step.columns for step in self.plan.steps)
        done = sum(
            (stop - start) * self.plan.steps[number].columns
            for number, ranges in self.state.rows.items()
            for start, stop in ranges
        )
        return done / total if total else 1.0


def check_output(
    plan: Plan, output: Path, force: bool, spent: int = 0, most: int | None = None
) -> None:
    """Refuse an output that must not, or cannot, be written.

    Args:
        plan: What is to be written.
        output: Where to.
        force: Whether a checkpoint there may be replaced.
        spent: Bytes on the disk that an earlier run wrote already.
        most: Bytes of weights that the disk must take at a time; None for all of them.

    Raises:
        OutputError: OUTPUT exists and ``force`` is not set, is no checkpoint folder, lies
            in SOURCE or holds it, or the disk has too little room.
    """
    source, target = plan.checkpoint.source.resolve(), output.resolve()
    within = target == source or target in source.parents or source in target.parents
    if within and plan.checkpoint.repository is None:
        raise OutputError(f"{output}: the source {source} must not be changed; name another folder")
    if why := _why_not_writable(output, target):
        raise OutputError(f"{output} {why}; name another folder")
    if output.exists() and any(output.iterdir()):
        if not (output / "config.json").is_file():
            raise OutputError(
                f"{output} exists and holds no config.json, so it is no checkpoint; "
                "--force replaces checkpoints only. Remove it yourself or name another folder"
            )
        if not force:
            raise OutputError(f"{output} exists; --force replaces it")
    existing = next(p for p in (target, *target.parents) if p.exists())
    side = sum((plan.checkpoint.path / name).stat().st_size for name in plan.checkpoint.side_files)
    whole = sum(shard.nbytes for shard in plan.shards)
    needed = max((whole if most is None else most) + side - spent, 0)
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise OutputError(
            f"{output}: the disk is too full: {needed:,} bytes are needed, {free:,} are free"
        )


def _why_not_writable(output: Path, target: Path) -> str:
    """Why a folder cannot get the name of OUTPUT, or nothing; --force changes none of it."""
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        return "exists and is no folder, which --force does not replace"
    if not target.name:
        return "is the root of the file system"
    if os.path.ismount(target):
        return "is where a disk is mounted, and cannot be replaced; one inside it can be made"
    with suppress(FileNotFoundError):  # a shell can stand in a folder that was deleted
        if target == Path.cwd():
            return "is the folder that this command runs in, and is not replaced"
    above = next(p for p in target.parents if os.path.lexists(p))
    if not above.is_dir():
        return f"cannot be made: {above} is no folder"
    if not os.access(above, os.W_OK | os.X_OK):
        return f"cannot be made: writing in {above} is not permitted"
    return ""


def _fdatasync(fd: int) -> None:
    getattr(os, "fdatasync", os.fsync)(fd)


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs between two runs, in words; "" where nothing does."""
    if before.get("requant") != now["requant"]:
        return f"requant is {now['requant']}, it was {before.get('requant')}"
    old, new = before.get("sources", {}), now["sources"]
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    if names:
        return f"the source's {', '.join(sorted(names)[:3])} changed"
    return "" if before.get("plan") == now["plan"] else "what is asked for changed"
