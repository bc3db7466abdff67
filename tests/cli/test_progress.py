"""What long commands say on the way, on a terminal and elsewhere."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from requant.cli import progress
from requant.execution.executor import Progress
from tests.support.commands import Result

MICRO = Path(__file__).parents[2] / "examples" / "micro-llama"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """A clock that does not move until its one number is changed."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    yield now


def test_plain_progress_prints_every_few_seconds(
    capsys: pytest.CaptureFixture[str], clock: list[float]
) -> None:
    """Called ten times a second for 13 s, it says something at 2, 7 and 12 s."""
    with progress.progress_display(quiet=False) as update:
        assert update is not None
        for tenth in range(130):
            clock[0] = 1000 + tenth / 10
            update(Progress("model.layers.3.mlp", tenth * 10**8, 13 * 10**9, tenth / 10))
    out, err = capsys.readouterr()
    assert out == ""
    assert [line[:4] for line in err.splitlines()] == [" 15%", " 53%", " 92%"]
    for line in err.splitlines():
        assert "1.00 GB/s" in line and " left" in line and "model.layers.3.mlp" in line


def test_plain_progress_of_a_second_run_is_not_silent(
    capsys: pytest.CaptureFixture[str], clock: list[float]
) -> None:
    """--budget measures, then converts: each counts its own seconds."""
    with progress.progress_display(quiet=False) as update:
        assert update is not None
        update(Progress("begun", 0, 10, 0.0))
        clock[0] = 1040.0
        update(Progress("measured", 9, 10, 40.0))
        clock[0] = 1046.0
        update(Progress("written", 1, 10, 6.0))
    assert [line.split()[-1] for line in capsys.readouterr().err.splitlines()] == [
        "measured",
        "written",
    ]


def test_plain_counting_is_rare_in_a_long_run(
    capsys: pytest.CaptureFixture[str], clock: list[float]
) -> None:
    with progress.counting_display(quiet=False) as update:
        assert update is not None
        for second in range(7200):
            clock[0] = 1000 + second
            update("window\x1b[2J of text", second, 7200)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == r"  0%  2 of 7,200  1 h 59 min left  window\x1b[2J of text"
    assert lines[1].startswith("  0%  7 of 7,200") and lines[-1].startswith(" 99%  7,1")
    assert 100 < len(lines) < 200


def test_a_short_count_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.counting_display(quiet=False) as update:
        assert update is not None
        update("block 1 of 2", 1, 2)
    assert capsys.readouterr() == ("", "")


def test_the_last_word_is_the_disk() -> None:
    text = progress.describe_progress(Progress("up_proj", 100, 100, 2.0))
    assert text.endswith("waiting for the disk") and "left" not in text


def test_progress_before_the_first_byte() -> None:
    text = progress.describe_progress(Progress("", 0, 100, 0.0))
    assert text.startswith("0 B/s") and "left" not in text


def test_quiet_has_no_progress() -> None:
    for display in (progress.progress_display, progress.counting_display):
        with display(quiet=True) as update:
            assert update is None


def test_a_count_tells_the_time_that_is_left(
    capsys: pytest.CaptureFixture[str], clock: list[float]
) -> None:
    """From the work of this run: an earlier one had done 10 of 40."""
    with progress.counting_display(quiet=False) as update:
        assert update is not None
        update("block 1", 10, 40)
        clock[0] += 20
        update("block 2", 20, 40)
        clock[0] += 20
        update("window 5", 5, 10)  # another count
        clock[0] += 20
        update("window 7", 7, 10)
    assert capsys.readouterr().err.splitlines() == [
        " 50%  20 of 40  40 s left  block 2",
        " 50%  5 of 10  window 5",
        " 70%  7 of 10  30 s left  window 7",
    ]


def test_a_calibration_tells_the_time_that_is_left() -> None:
    now = Progress("block 2 of 3", 0, 0, 5.0, steps_done=30, steps_total=50, steps_before=20)
    text = progress.describe_progress(now)
    assert text.startswith("calibrating  10 s left  ") and text.endswith("block 2 of 3")


def test_memory_in_use_is_that_of_a_python_process() -> None:
    assert 1 << 20 < progress.memory_in_use() < 1 << 40


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ("convert", MICRO, "new"),
        ("convert", MICRO, "new", "--budget", "5"),
        ("plan", MICRO, "--budget", "5"),
        ("verify", "out"),
        ("verify", MICRO, "out"),
        ("compare", MICRO, "out"),
        ("calibrate", MICRO, "-o", "s.safetensors", "--tokens", 64, "--window", 32),
        ("generate", MICRO, "--prompt", "The file", "--max-tokens", 2),
    ],
    ids=lambda words: " ".join(str(word) for word in words if word is not MICRO),
)
def test_every_long_command_tells_a_log_where_it_is(
    requant: Callable[..., Result],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[object, ...],
) -> None:
    """As if each took long: with --json too, whose document is alone on standard output."""
    monkeypatch.setattr(progress, "_FIRST_LINE_S", 0.0)
    monkeypatch.setattr(progress, "_LEAST_INTERVAL_S", 0.0)
    monkeypatch.chdir(tmp_path)
    if "out" in words:
        assert requant("convert", MICRO, "out", "--quiet").err == ""
    reported = requant(*words, "--json")
    assert reported.code == 0, reported.err
    assert re.search(r"^ *\d+%  ", reported.err, re.M), reported.err
    assert json.loads(reported.out)["schema"]
    if words[0] != "plan":  # which has nothing else to say
        again = ["--force"] if words[0] in ("convert", "calibrate") else []
        assert requant(*words, *again, "--json", "--quiet").err == ""
