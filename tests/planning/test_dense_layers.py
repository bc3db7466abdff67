"""``--bits`` on a quantized source covers the layers that it would cover in a dense one.

The referee is the plan of a dense model of the same names and shapes under the same request.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest

import requant
from requant.planning.plan import Plan
from tests.support.families import small_config
from tests.support.hub_forms import FORMS
from tests.support.layers import packers
from tests.support.mlx_lm_conversion import class_checkpoint
from tests.support.plan_texts import note_texts
from tests.support.safetensors_files import write_file

pytestmark = pytest.mark.sweep(1)

pytest.importorskip("mlx_lm")
E4M3 = ml_dtypes.float8_e4m3fn
Tensors = dict[str, np.ndarray]


def published(folder: Path, family: str) -> dict[str, Any]:
    """A dense model as its authors publish it."""
    config = small_config(family)
    class_checkpoint(folder, config)
    weights = mx.load(str(folder / "model.safetensors"))
    mx.eval(weights)
    form = FORMS.get(family, dict)
    mx.save_safetensors(str(folder / "model.safetensors"), form(weights), {"format": "pt"})
    return config


def fp8(path: str, array: np.ndarray) -> Tensors:
    scale = np.float32(np.abs(array).max() / 448)
    return {
        f"{path}.weight": (array / scale).astype(E4M3),
        f"{path}.weight_scale_inv": np.array(scale, np.float32),
    }


def rounded(array: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, zeros and scales of four bits in groups of 32."""
    groups = array.reshape(array.shape[0], -1, 32)
    scales = (np.abs(groups).max(-1) / 7).astype(np.float16)
    codes = np.rint(groups / scales[..., None].astype(np.float32)) + 8
    zeros = np.full(scales.shape, 8)
    return np.clip(codes, 0, 15).astype(np.int64).reshape(array.shape), zeros, scales


def awq(path: str, array: np.ndarray) -> Tensors:
    return {f"{path}.{role}": x for role, x in packers.gemm(*rounded(array)).items()}


def gptq(path: str, array: np.ndarray) -> Tensors:
    parts = packers.gptq(*rounded(array), 4)
    return {f"{path}.{role}": x for role, x in parts.items()}


def mlx(path: str, array: np.ndarray) -> Tensors:
    parts = mx.quantize(mx.array(array), group_size=32, bits=4)
    roles = ("weight", "scales", "biases")
    return {f"{path}.{role}": np.array(x) for role, x in zip(roles, parts, strict=True)}


TOOLS: dict[str, tuple[Callable[[str, np.ndarray], Tensors], dict[str, Any]]] = {
    "fp8": (
        fp8,
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": None},
    ),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}),
    "gptq": (
        gptq,
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq_v2"},
    ),
    "mlx": (mlx, {"group_size": 32, "bits": 4}),
}


def coded(dense: Path, folder: Path, tool: str, layers: tuple[str, ...]) -> Path:
    """The same model with the layers whose path ends so quantized by a tool."""
    pack, block = TOOLS[tool]
    tensors: Tensors = {}
    for name, array in mx.load(str(dense / "model.safetensors")).items():
        path = name.removesuffix(".weight")
        values = np.array(array.astype(mx.float32))
        if name.endswith(".weight") and path.endswith(layers):
            tensors |= pack(path, values)
        else:
            tensors[name] = values.astype(ml_dtypes.bfloat16)
    config = json.loads((dense / "config.json").read_text())
    key = "quantization" if tool == "mlx" else "quantization_config"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config | {key: block}))
    write_file(folder / "model.safetensors", tensors)
    return folder


def quantized(plan: Plan) -> set[str]:
    """The layers that have codes in the output."""
    return {x.layer for x in plan.layers if x.treatment not in ("dense", "dequantized")}


REQUESTS: dict[str, dict[str, Any]] = {
    "bits": {"bits": 4},
    "bits and group": {"bits": 8, "group_size": 32},
    "mode": {"mode": "mxfp4"},
    "nvfp4": {"mode": "nvfp4"},
    "recipe": {"recipe": "mixed_2_6"},
    "skip": {"bits": 4, "overrides": ["lm_head=skip", "embed=8:32"]},
}


