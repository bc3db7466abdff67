"""Broken compressed-tensors folders: every fault is named, and nothing is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.checkpoints import write_quantized
from tests.support.conversions import convert, rejection
from tests.support.layers.compressed_tensors import Tensors, block, packed
from tests.support.number_formats import BF16, e4m3


def good() -> Tensors:
    zeros = np.zeros((8, 2), int)
    return packed(np.zeros((8, 64), int), 4, np.ones((8, 2), BF16), zeros) | {
        "norm.weight": np.ones(64, BF16)
    }


def without(*names: str) -> Callable[[Tensors, dict[str, Any]], None]:
    def change(tensors: Tensors, config: dict[str, Any]) -> None:
        for name in names:
            del tensors[name]

    return change


def with_tensor(name: str, array: np.ndarray) -> Callable[[Tensors, dict[str, Any]], None]:
    def change(tensors: Tensors, config: dict[str, Any]) -> None:
        tensors[name] = array

    return change


def with_key(*path: str, value: Any) -> Callable[[Tensors, dict[str, Any]], None]:
    def change(tensors: Tensors, config: dict[str, Any]) -> None:
        *outer, last = path
        for key in outer:
            config = config[key]
        config[last] = value

    return change


def rotates(tensors: Tensors, config: dict[str, Any]) -> None:
    use = {"targets": ["Linear"], "location": "input"}
    config["transform_config"] = {"config_groups": {"v": {"type": "hadamard", "apply": [use]}}}


WEIGHTS = ("config_groups", "group_0", "weights")
CORRUPTIONS: dict[str, tuple[Callable[[Tensors, dict[str, Any]], None], tuple[str, ...]]] = {
    "no scale": (
        without("up.weight_scale"),
        ("up: up.weight_packed has no weight_scale next to it",),
    ),
    "no codes": (
        without("up.weight_packed"),
        ("up.weight_scale: BF16 [8, 2] has no codes next to it, nor has up.weight_shape",),
    ),
    "no zero points": (
        without("up.weight_zero_point"),
        ("up: has no weight_zero_point", "group_0.weights is not symmetric"),
    ),
    "a word short": (
        with_tensor("up.weight_packed", np.zeros((8, 7), np.int32)),
        ("up.weight_packed: I32 [8, 7]: 7 words do not hold 64 inputs of 4 bits, expected 8",),
    ),
    "shape of another layer": (
        with_tensor("up.weight_shape", np.array([16, 64])),
        ("up.weight_shape: says [16, 64], but up.weight_packed is I32 [8, 8]",),
    ),
    "shape that is none": (
        with_tensor("up.weight_shape", np.array([8, 64, 8, 64])),
        ("up.weight_shape: I64 [4], expected two whole numbers",),
    ),
    "shape of another kind": (
        with_tensor("up.weight_shape", np.ones(1, np.float32)),
        ("up.weight_shape: F32 [1], expected two whole numbers",),
    ),
    "scale of another group": (
        with_tensor("up.weight_scale", np.ones((8, 4), BF16)),
        ("up.weight_scale: BF16 [8, 4], expected [8, 2]", "group_size 32"),
    ),
    "scale of another layer": (
        with_tensor("up.weight_scale", np.ones((4, 2), BF16)),
        ("up.weight_scale: BF16 [4, 2], expected [8, 2]",),
    ),
    "integer scale": (
        with_tensor("up.weight_scale", np.ones((8, 2), np.int32)),
        ("up.weight_scale: I32 [8, 2], expected floats",),
    ),
    "no shape, and a width of 0": (
        lambda tensors, config: (
            tensors.pop("up.weight_shape"),
            config["config_groups"]["group_0"]["weights"].update({"num_bits": 0}),
        )[-1],
        ("up: has no weight_shape, and the config does not give its inputs",),
    ),
    "zero points of another width": (
        with_tensor("up.weight_zero_point", np.zeros((2, 2), np.int32)),
        ("up.weight_zero_point: I32 [2, 2], expected I32 [1, 2] or I8 [8, 2] for 4 bits",),
    ),
    "g_idx short": (
        with_tensor("up.weight_g_idx", np.zeros(63, np.int32)),
        ("up.weight_g_idx: I32 [63], expected I32 [64]",),
    ),
    "g_idx beyond the groups": (
        with_tensor("up.weight_g_idx", np.arange(64, dtype=np.int32)),
        ("up.weight_g_idx: names groups 0 to 63, but there are 2",),
    ),
    "two copies": (
        with_tensor("up.weight", np.ones((8, 64), BF16)),
        ("up: has both weight_packed and weight",),
    ),
    "never compressed": (
        with_tensor("down.weight_scale", np.ones((8, 1), BF16)),
        ("down.weight_scale: BF16 [8, 1] has no codes next to it",),
    ),
    "unknown format": (
        with_key("format", value="pack-quantised"),
        ("quantization_config.format: is 'pack-quantised'; known are dense",),
    ),
    "marlin-24": (
        with_key("format", value="marlin-24"),
        ("quantization_config.format: is 'marlin-24': 2:4-sparse",),
    ),
    "marlin-24 tensors": (
        with_tensor("down.scale_packed", np.ones((2, 8), np.float16)),
        ("down.scale_packed: is a part of marlin-24",),
    ),
    "sparse": (
        with_key("sparsity_config", value={"format": "sparse-24-bitmask"}),
        ("sparsity_config.format: is 'sparse-24-bitmask': values without their zeros",),
    ),
    "online rotation": (
        rotates,
        ("transform_config.config_groups.v: rotates at location 'input'",),
    ),
    "pattern that is none": (
        with_key("ignore", value=["re:(["]),
        ("ignore: '([' is not a valid regular expression",),
    ),
    "preset that is none": (
        lambda tensors, config: config["config_groups"].update({"w4a99x": ["Linear"]}),
        ("config_groups.w4a99x: 'w4a99x' is not a preset", "correct the name, or give the scheme"),
    ),
    "bits that are none": (
        with_key(*WEIGHTS, "num_bits", value="four"),
        ("group_0.weights.num_bits: is 'four', expected a whole number",),
    ),
    "block that is none": (
        with_key(*WEIGHTS, "block_structure", value="128by128"),
        ("block_structure: is '128by128', expected [rows, columns]",),
    ),
    "fp8 without a scale": (
        with_tensor("down.weight", e4m3(4, 32)),
        ("down.weight: F8_E4M3 [4, 32] has no scale next to it", "with down.weight_scale"),
    ),
    "fp4 that is neither": (
        lambda tensors, config: tensors.update(
            {
                "down.weight_packed": np.zeros((4, 32), np.uint8),
                "down.weight_scale": np.zeros((4, 3), np.uint8),
            }
        ),
        ("down.weight_packed: U8 [4, 32] with a weight_scale U8 [4, 3] is neither nvfp4",),
    ),
    "nvfp4 without its tensor scale": (
        lambda tensors, config: tensors.update(
            {"down.weight_packed": np.zeros((4, 32), np.uint8), "down.weight_scale": e4m3(4, 4)}
        ),
        ("down: has E4M3 scales of NVFP4, but no weight_global_scale",),
    ),
    "nvfp4 with a tensor scale of 0": (
        lambda tensors, config: tensors.update(
            {
                "down.weight_packed": np.zeros((4, 32), np.uint8),
                "down.weight_scale": e4m3(4, 4),
                "down.weight_global_scale": np.zeros(1, np.float32),
            }
        ),
        ("down.weight_global_scale: holds 0.0, expected a finite number above 0",),
    ),
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corrupted_folders_are_rejected(name: str, tmp_path: Path) -> None:
    change, words = CORRUPTIONS[name]
    tensors, config = good(), block(group_size=32, symmetric=False)
    change(tensors, config)
    text = rejection(write_quantized(tmp_path / "source", tensors, config), tmp_path / "out")
    for word in words:
        assert word in text


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
