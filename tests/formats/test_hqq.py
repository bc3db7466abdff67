"""HQQ by hand: packings, any shape along both axes, and folders that must be rejected."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import requant
from tests.support.checkpoints import write_quantized
from tests.support.conversions import convert, dequantized, rejection
from tests.support.damage import damage, damages
from tests.support.layers.hqq import BLOCK, PACKINGS, layer, random_view, text
from tests.support.mlx_reference import affine
from tests.support.safetensors_files import read_folder


def dense(tensors: dict[str, np.ndarray], folder: Path, **options: Any) -> np.ndarray:
    """Values of the layer, converted from a folder and in memory; both must agree."""
    source = write_quantized(folder / "source", tensors, BLOCK)
    return dequantized(source, folder / "dense", **options)["up.weight"]


def test_a_byte_written_by_hand(tmp_path: Path) -> None:
    """0x2f: code 2 in row 0 of the view, code 15 in row 1; zeros are fractions."""
    tensors, _ = layer(random_view(2, 32, 4), (2, 32), "4bit_u8")
    tensors["up.W_q"] = np.full((1, 32), 0x2F, np.uint8)
    tensors["up.scale"] = np.array([[0.5], [0.25]], np.float16)
    tensors["up.zero"] = np.array([[1.5], [7.25]], np.float16)
    made, _ = convert(write_quantized(tmp_path / "source", tensors, BLOCK), tmp_path / "out")
    assert made["up.weight"].tolist() == [[0x22222222] * 4, [0xFFFFFFFF] * 4]
    assert made["up.scales"].tolist() == [[0.5], [0.25]]
    assert made["up.biases"].tolist() == [[-0.75], [-1.8125]]
    assert made.keys() == {"up.weight", "up.scales", "up.biases"}


@pytest.mark.sweep(8)
@pytest.mark.parametrize(
    ("packing", "nbits", "bits"),
    [
        ("8bit_u8", 8, 8),
        ("8bit_u8", 7, 8),
        ("8bit_u8", 6, 6),
        ("8bit_u8", 5, 5),
        ("4bit_u8", 4, 4),
        ("3bit_32", 3, 3),
        ("2bit_u8", 2, 2),
        ("2bit_u8", 1.58, 2),
        ("2bit_u8", 1, 2),  # 1.58 as it is read back
        ("1bit_u8", 1, 2),
    ],
)
def test_every_packing_becomes_codes(packing: str, nbits: Any, bits: int, tmp_path: Path) -> None:
    """96 rows of 128 inputs, groups of 64: 192 rows of the view, 20 strips of 3 bits."""
    width = min(int(nbits) if nbits != 1.58 else 2, PACKINGS[packing][0])
    view = random_view(192, 64, width)
    tensors, values = layer(view, (96, 128), packing, nbits=nbits)
    source = write_quantized(tmp_path / "source", tensors, BLOCK)
    report = requant.convert(source, tmp_path / "out", layout="keep", chunk_bytes=1)
    made = affine(read_folder(tmp_path / "out"), "up", 64, bits)
    assert np.array_equal(made.codes, view.reshape(96, 128))
    assert np.abs(made.values - values).max() <= 2**-11 * 260 * 0.1
    (found,) = report.plan.layers
    assert found.exactness == "rounded"


@pytest.mark.slow
@settings(max_examples=60)
@given(
    packing=st.sampled_from(list(PACKINGS)),
    axis=st.sampled_from([0, 1]),
    rows=st.integers(1, 40),
    columns=st.integers(1, 5),
    unit=st.sampled_from([8, 32]),
    group=st.sampled_from([8, 32, 64]),
    chunk_bytes=st.sampled_from([1, 700, 4096, 1 << 20]),
)
def test_any_shape_along_both_axes(
    packing: str, axis: int, rows: int, columns: int, unit: int, group: int, chunk_bytes: int
) -> None:
    """Groups that span two rows, strips that end within a row, ranges over many strips."""
    shape = (rows, columns * unit)
    size = rows * columns * unit
    if size % group:
        group = unit
    view_shape = (size // group, group) if axis else (group, size // group)
    view = random_view(*view_shape, PACKINGS[packing][0], seed=size)
    tensors, values = layer(view, shape, packing, axis)
    with tempfile.TemporaryDirectory() as folder:
        got = dense(tensors, Path(folder), chunk_bytes=chunk_bytes)
    assert np.array_equal(got, values)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("packing", ["8bit_u8", "4bit_u8", "3bit_32"])
def test_codes_stored_as_floats(packing: str, axis: int, tmp_path: Path) -> None:
    """view_as_float: the same bytes under the dtype of the model."""
    shape = (12, 64)
    view = random_view(*((24, 32) if axis else (32, 24)), PACKINGS[packing][0])
    tensors, values = layer(view, shape, packing, axis)
    tensors["up.W_q"] = tensors["up.W_q"].view(np.float16)
    tensors["up.view_as_float"] = np.array(1, np.uint8)
    assert np.array_equal(dense(tensors, tmp_path, chunk_bytes=1), values)


def test_what_the_config_says_where_the_layer_is_silent(tmp_path: Path) -> None:
    """Parameters by kind of layer; the path without model, layers and numbers names it."""
    view = random_view(24, 32, 4)
    tensors, values = layer(view, (12, 64), "4bit_u8")
    path = "model.layers.3.mlp.up_proj"
    tensors = {
        name.replace("up.", f"{path}."): array
        for name, array in tensors.items()
        if name.split(".")[1] in ("W_q", "scale", "zero", "shape")
    }
    params = {"weight_quant_params": {"nbits": 4, "group_size": 32, "axis": 1}}
    block = {"quant_method": "hqq", "quant_config": {"mlp.up_proj": params}}
    source = write_quantized(tmp_path / "source", tensors, block)
    assert np.array_equal(dequantized(source, tmp_path / "out")[f"{path}.weight"], values)


def test_bfloat16_range_and_memory(tmp_path: Path) -> None:
    """In memory and from a folder the bytes are the same; the bias stays."""
    tensors, _ = layer(random_view(24, 32, 4), (12, 64), "4bit_u8")
    tensors["up.bias"] = np.arange(12, dtype=np.float16)
    source = write_quantized(tmp_path / "source", tensors, BLOCK)
    requant.convert(source, tmp_path / "out", layout="keep")
    made, quantization = requant.transform_weights(tensors, BLOCK)
    stored = read_folder(tmp_path / "out")
    assert made.keys() == stored.keys()
    assert all(made[name].tobytes() == stored[name].tobytes() for name in made)
    assert quantization.quantization == requant.Quantization.affine(32, 4)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"shape": np.array([0, 64])}, "up.shape: says [0, 64], expected two counts"),
        ({"packing": text("4bit_32")}, "up.packing: is '4bit_32'; known packings are 8bit_u8"),
        (
            {"packing": text("2bit_u8"), "nbits": np.array(2)},
            "up.W_q: U8 [12, 32], expected [6, 32]",
        ),
        (
            {"packing": text("8bit_u8"), "nbits": np.array(9)},
            "up.nbits: is 9, but packing '8bit_u8' holds 5 to 8 bits",
        ),
        (
            {"shape": np.array([13, 64])},
            "up.scale: F16 [24, 1] does not divide a weight of (13, 64)",
        ),
    ],
)
def test_parts_that_say_what_is_not(parts: dict[str, np.ndarray], words: str, tmp_path: Path):
    tensors, _ = layer(random_view(24, 32, 4), (12, 64), "4bit_u8")
    tensors |= {f"up.{role}": part for role, part in parts.items()}
    source = write_quantized(tmp_path / "source", tensors, BLOCK)
    assert words in rejection(source, tmp_path / "out")


DAMAGED = """
- up.scale -> up: has packed codes, but no up.scale
- up.zero -> up: has packed codes, but no up.zero
- up.shape -> up: has no up.shape
- up.W_q -> has no up.W_q next to it
up.packing = F32 [7] -> up.packing: F32 [7], expected letters as U8
up.packing = U8 [65] -> up.packing: U8 [65], expected a few numbers
up.nbits = I64 [] 1 -> up.nbits: is 1, but packing '4bit_u8' holds 4 bits
up.nbits = I64 [] 3 -> up.nbits: is 3, but packing '4bit_u8' holds 4 bits
up.axis = I64 [] 2 -> up.axis: is 2, expected 0 or 1
up.axis = I64 [] -> up.W_q: U8 [12, 32], expected [16, 24] for axis 0
up.scale = I32 [24, 1] 1 -> up.scale: I32 [24, 1], expected floats
up.zero = F16 [23, 1] -> up.zero: F16 [23, 1], expected [24, 1]
up.W_q = F16 [12, 32] -> up.W_q: F16 [12, 32], expected uint8 codes
up.group_size = I64 [] 64
    up.group_size: is 64, but 24 scales for [12, 64] make groups of 32
up.quant_zero = U8 [] 1 -> up.quant_zero: is true
up.meta_scale = U8 [3] -> up.meta_scale: holds scales or zeros as codes
up.weight = F16 [12, 64] -> up.weight: F16 [12, 64] is next to up.W_q
"""


@pytest.mark.parametrize(("changes", "words"), damages(DAMAGED))
def test_damaged_folders_are_rejected(changes: str, words: list[str], tmp_path: Path) -> None:
    tensors, _ = layer(random_view(24, 32, 4), (12, 64), "4bit_u8")
    damage(changes, tensors)
    text = rejection(write_quantized(tmp_path / "source", tensors, BLOCK), tmp_path / "out")
    assert all(word in text for word in words), text


def test_codes_beyond_their_width_are_rejected(tmp_path: Path) -> None:
    tensors, _ = layer(random_view(24, 32, 8), (12, 64), "8bit_u8", nbits=5)
    source = write_quantized(tmp_path / "source", tensors, BLOCK)
    assert "but nbits says 5: 0 to 31" in rejection(source, tmp_path / "out")
