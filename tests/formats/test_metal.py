"""transformers' metal layers: an exact rename, groups that are repeated, and rejections."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import requant
from tests.support.checkpoints import write_quantized
from tests.support.conversions import convert, dequantized, rejection
from tests.support.layers.metal import block, layer
from tests.support.mlx_reference import affine
from tests.support.number_formats import BF16
from tests.support.safetensors_files import read_folder


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_qbiases_are_biases(bits: int, tmp_path: Path) -> None:
    """The same bytes under MLX's names, from a folder and in memory."""
    tensors, _, _ = layer(8, 128, bits, 64)
    tensors["up.bias"] = np.ones(8, BF16)
    source = write_quantized(tmp_path / "source", tensors, block(bits))
    made, report = convert(source, tmp_path / "out", chunk_bytes=1)
    assert made.keys() == {"up.weight", "up.scales", "up.biases", "up.bias"}
    assert made["up.weight"].tobytes() == tensors["up.weight"].tobytes()
    assert made["up.scales"].tobytes() == tensors["up.scales"].tobytes()
    assert made["up.biases"].tobytes() == tensors["up.qbiases"].tobytes()
    assert {x.exactness for x in report.plan.layers} == {"exact"}
    memory, quantization = requant.transform_weights(tensors, block(bits))
    assert quantization.quantization == requant.Quantization.affine(64, bits)
    assert all(memory[name].tobytes() == made[name].tobytes() for name in made)


@pytest.mark.slow
@settings(max_examples=30)
@given(
    rows=st.integers(1, 9),
    groups=st.integers(1, 4),
    group=st.sampled_from([8, 16, 32, 96, 128, 256]),
    bits=st.sampled_from([2, 4, 8]),
)
def test_any_group(rows: int, groups: int, group: int, bits: int, tmp_path_factory: Any) -> None:
    """Repeated where a group of MLX's divides it; decoded and requantized elsewhere."""
    tmp_path = tmp_path_factory.mktemp("metal")
    columns = 32 * group * groups // np.gcd(32, group)
    tensors, codes, values = layer(rows, columns, bits, group)
    source = write_quantized(tmp_path / "source", tensors, block(bits, group))
    assert np.array_equal(
        dequantized(source, tmp_path / "dense", chunk_bytes=1)["up.weight"], values
    )
    (found,) = requant.convert(source, tmp_path / "out", layout="keep").plan.layers
    assert found.exactness == ("re-encoded" if group < 32 else "exact")
    if group >= 32:
        mlx = {96: 32, 256: 128}.get(group, group)
        got = affine(read_folder(tmp_path / "out"), "up", mlx, bits)
        assert np.array_equal(got.codes, codes)
        assert np.array_equal(got.values.astype(np.float32), values)


def test_a_narrower_dtype_rounds(tmp_path: Path) -> None:
    tensors, _, _ = layer(4, 64, 4, 64, np.float32)
    source = write_quantized(tmp_path / "source", tensors, block())
    (found,) = requant.convert(source, tmp_path / "out", layout="keep").plan.layers
    words = "scales and biases rounded to bfloat16, relative error at most 0.0039"
    assert found.bound == words


Change = Callable[[dict[str, Any], dict[str, Any]], Any]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t, b: t.pop("up.weight"), "up: has no up.weight next to its scales, qbiases"),
        (lambda t, b: t.pop("up.scales"), "up: has no up.scales"),
        (lambda t, b: t.pop("up.qbiases"), "up: has no up.qbiases"),
        (
            lambda t, b: (t.pop("up.qbiases"), t.pop("up.scales")),
            "up.weight: U32 [4, 16] holds codes, but has no scale next to it",
        ),
        (lambda t, b: b.update(bits=3), "bits: is 3, expected 2, 4 or 8"),
        (lambda t, b: b.update(bits="4"), "bits: is '4', expected a whole number"),
        (lambda t, b: b.update(group_size=0), "group_size: is 0, expected a count of inputs"),
        (lambda t, b: b.update(group_size=48), "holds 128 inputs of 4 bits, no multiple of 48"),
        (lambda t, b: b.update(group_size=32), "up.scales: BF16 [4, 2], expected floats [4, 4]"),
        (lambda t, b: b.update(bits=8), "up.scales: BF16 [4, 2], expected floats [4, 1]"),
        (
            lambda t, b: t.update({"up.weight": np.zeros((4, 128), np.float16)}),
            "up.weight: F16 [4, 128], expected U32",
        ),
        (
            lambda t, b: t.update({"up.qbiases": t["up.qbiases"].astype(np.float16)}),
            "up.qbiases: F16 [4, 2], expected BF16 as its scales",
        ),
    ],
)
def test_damaged_folders_are_rejected(change: Change, words: str, tmp_path: Path) -> None:
    tensors, _, _ = layer(4, 128, 4, 64)
    config = block()
    change(tensors, config)
    source = write_quantized(tmp_path / "source", tensors, config)
    assert words in rejection(source, tmp_path / "out")
