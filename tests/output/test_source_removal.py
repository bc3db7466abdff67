"""Deletion of source files: when a file is free, what is kept of it, and in which order."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from requant.errors import OutputError
from requant.execution.completed_work import CompletedWork
from requant.output.journal import Journal, read_journal
from requant.output.source_removal import SourceRemoval, delete_source, write_header_stubs
from requant.planning.planner import Planned, plan_with_source
from requant.quantization.config import Quantization
from requant.quantization.options import ConvertOptions
from requant.sources.open import as_checkpoint

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    log = Journal(tmp_path / "journal", {"plan": "p"}, CompletedWork(), lambda: None)
    yield log
    log.close()


def removal_of(planned: Planned, tmp_path: Path, rows_left: bool = True) -> SourceRemoval:
    removal = SourceRemoval(planned.plan, planned.source.opened, tmp_path / "stubs")
    for number, step in enumerate(planned.plan.steps):
        removal.add_rows(number, step.rows.count if rows_left else 0)
    return removal


def test_a_file_is_free_after_its_last_row(planned: Planned, tmp_path: Path) -> None:
    removal = removal_of(planned, tmp_path)
    mine = [n for n, names in enumerate(removal.release.needs) if FIRST in names]
    assert len(mine) == 2
    assert removal.count(mine[0], 64) == []
    assert removal.count(mine[1], 63) == []
    assert removal.count(mine[1], 1) == [FIRST]


def test_a_file_is_deleted_after_the_journal_has_it(
    planned: Planned, source: Path, tmp_path: Path, journal: Journal
) -> None:
    removal = removal_of(planned, tmp_path)
    removal.start(journal)
    assert (source / FIRST).exists() and (source / SECOND).exists()
    removal.remove(FIRST, journal)
    assert not (source / FIRST).exists()
    assert read_journal(journal.path)[1].deleted_sources == [FIRST]


def test_a_header_stub_plans_like_its_file(planned: Planned, source: Path, tmp_path: Path) -> None:
    """Of the size of the file, with its header; the weights are a hole."""
    opened, files = planned.source.opened, planned.plan.files
    write_header_stubs(opened, files, tmp_path / "stubs")
    for file in files:
        stub = tmp_path / "stubs" / file.name
        assert stub.stat().st_size == (source / file.name).stat().st_size
        assert stub.stat().st_blocks * 512 < stub.stat().st_size
        stub.replace(source / file.name)
    options = ConvertOptions(quantization=Quantization.affine(64, 4))
    again = plan_with_source(as_checkpoint(source, None), options)
    assert again.plan.hash == planned.plan.hash


def test_what_a_killed_run_had_no_time_to_delete(planned: Planned, source: Path, tmp_path: Path):
    """One file is in the journal and still there; of the other all rows are done."""
    done = CompletedWork(deleted_sources=[FIRST])
    log = Journal(tmp_path / "journal", {"plan": "p"}, done, lambda: None)
    write_header_stubs(planned.source.opened, planned.plan.files, tmp_path / "stubs")
    removal_of(planned, tmp_path, rows_left=False).start(log)
    log.close()
    assert list(source.glob("*.safetensors")) == []
    assert log.state.deleted_sources == [FIRST, SECOND]


def test_links_are_rejected_before_anything_is_deleted(
    planned: Planned, source: Path, tmp_path: Path, journal: Journal
) -> None:
    (source / SECOND).rename(source / "moved.bin")
    (source / SECOND).symlink_to("moved.bin")
    with pytest.raises(OutputError, match="is a link"):
        removal_of(planned, tmp_path, rows_left=False).start(journal)
    assert (source / FIRST).exists()


def test_a_file_that_cannot_be_deleted(tmp_path: Path) -> None:
    delete_source(tmp_path / "gone")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match=r"folder cannot be deleted: "):
        delete_source(tmp_path / "folder")
