"""Damage to the tensors and the quantization block of a folder, written in lines of text.

A case is one line ``changes -> words``, or the changes and then indented lines, each with words
of the message. Changes are separated by ``; ``::

    - up.scale                          remove a tensor
    up.scale = F32 [2, 3] 0.5           put a tensor of this value everywhere (0 unless given)
    weights.num_bits: "four"            put a value of JSON into the block
"""

import json
from typing import Any

import numpy as np
import pytest

from tests.support.safetensors_files import DTYPES


def damages(text: str) -> list[Any]:
    """Parameters ``changes`` and ``words`` of a test."""
    found: list[tuple[str, list[str]]] = []
    for line in filter(str.strip, text.splitlines()):
        if line.startswith(" "):
            found[-1][1].append(line.strip())
        else:
            changes, _, words = line.partition(" -> ")
            found.append((changes, [words] if words else []))
    assert all(words for _, words in found)
    return [pytest.param(changes, words, id=changes) for changes, words in found]


def damage(changes: str, tensors: dict[str, Any], block: dict[str, Any] | None = None) -> None:
    """Apply changes to tensors and block, in place."""
    for change in changes.split("; "):
        name, is_tensor, array = change.partition(" = ")
        if change.startswith("- "):
            del tensors[change[2:]]
        elif is_tensor:
            tensors[name] = made(array)
        elif change != "nothing":
            path, _, value = change.partition(": ")
            assert block is not None
            *outer, last = path.split(".")
            for key in outer:
                block = block[key]
            block[last] = json.loads(value)


def made(text: str) -> np.ndarray:
    """``F32 [2, 3] 0.5`` as an array."""
    dtype, _, rest = text.partition(" ")
    shape, _, value = rest.partition("]")
    return np.full(json.loads(f"{shape}]"), float(value or 0)).astype(DTYPES[dtype])
