"""MLX folders of a few layers, made without MLX."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from tests.support.checkpoints import write_checkpoint

Tensors = dict[str, np.ndarray]
PROJ = "model.layers.0.mlp.up_proj"


def bf16(values: Any) -> np.ndarray:
    """Values rounded to bfloat16."""
    return np.asarray(values, ml_dtypes.bfloat16)


def affine(
    out: int = 10, groups: int = 2, bits: int = 4, group: int = 32, seed: int = 0
) -> Tensors:
    """An MLX layer whose biases are ``-zero * scale``, rounded to bfloat16."""
    random = np.random.default_rng(seed)
    scales = bf16(random.normal(size=(out, groups)) / 16)
    zeros = random.integers(0, 1 << bits, (out, groups))
    return {
        "weight": random.integers(0, 1 << 32, (out, groups * group * bits // 32), np.uint32),
        "scales": scales,
        "biases": bf16(-zeros * scales.astype(np.float32)),
    }


def folder(path: Path, layers: dict[str, Tensors], dense: Tensors, **config: Any) -> Path:
    """An MLX folder."""
    tensors = {f"{name}.{role}": x for name, parts in layers.items() for role, x in parts.items()}
    block = {"group_size": 32, "bits": 4, **config.pop("block", {})}
    config = {"model_type": "llama", "quantization": block, **config}
    return write_checkpoint(path, tensors | dense, config, metadata={"format": "mlx"})


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
