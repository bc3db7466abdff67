"""Quark by hand: every layout that is documented, and folders that must be rejected."""

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
from tests.support.fixture_checks import same_in_memory
from tests.support.layers.quark import ORDERS, block, pack_words
from tests.support.mlx_reference import affine, float_values
from tests.support.number_formats import BF16, E2M1, E4M3, e4m3
from tests.support.safetensors_files import read_folder


def dense(folder: Path, output: Path) -> np.ndarray:
    return dequantized(folder, output, chunk_bytes=3000)["up.weight"]


def converted(folder: Path, output: Path) -> tuple[dict[str, np.ndarray], Any]:
    report = requant.convert(folder, output, layout="keep", chunk_bytes=3000)
    if report.plan.quantization is not None:
        same_in_memory(folder, output)
    return read_folder(output), report.plan.layers[0]


def test_words_written_by_hand() -> None:
    """uint4 0 to 7 in one word: 75316420 with reorder, 76543210 without."""
    codes = np.arange(8).reshape(1, 8)
    assert hex(pack_words(codes, "reorder")[0, 0]) == "0x75316420"
    assert hex(pack_words(codes, "order")[0, 0]) == "0x76543210"


@pytest.mark.slow
@settings(max_examples=40)
@given(
    dtype=st.sampled_from(["int4", "uint4", "int8", "uint8"]),
    eights=st.integers(1, 5),
    groups=st.integers(1, 4),
    order=st.sampled_from(list(ORDERS)),
    zero_points=st.booleans(),
)
def test_groups_are_stored_by_input(
    dtype: str, eights: int, groups: int, order: str, zero_points: bool, tmp_path_factory: Any
) -> None:
    """per_group: [in, out], both orders of nibbles, with and without zeros."""
    tmp_path = tmp_path_factory.mktemp("quark")
    bits, signed = int(dtype[-1]), dtype.startswith("int")
    low = -(1 << (bits - 1)) if signed else 0
    random = np.random.default_rng(eights)
    n_out, n_in = 8 * eights, 32 * groups
    codes = random.integers(low, low + (1 << bits), (n_in, n_out))
    zeros = random.integers(low, low + (1 << bits), (groups, n_out))
    has_zeros = zero_points or not signed
    zeros = zeros if has_zeros else np.zeros_like(zeros)
    scales = random.uniform(0.1, 1, (groups, n_out)).astype(np.float16)
    stored = np.int8 if signed else np.uint8
    tensors = {
        "up.weight": pack_words(codes, order) if bits == 4 else codes.astype(stored),
        "up.weight_scale": scales,
    }
    if has_zeros:
        packed = pack_words(zeros, order) if bits == 4 else zeros.astype(stored)
        tensors["up.weight_zero_point"] = packed
    folder = write_quantized(tmp_path / "source", tensors, block(dtype, pack=order))
    steps = (codes - zeros.repeat(32, axis=0)).astype(np.float32)
    values = (steps * scales.astype(np.float32).repeat(32, axis=0)).T
    assert np.array_equal(dense(folder, tmp_path / "dense"), values)
    made, layer = converted(folder, tmp_path / "out")
    assert np.array_equal(affine(made, "up", 32, bits).codes, codes.T - low)
    assert layer.exactness == ("rounded" if has_zeros else "exact")


@pytest.mark.parametrize("dtype", ["int4", "int8", "uint8"])
@pytest.mark.parametrize("qscheme", ["per_channel", "per_tensor"])
@pytest.mark.parametrize("order", list(ORDERS))
def test_channels_are_stored_by_output(dtype: str, qscheme: str, order: str, tmp_path: Path):
    bits, signed = int(dtype[-1]), dtype.startswith("int")
    low = -(1 << (bits - 1)) if signed else 0
    random = np.random.default_rng(4)
    codes = random.integers(low, low + (1 << bits), (6, 64))
    scales = random.uniform(0.1, 1, 6 if qscheme == "per_channel" else ()).astype(BF16)
    zeros = np.zeros(scales.shape, np.int64) if signed else np.full(scales.shape, 128)
    stored = np.int8 if signed else np.uint8
    tensors = {
        "up.weight": pack_words(codes, order) if bits == 4 else codes.astype(stored),
        "up.weight_scale": scales,
    }
    if not signed:
        tensors["up.weight_zero_point"] = zeros.astype(stored)
    folder = write_quantized(tmp_path / "source", tensors, block(dtype, qscheme, order))
    steps = (codes - np.broadcast_to(zeros.reshape(-1, 1), (6, 1))).astype(np.float32)
    values = steps * scales.astype(np.float32).reshape(-1, 1)
    assert np.array_equal(dense(folder, tmp_path / "dense"), values)
    made, _ = converted(folder, tmp_path / "out")
    assert np.array_equal(affine(made, "up", 64, bits).codes, codes - low)


