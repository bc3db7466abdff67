"""The hidden folder next to OUTPUT: its lock, what a stopped run left, and the renames."""

import fcntl
import json
import os
from pathlib import Path

import pytest

from requant.errors import OutputError
from requant.output.staging import (
    StagingFolder,
    lock_staging,
    recorded_nonfinite_layers,
    staged_bytes,
    staging_dir,
)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "models" / "out"


@pytest.fixture
def staging(output: Path) -> StagingFolder:
    """Locked, with a staged file."""
    folder = StagingFolder(output)
    folder.lock()
    folder.clear()
    (folder.staged_output / "config.json").write_text("new")
    return folder


def test_one_holder_at_a_time(staging: StagingFolder, output: Path) -> None:
    assert staging.path == output.parent / ".out.requant-partial"
    assert staging.is_locked
    with pytest.raises(OutputError, match=rf"another process \(process {os.getpid()} on "):
        StagingFolder(output).lock()
    staging.unlock()
    staging.unlock()
    assert not staging.is_locked
    other = StagingFolder(output)
    other.lock()
    other.unlock()


def test_a_staging_folder_that_is_a_link_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    staging_dir(tmp_path / "out").symlink_to("elsewhere")
    with pytest.raises(OutputError, match="is a link"):
        StagingFolder(tmp_path / "out").lock()
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_lock_on_a_folder_that_was_removed_is_none(tmp_path: Path) -> None:
    first = lock_staging(tmp_path / "staging", tmp_path / "out")
    (tmp_path / "staging" / "lock").unlink()
    second = lock_staging(tmp_path / "staging", tmp_path / "out")
    with pytest.raises(OutputError):
        lock_staging(tmp_path / "staging", tmp_path / "out")
    for fd in (first, second):
        fcntl.flock(fd, fcntl.LOCK_UN)
        os.close(fd)


def test_clear_keeps_the_lock_and_removes_what_was_written(staging: StagingFolder) -> None:
    staging.journal.write_text("{}")
    staging.clear()
    assert sorted(path.name for path in staging.path.iterdir()) == ["lock", "output"]
    assert list(staging.staged_output.iterdir()) == []


def test_the_output_gets_its_name(staging: StagingFolder, output: Path) -> None:
    staging.name_output()
    assert (output / "config.json").read_text() == "new"
    assert list(output.parent.iterdir()) == [output]


def test_the_output_replaces_a_folder(staging: StagingFolder, output: Path) -> None:
    output.mkdir()
    (output / "old.json").write_text("old")
    staging.name_output()
    assert [path.name for path in output.iterdir()] == ["config.json"]


def test_a_rename_that_fails_puts_the_old_folder_back(
    staging: StagingFolder, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output.mkdir()
    (output / "old.json").write_text("old")
    real = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self == staging.staged_output:
            raise OSError("full")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="full"):
        staging.name_output()
    assert [path.name for path in output.iterdir()] == ["old.json"]
    assert staging.staged_output.exists()


@pytest.mark.parametrize("renamed", [False, True])
def test_a_replacement_left_half_done_is_undone(
    staging: StagingFolder, output: Path, renamed: bool
) -> None:
    """A run was killed after the first rename, or after the second."""
    staging.replaced.mkdir()
    (staging.replaced / "old.json").write_text("old")
    if renamed:
        staging.staged_output.rename(output)
    staging.unlock()
    again = StagingFolder(output)
    again.lock()
    again.unlock()
    assert [x.name for x in output.iterdir()] == ["config.json" if renamed else "old.json"]
    assert not staging.replaced.exists()


@pytest.mark.parametrize(
    ("value", "layers"), [(["a", 1, "b"], ["a", "b"]), (None, []), ("ab", []), ([], [])]
)
def test_layers_that_a_stopped_run_recorded(
    staging: StagingFolder, output: Path, value: object, layers: list[str]
) -> None:
    assert recorded_nonfinite_layers(output) == []
    staging.journal.write_text(json.dumps({"plan": "p", "nonfinite_layers": value}) + "\n")
    assert recorded_nonfinite_layers(output) == layers


def test_bytes_that_a_stopped_run_wrote(staging: StagingFolder, output: Path) -> None:
    """Holes of a sparse file take no room."""
    before = staged_bytes(output)
    with (staging.staged_output / "model.safetensors").open("wb") as file:
        file.truncate(1 << 30)
        file.write(b"x" * 4096)
        file.flush()
        os.fsync(file.fileno())
    assert 4096 <= staged_bytes(output) - before < 1 << 20
    assert staged_bytes(output.with_name("another")) == 0
