"""The journal: which lines count after a kill, after a loss of power, and in a damaged file."""

import json
import os
import threading
import time
from pathlib import Path

import pytest
from pytest import MonkeyPatch

from requant.errors import OutputError
from requant.output import journal
from requant.output.journal import Journal, read_journal


def new_journal(path: Path, entries=(), sync=lambda: None) -> Journal:
    return Journal(path, {"plan": "p"}, list(entries), sync)


def test_lines_and_the_head_are_read_back(tmp_path: Path) -> None:
    log = new_journal(tmp_path / "journal")
    log.mark_done(2, 0, 8, {"overflowed": 3})
    log.add({"hash": ["up.weight", "ab"]})
    log.add({"deleted_source": "model.safetensors"}, durable=True)
    log.close()
    head, lines = read_journal(tmp_path / "journal")
    assert head["plan"] == "p"
    assert lines == [
        {"rows": [2, 0, 8], "stats": {"overflowed": 3}},
        {"hash": ["up.weight", "ab"]},
        {"deleted_source": "model.safetensors"},
    ]
    resumed = new_journal(tmp_path / "journal", lines)
    resumed.close()
    assert resumed.state.rows == {2: [(0, 8)]}
    assert resumed.state.stats == [(2, {"overflowed": 3})]
    assert resumed.state.hashes == {"up.weight": "ab"}
    assert resumed.state.deleted_sources == ["model.safetensors"]
    assert read_journal(tmp_path / "journal")[1] == lines


def test_nothing_is_synced_twice(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "SYNC_EVERY_S", 1000)
    syncs: list[int] = []
    log = new_journal(tmp_path / "journal", sync=lambda: syncs.append(1))
    log.make_durable()
    assert syncs == []
    log.mark_done(0, 0, 10, {})
    log.make_durable()
    log.make_durable()
    log.close()
    assert syncs == [1]


def test_a_background_sync_that_fails_stops_the_next_line(tmp_path: Path, monkeypatch: MonkeyPatch):
    def fails() -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(journal, "SYNC_EVERY_S", 0.001)
    log = new_journal(tmp_path / "journal", sync=fails)
    log.mark_done(0, 0, 10, {})
    log._thread.join(10)
    with pytest.raises(OutputError, match=r"journal: Input/output error"):
        log.mark_done(0, 10, 20, {})
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
    assert read_journal(tmp_path / "journal")[1] == [{"rows": [0, 0, 10]}, {"deleted_source": "a"}]


def test_after_a_restart_only_synced_lines_count(tmp_path: Path, monkeypatch: MonkeyPatch):
    monkeypatch.setattr(journal, "SYNC_EVERY_S", 1000)
    log = new_journal(tmp_path / "journal")
    log.mark_done(0, 0, 10, {})
    log.make_durable()
    log.mark_done(0, 10, 20, {"overflowed": 1})
    log.close()
    lines = read_journal(tmp_path / "journal")[1]
    assert [line["rows"] for line in lines] == [[0, 0, 10], [0, 10, 20]]
    monkeypatch.setattr(journal, "boot_id", lambda: "another")
    lines = read_journal(tmp_path / "journal")[1]
    assert [line["rows"] for line in lines] == [[0, 0, 10]]
    monkeypatch.setattr(journal, "boot_id", lambda: "")
    assert len(read_journal(tmp_path / "journal")[1]) == 1


def test_lines_are_called_durable_after_their_data_was_synced(tmp_path: Path) -> None:
    """What is noted while the sync runs waits for the next."""
    seen = []

    def sync() -> None:
        seen.append(log._lines)
        log.mark_done(0, 50, 60, {})

    log = new_journal(tmp_path / "journal", sync=sync)
    log.mark_done(0, 0, 10, {})
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
    log.mark_done(0, 0, 10, {})
    first = threading.Thread(target=log.make_durable)
    first.start()
    slow.wait()
    log.mark_done(0, 10, 20, {})
    log.add({"deleted_source": "a"}, durable=True)
    first.join()
    log.close()
    with MonkeyPatch.context() as patch:
        patch.setattr(journal, "boot_id", lambda: "after the power came back")
        lines = read_journal(tmp_path / "journal")[1]
    assert [line["rows"] for line in lines if "rows" in line] == [[0, 0, 10], [0, 10, 20]]


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_torn_line_ends_the_journal(tmp_path: Path, cut: int) -> None:
    log = new_journal(tmp_path / "journal")
    for start in range(0, 100, 10):
        log.mark_done(3, start, start + 10, {})
    log.close()
    os.truncate(tmp_path / "journal", (tmp_path / "journal").stat().st_size - cut)
    assert len(read_journal(tmp_path / "journal")[1]) == 9


@pytest.mark.parametrize("text", [b"", b"x", b"[]\n", b"{}\n", b"\xff\n", b'{"plan":1}'])
def test_what_is_not_a_journal_is_none(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "journal").write_bytes(text)
    assert read_journal(tmp_path / "journal") == ({}, [])
