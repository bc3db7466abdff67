"""Codes that are kept and scales that round: the measured cost, and the dtype that is exact."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest

import requant
from requant.core.reasons import NoteCode
from requant.reports.record_summary import read_figures
from tests.support.gguf_files import write_gguf

LLAMA = Path(__file__).parents[2] / "examples" / "micro-llama"
UP = "model.layers.0.mlp.up_proj"


def weights() -> dict[str, mx.array]:
    loaded: Any = mx.load(str(LLAMA / "model.safetensors"))
    return dict(loaded)


@pytest.fixture(scope="module")
def q8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Q8_0: 32 codes with a float16 scale; vectors are F32."""
    path = tmp_path_factory.mktemp("q8") / "model.gguf"
    arrays = {name: np.array(x.astype(mx.float32)) for name, x in weights().items()}
    config = json.loads((LLAMA / "config.json").read_text())
    write_gguf(path, arrays, config, "Q8_0", tokenizer=LLAMA)
    return path


def decoded(folder: Path, layer: str) -> np.ndarray:
    """Values of an output's 8-bit layer in float64, from its tensors."""
    tensors: Any = mx.load(str(folder / "model.safetensors"))
    wide = [tensors[f"{layer}.{role}"].astype(mx.float32) for role in ("scales", "biases")]
    codes = np.array(tensors[f"{layer}.weight"]).view(np.uint8).astype(np.float64)
    scales, biases = (np.repeat(np.array(x, np.float64), 32, axis=1) for x in wide)
    found: np.ndarray = codes * scales + biases
    return found


@pytest.mark.parametrize("chunk_bytes", [None, 1])  # one chunk, and a row each
def test_the_error_of_rounded_scales(q8: Path, tmp_path: Path, chunk_bytes: int | None) -> None:
    """Of every 16th row, against a conversion that keeps them."""
    exact = requant.convert(q8, tmp_path / "exact", dtype="float16")
    assert exact.rounding == {}
    report = requant.convert(q8, tmp_path / "out", dtype="bfloat16", chunk_bytes=chunk_bytes)
    a, b = (decoded(tmp_path / name, UP)[::16] for name in ("exact", "out"))
    expected = np.sqrt(((b - a) ** 2).sum() / (a**2).sum())
    assert report.rounding[UP] == pytest.approx(expected, rel=1e-5)
    assert 1e-4 < expected < 2.0**-7
    assert report.errors == {}
    kept = {x.layer for x in report.plan.layers if x.treatment == "kept"}
    assert report.rounding.keys() == kept
    (layer,) = [x for x in report.to_dict()["layers"] if x["layer"] == UP]
    assert layer["rounding"] == report.rounding[UP]
    (summary,) = [x for x in read_figures(tmp_path / "out").layers if x.layer == UP]
    assert summary.bound.endswith(f"; measured {100 * expected:.3g} % (rms)")


def test_a_dtype_that_is_exact_is_named(q8: Path) -> None:
    def notes(**options: Any) -> list[str]:
        plan = requant.plan(q8, **options)
        return [x.text for x in plan.notes if x.code is NoteCode.EXACT_DTYPE]

    (note,) = notes(dtype="bfloat16")
    assert note.endswith("are rounded; --dtype float16 keeps them exactly.")
    assert notes(dtype="float16") == notes(dtype="float32") == []


def test_plain_values_that_do_not_change_are_exact(q8: Path) -> None:
    def norms(**options: Any) -> set[tuple[str, str]]:
        plan = requant.plan(q8, layout="keep", **options)
        return {(x.exactness, x.bound) for x in plan.layers if x.source == "F32"}

    assert norms(dtype="float32") == {("exact", "")}
    assert norms(dtype="float32", dequantize=True) == {("exact", "")}
    bound = "values rounded to bfloat16, relative error at most 0.0039"
    assert norms(dtype="bfloat16") == {("rounded", bound)}


@pytest.mark.parametrize("scales", ["bfloat16", "float16"])
def test_mlx_codes_are_decoded_in_float32(scales: str, tmp_path: Path) -> None:
    """Not rounded to the dtype of the scales; in that dtype they are mx.dequantize's."""
    requant.convert(LLAMA, tmp_path / "q", bits=8, group_size=32, dtype=scales, layout="keep")
    report = requant.convert(tmp_path / "q", tmp_path / "d", dequantize=True, dtype="float32")
    wide: Any = mx.load(str(tmp_path / "d" / "model.safetensors"))
    exact = decoded(tmp_path / "q", UP)
    assert np.array_equal(np.array(wide[f"{UP}.weight"]), exact.astype(np.float32))
    number = np.float16 if scales == "float16" else ml_dtypes.bfloat16
    assert not np.array_equal(exact.astype(number).astype(np.float32), exact.astype(np.float32))
    assert {x.exactness for x in report.plan.layers if x.treatment == "dequantized"} == {"rounded"}
    requant.convert(tmp_path / "q", tmp_path / "n", dequantize=True)
    tensors: Any = mx.load(str(tmp_path / "q" / "model.safetensors"))
    narrow: Any = mx.load(str(tmp_path / "n" / "model.safetensors"))
    parts = [tensors[f"{UP}.{role}"] for role in ("weight", "scales", "biases")]
    theirs = mx.dequantize(*parts, group_size=32, bits=8)
    assert bool(mx.array_equal(narrow[f"{UP}.weight"], theirs))
