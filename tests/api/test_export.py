"""``export``: MLX folders as compressed-tensors, and back to the same bits."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import requant
from requant.cli import run
from requant.execution.executor import Progress
from requant.reports.record_summary import read_figures
from tests.support.checkpoints import MICRO_LLAMA, tree, write_checkpoint
from tests.support.fixture_folders import fixture
from tests.support.mlx_folders import PROJ, affine, bf16, folder, same_bits
from tests.support.safetensors_files import read_folder

CT = "compressed-tensors"


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("max_memory", [None, 83_890_000])  # one chunk, and a few rows each
def test_round_trip(bits: int, max_memory: int | None, tmp_path: Path) -> None:
    """Codes, scales and biases come back bit for bit; ten outputs do not fill a word of zeros."""
    layers = {PROJ: affine(bits=bits), "model.layers.0.mlp.down_proj": affine(33, 3, bits, seed=1)}
    norm = {"model.norm.weight": bf16(np.ones(8))}
    source = folder(tmp_path / "mlx", layers, norm, block={"bits": bits})
    before = tree(source)
    report = requant.export(source, tmp_path / "ct", max_memory=max_memory, to=CT)
    assert tree(source) == before
    assert {x.exactness for x in report.plan.layers} == {"exact"}

    written = read_folder(tmp_path / "ct")
    assert same_bits(written[f"{PROJ}.weight_packed"].view(np.uint32), layers[PROJ]["weight"])
    assert same_bits(written[f"{PROJ}.weight_scale"], layers[PROJ]["scales"])
    assert written[f"{PROJ}.weight_shape"].tolist() == [10, 64]
    assert written[f"{PROJ}.weight_zero_point"].shape == (-(-10 * bits // 32), 2)

    requant.convert(tmp_path / "ct", tmp_path / "back", layout="keep")
    back = read_folder(tmp_path / "back")
    for name, expected in read_folder(source).items():
        if name.endswith("biases"):  # 0 may come back as -0
            expected, back[name] = expected + 0, back[name] + 0
        assert same_bits(back[name], expected), name
    assert requant.verify(source, tmp_path / "ct").problems == ()
    assert requant.verify(tmp_path / "ct").problems == ()


def test_config_of_mixed_widths(tmp_path: Path) -> None:
    """The most frequent scheme is that of the class, others name their layers."""
    up, down, gate = (f"model.layers.0.mlp.{x}_proj" for x in ("up", "down", "gate"))
    layers = {up: affine(), down: affine(bits=8), gate: affine()}
    dense = {"model.layers.0.self_attn.q_proj.weight": bf16(np.ones((8, 64)))}
    dense["model.layers.0.input_layernorm.weight"] = bf16(np.ones(8))
    block = {down: {"bits": 8, "group_size": 32}}
    source = folder(tmp_path / "mlx", layers, dense, block=block, tie_word_embeddings=True)
    requant.export(source, tmp_path / "ct", to=CT)
    config = json.loads((tmp_path / "ct" / "config.json").read_text())
    assert "quantization" not in config
    found = config["quantization_config"]
    groups = found["config_groups"]
    assert [group["targets"] for group in groups.values()] == [["Linear"], [down]]
    weights = [group["weights"] for group in groups.values()]
    assert [(x["num_bits"], x["group_size"], x["symmetric"]) for x in weights] == [
        (4, 32, False),
        (8, 32, False),
    ]
    assert found["ignore"] == ["model.layers.0.self_attn.q_proj", "lm_head"]
    back = requant.convert(tmp_path / "ct", tmp_path / "back", layout="keep")
    assert back.plan.quantization is not None
    assert back.plan.quantization.quantization_for(down).bits == 8  # type: ignore[union-attr]


def test_symmetric_layers_have_no_zero_points(tmp_path: Path) -> None:
    """One layer with other zeros gives all of its width zero points: they may run as one."""
    even = affine()
    even["biases"] = -8 * even["scales"]
    source = folder(tmp_path / "mlx", {PROJ: even}, {})
    requant.export(source, tmp_path / "even", to=CT)
    assert f"{PROJ}.weight_zero_point" not in read_folder(tmp_path / "even")
    requant.convert(tmp_path / "even", tmp_path / "back", layout="keep")
    for name, expected in read_folder(source).items():
        assert same_bits(read_folder(tmp_path / "back")[name], expected)
    mixed = folder(tmp_path / "mixed", {PROJ: even, "model.layers.0.mlp.gate_proj": affine()}, {})
    requant.export(mixed, tmp_path / "odd", to=CT)
    zeros = read_folder(tmp_path / "odd")[f"{PROJ}.weight_zero_point"].view(np.uint32)
    assert zeros.tolist() == [[0x88888888] * 2, [0x88] * 2]


ROLES = ("model.embed_tokens", "lm_head", "model.layers.0.mlp.gate")


def test_layers_that_readers_take_dense(tmp_path: Path) -> None:
    layers = {PROJ: affine(), **{name: affine(seed=7) for name in ROLES}}
    source = folder(tmp_path / "mlx", layers, {})
    report = requant.export(source, tmp_path / "ct", to=CT)
    codes = {x.layer: x.reason_code for x in report.plan.layers}
    assert codes == {PROJ: None, **dict.fromkeys(ROLES, "dense_for_readers")}
    requant.convert(source, tmp_path / "dense", dequantize=True, layout="keep")
    dense, written = read_folder(tmp_path / "dense"), read_folder(tmp_path / "ct")
    for name in ROLES:
        assert same_bits(written[f"{name}.weight"], dense[f"{name}.weight"])
    config = json.loads((tmp_path / "ct" / "config.json").read_text())
    assert sorted(config["quantization_config"]["ignore"]) == ["lm_head", ROLES[2]]


def test_layers_that_the_format_cannot_hold(tmp_path: Path) -> None:
    """All of them in one error, and nothing is written; or dense, as asked."""
    off, out = affine(), affine()
    off["biases"] = off["biases"] + off["scales"] / 2
    out["biases"] = out["scales"]  # a zero point of -1
    three = affine(bits=3)
    layers = {PROJ: affine(), "a.down_proj": off, "b.down_proj": out, "c.down_proj": three}
    layers["d.down_proj"] = {k: np.stack([x, x]) for k, x in affine().items()}
    layers["e.down_proj"] = {
        "weight": affine()["weight"],
        "scales": np.full((10, 2), 120, np.uint8),
    }
    block = {
        "c.down_proj": {"bits": 3, "group_size": 32},
        "e.down_proj": {"bits": 4, "group_size": 32, "mode": "mxfp4"},
    }
    source = folder(tmp_path / "mlx", layers, {}, block=block)
    with pytest.raises(requant.CheckpointError) as rejected:
        requant.export(source, tmp_path / "ct", to=CT)
    problems = {x.where: x.message for x in rejected.value.problems}
    assert problems.keys() == layers.keys() - {PROJ, "e.down_proj"}
    assert "not a whole number of scales" in problems["a.down_proj"]
    assert "20 have a zero point outside 0 to 15" in problems["b.down_proj"]
    assert "3 bits" in problems["c.down_proj"] and "stack" in problems["d.down_proj"]
    assert all("--otherwise dense" in message for message in problems.values())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mlx"]
    report = requant.export(source, tmp_path / "ct", otherwise="dense", to=CT)
    treatments = {x.layer: x.treatment for x in report.plan.layers}
    kept = dict.fromkeys((PROJ, "e.down_proj"), "kept")
    assert treatments == {**kept, **dict.fromkeys(problems, "dequantized")}
    assert requant.verify(source, tmp_path / "ct").ok
    assert "--otherwise dense" in read_figures(tmp_path / "ct").command()


def test_sources_that_are_not_exported(tmp_path: Path) -> None:
    with pytest.raises(requant.CheckpointError, match="export moves codes") as dense:
        requant.export(MICRO_LLAMA, tmp_path / "ct", to=CT)
    assert "cannot be exported" in str(dense.value) and "--bits 4" in str(dense.value)
    other = folder(tmp_path / "other", {PROJ: affine()}, {}, model_type="qwen3_next")
    with pytest.raises(requant.CheckpointError, match="qwen3_next"):
        requant.export(other, tmp_path / "ct", to=CT)
    embedding = folder(tmp_path / "embedding", {ROLES[0]: affine()}, {})
    with pytest.raises(requant.CheckpointError, match="the result would be dense"):
        requant.export(embedding, tmp_path / "ct", to=CT)
    damaged = affine()
    damaged["scales"][3, 1] = np.nan
    broken = folder(tmp_path / "damaged", {PROJ: damaged}, {})
    with pytest.raises(requant.CheckpointError, match="NaN or infinite"):
        requant.export(broken, tmp_path / "ct", to=CT)
    good = folder(tmp_path / "good", {PROJ: affine()}, {})
    with pytest.raises(requant.UnknownValueError, match="compressed-tensors"):
        requant.export(good, tmp_path / "ct", to="exl2")
    with pytest.raises(requant.UnknownValueError, match="'refuse', 'widen', 'dense'"):
        requant.export(good, tmp_path / "ct", otherwise="skip", to=CT)
    (tmp_path / "ct").mkdir()
    (tmp_path / "ct" / "config.json").write_text("{}")
    with pytest.raises(requant.OutputError, match="--force"):
        requant.export(good, tmp_path / "ct", to=CT)
    assert requant.export(good, tmp_path / "ct", force=True, to=CT).output == str(tmp_path / "ct")


def test_a_model_that_kept_its_names(tmp_path: Path) -> None:
    """A conversion with --layout keep has the source's names, whatever the model."""
    dense = {f"{PROJ}.weight": bf16(np.random.default_rng(0).normal(size=(64, 64)))}
    source = write_checkpoint(tmp_path / "dense", dense, {"model_type": "qwen3_next"})
    requant.convert(source, tmp_path / "mlx", bits=4, layout="keep")
    report = requant.export(tmp_path / "mlx", tmp_path / "ct", to=CT)
    assert report.plan.layers[0].treatment == "kept"


