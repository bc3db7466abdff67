"""Deletion of source files whose data is durable in the output (``--consume-source``).

Of a weight file that is deleted a *header stub* is kept: a sparse file of its size with its header
and the small tensors that planning read. A later run plans from header stubs as from the files.
"""

from __future__ import annotations

import json
import secrets
import struct
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

from requant.checkpoints.byte_ranges import FileRange
from requant.checkpoints.checkpoint import COMPARED, OpenedSource, SourceFile
from requant.checkpoints.safetensors_header import PREFIX_BYTES
from requant.core.files import fsync, replace_file
from requant.errors import CheckpointError, OutputError
from requant.output.journal import Journal
from requant.planning.plan import Plan
from requant.planning.release_order import ReleaseOrder, plan_release_order
from requant.text import os_error_text


class SourceRemoval:
    """Deletes each source file once all that is made from it is durable.

    Of a source on the hub the downloader deletes the files; what is needed again is downloaded
    again, so that nothing here is the only copy. Not thread-safe: the caller holds a lock around
    ``count``. ``steps`` are those of a part, to which each file that they read belongs; all other
    files are left alone.
    """

    def __init__(
        self,
        plan: Plan,
        source: OpenedSource,
        header_stubs: Path,
        steps: Collection[int] | None = None,
    ) -> None:
        self._plan, self._source, self._header_stubs = plan, source, header_stubs
        self.release: ReleaseOrder = plan_release_order(plan)
        needs = self.release.needs
        own = None if steps is None else {name for number in steps for name in needs[number]}
        self._files = [file for file in plan.files if own is None or file.name in own]
        self._rows_left = Counter[str]()

    def add_rows(self, step: int, rows: int) -> None:
        """Count rows of a step that are not done yet."""
        for name in self.release.needs[step]:
            self._rows_left[name] += rows

    def count(self, step: int, rows: int) -> list[str]:
        """Take rows off that are done; the files of which nothing else is needed."""
        free = []
        for name in self.release.needs[step]:
            self._rows_left[name] -= rows
            if not self._rows_left[name]:
                free.append(name)
        return free

    def start(self, journal: Journal) -> None:
        """Write header stubs, and finish what a killed run began.

        Raises:
            OutputError: A source file is a link, or cannot be deleted.
        """
        files, deleted = self._files, journal.state.deleted_sources
        downloader = self._source.downloader
        if downloader is not None:
            for file in files:
                if not self._rows_left[file.name]:
                    downloader.release(file.name)
            return
        for file in files:
            path = self._source.path / file.name
            if file.name in deleted:
                delete_source(path)  # the run was killed between journal and deletion
            elif path.is_symlink():
                raise OutputError(
                    f"{path} is a link: deleting it would free nothing, or what others use; "
                    "--consume-source wants the file itself"
                )
        write_header_stubs(self._source, self._plan.files, self._header_stubs)
        for file in files:  # what the last run had no time to delete
            if not self._rows_left[file.name] and file.name not in deleted:
                self.remove(file.name, journal)

    def remove(self, name: str, journal: Journal) -> None:
        """Delete a source file, after all that was made from it was synced to the disk."""
        if self._source.downloader is not None:  # the run releases the file to the downloader
            journal.make_durable()
            return
        journal.add({"deleted_source": name}, durable=True)
        delete_source(self._source.path / name)


def write_header_stubs(source: OpenedSource, files: Sequence[SourceFile], folder: Path) -> None:
    """Keep of each weight file its size, its header and the small tensors that were read.

    The rest of a stub is a hole. Results of comparisons of tensors are kept in a file next to them.
    """
    folder.mkdir(exist_ok=True)
    for file in files:
        stub = folder / file.name
        if stub.exists():
            continue
        try:
            _write_header_stub(source, file, stub)
        except CheckpointError:
            if not stub.exists():  # else another part has written it, and deleted the file
                raise
    with replace_file(folder / COMPARED, secrets.token_hex(4)) as new:
        new.write(json.dumps(source.compared).encode())
    fsync(folder)


def _write_header_stub(source: OpenedSource, file: SourceFile, stub: Path) -> None:
    stub.parent.mkdir(parents=True, exist_ok=True)
    (length,) = struct.unpack("<Q", source.read_range(FileRange(file.name, 0, PREFIX_BYTES)))
    header = FileRange(file.name, 0, PREFIX_BYTES + length)
    with replace_file(stub, secrets.token_hex(4)) as new:
        new.truncate(file.nbytes)
        for part in (header, *source.small_tensor_ranges()):
            if part.file == file.name:
                new.seek(part.offset)
                new.write(source.read_range(part))
    fsync(stub.parent)


def delete_source(path: Path) -> None:
    """Delete a source file that is needed no more, unless it is gone."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{path} cannot be deleted: {os_error_text(error)}") from error
