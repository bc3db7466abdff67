"""``--consume-source``: files go one by one, and at every moment the conversion can be finished."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import requant
from requant.api.convert import convert
from requant.errors import CheckpointError, OutputError, UsageError
from requant.output import folder as writer
from requant.output.journal import read_journal
from requant.output.staging import staging_dir
from requant.planning.release_order import plan_release_order
from tests.support.checkpoints import tree
from tests.support.fixture_folders import fixture
from tests.support.interruptions import Stop, stop_after
from tests.support.number_formats import bf16

pytestmark = pytest.mark.sweep(2)

CONSUME = {"consume_source": True, "yes": True}


@pytest.fixture
def source(checkpoint: Callable[..., Path]) -> Path:
    """Four shards of three layers each."""
    path = checkpoint({f"l{n:02}.weight": bf16(64, 128, seed=n) for n in range(12)}, shards=4)
    (path / "tokenizer.json").write_text("{}")
    return path


def shards(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.safetensors"))


def test_the_source_goes_and_the_output_is_the_same(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "whole", bits=4)
    convert(source, tmp_path / "out", bits=4, **CONSUME)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    assert shards(source) == []
    left = {"config.json", "tokenizer.json", "model.safetensors.index.json"}
    assert {path.name for path in source.iterdir()} == left
    assert requant.verify(tmp_path / "out").ok
    assert not staging_dir(tmp_path / "out").exists()


def test_it_must_be_meant(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--yes"):
        convert(source, tmp_path / "out", bits=4, consume_source=True)
    assert len(shards(source)) == 4


def test_what_would_be_rejected_deletes_nothing(checkpoint: Callable[..., Path], tmp_path: Path):
    bad = bf16(64, 128)
    bad[63, 127] = np.nan
    tensors = {f"l{n}.weight": bf16(64, 128, seed=n) for n in range(3)} | {"z.weight": bad}
    source = checkpoint(tensors, shards=4)
    with pytest.raises(CheckpointError, match=r"z\.weight: 1 value is NaN"):
        convert(source, tmp_path / "out", bits=4, **CONSUME)
    assert len(shards(source)) == 4
    convert(source, tmp_path / "whole", bits=4, allow_nonfinite=True)
    convert(source, tmp_path / "out", bits=4, allow_nonfinite=True, **CONSUME)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


@pytest.mark.parametrize("boot", ["the same", "after the power came back"])
@pytest.mark.parametrize("chunks", range(1, 60, 8))
def test_stopped_anywhere_it_resumes(
    source: Path, tmp_path: Path, chunks: int, boot: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(source, tmp_path / "whole", bits=4)
    small = {"bits": 4, "threads": 1, "chunk_bytes": 3000}
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 10**6)  # the first pass computes everything
        counted = count_of_a_pass(source, tmp_path, small)
        stop_after(patch, counted + chunks)
        with pytest.raises(Stop):
            convert(source, tmp_path / "out", **small, **CONSUME)
    gone = 4 - len(shards(source))
    if boot != "the same":
        monkeypatch.setattr("requant.output.journal.boot_id", lambda: boot)
    _, done = read_journal(staging_dir(tmp_path / "out") / "journal")
    assert len(done.deleted_sources) == gone
    if gone:
        with pytest.raises(OutputError, match="resume with --consume-source"):
            convert(source, tmp_path / "out", **small)
        with pytest.raises(OutputError, match="deleted already"):
            convert(source, tmp_path / "out", **small, **CONSUME, resume=False)
        with pytest.raises(OutputError, match="changed since"):
            convert(source, tmp_path / "out", bits=8, **CONSUME)
        assert 4 - len(shards(source)) == gone
    convert(source, tmp_path / "out", **small, **CONSUME)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    assert shards(source) == []


def count_of_a_pass(source: Path, tmp_path: Path, options: dict[str, object]) -> int:
    from requant.execution import executor as execute

    chunks, real = 0, execute._Run._run_unit

    def counted(self, *args):
        nonlocal chunks
        chunks += 1
        return real(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(execute._Run, "_run_unit", counted)
        convert(source, tmp_path / "counted", **options)
    return chunks


def test_killed_between_the_journal_and_the_deletion(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(source, tmp_path / "whole", bits=4)
    with monkeypatch.context() as patch:
        real = Path.unlink

        def dying(self: Path, *args: object, **named: object) -> None:
            if self.parent == source:
                raise Stop
            real(self, *args, **named)

        patch.setattr(Path, "unlink", dying)
        with pytest.raises(Stop):
            convert(source, tmp_path / "out", bits=4, threads=1, **CONSUME)
    assert len(shards(source)) == 4
    convert(source, tmp_path / "out", bits=4, **CONSUME)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    assert shards(source) == []


def test_a_file_is_deleted_only_after_its_output_was_synced(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each deletion the journal, read as after a power failure, has all that needs the file."""
    seen, real = [], Path.unlink

    def watched(self: Path, *args: object, **named: object) -> None:
        if self.parent == source:
            with monkeypatch.context() as patch:
                patch.setattr("requant.output.journal.boot_id", lambda: "after the power came back")
                _, done = read_journal(staging_dir(tmp_path / "out") / "journal")
            plan = requant.plan(tmp_path / "copy", bits=4)
            needs = plan_release_order(plan).needs
            for number, step in enumerate(plan.steps):
                if self.name in needs[number]:
                    assert done.done_rows(number) == step.rows.count, (self.name, number)
            seen.append(self.name)
        real(self, *args, **named)

    shutil.copytree(source, tmp_path / "copy")
    monkeypatch.setattr(Path, "unlink", watched)
    convert(source, tmp_path / "out", bits=4, chunk_bytes=9000, **CONSUME)
    assert len(seen) == 4


