"""``--gptq`` in the pipeline.

The kernels' own bytes from any chunks, and what is named or rejected.
"""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import requant
from requant.errors import CheckpointError, RequantError, UsageError
from requant.importance.reader import LayerStatistics, write_statistics
from requant.kernels import gptq
from requant.kernels import quantize as native
from requant.kernels.input_power import estimated_power
from requant.output.journal import read_journal
from requant.output.staging import staging_dir
from requant.quantization.config import Quantization
from tests.support.checkpoints import tree
from tests.support.interruptions import Stop, stop_after
from tests.support.plan_texts import note_texts, reason_text
from tests.support.safetensors_files import read_folder, write_file

BF16 = np.dtype(ml_dtypes.bfloat16)
Q, DOWN, UP = (
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.mlp.down_proj",
    "model.layers.0.mlp.switch_mlp.up_proj",
)
SHAPES = {Q: (40, 64), DOWN: (24, 128), UP: (3, 32, 96)}
OPTIONS: dict[str, Any] = {"bits": 3, "group_size": 32, "layout": "keep", "gptq": True}


def hessian_of(n_in: int, seed: int) -> np.ndarray:
    x = np.random.default_rng(seed).normal(0, 1, (300, n_in))
    x[:, 1:] += 0.8 * x[:, :-1]
    return (x.T @ x / len(x)).astype(np.float32)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    random = np.random.default_rng(4)
    tensors = {f"{n}.weight": random.normal(0, 1, s).astype(BF16) for n, s in SHAPES.items()}
    write_file(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps({"model_type": "of a test"}))
    return folder


HESSIANS = {Q: hessian_of(64, 1), UP: np.stack([hessian_of(96, 2 + n) for n in range(3)])}


@pytest.fixture
def stats(tmp_path: Path) -> Path:
    """Hessians of q and of three experts, one of which saw no token; none of down."""
    path = tmp_path / "s.safetensors"
    squares = {name: np.diagonal(h, axis1=-2, axis2=-1).copy() for name, h in HESSIANS.items()}
    layers = {
        Q: LayerStatistics(squares[Q], np.array([9.0])),
        UP: LayerStatistics(squares[UP], np.array([5.0, 0.0, 7.0])),
        DOWN: LayerStatistics(np.ones(128, np.float32), np.array([9.0])),
    }
    write_statistics(
        path, layers, {n: h.reshape(-1, *h.shape[-2:]).__getitem__ for n, h in HESSIANS.items()}
    )
    return path


@pytest.mark.parametrize("options", [{}, {"chunk_bytes": 1}, {"chunk_bytes": 3000, "threads": 3}])
def test_each_matrix_by_its_own_hessian(
    options: dict[str, Any], source: Path, stats: Path, tmp_path: Path
) -> None:
    report = requant.convert(source, tmp_path / "out", statistics=stats, **OPTIONS, **options)
    made, weights = read_folder(tmp_path / "out"), read_folder(source)

    def check(layer: str, expert: int | None, expected: Any) -> None:
        for role, wanted in zip(("weight", "scales", "biases"), expected, strict=True):
            stored = made[f"{layer}.{role}"]
            stored = stored if expert is None else stored[expert]
            assert stored.tobytes() == np.ascontiguousarray(wanted).tobytes(), (layer, role)

    w = weights[f"{Q}.weight"]
    check(
        Q, None, gptq.quantize(w, gptq.compensation_of(HESSIANS[Q], 64), Quantization.affine(32, 3))
    )
    for expert in (0, 2):
        given = gptq.compensation_of(HESSIANS[UP][expert], 96)
        check(
            UP,
            expert,
            gptq.quantize(weights[f"{UP}.weight"][expert], given, Quantization.affine(32, 3)),
        )
    w = weights[f"{UP}.weight"][1]
    chosen = {"search": "best", "weights": estimated_power(w), "by_magnitude": True}
    check(UP, 1, native.quantize(w, Quantization.affine(32, 3), **chosen))
    ones = np.ones(128, np.float32)
    w = weights[f"{DOWN}.weight"]
    check(DOWN, None, native.quantize(w, Quantization.affine(32, 3), search="best", weights=ones))
    notes = " ".join(note_texts(report.plan.notes))
    assert "2 layers are propagated" in notes
    assert "no group has a larger" not in notes
    assert f"{DOWN}: no Hessian: searched without --gptq" in notes
    reasons = {x.layer: reason_text(x) for x in report.plan.layers}
    assert (reasons[Q], reasons[DOWN]) == ("", "no Hessian: searched without --gptq")
    assert requant.verify(source, tmp_path / "out", statistics=stats).ok
    other = tmp_path / "other.safetensors"
    data = bytearray(stats.read_bytes())
    data[-4:] = np.float32(4.0).tobytes()
    other.write_bytes(data)
    (plan, *_) = requant.verify(source, tmp_path / "out", statistics=other).problems
    assert f"{other} is probably another file than the recorded s.safetensors" in str(plan)


