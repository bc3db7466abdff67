"""--budget in the pipeline: within the size, the same again, and what is wrong said beforehand."""

import json
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import requant
from requant.bit_allocation.choose import sensitivity
from requant.bit_allocation.measurements import measurements_path
from requant.errors import CheckpointError, UsageError
from requant.quantization.size_budget import parse_budget
from tests.support.checkpoints import model, write_checkpoint
from tests.support.plan_texts import note_texts

KEEP: dict[str, Any] = {"layout": "keep"}


def write(folder: Path, tensors: dict[str, np.ndarray], config: dict[str, Any]) -> Path:
    arrays = {name: array.astype(ml_dtypes.bfloat16) for name, array in tensors.items()}
    return write_checkpoint(folder, arrays, config, metadata={"format": "mlx"})


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Three blocks, experts under their own names, a head that is the embedding."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(0, 0.02, shape).astype(ml_dtypes.bfloat16)

    tensors = {"model.embed_tokens.weight": normal(96, 256)}
    for n in range(3):
        block = f"model.layers.{n}"
        tensors[f"{block}.self_attn.v_proj.weight"] = normal(64, 256)
        tensors[f"{block}.mlp.gate.weight"] = normal(4, 256)
        for expert in range(4):
            tensors[f"{block}.mlp.experts.{expert}.up_proj.weight"] = normal(32, 256)
        tensors[f"{block}.norm.weight"] = np.ones(256, ml_dtypes.bfloat16)
    return write(tmp_path / "source", tensors, {"tie_word_embeddings": True})


def targets(plan: requant.Plan) -> dict[str, str]:
    return {x.layer: x.target for x in plan.layers if x.treatment != "dense"}


def weights_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


# -- the size ------------------------------------------------------------------------------
@pytest.mark.parametrize("budget", [3.2, 4, "4.75", "6.5", "66KB", "80kb"])
def test_the_output_is_within_the_budget_and_near_it(source: Path, budget: Any) -> None:
    plan = requant.plan(source, budget=budget, **KEEP)
    limit = parse_budget(budget).limit(plan.parameters)
    assert 0.93 * limit < plan.bytes_out <= limit
    assert plan.bits_per_weight <= 8 * limit / plan.parameters
    assert any("Chosen within" in note for note in note_texts(plan.notes))


def test_a_budget_above_every_candidate_gives_the_least_error(source: Path) -> None:
    assert set(targets(requant.plan(source, budget=16, **KEEP)).values()) == {"affine 8-bit g32"}


def test_impossible_budgets_say_what_is_possible(source: Path) -> None:
    for budget, hint in (("1.5", r"--budget (\d\.\d+)"), ("10KB", r"--budget (\d+B)")):
        with pytest.raises(UsageError, match="least possible") as caught:
            requant.plan(source, budget=budget, **KEEP)
        found = re.search(rf"{hint}$", str(caught.value))
        assert found
        assert requant.plan(source, budget=found[1], **KEEP).bits_per_weight < 3


@pytest.mark.parametrize("text", ["", "0", "-4", "4 apples", "1e3", "nan", "12000000000", True])
def test_what_is_not_a_budget(source: Path, text: Any) -> None:
    with pytest.raises(UsageError, match=r"12GB"):
        requant.plan(source, budget=text, **KEEP)


@pytest.mark.parametrize(
    "other", [{"bits": 4}, {"mode": "mxfp4"}, {"recipe": "mixed_3_4"}], ids=str
)
def test_nothing_else_chooses_bits(source: Path, other: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="leave --"):
        requant.plan(source, budget=4, **other)


# -- who decides ---------------------------------------------------------------------------
def test_overrides_win_and_take_their_share(source: Path) -> None:
    overrides = [r"0\.self_attn=8:32", r"1\.self_attn=skip"]
    plan = requant.plan(source, budget=4.6, overrides=overrides, **KEEP)
    found = targets(plan)
    assert found["model.layers.0.self_attn.v_proj"] == "affine 8-bit g32"
    assert "model.layers.1.self_attn.v_proj" not in found
    assert plan.bits_per_weight <= 4.6


def test_group_size_holds_for_all(source: Path) -> None:
    found = targets(requant.plan(source, budget=4, group_size=64, **KEEP))
    assert {text.rsplit(" ", 1)[1] for text in found.values()} == {"g64"}


def test_what_must_agree_agrees(source: Path) -> None:
    found = targets(requant.plan(source, budget=3.9, **KEEP))
    for n in range(3):
        experts = {found[f"model.layers.{n}.mlp.experts.{e}.up_proj"] for e in range(4)}
        assert len(experts) == 1


def test_more_bits_go_where_errors_cost_more(source: Path) -> None:
    def bits(layer: str) -> int:
        return int(found[layer].split(" ")[1].split("-")[0])

    found = targets(requant.plan(source, budget=4, group_size=64, **KEEP))
    assert sensitivity("model.layers.0.self_attn.v_proj", (0, 3)) == 18.0
    assert bits("model.layers.0.self_attn.v_proj") > bits("model.layers.2.mlp.experts.0.up_proj")


# -- the same again ------------------------------------------------------------------------
def test_a_saved_recipe_gives_the_same_bytes(source: Path, tmp_path: Path) -> None:
    options = {"overrides": [r"2\.self_attn=6:32"], "search": "fast"} | KEEP
    file = tmp_path / "mine.toml"
    plan = requant.plan(source, budget=4.25, save_recipe=file, **options)
    options.pop("overrides")
    again = requant.plan(source, recipe=file, **options)
    assert again.hash == plan.hash
    file.write_text(file.read_text().replace('spec = "6:32"', 'spec = "5:32"'))
    edited = requant.plan(source, recipe=file, **options)
    assert targets(edited)["model.layers.2.self_attn.v_proj"] == "affine 5-bit g32"


