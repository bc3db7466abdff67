"""``layout="mlx-lm"``: what mlx-lm's own converter writes, name for name and bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from requant.conversion import convert, plan
from requant.errors import CheckpointError, UnknownValueError

from .conftest import load, same, tree
from .test_against_mlx_lm import by_mlx_lm, model


@pytest.mark.parametrize(
    "wishes, theirs",
    [
        ({"bits": 4}, {"quantize": True, "q_bits": 4}),
        ({"bits": 3, "group_size": 32}, {"quantize": True, "q_bits": 3, "q_group_size": 32}),
        ({"mode": "mxfp4"}, {"quantize": True, "q_mode": "mxfp4"}),
        ({"mode": "nvfp4"}, {"quantize": True, "q_mode": "nvfp4"}),
        ({"mode": "mxfp8"}, {"quantize": True, "q_mode": "mxfp8"}),
        ({"dequantize": True}, {}),
        ({"bits": 4, "dtype": "float16"}, {"quantize": True, "q_bits": 4, "dtype": "float16"}),
    ],
    ids=lambda wishes: "-".join(f"{k}={v}" for k, v in wishes.items()),
)
@pytest.mark.parametrize("name", ["micro-llama", "micro-moe", "qwen3-16m"])
def test_output_is_mlx_lm_s(name: str, wishes: dict, theirs: dict, tmp_path: Path) -> None:
    expected = by_mlx_lm(model(name), tmp_path / "theirs", **theirs)
    convert(model(name), tmp_path / "ours", layout="mlx-lm", **wishes)
    ours = load(tmp_path / "ours")

    assert ours.keys() == expected.keys()
    assert [key for key in ours if not same(ours[key], expected[key])] == []
    configs = [
        json.loads((tmp_path / who / "config.json").read_text()) for who in ("ours", "theirs")
    ]
    assert configs[0] == configs[1]


def test_a_moe_loads_in_mlx_lm_and_generates(tmp_path: Path) -> None:
    import mlx_lm

    convert(model("micro-moe"), tmp_path / "ours", layout="mlx-lm", bits=4)
    loaded, tokenizer = mlx_lm.load(str(tmp_path / "ours"))
    assert mlx_lm.generate(loaded, tokenizer, prompt="The file", max_tokens=4)


def test_stacked_experts_are_read_from_the_files_and_threads_change_nothing(
    tmp_path: Path,
) -> None:
    made = plan(model("micro-moe"), layout="mlx-lm", bits=4)
    stacked = [step for step in made.steps if "switch_mlp" in step.layer]
    assert {type(step.inputs["weight"]).__name__ for step in stacked} == {"JoinedTensor"}

    wishes = {"layout": "mlx-lm", "bits": 4}
    convert(model("micro-moe"), tmp_path / "one", threads=1, **wishes)
    convert(model("micro-moe"), tmp_path / "two", threads=2, chunk_bytes=5000, **wishes)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_overrides_rule_over_mlx_lm_s_choice(tmp_path: Path) -> None:
    made = plan(
        model("micro-moe"), layout="mlx-lm", bits=4, overrides=["down_proj=8", "gate$=skip"]
    )

    targets = {layer.layer: layer.target for layer in made.layers}
    assert targets["model.layers.0.mlp.switch_mlp.down_proj"] == "affine 8-bit g64"
    assert targets["model.layers.0.mlp.gate"] == "BF16"
    block = made.config["quantization"]
    assert block["model.layers.0.mlp.switch_mlp.down_proj"]["bits"] == 8
    assert block["model.layers.0.mlp.gate"] is False


def test_triples_that_mlx_lm_s_rule_leaves_behind_are_refused_by_name(tmp_path: Path) -> None:
    """Its rule for this family stacks only ``.weight``; scales and biases would be lost."""
    convert(model("micro-moe"), tmp_path / "kept", bits=4)
    with pytest.raises(CheckpointError, match=r"experts\.0\.down_proj\.scales"):
        convert(tmp_path / "kept", tmp_path / "stacked", layout="mlx-lm")
    assert not (tmp_path / "stacked").exists()


def test_an_mlx_source_keeps_its_codes(tmp_path: Path) -> None:
    convert(model("qwen3-16m"), tmp_path / "first", bits=4)
    convert(tmp_path / "first", tmp_path / "second", layout="mlx-lm")
    first, second = load(tmp_path / "first"), load(tmp_path / "second")

    assert first.keys() == second.keys()
    assert [name for name in first if not same(first[name], second[name])] == []


def test_a_model_that_mlx_lm_does_not_know(dense: Path) -> None:
    config = json.loads((dense / "config.json").read_text()) | {"model_type": "no_such_model"}
    (dense / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="no_such_model"):
        plan(dense, layout="mlx-lm", bits=4)


def test_an_unknown_layout() -> None:
    with pytest.raises(UnknownValueError):
        plan("nowhere", layout="gguf")
