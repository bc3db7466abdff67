"""Broken compressed-tensors folders: every fault is named, and nothing is written."""

from pathlib import Path

import numpy as np
import pytest

from tests.support.checkpoints import write_quantized
from tests.support.conversions import convert, rejection
from tests.support.damage import damage, damages
from tests.support.layers.compressed_tensors import Tensors, block, packed
from tests.support.number_formats import BF16, e4m3


def good() -> Tensors:
    zeros = np.zeros((8, 2), int)
    return packed(np.zeros((8, 64), int), 4, np.ones((8, 2), BF16), zeros) | {
        "norm.weight": np.ones(64, BF16)
    }


DAMAGED = """
- up.weight_scale -> up: up.weight_packed has no weight_scale next to it
- up.weight_packed
    up.weight_scale: BF16 [8, 2] has no codes next to it, nor has up.weight_shape
- up.weight_zero_point
    up: has no weight_zero_point
    group_0.weights is not symmetric
up.weight_packed = I32 [8, 7]
    up.weight_packed: I32 [8, 7]: 7 words do not hold 64 inputs of 4 bits, expected 8
up.weight_shape = I64 [2] 64 -> up.weight_shape: says [64, 64], but up.weight_packed is I32 [8, 8]
up.weight_shape = I64 [4] 8 -> up.weight_shape: I64 [4], expected two whole numbers
up.weight_shape = F32 [1] 1 -> up.weight_shape: F32 [1], expected two whole numbers
up.weight_scale = BF16 [8, 4] 1
    up.weight_scale: BF16 [8, 4], expected [8, 2]
    group_size 32
up.weight_scale = BF16 [4, 2] 1 -> up.weight_scale: BF16 [4, 2], expected [8, 2]
up.weight_scale = I32 [8, 2] 1 -> up.weight_scale: I32 [8, 2], expected floats
- up.weight_shape; config_groups.group_0.weights.num_bits: 0
    up: has no weight_shape, and the config does not give its inputs
up.weight_zero_point = I32 [2, 2]
    up.weight_zero_point: I32 [2, 2], expected I32 [1, 2] or I8 [8, 2] for 4 bits
up.weight_g_idx = I32 [63] -> up.weight_g_idx: I32 [63], expected I32 [64]
up.weight_g_idx = I32 [64] 63 -> up.weight_g_idx: names groups 63 to 63, but there are 2
up.weight = BF16 [8, 64] 1 -> up: has both weight_packed and weight
down.weight_scale = BF16 [8, 1] 1 -> down.weight_scale: BF16 [8, 1] has no codes next to it
format: "pack-quantised" -> quantization_config.format: is 'pack-quantised'; known are dense
format: "marlin-24" -> quantization_config.format: is 'marlin-24': 2:4-sparse
down.scale_packed = F16 [2, 8] 1 -> down.scale_packed: is a part of marlin-24
sparsity_config: {"format": "sparse-24-bitmask"}
    sparsity_config.format: is 'sparse-24-bitmask': values without their zeros
ignore: ["re:(["] -> ignore: '([' is not a valid regular expression
config_groups.w4a99x: ["Linear"]
    config_groups.w4a99x: 'w4a99x' is not a preset
    correct the name, or give the scheme
config_groups.group_0.weights.num_bits: "four"
    group_0.weights.num_bits: is 'four', expected a whole number
config_groups.group_0.weights.block_structure: "128by128"
    block_structure: is '128by128', expected [rows, columns]
down.weight = F8_E4M3 [4, 32] 1
    down.weight: F8_E4M3 [4, 32] has no scale next to it
    with down.weight_scale
down.weight_packed = U8 [4, 32]; down.weight_scale = U8 [4, 3]
    down.weight_packed: U8 [4, 32] with a weight_scale U8 [4, 3] is neither nvfp4
down.weight_packed = U8 [4, 32]; down.weight_scale = F8_E4M3 [4, 4] 1
    down: has E4M3 scales of NVFP4, but no weight_global_scale
ROTATION
    transform_config.config_groups.v: rotates at location 'input'
NVFP4; down.weight_global_scale = F32 [1]
    down.weight_global_scale: holds 0.0, expected a finite number above 0
"""
LONG = {
    "ROTATION": 'transform_config: {"config_groups": {"v": {"type": "hadamard", "apply": '
    '[{"targets": ["Linear"], "location": "input"}]}}}',
    "NVFP4": "down.weight_packed = U8 [4, 32]; down.weight_scale = F8_E4M3 [4, 4] 1",
}


