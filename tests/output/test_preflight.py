"""What is checked of OUTPUT before anything is written."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from pytest import MonkeyPatch

from requant.errors import OutputError
from requant.output.preflight import check_output
from requant.planning.planner import Planned


def test_a_new_or_empty_folder_passes(planned: Planned, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("new", "below/new", "empty"):
        check_output(planned.plan, tmp_path / name, force=False)
    assert not (tmp_path / "below").exists()


def test_force_replaces_checkpoints_only(planned: Planned, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="is not a checkpoint"):
        check_output(planned.plan, output, force=True)
    (output / "config.json").write_text("{}")
    with pytest.raises(OutputError, match="exists; --force replaces it"):
        check_output(planned.plan, output, force=False)
    check_output(planned.plan, output, force=True)


@pytest.mark.parametrize("place", [".", "below", ".."])
def test_an_output_around_or_within_the_source(planned: Planned, source: Path, place: str) -> None:
    with pytest.raises(OutputError, match="must not be changed"):
        check_output(planned.plan, source / place, force=True)


def test_a_repository_is_not_a_folder_to_protect(planned: Planned, source: Path) -> None:
    plan = replace(planned.plan, repository=("user/model", "0" * 40))
    check_output(plan, source / "below", force=False)


def test_what_cannot_become_a_folder(planned: Planned, tmp_path: Path, monkeypatch: MonkeyPatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    places = {
        "file": "exists and is not a folder",
        "link": "exists and is not a folder",
        "file/below": "file is not a folder",
        "here": "the folder that this command runs in",
    }
    for place, message in places.items():
        with pytest.raises(OutputError, match=message):
            check_output(planned.plan, tmp_path / place, force=True)
    unrelated = replace(planned.plan, repository=("user/model", "0" * 40))
    with pytest.raises(OutputError, match="the root of the file system"):
        check_output(unrelated, Path("/"), force=True)
    with pytest.raises(OutputError, match="where a disk is mounted"):
        check_output(unrelated, Path("/proc"), force=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(planned: Planned, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(OutputError, match="is not permitted"):
        check_output(planned.plan, tmp_path / "closed" / "out", force=True)


def test_room_on_the_disk(planned: Planned, tmp_path: Path, monkeypatch: MonkeyPatch):
    plan, output = planned.plan, tmp_path / "out"
    whole = sum(shard.nbytes for shard in plan.shards) + plan.side_bytes
    usage = shutil.disk_usage(tmp_path)
    free = usage._replace(free=whole - 1)
    monkeypatch.setattr("requant.output.preflight.shutil.disk_usage", lambda _: free)
    with pytest.raises(OutputError, match=f"{whole:,} bytes are needed, {whole - 1:,} are free"):
        check_output(plan, output, force=False)
    check_output(plan, output, force=False, spent=1)  # on the disk already
    check_output(plan, output, force=False, most=100)  # source files make room
