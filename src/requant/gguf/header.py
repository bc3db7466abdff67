"""A GGUF file up to its data: metadata and tensor table, within bounds.

The layout, all little-endian: ``GGUF``, version (uint32), number of tensors and of metadata
entries (uint64 each); the entries (key, type, value); the tensor table (name, number of
axes, axes with the innermost first, type, offset); zeros up to the alignment; the data. A
string is its length (uint64) and its bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from requant.checkpoints.safetensors_header import check_name, format_tensor_name
from requant.core.files import open_regular
from requant.core.limits import (
    MAX_GGUF_HEADER_BYTES,
    MAX_GGUF_ITEMS,
    MAX_GGUF_KEYS,
    MAX_GGUF_STRING_BYTES,
    MAX_INT,
    MAX_NAME_CHARS,
    MAX_TENSORS,
)
from requant.errors import MAX_PROBLEMS, Problem
from requant.gguf.unsupported_types import unsupported_type
from requant.kernels.gguf import TYPES, BlockType
from requant.text import format_value, os_error_text

MAGIC = b"GGUF"
VERSIONS = (2, 3)
_MAX_AXES = 4
_DEFAULT_ALIGNMENT = 32
_MAX_ALIGNMENT = 1 << 20
_STRING, _ARRAY = 8, 9
_SCALARS = {  # number of a value's type -> NumPy dtype
    **dict(enumerate(("<u1", "<i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?"))),
    **{10: "<u8", 11: "<i8", 12: "<f8"},
}


@dataclass(frozen=True, slots=True)
class TableEntry:
    """One tensor of a file."""

    name: str  # as the file calls it
    kind: BlockType  # how its values are stored
    shape: tuple[int, ...]  # outermost axis first, as everywhere but in the file
    offset: int  # of its first byte, from the start of the file
    nbytes: int  # of its data


@dataclass(frozen=True, slots=True)
class Header:
    """The part of a file before its data."""

    file: str  # its name, as problems and plans give it
    nbytes: int  # size of the file
    sha256: str  # of everything before the data
    metadata: Mapping[str, Any]  # key -> number, bool, string, NumPy array or tuple of strings
    tensors: tuple[TableEntry, ...]  # in the order of their data


class _Damaged(Exception):
    """Nothing behind this place can be understood."""


@dataclass
class _Cursor:
    """Reads on from the start of a file, never past its end or the limit of a header."""

    file: BinaryIO
    size: int
    at: int = 0
    hash: Any = field(default_factory=hashlib.sha256)

    def take(self, count: int, what: str) -> bytes:
        if count > self.size - self.at:
            raise _Damaged(
                f"{what} takes {count:,} bytes from byte {self.at:,} on, but the file ends at "
                f"{self.size:,}; was the download complete?"
            )
        if self.at + count > MAX_GGUF_HEADER_BYTES:
            raise _Damaged(f"its header takes more than {MAX_GGUF_HEADER_BYTES:,} bytes")
        data = self.file.read(count)
        if len(data) < count:
            raise _Damaged(f"ends at byte {self.at + len(data):,}: it was cut while it was read")
        self.at += count
        self.hash.update(data)
        return data

    def array(self, dtype: str, count: int, what: str) -> np.ndarray:
        return np.frombuffer(self.take(count * np.dtype(dtype).itemsize, what), dtype)

    def number(self, dtype: str, what: str) -> int:
        return int(self.array(dtype, 1, what)[0])

    def string(self, what: str, most: int = MAX_GGUF_STRING_BYTES) -> str:
        length = self.number("<u8", what)
        if length > most:
            raise _Damaged(f"{what} is a string of {length:,} bytes, at most {most:,} are read")
        return self.take(length, what).decode("utf-8", "replace")


def read_header(folder: Path, name: str, size: int) -> tuple[Header | None, list[Problem]]:
    """Read a file of ``size`` bytes up to its data.

    Returns the header, None where it cannot be understood, and what is wrong with it.
    """
    problems: list[Problem] = []
    try:
        with open(open_regular(folder / name), "rb") as file:
            return _parse(_Cursor(file, size), name, problems), problems
    except OSError as error:
        problems.append(Problem(name, f"cannot be read: {os_error_text(error)}"))
    except _Damaged as error:
        problems.append(Problem(name, str(error)))
    return None, problems


def header_nbytes(file: BinaryIO, size: int) -> int:
    """Return the bytes that the header of a file takes, or the part that can be understood.

    The file, of ``size`` bytes, is read from its start and no further than that.
    """
    cursor = _Cursor(file, size)
    with suppress(_Damaged):
        _parse(cursor, "", [])
    return cursor.at


def _parse(cursor: _Cursor, name: str, problems: list[Problem]) -> Header:
    magic = cursor.take(min(len(MAGIC), cursor.size), "the magic")
    if magic != MAGIC:
        if not magic:
            raise _Damaged("is not a GGUF file: it is empty")
        first, expected = magic.hex(" "), MAGIC.hex(" ")
        raise _Damaged(
            f"is not a GGUF file: it starts with {first}, expected {expected}, the word GGUF"
        )
    version = cursor.number("<u4", "the version")
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        if swapped in VERSIONS:
            raise _Damaged("is big-endian; rewrite it with gguf-py's gguf_convert_endian")
        raise _Damaged(
            f"is version {version} of GGUF, known are 2 and 3; take a newer file of the model"
        )
    count, keys = cursor.number("<u8", "the header"), cursor.number("<u8", "the header")
    if count > MAX_TENSORS:
        raise _Damaged(f"says that it holds {count:,} tensors, at most {MAX_TENSORS:,} are read")
    if keys > MAX_GGUF_KEYS:
        raise _Damaged(f"says that it has {keys:,} keys, at most {MAX_GGUF_KEYS:,} are read")
    metadata = _read_metadata(cursor, keys, name, problems)
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    known = isinstance(alignment, int) and 0 < alignment <= _MAX_ALIGNMENT
    if not known or alignment & (alignment - 1):
        raise _Damaged("general.alignment is not a power of two")
    found = [_read_entry(cursor, name, problems) for _ in range(count)]
    start = -(-cursor.at // alignment) * alignment
    tensors = [TableEntry(e.name, e.kind, e.shape, start + e.offset, e.nbytes) for e in found if e]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.name))
    _check_places(tensors, start, alignment, size=cursor.size, file=name, problems=problems)
    return Header(name, cursor.size, cursor.hash.hexdigest(), metadata, tuple(tensors))


def _read_metadata(
    cursor: _Cursor, keys: int, file: str, problems: list[Problem]
) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    room = MAX_GGUF_ITEMS
    for _ in range(keys):
        key = cursor.string("a metadata key", MAX_NAME_CHARS)
        if key in metadata:
            _report(problems, f"{file}: {format_value(key)}", "occurs twice in the metadata")
        kind = cursor.number("<u4", format_value(key))
        if kind == _ARRAY:
            value, items = _read_array(cursor, key, room)
            room -= items
        else:
            value = _read_scalar(cursor, key, kind)
        metadata[key] = value
    return metadata


def _read_scalar(cursor: _Cursor, key: str, kind: int) -> Any:
    if kind == _STRING:
        return cursor.string(format_value(key))
    if kind not in _SCALARS:
        raise _Damaged(f"{format_value(key)} has a value of unknown type {kind}")
    return cursor.array(_SCALARS[kind], 1, format_value(key))[0].item()


def _read_array(cursor: _Cursor, key: str, room: int) -> tuple[Any, int]:
    """A NumPy array, or a tuple of strings; and how many items it has."""
    kind, count = cursor.number("<u4", format_value(key)), cursor.number("<u8", format_value(key))
    if kind != _STRING and kind not in _SCALARS:
        nested = "arrays, which no known key has" if kind == _ARRAY else f"unknown type {kind}"
        raise _Damaged(f"{format_value(key)} is an array of {nested}")
    if count > room:
        raise _Damaged(
            f"{format_value(key)} has {count:,} items, at most {MAX_GGUF_ITEMS:,} are read in all"
        )
    if kind == _STRING:
        return tuple(cursor.string(format_value(key)) for _ in range(count)), count
    return cursor.array(_SCALARS[kind], count, format_value(key)), count


def _read_entry(cursor: _Cursor, file: str, problems: list[Problem]) -> TableEntry | None:
    """One line of the tensor table, its offset counted from the data; None if it is unsound."""
    name = cursor.string("a tensor's name", MAX_NAME_CHARS)
    axes = cursor.number("<u4", format_value(name))
    if axes > _MAX_AXES:
        raise _Damaged(f"{format_value(name)} has {axes} axes, at most {_MAX_AXES} are known")
    sizes = [cursor.number("<u8", format_value(name)) for _ in range(axes)]
    number, offset = (
        cursor.number("<u4", format_value(name)),
        cursor.number("<u8", format_value(name)),
    )
    where = f"{file}: {format_tensor_name(name)}"
    wrong = check_name(name)
    if wrong:
        _report(problems, where, wrong[0])
        return None
    shape = tuple(reversed(sizes))
    kind = TYPES.get(number)
    if kind is None:
        _report(problems, where, f"is stored as {unsupported_type(number)}")
        return None
    if 0 in sizes or prod(sizes) > MAX_INT:
        _report(problems, where, f"has the impossible shape {list(shape)}")
        return None
    # A plain number is a block of one value.
    elements, nbytes = (1, kind.itemsize) if kind.dtype else (kind.elements, kind.nbytes)
    if (shape and shape[-1] % elements) or (elements > 1 and not shape):
        what = f"a row is not a multiple of the {elements} values of a block"
        _report(problems, where, f"{kind.name} {list(shape)}: {what}")
        return None
    return TableEntry(name, kind, shape, offset, prod(sizes) // elements * nbytes)


def _check_places(
    tensors: list[TableEntry],
    start: int,
    alignment: int,
    size: int,
    file: str,
    problems: list[Problem],
) -> None:
    """Every tensor lies in the file, on its own bytes, under its own name."""
    names: set[str] = set()
    last: TableEntry | None = None
    for tensor in tensors:
        where = f"{file}: {tensor.name}"
        if tensor.name in names:
            _report(problems, where, "occurs twice in the tensor table")
        names.add(tensor.name)
        if (tensor.offset - start) % alignment:
            _report(problems, where, f"begins at no multiple of the alignment {alignment}")
        if tensor.offset + tensor.nbytes > size:
            end = f"ends at byte {tensor.offset + tensor.nbytes:,}"
            message = f"{end}, but the file has {size:,}; was the download complete?"
            _report(problems, where, message)
        elif last is not None and tensor.offset < last.offset + last.nbytes:
            _report(problems, where, f"overlaps {last.name}")
        last = tensor


def _report(problems: list[Problem], where: str, message: str) -> None:
    if len(problems) < MAX_PROBLEMS:
        problems.append(Problem(where, message))
