"""The journal of a conversion: what is done, on the disk, so that a killed run resumes.

A journal is a file of JSON lines: first what the run was made from, then lines for rows of a step
that were written, with their statistics. A line is appended when its bytes were written to
the system, which outlives a killed process. Every other second the data is synced to the disk, and
then a line says how many lines before it no loss of power can take back.

A line is appended for each chunk. When these lines take more than the sum of them would, the
journal is replaced by one with a line for each step, so that it does not grow with the chunks.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from requant.core.files import fsync, replace_file
from requant.errors import OutputError
from requant.execution.completed_work import CompletedWork, rows_line
from requant.execution.layer_stats import LayerStats
from requant.text import os_error_text

SYNC_EVERY_S = 2.0
MERGED_ABOVE_BYTES = 1 << 20
_CLOSING_S = 0.3
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def read_journal(path: Path) -> tuple[dict[str, Any], CompletedWork]:
    """The head of a journal and the sum of its valid lines; ({}, nothing done) without any.

    After a restart of the machine these are the lines that were synced; else all of them. The
    file is read line by line, twice after a restart.
    """
    done = CompletedWork()
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return {}, done
    with file:
        lines = _valid_lines(file)
        head = next(lines, {})
        if "plan" not in head:
            return {}, done
        if head.get("boot") and head["boot"] == boot_id():
            for line in lines:
                done.add(line)
            return head, done
        synced = max((line.get("durable", 0) for line in lines), default=0)
        file.seek(0)
        for number, line in enumerate(islice(_valid_lines(file), 1, None)):
            # A file is deleted only after the line that says so was synced, all it rests on before.
            if number < synced or "deleted_source" in line:
                done.add(line)
    return head, done


def _valid_lines(file: BinaryIO) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file up to the first line that is none, or was cut."""
    for text in file:
        try:
            line = json.loads(text) if text.endswith(b"\n") else None
        except ValueError:
            return
        if not isinstance(line, dict):
            return
        yield line


def boot_id() -> str:
    """The identifier of this start of the machine; "" where there is none."""
    with suppress(OSError):
        return _BOOT_ID.read_text().strip()
    return ""


class Journal:
    """The journal of a running conversion; thread-safe.

    The file is replaced by ``head``, what the run is made from, and lines for ``done``, the work of
    earlier runs, which is then added to. ``sync`` makes durable what was written to the output so
    far; that of earlier runs is synced before the file is replaced.
    """

    def __init__(
        self, path: Path, head: Mapping[str, Any], done: CompletedWork, sync: Callable[[], None]
    ) -> None:
        self.path, self.state = path, done
        self._head = {**head, "boot": boot_id()}
        self._sync, self._lock, self._syncing = sync, threading.Lock(), threading.Lock()
        self._stop, self._thread = threading.Event(), threading.Thread(target=self._keep_durable)
        self._thread.name, self._thread.daemon = "requant-journal", True
        self._error: OSError | None = None
        self._fd = -1
        lines = self._merged_lines()
        if lines:
            sync()
            lines.append(_encode_line({"durable": len(lines)}))
        self._replace(lines)
        self._durable = self._lines
        self._thread.start()

    def mark_done(self, step: int, start: int, stop: int, found: LayerStats) -> None:
        """Record that a range of rows was written, with its statistics."""
        self.add(rows_line(step, (start, stop), found))

    def add(self, line: Mapping[str, Any], *, durable: bool = False) -> None:
        """Append a line; with ``durable``, after all that was done before it is on the disk.

        Raises:
            OutputError: The journal, or the data before it, cannot be written.
        """
        try:
            if durable:
                self.make_durable()
            with self._lock:
                if self._error is not None:
                    raise self._error
                _write(self._fd, _encode_line(line))
                self._lines += 1
                self.state.add(line)
                if durable:
                    os.fsync(self._fd)
        except OSError as error:
            raise OutputError(f"{self.path}: {os_error_text(error)}") from error

    def make_durable(self) -> None:
        """Sync the data, then say so; one thread at a time, so that the count never falls."""
        with self._syncing:
            self._make_durable()

    def _make_durable(self) -> None:
        """Sync the data of all lines so far, and append a marker that counts them.

        Lines are counted after the head, markers included. Example: 10 lines are there when the
        sync begins. If no other thread appends a line during the sync, the marker
        ``{"durable": 10}`` is line 11, and it is synced with the journal itself: all 11 lines are
        durable, and the next call has nothing to do. If two lines are appended meanwhile, the
        marker is line 13: only the data of the first 10 lines is known to be durable, and the next
        call syncs again.

        Where the 10 lines are many, 3 merged lines take their place: the new journal has these,
        the marker ``{"durable": 3}``, and the two lines that were appended meanwhile.
        """
        with self._lock:
            lines, nbytes = self._lines, os.fstat(self._fd).st_size
            merged = self._merged_lines() if nbytes > self._merge_above else None
        if lines == self._durable:
            return
        self._sync()
        with self._lock:
            if self._stop.is_set():  # the files may be closed already: what was synced is unknown
                return
            appended = self._lines - lines
            if merged is not None:
                with self.path.open("rb") as old:
                    old.seek(nbytes)
                    tail = old.readlines()
                self._replace([*merged, _encode_line({"durable": len(merged)}), *tail])
            else:
                _write(self._fd, _encode_line({"durable": lines}))
                self._lines += 1
                os.fsync(self._fd)
            self._durable = self._lines if not appended else self._lines - appended - 1

    def _merged_lines(self) -> list[bytes]:
        """Lines that say in the least space what is done."""
        return [_encode_line(line) for line in self.state.lines()]

    def _replace(self, lines: Iterable[bytes]) -> None:
        """Put a new journal with these lines in the place of the file, and append to it from now.

        The new name is synced: a deletion of a source file must not be noted in a file that a loss
        of power takes back.
        """
        self._lines = 0
        with replace_file(self.path) as file:
            file.write(_encode_line(self._head))
            for line in lines:
                file.write(line)
                self._lines += 1
            self._merge_above = max(MERGED_ABOVE_BYTES, 2 * file.tell())
        fsync(self.path.parent)
        before, flags = self._fd, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC
        self._fd = os.open(self.path, flags)
        if before >= 0:
            os.close(before)

    def close(self) -> None:
        """Stop writing; the file stays. A sync that takes long is not waited for."""
        with self._lock:  # from here on nothing takes the place of the file
            self._stop.set()
        self._thread.join(_CLOSING_S)
        if self._fd >= 0 and not self._thread.is_alive():
            os.close(self._fd)
            self._fd = -1

    def _keep_durable(self) -> None:
        while not self._stop.wait(SYNC_EVERY_S):
            try:
                self.make_durable()
            except OSError as error:
                with self._lock:
                    self._error = error
                return


def _encode_line(line: Mapping[str, Any]) -> bytes:
    return json.dumps(line, separators=(",", ":")).encode() + b"\n"


def _write(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]
