"""Safetensors headers: bytes to checked entries, and entries to bytes.

A file is an 8-byte little-endian length, that many bytes of JSON, and the data area::

    {"__metadata__": {"format": "mlx"},
     "up.weight": {"dtype": "BF16", "shape": [8, 64], "data_offsets": [0, 1024]}}

Offsets count from the start of the data area, which the tensors fill without holes. A header is
untrusted input: the functions that read it return problems and do not raise, whatever it holds,
within the time and memory that ``limits`` allow.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate, islice
from json.encoder import encode_basestring
from math import prod
from typing import Any, BinaryIO

from requant.core.dtypes import NUMPY_DTYPE, TensorInfo, shared_info
from requant.core.limits import (
    MAX_EMPTY_AXES,
    MAX_HEADER_BYTES,
    MAX_INT,
    MAX_NAME_CHARS,
    MAX_RANK,
    MAX_TENSORS,
)
from requant.core.strict_json import parse_json_object
from requant.errors import MAX_PROBLEMS, KeyCollisionError, OutOfRangeError, Problem
from requant.text import format_value, pluralize

PREFIX_BYTES = 8
METADATA_KEY = "__metadata__"

_VALUES_PER_TENSOR = 16  # of JSON, rank and separators included
# Control characters, line separators and those that turn the direction of text: a name with
# one of them cannot be printed as it is.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ufeff]")
_LFS_POINTER = b"version "
_PIECES = 4096  # of a header's text, that are written at once


@dataclass(frozen=True, slots=True)
class HeaderEntry:
    """A tensor of a header, and the bytes ``start:stop`` of the data area that hold it."""

    info: TensorInfo
    start: int
    stop: int


def parse_header(
    raw: bytes, data_bytes: int
) -> tuple[dict[str, HeaderEntry], dict[str, str], list[Problem]]:
    """Parse and check a header: length prefix and JSON text, with ``data_bytes`` of data after it.

    Returns the valid entries in the order of the header, the metadata, and all problems, located by
    a tensor name or ``"header"``.
    """
    length, message = header_length(raw[:PREFIX_BYTES], len(raw) + data_bytes)
    if not message and length != len(raw) - PREFIX_BYTES:
        message = f"the length says {length} bytes, {len(raw) - PREFIX_BYTES} are there"
    if message:
        return {}, {}, [Problem("header", message)]
    objects = raw.count(b"{")
    if objects > MAX_TENSORS + 2:
        message = f"holds {objects:,} objects, at most {MAX_TENSORS:,} tensors a file are read"
        return {}, {}, [Problem("header", message)]
    text = memoryview(raw)[PREFIX_BYTES:]
    value, messages = parse_json_object(text, max_values=_VALUES_PER_TENSOR * MAX_TENSORS)
    problems = [Problem("header", message) for message in messages]
    # If a key occurs twice or an entry has no offsets, a hole is not a problem of its own.
    complete = not problems
    metadata, messages = _parse_metadata(value.pop(METADATA_KEY, {}))
    problems += [Problem(METADATA_KEY, message) for message in messages]

    entries: dict[str, HeaderEntry] = {}
    spans: list[tuple[int, int, str]] = []
    for name, item in value.items():
        if len(problems) >= MAX_PROBLEMS:
            problems.append(Problem("header", "has more problems, which are not listed"))
            return {}, {}, problems
        entry = _valid_entry(name, item, data_bytes)
        if entry is not None:
            entries[name] = entry
            spans.append((entry.start, entry.stop, name))
            continue
        where = format_tensor_name(name)
        messages = check_name(name)
        span, wrong = _parse_span(item)
        info, also_wrong = _parse_info(item)
        messages += [*wrong, *also_wrong]
        if span is None:
            complete = False
        else:
            spans.append((*span, where))
            if info is not None:
                messages += _check_size(info, *span)
        if span is not None and info is not None and not messages and span[1] <= data_bytes:
            entries[name] = HeaderEntry(info, *span)
        problems += [Problem(where, message) for message in messages]
    return entries, metadata, problems + _check_spans(spans, data_bytes, complete)


def header_pieces(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> Iterator[str]:
    """The JSON text of a header in pieces; the tensors lie one after the other.

    Raises:
        KeyCollisionError: A tensor is called ``__metadata__``.
    """
    if METADATA_KEY in tensors:
        raise KeyCollisionError("a header keeps its metadata under this name", METADATA_KEY)
    before = "{"
    if metadata:
        text = json.dumps(dict(metadata), ensure_ascii=False, separators=(",", ":"))
        yield f"{before}{encode_basestring(METADATA_KEY)}:{text}"
        before = ","
    start = 0
    kinds: dict[int, tuple[str, int]] = {}  # by identity: large models share few objects
    for name, info in tensors.items():
        kind = kinds.get(id(info))
        if kind is None:
            shape = ",".join(map(str, info.shape))
            kind = kinds[id(info)] = f'"dtype":"{info.dtype}","shape":[{shape}]', info.nbytes
        stop = start + kind[1]
        yield f'{before}{encode_basestring(name)}:{{{kind[0]},"data_offsets":[{start},{stop}]}}'
        before, start = ",", stop
    yield "{}" if before == "{" else "}"


def build_header(
    tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """Assign offsets to tensors one after the other and write their header.

    The JSON is padded with spaces, so that the data area starts at a multiple of 8. Returns the
    length prefix with the JSON text, and the offset of each tensor in the data area, in order.

    Raises:
        KeyCollisionError: A tensor is called ``__metadata__``.
        OutOfRangeError: The header is longer, or has more tensors, than readers accept.
    """
    if len(tensors) > MAX_TENSORS:
        message = f"a file may hold {MAX_TENSORS:,}; write smaller shards"
        raise OutOfRangeError(message, "tensors", len(tensors))
    text = "".join(header_pieces(tensors, metadata)).encode()
    text += b" " * (-len(text) % 8)
    sizes = (info.nbytes for info in tensors.values())
    offsets = dict(zip(tensors, accumulate(sizes, initial=0), strict=False))
    if len(text) > MAX_HEADER_BYTES:
        raise OutOfRangeError(
            f"a header may take {MAX_HEADER_BYTES}; write smaller shards", "header bytes", len(text)
        )
    return struct.pack("<Q", len(text)) + text, offsets


def write_sparse(
    file: BinaryIO, tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]
) -> None:
    """Write the header of ``build_header`` in parts, and a hole in place of the data."""
    file.write(bytes(PREFIX_BYTES))
    pieces, length = header_pieces(tensors, metadata), 0
    while text := "".join(islice(pieces, _PIECES)):
        length += file.write(text.encode())
    length += file.write(b" " * (-length % 8))
    file.truncate(PREFIX_BYTES + length + sum(info.nbytes for info in tensors.values()))
    file.seek(0)
    file.write(struct.pack("<Q", length))


def header_length(prefix: bytes, file_bytes: int) -> tuple[int, str]:
    """The length of the JSON text by the first 8 bytes of a file, and ``""``; or 0 and why not."""
    if file_bytes < PREFIX_BYTES or len(prefix) < PREFIX_BYTES:
        held = pluralize(min(file_bytes, len(prefix)), "byte")
        return 0, f"the file ends after {held}, expected 8 with the length of the header"
    if prefix == _LFS_POINTER:
        return 0, "is a Git LFS pointer, not the weights; fetch them with git lfs pull"
    (length,) = struct.unpack("<Q", prefix)
    if length > file_bytes - PREFIX_BYTES:
        return 0, (
            f"the first 8 bytes say that {length} bytes of header follow, but only "
            f"{file_bytes - PREFIX_BYTES} do; cut short, or no safetensors file"
        )
    if length > MAX_HEADER_BYTES:
        return 0, f"the header takes {length} bytes, at most {MAX_HEADER_BYTES} are read"
    return length, ""


def read_raw_header(file: BinaryIO, file_bytes: int) -> tuple[bytes, str]:
    """Read length prefix and JSON text from the start of a file; or the prefix, and why no more."""
    prefix = file.read(PREFIX_BYTES)
    length, message = header_length(prefix, file_bytes)
    return prefix + file.read(length), message


def check_name(name: str) -> list[str]:
    """Return why a string is not a valid tensor name; an empty list if it is."""
    ordinary = 0 < len(name) <= MAX_NAME_CHARS and name.isprintable()
    if ordinary and name[0] != "/" and ".." not in name:  # almost every name
        return []
    if not name:
        return ["the name of a tensor is empty"]
    if len(name) > MAX_NAME_CHARS:
        return [f"the name has {len(name):,} characters, at most {MAX_NAME_CHARS:,} are read"]
    if bad := find_unprintable(name):
        return [f"the name holds the control character U+{ord(bad):04X}"]
    if name[0] == "/" or (".." in name and ".." in name.split("/")):
        return ["the name holds parts of a path ('..', or a slash in front)"]
    return []


def find_unprintable(name: str) -> str:
    """The first character that cannot be printed as it is, or ""."""
    bad = None if name.isprintable() else _UNPRINTABLE.search(name)
    return bad[0] if bad else ""


def format_tensor_name(name: str) -> str:
    """A tensor's name for messages: as it is, or quoted where that would be misleading."""
    sound = 0 < len(name) <= MAX_NAME_CHARS and not find_unprintable(name)
    return name if sound else format_value(name)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value <= MAX_INT


