"""FP-Quant: what is not rotated is read; what is rotated is rejected by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import requant
from tests.support.checkpoints import write_quantized
from tests.support.conversions import rejection
from tests.support.fixture_checks import same_in_memory
from tests.support.layers.fp_quant import block, layer
from tests.support.mlx_reference import float_values
from tests.support.number_formats import BF16
from tests.support.safetensors_files import read_folder


@pytest.mark.parametrize("nvfp4", [False, True])
@pytest.mark.parametrize("divisor", [1, 3])
def test_identity_is_read(nvfp4: bool, divisor: float, tmp_path: Path) -> None:
    """A global scale of 1 leaves the bytes; 3 fits no mode of MLX."""
    mode = "nvfp4" if nvfp4 else "mxfp4"
    tensors, values = layer(divisor, nvfp4)
    source = write_quantized(tmp_path / "source", tensors, block(mode))
    requant.convert(
        source, tmp_path / "dense", layout="keep", dequantize=True, dtype="float32", chunk_bytes=1
    )
    assert np.array_equal(read_folder(tmp_path / "dense")["up.weight"], values)
    report = requant.convert(source, tmp_path / "out", layout="keep")
    made, found = read_folder(tmp_path / "out"), report.plan.layers[0]
    assert found.exactness == ("exact" if divisor == 1 else "re-encoded")
    if divisor == 1:
        same_in_memory(source, tmp_path / "out")
        spec = {"group_size": 16 if nvfp4 else 32, "bits": 4, "mode": mode}
        assert np.array_equal(float_values(made, "up", spec), values)
        assert made["up.weight"].tobytes() == tensors["up.qweight"].tobytes()
    assert {name.rpartition(".")[2] for name in made} <= {"weight", "scales", "biases"}


Change = Callable[[dict[str, Any], dict[str, Any]], Any]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda t, b: t.update({"up.forward_hadamard_matrix": np.eye(32)[::-1].astype(BF16)}),
            "up.forward_hadamard_matrix: rotates the weight of up",
        ),
        (
            lambda t, b: t.update({"up.forward_hadamard_matrix": np.ones((4, 5), BF16)}),
            "up.forward_hadamard_matrix: BF16 [4, 5], expected a square matrix of floats",
        ),
        (
            lambda t, b: (t.pop("up.forward_hadamard_matrix"), b.update(transform_init="gsr")),
            "transform_init: is 'gsr': weights are stored rotated",
        ),
        (lambda t, b: b.update(forward_dtype="mxfp8"), "forward_dtype: is 'mxfp8'; read are"),
        (lambda t, b: t.pop("up.scales"), "up.qweight: has no up.scales next to it"),
        (
            lambda t, b: t.pop("up.weight_global_scale"),
            "up.qweight: has no up.weight_global_scale next to it",
        ),
        (lambda t, b: t.pop("up.qweight"), "up.scales: U8 [6, 4] has no codes next to it"),
        (
            lambda t, b: t.update({"up.scales": np.zeros((128, 4), np.uint8)}),
            "up.scales: U8 [128, 4], expected U8 [6, 4], unpadded",
        ),
        (
            lambda t, b: t.update({"up.qweight": np.zeros((6, 64), np.int32)}),
            "up.qweight: I32 [6, 64], expected U8",
        ),
        (
            lambda t, b: t.update({"up.weight_global_scale": np.zeros(1, BF16)}),
            "up.weight_global_scale: holds 0.0, expected a finite number above 0",
        ),
        (
            lambda t, b: t.update({"up.weight_global_scale": np.ones(2, BF16)}),
            "up.weight_global_scale: BF16 [2], expected one float",
        ),
        (
            lambda t, b: t.update({"gate.dqweight": np.zeros((6, 128), BF16)}),
            "gate.dqweight: holds values of a rotated weight",
        ),
    ],
)
def test_what_is_not_read_is_rejected(change: Change, words: str, tmp_path: Path) -> None:
    tensors, _ = layer()
    config = block()
    change(tensors, config)
    source = write_quantized(tmp_path / "source", tensors, config)
    assert words in rejection(source, tmp_path / "out")