def test_fp4_and_its_older_blocks(tmp_path: Path) -> None:
    """Scale 0.25, codes 0 to 15 twice: exponent byte fe, then 10 32 54 ...; E8M0 byte 7d."""
    nibbles = np.array([0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE] * 2, np.uint8)
    old = np.concatenate([np.array([0xFE], np.uint8), nibbles])
    values = np.tile(E2M1 * np.float32(0.25), 2)
    first = write_quantized(tmp_path / "a", {"up.weight": np.tile(old, (3, 2))}, block("mx"))
    tensors = {
        "up.weight": np.tile(nibbles, (3, 2)),
        "up.weight_scale": np.full((3, 2), 0x7D, np.uint8),
    }
    second = write_quantized(tmp_path / "b", tensors, block("fp4"))
    spec = {"group_size": 32, "bits": 4, "mode": "mxfp4"}
    for name, folder in (("old", first), ("new", second)):
        made, layer = converted(folder, tmp_path / name)
        assert np.array_equal(float_values(made, "up", spec), np.tile(values, (3, 2)))
        assert np.array_equal(dense(folder, tmp_path / f"{name}-dense"), np.tile(values, (3, 2)))
        assert layer.exactness == "exact"
        assert set(made["up.scales"].ravel().tolist()) == {0x7D}


def test_two_levels_are_nvfp4(tmp_path: Path) -> None:
    levels = [
        {"dtype": "fp4", "qscheme": "per_group", "group_size": 16},
        {"dtype": "fp8_e4m3", "qscheme": "per_tensor"},
    ]
    packed = np.random.default_rng(5).integers(0, 256, (4, 32), np.uint8)
    tensors = {
        "up.weight": packed,
        "up.weight_scale": np.full((4, 4), 2, E4M3),
        "up.weight_scale_2": np.array(0.3, np.float32),
    }
    folder = write_quantized(tmp_path / "source", tensors, block(levels))
    pairs = np.stack([packed & 15, packed >> 4], axis=-1).reshape(4, 64)
    values = E2M1[pairs] * (np.float32(2) * np.float32(0.3))
    assert np.array_equal(dense(folder, tmp_path / "dense"), values)


@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        # 0.125, 7.5, -0.125, 1.0 are codes 01 1f 21 08, stored c1 17 22.
        ("fp6_e2m3", [0.25, 15, -0.25, 2]),
        # The same codes are 0.0625, 28, -0.0625, 0.5 with three bits of exponent.
        ("fp6_e3m2", [0.125, 56, -0.125, 1]),
    ],
)
def test_fp6_becomes_mxfp8(dtype: str, values: list[float], tmp_path: Path) -> None:
    tensors = {
        "up.weight": np.tile(np.array([0xC1, 0x17, 0x22], np.uint8), (2, 8)),
        "up.weight_scale": np.full((2, 1), 128, np.uint8),
    }
    folder = write_quantized(tmp_path / "source", tensors, block(dtype))
    made, layer = converted(folder, tmp_path / "out")
    spec = {"group_size": 32, "bits": 8, "mode": "mxfp8"}
    assert float_values(made, "up", spec)[0, :4].tolist() == values
    assert layer.exactness == "exact"
    assert dense(folder, tmp_path / "dense")[1, -4:].tolist() == values


@pytest.mark.parametrize("element", ["e2m3", "e3m2"])
def test_every_fp6_field_keeps_its_value(element: str, tmp_path: Path) -> None:
    """Sign, exponent and fraction read by hand, over the whole range of scales."""
    fraction = int(element[-1])
    bias = 1 if element == "e2m3" else 3
    fields = np.arange(64)
    exponent, rest = (fields & 31) >> fraction, (fields & ((1 << fraction) - 1)) / (1 << fraction)
    size = np.where(exponent, (1 + rest) * 2.0 ** (exponent - bias), rest * 2.0 ** (1 - bias))
    values = np.where(fields & 32, -size, size)
    bits = (fields[:, None] >> np.arange(6)) & 1
    row = np.packbits(bits.astype(np.uint8).ravel(), bitorder="little")
    scales = np.array([[0, 127], [120, 246]], np.uint8)
    tensors = {"up.weight": np.stack([row, row]), "up.weight_scale": scales}
    folder = write_quantized(tmp_path / "source", tensors, block(f"fp6_{element}"))
    wanted = np.stack([values, values]) * 2.0 ** (scales.astype(int) - 127).repeat(32, axis=1)
    made, _ = converted(folder, tmp_path / "out")
    spec = {"group_size": 32, "bits": 8, "mode": "mxfp8"}
    assert np.array_equal(float_values(made, "up", spec), wanted)
    assert np.array_equal(dense(folder, tmp_path / "dense"), wanted)


