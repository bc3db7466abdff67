"""Recipes in the pipeline: mlx-lm's own bit for bit, ours layer by layer."""

import json
import re
from pathlib import Path

import mlx.core as mx
import pytest

from requant.api.convert import convert, plan
from requant.errors import UsageError
from requant.libraries import LIBRARIES, MLX_LM, Request
from requant.quantization.config import Quantization
from requant.quantization.recipe_files import load_recipe
from tests.support.checkpoints import model
from tests.support.families import small_config
from tests.support.library_models import write_model
from tests.support.mlx_lm_conversion import class_checkpoint
from tests.support.mlx_reference import as_bytes, assert_same_output, by_mlx_lm
from tests.support.number_formats import bf16
from tests.support.plan_texts import note_texts, reason_text

pytestmark = pytest.mark.sweep(1)

AFFINE = Quantization.affine(64, 4)


def targets(made) -> dict[str, str]:
    return {x.layer: x.target for x in made.layers if x.treatment != "dense"}


@pytest.mark.parametrize("group_size", [64, 32])
@pytest.mark.parametrize("recipe", sorted(MLX_LM.recipes))
@pytest.mark.parametrize("name", ["micro-llama", "micro-moe", "qwen3-16m"])
def test_mixed_recipes_are_mlx_lm_s(name: str, recipe: str, group_size: int, tmp_path: Path):
    expected = by_mlx_lm(
        model(name),
        tmp_path / "theirs",
        quantize=True,
        quant_predicate=recipe,
        q_group_size=group_size,
    )
    convert(model(name), tmp_path / "ours", recipe=recipe, group_size=group_size)
    assert_same_output(tmp_path / "ours", tmp_path / "theirs", expected)


@pytest.mark.slow
def test_recipes_of_mlx_vlm(tmp_path: Path) -> None:
    """Tensors and config as ``mlx_vlm.convert --quant-predicate`` writes them."""
    weights = write_model("mlx-vlm", tmp_path / "source")
    assert weights
    for recipe in sorted(LIBRARIES["mlx-vlm"].recipes):
        request = Request(AFFINE, recipe)
        theirs, ours = tmp_path / f"theirs-{recipe}", tmp_path / f"ours-{recipe}"
        LIBRARIES["mlx-vlm"].convert(tmp_path / "source", theirs, request)
        convert(tmp_path / "source", ours, recipe=recipe)
        config = json.loads((theirs / "config.json").read_text())
        assert json.loads((ours / "config.json").read_text()) == config
        expected = mx.load(str(theirs / "model.safetensors"))
        made = mx.load(str(ours / "model.safetensors"))
        assert made.keys() == expected.keys()
        assert all(as_bytes(made[name]) == as_bytes(x) for name, x in expected.items())


def test_a_recipe_of_another_library_goes_by_names() -> None:
    made = plan(model("micro-llama"), recipe="mixed_3_5", layout="mlx-lm")
    assert set(targets(made).values()) == {"affine 3-bit g64", "affine 5-bit g64"}


@pytest.mark.parametrize("recipe", sorted(MLX_LM.recipes))
@pytest.mark.parametrize("name", ["micro-llama", "micro-moe", "qwen3-16m"])
def test_by_names_alone_the_choice_is_the_same(name: str, recipe: str) -> None:
    """With the names kept, the same layers get the same bits (a router stays dense there)."""
    laid_out = targets(plan(model(name), recipe=recipe, layout="mlx-lm"))
    kept = targets(plan(model(name), recipe=recipe, layout="keep"))
    stacked = {re.sub(r"\.experts\.\d+\.", ".switch_mlp.", path): x for path, x in kept.items()}
    assert stacked == {p: x for p, x in laid_out.items() if not p.endswith("mlp.gate")}
    by_name = load_recipe(recipe).choose(list(laid_out), None)
    assert {p: f"affine {x.spec.bits}-bit g64" for p, x in by_name.items()} == laid_out


def test_a_folder_of_mlx_lm_s_mixed_recipe_is_read(tmp_path: Path) -> None:
    """Without a group size mlx-lm writes ``"group_size": null`` for every layer."""
    by_mlx_lm(model("micro-llama"), tmp_path / "theirs", quantize=True, quant_predicate="mixed_3_6")
    block = json.loads((tmp_path / "theirs" / "config.json").read_text())["quantization"]
    assert block["model.embed_tokens"]["group_size"] is None
    made = plan(tmp_path / "theirs")
    assert targets(made) == targets(plan(model("micro-llama"), recipe="mixed_3_6"))
    assert {x.treatment for x in made.layers} == {"kept", "dense"}


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(
        """
        [default]
        bits = 3
        [[rules]]
        role = "down_proj"
        first = 1
        spec = 6
        [[rules]]
        role = "router"
        spec = "8:32"
        [[rules]]
        role = "embedding"
        spec = "skip"
        [[rules]]
        match = "v_proj"
        spec = "mxfp4"
        """
    )
    return path


