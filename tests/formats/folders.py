"""Tiny folders of foreign formats, written by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import requant
from tests.road.conftest import write_file

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)
BF16 = np.dtype(ml_dtypes.bfloat16)


def write(
    folder: Path,
    tensors: Mapping[str, np.ndarray],
    block: Mapping[str, Any] | None,
    **config: Any,
) -> Path:
    """A folder with a config and one file."""
    folder.mkdir(parents=True)
    config = {"model_type": "llama", "dtype": "bfloat16"} | config
    if block is not None:
        config["quantization_config"] = block
    (folder / "config.json").write_text(json.dumps(config))
    write_file(folder / "model.safetensors", tensors)
    return folder


def refusal(folder: Path, output: Path, **wishes: Any) -> str:
    """What a conversion says when it refuses; nothing may stay behind."""
    before = sorted(output.parent.iterdir())
    with pytest.raises(requant.RequantError) as refused:
        requant.convert(folder, output, **{"layout": "keep"} | wishes)
    assert sorted(output.parent.iterdir()) == before
    return str(refused.value)


def e4m3(*shape: int, seed: int = 0) -> np.ndarray:
    """Random E4M3 bytes without NaN."""
    codes = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    return np.where(codes & 0x7F == 0x7F, 0x30, codes).astype(np.uint8).view(E4M3)