def _parse_metadata(value: object) -> tuple[dict[str, str], list[str]]:
    if value is None:  # what mx.save_safetensors writes when it is given none
        return {}, []
    if not isinstance(value, dict):
        return {}, [f"is {format_value(value)}, expected an object of strings"]
    wrong = [
        f"{format_value(key)} is {format_value(item)}, expected a string"
        for key, item in islice(value.items(), MAX_PROBLEMS)
        if not isinstance(item, str)
    ]
    return {key: item for key, item in value.items() if isinstance(item, str)}, wrong


def _parse_span(item: object) -> tuple[tuple[int, int] | None, list[str]]:
    """Read ``data_offsets``; an item that is not an object is reported here, not twice."""
    if not isinstance(item, dict):
        expected = "an object with dtype, shape and data_offsets"
        return None, [f"is {format_value(item)}, expected {expected}"]
    if "data_offsets" not in item:
        return None, ["has no data_offsets"]
    match item["data_offsets"]:
        case [start, stop] if _is_count(start) and _is_count(stop):
            if start > stop:
                return None, [f"data_offsets [{start}, {stop}] end before they start"]
            return (start, stop), []
        case found:
            expected = "two numbers [start, stop]"
            return None, [f"data_offsets is {format_value(found)}, expected {expected}"]