def test_a_stopped_export_resumes(tmp_path: Path) -> None:
    """The same bytes as without a stop, and nothing under the output's name before the end."""
    names = (f"model.layers.{n}.mlp.up_proj" for n in range(8))
    source = folder(tmp_path / "mlx", {name: affine(64, 8) for name in names}, {})
    small: dict[str, Any] = {"to": CT, "max_memory": 83_890_000, "threads": 1}
    requant.export(source, tmp_path / "whole", **small)

    def stop(progress: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        requant.export(source, tmp_path / "ct", **small, progress=stop)
    assert not (tmp_path / "ct").exists()
    requant.export(source, tmp_path / "ct", **small)
    assert tree(tmp_path / "ct") == tree(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ct", "mlx", "whole"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--dry-run writes nothing; --json prints the report; an error says what to type."""
    source = folder(tmp_path / "mlx", {PROJ: affine()}, {})
    words = ["export", str(source), str(tmp_path / "ct"), "--to", CT]

    def call(*more: str) -> tuple[Any, str, str]:
        with pytest.raises(SystemExit) as ended:
            run([*words, *more])
        return ended.value.code, *capsys.readouterr()

    code, out, _ = call("--dry-run")
    assert code == 0 and "compressed-tensors 4-bit g32" in out and "nothing was written" in out
    assert json.loads(call("--dry-run", "--json")[1])["layers"][0]["exactness"] == "exact"
    assert not (tmp_path / "ct").exists()
    code, out, _ = call("--json")
    assert code == 0 and json.loads(out)["groups"][0]["treatment"] == "kept"
    code, out, err = call()
    assert code == 1 and "--force replaces it" in err
    assert read_figures(tmp_path / "ct").command() == f"requant export SOURCE OUTPUT --to {CT}"
    words[1] = str(MICRO_LLAMA)
    code, out, err = call("--force")
    assert code == 1 and "Traceback" not in err and "--layout keep --bits 4" in err


FIXTURES = ("int4-asym-g32", "int4-sym-g128", "int8-channel", "int4-actorder-weight")


@pytest.mark.parametrize("name", FIXTURES)
def test_fixtures_come_back(name: str, tmp_path: Path) -> None:
    """compressed-tensors -> MLX -> compressed-tensors: the codes and zero points of the original.

    A group of MLX's may be a part of the original's.
    """
    source = fixture(f"ct-pack-{name}") / "checkpoint"
    requant.convert(source, tmp_path / "mlx", layout="keep")
    requant.export(tmp_path / "mlx", tmp_path / "ct", to=CT)
    original, written = read_folder(source), read_folder(tmp_path / "ct")
    checked = 0
    for key, expected in original.items():
        if key.endswith(("weight_packed", "weight_shape")):
            assert same_bits(written[key], expected), key
            checked += 1
        if key.endswith(("weight_scale", "weight_zero_point")):
            groups = written[key].shape[1] // expected.shape[1]
            assert same_bits(written[key], np.repeat(expected, groups, axis=1)), key
            checked += 1
    assert checked >= 3


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_a_model_of_mlx(bits: int, tmp_path: Path) -> None:
    """Every layer of micro-llama is exported, and comes back with its codes and scales."""
    requant.convert(MICRO_LLAMA, tmp_path / "mlx", bits=bits)
    report = requant.export(tmp_path / "mlx", tmp_path / "ct", to=CT)
    kept = [x for x in report.plan.layers if x.treatment == "kept"]
    assert len(kept) == 28 and all(x.bound or x.exactness == "exact" for x in kept)
    assert {path.name for path in MICRO_LLAMA.glob("token*")} <= set(tree(tmp_path / "ct"))
    requant.convert(tmp_path / "ct", tmp_path / "back", layout="keep")
    source, back = read_folder(tmp_path / "mlx"), read_folder(tmp_path / "back")
    largest = 0.0
    for layer in kept:
        for role in ("weight", "scales"):
            assert same_bits(back[f"{layer.layer}.{role}"], source[f"{layer.layer}.{role}"])
        a, b = (x[f"{layer.layer}.biases"].astype(np.float64) for x in (source, back))
        steps = np.abs((a - b) / source[f"{layer.layer}.scales"].astype(np.float64))
        largest = max(largest, float(steps.max()))
    assert largest < {4: 0.125, 8: 1.0}[bits]
