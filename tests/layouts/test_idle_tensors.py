"""Biases of zeros and layers past the last one do not throw a model out of mlx-lm's layout."""

import json
from pathlib import Path

import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_model

import requant
from tests.support.families import small_config
from tests.support.mlx_lm_conversion import class_checkpoint
from tests.support.mlx_reference import load, same
from tests.support.plan_texts import note_texts


def with_more(folder: Path, more: dict[str, mx.array]) -> Path:
    """A class checkpoint of llama with further tensors."""
    class_checkpoint(folder, small_config("llama") | {"tie_word_embeddings": False})
    file = folder / "model.safetensors"
    weights = mx.load(str(file))
    mx.eval(weights)
    mx.save_safetensors(str(file), weights | more, {"format": "pt"})
    return folder


def zero_biases(folder: Path) -> dict[str, mx.array]:
    plain = with_more(folder, {})
    weights = mx.load(str(plain / "model.safetensors"))
    return {
        f"{name.removesuffix('.weight')}.bias": mx.zeros(x.shape[0], mx.float16)
        for name, x in weights.items()
        if name.endswith("_proj.weight")
    }


def next_token_layer(name: str) -> dict[str, mx.array]:
    values = np.random.default_rng(0).standard_normal((64, 128)).astype(ml_dtypes.bfloat16)
    array = mx.array(values.view(np.uint16)).view(mx.bfloat16)
    return {f"{name}.eh_proj.weight": array, f"{name}.enorm.weight": array[0]}


@pytest.mark.parametrize("kind", ["zero biases", "model.layers.2", "model.mtp.0", "both"])
def test_the_rest_takes_the_layout(kind: str, tmp_path: Path) -> None:
    more = zero_biases(tmp_path / "plain") if kind in ("zero biases", "both") else {}
    if kind != "zero biases":
        with_more(tmp_path / "plain", {}) if not more else None
        more |= next_token_layer("model.layers.2" if kind == "both" else kind)
    report = requant.convert(with_more(tmp_path / "source", more), tmp_path / "out", bits=4)
    assert report.plan.layout == "mlx-lm"
    requant.convert(tmp_path / "plain", tmp_path / "expected", bits=4)
    made, expected = load(tmp_path / "out"), load(tmp_path / "expected")
    assert made.keys() == expected.keys()
    assert all(same(made[name], array) for name, array in expected.items())
    load_model(tmp_path / "out")
    assert {name for name, _ in report.plan.dropped} == more.keys()
    left_out = [note for note in note_texts(report.plan.notes) if note.startswith("Left out: ")]
    assert len(left_out) == (2 if kind == "both" else 1)
    assert all(any(name in note for name in more) for note in left_out)


def test_a_bias_with_a_value_is_never_left_out(tmp_path: Path) -> None:
    more = zero_biases(tmp_path / "plain")
    name = "model.layers.0.mlp.up_proj.bias"
    more[name] = mx.ones(more[name].shape, mx.float16)
    source = with_more(tmp_path / "source", more)
    with pytest.raises(requant.CheckpointError, match="no place for"):
        requant.plan(source, bits=4, layout="mlx-lm")
    plan = requant.plan(source, bits=4)
    assert plan.layout == "keep" and name in plan.index()["weight_map"]


def test_keep_leaves_nothing_out(tmp_path: Path) -> None:
    more = zero_biases(tmp_path / "plain")
    source = with_more(tmp_path / "source", more)
    for options in ({"layout": "keep"}, {"keep_extra": True}):
        assert more.keys() <= requant.plan(source, bits=4, **options).index()["weight_map"].keys()


def test_a_model_with_biases_keeps_those_that_are_zero(tmp_path: Path) -> None:
    class_checkpoint(tmp_path / "source", small_config("qwen2"))
    file = tmp_path / "source" / "model.safetensors"
    weights = mx.load(str(file))
    mx.eval(weights)
    biases = {n: mx.zeros(x.shape, x.dtype) for n, x in weights.items() if n.endswith(".bias")}
    assert biases
    mx.save_safetensors(str(file), weights | biases, {"format": "pt"})
    plan = requant.plan(tmp_path / "source", bits=4)
    assert plan.layout == "mlx-lm" and plan.dropped == ()
    assert biases.keys() <= plan.index()["weight_map"].keys()
    assert json.loads((tmp_path / "source" / "config.json").read_text())["model_type"] == "qwen2"
