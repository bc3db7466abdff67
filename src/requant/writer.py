"""Step 5 of the road: the output folder, laid out before data arrives, named when complete.

Files grow in a hidden folder beside OUTPUT, so that the last rename is within one file
system. Until then nothing stands under OUTPUT's name; after a failure nothing stays.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from requant.blueprint import Plan
from requant.errors import OutputError

# Dirty pages of a shard are handed to the disk in runs of this size while the run goes on,
# so that the final fsync finds little to do.
_WRITEBACK_BYTES = 32 << 20


class Sink(Protocol):
    """Where the bytes of a plan's shards go."""

    def write(self, file: str, offset: int, data: memoryview) -> None:
        """Take ``data`` for an absolute offset of a shard; thread-safe, and ``data`` is lent."""


class OutputFolder:
    """An output that appears under its name only when it is whole.

    Used as a context manager: leaving it without ``publish`` removes what was written.
    Only ``write`` is called from several threads.
    """

    def __init__(self, plan: Plan, output: Path, force: bool) -> None:
        self.plan, self.output, self.force = plan, output, force
        self.staging = output.parent / f".{output.name}.requant-partial"
        self._files: dict[str, int] = {}
        self._unsent: dict[str, int] = {}

    def __enter__(self) -> Self:
        check_output(self.plan, self.output, self.force)
        try:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            if self.staging.exists():
                shutil.rmtree(self.staging)
            self.staging.mkdir()
            for shard in self.plan.shards:
                flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
                fd = os.open(self.staging / shard.name, flags, 0o666)
                self._files[shard.name] = fd
                self._unsent[shard.name] = 0
                os.ftruncate(fd, shard.nbytes)
                os.pwrite(fd, shard.header(), 0)
        except BaseException as error:
            self._discard()
            if isinstance(error, OSError):
                raise self._failure(error) from error
            raise
        return self

    def write(self, file: str, offset: int, data: memoryview) -> None:
        """Write ``data`` at an absolute offset of a shard; thread-safe."""
        fd = self._files[file]
        try:
            while data:
                written = os.pwrite(fd, data, offset)
                data, offset = data[written:], offset + written
                self._unsent[file] += written  # a lost update only delays the hint
            if self._unsent[file] > _WRITEBACK_BYTES and hasattr(os, "posix_fadvise"):
                self._unsent[file] = 0
                # Starts write-back of dirty pages; it does not wait for it.
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            raise self._failure(error) from error

    def publish(self) -> None:
        """Add everything that is no weight, make it durable, and give it its name.

        Raises:
            OutputError: A file cannot be written; OUTPUT is as it was before.
        """
        try:
            for shard_fd in self._files.values():
                os.fsync(shard_fd)
            self._close()
            self._write_json("model.safetensors.index.json", self.plan.index())
            self._write_json("config.json", dict(self.plan.config))
            for name in self.plan.side_files:
                target = self.staging / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self.plan.checkpoint.path / name, target)
                _fsync(target)
            _fsync(self.staging)
            self._rename()
            _fsync(self.output.parent)
        except OSError as error:
            raise self._failure(error) from error

    def _rename(self) -> None:
        if not self.output.exists():
            self.staging.rename(self.output)
            return
        old = self.output.parent / f".{self.output.name}.requant-old"
        shutil.rmtree(old, ignore_errors=True)
        self.output.rename(old)
        try:
            self.staging.rename(self.output)
        except OSError:
            old.rename(self.output)
            raise
        shutil.rmtree(old)

    def _write_json(self, name: str, value: object) -> None:
        path = self.staging / name
        path.write_text(json.dumps(value, indent=4, ensure_ascii=False) + "\n", "utf-8")
        _fsync(path)

    def _failure(self, error: OSError) -> OutputError:
        reason = error.strerror or str(error)
        return OutputError(f"{error.filename or self.output} cannot be written: {reason}")

    def _close(self) -> None:
        for fd in self._files.values():
            os.close(fd)
        self._files.clear()

    def _discard(self) -> None:
        self._close()
        shutil.rmtree(self.staging, ignore_errors=True)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._discard()


def check_output(plan: Plan, output: Path, force: bool) -> None:
    """Refuse an output that must not, or cannot, be written.

    Raises:
        OutputError: OUTPUT exists and ``force`` is not set, is no checkpoint folder, lies
            in SOURCE or holds it, or the disk has too little room.
    """
    source, target = plan.checkpoint.path.resolve(), output.resolve()
    if target == source or target in source.parents or source in target.parents:
        raise OutputError(f"{output}: the source {source} must not be changed; name another folder")
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise OutputError(f"{output} exists and is no folder")
    if output.exists() and any(output.iterdir()):
        if not force:
            raise OutputError(f"{output} exists; --force replaces it")
        if not (output / "config.json").is_file():
            raise OutputError(
                f"{output} exists and holds no config.json, so it is no checkpoint; "
                "--force replaces checkpoints only. Remove it yourself or name another folder"
            )
    existing = next(p for p in (target, *target.parents) if p.exists())
    side = sum((plan.checkpoint.path / name).stat().st_size for name in plan.side_files)
    needed = sum(shard.nbytes for shard in plan.shards) + side
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise OutputError(
            f"{output}: the disk is too full: {needed:,} bytes are needed, {free:,} are free"
        )


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
