"""The journal: which lines count after a kill, after a loss of power, and in a damaged file."""

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pytest import MonkeyPatch

from requant.errors import OutputError
from requant.execution.completed_work import CompletedWork
from requant.execution.layer_stats import LayerStats
from requant.output import journal
from requant.output.journal import Journal, read_journal

NOTHING = LayerStats()


def new_journal(
    path: Path, done: CompletedWork | None = None, sync: Callable[[], None] = lambda: None
) -> Journal:
    return Journal(path, {"plan": "p"}, done or CompletedWork(), sync)


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The lines after the head, as they are in the file."""
    return [json.loads(line) for line in (path / "journal").read_text().splitlines()[1:]]


def test_lines_and_the_head_are_read_back(tmp_path: Path) -> None:
    log = new_journal(tmp_path / "journal")
    log.mark_done(2, 0, 8, LayerStats(overflowed=3))
    log.add({"hash": ["up.weight", "ab"]})
    log.add({"deleted_source": "model.safetensors"}, durable=True)
    log.close()
    assert [line for line in lines_of(tmp_path) if "durable" not in line] == [
        {"rows": [2, 0, 8], "stats": {"overflowed": 3}},
        {"hash": ["up.weight", "ab"]},
        {"deleted_source": "model.safetensors"},
    ]
    head, done = read_journal(tmp_path / "journal")
    assert head["plan"] == "p"
    assert done.rows == {2: (0, 8)}
    assert done.stats == {2: LayerStats(overflowed=3)}
    assert done.hashes == {"up.weight": "ab"}
    assert done.deleted_sources == ["model.safetensors"]
    resumed = new_journal(tmp_path / "journal", done)
    resumed.close()
    assert resumed.state == read_journal(tmp_path / "journal")[1] == log.state


def test_chunks_of_a_step_become_one_line(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    """The file is replaced when it has twice the bytes of the merged lines, and not before."""
    monkeypatch.setattr(journal, "SYNC_EVERY_S", 1000)
    monkeypatch.setattr(journal, "MERGED_ABOVE_BYTES", 2000)
    log, most = new_journal(tmp_path / "journal"), 0
    for row in range(5000):
        log.mark_done(row % 5, row, row + 5, LayerStats(squared_error=0.1, flushed_groups=1))
        if row % 10 == 0:
            log.make_durable()
            most = max(most, (tmp_path / "journal").stat().st_size)
    log.make_durable()
    assert most < 3000
    assert read_journal(tmp_path / "journal")[1] == log.state
    assert {n: found.flushed_groups for n, found in log.state.stats.items()} == dict.fromkeys(
        range(5), 1000
    )
    monkeypatch.setattr(journal, "boot_id", lambda: "after the power came back")
    assert read_journal(tmp_path / "journal")[1] == log.state
    log.mark_done(9, 0, 1, NOTHING)
    log.close()
    assert lines_of(tmp_path)[-1] == {"rows": [9, 0, 1]}
    assert 9 not in read_journal(tmp_path / "journal")[1].rows


def test_what_is_noted_while_lines_are_merged_is_kept(
    tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    """It is in the new file behind the marker, and only the next sync makes it durable."""
    monkeypatch.setattr(journal, "SYNC_EVERY_S", 1000)
    monkeypatch.setattr(journal, "MERGED_ABOVE_BYTES", 0)
    late = iter([True])

    def sync() -> None:
        if next(late, False):
            log.mark_done(0, 3, 6, LayerStats(overflowed=2))
            log.add({"hash": ["a", "b"]})

    log = new_journal(tmp_path / "journal", sync=sync)
    for row in range(3):
        log.mark_done(0, row, row + 1, LayerStats(overflowed=1))
    log._merge_above = 0
    log.make_durable()
    assert lines_of(tmp_path) == [
        {"rows": [0, 0, 3], "stats": {"overflowed": 3}},
        {"durable": 1},
        {"rows": [0, 3, 6], "stats": {"overflowed": 2}},
        {"hash": ["a", "b"]},
    ]
    assert read_journal(tmp_path / "journal")[1] == log.state
    with monkeypatch.context() as patch:
        patch.setattr(journal, "boot_id", lambda: "after the power came back")
        assert read_journal(tmp_path / "journal")[1].rows == {0: (0, 3)}
        log.make_durable()
        assert read_journal(tmp_path / "journal")[1] == log.state
    log.close()


def test_a_full_disk_leaves_the_journal_as_it_was(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "SYNC_EVERY_S", 1000)
    log = new_journal(tmp_path / "journal")
    for row in range(3):
        log.mark_done(0, row, row + 1, NOTHING)
    log._merge_above = 0
    before = (tmp_path / "journal").read_bytes()

    def full(_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OutputError, match="No space left on device"):
            log.add({"deleted_source": "a"}, durable=True)
    assert (tmp_path / "journal").read_bytes() == before
    assert sorted(x.name for x in tmp_path.iterdir()) == ["journal"]
    log.close()


def test_a_sync_that_ends_after_the_journal_was_closed_replaces_nothing(
    tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    """Another run may have the file by then."""
    monkeypatch.setattr(journal, "SYNC_EVERY_S", 1000)
    log = new_journal(tmp_path / "journal", sync=lambda: log.close())
    log.mark_done(0, 0, 1, NOTHING)
    log._merge_above = 0
    before = (tmp_path / "journal").read_bytes()
    log.make_durable()
    assert (tmp_path / "journal").read_bytes() == before


def test_what_earlier_runs_did_is_durable_before_the_journal_is_replaced(
    tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    """A power failure right after the start loses nothing; a source file may be deleted already."""
    done = CompletedWork(rows={0: (0, 10)}, deleted_sources=["a"])
    events: list[str] = []
    real = journal.replace_file
    monkeypatch.setattr(journal, "replace_file", lambda p: (events.append("file"), real(p))[1])
    log = new_journal(tmp_path / "journal", done, lambda: events.append("data"))
    log.close()
    assert events == ["data", "file"]
    monkeypatch.setattr(journal, "boot_id", lambda: "after the power came back")
    assert read_journal(tmp_path / "journal")[1] == done


def test_nothing_is_synced_twice(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "SYNC_EVERY_S", 1000)
    syncs: list[int] = []
    log = new_journal(tmp_path / "journal", sync=lambda: syncs.append(1))
    log.make_durable()
    assert syncs == []
    log.mark_done(0, 0, 10, NOTHING)
    log.make_durable()
    log.make_durable()
    log.close()
    assert syncs == [1]


def test_a_background_sync_that_fails_stops_the_next_line(tmp_path: Path, monkeypatch: MonkeyPatch):
    def fails() -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(journal, "SYNC_EVERY_S", 0.001)
    log = new_journal(tmp_path / "journal", sync=fails)
    log.mark_done(0, 0, 10, NOTHING)
    log._thread.join(10)
    with pytest.raises(OutputError, match=r"journal: Input/output error"):
        log.mark_done(0, 10, 20, NOTHING)
    log.close()


def test_after_a_restart_deletions_count_that_no_marker_covers(
    tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    """The line of a deletion is synced before the file is deleted; rows after it are not."""
    lines = [
        {"plan": "p", "boot": "before"},
        {"rows": [0, 0, 10]},
        {"durable": 1},
        {"deleted_source": "a"},
        {"rows": [0, 10, 20]},
    ]
    (tmp_path / "journal").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(journal, "boot_id", lambda: "after")
    expected = CompletedWork(rows={0: (0, 10)}, deleted_sources=["a"])
    assert read_journal(tmp_path / "journal")[1] == expected


def test_after_a_restart_only_synced_lines_count(tmp_path: Path, monkeypatch: MonkeyPatch):
    monkeypatch.setattr(journal, "SYNC_EVERY_S", 1000)
    log = new_journal(tmp_path / "journal")
    log.mark_done(0, 0, 10, NOTHING)
    log.make_durable()
    log.mark_done(0, 10, 20, LayerStats(overflowed=1))
    log.close()
    assert read_journal(tmp_path / "journal")[1] == log.state
    assert log.state.rows == {0: (0, 20)}
    for boot in ("another", ""):
        monkeypatch.setattr(journal, "boot_id", lambda boot=boot: boot)
        assert read_journal(tmp_path / "journal")[1] == CompletedWork(rows={0: (0, 10)})


def test_lines_are_called_durable_after_their_data_was_synced(tmp_path: Path) -> None:
    """What is noted while the sync runs waits for the next."""
    seen = []

    def sync() -> None:
        seen.append(log._lines)
        log.mark_done(0, 50, 60, NOTHING)

    log = new_journal(tmp_path / "journal", sync=sync)
    log.mark_done(0, 0, 10, NOTHING)
    log.make_durable()
    log.close()
    marks = [
        json.loads(line)["durable"]
        for line in (tmp_path / "journal").read_text().splitlines()
        if "durable" in line
    ]
    assert marks[0] == 1
    assert seen[0] == 1


def test_two_syncs_at_once_never_call_less_durable(tmp_path: Path) -> None:
    """The first sync takes long; what a second one called durable meanwhile stays so."""
    slow = threading.Event()

    def sync() -> None:
        if not slow.is_set():
            slow.set()
            time.sleep(0.2)

    log = new_journal(tmp_path / "journal", sync=sync)
    log.mark_done(0, 0, 10, NOTHING)
    first = threading.Thread(target=log.make_durable)
    first.start()
    slow.wait()
    log.mark_done(0, 10, 20, NOTHING)
    log.add({"deleted_source": "a"}, durable=True)
    first.join()
    log.close()
    with MonkeyPatch.context() as patch:
        patch.setattr(journal, "boot_id", lambda: "after the power came back")
        assert read_journal(tmp_path / "journal")[1].rows == {0: (0, 20)}


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_torn_line_ends_the_journal(tmp_path: Path, cut: int) -> None:
    log = new_journal(tmp_path / "journal")
    for start in range(0, 100, 10):
        log.mark_done(3, start, start + 10, NOTHING)
    log.close()
    os.truncate(tmp_path / "journal", (tmp_path / "journal").stat().st_size - cut)
    assert read_journal(tmp_path / "journal")[1].rows == {3: (0, 90)}


@pytest.mark.parametrize("text", [b"", b"x", b"[]\n", b"{}\n", b"\xff\n", b'{"plan":1}'])
def test_what_is_not_a_journal_is_none(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "journal").write_bytes(text)
    assert read_journal(tmp_path / "journal") == ({}, CompletedWork())