@pytest.mark.parametrize(("changes", "words"), damages(DAMAGED))
def test_corrupted_folders_are_rejected(changes: str, words: list[str], tmp_path: Path) -> None:
    tensors, config = good(), block(group_size=32, symmetric=False)
    for name, written in LONG.items():
        changes = changes.replace(name, written)
    damage(changes, tensors, config)
    text = rejection(write_quantized(tmp_path / "source", tensors, config), tmp_path / "out")
    assert all(word in text for word in words), text


def test_the_folder_before_it_was_corrupted(tmp_path: Path) -> None:
    convert(
        write_quantized(tmp_path / "s", good(), block(group_size=32, symmetric=False)),
        tmp_path / "o",
    )


def test_layouts_that_only_the_version_tells(tmp_path: Path) -> None:
    """60 inputs of 3 bits are six words in both layouts."""
    signed = (np.arange(60) % 8 - 4).reshape(1, 60)
    for padded, version in ((True, "0.9.4"), (False, "0.20.0")):
        tensors = packed(signed, 3, np.ones((1, 1), BF16), padded=padded)
        assert tensors["up.weight_packed"].shape == (1, 6)
        config = block(num_bits=3, strategy="channel")
        folder = write_quantized(tmp_path / f"s{padded}", tensors, config)
        text = rejection(folder, tmp_path / "none")
        assert "up.weight_packed: I32 [1, 6] may hold 60 inputs of 3 bits" in text
        folder = write_quantized(tmp_path / version, tensors, config | {"version": version})
        out, _ = convert(folder, tmp_path / f"o{padded}")
        assert out["up.weight"].astype(int).tolist() == signed.tolist()


def test_codes_beyond_their_width(tmp_path: Path) -> None:
    tensors = {"up.weight": np.full((2, 64), 9, np.int8), "up.weight_scale": np.ones((2, 1), BF16)}
    config = block("int-quantized", num_bits=4, strategy="channel")
    text = rejection(write_quantized(tmp_path / "source", tensors, config), tmp_path / "out")
    assert "up: its codes are 9, but the config says 4 bits: -8 to 7" in text


def test_every_problem_is_named_at_once(tmp_path: Path) -> None:
    tensors = good()
    del tensors["up.weight_scale"]
    tensors["down.weight"] = e4m3(4, 32)
    text = rejection(
        write_quantized(tmp_path / "source", tensors, block(format="x")), tmp_path / "out"
    )
    assert all(word in text for word in ("up: ", "down.weight: ", ".format: is 'x'"))


# Of three layers of one shape, what differs in the last -> what the plan says of it.
UNLIKE = """
c.weight_shape = I64 [2] 64 -> c.weight_shape: says [64, 64], but c.weight_packed is I32 [8, 8]
c.weight_shape = F32 [2] 1 -> c.weight_shape: F32 [2], expected two whole numbers
c.weight_scale = F16 [8, 4] 1 -> c.weight_scale: F16 [8, 4], expected [8, 2]
c.weight_g_idx = I32 [64] 63 -> c.weight_g_idx: names groups 63 to 63, but there are 2
- c.weight_zero_point -> c: has no weight_zero_point
"""


def alike() -> Tensors:
    layer = {name: array for name, array in good().items() if name.startswith("up.")}
    return {
        f"{path}.{name.removeprefix('up.')}": array.copy()
        for path in "abc"
        for name, array in layer.items()
    }


@pytest.mark.parametrize(("changes", "words"), damages(UNLIKE))
def test_a_layer_unlike_those_before_it(changes: str, words: list[str], tmp_path: Path) -> None:
    """Layers of one kind are described once; each is compared with its own tensors all the same."""
    tensors, config = alike(), block(group_size=32, symmetric=False)
    damage(changes, tensors, config)
    text = rejection(write_quantized(tmp_path / "source", tensors, config), tmp_path / "out")
    assert all(word in text for word in words), text
    assert "a.weight" not in text and "b.weight" not in text


def test_layers_of_one_kind_have_their_own_tensors(tmp_path: Path) -> None:
    tensors = alike()
    for number, path in enumerate("abc"):
        tensors[f"{path}.weight_packed"][:] = 0x11111111 * number
    config = block(group_size=32, symmetric=False)
    out, _ = convert(write_quantized(tmp_path / "s", tensors, config), tmp_path / "o")
    codes = [set((out[f"{path}.weight"].view(np.uint32) & 15).ravel().tolist()) for path in "abc"]
    assert codes == [{0}, {1}, {2}]
