"""Checkpoints and safetensors files written by hand, without any code of requant."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SHARED = Path(__file__).parents[2].parent / "shared"  # reference material; may be absent

INDEX = "model.safetensors.index.json"
CONFIG = {"model_type": "llama"}

BYTES = {"U8": 1, "I8": 1, "F16": 2, "BF16": 2, "F32": 4, "U32": 4, "I32": 4, "F64": 8, "I64": 8}


def entry(dtype: object, shape: object, *offsets: object) -> dict[str, Any]:
    """One entry of a header, right or wrong."""
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


def prefixed(text: bytes) -> bytes:
    """A JSON text behind its length."""
    return struct.pack("<Q", len(text)) + text


def header(value: object) -> bytes:
    """A header of any JSON value, right or wrong."""
    return prefixed(json.dumps(value).encode())


def weights(tensors: Mapping[str, tuple[str, list[int]]]) -> bytes:
    """A sound file: tensors one after the other, filled with a running byte."""
    value: dict[str, Any] = {}
    start = 0
    for name, (dtype, shape) in tensors.items():
        size = BYTES[dtype]
        for length in shape:
            size *= length
        value[name] = entry(dtype, shape, start, start + size)
        start += size
    return header(value) + bytes(i % 251 for i in range(start))


def write_folder(
    folder: Path,
    files: Mapping[str, bytes | Mapping[str, tuple[str, list[int]]]],
    *,
    config: object = CONFIG,
    weight_map: Mapping[str, object] | None = None,
) -> Path:
    """Write a source folder.

    Args:
        folder: Made if it is not there.
        files: Path to bytes, or to the tensors of a sound safetensors file.
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
