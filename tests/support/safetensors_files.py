"""The tests' own writer and reader of safetensors files, without any code of requant."""

import json
import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

# What a header calls a dtype -> NumPy's dtype.
DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(dtype)
    for name, dtype in {
        **{"BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "U16": np.uint16, "I16": np.int16},
        **{"U32": np.uint32, "I32": np.int32, "U64": np.uint64, "I64": np.int64},
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
        **{"F8_E5M2": ml_dtypes.float8_e5m2, "F8_E8M0": ml_dtypes.float8_e8m0fnu},
        **{"F16": np.float16, "BF16": ml_dtypes.bfloat16, "F32": np.float32, "F64": np.float64},
    }.items()
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def entry(dtype: object, shape: object, *offsets: object) -> dict[str, Any]:
    """One entry of a header, valid or not."""
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


def prefixed(text: bytes) -> bytes:
    """A JSON text behind its length."""
    return struct.pack("<Q", len(text)) + text


def header(value: object) -> bytes:
    """A header of any JSON value, valid or not."""
    return prefixed(json.dumps(value).encode())


def make_file(
    tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> bytes:
    """The bytes of a file: length, JSON padded to 8 bytes, data in the order of ``tensors``."""
    value: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    start = 0
    for name, array in tensors.items():
        stop = start + array.nbytes
        value[name] = entry(NAMES[array.dtype], list(array.shape), start, stop)
        start = stop
    text = json.dumps(value).encode()
    text += b" " * (-len(text) % 8)
    return prefixed(text) + b"".join(array.tobytes() for array in tensors.values())


def write_file(
    path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a file; ``metadata`` is added to ``{"format": "pt"}``."""
    path.write_bytes(make_file(tensors, metadata))


def weights(tensors: Mapping[str, tuple[str, list[int]]]) -> bytes:
    """A valid file of tensors by dtype and shape, filled with a running byte."""
    value: dict[str, Any] = {}
    start = 0
    for name, (dtype, shape) in tensors.items():
        stop = start + prod(shape) * DTYPES[dtype].itemsize
        value[name] = entry(dtype, shape, start, stop)
        start = stop
    return header(value) + bytes(i % 251 for i in range(start))


def read_header(path: Path) -> tuple[dict[str, Any], bytes]:
    """The JSON of a file's header, and the data behind it."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:start]), raw[start:]


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a file."""
    value, _ = read_header(path)
    return dict(value.get("__metadata__", {}))


def read_file(path: Path) -> dict[str, np.ndarray]:
    """A file as NumPy arrays, float8 and bfloat16 included."""
    value, data = read_header(path)
    value.pop("__metadata__", None)
    return {
        name: np.frombuffer(data[slice(*found["data_offsets"])], DTYPES[found["dtype"]]).reshape(
            found["shape"]
        )
        for name, found in value.items()
    }


def read_folder(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a folder."""
    found: dict[str, np.ndarray] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= read_file(file)
    return found
