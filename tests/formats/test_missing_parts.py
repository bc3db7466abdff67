"""Folders of which a part is gone, or of another kind: named, and never read as something else."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import requant
from requant.errors import CheckpointError
from tests.support.fixture_folders import fixture
from tests.support.safetensors_files import read_file, write_file

LAYER = "model.layers.0.mlp.down_proj"
Tensors = dict[str, np.ndarray]


def without(role: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(f"{LAYER}.{role}")


def scales_of(dtype: type) -> Callable[[Tensors], object]:
    name = f"{LAYER}.weight_scale"
    return lambda tensors: tensors.update({name: np.ones(tensors[name].shape, dtype)})


def one_block(tensors: Tensors) -> None:
    name = f"{LAYER}.weight_scale_inv"
    tensors[name] = tensors[name][:1, :1].copy()


@pytest.mark.parametrize("layout", ["keep", "mlx-lm"])
@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("ct-int-quantized", without("weight_scale"), "weight_scale"),
        ("ct-pack-int4-actorder-group", without("weight_g_idx"), "actorder group"),
        ("modelopt-nvfp4", scales_of(np.int64), "laid out as ModelOpt does not write it"),
        ("modelopt-nvfp4", scales_of(np.float64), "laid out as ModelOpt does not write it"),
        ("fp8-block-llama", one_block, "weight_scale_inv"),
    ],
)
def test_a_damaged_layer_is_named(
    name: str, damage: Callable[[Tensors], object], words: str, layout: str, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(fixture(name) / "checkpoint", source)
    source.chmod(0o755)
    file = source / "model.safetensors"
    tensors = dict(read_file(file))
    damage(tensors)
    file.unlink()
    write_file(file, tensors)
    assert "quantization_config" in json.loads((source / "config.json").read_text())
    with pytest.raises(CheckpointError, match=words) as caught:
        requant.convert(source, tmp_path / "output", bits=8, layout=layout)
    assert LAYER in str(caught.value)
    assert not (tmp_path / "output").exists()
