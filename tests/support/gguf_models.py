"""Small models of mlx-lm that tests write as GGUF files."""

import importlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from mlx_lm.utils import load_model

from requant.gguf.families import family_of
from requant.gguf.header import Header, read_header
from requant.gguf.metadata import Metadata
from requant.gguf.model_config import make_config
from requant.gguf.settings import Settings
from tests.support.checkpoints import model
from tests.support.families import COMMON
from tests.support.gguf_files import ARCHITECTURES, write_gguf
from tests.support.gguf_records import RECORDS, write_record
from tests.support.plan_texts import note_texts

TOKENS = mx.array([[1, 5, 9, 200, 31, 7]])


OWN: dict[str, dict[str, Any]] = {
    "llama": {"rope_scaling": None, "tie_word_embeddings": True},
    "mixtral": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
    "qwen2_moe": {},
    "qwen3_moe": {},
    "gemma": {},
    "gemma2": {"query_pre_attn_scalar": 32.0},
    "gemma3_text": {"query_pre_attn_scalar": 32, "rope_theta": 1e6, "num_hidden_layers": 6},
    "phi3": {"partial_rotary_factor": 1.0},
    "gpt_oss": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 128},
    "ministral3": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 4.0,
            "original_max_position_embeddings": 4,
            **{"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 0.5},
            "llama_4_scaling_beta": 0.1,
        },
        "tie_word_embeddings": False,
    },
    "smollm3": {"num_hidden_layers": 4},
    "granite": {
        "attention_multiplier": 0.125,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "logits_scaling": 2.0,
    },
    "seed_oss": {"attention_bias": True},
    "olmo2": {},
    "olmo3": {
        "num_hidden_layers": 8,
        "sliding_window": 4,
        "layer_types": [
            "sliding_attention",
            "sliding_attention",
            "full_attention",
            "full_attention",
        ]
        * 2,
        "rope_scaling": {
            "rope_type": "yarn",
            "type": "yarn",
            "factor": 8.0,
            "original_max_position_embeddings": 4,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "attention_factor": 1.2079441,
        },
    },
}


def tiny(name: str) -> tuple[Any, dict[str, Any]]:
    """A random model of mlx-lm, float32, and its config."""
    module = importlib.import_module(f"mlx_lm.models.{name}")
    known = module.ModelArgs.__dataclass_fields__
    config = {k: v for k, v in COMMON.items() if k in known} | {"model_type": name} | OWN[name]
    mx.random.seed(7)
    made = module.Model(module.ModelArgs.from_dict(config))
    made.update(tree_map(lambda x: mx.random.normal(x.shape) * 0.05, made.parameters()))
    mx.eval(made.parameters())
    return made, config


def values(made: Any) -> dict[str, np.ndarray]:
    return {name: np.array(x) for name, x in tree_flatten(made.parameters())}


def output_of(folder: Path) -> np.ndarray:
    loaded, _ = load_model(folder)
    return np.array(loaded(TOKENS).astype(mx.float32))


def trained(name: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    folder = model(name)
    weights = {}
    for file in sorted(folder.glob("*.safetensors")):
        loaded = mx.load(str(file))
        weights |= {k: np.array(v.astype(mx.float32)) for k, v in loaded.items()}
    return weights, json.loads((folder / "config.json").read_text())


SEEING = {"qwen2vl": "qwen2", "qwen3vl": "qwen3", "qwen3vlmoe": "qwen3_moe"}


ALL = {  # name of the case -> model_type, llama.cpp's name
    **{("llama/mixtral" if k == "mixtral" else v): (k, v) for k, v in ARCHITECTURES.items()},
    "olmo2": ("olmo2", "olmo2"),
    "olmo2/olmo3": ("olmo3", "olmo2"),
    **{name: (kind, name) for name, kind in SEEING.items()},
}


@cache
def model_of(model_type: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    made, config = tiny(model_type)
    config.setdefault("tie_word_embeddings", False)
    return {k: v for k, v in values(made).items() if "rotary" not in k}, config


@cache
def header_of(case: str) -> Header:
    """Of a file of a tiny model, as the converter writes it."""
    if case in RECORDS:
        return read_made(write_record(case, Path(mkdtemp())))
    model_type, architecture = ALL[case]
    weights, config = model_of(model_type)
    folder = Path(mkdtemp())
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ARCHITECTURES, model_type, architecture)
        write_gguf(folder / "m.gguf", weights, config)
    return read_made(folder / "m.gguf")


def read_made(path: Path) -> Header:
    header, problems = read_header(path.parent, path.name, path.stat().st_size)
    assert header is not None and not problems
    return header


def read_with(case: str, more: Mapping[str, Any]) -> tuple[dict[str, Any], str, list[str]]:
    """Config, notes, and keys with problems of a tiny model with further metadata."""
    header = header_of(case)
    prefix = header.metadata["general.architecture"]
    found = {f"{prefix}.{key}": stored(value) for key, value in more.items()}
    metadata = Metadata("m.gguf", {**header.metadata, **found})
    family = family_of(metadata)
    assert family is not None
    shapes = {entry.name: entry.shape for entry in header.tensors}
    settings = Settings(metadata, shapes, lambda _: np.ones(1, np.float32), family.support)
    config = make_config(settings, family.model_type, family.cls, family.configure)
    named = [problem.where.removeprefix("m.gguf: ") for problem in metadata.problems]
    return config, "\n".join(note_texts(settings.notes)), named


def stored(value: Any) -> Any:
    """A value as the reader of headers gives it."""
    if isinstance(value, list):
        return tuple(value) if isinstance(value[0], str) else np.array(value)
    return value


def sharp(model_type: str, **changes: Any) -> tuple[Any, dict[str, Any]]:
    """A tiny model of mlx-lm whose attention tells positions well apart, and its config."""
    made, config = tiny(model_type)
    config |= changes
    module = importlib.import_module(f"mlx_lm.models.{model_type}")
    other = module.Model(module.ModelArgs.from_dict(config))
    other.update(tree_map(lambda x: x * (6 if x.ndim > 1 else 20), made.parameters()))
    return other, config


def weights_of(made: Any) -> dict[str, np.ndarray]:
    return {k: v for k, v in values(made).items() if "rotary" not in k}
