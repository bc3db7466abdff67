"""MLX folders whose config and tensors contradict each other: rejected by name, with a way out."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.conversions import rejection
from tests.support.damage import damage, damages
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


PROBLEMS = """
up: false
    config.json: quantization.up: is false, yet up.scales is in the checkpoint
    say the group_size and bits of its codes there, or remove the scales
group_size: 48
    config.json: quantization (up):
    48
up.weight = I32 [8, 8] -> up.weight: I32 [8, 8], expected U32 of rank 2 or more next to up.scales
up.weight = U32 [8, 7]
    up.weight: U32 [8, 7]: 7 words hold no whole number of groups of 32 at 4 bits
up.scales = BF16 [8, 3] 1; up.biases = BF16 [4, 2] 1
    up.scales: BF16 [8, 3], expected F
    up.biases: BF16 [4, 2], expected F
- up.biases -> up.biases: is missing (mode affine)
up.global_scale = F32 [1] 1
    up.global_scale: must not be there: affine has no global scale
"""
NVFP4_PROBLEMS = """
up.biases = BF16 [8, 4] 1 -> up.biases: must not be there: nvfp4 has scales only
up.global_scale = F32 [2] 1 -> up.global_scale: F32 [2], expected one F32$
"""
STACKED = """
up.global_scale = F32 [2] 1
    up.global_scale: F32 [2], expected one F32, or one for each of 3 experts
"""


def check(
    tensors: Tensors, block: dict[str, Any], changes: str, words: list[str], to: Path
) -> None:
    block = dict(block)
    damage(changes, tensors, block)
    folder = to / "source"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization": block}))
    write_file(folder / "model.safetensors", tensors)
    text = rejection(folder, to / "out").replace("\n", "$\n") + "$"
    assert all(word in text for word in words), text


@pytest.mark.parametrize(("changes", "words"), damages(PROBLEMS))
def test_what_is_wrong_is_named(changes: str, words: list[str], tmp_path: Path) -> None:
    check(affine(), AFFINE, changes, words, tmp_path)


@pytest.mark.parametrize(("changes", "words"), damages(NVFP4_PROBLEMS))
def test_what_is_wrong_in_nvfp4_is_named(changes: str, words: list[str], tmp_path: Path) -> None:
    check(nvfp4(), NVFP4, changes, words, tmp_path)


@pytest.mark.parametrize(("changes", "words"), damages(STACKED))
def test_what_is_wrong_in_a_stack_is_named(changes: str, words: list[str], tmp_path: Path) -> None:
    check(nvfp4(3), NVFP4, changes, words, tmp_path)
