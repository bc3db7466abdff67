"""Coded stacks of experts under mlx-lm's names: its class takes them as it takes dense ones."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest

import requant
from tests.support.layers import compressed_tensors as ct_layers
from tests.support.mlx_reference import codes_of
from tests.support.number_formats import E2M1, e4m3
from tests.support.safetensors_files import read_file, read_folder, write_file

pytest.importorskip("mlx_lm")

Parts = dict[str, np.ndarray]
Code = Callable[[str, tuple[int, ...], int], tuple[Parts, np.ndarray]]


def int4(name: str, shape: tuple[int, ...], seed: int) -> tuple[Parts, np.ndarray]:
    """As llm-compressor names the stacks of a module that is not a Linear."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(-8, 8, shape)
    scales = rng.uniform(0.001, 0.01, (*shape[:-1], shape[-1] // 32)).astype(ml_dtypes.bfloat16)
    parts = {
        f"{name}_packed": ct_layers.pack(codes + 8, 4),
        f"{name}_scale": scales,
        f"{name}_shape": np.array(shape, np.int64),
    }
    return parts, codes * scales.astype(np.float32).repeat(32, axis=-1)


def fp8(name: str, shape: tuple[int, ...], seed: int) -> tuple[Parts, np.ndarray]:
    """One scale an expert, and activation scales."""
    codes = e4m3(*shape, seed=seed)
    scales = np.random.default_rng(seed).uniform(0.001, 0.01, (shape[0], 1, 1)).astype(np.float32)
    parts = {
        name: codes,
        f"{name}_scale_inv": scales,
        f"{name}_activation_scale": np.ones(shape[0], np.float32),
    }
    return parts, codes.astype(np.float32) * scales


def nvfp4(name: str, shape: tuple[int, ...], seed: int) -> tuple[Parts, np.ndarray]:
    """ModelOpt's, a factor each for gate and up."""
    rng = np.random.default_rng(seed)
    packed = rng.integers(0, 256, (*shape[:-1], shape[-1] // 2), np.uint8)
    scales = rng.integers(0x20, 0x70, (*shape[:-1], shape[-1] // 16), np.uint8)
    factors = rng.uniform(0.001, 0.002, (shape[0], 2)).astype(np.float32)
    wide = scales.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    wide = wide * factors.repeat(shape[1] // 2, axis=1)[:, :, None]
    parts = {
        name: packed,
        f"{name}_weight_scale": scales.view(ml_dtypes.float8_e4m3fn),
        f"{name}_weight_scale_2": factors,
        f"{name}_input_scale": np.ones(shape[0], np.float32),
    }
    codes = np.stack([packed & 15, packed >> 4], -1).reshape(shape)
    return parts, E2M1[codes] * wide.repeat(16, axis=-1)


BLOCKS: dict[str, tuple[Code, dict[str, Any]]] = {
    "int4": (int4, ct_layers.block(group_size=32)),
    "fp8": (fp8, {"quant_method": "fp8"}),
    "nvfp4": (nvfp4, {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
}


def folders(tmp_path: Path, family: str, tool: str) -> tuple[Path, Path]:
    """A small model with coded stacks, and its counterpart with their values in bfloat16."""
    from tests.support.families import small_config
    from tests.support.mlx_lm_conversion import write_mlx_checkpoint
    from tests.support.published_models import published

    config = small_config(family)
    published(tmp_path / "plain", family, config)
    code, block = BLOCKS[tool]
    weights = read_file(tmp_path / "plain" / "model.safetensors")
    stored, dense = dict(weights), dict(weights)
    stacks = [name for name in weights if name.endswith(("experts.gate_up_proj", ".down_proj"))]
    for seed, name in enumerate(name for name in stacks if weights[name].ndim == 3):
        del stored[name]
        parts, values = code(name, weights[name].shape, seed)
        stored |= parts
        dense[name] = values.astype(ml_dtypes.bfloat16)
    assert stored.keys() != weights.keys()
    config = config | {"dtype": "bfloat16"}
    for kind, tensors, more in (("coded", stored, block), ("counterpart", dense, None)):
        quantized = {} if more is None else {"quantization_config": more}
        write_mlx_checkpoint(tmp_path / kind, config | quantized, {"x": mx.zeros(1)})
        write_file(tmp_path / kind / "model.safetensors", tensors)
    return tmp_path / "coded", tmp_path / "counterpart"


@pytest.mark.sweep(2)
@pytest.mark.parametrize("tool", BLOCKS)
@pytest.mark.parametrize("family", ["qwen3_5_moe", "mistral4"])
def test_a_class_takes_them_as_dense_ones(family: str, tool: str, tmp_path: Path) -> None:
    from mlx_lm.utils import load_model

    source, counterpart = folders(tmp_path, family, tool)
    for folder, out in ((source, "ours"), (counterpart, "expected")):
        requant.convert(folder, tmp_path / out, layout="mlx-lm", dequantize=True)
    ours, expected = read_folder(tmp_path / "ours"), read_folder(tmp_path / "expected")
    assert ours.keys() == expected.keys()
    assert [name for name in ours if ours[name].tobytes() != expected[name].tobytes()] == []
    options = {"bits": 8} if tool == "fp8" else {}
    requant.convert(source, tmp_path / "kept", layout="mlx-lm", **options)
    load_model(tmp_path / "kept", strict=True)
    if tool != "int4":
        return
    kept, coded = read_folder(tmp_path / "kept"), read_file(source / "model.safetensors")
    halves = [name for name in kept if name.endswith("switch_mlp.gate_proj.weight")]
    stacks = [name for name in coded if name.endswith("gate_up_proj_packed")]
    assert len(halves) == len(stacks) > 0
    for half, stack in zip(sorted(halves), sorted(stacks), strict=True):
        codes = codes_of(coded[stack].view(np.uint32), 4)
        assert np.array_equal(codes_of(kept[half], 4), codes[:, : codes.shape[1] // 2])