def test_fp8_by_pattern(tmp_path: Path) -> None:
    """layer_quant_config rules over the global scheme; caches' scales are left out."""
    weight = e4m3(6, 64)
    tensors = {
        "up.weight": weight,
        "up.weight_scale": np.linspace(0.1, 1, 6).astype(np.float32),
        "k_proj.output_scale": np.ones(1, np.float32),
    }
    scheme = {"weight": {"dtype": "fp8_e4m3", "qscheme": "per_channel"}}
    more = {"layer_quant_config": {"u*": scheme}}
    folder = write_quantized(tmp_path / "source", tensors, block("int4", **more))
    expected = weight.astype(np.float32) * tensors["up.weight_scale"][:, None]
    assert np.array_equal(dense(folder, tmp_path / "dense"), expected)


def test_fake_quantized_weights_are_dense(tmp_path: Path) -> None:
    tensors = {"up.weight": np.ones((4, 32), np.float32), "up.weight_scale": np.ones(4, np.float32)}
    config = block("int8", export={"weight_format": "fake_quantized"})
    source = write_quantized(tmp_path / "source", tensors, config)
    assert dense(source, tmp_path / "out").tolist() == np.ones((4, 32)).tolist()
    assert read_folder(tmp_path / "out").keys() == {"up.weight"}


# ``block`` stands for the config: dtype or list of dtypes, qscheme, order of codes.
DAMAGED = """
- up.weight -> up.weight_scale: U8 [4, 1] has no codes next to it
- up.weight_scale -> up.weight: U8 [4, 16] has no up.weight_scale next to it
up.weight_scale = U8 [4, 2] 1 -> up.weight_scale: U8 [4, 2], expected U8 [4, 1]
WORDS; block: ["int8"] -> up.weight: I32 [32, 1], expected I8 for int8
WORDS; block: ["int4", null, "x"]
    export.pack_method: is 'x', expected reorder or order: the order of 4-bit codes
WORDS; block: ["int4", "per_row"]
    has qscheme 'per_row' by config.json: quantization_config.global_quant_config.weight; read is
    read is per_tensor, per_channel or per_group
block: ["uint2"] -> has dtype 'uint2' by config.json
block: ["int3"] -> has dtype 'int3' by config.json
block: ["fp8_e4m3"]; up.weight_scale = U8 [3, 1] 127
    up.weight_scale: U8 [3, 1] fits no tiling of up.weight [4, 16]
block: [[{"dtype": "fp4"}, {"dtype": "fp4"}]]; up.weight_scale = F8_E4M3 [4, 2] 1
    but no up.weight_scale_2
WORDS; global_quant_config: {} -> weight is null, expected a scheme
algo_config: {"name": "QuaRot"} -> algo_config: names a rotation
layer_type_quant_config: {"x": 1} -> by class of layer
WORDS; layer_quant_config: {"u*": {"weight": {}}, "*p": {}} -> contradict each other: u*, *p
gate.codes = U8 [4, 16] -> gate.codes: U8 [4, 16] holds codes, but has no scale next to it
WORDS; block: ["uint4"] -> holds uint4 codes, but has no up.weight_zero_point
WORDS; up.weight_scale = BF16 [3, 8] 1; block: ["int4"]
    up.weight_scale: BF16 [3, 8], expected [groups, 8]
"""
# int4 codes: without the scheme nobody knows their order.
WORDS = "up.weight = I32 [32, 1]; up.weight_scale = BF16 [1, 8] 1"


@pytest.mark.parametrize(("changes", "words"), damages(DAMAGED))
def test_damaged_folders_are_rejected(changes: str, words: list[str], tmp_path: Path) -> None:
    tensors: dict[str, Any] = {
        "up.weight": np.zeros((4, 16), np.uint8),
        "up.weight_scale": np.full((4, 1), 127, np.uint8),
    }
    config = block("fp4")
    damage(changes.replace("WORDS", WORDS), tensors, config)
    if given := config.pop("block", None):
        names = ("dtype", "qscheme", "pack")
        config |= block(**{k: v for k, v in zip(names, given, strict=False) if v is not None})
    text = rejection(write_quantized(tmp_path / "source", tensors, config), tmp_path / "out")
    assert all(word in text for word in words), text
