"""BitNet: folders against transformers' own values, bytes by hand, what must be rejected."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import requant
from tests.support.checkpoints import write_quantized
from tests.support.conversions import rejection
from tests.support.damage import damage, damages
from tests.support.fixture_checks import check_fixture
from tests.support.layers.bitnet import BLOCK, layer
from tests.support.logits import check_logits
from tests.support.mlx_reference import affine
from tests.support.number_formats import BF16
from tests.support.plan_texts import note_texts
from tests.support.safetensors_files import read_folder


def test_scales_that_multiply_are_exact(tmp_path: Path) -> None:
    checked = check_fixture("bitnet-autobitlinear", tmp_path, "exact")
    assert checked.config["quantization"] == {"group_size": 64, "bits": 2, "mode": "affine"}
    assert any(
        "rounds activations to 8 bits" in note for note in note_texts(checked.report.plan.notes)
    )


def test_scales_that_divide_round_once(tmp_path: Path) -> None:
    checked = check_fixture("bitnet-bitlinear", tmp_path, "rounded", bound=2.0**-8)
    bounds = {x.bound for x in checked.report.plan.layers if x.bound}
    words = "the scale, 1 / weight_scale, rounded to bfloat16, relative error at most 0.0039"
    assert bounds == {words}


@pytest.mark.parametrize("name", ["bitnet-bitlinear", "bitnet-autobitlinear"])
def test_logits(name: str, tmp_path: Path) -> None:
    check_logits(name, tmp_path, 2e-5, dtype="float32")


def test_bytes_written_by_hand(tmp_path: Path) -> None:
    """A column of 8 rows 1 0 -1 1 0 0 1 -1 is stored as 92 19."""
    tensors = {
        "up.weight": np.tile(np.array([[0x92], [0x19]], np.uint8), (1, 32)),
        "up.weight_scale": np.array([0.5], BF16),
    }
    source = write_quantized(tmp_path / "source", tensors, BLOCK)
    requant.convert(source, tmp_path / "out", layout="keep")
    made = affine(read_folder(tmp_path / "out"), "up", 32, 2)
    assert made.codes[:, 0].tolist() == [2, 1, 0, 2, 1, 1, 2, 0]
    assert made.values[:, 0].tolist() == [0.5, 0, -0.5, 0.5, 0, 0, 0.5, -0.5]


@pytest.mark.slow
@settings(max_examples=40)
@given(
    packed=st.integers(1, 20),
    columns=st.sampled_from([7, 32, 96, 256]),
    missing=st.integers(0, 3),
    divides=st.booleans(),
    chunk_bytes=st.sampled_from([1, 900, 5000, 1 << 20]),
)
def test_any_shape(packed: int, columns: int, missing: int, divides: bool, chunk_bytes: int):
    """Rows that are padded (the bias tells), and ranges that lie in several blocks."""
    rows = max(4 * packed - missing, 1)
    tensors, ternary = layer(rows, columns, 3 if divides else 0.375)
    if rows % 4:
        tensors["up.bias"] = np.zeros(rows, BF16)
    block = BLOCK | {"linear_class": "bitlinear" if divides else "autobitlinear"}
    with tempfile.TemporaryDirectory() as name:
        source = write_quantized(Path(name) / "source", tensors, block)
        options: dict[str, Any] = {"layout": "keep", "chunk_bytes": chunk_bytes, "dtype": "float32"}
        requant.convert(source, Path(name) / "dense", dequantize=True, **options)
        dense = read_folder(Path(name) / "dense")["up.weight"]
        requant.convert(source, Path(name) / "out", **options)
        made = read_folder(Path(name) / "out")
    expected = ternary / np.float32(3) if divides else ternary * np.float32(0.375)
    assert np.array_equal(dense, expected)
    if columns % 32 == 0:
        group = 128 if columns == 256 else 32
        assert np.array_equal(affine(made, "up", group, 2).codes, ternary + 1)


DAMAGED = """
- up.weight_scale -> up.weight: U8 [2, 32] holds codes, but has no scale next to it
- up.weight -> up.weight_scale: BF16 [1] has no codes next to it
up.weight = BF16 [8, 32] -> up.weight: BF16 [8, 32] is next to up.weight_scale
up.weight = U8 [2, 2, 32] -> up.weight: U8 [2, 2, 32], expected U8 [out / 4, in]
up.weight_scale = BF16 [2] 1 -> up.weight_scale: BF16 [2], expected one float
up.weight_scale = BF16 [1] -> up.weight_scale: holds 0.0, expected a finite number above 0
up.weight_scale = F32 [1] nan -> up.weight_scale: scales hold NaN
up.weight = U8 [2, 32] 3 -> holds code 3
linear_class: "bit" -> linear_class: is 'bit'; known are bitlinear
quantization_mode: "online" -> each time the model runs
use_rms_norm: true -> normalizes its inputs first
experts.up = U8 [2, 2, 32]
    experts.up: U8 [2, 2, 32] holds codes, but has no scale next to it
"""


@pytest.mark.parametrize(("changes", "words"), damages(DAMAGED))
def test_damaged_folders_are_rejected(changes: str, words: list[str], tmp_path: Path) -> None:
    tensors, _ = layer(8, 32)
    block: dict[str, Any] = dict(BLOCK)
    damage(changes, tensors, block)
    text = rejection(write_quantized(tmp_path / "source", tensors, block), tmp_path / "out")
    assert all(word in text for word in words), text


def test_dense_weights_are_rejected(tmp_path: Path) -> None:
    source = write_quantized(tmp_path / "source", {"up.weight": np.zeros((8, 32), BF16)}, BLOCK)
    assert "but no weight is U8" in rejection(source, tmp_path / "out")
