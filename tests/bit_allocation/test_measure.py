"""Measuring reads the source once and makes one layout; each error is that of a run of its own."""

import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import requant
from requant.bit_allocation import choose, measure
from requant.bit_allocation.measurements import Measured, MeasuredErrors, measurements_path
from requant.execution.executor import Progress
from requant.importance.reader import LayerStatistics, write_statistics
from requant.planning import planner
from tests.support.checkpoints import model, write_checkpoint
from tests.support.fixture_folders import fixture

KEEP: dict[str, Any] = {"layout": "keep"}


def normal(*shape: int) -> np.ndarray:
    values = np.random.default_rng(len(shape)).normal(0, 0.02, shape)
    return np.asarray(values.astype(ml_dtypes.bfloat16))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    tensors = {f"model.layers.{n}.mlp.up_proj.weight": normal(48, 128) for n in range(3)}
    tensors["model.layers.0.mlp.down_proj.weight"] = normal(40, 96)  # not a multiple of 64
    return write_checkpoint(tmp_path / "source", tensors, {}, metadata={"format": "mlx"})


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Measured]:
    """What the calls of ``allocate_bits`` measured."""
    found: list[Measured] = []
    original = choose._recipe

    def recipe(measured: Measured, *rest: Any) -> Any:
        found.append(measured)
        return original(measured, *rest)

    monkeypatch.setattr(choose, "_recipe", recipe)
    return found


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bytes each positioned read gave."""
    counted: list[int] = []
    preadv = os.preadv

    def count(fd: int, into: Any, offset: int) -> int:
        counted.append(preadv(fd, into, offset))
        return counted[-1]

    monkeypatch.setattr(os, "preadv", count)
    return counted


def check_errors(
    source: Path, found: Measured, specs: list[str], output: Path, **options: Any
) -> int:
    """Compare errors with those of conversions to one quantization; how many were compared."""
    compared = 0
    for spec in specs:
        bits, group_size = map(int, spec.split(":"))
        folder = output / spec.replace(":", "-")
        asked = {"bits": bits, "group_size": group_size} | KEEP | options
        report = requant.convert(source, folder, **asked)
        for layer, error in report.errors.items():
            candidates = {x.spec: x for x in found.layers[layer]}
            if spec in candidates:
                measured = (candidates[spec].error / candidates[spec].energy) ** 0.5
                assert measured == pytest.approx(error.relative_rms, rel=6e-6)
                compared += 1
    return compared


@pytest.mark.parametrize("has_statistics", [False, True])
def test_errors_are_those_of_conversions(
    source: Path, tmp_path: Path, measured: list[Measured], has_statistics: bool
) -> None:
    """Scales are searched with the same weights: statistics, or estimated powers of inputs."""
    options: dict[str, Any] = {"search": "fast"}
    if has_statistics:
        file = tmp_path / "statistics.safetensors"
        powers = np.exp(np.random.default_rng(5).normal(0, 2, 128)).astype(np.float32)
        seen = {f"model.layers.{n}.mlp.up_proj": (n + 1) * powers for n in range(3)}
        count = np.array([100.0])
        write_statistics(file, {x: LayerStatistics(y, count) for x, y in seen.items()}, {})
        options["statistics"] = file
    requant.plan(source, budget=5, **KEEP, **options)
    (found,) = measured
    assert [x.spec for x in found.layers["model.layers.1.mlp.up_proj"]] == [
        f"{bits}:{group_size}" for group_size in (32, 64, 128) for bits in (2, 3, 4, 5, 6, 8)
    ]
    assert {x.spec[2:] for x in found.layers["model.layers.0.mlp.down_proj"]} == {"32"}
    specs = ["2:32", "3:64", "8:128"]
    assert check_errors(source, found, specs, tmp_path, **options) == 4 + 3 + 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gguf-q4_k_m", "awq-gemm-g128", "fp8-block-llama", "hqq-b4-g64"])
def test_errors_of_other_formats(name: str, tmp_path: Path, measured: list[Measured]) -> None:
    """Rows are decoded once, and encoded as in a conversion; codes that stay have no error."""
    source = fixture(name) / "checkpoint"
    source = next(source.glob("*.gguf"), source)
    requant.plan(source, budget=8, search="fast", **KEEP)
    (found,) = measured
    assert check_errors(source, found, ["2:32", "3:64"], tmp_path, search="fast") > 4


def test_the_source_is_read_once(source: Path, reads: list[int]) -> None:
    shown: list[Progress] = []
    plan = requant.plan(source, budget=4, progress=shown.append, threads=2, **KEEP)
    assert sum(reads) == plan.bytes_in
    assert (shown[-1].bytes_done, shown[-1].bytes_total) == (plan.bytes_in, plan.bytes_in)


@pytest.mark.parametrize("layout", ["keep", pytest.param("mlx-lm", marks=pytest.mark.slow)])
def test_one_layout_is_made(layout: str, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And one of the plan itself."""
    if layout != "keep":
        pytest.importorskip("mlx_lm")
        source = model("micro-llama")
    made: list[object] = []
    original = planner.choose_layout

    def choose_layout(*arguments: Any) -> Any:
        made.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(planner, "choose_layout", choose_layout)
    requant.plan(source, budget=5, layout=layout)
    assert len(made) == 2