@pytest.mark.parametrize("layout", ["mlx-lm", "keep"])
def test_a_builtin_recipe(mine: Path, layout: str, tmp_path: Path) -> None:
    import mlx_lm

    made = plan(model("micro-moe"), recipe=mine, layout=layout)
    found = targets(made)
    expert = "switch_mlp" if layout == "mlx-lm" else "experts.3"
    assert found[f"model.layers.0.mlp.{expert}.down_proj"] == "affine 6-bit g64"
    assert found[f"model.layers.1.mlp.{expert}.down_proj"] == "affine 3-bit g64"
    assert found["model.layers.1.mlp.gate"] == "affine 8-bit g32"  # a role names it
    assert found["model.layers.1.self_attn.v_proj"] == "mxfp4 4-bit g32"
    assert "model.embed_tokens" not in found
    assert made.config["quantization"]["model.embed_tokens"] is False
    assert made.config["quantization"]["bits"] == 3
    assert note_texts(made.notes) == () or layout == "keep"
    if layout == "mlx-lm":
        convert(model("micro-moe"), tmp_path / "out", recipe=mine, layout=layout)
        loaded, tokenizer = mlx_lm.load(str(tmp_path / "out"))
        assert mlx_lm.generate(loaded, tokenizer, prompt="The file", max_tokens=4)


@pytest.mark.parametrize("layout", ["mlx-lm", "keep"])
def test_overrides_and_only_win(mine: Path, layout: str) -> None:
    made = plan(
        model("micro-moe"),
        recipe=mine,
        bits=5,
        overrides=["v_proj=8", "embed=4"],
        only=["self_attn", "embed"],
        layout=layout,
    )
    found = targets(made)
    assert found.pop("model.embed_tokens") == "affine 4-bit g64"
    assert all("self_attn" in path for path in found)
    assert found["model.layers.0.self_attn.v_proj"] == "affine 8-bit g64"
    assert found["model.layers.0.self_attn.q_proj"] == "affine 5-bit g64"


def test_rules_that_fit_no_layer_are_noted_for_own_files_only(mine: Path) -> None:
    mine.write_text("[default]\n[[rules]]\nmatch = 'v_porj'\nspec = 8\n")
    (note,) = note_texts(plan(model("micro-llama"), recipe=mine).notes)
    assert note.endswith("match 'v_porj' fits no layer.")
    assert note_texts(plan(model("micro-llama"), recipe="experts-3").notes) == ()


def test_a_group_that_does_not_fit_is_not_an_error(mine: Path, tmp_path: Path) -> None:
    """mlx-lm's own target stays; with the names kept the next smaller group is taken."""
    class_checkpoint(tmp_path / "m", small_config("qwen2") | {"intermediate_size": 192})
    mine.write_text('[default]\n[[rules]]\nrole = "down_proj"\nspec = "8:128"\n')
    path = "model.layers.0.mlp.down_proj"
    for layout, target in (("mlx-lm", "affine 4-bit g64"), ("keep", "affine 8-bit g64")):
        made = plan(tmp_path / "m", recipe=mine, layout=layout)
        (layer,) = [x for x in made.layers if x.layer == path]
        assert layer.target == target
        assert reason_text(layer).startswith("last axis 192 ")


def test_on_a_quantized_source(mine: Path, tmp_path: Path) -> None:
    """Without a default, layers that no rule names keep their codes."""
    convert(model("micro-llama"), tmp_path / "first", bits=8)
    mine.write_text('[[rules]]\nrole = "down_proj"\nspec = 4\n')
    layers = plan(tmp_path / "first", recipe=mine).layers
    assert {x.treatment for x in layers if "down_proj" in x.layer} == {"requantized"}
    assert {x.treatment for x in layers if "up_proj" in x.layer} == {"kept"}
    assert {x.treatment for x in plan(tmp_path / "first", recipe="mixed_3_4").layers} == {
        "requantized",
        "dense",
    }


@pytest.mark.parametrize("layout", ["auto", "keep"])
def test_a_mixed_recipe_without_down_proj(checkpoint, layout: str) -> None:
    source = checkpoint({"a.weight": bf16(64, 64)})
    with pytest.raises(UsageError, match="down_proj"):
        plan(source, recipe="mixed_3_6", layout=layout)
