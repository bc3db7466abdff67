"""A conversion can be killed anywhere: what appears is whole, and nothing is done twice."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pytest import MonkeyPatch

from requant.api.convert import convert, plan
from requant.errors import CheckpointError, OutputError
from requant.execution import executor as execute
from requant.execution import source_reader
from requant.output import folder as writer
from requant.output import journal
from requant.output.journal import read_journal
from tests.support.checkpoints import tree
from tests.support.fixture_folders import fixture
from tests.support.full_disks import fill_disk
from tests.support.gguf_files import gguf_file
from tests.support.interruptions import Stop, stop_after
from tests.support.number_formats import bf16

ROOT = Path(__file__).parents[2]


def stopped(source: Path, output: Path, chunks: int = 3, **options) -> BaseException:
    """Convert until a few chunks are done."""
    with MonkeyPatch.context() as patch:
        stop_after(patch, chunks)
        with pytest.raises(Stop) as raised:
            convert(source, output, **options, threads=1, chunk_bytes=3000)
    return raised.value


def count_chunks(monkeypatch: MonkeyPatch) -> list[int]:
    done: list[int] = []
    real = execute._Run._run_unit
    monkeypatch.setattr(
        execute._Run,
        "_run_unit",
        lambda self, chunk, *rest: (done.append(1), real(self, chunk, *rest)),
    )
    return done


def test_the_same_command_resumes(dense: Path, tmp_path: Path, monkeypatch: MonkeyPatch):
    whole = count_chunks(monkeypatch)
    convert(dense, tmp_path / "whole", bits=4, threads=1, chunk_bytes=3000)
    all_chunks = len(whole)
    assert "the same command resumes" in stopped(dense, tmp_path / "out", 20, bits=4).__notes__[0]
    assert not (tmp_path / "out").exists()
    whole.clear()
    convert(dense, tmp_path / "out", bits=4, threads=1, chunk_bytes=3000)
    assert len(whole) == all_chunks - 20
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source", "whole"]


def test_other_chunks_and_threads_resume_too(dense: Path, tmp_path: Path) -> None:
    convert(dense, tmp_path / "whole", bits=4)
    stopped(dense, tmp_path / "out", 20, bits=4)
    convert(dense, tmp_path / "out", bits=4, threads=3, chunk_bytes=1700)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_what_was_found_is_not_forgotten(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    bad = bf16(64, 128, seed=1)
    bad[0, 7] = np.inf
    source = checkpoint({"a.weight": bad, "b.weight": bf16(64, 128)})
    stopped(source, tmp_path / "out", 4, bits=4)
    with pytest.raises(CheckpointError, match=r"a\.weight: 1 value is .* first in row 0"):
        convert(source, tmp_path / "out", bits=4)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_measured_errors_survive(dense: Path, tmp_path: Path) -> None:
    whole = convert(dense, tmp_path / "whole", bits=4, threads=1, chunk_bytes=3000)
    stopped(dense, tmp_path / "out", 20, bits=4)
    resumed = convert(dense, tmp_path / "out", bits=4, threads=1, chunk_bytes=3000)
    assert resumed.errors.keys() == whole.errors.keys()
    for layer, error in whole.errors.items():
        assert resumed.errors[layer].relative_rms == pytest.approx(error.relative_rms, rel=1e-12)
        assert resumed.errors[layer].max_steps == error.max_steps


def test_a_second_pass_without_nonfinite_layers_resumes(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    bad = bf16(64, 128, seed=1)
    bad[0, 7] = np.inf
    source = checkpoint({"a.weight": bad, "b.weight": bf16(64, 128)})
    options = {"bits": 4, "allow_nonfinite": True}
    convert(source, tmp_path / "whole", **options)
    with MonkeyPatch.context() as patch:
        count = count_chunks(patch)
        with pytest.raises(CheckpointError):
            convert(source, tmp_path / "rejected", bits=4, threads=1, chunk_bytes=3000)
    first_pass = len(count)
    stopped(source, tmp_path / "out", first_pass + 6, **options)
    head, _ = read_journal(tmp_path / ".out.requant-partial" / "journal")
    assert head["nonfinite_layers"] == ["a"]
    with MonkeyPatch.context() as patch:
        count = count_chunks(patch)
        convert(source, tmp_path / "out", **options, threads=1, chunk_bytes=3000)
    assert len(count) < first_pass + 2
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_no_resume_starts_over(dense: Path, tmp_path: Path, monkeypatch: MonkeyPatch):
    stopped(dense, tmp_path / "out", 20, bits=4)
    done = count_chunks(monkeypatch)
    convert(dense, tmp_path / "other", bits=4, threads=1, chunk_bytes=3000)
    all_chunks = len(done)
    convert(dense, tmp_path / "out", bits=4, threads=1, chunk_bytes=3000, resume=False)
    assert len(done) == 2 * all_chunks


# -- what must not resume -------------------------------------------------------------------
def test_another_option_is_rejected_and_nothing_is_lost(dense: Path, tmp_path: Path) -> None:
    stopped(dense, tmp_path / "out", bits=4)
    with pytest.raises(OutputError, match="what is asked for changed since; --no-resume"):
        convert(dense, tmp_path / "out", bits=8)
    convert(dense, tmp_path / "out", bits=4)
    stopped(dense, tmp_path / "two", bits=4)
    convert(dense, tmp_path / "two", bits=8, resume=False)


def test_a_changed_source_is_rejected(dense: Path, tmp_path: Path) -> None:
    """Not a header differs: only the time of the change tells."""
    stopped(dense, tmp_path / "out", bits=4)
    os.utime(dense / "model.safetensors", ns=(1, 1))
    with pytest.raises(OutputError, match=r"the source's model\.safetensors changed since"):
        convert(dense, tmp_path / "out", bits=4)


def test_another_version_is_rejected(dense: Path, tmp_path: Path, monkeypatch: MonkeyPatch):
    stopped(dense, tmp_path / "out", bits=4)
    monkeypatch.setattr(writer, "version", lambda: "99")
    with pytest.raises(OutputError, match=r"requant is 99, it was .* since"):
        convert(dense, tmp_path / "out", bits=4)


@pytest.mark.parametrize("harm", ["gone", "short", "header", "link"])
def test_a_partial_shard_that_was_touched_starts_over(dense: Path, tmp_path: Path, harm: str):
    convert(dense, tmp_path / "whole", bits=4)
    stopped(dense, tmp_path / "out", 20, bits=4)
    shard = tmp_path / ".out.requant-partial" / "output" / "model.safetensors"
    if harm == "short":
        os.truncate(shard, 1000)
    elif harm == "header":
        shard.write_bytes(b"x" * shard.stat().st_size)
    else:
        shard.rename(tmp_path / "moved")
    if harm == "link":
        shard.symlink_to(tmp_path / "moved")
        with pytest.raises(OutputError, match="cannot be written"):
            convert(dense, tmp_path / "out", bits=4)
        return
    convert(dense, tmp_path / "out", bits=4)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


# -- loss of power ---------------------------------------------------------------------------
@pytest.mark.parametrize("merged_above", [0, 1 << 20])
def test_power_lost_in_the_middle(
    dense: Path, tmp_path: Path, monkeypatch: MonkeyPatch, merged_above: int
) -> None:
    """All that no line calls durable turns to garbage, and the run after that is whole."""
    convert(dense, tmp_path / "whole", bits=4)
    with monkeypatch.context() as patch:
        patch.setattr(journal, "SYNC_EVERY_S", 0.001)
        patch.setattr(journal, "MERGED_ABOVE_BYTES", merged_above)
        real = execute._Run._run_unit
        patch.setattr(execute._Run, "_run_unit", lambda *a: (time.sleep(0.003), real(*a))[1])
        stopped(dense, tmp_path / "out", 40, bits=4)
    monkeypatch.setattr(journal, "boot_id", lambda: "after the power came back")
    staging = tmp_path / ".out.requant-partial"
    _, done = read_journal(staging / "journal")
    steps = plan(dense, bits=4).steps
    assert 0 < sum(map(done.done_rows, done.rows)) < sum(step.rows.count for step in steps)
    garbled = 0
    for number, step in enumerate(steps):
        for start, stop in done.remaining(number, step.rows.count):
            for out in step.outputs.values():
                row = step.row_bytes(out)
                with (staging / "output" / out.file).open("r+b") as file:
                    file.seek(out.offset + start * row)
                    file.write(b"\xa5" * ((stop - start) * row))
                    garbled += 1
    assert garbled > 5
    done_now = count_chunks(monkeypatch)
    convert(dense, tmp_path / "out", bits=4, threads=1, chunk_bytes=3000)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    assert done_now


def test_a_sync_that_fails_stops_the_run(dense: Path, tmp_path: Path, monkeypatch: MonkeyPatch):
    """A disk that lost what was written must not be published."""

    def fails(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OutputError, match="Input/output error"):
        convert(dense, tmp_path / "out", bits=4)
    assert not (tmp_path / "out").exists()


# -- disk full, replaced folders -----------------------------------------------------------
def test_a_full_disk_keeps_what_is_done(dense: Path, tmp_path: Path) -> None:
    convert(dense, tmp_path / "whole", bits=4)
    with MonkeyPatch.context() as patch:
        fill_disk(patch, after=40)
        with pytest.raises(OutputError, match="No space left") as raised:
            convert(dense, tmp_path / "out", bits=4, chunk_bytes=3000)
    assert "is done and kept in" in raised.value.__notes__[0]
    convert(dense, tmp_path / "out", bits=4)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_a_source_file_that_disappears(dense: Path, tmp_path: Path) -> None:
    """Named, nothing appears; put back, the same command resumes."""
    convert(dense, tmp_path / "whole", bits=4)
    stopped(dense, tmp_path / "out", 20, bits=4)
    shard, config = dense / "model.safetensors", dense / "config.json"
    for path, message in (
        (shard, "no model.safetensors"),
        (config, r"config\.json: does not exist"),
    ):
        path.rename(tmp_path / "elsewhere")
        with pytest.raises(CheckpointError, match=message):
            convert(dense, tmp_path / "out", bits=4)
        assert not (tmp_path / "out").exists()
        (tmp_path / "elsewhere").rename(path)
    with MonkeyPatch.context() as patch:  # between the plan and the first read
        real = source_reader.SourceReader.__enter__
        patch.setattr(
            source_reader.SourceReader, "__enter__", lambda self: (shard.unlink(), real(self))[1]
        )
        kept = shard.read_bytes()
        times = shard.stat()
        with pytest.raises(CheckpointError, match=r"model\.safetensors: No such file"):
            convert(dense, tmp_path / "out", bits=4)
    assert not (tmp_path / "out").exists()
    shard.write_bytes(kept)
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    done = count_chunks(patch := MonkeyPatch())
    convert(dense, tmp_path / "out", bits=4, threads=1, chunk_bytes=3000)
    resumed = len(done)
    convert(dense, tmp_path / "two", bits=4, threads=1, chunk_bytes=3000)
    patch.undo()
    assert resumed == len(done) - resumed - 20
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_killed_between_the_two_renames_of_force(
    dense: Path, tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    convert(dense, tmp_path / "out", bits=8)
    convert(dense, tmp_path / "whole", bits=4)
    before = tree(tmp_path / "out")
    real = Path.rename

    def dying(self: Path, target: Path) -> Path:
        if self.name == "output":
            raise Stop
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", dying)
        with pytest.raises(Stop):
            convert(dense, tmp_path / "out", bits=4, force=True)
    assert not (tmp_path / "out").exists()
    with pytest.raises(OutputError, match="exists"):  # it is back where it was
        convert(dense, tmp_path / "out", bits=4)
    assert tree(tmp_path / "out") == before
    convert(dense, tmp_path / "out", bits=4, force=True)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


# -- the lock ------------------------------------------------------------------------------
def test_a_second_process_stops(dense: Path, tmp_path: Path) -> None:
    staging = tmp_path / ".out.requant-partial"
    staging.mkdir()
    holds = (
        "import fcntl, sys, time\nf = open(sys.argv[1], 'w')\nf.write('process 7')\nf.flush()\n"
        "fcntl.flock(f, fcntl.LOCK_EX)\nprint('held', flush=True)\ntime.sleep(60)"
    )
    command = [sys.executable, "-c", holds, str(staging / "lock")]
    other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(OutputError, match=r"written by another process \(process 7\)"):
            convert(dense, tmp_path / "out", bits=4)
        assert staging.exists()
    finally:
        other.kill()
        other.communicate()
    convert(dense, tmp_path / "out", bits=4)  # the lock died with its process
    assert not staging.exists()


def test_a_hidden_folder_that_is_a_link_is_not_written_through(dense: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".out.requant-partial").symlink_to("elsewhere")
    with pytest.raises(OutputError, match="is a link"):
        convert(dense, tmp_path / "out", bits=4)
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_pipe_in_the_place_of_a_shard_does_not_block(
    dense: Path, tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    real = source_reader.SourceReader.__enter__

    def swapped(self):
        (dense / "model.safetensors").unlink()
        os.mkfifo(dense / "model.safetensors")
        return real(self)

    monkeypatch.setattr(source_reader.SourceReader, "__enter__", swapped)
    with pytest.raises(CheckpointError, match="not a regular file"):
        convert(dense, tmp_path / "out", bits=4)


# -- real processes ------------------------------------------------------------------------
@pytest.mark.slow
def test_ctrl_c_ends_within_a_second_and_says_how_to_resume(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source = checkpoint({f"l{n}.weight": bf16(512, 4096, seed=n) for n in range(12)})
    slow = "import requant.execution.executor as e,time\nreal=e._Run._run_unit\n"
    slow += "e._Run._run_unit=lambda *a:(time.sleep(0.1),real(*a))\n"
    took = []
    for attempt in range(3):  # the machine may be busy with other things
        out = tmp_path / f"out{attempt}"
        code = f"{slow}from requant.cli import run\nrun(['convert',{str(source)!r},{str(out)!r}])"
        process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
        log = tmp_path / f".{out.name}.requant-partial" / "journal"
        while not log.exists() or log.read_bytes().count(b"\n") < 4:
            assert process.poll() is None
            time.sleep(0.02)
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
        took.append(time.monotonic() - began)
        assert process.returncode == 130
        assert "interrupted; " in errors and "the same command resumes" in errors
        assert "Traceback" not in errors
        if took[-1] < 1:
            return
    raise AssertionError(took)


def jobs(
    dense: Path, checkpoint: Callable[..., Path], tmp_path: Path
) -> list[tuple[str, str, dict[str, object]]]:
    """Conversions over several formats: dense, MLX, GGUF, and what other tools wrote."""
    convert(dense, tmp_path / "mlx", bits=8)
    layers = {f"l{n}.weight": bf16(64, 64, seed=n) for n in range(6)}
    parts = checkpoint(layers | {"m.experts.gate_up_proj": bf16(4, 64, 64)}, shards=3, name="parts")
    consume = {"bits": 4, "consume_source": True, "yes": True, "shard_size": 10_000}
    found: list[tuple[str, str, dict[str, object]]] = [
        (str(dense), str(tmp_path / "a"), {"bits": 4, "shard_size": 30_000}),
        (str(dense), str(tmp_path / "b"), {"mode": "nvfp4"}),
        (str(parts), str(tmp_path / "e"), consume),
        (str(gguf_file(tmp_path)), str(tmp_path / "f"), {"layout": "keep"}),
        (str(tmp_path / "mlx"), str(tmp_path / "c"), {"bits": 3}),
        (str(tmp_path / "mlx"), str(tmp_path / "d"), {"dequantize": True}),
    ]
    for name in (
        "awq-gemm-g128",
        "gptq-b4-g64-sym-v2",
        "ct-pack-int4-asym-g32",
        "fp8-block-llama",
        "mxfp4-gpt-oss",
    ):
        source = str(fixture(name) / "checkpoint")
        dense_too = {"dequantize": True} if name == "fp8-block-llama" else {}
        found.append((source, str(tmp_path / name), {"layout": "keep", **dense_too}))
    return found


@pytest.mark.slow
def test_killed_at_a_hundred_random_moments(
    dense: Path, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Every output that appears is whole and equal to that of a run that nobody killed.

    ``REQUANT_KILLS=1000`` kills more often, ``REQUANT_SEED=2`` at other moments.
    """
    kills = int(os.environ.get("REQUANT_KILLS", "100"))
    command = [
        sys.executable,
        "-m",
        "tests.support.interruptions",
        json.dumps(jobs(dense, checkpoint, tmp_path)),
        os.environ.get("REQUANT_SEED", "1"),
        str(kills),
    ]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    reported = json.loads(run.stdout)
    print(reported)
    assert reported["killed"] >= kills
    assert reported["resumed"] >= kills // 3
    assert reported["finished"] >= 4
    assert reported["merged"] > 0
