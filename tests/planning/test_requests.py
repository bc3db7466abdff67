"""A request that no layer fulfils is an error: never 16 bits a weight and exit 0."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import requant
from requant.errors import UsageError
from tests.support.number_formats import bf16
from tests.support.plan_texts import note_texts

Build = Callable[..., Path]
NARROW = {"a.weight": bf16(64, 48), "b.weight": bf16(64, 40), "norm.weight": bf16(48)}
WIDE = {"up.weight": bf16(64, 128), "router.weight": bf16(8, 128), "norm.weight": bf16(128)}


@pytest.mark.parametrize(
    ("tensors", "options", "words"),
    [
        (NARROW, {"bits": 4}, "a: last axis 48 is not a multiple of group 64"),
        (NARROW, {"mode": "mxfp4"}, "a: last axis 48 is not a multiple of group 32"),
        ({"a.weight": bf16(64, 40)}, {"mode": "nvfp4"}, "last axis 40"),
        (WIDE, {"bits": 4, "only": ["norm"]}, "norm: a vector"),
        (WIDE, {"only": ["norm"]}, "--only 'norm'"),
        (WIDE, {"bits": 4, "overrides": ["up=skip"]}, "up: skipped by an override"),
        ({"conv.weight": bf16(8, 4, 8, 64)}, {"bits": 4}, "conv: convolution"),
        ({"a": bf16(64, 64)}, {"bits": 4}, "there is no tensor named .weight"),
        ({"a.weight": np.zeros((64, 64))}, {"bits": 4}, "F64 cannot be quantized"),
    ],
    ids=str,
)
def test_nothing_in_a_dense_source(
    tensors: Mapping[str, np.ndarray],
    options: Mapping[str, Any],
    words: str,
    checkpoint: Build,
    tmp_path: Path,
) -> None:
    source = checkpoint(tensors)
    with pytest.raises(UsageError) as raised:
        requant.convert(source, tmp_path / "out", layout="keep", **options)
    assert words in str(raised.value)
    assert "no layer takes this" in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_a_recipe_that_skips_everything(checkpoint: Build, tmp_path: Path) -> None:
    recipe = tmp_path / "none.toml"
    recipe.write_text('[[rules]]\nmatch = "."\nspec = "skip"\n')
    with pytest.raises(UsageError, match="skipped by the recipe"):
        requant.plan(checkpoint(WIDE), recipe=recipe, layout="keep")


def test_a_budget_that_no_layer_can_meet(checkpoint: Build) -> None:
    with pytest.raises(UsageError):
        requant.plan(checkpoint({"a.weight": bf16(64, 40)}), budget=4, layout="keep")


def test_a_budget_that_only_small_groups_meet(checkpoint: Build) -> None:
    """Its candidates may reach no layer; the choice among them does."""
    plan = requant.plan(checkpoint({"a.weight": bf16(64, 96)}), budget=5, layout="keep")
    assert {layer.target for layer in plan.layers} == {"affine 4-bit g32"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "nvfp4", "only": ["norm"]}, "norm: a vector"),
        ({"only": ["norm"]}, "--only 'norm'"),
    ],
    ids=str,
)
def test_nothing_in_a_quantized_source(
    options: Mapping[str, Any], words: str, checkpoint: Build, tmp_path: Path
) -> None:
    """Layers that keep their codes are not what was asked for."""
    source = tmp_path / "quantized"
    requant.convert(checkpoint(NARROW | {"up.weight": bf16(64, 128)}), source, bits=4)
    with pytest.raises(UsageError) as raised:
        requant.plan(source, layout="keep", **options)
    assert words in str(raised.value)


def test_codes_that_are_what_is_asked_for_stay(checkpoint: Build, tmp_path: Path) -> None:
    requant.convert(checkpoint({"up.weight": bf16(64, 96)}), tmp_path / "q", bits=4, group_size=32)
    plan = requant.plan(tmp_path / "q", mode="mxfp8", layout="keep")
    assert [layer.target for layer in plan.layers] == ["mxfp8 8-bit g32"]
    plan = requant.plan(tmp_path / "q", bits=4, group_size=32, layout="keep")
    assert [layer.treatment for layer in plan.layers] == ["kept"]  # what is asked for is there


def test_one_layer_is_enough(checkpoint: Build) -> None:
    plan = requant.plan(checkpoint(NARROW | {"up.weight": bf16(64, 128)}), bits=4, layout="keep")
    assert plan.quantization is not None
    plan = requant.plan(checkpoint(NARROW, name="b"), overrides=["a=nvfp4"], layout="keep")
    assert plan.quantization is not None


def test_without_a_request_a_note_says_that_nothing_is_quantized(checkpoint: Build) -> None:
    plan = requant.plan(checkpoint(NARROW), layout="keep")
    assert plan.quantization is None
    assert any(
        note.startswith("Nothing is quantized: a: last axis 48") for note in note_texts(plan.notes)
    )
    plan = requant.plan(checkpoint(NARROW, name="b"), layout="keep", dequantize=True)
    assert not any(note.startswith("Nothing") for note in note_texts(plan.notes))