def test_only_and_a_saved_recipe(source: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    plan = requant.plan(source, budget=10, only=["experts"], save_recipe=file, **KEEP)
    again = requant.plan(source, recipe=file, **KEEP)
    assert targets(again) == targets(plan)
    assert all("experts" in layer for layer in targets(plan))


def test_verify_repeats_it_without_measuring(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requant.convert(source, tmp_path / "out", budget=4, **KEEP)
    assert not measurements_path(tmp_path / "out").exists()
    monkeypatch.setattr("requant.bit_allocation.measure.run_plan", None)
    assert requant.verify(source, tmp_path / "out").problems == ()
    assert "--budget 4" in str(requant.read_figures(tmp_path / "out").command(str(source)))


@pytest.mark.slow
def test_threads_and_chunks_change_nothing(source: Path, tmp_path: Path) -> None:
    written = []
    for number, options in enumerate(({}, {"threads": 1, "chunk_bytes": 4000}, {"threads": 5})):
        requant.convert(source, tmp_path / str(number), budget=4, **KEEP, **options)
        written.append(weights_of(tmp_path / str(number)))
    assert written[0] == written[1] == written[2]


def test_a_stopped_run_resumes_without_measuring(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr("requant.execution.runner.run_plan", None)  # stops after the measuring
        with pytest.raises(TypeError):
            requant.convert(source, output, budget=4, **KEEP)
    assert measurements_path(output).exists()
    monkeypatch.setattr("requant.bit_allocation.measure.run_plan", None)
    requant.convert(source, output, budget=4, **KEEP)
    requant.convert(source, tmp_path / "other", recipe=_recipe_of(output, tmp_path), **KEEP)
    assert weights_of(output) == weights_of(tmp_path / "other")


def _recipe_of(output: Path, tmp_path: Path) -> Path:
    from requant.quantization.recipe_files import recipe_from_dict, to_toml

    record = json.loads((output / "requant.json").read_text())
    reported = record["options"]["recipe"]
    file = tmp_path / "again.toml"
    file.write_text(to_toml(recipe_from_dict(reported | {"default": None})))
    return file


@pytest.mark.slow
def test_what_was_measured_of_another_source_is_not_believed(source: Path, tmp_path: Path) -> None:
    expected = requant.plan(source, budget=4, **KEEP)
    for text in ("", "{}", '{"key": 1}', "[1]", "\0"):
        measurements_path(tmp_path / "out").write_text(text)
        report = requant.convert(source, tmp_path / "out", budget=4, force=True, **KEEP)
        assert report.plan.hash == expected.hash


# -- sources -------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("layout", ["keep", "mlx-lm"])
@pytest.mark.parametrize("name", ["micro-llama", "micro-moe"])
def test_models_under_both_layouts(name: str, layout: str, tmp_path: Path) -> None:
    pytest.importorskip("mlx_lm")
    report = requant.convert(model(name), tmp_path / "out", budget=4, layout=layout)
    assert 3.9 < report.bits_per_weight <= 4
    assert requant.verify(model(name), tmp_path / "out").ok


def test_a_quantized_source_keeps_codes_where_they_fit(source: Path, tmp_path: Path) -> None:
    requant.convert(source, tmp_path / "four", bits=4, **KEEP)
    whole = requant.plan(tmp_path / "four", budget=6, **KEEP)
    assert {x.treatment for x in whole.layers if x.target != "BF16"} == {"kept"}
    report = requant.convert(tmp_path / "four", tmp_path / "less", budget=3.8, **KEEP)
    assert report.bits_per_weight <= 3.8
    assert {"kept", "requantized"} <= {x.treatment for x in report.plan.layers}
    assert requant.verify(tmp_path / "four", tmp_path / "less").ok


def test_values_that_are_not_numbers_are_rejected_or_left(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    tensors = {f"model.{x}.weight": rng.normal(0, 0.02, (64, 128)) for x in "abc"}
    tensors["model.b.weight"][3, 5] = np.nan
    source = write(tmp_path / "source", tensors, {})
    with pytest.raises(CheckpointError, match=r"model\.b\.weight: 1 value is NaN.*row 3"):
        requant.convert(source, tmp_path / "out", budget=9, **KEEP)
    report = requant.convert(source, tmp_path / "out", budget=9, allow_nonfinite=True, **KEEP)
    assert report.bits_per_weight <= 9
    assert requant.verify(source, tmp_path / "out").ok


# -- rejections before anything is measured -----------------------------------------------------
def test_rejections_come_before_the_measuring(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("requant.bit_allocation.measure.run_plan", None)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    (tmp_path / "old.toml").touch()
    with pytest.raises(requant.OutputError):
        requant.convert(source, tmp_path / "out", budget=4)
    with pytest.raises(UsageError, match="consume-source"):
        requant.convert(source, tmp_path / "new", budget=4, consume_source=True, yes=True)
    with pytest.raises(UsageError, match="there already"):
        requant.plan(source, budget=4, save_recipe=tmp_path / "old.toml")
    with pytest.raises(UsageError, match=r"\.toml"):
        requant.plan(source, budget=4, save_recipe=tmp_path / "new")
    with pytest.raises(UsageError, match="add --budget"):
        requant.plan(source, bits=4, save_recipe=tmp_path / "new.toml")
    with pytest.raises(UsageError, match="matches no layer"):
        requant.plan(source, budget=4, overrides=["nothing=8"])