@pytest.mark.parametrize("layout", ["keep", "mlx-lm"])
@pytest.mark.parametrize("request_", REQUESTS)
@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_the_layers_of_a_dense_source(
    family: str, tool: str, request_: str, layout: str, tmp_path: Path
) -> None:
    published(tmp_path / "dense", family)
    source = coded(tmp_path / "dense", tmp_path / "coded", tool, ("mlp.up_proj", "down_proj"))
    options = {"layout": layout} | REQUESTS[request_]
    due = requant.plan(tmp_path / "dense", **options)
    plan = requant.plan(source, **options)
    assert quantized(due) == quantized(plan)
    assert {x.layer for x in plan.layers} == {x.layer for x in due.layers}
    if request_ == "skip":
        assert "lm_head" not in quantized(plan)
    new = {x.layer for x in plan.layers if x.treatment == "quantized"}
    assert "model.embed_tokens" in new
    assert sum("dense in the source" in note for note in note_texts(plan.notes)) == 1


@pytest.mark.parametrize("layout", ["keep", "mlx-lm"])
@pytest.mark.parametrize("tool", ["awq", "gptq", "mlx"])
def test_without_a_request_dense_layers_stay(tool: str, layout: str, tmp_path: Path) -> None:
    published(tmp_path / "dense", "llama")
    source = coded(tmp_path / "dense", tmp_path / "coded", tool, ("up_proj", "down_proj"))
    for options in ({}, {"overrides": ["up_proj=8:32"]}):
        plan = requant.plan(source, layout=layout, **options)  # type: ignore[arg-type]
        ends = {path.rpartition(".")[2] for path in quantized(plan)}
        assert ends == {"up_proj", "down_proj"}
        assert not any("dense in the source" in note for note in note_texts(plan.notes))


@pytest.mark.parametrize("layout", ["keep", "mlx-lm"])
def test_only_and_skip_choose_as_before(layout: str, tmp_path: Path) -> None:
    published(tmp_path / "dense", "llama")
    source = coded(tmp_path / "dense", tmp_path / "coded", "mlx", ("up_proj", "down_proj"))
    plan = requant.plan(source, layout=layout, bits=8, only=["up_proj"])
    outcome = {x.layer: (x.treatment, x.target) for x in plan.layers}
    assert outcome["model.layers.0.mlp.up_proj"] == ("kept", "affine 8-bit g32")
    assert outcome["model.layers.0.mlp.down_proj"] == ("kept", "affine 4-bit g32")
    assert outcome["lm_head"] == ("dense", "BF16")
    plan = requant.plan(source, layout=layout, bits=8, only=["lm_head"])
    outcome = {x.layer: (x.treatment, x.target) for x in plan.layers}
    assert outcome["lm_head"] == ("quantized", "affine 8-bit g64")
    assert outcome["model.embed_tokens"] == ("dense", "BF16")


@pytest.mark.parametrize("layout", ["keep", "mlx-lm"])
def test_what_the_block_of_an_mlx_folder_says_is_false(layout: str, tmp_path: Path) -> None:
    """The maker's choice holds until another one is asked for; then a note says so."""
    published(tmp_path / "dense", "llama")
    source = coded(tmp_path / "dense", tmp_path / "coded", "mlx", ("up_proj", "down_proj"))
    config = json.loads((source / "config.json").read_text())
    config["quantization"]["lm_head"] = False
    (source / "config.json").write_text(json.dumps(config))
    kept = requant.plan(source, layout=layout)
    assert kept.config["quantization"].get("lm_head", False) is False
    assert "lm_head" not in quantized(kept)
    plan = requant.plan(source, layout=layout, bits=4)
    assert "lm_head" in quantized(plan)
    assert "lm_head" not in plan.config["quantization"]
    assert [note for note in note_texts(plan.notes) if "says false for lm_head" in note]


