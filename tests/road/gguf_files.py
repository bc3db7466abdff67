"""A GGUF file that is small enough to be converted hundreds of times."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.gguf_source.writer import write_gguf


def gguf_file(place: Path) -> Path:
    """A small model with codes, in a folder."""
    rng = np.random.default_rng(5)
    names = {"embed_tokens": (64, 64), "layers.0.mlp.up_proj": (96, 64)}
    weights = {
        f"model.{name}.weight": rng.standard_normal(shape).astype(np.float32)
        for name, shape in names.items()
    }
    weights["model.norm.weight"] = np.ones(64, np.float32)
    config = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
        "vocab_size": 64,
    }
    write_gguf(place / "model.gguf", weights, config, "Q8_0")
    return place / "model.gguf"
