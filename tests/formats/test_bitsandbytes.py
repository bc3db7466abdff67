"""bitsandbytes by hand: bytes, tables, nesting, any shape, and folders that must be rejected."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import requant
from tests.support.checkpoints import write_quantized
from tests.support.conversions import convert, dequantized, rejection
from tests.support.damage import damage, damages
from tests.support.layers.bitsandbytes import BLOCK, NF4, STATE, table
from tests.support.mlx_reference import affine


def dense(tensors: dict[str, np.ndarray], folder: Path, **options: Any) -> np.ndarray:
    source = write_quantized(folder / "source", tensors, BLOCK)
    return dequantized(source, folder / "dense", **options)["up.weight"]


def test_a_byte_written_by_hand(tmp_path: Path) -> None:
    """0x6a: first code 6 (-0.09105), then code 10 (0.24611), times absmax 2."""
    tensors, _ = table((2, 32))
    tensors["up.weight"] = np.full((32, 1), 0x6A, np.uint8)
    tensors["up.weight.absmax"] = np.full(1, 2, np.float32)
    got = dense(tensors, tmp_path)
    assert got.ravel()[:4].tolist() == (NF4[[6, 10, 6, 10]] * np.float32(2)).tolist()


def test_int8_written_by_hand(tmp_path: Path) -> None:
    """Bytes 80 ff 00 7f become the word ff807f00; the scale is SCB / 127."""
    tensors = {
        "up.weight": np.tile(np.array([-128, -1, 0, 127], np.int8), (2, 16)),
        "up.SCB": np.array([127, 63.5], np.float32),
        "up.weight_format": np.array(0, np.uint8),
        "up.bias": np.ones(2, np.float16),
    }
    source = write_quantized(tmp_path / "source", tensors, {"load_in_8bit": True}, dtype="float16")
    made, _ = convert(source, tmp_path / "out")
    assert {hex(word) for word in made["up.weight"].ravel()} == {"0xff807f00"}
    assert made["up.scales"].tolist() == [[1], [0.5]]
    assert made["up.biases"].tolist() == [[-128], [-64]]
    assert made["up.scales"].dtype == np.float16
    assert made.keys() == {"up.weight", "up.scales", "up.biases", "up.bias"}


@pytest.mark.slow
@settings(max_examples=60)
@given(
    rows=st.integers(1, 30),
    columns=st.integers(1, 90),
    block=st.sampled_from([32, 64, 256]),
    nested=st.sampled_from([0, 4, 256]),
    chunk_bytes=st.sampled_from([1, 500, 5000, 1 << 20]),
)
def test_any_shape(rows: int, columns: int, block: int, nested: int, chunk_bytes: int) -> None:
    """Blocks and bytes that span rows, odd rows, nested blocks cut anywhere."""
    tensors, values = table((rows, columns), block, nested, seed=rows * columns)
    with tempfile.TemporaryDirectory() as folder:
        got = dense(tensors, Path(folder), chunk_bytes=chunk_bytes)
    assert np.array_equal(got, values)


@pytest.mark.parametrize("storage", [np.float16, np.float32, ml_dtypes.bfloat16])
def test_codes_stored_under_another_dtype(storage: Any, tmp_path: Path) -> None:
    tensors, values = table((6, 40))
    tensors["up.weight"] = tensors["up.weight"].reshape(-1).view(storage).reshape(-1, 1)
    assert np.array_equal(dense(tensors, tmp_path, chunk_bytes=1), values)


def test_experts_in_one_tensor(tmp_path: Path) -> None:
    tensors, values = table((3, 4, 64))
    assert np.array_equal(dense(tensors, tmp_path), values)


def test_in_memory_a_table_is_requantized(tmp_path: Path) -> None:
    tensors, values = table((8, 128), nested=4)
    made, quantization = requant.transform_weights(tensors, BLOCK)
    assert quantization.quantization == requant.Quantization.affine(64, 8)
    assert np.abs(affine(made, "up", 64, 8).values - values).max() <= 0.02
    assert made.keys() == {"up.weight", "up.scales", "up.biases"}


def test_without_a_config_the_tensors_tell(tmp_path: Path) -> None:
    tensors, values = table((4, 64))
    source = write_quantized(tmp_path / "source", tensors, None)
    assert np.array_equal(dequantized(source, tmp_path / "out")["up.weight"], values)


Change = Callable[[dict[str, Any]], Any]


def state(**fields: Any) -> Change:
    def change(tensors: dict[str, Any]) -> None:
        declared = json.loads(tensors[STATE].tobytes())
        tensors[STATE] = np.frombuffer(json.dumps(declared | fields).encode(), np.uint8)

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(STATE), "up.weight: U8 [256, 1] holds codes, with up.weight.absmax"),
        (
            lambda t: t.update({STATE: np.frombuffer(b"{oops", np.uint8)}),
            f"{STATE}: is not a quant_state",
        ),
        (state(shape=[8, 63]), "up.weight: U8 [256, 1], expected [252, 1] of U8 for [8, 63]"),
        (state(shape=[8]), "gives shape [8], expected two counts or more"),
        (state(blocksize=0), "gives blocksize 0, expected a count"),
        (state(blocksize=32), "up.weight.absmax: F32 [8], expected F32 [16]"),
        (state(nested_blocksize=256), "gives nested_blocksize 256 and nested_offset null"),
        (state(nested_blocksize=256, nested_offset=10**400), "gives nested_blocksize 256 and"),
        (
            state(nested_blocksize=256, nested_offset=0.5),
            "up.weight.absmax: F32 [8], expected U8 [8]",
        ),
        (
            lambda t: t.update({STATE.replace("nf4", "nf3"): t.pop(STATE)}),
            "is of type 'nf3'; known are nf4, fp4",
        ),
    ],
)
def test_damaged_states_are_rejected(change: Change, words: str, tmp_path: Path) -> None:
    tensors, _ = table((8, 64))
    change(tensors)
    source = write_quantized(tmp_path / "source", tensors, BLOCK)
    assert words in rejection(source, tmp_path / "out")


DAMAGED = """
- up.weight.absmax -> up.weight: has no up.weight.absmax
- up.weight.quant_map -> up.weight: has no up.weight.quant_map
- up.weight -> describes up.weight, which is missing
up.weight.quant_map = F32 [15] -> up.weight.quant_map: F32 [15], expected F32 [16]
gate.weight = I8 [8, 64]
    gate.weight: I8 [8, 64] holds codes, but has no scale next to it; a layer of bitsandbytes is
    of bitsandbytes is gate.weight with gate.SCB
gate.weight = I8 [8, 64]; gate.SCB = F32 [7] 1 -> gate.SCB: F32 [7], expected F32 [8]
gate.SCB = F32 [8] 1 -> gate.SCB: has no gate.weight next to it
gate.weight = I8 [8, 64]; gate.SCB = F32 [8] 1; gate.weight_format = U8 [] 2
    gate.weight_format: is [2] (col_turing), expected 0
gate.weight = F16 [8, 64]; gate.SCB = F32 [8] 1
    gate.weight: F16 [8, 64] next to gate.SCB, expected I8
"""


@pytest.mark.parametrize(("changes", "words"), damages(DAMAGED))
def test_damaged_folders_are_rejected(changes: str, words: list[str], tmp_path: Path) -> None:
    tensors, _ = table((8, 64))
    damage(changes, tensors)
    text = rejection(write_quantized(tmp_path / "source", tensors, BLOCK), tmp_path / "out")
    assert all(word in text for word in words), text
