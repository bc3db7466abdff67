"""Statistics and losses of a multimodal model: mlx-vlm's class gives what mlx-lm's class gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from pytest import MonkeyPatch

import requant
from requant.calibration import blocks, text_model
from requant.errors import CheckpointError
from requant.libraries import LIBRARIES
from tests.support.checkpoints import tree
from tests.support.interruptions import Stop, stop_after
from tests.support.library_models import write_model, write_processor
from tests.support.plan_texts import note_texts

TEXT = "A file holds bytes, and a tensor is a run of them with a shape. " * 30
RUN: dict[str, Any] = {"hessian": True, "tokens": 192, "window": 48}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Qwen2-VL, of which both libraries have a class."""
    write_model("mlx-vlm", tmp_path / "source")
    write_processor(tmp_path / "source")
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "source"


@pytest.fixture
def in_mlx_vlm(monkeypatch: MonkeyPatch) -> None:
    """As for a model of which mlx-lm has no class."""
    monkeypatch.setattr(text_model, "_LIBRARIES", (LIBRARIES["mlx-vlm"],))


def calibrate(source: Path, name: str) -> tuple[requant.Calibration, dict[str, np.ndarray]]:
    output = source.with_name(f"{name}.safetensors")
    calibration = requant.calibrate(source, output, source.with_name("text.txt"), **RUN)
    arrays = dict(mx.load(str(output)))
    return calibration, {name: np.array(x) for name, x in arrays.items()}


def assert_close(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for name, array in a.items():
        room = 1e-4 * np.abs(array).max()
        np.testing.assert_allclose(array, b[name], rtol=2e-3, atol=room, err_msg=name)


def test_statistics_are_those_of_mlx_lm(source: Path, monkeypatch: MonkeyPatch) -> None:
    """Block by block and as a whole; no layer of a tower has any."""
    expected, mine = calibrate(source, "mlx-lm")
    monkeypatch.setattr(text_model, "_LIBRARIES", (LIBRARIES["mlx-vlm"],))
    found, theirs = calibrate(source, "mlx-vlm")
    assert found.blockwise and found.layers == found.hessians == expected.layers == 4 * 2 + 1
    assert found.not_observed == ()
    assert_close(mine, theirs)

    def rejects(*_: Any) -> None:
        raise blocks.NotBlockwiseError("of the test")

    monkeypatch.setattr(blocks.BlockwiseModel, "calls", rejects)
    whole, theirs = calibrate(source, "whole")
    assert (whole.blockwise, whole.reason) == (False, "of the test")
    assert_close(mine, theirs)


@pytest.mark.slow
@pytest.mark.usefixtures("in_mlx_vlm")
def test_towers_are_not_read(source: Path, monkeypatch: MonkeyPatch) -> None:
    read: list[str] = []
    real = blocks.run_plan

    def run_plan(plan: Any, *rest: Any) -> Any:
        read.extend(step.layer for step in plan.steps)
        return real(plan, *rest)

    monkeypatch.setattr(blocks, "run_plan", run_plan)
    calibrate(source, "s")
    assert read and all(layer.startswith("language_model.") for layer in read)


@pytest.mark.slow
def test_losses_are_those_of_mlx_lm(source: Path, monkeypatch: MonkeyPatch) -> None:
    requant.convert(source, source.with_name("out"), bits=4, layout="mlx-vlm")
    pair = (source, source.with_name("out"))
    options: dict[str, Any] = {"text": source.with_name("text.txt"), "tokens": 128, "window": 64}
    mine = requant.compare(*pair, **options).evaluation
    monkeypatch.setattr(text_model, "_LIBRARIES", (LIBRARIES["mlx-vlm"],))
    theirs = requant.compare(*pair, **options).evaluation
    assert mine is not None and theirs is not None and mine.gap.value != 0
    for name in ("loss_a", "loss_b", "divergence"):
        a, b = getattr(mine, name).value, getattr(theirs, name).value
        assert a == pytest.approx(b, rel=1e-3, abs=1e-7), name


def test_encoders_have_no_statistics(tmp_path: Path) -> None:
    write_model("mlx-embeddings", tmp_path / "source")
    with pytest.raises(CheckpointError, match=r"mlx-embeddings's class .* is an encoder") as caught:
        requant.calibrate(tmp_path / "source", tmp_path / "s.safetensors")
    assert caught.value.action == "calibrated"


@pytest.mark.usefixtures("in_mlx_vlm")
def test_a_class_of_mlx_vlm_without_a_language_model(source: Path) -> None:
    with pytest.raises(CheckpointError, match=r"mlx-vlm's class .* is an encoder"):
        text_model.text_part(source, "mlx-vlm", {"vision_tower": None})


def test_a_model_without_a_class(source: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"model_type": "other"}))
    expected = "mlx-lm has no class for model_type 'other'; mlx-vlm has no class"
    with pytest.raises(CheckpointError, match=expected):
        requant.calibrate(source, source.with_name("s.safetensors"))


def test_a_class_that_fails(source: Path, monkeypatch: MonkeyPatch) -> None:
    """Configs of other sizes than a class is written for end in its own exceptions."""
    from mlx_lm.models import qwen2

    def fails(*_: Any) -> None:
        raise IndexError("index out of range")

    monkeypatch.setattr(qwen2.Qwen2Model, "__call__", fails)
    with pytest.raises(requant.BackendError, match="index out of range"):
        calibrate(source, "s")


# -- options of convert under mlx-vlm's layout -----------------------------------------------
OPTIONS: dict[str, dict[str, Any]] = {
    "a recipe of requant": {"recipe": "down-6"},
    "mlx-vlm's own recipe": {"recipe": "mixed_3_8"},
    "budget": {"budget": 12.0},
    "search": {"bits": 4, "search": "best"},
    "a tower": {"bits": 4, "overrides": ["vision=8"]},
    "gptq": {"bits": 3, "gptq": True},
}


@pytest.mark.sweep(1)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_under_mlx_vlm(options: dict[str, Any], source: Path, tmp_path: Path) -> None:
    """The output loads strictly, repeats bit for bit, and is resumed to the same bytes."""
    again: dict[str, Any] = {}
    if options.get("gptq"):
        calibrate(source, "s")
        again = {"statistics": tmp_path / "s.safetensors"}
    options = {**options, **again, "layout": "mlx-vlm"}
    report = requant.convert(source, tmp_path / "whole", **options)
    verification = requant.verify(tmp_path / "whole", load=True)
    assert verification.ok and verification.load is not None
    assert verification.load.library == "mlx-vlm"
    assert requant.verify(source, tmp_path / "whole", **again).ok
    towers = [
        x for x in report.plan.layers if x.layer.startswith("vision") and x.treatment == "quantized"
    ]
    assert bool(towers) == ("overrides" in options)
    if options.get("gptq"):
        notes = note_texts(report.plan.notes)
        assert any("Errors of 15 layers are propagated column by column" in x for x in notes)
    with MonkeyPatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(Stop):
            requant.convert(source, tmp_path / "out", **options, threads=1, chunk_bytes=3000)
    requant.convert(source, tmp_path / "out", **options)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


@pytest.mark.slow
def test_the_source_can_be_consumed(source: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"bits": 4, "layout": "mlx-vlm"}
    requant.convert(source, tmp_path / "whole", **options)
    requant.convert(
        source, tmp_path / "out", **options, consume_source=True, yes=True, verify_load=True
    )
    assert not list(source.glob("*.safetensors"))
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
