"""Tiny checkpoints, written and read back without any code of requant."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest

_HEADER_NAME = {
    np.dtype(np.float32): "F32",
    np.dtype(np.float64): "F64",
    np.dtype(np.float16): "F16",
    np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(np.uint32): "U32",
    np.dtype(np.int32): "I32",
    np.dtype(np.int64): "I64",
    np.dtype(np.int16): "I16",
    np.dtype(np.uint16): "U16",
    np.dtype(np.bool_): "BOOL",
    np.dtype(np.uint8): "U8",
    np.dtype(np.int8): "I8",
    np.dtype(ml_dtypes.float8_e4m3fn): "F8_E4M3",
    np.dtype(ml_dtypes.float8_e5m2): "F8_E5M2",
    np.dtype(ml_dtypes.float8_e8m0fnu): "F8_E8M0",
    np.dtype(ml_dtypes.float8_e4m3fnuz): "F8_E4M3FNUZ",
}
CONFIG = {"model_type": "llama", "dtype": "bfloat16", "tie_word_embeddings": True}


def write_file(
    path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file by hand: length, JSON, bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    start = 0
    for name, array in tensors.items():
        stop = start + array.nbytes
        header[name] = {
            "dtype": _HEADER_NAME[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data = b"".join(array.tobytes() for array in tensors.values())
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Build a folder: ``checkpoint(tensors, config, shards=2)``."""

    def build(
        tensors: Mapping[str, np.ndarray],
        config: Mapping[str, Any] = CONFIG,
        *,
        shards: int = 1,
        name: str = "source",
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config, indent=2))
        if shards == 1:
            write_file(folder / "model.safetensors", tensors)
            return folder
        names = list(tensors)
        weight_map = {}
        for number in range(shards):
            file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
            mine = names[number::shards]
            write_file(folder / file, {key: tensors[key] for key in mine})
            weight_map |= dict.fromkeys(mine, file)
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return folder

    return build


def bf16(*shape: int, seed: int = 0, scale: float = 0.02) -> np.ndarray:
    """Normal values in bfloat16."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) * scale).astype(ml_dtypes.bfloat16)


@pytest.fixture
def dense(checkpoint: Callable[..., Path]) -> Path:
    """A small dense model with one of every kind of tensor that stays dense."""
    return checkpoint(
        {
            "model.embed_tokens.weight": bf16(96, 128, seed=1),
            "model.layers.0.self_attn.q_proj.weight": bf16(128, 128, seed=2),
            "model.layers.0.self_attn.q_proj.bias": bf16(128, seed=3),
            "model.layers.0.mlp.gate.weight": bf16(8, 128, seed=4),
            "model.layers.0.mlp.up_proj.weight": bf16(64, 128, seed=5),
            "model.layers.0.input_layernorm.weight": bf16(128, seed=6),
            "model.layers.0.conv1d.weight": bf16(128, 1, 64, seed=7),
            "model.wpe.weight": bf16(16, 128, seed=8),
            "model.odd.weight": bf16(16, 96, seed=9),
            "model.ragged.weight": bf16(16, 40, seed=10),
            "model.experts.gate_up_proj": bf16(2, 64, 64, seed=11),
            "lm_head.weight": bf16(96, 128, seed=12),
        }
    )


def load(folder: Path) -> dict[str, mx.array]:
    """Every tensor of an output, read by MLX."""
    weights: dict[str, mx.array] = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= mx.load(str(file))
    return weights


def same(a: mx.array, b: mx.array) -> bool:
    """Equal dtype, shape and bits."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return bool(mx.array_equal(a.view(mx.uint8), b.view(mx.uint8)))


def to_mx(array: np.ndarray) -> mx.array:
    """A NumPy array, bfloat16 included, as an MLX array of the same bits."""
    if array.dtype == ml_dtypes.bfloat16:
        return mx.array(array.view(np.uint16)).view(mx.bfloat16)
    return mx.array(array)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
