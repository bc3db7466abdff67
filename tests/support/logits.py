"""Run a converted fixture in mlx-lm and compare with the tool's own dense weights."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.utils import load_model

import requant
from tests.support.checkpoints import write_checkpoint
from tests.support.fixture_folders import fixture
from tests.support.safetensors_files import read_file

TOKENS = mx.array([[3, 1, 4, 15, 9, 26, 5, 35]])


def logits(folder: Path) -> np.ndarray:
    """What mlx-lm's model makes of a few tokens, all floats in float32."""
    with mx.stream(mx.cpu):
        model, _ = load_model(folder)
        model.set_dtype(mx.float32)
        return np.array(model(TOKENS).astype(mx.float32))


def dense_folder(name: str, folder: Path) -> Path:
    """The fixture's model with the tool's own values in place of codes."""
    source = fixture(name)
    expected = read_file(source / "expected.safetensors")
    values = {key: value for key, value in expected.items() if not key.endswith("rotated_weight")}
    own = tuple(f"{key.removesuffix('.weight')}{end}" for key in values for end in "._")
    kept = {
        key: array
        for key, array in read_file(source / "checkpoint" / "model.safetensors").items()
        if not key.startswith(own) or key.endswith("bias")
    }
    config = json.loads((source / "checkpoint" / "config.json").read_text())
    del config["quantization_config"]
    return write_checkpoint(folder, kept | values, config)


def check_logits(name: str, tmp_path: Path, largest: float, **options: Any) -> None:
    """Hold logits of the converted fixture against those of the tool's dense weights.

    Args:
        name: The fixture.
        tmp_path: Where outputs go.
        largest: The largest difference, relative to the largest logit. With scales in
            float32 nothing rounds but sums of products.
        **options: For ``requant.convert``.
    """
    wanted = logits(dense_folder(name, tmp_path / "dense"))
    requant.convert(fixture(name) / "checkpoint", tmp_path / "out", **options)
    error = np.abs(logits(tmp_path / "out") - wanted).max() / np.abs(wanted).max()
    assert error <= largest, error
