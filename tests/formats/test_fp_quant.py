"""FP-Quant: what is not rotated is read; what is rotated is rejected by name."""

from pathlib import Path

import numpy as np
import pytest

import requant
from tests.support.checkpoints import write_quantized
from tests.support.conversions import dequantized, rejection
from tests.support.damage import damage, damages
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
    assert np.array_equal(
        dequantized(source, tmp_path / "dense", chunk_bytes=1)["up.weight"], values
    )
    report = requant.convert(source, tmp_path / "out", layout="keep")
    made, found = read_folder(tmp_path / "out"), report.plan.layers[0]
    assert found.exactness == ("exact" if divisor == 1 else "re-encoded")
    if divisor == 1:
        same_in_memory(source, tmp_path / "out")
        spec = {"group_size": 16 if nvfp4 else 32, "bits": 4, "mode": mode}
        assert np.array_equal(float_values(made, "up", spec), values)
        assert made["up.weight"].tobytes() == tensors["up.qweight"].tobytes()
    assert {name.rpartition(".")[2] for name in made} <= {"weight", "scales", "biases"}


DAMAGED = """
up.forward_hadamard_matrix = BF16 [4, 5] 1
    up.forward_hadamard_matrix: BF16 [4, 5], expected a square matrix of floats
- up.forward_hadamard_matrix; transform_init: "gsr"
    transform_init: is 'gsr': weights are stored rotated
forward_dtype: "mxfp8" -> forward_dtype: is 'mxfp8'; read are
- up.scales -> up.qweight: has no up.scales next to it
- up.weight_global_scale -> up.qweight: has no up.weight_global_scale next to it
- up.qweight -> up.scales: U8 [6, 4] has no codes next to it
up.scales = U8 [128, 4] -> up.scales: U8 [128, 4], expected U8 [6, 4], unpadded
up.qweight = I32 [6, 64] -> up.qweight: I32 [6, 64], expected U8
up.weight_global_scale = BF16 [1]
    up.weight_global_scale: holds 0.0, expected a finite number above 0
up.weight_global_scale = BF16 [2] 1 -> up.weight_global_scale: BF16 [2], expected one float
gate.dqweight = BF16 [6, 128] -> gate.dqweight: holds values of a rotated weight
"""


@pytest.mark.parametrize(("changes", "words"), damages(DAMAGED))
def test_what_is_not_read_is_rejected(changes: str, words: list[str], tmp_path: Path) -> None:
    tensors, _ = layer()
    config = block()
    damage(changes, tensors, config)
    text = rejection(write_quantized(tmp_path / "source", tensors, config), tmp_path / "out")
    assert all(word in text for word in words), text


def test_a_rotation_of_the_weight_is_rejected(tmp_path: Path) -> None:
    tensors, _ = layer()
    tensors["up.forward_hadamard_matrix"] = np.eye(32)[::-1].astype(BF16)
    text = rejection(write_quantized(tmp_path / "source", tensors, block()), tmp_path / "out")
    assert "up.forward_hadamard_matrix: rotates the weight of up" in text
