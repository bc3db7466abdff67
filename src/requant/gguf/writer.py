"""The header of a GGUF file: metadata and tensor table. ``header`` has the layout and reads it."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Final

import numpy as np

from requant.gguf.header import MAGIC

ALIGNMENT: Final = 32
"""Data and tensors begin at multiples of this where metadata do not say otherwise."""
_VERSION: Final = 3
_BOOL, _STRING, _ARRAY = 7, 8, 9
_NUMBERS: Final = {  # NumPy dtype -> number of a value's type
    **{"uint8": 0, "int8": 1, "uint16": 2, "int16": 3, "uint32": 4, "int32": 5, "float32": 6},
    **{"uint64": 10, "int64": 11, "float64": 12},
}

Value = bool | int | float | str | np.ndarray | tuple[str, ...]
"""Of a key: an integer is written as uint32, a float as float32."""


@dataclass(frozen=True, slots=True)
class WrittenTensor:
    """A line of the tensor table."""

    name: str
    type_number: int
    shape: tuple[int, ...]  # outermost axis first, as everywhere but in the file
    nbytes: int


def build_header(
    metadata: Mapping[str, Value], tensors: Iterable[WrittenTensor]
) -> tuple[bytes, dict[str, int]]:
    """Write everything before the data.

    Returns the bytes, up to the alignment, and the offset of each tensor from the start of the
    file.
    """
    table = list(tensors)
    pieces = [MAGIC, struct.pack("<IQQ", _VERSION, len(table), len(metadata))]
    for key, value in metadata.items():
        pieces += [_string(key), *_value(value)]
    offset, offsets = 0, {}
    for tensor in table:
        offsets[tensor.name] = offset
        axes = tuple(reversed(tensor.shape))
        pieces.append(_string(tensor.name))
        pieces.append(struct.pack(f"<I{len(axes)}Q", len(axes), *axes))
        pieces.append(struct.pack("<IQ", tensor.type_number, offset))
        offset += tensor.nbytes + -tensor.nbytes % ALIGNMENT
    header = b"".join(pieces)
    header += bytes(-len(header) % ALIGNMENT)
    return header, {name: len(header) + start for name, start in offsets.items()}


def _string(text: str) -> bytes:
    data = text.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(data)) + data


def _value(value: Value) -> Iterable[bytes]:
    if isinstance(value, bool):
        return [struct.pack("<I?", _BOOL, value)]
    if isinstance(value, int):
        return [struct.pack("<II", _NUMBERS["uint32"], value)]
    if isinstance(value, float):
        return [struct.pack("<If", _NUMBERS["float32"], value)]
    if isinstance(value, str):
        return [struct.pack("<I", _STRING), _string(value)]
    if isinstance(value, np.ndarray):
        kind = _BOOL if value.dtype == np.bool_ else _NUMBERS[value.dtype.name]
        return [struct.pack("<IIQ", _ARRAY, kind, value.size), value.tobytes()]
    return chain([struct.pack("<IIQ", _ARRAY, _STRING, len(value))], map(_string, value))