def test_a_stopped_measuring_resumes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: list[Measured]
) -> None:
    expected = requant.plan(source, budget=4, **KEEP)
    run_plan, steps = measure.run_plan, []

    def run_two(plan: Any, *rest: Any, **named: Any) -> None:
        steps.append(len(plan.steps))
        run_plan(plan.__class__(**vars(plan) | {"steps": plan.steps[:2]}), *rest, **named)
        raise KeyboardInterrupt

    def run_all(plan: Any, *rest: Any, **named: Any) -> Any:
        steps.append(len(plan.steps))
        return run_plan(plan, *rest, **named)

    monkeypatch.setattr(measure, "run_plan", run_two)
    with pytest.raises(KeyboardInterrupt):
        requant.convert(source, tmp_path / "out", budget=4, **KEEP)
    assert measurements_path(tmp_path / "out").exists()
    monkeypatch.setattr(measure, "run_plan", run_all)
    report = requant.convert(source, tmp_path / "out", budget=4, **KEEP)
    assert report.plan.hash == expected.hash
    assert measured[0] == measured[1]
    assert steps == [4, 2]


def test_layers_that_are_not_finite_do_not_repeat_the_others(
    tmp_path: Path, reads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {f"model.{x}.weight": normal(64, 128) for x in "abc"}
    tensors["model.b.weight"][3, 5] = np.nan
    source = write_checkpoint(tmp_path / "source", tensors, {}, metadata={"format": "mlx"})
    runs: list[int] = []
    run_plan = measure.run_plan

    def run(plan: Any, *rest: Any, **named: Any) -> Any:
        runs.append(len(plan.steps))
        return run_plan(plan, *rest, **named)

    monkeypatch.setattr(measure, "run_plan", run)
    requant.convert(source, tmp_path / "out", budget=9, allow_nonfinite=True, **KEEP)
    assert runs == [3]


def test_errors_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "errors"
    errors = MeasuredErrors(file, "key")
    errors.add("up", {"4:64": (1.5, 2.0), "8:32": (0.25, 2.0)})
    assert not file.exists()  # it is not due
    errors.save()
    assert MeasuredErrors(file, "key").layers == errors.layers
    assert MeasuredErrors(file, "other").layers == {}
    assert MeasuredErrors(None, "key").layers == {}
    for text in ("", "[1]", '{"key": "key"}', '{"key": "key", "layers": {"up": {"4:64": [1]}}}'):
        file.write_text(text)
        assert MeasuredErrors(file, "key").layers == {}
