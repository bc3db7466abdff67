"""The journal of a conversion: what is done, on the disk, so that a killed run resumes.

A journal is a file of JSON lines: first what the run was made from, then a line for each range of
rows that was written, with its statistics. A line is appended when its bytes were written to
the system, which outlives a killed process. Every other second the data is synced to the disk, and
then a line says how many lines before it no loss of power can take back.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from requant.core.files import replace_file
from requant.errors import OutputError
from requant.execution.completed_work import CompletedWork, Stats
from requant.text import os_error_text

SYNC_EVERY_S = 2.0
_CLOSING_S = 0.3
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def read_journal(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The head of a journal and the lines that are valid; ({}, []) without any.

    After a restart of the machine these are the lines that were synced; else all of them.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return {}, []
    lines: list[dict[str, Any]] = []
    for text in raw.split(b"\n")[:-1]:  # what follows the last line end was cut
        try:
            line = json.loads(text)
        except ValueError:
            break
        if not isinstance(line, dict):
            break
        lines.append(line)
    if not lines or "plan" not in lines[0]:
        return {}, []
    head, entries = lines[0], lines[1:]
    if not head.get("boot") or head["boot"] != boot_id():
        durable = [line["durable"] for line in entries if "durable" in line]
        synced = max(durable, default=0)
        # A file is deleted only after the line that says so was synced, all it rests on before.
        entries = entries[:synced] + [x for x in entries[synced:] if "deleted_source" in x]
    return head, [line for line in entries if "durable" not in line]


def boot_id() -> str:
    """The identifier of this start of the machine; "" where there is none."""
    with suppress(OSError):
        return _BOOT_ID.read_text().strip()
    return ""


class Journal:
    """The journal of a running conversion; thread-safe.

    The file is rewritten with ``head``, what the run is made from, and ``entries``, lines of an
    earlier journal. ``sync`` makes durable what was written to the output so far.
    """

    def __init__(
        self,
        path: Path,
        head: Mapping[str, Any],
        entries: list[dict[str, Any]],
        sync: Callable[[], None],
    ) -> None:
        self.path, self.state = path, CompletedWork()
        self._sync, self._lock, self._syncing = sync, threading.Lock(), threading.Lock()
        self._stop, self._thread = threading.Event(), threading.Thread(target=self._keep_durable)
        self._thread.name, self._thread.daemon = "requant-journal", True
        self._durable = 0
        self._error: OSError | None = None
        for line in entries:
            self.state.add(line)
        self._lines = len(entries)
        with replace_file(path) as file:
            for line in ({**head, "boot": boot_id()}, *entries):
                file.write(_encode_line(line))
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        self._thread.start()

    def mark_done(self, step: int, start: int, stop: int, found: Stats) -> None:
        """Record that a range of rows was written, with its statistics."""
        self.add({"rows": [step, start, stop], **({"stats": dict(found)} if found else {})})

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
        """
        with self._lock:
            lines = self._lines
        if lines == self._durable:
            return
        self._sync()
        if self._stop.is_set():  # the files may be closed already: what was synced is unknown
            return
        with self._lock:
            appended_meanwhile = self._lines > lines
            _write(self._fd, _encode_line({"durable": lines}))
            self._lines += 1
            os.fsync(self._fd)
            self._durable = lines if appended_meanwhile else self._lines

    def close(self) -> None:
        """Stop writing; the file stays. A sync that takes long is not waited for."""
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