@pytest.mark.parametrize("layout", ["keep", "mlx-lm"])
def test_a_budget_chooses_for_dense_layers_too(layout: str, tmp_path: Path) -> None:
    published(tmp_path / "dense", "llama")
    source = coded(tmp_path / "dense", tmp_path / "coded", "awq", ("up_proj", "down_proj"))
    plan = requant.convert(source, tmp_path / "out", layout=layout, budget=5).plan
    assert "lm_head" in quantized(plan)
    assert "model.embed_tokens" in quantized(plan)
    assert plan.bits_per_weight <= 5


@pytest.mark.slow
def test_gpt_oss_in_its_own_mode(tmp_path: Path) -> None:
    """Experts keep their codes; attention, embedding and head follow the request, norms do not."""
    rng, experts = np.random.default_rng(0), "model.layers.0.mlp.experts"
    tensors: Tensors = {
        "model.embed_tokens.weight": rng.normal(size=(64, 64)).astype(ml_dtypes.bfloat16),
        "model.layers.0.self_attn.q_proj.weight": rng.normal(size=(64, 64)).astype(
            ml_dtypes.bfloat16
        ),
        "model.layers.0.mlp.router.weight": rng.normal(size=(2, 64)).astype(ml_dtypes.bfloat16),
        "model.layers.0.input_layernorm.weight": np.ones(64, ml_dtypes.bfloat16),
        f"{experts}.down_proj_blocks": rng.integers(0, 256, (2, 64, 2, 16), np.uint8),
        f"{experts}.down_proj_scales": rng.integers(110, 125, (2, 64, 2), np.uint8),
    }
    config = {"model_type": "gpt_oss", "torch_dtype": "bfloat16"}
    config["quantization_config"] = {"quant_method": "mxfp4"}  # type: ignore[assignment]
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config))
    write_file(source / "model.safetensors", tensors)
    for mode, bits in (("mxfp4", 4), ("mxfp8", 8)):
        plan = requant.plan(source, layout="keep", mode=mode)
        outcome = {x.layer: (x.treatment, x.exactness, x.target) for x in plan.layers}
        assert outcome[f"{experts}.down_proj"] == ("kept", "exact", f"{mode} {bits}-bit g32")
        assert outcome["model.layers.0.self_attn.q_proj"][0] == "quantized"
        assert outcome["model.embed_tokens"][0] == "quantized"
        assert outcome["model.layers.0.mlp.router"][0] == "dense"
        assert outcome["model.layers.0.input_layernorm"][0] == "dense"


# -- the group of codes that can stay --------------------------------------------------------
@pytest.mark.parametrize("layout", ["keep", "mlx-lm"])
@pytest.mark.parametrize("tool", ["awq", "gptq", "mlx"])
def test_bits_without_a_group_keep_codes_in_theirs(tool: str, layout: str, tmp_path: Path) -> None:
    published(tmp_path / "dense", "llama")
    source = coded(tmp_path / "dense", tmp_path / "coded", tool, ("up_proj", "down_proj"))
    for bits in (4, 8):
        plan = requant.plan(source, layout=layout, bits=bits)
        layer = next(x for x in plan.layers if x.layer.endswith("up_proj"))
        assert (layer.treatment, layer.target) == ("kept", f"affine {bits}-bit g32")
        head = next(x for x in plan.layers if x.layer == "lm_head")
        assert head.target == f"affine {bits}-bit g64"
        asked = requant.plan(source, layout=layout, bits=bits, group_size=64)
        layer = next(x for x in asked.layers if x.layer.endswith("up_proj"))
        assert (layer.treatment, layer.target) == ("requantized", f"affine {bits}-bit g64")
    fewer = requant.plan(source, layout=layout, bits=3)
    layer = next(x for x in fewer.layers if x.layer.endswith("up_proj"))
    assert (layer.treatment, layer.target) == ("requantized", "affine 3-bit g64")


def test_such_a_conversion_is_repeated_by_verify(tmp_path: Path) -> None:
    published(tmp_path / "dense", "llama")
    source = coded(tmp_path / "dense", tmp_path / "coded", "gptq", ("up_proj", "down_proj"))
    requant.convert(source, tmp_path / "out", bits=8)
    assert requant.verify(source, tmp_path / "out").ok
    figures = requant.read_figures(tmp_path / "out")
    assert "--bits 8" in figures.command()
    assert "--group-size" not in figures.command()
