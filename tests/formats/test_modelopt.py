"""ModelOpt by hand: every kind of layer, scales of inputs, and folders that must be rejected."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import requant
from tests.support.checkpoints import write_quantized
from tests.support.conversions import dequantized, rejection
from tests.support.damage import damage, damages
from tests.support.layers.modelopt import block
from tests.support.mlx_reference import affine, float_values
from tests.support.number_formats import BF16, E2M1, E4M3, e4m3, nibbles
from tests.support.plan_texts import reason_text
from tests.support.safetensors_files import read_folder


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def dense(tensors: dict[str, np.ndarray], config: dict[str, Any], folder: Path) -> np.ndarray:
    source = write_quantized(folder / "dense-source", tensors, config)
    return dequantized(source, folder / "dense", chunk_bytes=1)["up.weight"]


def converted(
    tensors: dict[str, np.ndarray], config: dict[str, Any], folder: Path, **options: Any
) -> tuple[dict[str, np.ndarray], Any]:
    source = write_quantized(folder / "source", tensors, config)
    report = requant.convert(source, folder / "out", **{"layout": "keep"} | options)
    return read_folder(folder / "out"), report.plan.layers[0]


def test_two_rows_a_byte(tmp_path: Path) -> None:
    """[[1, 2, 3], [-1, -8, 7]] is stored as f1 82 73; eight more makes codes."""
    tensors = {
        "up.weight": np.tile(np.array([0xF1, 0x82, 0x73, 0], np.uint8), (1, 8)),
        "up.weight_scale": np.array([[0.5], [0.25]], np.float32),
    }
    made, layer = converted(tensors, block("W4A16_AWQ"), tmp_path)
    assert affine(made, "up", 32, 4).codes[:, :4].tolist() == [[9, 10, 11, 8], [7, 0, 15, 8]]
    assert made["up.scales"].tolist() == [[0.5], [0.25]]
    assert made["up.biases"].tolist() == [[-4], [-2]]
    assert layer.exactness == "rounded"  # float32 scales under a bfloat16 model
    assert dense(tensors, block("W4A16_AWQ"), tmp_path)[:, :3].tolist() == [
        [0.5, 1, 1.5],
        [-0.25, -2, 1.75],
    ]


@pytest.mark.slow
@settings(max_examples=30)
@given(
    pairs=st.integers(1, 12),
    groups=st.integers(1, 5),
    group=st.sampled_from([16, 32, 128]),
    experts=st.sampled_from([0, 1, 3]),
    scaled=st.booleans(),
)
def test_int4_of_any_shape(
    pairs: int, groups: int, group: int, experts: int, scaled: bool, tmp_path_factory: Any
) -> None:
    tmp_path = tmp_path_factory.mktemp("int4")
    leading = (experts,) if experts else ()
    packed = random(*leading, pairs, groups * group, seed=pairs)
    scales = np.random.default_rng(1).uniform(0.1, 1, (*leading, 2 * pairs, groups))
    tensors = {"up.weight": packed, "up.weight_scale": scales.astype(np.float32)}
    signed = np.stack([packed & 15, packed >> 4], axis=-2).astype(np.int32)
    signed = np.where(signed > 7, signed - 16, signed).reshape(*leading, 2 * pairs, -1)
    values = signed.astype(np.float32) * scales.astype(np.float32).repeat(group, axis=-1)
    if scaled:
        inputs = np.random.default_rng(2).uniform(0.5, 2, groups * group).astype(BF16)
        tensors["up.pre_quant_scale"] = inputs
        values = values * inputs.astype(np.float32)
    assert np.array_equal(dense(tensors, block("W4A16_AWQ"), tmp_path), values)


def test_nvfp4_whose_scale_folds_is_exact(tmp_path: Path) -> None:
    """Tensor scale 1/4: every group scale stays an E4M3 number."""
    packed = random(4, 32)
    scales = np.full((4, 4), 2.5, np.float32).astype(E4M3)
    tensors = {
        "up.weight": packed,
        "up.weight_scale": scales,
        "up.weight_scale_2": np.array(0.25, np.float32),
        "up.input_scale": np.array(3, np.float32),
    }
    made, layer = converted(tensors, block("NVFP4", group_size=16), tmp_path)
    values = E2M1[nibbles(packed)] * np.float32(0.625)
    spec = {"group_size": 16, "bits": 4, "mode": "nvfp4"}
    assert np.array_equal(float_values(made, "up", spec), values)
    assert layer.exactness == "exact"


def test_nvfp4_with_scaled_inputs_is_folded(tmp_path: Path) -> None:
    packed, inputs = random(4, 32), np.linspace(0.5, 2, 64).astype(BF16)
    tensors = {
        "up.weight": packed,
        "up.weight_scale": np.full((4, 4), 2, E4M3),
        "up.weight_scale_2": np.array(0.25, np.float32),
        "up.pre_quant_scale": inputs,
    }
    values = E2M1[nibbles(packed)] * np.float32(0.5) * inputs.astype(np.float32)
    assert np.array_equal(dense(tensors, block("NVFP4_AWQ"), tmp_path), values)
    _, layer = converted(tensors, block("NVFP4_AWQ"), tmp_path)
    assert layer.exactness == "re-encoded"
    assert reason_text(layer) == "pre_quant_scale is folded into its columns"


@pytest.mark.parametrize(("algorithm", "bits"), [("W4A8_MXFP4_FP8", 4), ("MXFP8", 8)])
def test_mx_is_moved(algorithm: str, bits: int, tmp_path: Path) -> None:
    weight = random(6, 32) if bits == 4 else e4m3(6, 64)
    exponents = np.random.default_rng(3).integers(100, 140, (6, 2), np.uint8)
    tensors = {"up.weight": weight, "up.weight_scale": exponents}
    made, layer = converted(tensors, block(algorithm), tmp_path)
    assert made["up.weight"].view(np.uint8).tobytes() == weight.tobytes()
    assert made["up.scales"].tobytes() == exponents.tobytes()
    assert layer.exactness == "exact"


def test_int8_rows(tmp_path: Path) -> None:
    codes = random(6, 64).view(np.int8)
    scales = np.array([1, 2, 0.5, 0.25, 4, 8], np.float32)
    made, _ = converted({"up.weight": codes, "up.weight_scale": scales}, block("W8A16"), tmp_path)
    got = affine(made, "up", 64, 8)
    assert np.array_equal(got.codes, codes.view(np.uint8) ^ 0x80)
    assert np.array_equal(got.values, codes.astype(np.float32) * scales[:, None])


@pytest.mark.parametrize(
    ("algorithm", "scale", "spread"),
    [
        ("FP8", np.float32(0.3), lambda s: s),
        (
            "FP8_PER_CHANNEL_PER_TOKEN",
            np.linspace(0.1, 1, 256).astype(np.float32),
            lambda s: s[:, None],
        ),
        (
            "fp8_pb_wo",
            np.float32([[[[0.1], [0.2]]], [[[0.3], [0.4]]]]),
            lambda s: s[:, 0, :, 0].repeat(128, 0).repeat(128, 1),
        ),
    ],
)
def test_every_fp8(algorithm: str, scale: Any, spread: Any, tmp_path: Path) -> None:
    weight, scale = e4m3(256, 256), np.asarray(scale)
    if scale.ndim == 4:
        assert scale.shape == (2, 1, 2, 1)
    got = dense({"up.weight": weight, "up.weight_scale": scale}, block(algorithm), tmp_path)
    assert np.array_equal(got, weight.astype(np.float32) * spread(scale))


def test_mixed_precision_and_wildcards(tmp_path: Path) -> None:
    """quantized_layers names an algorithm each; excluded names are wildcards, not regexes."""
    layers = {"up": {"quant_algo": "MXFP8"}, "down": {"quant_algo": "W8A16"}}
    tensors = {
        "up.weight": e4m3(4, 32),
        "up.weight_scale": np.full((4, 1), 127, np.uint8),
        "down.weight": random(4, 32).view(np.int8),
        "down.weight_scale": np.ones(4, np.float32),
        "head.weight": np.ones((4, 32), np.float32),
        "k_proj.k_scale": np.ones(1, np.float32),
        "k_proj.k_bias": np.ones(1, np.float32),
    }
    more = {"quantized_layers": layers, "exclude_modules": ["he*", "*.router"]}
    source = write_quantized(tmp_path / "source", tensors, block("MIXED_PRECISION", **more))
    report = requant.convert(source, tmp_path / "out", layout="keep")
    stored = {layer.layer: layer.source for layer in report.plan.layers}
    assert stored == {"up": "mxfp8", "down": "modelopt 8-bit a scale a row", "head": "F32"}
    assert {name for name, _ in report.plan.dropped} == {"k_proj.k_scale", "k_proj.k_bias"}


def nvfp4() -> dict[str, Any]:
    return {
        "up.weight": random(4, 32),
        "up.weight_scale": np.full((4, 4), 2, E4M3),
        "up.weight_scale_2": np.array(0.25, np.float32),
    }


DAMAGED = """
- up.weight_scale -> up.weight: has no weight_scale next to it
- up.weight -> up.weight_scale: F8_E4M3 [4, 4] has no codes next to it
- up.weight_scale_2 -> up: has E4M3 scales of NVFP4, but no weight_scale_2
up.weight_scale = F8_E4M3 [4, 2] 1 -> weight U8 [4, 32], weight_scale F8_E4M3 [4, 2]
up.weight_scale_2 = F32 [] -> up.weight_scale_2: holds 0.0, expected a finite number above 0
up.weight_scale_2 = F32 [3] 1 -> up.weight_scale_2: F32 [3], expected one F32
up.pre_quant_scale = F32 [63] 1 -> up.pre_quant_scale: F32 [63], expected floats [64]
up.svdquant_lora_a = F32 [2, 64] 1
    up.svdquant_lora_a: is a part of NVFP4_SVD's low-rank branch
