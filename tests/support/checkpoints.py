"""Checkpoint folders, written and compared without any code of requant."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.safetensors_files import weights, write_file

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared"  # reference material outside the repository; may be absent
MICRO_LLAMA = ROOT / "examples" / "micro-llama"

INDEX = "model.safetensors.index.json"
CONFIG = {"model_type": "llama", "dtype": "bfloat16", "tie_word_embeddings": True}


def write_checkpoint(
    folder: Path,
    tensors: Mapping[str, np.ndarray],
    config: Mapping[str, Any] = CONFIG,
    *,
    shards: int = 1,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write ``config.json`` and the tensors, dealt out to shards with an index if several."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    if shards == 1:
        write_file(folder / "model.safetensors", tensors, metadata)
        return folder
    names = list(tensors)
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        mine = names[number::shards]
        write_file(folder / file, {key: tensors[key] for key in mine}, metadata)
        weight_map |= dict.fromkeys(mine, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index))
    return folder


def write_quantized(
    folder: Path, tensors: Mapping[str, np.ndarray], block: Mapping[str, Any] | None, **config: Any
) -> Path:
    """Write a folder of one file whose config holds a quantization block, unless it is None."""
    config = {"model_type": "llama", "dtype": "bfloat16"} | config
    if block is not None:
        config["quantization_config"] = block
    return write_checkpoint(folder, tensors, config)


def write_model(
    folder: Path, tensors: Mapping[str, np.ndarray], config: Mapping[str, Any] | None = None
) -> Path:
    """Write a folder of one file with an empty tokenizer."""
    write_checkpoint(folder, tensors, config or {"model_type": "llama"})
    (folder / "tokenizer.json").write_text("{}")
    return folder


def write_folder(
    folder: Path,
    files: Mapping[str, bytes | Mapping[str, tuple[str, list[int]]]],
    *,
    config: object = {"model_type": "llama"},
    weight_map: Mapping[str, object] | None = None,
) -> Path:
    """Write a source folder of any files, valid or not.

    Args:
        folder: Made if it is not there.
        files: Path to bytes, or to the dtypes and shapes of a valid safetensors file.
        config: What ``config.json`` holds; None writes none, bytes go in as they are.
        weight_map: What the index says; None writes no index.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else weights(content))
    if isinstance(config, bytes):
        (folder / "config.json").write_bytes(config)
    elif config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    if weight_map is not None:
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict(weight_map)}))
    return folder


def model(name: str) -> Path:
    """The folder of a trained model: of the repository's example or of the shared ones."""
    if name == "micro-llama":
        return MICRO_LLAMA
    folder = SHARED / "models" / name
    if not folder.is_dir():
        assert os.environ.get("REQUANT_REQUIRE_SHARED") != "1", f"{folder} is missing"
        pytest.skip(f"{name} lies outside the repository")
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
