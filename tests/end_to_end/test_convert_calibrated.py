"""``convert(..., calibrate=...)``: calibration, GPTQ and resuming in one call."""

import json
from pathlib import Path
from typing import Any

import pytest

import requant
from requant.api import convert as conversion
from requant.api import runs
from requant.calibration import conversion as calibration
from requant.errors import CheckpointError, OutputError, UsageError
from requant.reports.record_summary import read_figures
from tests.support.plan_texts import note_texts
from tests.support.safetensors_files import read_folder

pytest.importorskip("mlx_lm")

LLAMA = Path(__file__).parents[2] / "examples" / "micro-llama"
OPTIONS: dict[str, Any] = {"bits": 3, "group_size": 32}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("A file holds bytes, and a tensor is a run of them with a shape. " * 40)
    return path


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in read_folder(folder).items()}


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def test_one_call_does_what_two_do(text: Path, tmp_path: Path) -> None:
    """The same bytes; nothing is left but the output, which the same statistics verify."""
    report = requant.convert(LLAMA, tmp_path / "one", calibrate=text, **OPTIONS)
    assert hidden(tmp_path) == []
    stats = tmp_path / "stats.safetensors"
    requant.calibrate(LLAMA, stats, text, hessian=True)
    requant.convert(LLAMA, tmp_path / "two", gptq=True, statistics=stats, **OPTIONS)
    plain = requant.convert(LLAMA, tmp_path / "plain", **OPTIONS)
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two") != bytes_of(tmp_path / "plain")
    assert report.plan.bytes_out == plain.plan.bytes_out
    assert any("the calibration (--calibrate)" in note for note in note_texts(report.plan.notes))
    assert requant.verify(LLAMA, tmp_path / "one", statistics=stats).ok
    with pytest.raises(
        UsageError, match=r"requant calibrate SOURCE -o stats.* --text text.txt --h"
    ):
        requant.verify(LLAMA, tmp_path / "one")
    options = json.loads((tmp_path / "one" / "requant.json").read_text())["options"]
    assert (options["calibrate"], options["statistics"]) == (["text.txt"], None)
    figures = read_figures(tmp_path / "one")
    assert figures.command().endswith("--calibrate=text.txt")
    assert " && requant verify SOURCE OUTPUT --imatrix" in figures.verify_command(output="OUTPUT")


def test_a_stopped_conversion_does_not_calibrate_again(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its statistics are found; --no-resume makes them again."""
    calls: list[int] = []
    real_run, real_once = calibration.run, runs.run_once

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return real_run(*args, **kwargs)

    def stops(*_: Any) -> Any:
        raise OutputError("of the test")

    monkeypatch.setattr(calibration, "run", counted)
    monkeypatch.setattr(runs, "run_once", stops)
    with pytest.raises(OutputError, match="of the test"):
        requant.convert(LLAMA, tmp_path / "out", calibrate=text, **OPTIONS)
    (kept,) = [x for x in hidden(tmp_path) if x.endswith(".safetensors")]
    assert calls == [1]
    with pytest.raises(OutputError, match="of the test"):
        requant.convert(LLAMA, tmp_path / "out", calibrate=text, resume=False, **OPTIONS)
    assert calls == [1, 1] and kept in hidden(tmp_path)
    monkeypatch.setattr(runs, "run_once", real_once)
    requant.convert(LLAMA, tmp_path / "out", calibrate=text, **OPTIONS)
    assert calls == [1, 1] and hidden(tmp_path) == []


def test_another_text_replaces_what_a_stopped_run_left(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stops(*_: Any) -> Any:
        raise OutputError("of the test")

    monkeypatch.setattr(runs, "run_once", stops)
    found = []
    for number in range(2):
        text.write_text(text.read_text() + f"And {number} more words. " * 50)
        with pytest.raises(OutputError, match="of the test"):
            requant.convert(LLAMA, tmp_path / "out", calibrate=text, **OPTIONS)
        found.append([x for x in hidden(tmp_path) if x.endswith(".safetensors")])
    assert [len(names) for names in found] == [1, 1] and found[0] != found[1]


def test_nothing_is_calibrated_where_nothing_is_searched(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requant.convert(LLAMA, tmp_path / "quantized", bits=4)
    monkeypatch.delattr(calibration, "run")
    requant.convert(tmp_path / "quantized", tmp_path / "out", calibrate=text)
    assert read_figures(tmp_path / "out").options.calibrate is None
    assert conversion.calibration_cost(tmp_path / "quantized", calibrate=text) is None
    assert conversion.calibration_cost(LLAMA, calibrate=text) is not None


@pytest.mark.slow
def test_a_budget_is_measured_with_the_statistics(text: Path, tmp_path: Path) -> None:
    stats = tmp_path / "stats.safetensors"
    requant.calibrate(LLAMA, stats, text, hessian=True)
    options: dict[str, Any] = {"budget": 4, "search": "fast"}
    requant.convert(LLAMA, tmp_path / "one", calibrate=text, **options)
    requant.convert(LLAMA, tmp_path / "two", gptq=True, statistics=stats, **options)
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two")
    with pytest.raises(UsageError, match="--budget is planned with the statistics"):
        requant.plan(LLAMA, calibrate=text, **options)


def test_what_cannot_be_calibrated_is_an_error_before_anything_is_written(
    text: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="--consume-source deletes what --calibrate reads"):
        requant.convert(LLAMA, tmp_path / "out", calibrate=text, consume_source=True, yes=True)
    with pytest.raises(UsageError, match="do not fill one window"):
        text.write_text("short")
        requant.convert(LLAMA, tmp_path / "out", calibrate=text)
    with pytest.raises(OutputError, match=r"the source .* must not be changed"):
        requant.convert(LLAMA, LLAMA / "out", calibrate=text)
    with pytest.raises(CheckpointError):
        requant.convert(tmp_path, tmp_path / "out", calibrate=True)
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]
