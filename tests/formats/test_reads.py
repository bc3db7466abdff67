"""Small tensors are read in runs: a file is opened a few times, however many layers it has."""

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from requant.formats import read_layout
from requant.sources.open import read_checkpoint
from tests.support.checkpoints import write_checkpoint
from tests.support.format_folders import SOURCES

LAYERS = 6


@pytest.mark.parametrize("kind", ["ct-int4", "fp8", "modelopt-nvfp4", "gptq", "hqq", "bnb-nf4"])
def test_a_file_is_opened_once_for_its_small_tensors(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = SOURCES[kind]()
    tensors: dict[str, np.ndarray] = {}
    for name, array in source.tensors.items():
        if not name.startswith("up"):
            tensors[name] = array
            continue
        tensors |= {f"layers.{n}.{name}": array for n in range(LAYERS)}
    write_checkpoint(tmp_path, tensors, {"model_type": "llama", **source.config})
    opened = Counter[str]()
    open_file = os.open

    def count(path: str | os.PathLike[str], *args: int, **kwargs: int) -> int:
        opened[os.fspath(path)] += 1
        return open_file(path, *args, **kwargs)

    checkpoint = read_checkpoint(tmp_path)
    monkeypatch.setattr(os, "open", count)
    _, layout = read_layout(checkpoint)
    assert not layout.problems
    assert len([layer for layer in layout.layers if layer.is_quantized]) == LAYERS
    read = opened[str(tmp_path / "model.safetensors")]
    assert read < LAYERS // 2, opened
