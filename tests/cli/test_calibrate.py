"""``requant calibrate`` as it is typed."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from requant.api.convert import convert
from requant.api.verify import verify
from requant.reports.front_matter import FrontMatter
from requant.reports.model_card import model_card
from requant.reports.record_summary import read_figures
from tests.support.commands import Result
from tests.support.plan_texts import note_texts, reason_text

pytest.importorskip("mlx_lm")

Requant = Callable[..., Result]
LLAMA = Path(__file__).parents[2] / "examples" / "micro-llama"


def test_from_the_command_line(tmp_path: Path, requant: Requant) -> None:
    """The text that comes with requant; the file weights a conversion."""
    stats = tmp_path / "s.safetensors"
    done = requant("calibrate", LLAMA, "-o", stats, "--tokens", "256", "--window", "64", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["windows"] == 4
    report = convert(LLAMA, tmp_path / "out", bits=3, statistics=stats)
    assert not any("found no statistics" in note for note in note_texts(report.plan.notes))
    assert all(
        not reason_text(layer) for layer in report.plan.layers if layer.target.startswith("aff")
    )
    assert verify(LLAMA, tmp_path / "out", statistics=stats).ok


@pytest.mark.slow
def test_what_a_report_says_to_check_with_is_enough(
    tmp_path: Path, requant: Requant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = ("--tokens", "256", "--window", "64")
    assert requant("calibrate", LLAMA, "-o", "s.safetensors", "--hessian", *text).code == 0
    asked = ("--bits", "3", "--gptq", "--imatrix", "s.safetensors", "--quiet")
    assert requant("convert", LLAMA, "out", *asked).code == 0
    declared = requant("report", "out").out
    (check,) = [line for line in declared.splitlines() if line.startswith("check: ")]
    assert check == "check: requant verify SOURCE out --imatrix s.safetensors"
    words = check.removeprefix("check: requant ").replace("SOURCE", str(LLAMA)).split()
    assert requant(*words).code == 0
    card = model_card(read_figures("out"), "me/out", None, FrontMatter())
    assert "`s.safetensors` holds these statistics" in card and "(GPTQ)" in card
    assert "requant verify SOURCE out --imatrix s.safetensors" in card


def test_as_a_part_of_a_conversion(
    tmp_path: Path, requant: Requant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text may be left out: then the next word is not one."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("A file holds bytes, and a tensor is a run of them. " * 40)
    done = requant("convert", "--calibrate", "text.txt", LLAMA, "out", "--bits", "3")
    assert done.code == 0, done.err
    assert "calibration with Hessians: 32,768 tokens, about " in done.err
    planned = requant("plan", "--calibrate", LLAMA, "--quality", "balanced", "--json")
    assert planned.code == 0, planned.err
    cost = json.loads(planned.out)["calibration"]
    assert (cost["tokens"], cost["hessians"]) == (32_768, False)
    assert "of memory" in requant("plan", LLAMA, "--calibrate").out
    assert requant("plan", LLAMA, "--quality", "fast").out.count("calibration") == 0
