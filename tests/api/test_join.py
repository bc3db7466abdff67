"""``convert(part=...)`` and ``join``: the same bytes as one process, whatever happens to parts."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pytest import MonkeyPatch
from safetensors.numpy import save_file

import requant
from requant.bit_allocation.measurements import MeasuredErrors
from requant.errors import CheckpointError, InvariantError, OutputError, RequantError, UsageError
from requant.output import journal, part_journals
from requant.output.folder import OutputFolder
from requant.output.journal import Journal
from requant.output.shard_files import ShardFiles
from requant.output.staging import staging_dir
from tests.support.checkpoints import MICRO_LLAMA, ROOT, tree
from tests.support.number_formats import bf16
from tests.support.part_jobs import JOBS, KEEP_4_BITS


def run_parts(source: Path, output: Path, order: list[str], **options: Any) -> None:
    for part in order:
        report = requant.convert(source, output, part=part, **options, chunk_bytes=3000)
        assert str(report.part) == part
        assert not output.exists()


@pytest.mark.parametrize(
    "name", [x if x in ("dense", "AWQ") else pytest.param(x, marks=pytest.mark.slow) for x in JOBS]
)
def test_parts_give_the_bytes_of_one_process(name: str, tmp_path: Path) -> None:
    """In any order, one of them twice, one never."""
    source, options = JOBS[name](tmp_path)
    requant.convert(source, tmp_path / "one", **options)
    run_parts(source, tmp_path / "out", ["3/4", "1/4", "1/4", "4/4"], **options)
    report = requant.join(tmp_path / "out")
    assert report is not None
    assert report.part is None
    assert tree(tmp_path / "out") == tree(tmp_path / "one")
    assert not staging_dir(tmp_path / "out").exists()
    assert requant.join(tmp_path / "out") is None


def test_parts_of_other_counts_add_up(tmp_path: Path) -> None:
    requant.convert(MICRO_LLAMA, tmp_path / "one", **KEEP_4_BITS)
    run_parts(MICRO_LLAMA, tmp_path / "out", ["1/2", "5/7", "3/50", "2/3"], **KEEP_4_BITS)
    requant.join(tmp_path / "out")
    assert tree(tmp_path / "out") == tree(tmp_path / "one")


def test_what_a_part_has_done_is_not_done_again(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    run_parts(MICRO_LLAMA, tmp_path / "out", ["1/2", "2/2"], **KEEP_4_BITS)
    written: list[int] = []
    monkeypatch.setattr(
        "requant.output.shard_files.ShardFiles.write", lambda *given: written.append(1)
    )
    run_parts(MICRO_LLAMA, tmp_path / "out", ["1/2"], **KEEP_4_BITS)
    requant.join(tmp_path / "out")
    assert written == []


def test_a_conversion_without_parts_takes_over(tmp_path: Path) -> None:
    """What the parts have done is not lost."""
    requant.convert(MICRO_LLAMA, tmp_path / "one", **KEEP_4_BITS)
    run_parts(MICRO_LLAMA, tmp_path / "out", ["2/2"], **KEEP_4_BITS)
    requant.convert(MICRO_LLAMA, tmp_path / "out", **KEEP_4_BITS)
    assert tree(tmp_path / "out") == tree(tmp_path / "one")


def test_rows_of_two_runs_are_counted_once(tmp_path: Path) -> None:
    """Statistics of a part that ran twice at a time: equal rows, more rows, other rows."""
    lines = {
        "1-of-2.aaaaaaaa": [{"rows": [0, 0, 10], "stats": {"overflowed": 1}}],
        "1-of-2.bbbbbbbb": [{"rows": [0, 0, 20], "stats": {"overflowed": 3}}],
        "1-of-2.cccccccc": [{"rows": [0, 15, 25], "stats": {"overflowed": 9}}],
        "2-of-2.dddddddd": [{"rows": [0, 30, 40], "stats": {"overflowed": 5}}, {"finished": True}],
    }
    head = {"plan": "p", "requant": "1", "sources": {}}
    for name, of_run in lines.items():
        text = "".join(json.dumps(x) + "\n" for x in [{**head, "boot": journal.boot_id()}, *of_run])
        (tmp_path / name).write_text(text)
    found = part_journals.read_part_journals(tmp_path, head)
    assert found.done.rows == {0: (0, 20, 30, 40)}
    assert found.done.stats[0].overflowed == 8
    assert [str(part) for part in sorted(found.finished)] == ["2/2"]


def test_of_another_machine_the_durable_lines_count(tmp_path: Path) -> None:
    head = {"plan": "p", "requant": "1", "sources": {}}
    lines = [
        {**head, "sources": {"a": [1, 2]}, "boot": "another machine"},
        {"rows": [0, 0, 10]},
        {"durable": 1},
        {"rows": [1, 0, 10]},
    ]
    (tmp_path / "1-of-2.aaaaaaaa").write_text("".join(json.dumps(x) + "\n" for x in lines))
    assert part_journals.read_part_journals(tmp_path, head).done.rows == {0: (0, 10)}


def test_a_copy_of_the_source_on_another_machine(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    """Its files have other times of change; what was made durable there is not made again."""
    copy = Path(shutil.copytree(MICRO_LLAMA, tmp_path / "copy"))
    for file in copy.glob("*.safetensors"):
        os.utime(file, (1, 1))
    run_parts(MICRO_LLAMA, tmp_path / "out", ["1/2"], **KEEP_4_BITS)
    with monkeypatch.context() as machine:
        (tmp_path / "boot").write_text("another machine")
        machine.setattr(journal, "_BOOT_ID", tmp_path / "boot")
        run_parts(copy, tmp_path / "out", ["2/2"], **KEEP_4_BITS)
    written: list[int] = []
    monkeypatch.setattr(
        "requant.output.shard_files.ShardFiles.write", lambda *given: written.append(1)
    )
    requant.join(tmp_path / "out")
    assert written == []
    monkeypatch.undo()
    requant.convert(MICRO_LLAMA, tmp_path / "one", **KEEP_4_BITS)
    assert tree(tmp_path / "out") == tree(tmp_path / "one")


def test_the_last_line_is_durable_before_a_part_is_done(
    tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    """Data is synced, then the journal, then the line that says that the part is finished."""
    order: list[str] = []
    sync, finished = ShardFiles.sync_data, Journal.add

    def note_sync(self: ShardFiles) -> None:
        order.append("data")
        sync(self)

    def note_line(self: Journal, line: Any, *, durable: bool = False) -> None:
        if "finished" in line:
            assert durable
            order.append("finished")
        finished(self, line, durable=durable)

    monkeypatch.setattr(ShardFiles, "sync_data", note_sync)
    monkeypatch.setattr(Journal, "add", note_line)
    run_parts(MICRO_LLAMA, tmp_path / "out", ["1/2"], **KEEP_4_BITS)
    assert order[-2:] == ["data", "finished"]
    (file,) = (staging_dir(tmp_path / "out") / "parts").glob("1-of-2.*")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert lines[-1] == {"finished": True}
    assert lines[-2] == {"durable": len(lines) - 3}  # all lines after the head, before the marker


# -- a budget: every part measures first -------------------------------------------------------


BUDGET: dict[str, Any] = {"budget": 4.5, "layout": "keep"}


@pytest.fixture
def measured(monkeypatch: MonkeyPatch) -> list[str]:
    """The layers that were measured."""
    found: list[str] = []
    add = MeasuredErrors.add

    def note(self: MeasuredErrors, layer: str, errors: Any) -> None:
        found.append(layer)
        add(self, layer, errors)

    monkeypatch.setattr(MeasuredErrors, "add", note)
    return found


def test_parts_measure_then_convert(tmp_path: Path, measured: list[str]) -> None:
    """The last to measure converts at once; each layer is measured once by all together."""
    requant.convert(MICRO_LLAMA, tmp_path / "one", **BUDGET)
    expected = sorted(measured)
    measured.clear()
    output = tmp_path / "out"
    left = [
        requant.convert(MICRO_LLAMA, output, part=part, **BUDGET).unmeasured
        for part in ("2/3", "1/3", "1/3", "3/3", "1/3", "2/3")
    ]
    assert left[0] > left[1] == left[2] > 0 == sum(left[3:])
    assert sorted(measured) == expected
    requant.join(output)
    assert tree(output) == tree(tmp_path / "one")


@pytest.mark.parametrize("finish", ["join", "convert", "a part of another count"])
def test_a_part_that_never_measured(finish: str, tmp_path: Path, measured: list[str]) -> None:
    requant.convert(MICRO_LLAMA, tmp_path / "one", **BUDGET)
    count, output = len(measured), tmp_path / "out"
    measured.clear()
    assert requant.convert(MICRO_LLAMA, output, part="1/3", **BUDGET).unmeasured > 0
    if finish == "convert":
        requant.convert(MICRO_LLAMA, output, **BUDGET)
    else:
        if finish != "join":
            assert not requant.convert(MICRO_LLAMA, output, part="1/1", **BUDGET).unmeasured
        requant.join(output)
    assert len(measured) == len(set(measured)) == count
    assert tree(output) == tree(tmp_path / "one")


def test_what_was_chosen_holds_for_all_parts(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    """Also where a later part would find other errors."""
    requant.convert(MICRO_LLAMA, tmp_path / "one", **BUDGET)
    output = tmp_path / "out"
    for part in ("1/2", "2/2"):
        requant.convert(MICRO_LLAMA, output, part=part, **BUDGET)
    for file in (staging_dir(output) / "parts").glob("measured.*"):
        file.unlink()
    monkeypatch.setattr("requant.bit_allocation.measure.run_plan", None)
    requant.convert(MICRO_LLAMA, output, part="1/2", **BUDGET)
    requant.join(output)
    assert tree(output) == tree(tmp_path / "one")


@pytest.mark.parametrize(
    ("first", "second"),
    [(BUDGET, {**BUDGET, "budget": 5}), (KEEP_4_BITS, BUDGET), (BUDGET, KEEP_4_BITS)],
)
def test_parts_with_another_budget(
    first: dict[str, Any], second: dict[str, Any], tmp_path: Path
) -> None:
    requant.convert(MICRO_LLAMA, tmp_path / "out", part="1/2", **first)
    with pytest.raises(OutputError, match="give the same command in every part"):
        requant.convert(MICRO_LLAMA, tmp_path / "out", part="2/2", **second)


def test_values_that_are_not_numbers_stop_the_part_that_measures_them(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    bad = bf16(64, 128)
    bad[3, 5] = np.nan
    source = checkpoint({"a.weight": bf16(64, 128), "b.weight": bad})
    assert requant.convert(source, tmp_path / "out", part="1/2", **BUDGET).unmeasured == 1
    with pytest.raises(CheckpointError, match=r"b\.weight: 1 value is NaN"):
        requant.convert(source, tmp_path / "out", part="2/2", **BUDGET)


# -- the source is deleted -------------------------------------------------------------------


CONSUME: dict[str, Any] = {**KEEP_4_BITS, "consume_source": True, "yes": True}
FILES = [f"model-{n:05}-of-00004.safetensors" for n in range(1, 5)]


@pytest.fixture
def four_files(tmp_path: Path) -> Path:
    """Four files of two layers each."""
    folder, shard_of = tmp_path / "m", {}
    folder.mkdir()
    for number, file in enumerate(FILES):
        names = [f"model.layers.{number}.mlp.{x}_proj.weight" for x in ("up", "down")]
        tensors = {name: bf16(64, 128, seed=number) for name in names}
        save_file(tensors, folder / file)
        shard_of |= dict.fromkeys(tensors, file)
    (folder / "config.json").write_text('{"model_type": "x"}')
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shard_of}))
    return folder


def weights_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.safetensors"))


def test_each_part_deletes_its_files(four_files: Path, tmp_path: Path) -> None:
    """All parts are computed once before the first file is deleted."""
    output = tmp_path / "out"
    requant.convert(four_files, tmp_path / "one", **KEEP_4_BITS)
    for part, unchecked in (("2/3", 2), ("1/3", 1), ("1/3", 1)):
        report = requant.convert(four_files, output, part=part, **CONSUME)
        assert report.unchecked == unchecked
        assert weights_in(four_files) == FILES
    left = []
    for part in ("3/3", "1/3", "2/3"):
        assert not requant.convert(four_files, output, part=part, **CONSUME).unchecked
        left.append(weights_in(four_files))
    assert len(left[0]) > len(left[1]) > len(left[2]) == 0
    requant.join(output)
    assert tree(output) == tree(tmp_path / "one")


@pytest.mark.parametrize("done", [(), ("1/2",), ("1/2", "2/2"), ("1/2", "2/2", "1/2")])
def test_a_join_deletes_what_is_left(
    done: tuple[str, ...], four_files: Path, tmp_path: Path
) -> None:
    """Also where not all parts were checked, or none has converted."""
    requant.convert(four_files, tmp_path / "one", **KEEP_4_BITS)
    requant.convert(four_files, tmp_path / "out", part="2/2", **CONSUME)
    for part in done:
        requant.convert(four_files, tmp_path / "out", part=part, **CONSUME)
    requant.join(tmp_path / "out")
    assert weights_in(four_files) == []
    assert tree(tmp_path / "out") == tree(tmp_path / "one")


def test_nothing_is_deleted_where_a_part_holds_an_error(four_files: Path, tmp_path: Path) -> None:
    bad = bf16(64, 128)
    bad[3, 5] = np.nan
    save_file(
        {f"model.layers.3.mlp.{x}_proj.weight": bad for x in ("up", "down")}, four_files / FILES[3]
    )
    assert requant.convert(four_files, tmp_path / "out", part="1/2", **CONSUME).unchecked == 1
    for _ in range(2):
        with pytest.raises(CheckpointError, match="1 value is NaN"):
            requant.convert(four_files, tmp_path / "out", part="2/2", **CONSUME)
        assert requant.convert(four_files, tmp_path / "out", part="1/2", **CONSUME).unchecked == 1
    with pytest.raises(CheckpointError, match="1 value is NaN"):
        requant.join(tmp_path / "out")
    assert weights_in(four_files) == FILES


def test_a_file_of_several_parts(four_files: Path, tmp_path: Path) -> None:
    """The error comes before anything is written."""
    with pytest.raises(UsageError, match=r"the parts 2/5, 3/5 read: .* be cut into 4 parts"):
        requant.convert(four_files, tmp_path / "out", part="2/5", **CONSUME)
    source = Path(shutil.copytree(MICRO_LLAMA, tmp_path / "single"))
    with pytest.raises(
        UsageError, match=r"deletes model.safetensors, .* 1/2, 2/2 read: .* 1 part\."
    ):
        requant.convert(source, tmp_path / "out", part="1/2", **CONSUME)
    assert not staging_dir(tmp_path / "out").exists()


@pytest.mark.parametrize("other", [{"part": "1/3", **CONSUME}, {"part": "2/2", **KEEP_4_BITS}])
def test_parts_that_do_not_agree_on_deletion(
    other: dict[str, Any], four_files: Path, tmp_path: Path
) -> None:
    requant.convert(four_files, tmp_path / "out", part="1/2", **CONSUME)
    with pytest.raises(OutputError, match="every part has it, and the same count"):
        requant.convert(four_files, tmp_path / "out", **other)


def test_what_is_deleted_is_not_lost(
    four_files: Path, tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    """A conversion without --consume-source is rejected, and a failed join removes nothing."""
    requant.convert(four_files, tmp_path / "one", **KEEP_4_BITS)
    output = tmp_path / "out"
    for part in ("1/2", "2/2"):
        requant.convert(four_files, output, part=part, **CONSUME)
    assert len(weights_in(four_files)) in (1, 2, 3)
    for options in (KEEP_4_BITS, {**KEEP_4_BITS, "resume": False}):
        with pytest.raises(RequantError, match="--consume-source"):
            requant.convert(four_files, output, **options)
    with monkeypatch.context() as broken:
        broken.setattr(OutputFolder, "publish", fail)
        with pytest.raises(InvariantError):
            requant.join(output)
    requant.join(output)
    assert tree(output) == tree(tmp_path / "one")


def fail(*_: object) -> None:
    raise InvariantError("it is a test")


# -- what does not fit together ----------------------------------------------------------------


def test_parts_of_other_options_are_rejected(tmp_path: Path) -> None:
    run_parts(MICRO_LLAMA, tmp_path / "out", ["1/2"], **KEEP_4_BITS)
    before = tree(staging_dir(tmp_path / "out"))
    with pytest.raises(OutputError, match="what is asked for changed; give the same command"):
        requant.convert(MICRO_LLAMA, tmp_path / "out", bits=8, layout="keep", part="2/2")
    with pytest.raises(OutputError, match="what is asked for changed"):
        requant.convert(MICRO_LLAMA, tmp_path / "out", bits=8, layout="keep")
    after = tree(staging_dir(tmp_path / "out"))
    assert {k: v for k, v in after.items() if k != "lock"} == {
        k: v for k, v in before.items() if k != "lock"
    }


def test_a_source_that_changed_is_rejected(tmp_path: Path) -> None:
    source = Path(shutil.copytree(MICRO_LLAMA, tmp_path / "m"))
    run_parts(source, tmp_path / "out", ["1/2"], **KEEP_4_BITS)
    file = next(source.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(OutputError, match="the source was changed"):
        requant.join(tmp_path / "out")
    assert staging_dir(tmp_path / "out").is_dir()


def test_nonfinite_values_are_named_by_the_part(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    bad = bf16(64, 128)
    bad[3, 5] = np.nan
    source = checkpoint({"a.weight": bf16(64, 128), "b.weight": bad})
    run_parts(source, tmp_path / "out", ["1/2"], bits=4)
    with pytest.raises(CheckpointError, match=r"b\.weight: 1 value is NaN"):
        requant.convert(source, tmp_path / "out", bits=4, part="2/2")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "way_out"),
    [
        ({"budget": 4, "save_recipe": "r.toml"}, "--recipe FILE.toml to every part"),
        ({"calibrate": True}, "requant calibrate SOURCE"),
        ({"allow_nonfinite": True}, "--override"),
        ({"resume": False}, "remove the hidden folder"),
        ({"verify_load": True}, "give it to `requant join`"),
    ],
)
def test_options_that_are_not_for_parts(
    options: dict[str, Any], way_out: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=way_out):
        requant.convert(MICRO_LLAMA, tmp_path / "out", part="1/2", **options)
    assert list(tmp_path.iterdir()) == []


def test_nothing_to_join(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no parts to join"):
        requant.join(tmp_path / "out")


@pytest.mark.parametrize(
    "content", [None, "{", "[]", '{"plan": "p"}', '{"plan": "p", "source": "m", "options": 1}']
)
def test_a_damaged_command(tmp_path: Path, content: str | None) -> None:
    """The file is named; after another run of a part nothing is lost."""
    run_parts(MICRO_LLAMA, tmp_path / "out", ["1/2"], **KEEP_4_BITS)
    file = staging_dir(tmp_path / "out") / "parts" / "command"
    file.unlink()
    if content is not None:
        file.write_text(content)
    with pytest.raises(RequantError, match=f"{file} is"):
        requant.join(tmp_path / "out")
    file.unlink(missing_ok=True)
    run_parts(MICRO_LLAMA, tmp_path / "out", ["1/2"], **KEEP_4_BITS)
    assert requant.join(tmp_path / "out") is not None


def test_an_output_that_exists_is_replaced_only_by_force(tmp_path: Path) -> None:
    requant.convert(MICRO_LLAMA, tmp_path / "out", bits=8, layout="keep")
    with pytest.raises(OutputError, match="--force replaces it"):
        requant.convert(MICRO_LLAMA, tmp_path / "out", part="1/2", **KEEP_4_BITS)
    for part in ("1/2", "2/2"):
        requant.convert(MICRO_LLAMA, tmp_path / "out", part=part, force=True, **KEEP_4_BITS)
    requant.join(tmp_path / "out")
    requant.convert(MICRO_LLAMA, tmp_path / "one", **KEEP_4_BITS)
    assert tree(tmp_path / "out") == tree(tmp_path / "one")


# -- several processes ---------------------------------------------------------------------------


def test_a_part_that_runs_keeps_a_join_out(tmp_path: Path) -> None:
    """Parts do not keep each other out."""
    run_parts(MICRO_LLAMA, tmp_path / "out", ["1/2"], **KEEP_4_BITS)
    with (staging_dir(tmp_path / "out") / "lock").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        run_parts(MICRO_LLAMA, tmp_path / "out", ["2/2"], **KEEP_4_BITS)
        with pytest.raises(OutputError, match="being written by another process"):
            requant.join(tmp_path / "out")
    assert requant.join(tmp_path / "out") is not None


def test_two_joins_on_a_file_system_without_locks(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    """The second finds the output complete, wherever the first overtakes it."""
    run_parts(MICRO_LLAMA, tmp_path / "out", ["1/2"], **KEEP_4_BITS)

    def no_locks(fd: int, how: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    begun: list[int] = []

    def overtaken(progress: object) -> None:
        if not begun:
            begun.append(1)
            assert requant.join(tmp_path / "out") is not None

    assert requant.join(tmp_path / "out", progress=overtaken) is None
    requant.convert(MICRO_LLAMA, tmp_path / "one", **KEEP_4_BITS)
    assert tree(tmp_path / "out") == tree(tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dense", "budget", "deleted source"])
def test_parts_and_joins_that_are_killed(name: str, four_files: Path, tmp_path: Path) -> None:
    """50 kills over parts that run at the same time and two joins at once."""
    jobs = {**JOBS, "deleted source": lambda _: (four_files, CONSUME)}
    source, options = jobs[name](tmp_path)
    script = [sys.executable, "-m", "tests.support.part_interruptions"]
    arguments = [source, tmp_path / "out", json.dumps(options), 5, 50]
    done = subprocess.run([*script, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    killed = json.loads(done.stdout)
    assert killed["parts"] + killed["joins"] >= 50
    assert min(killed.values()) > 0
