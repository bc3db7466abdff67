"""Random checkpoints of small models as their authors publish them, dense or as AutoAWQ."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from tests.support.families import small_config
from tests.support.hub_forms import FORMS
from tests.support.mlx_lm_conversion import class_checkpoint, write_mlx_checkpoint
from tests.support.mlx_reference import Weights, load


def published(folder: Path, model_type: str, config: Mapping[str, Any] | None = None) -> None:
    """A random checkpoint of a small model as its authors publish it."""
    config = config or small_config(model_type)
    class_checkpoint(folder, config)
    weights = mx.load(str(folder / "model.safetensors"))
    mx.eval(weights)
    write_mlx_checkpoint(folder, config, FORMS[model_type](weights))


def as_awq(folder: Path, skip: str = "norm|embed|lm_head|gate$") -> None:
    """Turn a dense folder's projections into AutoAWQ layers of random codes."""
    rng = np.random.default_rng(3)
    weights: Weights = {}
    for name, array in load(folder).items():
        path = name.removesuffix(".weight")
        if array.ndim != 2 or re.search(skip, path):
            weights[name] = array.astype(mx.float16)
            continue
        n_out, n_in = array.shape
        words = {"qweight": (n_in, n_out // 8), "qzeros": (n_in // 32, n_out // 8)}
        for role, shape in words.items():
            codes = rng.integers(-(2**31), 2**31, shape).astype(np.int32)
            weights[f"{path}.{role}"] = mx.array(codes)
        scales = rng.uniform(0.001, 0.01, (n_in // 32, n_out)).astype(np.float16)
        weights[f"{path}.scales"] = mx.array(scales)
    config = json.loads((folder / "config.json").read_text())
    block = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
    write_mlx_checkpoint(folder, config | {"quantization_config": block}, weights)
