"""Run a converted fixture in mlx-lm and compare with the tool's own dense weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.utils import load_model

import requant
from tests.formats.harness import fixture, read_file

TOKENS = [[1, 5, 9, 17, 33, 2, 40, 11]]


def logits(folder: Path) -> np.ndarray:
    """Next-token logits of a folder, as mlx-lm loads it."""
    model, _ = load_model(folder)
    return np.array(model(mx.array(TOKENS)).astype(mx.float32))


def expected_logits(name: str, tmp_path: Path) -> np.ndarray:
    """The same of the tool's dense float32 weights, put into a dense twin of the fixture."""
    twin = tmp_path / "twin"
    requant.convert(
        fixture(name) / "checkpoint", twin, dequantize=True, dtype="float32", layout="keep"
    )
    weights = mx.load(str(twin / "model.safetensors"))
    for key, value in read_file(fixture(name) / "expected.safetensors").items():
        if key in weights:
            weights[key] = mx.array(value)
    mx.save_safetensors(str(twin / "model.safetensors"), weights)
    found = logits(twin)
    shutil.rmtree(twin)
    return found


def check_logits(name: str, tmp_path: Path, largest: float, **wishes: Any) -> None:
    """Hold logits of the converted fixture against the dense ones.

    Args:
        name: The fixture.
        tmp_path: Where outputs go.
        largest: The largest difference, relative to the largest logit. With scales in
            float32 nothing rounds but sums of products.
        **wishes: For ``requant.convert``.
    """
    requant.convert(fixture(name) / "checkpoint", tmp_path / "out", **wishes)
    found, wanted = logits(tmp_path / "out"), expected_logits(name, tmp_path)
    assert np.abs(found - wanted).max() <= largest * np.abs(wanted).max()