experts.gate_up = U8 [2, 4, 32] 7
    experts.gate_up: U8 [2, 4, 32] holds codes, but has no scale next to it
gate.weight = F8_E4M3 [4, 32] 1 -> gate.weight: F8_E4M3 [4, 32] has no scale next to it
up.weight = F8_E4M3 [4, 32] 1; up.weight_scale = U8 [4, 1] 127
    up: is stored as mxfp8, but config.json: quantization_config.quant_algo says NVFP4
"""


@pytest.mark.parametrize(("changes", "words"), damages(DAMAGED))
def test_damaged_folders_are_rejected(changes: str, words: list[str], tmp_path: Path) -> None:
    tensors = nvfp4()
    damage(changes, tensors)
    source = write_quantized(tmp_path / "source", tensors, block("NVFP4"))
    text = rejection(source, tmp_path / "out")
    assert all(word in text for word in words), text


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (block("NVFP3"), "quant_algo: is 'NVFP3'; known are NVFP4"),
        (block("NVFP4_SVD"), "its low-rank branch has no place in MLX"),
        (block("NVFP4", ignore="up"), "ignore: is 'up', expected a list of names"),
        (block("MIXED_PRECISION", quantized_layers=[1]), "quantized_layers: is [1]"),
    ],
)
def test_configs_that_cannot_be_met(config: dict[str, Any], words: str, tmp_path: Path) -> None:
    tensors = nvfp4() | {"head.weight": np.ones((4, 32), np.float32)}
    source = write_quantized(tmp_path / "source", tensors, config)
    assert words in rejection(source, tmp_path / "out")
