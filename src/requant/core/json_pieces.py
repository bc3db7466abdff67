"""JSON of large documents: data out of dataclasses, and the text in pieces.

The text is that of ``json.dumps``. A ``Rows`` is a list whose items are made one at a time while
the text is written, so that a document of a million objects takes the memory of one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from json.encoder import encode_basestring_ascii
from types import NoneType
from typing import Any, Final

_ATOMS: Final = frozenset({str, int, bool, float, NoneType})  # data already


@dataclass(frozen=True, slots=True)
class Rows:
    """A list of a document whose items are made when they are needed."""

    make: Callable[[], Iterable[Any]]  # called for each pass over the items


def as_data(value: Any) -> Any:
    """What ``dataclasses.asdict`` returns, without copies of what is data already."""
    kind: Any = type(value)
    if kind in _ATOMS:
        return value
    if kind is tuple:
        return tuple([x if type(x) in _ATOMS else as_data(x) for x in value])
    names = _field_names(kind)
    if names is not None:
        return {
            name: x if type(x := getattr(value, name)) in _ATOMS else as_data(x) for name in names
        }
    if kind is dict:
        return {key: as_data(item) for key, item in value.items()}
    if kind is list:
        return [as_data(item) for item in value]
    return value


@cache
def _field_names(kind: Hashable) -> tuple[str, ...] | None:
    if not (isinstance(kind, type) and is_dataclass(kind)):
        return None
    return tuple(x.name for x in fields(kind))


def compact_pieces(document: Mapping[str, Any]) -> Iterator[str]:
    """The text of ``json.dumps(document, sort_keys=True, separators=(",", ":"))``."""
    encode = json.JSONEncoder(sort_keys=True, separators=(",", ":")).encode
    before = "{"
    for key, value in sorted(document.items()):
        yield f"{before}{encode(key)}:"
        before = ","
        if not isinstance(value, Rows):
            yield encode(value)
            continue
        opening = "["
        for item in value.make():
            yield opening + encode(item)
            opening = ","
        yield "]" if opening == "," else "[]"
    yield "}" if document else "{}"


def indented_pieces(document: Mapping[str, Any]) -> Iterator[str]:
    """The text of ``json.dumps(document, indent=2)``."""
    before = "{\n  "
    for key, value in document.items():
        yield f"{before}{json.dumps(key)}: "
        before = ",\n  "
        if not isinstance(value, Rows):
            yield _indented(value, "\n  ")
            continue
        opening = "[\n    "
        for item in value.make():
            yield opening + _indented(item, "\n    ")
            opening = ",\n    "
        yield "\n  ]" if opening[0] == "," else "[]"
    yield "\n}" if document else "{}"


def _indented(value: Any, line: str) -> str:
    """A value, whose lines but the first begin with ``line``."""
    if isinstance(value, str):
        return encode_basestring_ascii(value)
    if type(value) is int:
        return repr(value)
    if value is None:
        return "null"
    inner = f"{line}  "
    if isinstance(value, dict) and value:
        entries = [f"{_key(key)}: {_indented(item, inner)}" for key, item in value.items()]
        return f"{{{inner}{f',{inner}'.join(entries)}{line}}}"
    if isinstance(value, list | tuple) and value:
        return f"[{inner}{f',{inner}'.join([_indented(x, inner) for x in value])}{line}]"
    return json.dumps(value)


def _key(key: Any) -> str:
    if isinstance(key, str):
        return encode_basestring_ascii(key)
    return json.dumps({key: 0})[1:-4]  # json writes numbers, true and null as strings
