"""Converted folders in mlx-lm: the logits of the dense weights that each format's tool decodes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.logits import check_logits, dense_folder, logits
from tests.support.safetensors_files import read_file, write_file

pytestmark = pytest.mark.sweep(2)

# name, options, and how far logits may be off (relative to the largest): what the codes lose.
FOLDERS: list[tuple[str, dict[str, Any], float]] = [
    ("ct-pack-int4-sym-g128", {}, 1e-4),
    ("ct-pack-int3-g64", {}, 1e-4),
    ("ct-pack-int8-channel", {}, 1e-4),
    ("ct-int-quantized", {}, 1e-4),
    ("ct-mxfp4-pack", {}, 1e-4),
    ("ct-mxfp8", {}, 1e-4),
    ("ct-pack-int4-asym-g32", {}, 0.05),
    ("ct-pack-int4-actorder-weight", {}, 0.05),
    ("ct-pack-int4-actorder-group", {}, 0.05),
    ("ct-nvfp4-pack", {}, 0.05),
    ("ct-float-fp8-block", {"bits": 8, "overrides": ["lm_head|embed_tokens=skip"]}, 0.05),
    ("ct-float-fp8-channel", {"bits": 8}, 0.05),
    ("ct-float-fp8-tensor", {"dequantize": True, "dtype": "float32"}, 1e-4),
    ("ct-naive-fp8-tensor", {"bits": 8}, 0.12),
    ("ct-mixed-precision", {"overrides": ["self_attn=8"]}, 0.05),
    ("fp8-block-llama", {"bits": 8}, 0.05),
    ("fp8-block-ue8m0", {}, 1e-4),
    ("fp8-block-deepseek-edge", {"bits": 8}, 0.12),
    # mlx-lm splits kv_b_proj by arithmetic on values: those are bfloat16, as FP8's decoder gives.
    ("fp8-block-deepseek-edge", {"dequantize": True, "dtype": "float32"}, 5e-3),
    ("mxfp4-gpt-oss", {}, 1e-4),
]


def test_the_comparison_can_fail(tmp_path: Path) -> None:
    """Rows of one layer in another order are far off."""
    folder = dense_folder("ct-mxfp8", tmp_path / "dense")
    wanted = logits(folder)
    tensors = read_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.v_proj.weight"
    write_file(folder / "model.safetensors", tensors | {name: tensors[name][::-1].copy()})
    assert np.abs(logits(folder) - wanted).max() / np.abs(wanted).max() > 0.3


@pytest.mark.parametrize(
    ("name", "options", "room"), FOLDERS, ids=[f"{n}-{'-'.join(w)}" for n, w, _ in FOLDERS]
)
def test_logits(name: str, options: dict[str, Any], room: float, tmp_path: Path) -> None:
    check_logits(name, tmp_path, room, layout="mlx-lm", **options)
