"""llama.cpp's importance matrices: the GGUF form, and the older binary one.

GGUF (ggml-org/llama.cpp tools/imatrix): for a tensor ``blk.0.attn_q.weight`` the float32 tensors
``....in_sum2`` ``[experts, in]``, sums of squares over tokens, and ``....counts`` ``[experts, 1]``.

Older: int32 number of entries; each an int32 length, the tensor's name, int32 calls, int32 number
of values, and the values: float32, mean squares times calls, experts one after another. The rest
(the number of chunks and the name of the text) is ignored.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np

from requant.checkpoints.safetensors_header import check_name
from requant.core.files import open_regular
from requant.core.limits import MAX_INT, MAX_NAME_CHARS, MAX_TENSORS
from requant.errors import Problem
from requant.gguf.header import TableEntry, read_header
from requant.importance.statistics_file import StatisticsEntry
from requant.text import format_value

Found = tuple[list[StatisticsEntry], list[Problem]]
_SUMS, _COUNTS = ".in_sum2", ".counts"
_MOST_COUNTS = 1 << 20  # experts of a layer


def read_gguf(source: str, size: int) -> Found:
    """Read the GGUF form: entries and problems."""
    path = Path(source)
    header, problems = read_header(path.parent, path.name, size)
    if header is None or problems:
        return [], problems
    kind = header.metadata.get("general.type")
    if kind != "imatrix":
        words = f"general.type is {format_value(kind)}, expected 'imatrix': the file is a model"
        return [], [Problem(path.name, words)]
    tensors = {tensor.name: tensor for tensor in header.tensors}
    entries: list[StatisticsEntry] = []
    with open(open_regular(path), "rb") as file:
        for name, sums in tensors.items():
            if not name.endswith(_SUMS):
                continue
            layer = name.removesuffix(_SUMS)
            counts = tensors.get(layer + _COUNTS)
            wrong = _wrong(sums, counts)
            if wrong or counts is None:
                problems.append(Problem(layer, wrong))
                continue
            file.seek(counts.offset)
            data = file.read(counts.nbytes)
            if len(data) < counts.nbytes:
                problems.append(Problem(layer, "was cut while it was read"))
                continue
            with np.errstate(invalid="ignore"):  # NaN is reported later
                tokens = np.frombuffer(data, "<f4").astype(np.float64)
            size, offset = sums.nbytes // 4, sums.offset
            entries.append(StatisticsEntry(_layer(layer), size, offset, tokens, tokens.size))
    return entries, problems


def _wrong(sums: TableEntry, counts: TableEntry | None) -> str:
    """The problem of a layer's two tensors, or ""."""
    if counts is None:
        return f"has {_SUMS[1:]}, but no {_COUNTS[1:]}"
    for tensor in (sums, counts):
        if tensor.kind.name != "F32":
            return f"{tensor.name} is {tensor.kind.name}, expected F32"
    experts = counts.nbytes // 4
    rows = sums.nbytes // 4 // sums.shape[-1] if sums.shape else 0
    if experts > _MOST_COUNTS or rows != experts:
        found = f"{list(sums.shape)} sums and {list(counts.shape)} counts"
        return f"{found}: a count for each row of sums is expected"
    return ""


class _Damaged(Exception):
    """The rest of the file cannot be read."""


class _Cursor:
    """Reads the older form; every length is compared with the rest of the file."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size, self.at = file, size, 0
        file.seek(0)

    def number(self, what: str, most: int, least: int = 1) -> int:
        value: int = struct.unpack("<i", self.take(4, what))[0]
        if not least <= value <= most:
            raise _Damaged(
                f"is neither a safetensors nor a GGUF file, nor an imatrix of the older form: byte "
                f"{self.at - 4:,} says that {what} is {value:,}, expected {least} to {most:,}"
            )
        return value

    def take(self, nbytes: int, what: str) -> bytes:
        self.skip(nbytes, what)
        return self.file.read(nbytes)

    def skip(self, nbytes: int, what: str) -> None:
        if self.at + nbytes > self.size:
            raise _Damaged(
                f"byte {self.at:,}: {what} takes {nbytes:,} bytes, but the file ends at "
                f"{self.size:,}; was the download complete?"
            )
        self.at += nbytes


def read_older(file: BinaryIO, size: int) -> Found:
    """Read the older form: entries and problems."""
    cursor = _Cursor(file, size)
    entries: dict[str, StatisticsEntry] = {}
    try:
        for _ in range(cursor.number("the number of entries", MAX_TENSORS)):
            length = cursor.number("the length of a name", MAX_NAME_CHARS)
            name = cursor.take(length, "a name").decode("utf-8", "replace")
            calls = cursor.number(f"the number of calls of {format_value(name)}", MAX_INT, 0)
            values = cursor.number(f"the number of values of {format_value(name)}", MAX_INT)
            wrong = check_name(name)
            if wrong or name in entries:
                raise _Damaged(f"{format_value(name)}: {wrong[0] if wrong else 'occurs twice'}")
            divisors = np.array([float(calls)])
            entries[name] = StatisticsEntry(_layer(name), values, cursor.at, divisors, None)
            cursor.skip(4 * values, f"what it says of {format_value(name)}")
            file.seek(cursor.at)
    except _Damaged as error:
        return [], [Problem("imatrix", str(error))]
    return list(entries.values()), []


def _layer(tensor: str) -> str:
    return tensor.removesuffix(".weight")
