"""Dense tensors under the quantization block of the model that they were made from."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import requant
from requant.errors import CheckpointError
from tests.support.checkpoints import write_quantized
from tests.support.mlx_reference import load
from tests.support.number_formats import bf16
from tests.support.plan_texts import note_texts

PACK = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
GROUPS = {"group_0": {"targets": ["Linear"], "weights": PACK}}
CT = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": GROUPS}
BLOCKS: dict[str, dict[str, Any]] = {
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False},
    "auto-round": {"quant_method": "auto-round", "bits": 4, "group_size": 128, "sym": True},
    "paroquant": {"quant_method": "paroquant", "bits": 4, "group_size": 128, "krot": 8},
    "compressed-tensors": CT | {"quantization_status": "compressed"},
    "compressed-tensors, frozen": CT | {"quantization_status": "frozen"},
    "modelopt": {"quant_method": "modelopt", "quant_algo": "NVFP4"},
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "fbgemm": {"quant_method": "fbgemm_fp8"},
    "mxfp4": {"quant_method": "mxfp4"},
    "hqq": {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4}}},
    "bitsandbytes nf4": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "bitsandbytes int8": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "metal": {"quant_method": "metal", "bits": 4, "group_size": 64},
    "fp_quant": {"quant_method": "fp_quant", "forward_dtype": "mxfp4"},
    "quark": {"quant_method": "quark", "global_quant_config": {"weight": {"dtype": "int4"}}},
    "torchao": {"quant_method": "torchao", "quant_type": {"default": {}}},
    "mlx": {"group_size": 64, "bits": 4},
    "mlx, of no use": {"group_size": 64, "bits": "four"},
}
TENSORS = {
    "model.embed_tokens.weight": bf16(96, 128, seed=1),
    "model.layers.0.mlp.up_proj.weight": bf16(64, 128, seed=2),
    "model.layers.0.norm.weight": bf16(128, seed=3),
    "model.norm.scale": bf16(128, seed=4),  # a norm may call its vector so
    "logit_scale": np.array(2.5, np.float32),
    "position_ids": np.arange(64).reshape(1, 64),
}


def stale(
    folder: Path, block: Mapping[str, Any], where: tuple[str, ...] = (), **config: Any
) -> Path:
    """A folder whose config has the block, perhaps in a nested config."""
    name = "quantization_config" if "quant_method" in block else "quantization"
    part = config
    for key in where:
        part = part.setdefault(key, {})
    part[name] = dict(block)
    return write_quantized(folder, TENSORS, None, **config)


@pytest.mark.parametrize("name", BLOCKS)
def test_a_stale_block_is_left_out_and_the_request_fulfilled(name: str, tmp_path: Path) -> None:
    source = stale(tmp_path / "source", BLOCKS[name])
    report = requant.convert(source, tmp_path / "out", bits=8, layout="keep")
    fresh = write_quantized(tmp_path / "dense", TENSORS, None)
    requant.convert(fresh, tmp_path / "expected", bits=8, layout="keep")
    assert {x.layer for x in report.plan.layers if x.treatment == "quantized"} == {
        "model.embed_tokens",
        "model.layers.0.mlp.up_proj",
    }
    # What is written is what the same folder without the block becomes.
    for file in ("model.safetensors", "config.json"):
        found, expected = ((tmp_path / x / file).read_bytes() for x in ("out", "expected"))
        assert found == expected
    if "frozen" not in name:  # such a block says itself that the values are floats
        (note,) = [note for note in note_texts(report.plan.notes) if "stale" in note]
        assert note.startswith("config.json: quantization")
    assert requant.inspect(source).format == "dense"
    assert requant.inspect(source).problems == ()


@pytest.mark.parametrize("name", ["awq", "fp8", "mlx", "bitsandbytes nf4"])
def test_without_a_request_it_is_a_dense_model(name: str, tmp_path: Path) -> None:
    plan = requant.plan(stale(tmp_path / "source", BLOCKS[name]), layout="keep")
    assert plan.format == "dense"
    assert {x.target for x in plan.layers if x.treatment == "quantized"} == {"affine 4-bit g64"}
    assert any("No bits or mode" in note for note in note_texts(plan.notes))


@pytest.mark.parametrize("name", ["gptq", "fp8", "compressed-tensors"])
def test_a_nested_block_is_stale_too(name: str, tmp_path: Path) -> None:
    source = stale(tmp_path / "source", BLOCKS[name], ("text_config",), vision_config={"a": 1})
    plan = requant.plan(source, bits=8, layout="keep")
    assert "quantization_config" not in plan.config["text_config"]
    assert plan.config["vision_config"] == {"a": 1}
    assert plan.quantization is not None


def test_dequantize_of_a_stale_folder_copies_it(tmp_path: Path) -> None:
    source = stale(tmp_path / "source", BLOCKS["awq"])
    requant.convert(source, tmp_path / "out", dequantize=True, layout="keep")
    assert load(tmp_path / "out").keys() == TENSORS.keys()
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("awq", {"up.qweight": np.zeros((64, 16), np.int32)}),
        ("gptq", {"up.scales": np.ones((2, 64), np.float16)}),
        ("fp8", {"up.weight": np.ones((64, 64), ml_dtypes.float8_e4m3fn)}),
        ("compressed-tensors", {"up.weight_scale": np.ones((64, 2), np.float16)}),
        ("hqq", {"up.scale": np.ones((64, 1), np.float16)}),
        ("bitsandbytes nf4", {"up.weight": np.zeros((64, 1), np.uint8)}),
        ("mlx", {"up.weight": np.zeros((64, 16), np.uint32)}),
        ("quark", {"up.weight": np.zeros((64, 64), np.int8)}),
    ],
)
def test_a_block_with_any_codes_or_scales_is_not_stale(
    name: str, more: Mapping[str, np.ndarray], tmp_path: Path
) -> None:
    key = "quantization_config" if "quant_method" in BLOCKS[name] else "quantization"
    source = write_quantized(tmp_path / "source", TENSORS | more, None, **{key: BLOCKS[name]})
    with pytest.raises(CheckpointError):
        requant.plan(source, bits=8, layout="keep")


@pytest.mark.parametrize(
    "block",
    [
        {
            "quant_method": "bitnet",
            "quantization_mode": "online",
        },  # weights are rounded at run time
        {"quant_method": "aqlm"},  # nothing is known of it
    ],
    ids=lambda block: block["quant_method"],
)
def test_blocks_that_may_change_what_dense_weights_mean_are_rejected(
    block: Mapping[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="quantization_config"):
        requant.plan(stale(tmp_path / "source", block), bits=8, layout="keep")


def test_a_block_of_which_some_layers_are_left_is_read(tmp_path: Path) -> None:
    """An MLX folder of which one layer was dequantized since."""
    source = write_quantized(tmp_path / "dense", TENSORS, None)
    requant.convert(source, tmp_path / "first", bits=4, overrides=["up_proj=skip"], layout="keep")
    config = json.loads((tmp_path / "first/config.json").read_text())
    for key in ("quantization", "quantization_config"):
        config[key] = {k: v for k, v in config[key].items() if v is not False}
    (tmp_path / "first/config.json").write_text(json.dumps(config))
    plan = requant.plan(tmp_path / "first", layout="keep")
    assert plan.format == "mlx"
    assert not any("stale" in note for note in note_texts(plan.notes))
