"""--budget in the pipeline: within the size, the same again, and what is wrong said beforehand."""

import json
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import requant
from requant.bit_allocation.choose import _recipe, cost, sensitivities
from requant.bit_allocation.measurements import Candidate, Measured, measurements_path
from requant.errors import CheckpointError, UsageError
from requant.quantization.config import Quantization
from requant.quantization.options import ConvertOptions
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


def bits_of(plan: requant.Plan) -> dict[str, int]:
    return {x: int(text.split(" ")[1].split("-")[0]) for x, text in targets(plan).items()}


@pytest.mark.parametrize("order", [1, -1])
def test_protected_layers_have_at_least_their_bits(source: Path, order: int) -> None:
    protect = ["up_proj=5", ("1.*up_proj", 6)][::order]
    plan = requant.plan(source, budget=4.8, protect=protect, **KEEP)
    assert plan.bits_per_weight <= 4.8
    for layer, bits in bits_of(plan).items():
        if "up_proj" in layer:
            assert bits >= (6 if ".layers.1." in layer else 5), layer
    assert min(bits_of(requant.plan(source, budget=4.8, **KEEP)).values()) < 5


def test_one_protected_expert_protects_its_stack(source: Path) -> None:
    plan = requant.plan(source, budget=4, protect=[r"1\.mlp\.experts\.2=6"], **KEEP)
    found = {x: bits for x, bits in bits_of(plan).items() if "layers.1.mlp.experts" in x}
    assert len(found) == 4 and min(found.values()) >= 6


def test_overrides_win_over_protection(source: Path) -> None:
    options: dict[str, Any] = {"protect": ["up_proj=4"], "overrides": [r"0\.mlp\.experts=3:64"]}
    found = bits_of(requant.plan(source, budget=4.5, **options, **KEEP))
    assert all(x >= 4 for layer, x in found.items() if re.search(r"[12]\.mlp\.experts", layer))
    assert found["model.layers.0.mlp.experts.1.up_proj"] == 3


def test_a_protection_that_does_not_fit(source: Path) -> None:
    with pytest.raises(UsageError, match="--protect may hold some layers larger") as caught:
        requant.plan(source, budget=4, protect=[".=8"], **KEEP)
    found = re.search(r"--budget (\d\.\d+)$", str(caught.value))
    assert found
    requant.plan(source, budget=found[1], protect=[".=8"], **KEEP)


@pytest.mark.parametrize(
    ("protect", "message"),
    [
        ("up_proj", "is not REGEX=BITS"),
        ("=4", "is not REGEX=BITS"),
        ("up_proj=1", "from 2 to 8, as in 'up_proj=6'"),
        ("up_proj=9", "from 2 to 8"),
        ("up_proj=4:64", "from 2 to 8"),
        ("(=4", "--protect '\\('"),
        ("upproj=4", "--protect 'upproj': matches no layer; close matches: .*up_proj"),
    ],
)
def test_what_is_not_a_protection(source: Path, protect: str, message: str) -> None:
    with pytest.raises((UsageError, CheckpointError), match=message):
        requant.plan(source, budget=4, protect=[protect], **KEEP)


@pytest.mark.parametrize(("budget", "floor"), [(3.2, 2), (3.25, 2), (4.26, 3), (5.5, 4), (6.8, 5)])
def test_no_layer_is_more_than_a_bit_below_what_all_could_have(budget: float, floor: int) -> None:
    def candidates(energy: float) -> tuple[Candidate, ...]:
        found = [(bits, size) for bits in (2, 3, 4, 5, 6, 8) for size in (64, 128)]
        return tuple(
            Candidate(f"{bits}:{size}", 500 * bits + 16000 // size, 4.0**-bits, energy)
            for bits, size in found
        )

    # Errors of b cost next to nothing: what it does not take is of use to a.
    layers = {"a": candidates(10.0), "b": candidates(1e9)}
    measured = Measured(8000, 0, {}, layers, (("a",), ("b",)))
    options = ConvertOptions(budget=str(budget))
    recipe = _recipe(measured, parse_budget(budget), options, Quantization.affine(64, 4))
    bits = {layer: int(rule.spec.split(":")[0]) for rule in recipe.rules for layer in rule.layers}
    assert bits["b"] == floor
    assert bits["a"] > floor


def test_the_cost_is_a_relative_error() -> None:
    assert cost(Candidate("4:64", 1, 0.5, 10.0), 3.0) == pytest.approx(0.15)
    assert cost(Candidate("4:64", 1, 0.0, 0.0), 3.0) == 0  # codes that stay


def test_what_a_relative_error_counts() -> None:
    """By kind; ends of the model in every block, experts of a layer as one layer together."""
    groups = [["model.embed_tokens"], ["model.norm_out"]]
    groups += [[f"model.layers.{n}.self_attn.v_proj"] for n in range(4)]
    groups += [[f"model.layers.{n}.mlp.experts.{e}.up_proj" for e in range(8)] for n in range(4)]
    found = sensitivities(groups)
    assert found["model.layers.2.self_attn.v_proj"] == pytest.approx(0.86)
    assert found["model.layers.0.self_attn.v_proj"] == pytest.approx(0.86 * 1.75)
    assert found["model.layers.2.mlp.experts.5.up_proj"] == pytest.approx(0.86 / 8)
    assert found["model.embed_tokens"] == pytest.approx(4 * 1.6)
    assert found["model.norm_out"] == 1.0
    apart = sensitivities([*groups, ["lm_head"]])
    assert apart["model.embed_tokens"] == pytest.approx(4 * 0.9)
    assert apart["lm_head"] == pytest.approx(4 * 0.7)


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

    found = targets(requant.plan(source, budget=4.3, group_size=64, **KEEP))
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
    whole = requant.plan(tmp_path / "four", budget=6, protect=["up_proj=6"], **KEEP)
    assert {x.treatment for x in whole.layers if x.target != "BF16"} == {"kept"}
    report = requant.convert(tmp_path / "four", tmp_path / "less", budget=4.2, **KEEP)
    assert report.bits_per_weight <= 4.2
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