def _parse_info(item: object) -> tuple[TensorInfo | None, list[str]]:
    if not isinstance(item, dict):
        return None, []
    messages = []
    dtype, shape = item.get("dtype"), item.get("shape")
    if "dtype" not in item:
        messages.append("has no dtype")
    elif not isinstance(dtype, str) or dtype not in NUMPY_DTYPE:
        messages.append(f"dtype is {format_value(dtype)}, known: {', '.join(NUMPY_DTYPE)}")
    if "shape" not in item:
        messages.append("has no shape")
    elif not isinstance(shape, list) or not all(map(_is_count, shape)):
        messages.append(
            f"shape is {format_value(shape)}, expected a list of numbers from 0 to 2**63 - 1"
        )
    elif len(shape) > MAX_RANK:
        messages.append(f"shape has {len(shape)} axes, at most {MAX_RANK} are read")
    elif prod(filter(None, shape)) > MAX_INT:
        messages.append(f"shape {format_value(shape)} has more than 2**63 - 1 elements")
    elif 0 in shape and prod(filter(None, shape)) > MAX_EMPTY_AXES:
        messages.append(
            f"shape {format_value(shape)} holds nothing, and its other axes multiply to more than "
            f"{MAX_EMPTY_AXES:,}"
        )
    if messages or not isinstance(dtype, str) or not isinstance(shape, list):
        return None, messages
    return shared_info(dtype, tuple(shape)), []


def _valid_entry(name: str, item: Any, data_bytes: int) -> HeaderEntry | None:
    """The entry of an ordinary tensor; None where a closer look is needed, or something is wrong.

    Almost every entry is ordinary, and the functions that say what is wrong take longer.
    """
    try:
        dtype, shape, (start, stop) = item["dtype"], item["shape"], item["data_offsets"]
    except (KeyError, TypeError, ValueError):
        return None
    if type(shape) is not list or len(shape) > MAX_RANK:
        return None
    counts = [start, stop, *shape]
    if {*map(type, counts)} != {int} or min(counts) < 0 or 0 in shape or stop > data_bytes:
        return None
    if type(dtype) is not str or dtype not in NUMPY_DTYPE or check_name(name):
        return None
    info = shared_info(dtype, tuple(shape))
    return HeaderEntry(info, start, stop) if info.nbytes == stop - start else None


def _check_size(info: TensorInfo, start: int, stop: int) -> list[str]:
    if info.nbytes == stop - start:
        return []
    return [
        f"{info} takes {info.nbytes} bytes, but data_offsets [{start}, {stop}] hold {stop - start}"
    ]


def _check_spans(
    spans: Iterable[tuple[int, int, str]], data_bytes: int, complete: bool
) -> list[Problem]:
    """Find overlaps, holes, and a data area that is too short or too long."""
    problems: list[Problem] = []
    beyond: list[tuple[int, int, str]] = []
    end, owner = 0, ""
    for start, stop, name in sorted(spans):
        if len(problems) >= MAX_PROBLEMS:
            problems.append(Problem("header", "has more problems, which are not listed"))
            return problems
        if stop > data_bytes:
            beyond.append((start, stop, name))
        if start < end:
            message = f"overlaps {owner}: starts at byte {start}, which ends at {end}"
            problems.append(Problem(name, message))
        elif start > end and complete:
            before = f"{owner} ends" if owner else "the data starts"
            message = f"starts at byte {start}, but {before} at {end}: a hole between"
            problems.append(Problem(name, message))
        if stop >= end:
            end, owner = stop, name
    if beyond:  # one problem however many tensors: the file was cut
        more = f" (and {pluralize(len(beyond) - 1, 'more tensor')})" if len(beyond) > 1 else ""
        _, stop, name = beyond[0]
        message = (
            f"ends at byte {stop} of the data, of which the file has {data_bytes}{more}; was it "
            "downloaded to its end?"
        )
        problems.append(Problem(name, message))
    elif end < data_bytes and complete:
        message = f"the tensors end at byte {end} of the data, the file at {data_bytes}"
        problems.append(Problem("header", message))
    return problems
