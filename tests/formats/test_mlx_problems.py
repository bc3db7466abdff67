"""MLX folders whose config and tensors contradict each other: rejected by name, with a way out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.conversions import rejection
from tests.support.number_formats import BF16
from tests.support.safetensors_files import write_file

Tensors = dict[str, np.ndarray]
Change = Callable[[Tensors, dict[str, Any]], object]

AFFINE = {"group_size": 32, "bits": 4, "mode": "affine"}
NVFP4 = {"group_size": 16, "bits": 4, "mode": "nvfp4"}


def affine() -> Tensors:
    """A layer of 8 outputs and 64 inputs."""
    return {
        "up.weight": np.zeros((8, 8), np.uint32),
        "up.scales": np.ones((8, 2), BF16),
        "up.biases": np.ones((8, 2), BF16),
    }


def nvfp4(*leading: int) -> Tensors:
    """The same, or a stack of such."""
    return {
        "up.weight": np.zeros((*leading, 8, 8), np.uint32),
        "up.scales": np.full((*leading, 8, 4), 0x38, np.uint8),
        "up.global_scale": np.ones(leading or (1,), np.float32),
    }


def change(name: str, array: np.ndarray) -> Change:
    return lambda tensors, block: tensors.update({f"up.{name}": array})


PROBLEMS: dict[str, tuple[Tensors, dict[str, Any], Change, tuple[str, ...]]] = {
    "called dense": (
        affine(),
        AFFINE,
        lambda tensors, block: block.update({"up": False}),
        (
            "config.json: quantization.up: is false, yet up.scales is in the checkpoint",
            "say the group_size and bits of its codes there, or remove the scales",
        ),
    ),
    "a group that MLX has not": (
        affine(),
        AFFINE,
        lambda tensors, block: block.update({"group_size": 48}),
        ("config.json: quantization (up): ", "48"),
    ),
    "no words": (
        affine(),
        AFFINE,
        change("weight", np.zeros((8, 8), np.int32)),
        ("up.weight: I32 [8, 8], expected U32 of rank 2 or more next to up.scales",),
    ),
    "a ragged row": (
        affine(),
        AFFINE,
        change("weight", np.zeros((8, 7), np.uint32)),
        ("up.weight: U32 [8, 7]: 7 words hold no whole number of groups of 32 at 4 bits",),
    ),
    "scales and biases of another layer": (
        affine(),
        AFFINE,
        lambda tensors, block: tensors.update(
            {"up.scales": np.ones((8, 3), BF16), "up.biases": np.ones((4, 2), BF16)}
        ),
        ("up.scales: BF16 [8, 3], expected F", "up.biases: BF16 [4, 2], expected F"),
    ),
    "no biases": (
        affine(),
        AFFINE,
        lambda tensors, block: tensors.pop("up.biases"),
        ("up.biases: is missing (mode affine)",),
    ),
    "biases too many": (
        nvfp4(),
        NVFP4,
        change("biases", np.ones((8, 4), BF16)),
        ("up.biases: must not be there: nvfp4 has scales only",),
    ),
    "a global scale of affine codes": (
        affine(),
        AFFINE,
        change("global_scale", np.ones(1, np.float32)),
        ("up.global_scale: must not be there: affine has no global scale",),
    ),
    "two global scales of one matrix": (
        nvfp4(),
        NVFP4,
        change("global_scale", np.ones(2, np.float32)),
        ("up.global_scale: F32 [2], expected one F32\n",),
    ),
    "two global scales of three experts": (
        nvfp4(3),
        NVFP4,
        change("global_scale", np.ones(2, np.float32)),
        ("up.global_scale: F32 [2], expected one F32, or one for each of 3 experts",),
    ),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_what_is_wrong_is_named(name: str, tmp_path: Path) -> None:
    tensors, block, edit, words = PROBLEMS[name]
    tensors, block = dict(tensors), dict(block)
    edit(tensors, block)
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization": block}))
    write_file(folder / "model.safetensors", tensors)
    text = rejection(folder, tmp_path / "out") + "\n"
    assert all(word in text for word in words), text