def test_links_are_not_deleted(source: Path, tmp_path: Path) -> None:
    file = source / shards(source)[0]
    file.rename(source / "moved.bin")
    file.symlink_to("moved.bin")
    with pytest.raises(OutputError, match="is a link"):
        convert(source, tmp_path / "out", bits=4, **CONSUME)
    assert len(shards(source)) == 4


def test_the_disk_that_it_takes(source: Path) -> None:
    """Four equal files, a quarter of which is written for each."""
    plan = requant.plan(source, bits=4)
    out = plan.shards[0].nbytes
    found = plan_release_order(plan)
    assert sorted(found.order) == list(range(len(plan.steps)))
    assert sorted(found.files) == shards(source)
    assert out / 5 < found.extra_bytes < out / 3
    dense = requant.plan(source, dequantize=True, dtype="float32")
    assert plan_release_order(dense).extra_bytes <= dense.shards[0].nbytes


def test_too_little_room_for_all_is_enough_for_a_part(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = requant.plan(source, bits=4)
    free = (plan_release_order(plan).extra_bytes + plan.shards[0].nbytes) // 2
    usage = shutil.disk_usage(tmp_path)._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OutputError, match="too full"):
        convert(source, tmp_path / "out", bits=4)
    convert(source, tmp_path / "out", bits=4, **CONSUME)


def test_formats_that_look_at_data_while_they_plan(tmp_path: Path) -> None:
    """A g_idx decides what a layer is: the resumed plan must see it without the file."""
    shutil.copytree(fixture("gptq-b4-g64-actorder-v1") / "checkpoint", tmp_path / "source")
    options = {"layout": "keep", "threads": 1}
    convert(tmp_path / "source", tmp_path / "whole", **options)
    with pytest.MonkeyPatch.context() as patch:

        def dying(self: writer.OutputFolder, *_: object) -> None:
            raise Stop

        patch.setattr(writer.OutputFolder, "publish", dying)
        with pytest.raises(Stop):
            convert(tmp_path / "source", tmp_path / "out", **options, **CONSUME)
    assert shards(tmp_path / "source") == []
    convert(tmp_path / "source", tmp_path / "out", **options, **CONSUME)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


@pytest.mark.parametrize("part", [0.5, 0.75, 0.95])
@pytest.mark.parametrize("head", ["a copy", "its own"])
def test_a_head_that_was_compared_with_the_embedding(
    head: str, part: float, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """What is compared while planning may be gone when a stopped run is planned again."""
    embedding = bf16(1200, 64, seed=20)
    other = embedding.copy()
    other[-1, -1] += 1
    tensors = {
        "model.embed_tokens.weight": embedding,
        "a.weight": bf16(64, 128, seed=1),
        "b.weight": bf16(64, 128, seed=2),
        "lm_head.weight": embedding if head == "a copy" else other,
    }
    source = checkpoint(tensors, {"tie_word_embeddings": True}, shards=4)
    convert(source, tmp_path / "whole", bits=4)
    small = {"bits": 4, "threads": 1, "chunk_bytes": 9000}
    with pytest.MonkeyPatch.context() as patch:
        whole = count_of_a_pass(source, tmp_path, small)
        stop_after(patch, whole + int(part * whole))  # the first pass computes everything
        with pytest.raises(Stop):
            convert(source, tmp_path / "out", **small, **CONSUME)
    assert len(shards(source)) < 4
    convert(source, tmp_path / "out", **small, **CONSUME)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
