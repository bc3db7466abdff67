"""Mixtures of experts from AWQ and GPTQ folders: stacked as mlx-lm wants them, same codes."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import requant
from tests.support.checkpoints import model
from tests.support.layers import packers
from tests.support.logits import logits
from tests.support.mlx_reference import affine, codes_of
from tests.support.safetensors_files import read_file, read_folder, write_file

pytest.importorskip("mlx_lm")

GROUP = 32
Pack = Callable[[np.ndarray, np.ndarray, np.ndarray, int], dict[str, np.ndarray]]


def rounded(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, zeros and float16 scales of 4 bits, round to nearest."""
    groups = weight.astype(np.float32).reshape(weight.shape[0], -1, GROUP)
    low, high = np.minimum(groups.min(-1), 0), np.maximum(groups.max(-1), 0)
    scales = np.maximum((high - low) / 15, 1e-5).astype(np.float16)
    zeros = np.clip(np.rint(-low / scales), 0, 15).astype(int)
    codes = np.rint(groups / scales[..., None].astype(np.float32)) + zeros[..., None]
    return np.clip(codes, 0, 15).astype(int).reshape(weight.shape), zeros, scales


def quantized_moe(folder: Path, pack: Pack, block: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """micro-moe with every linear layer packed; and its dense values, float32."""
    source = model("micro-moe")
    shutil.copytree(source, folder)
    tensors: dict[str, np.ndarray] = {}
    dense: dict[str, np.ndarray] = {}
    for number, (name, array) in enumerate(read_file(source / "model.safetensors").items()):
        path = name.removesuffix(".weight")
        if not re.search(r"(_proj)$", path):
            tensors[name] = array.astype(np.float16)
            dense[name] = tensors[name].astype(np.float32)
            continue
        codes, zeros, scales = rounded(array)
        packed = pack(codes, zeros, scales, number)
        tensors |= {f"{path}.{role}": part for role, part in packed.items()}
        of = np.arange(codes.shape[1]) // GROUP
        if "g_idx" in packed:
            of = packed["g_idx"]
        dense[name] = ((codes - zeros[:, of]) * scales[:, of].astype(float)).astype(np.float32)
    write_file(folder / "model.safetensors", tensors)
    config = json.loads((folder / "config.json").read_text())
    config |= {"dtype": "float16", "quantization_config": block}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, dense


def dense_counterpart(source: Path, folder: Path, dense: dict[str, np.ndarray]) -> Path:
    """The values that the codes represent, in a plain folder."""
    shutil.copytree(source, folder)
    write_file(folder / "model.safetensors", dense)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    requant.convert(folder, folder.with_name("plain"), dequantize=True)
    return folder.with_name("plain")


def awq(codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray, _: int) -> dict[str, np.ndarray]:
    return packers.gemm(codes, zeros, scales)


def act_order(
    codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray, seed: int
) -> dict[str, np.ndarray]:
    """GPTQ v2 with inputs of every layer in random groups."""
    g_idx = np.random.default_rng(seed).permutation(codes.shape[1]) // GROUP
    return packers.gptq(codes, zeros, scales, 4) | {"g_idx": g_idx.astype(np.int32)}


@pytest.mark.slow
def test_awq_experts_are_stacked_with_their_codes(tmp_path: Path) -> None:
    block = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}
    source, dense = quantized_moe(tmp_path / "source", awq, block)
    report = requant.convert(source, tmp_path / "out", dtype="float32", chunk_bytes=20000)
    made = read_folder(tmp_path / "out")
    before = read_file(model("micro-moe") / "model.safetensors")
    for name in ("gate_proj", "up_proj", "down_proj"):
        stack = codes_of(made[f"model.layers.0.mlp.switch_mlp.{name}.weight"], 4)
        for expert in range(8):
            path = f"model.layers.0.mlp.experts.{expert}.{name}.weight"
            assert np.array_equal(stack[expert], rounded(before[path])[0]), path
    assert {x.exactness for x in report.plan.layers} == {"exact"}  # float32 rounds nothing
    wanted = logits(dense_counterpart(source, tmp_path / "dense", dense))
    assert np.abs(logits(tmp_path / "out") - wanted).max() <= 2e-5 * np.abs(wanted).max()


@pytest.mark.slow
def test_act_order_of_experts_is_moved_into_each_expert_s_own_layers(tmp_path: Path) -> None:
    block = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": False}
    block |= {"checkpoint_format": "gptq_v2", "desc_act": True}
    source, dense = quantized_moe(tmp_path / "source", act_order, block)
    report = requant.convert(source, tmp_path / "out", dtype="float32", chunk_bytes=20000)
    kept = {x.layer: x.treatment for x in report.plan.layers}
    assert kept["model.layers.0.mlp.switch_mlp.down_proj"] == "kept"
    assert kept["model.layers.0.mlp.switch_mlp.up_proj"] == "requantized"
    assert kept["model.layers.0.self_attn.q_proj"] == "requantized"
    weights = read_folder(tmp_path / "out")
    base = "model.layers.0.mlp"
    down = codes_of(weights[f"{base}.switch_mlp.down_proj.weight"], 4)
    up = affine(weights, f"{base}.switch_mlp.up_proj", 64, 8).values
    stored = read_file(source / "model.safetensors")
    before = read_file(model("micro-moe") / "model.safetensors")
    for expert in range(8):
        path = f"{base}.experts.{expert}"
        order = np.argsort(stored[f"{path}.down_proj.g_idx"], kind="stable")
        assert np.array_equal(
            down[expert], rounded(before[f"{path}.down_proj.weight"])[0][:, order]
        )
        wanted = dense[f"{path}.up_proj.weight"][order]
        assert np.abs(up[expert] - wanted).max() <= 0.01 * np.abs(wanted).max()