def test_the_outputs_of_a_layer_are_nearer(source: Path, stats: Path, tmp_path: Path) -> None:
    """By the Hessian's own measure, and against the weighted search."""
    requant.convert(source, tmp_path / "out", statistics=stats, **OPTIONS)
    requant.convert(source, tmp_path / "searched", statistics=stats, **OPTIONS | {"gptq": False})
    w, errors = read_folder(source)[f"{Q}.weight"].astype(np.float64), []
    for name in ("out", "searched"):
        requant.convert(
            tmp_path / name, tmp_path / f"{name}-d", dequantize=True, dtype="float32", layout="keep"
        )
        d = read_folder(tmp_path / f"{name}-d")[f"{Q}.weight"] - w
        errors.append(np.einsum("ri,ij,rj", d, HESSIANS[Q].astype(np.float64), d))
    assert errors[0] < 0.9 * errors[1]


def test_what_cannot_be_is_reported(source: Path, stats: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="requant calibrate MODEL --hessian"):
        requant.convert(source, out, bits=4, gptq=True)
    with pytest.raises(UsageError, match="leave --mode mxfp4 out"):
        requant.convert(source, out, mode="mxfp4", gptq=True, statistics=stats)
    with pytest.raises(UsageError, match="--dequantize or --gptq"):
        requant.convert(source, out, dequantize=True, gptq=True, statistics=stats)
    none = tmp_path / "none.safetensors"
    write_statistics(none, {Q: LayerStatistics(np.ones(64, np.float32), np.ones(1))})
    with pytest.raises(CheckpointError, match="holds no Hessians"):
        requant.convert(source, out, statistics=none, **OPTIONS)
    bad = tmp_path / "bad.safetensors"
    broken = np.full((64, 64), np.nan, np.float32)
    layers = {Q: LayerStatistics(np.ones(64, np.float32), np.ones(1))}
    write_statistics(bad, layers, {Q: lambda expert: broken})
    with pytest.raises(RequantError, match="hessian must be finite") as caught:
        requant.convert(source, out, statistics=bad, only=["q_proj"], **OPTIONS)
    assert Q in str(caught.value)
    assert not out.exists()


def test_memory_of_the_factorisation_is_in_the_plan(source: Path, stats: Path) -> None:
    from requant.execution.resources import plan_resources

    peaks = [
        plan_resources(requant.plan(source, statistics=stats, **OPTIONS | {"gptq": requested}), 2)
        for requested in (True, False)
    ]
    assert peaks[0].peak_bytes - peaks[1].peak_bytes >= 96 * 96 * 36


@pytest.mark.parametrize("chunks", [1, 3, 7, 11])
def test_a_stopped_run_resumes_within_a_layer(
    chunks: int, source: Path, stats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer is one worker's, but what it has written of it is not written again."""
    small = {"chunk_bytes": 3000, "statistics": stats, **OPTIONS}
    requant.convert(source, tmp_path / "whole", statistics=stats, **OPTIONS)
    with monkeypatch.context() as patch:
        stop_after(patch, chunks)
        with pytest.raises(Stop):
            requant.convert(source, tmp_path / "out", threads=1, **small)
    _, done = read_journal(staging_dir(tmp_path / "out") / "journal")
    assert sum(map(done.done_rows, done.rows)) > 0
    requant.convert(source, tmp_path / "out", threads=3, **small)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
