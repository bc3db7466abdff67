"""Strict JSON: depth, size, integers and duplicate keys are checked while a document is read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import islice
from typing import Any, NoReturn

from requant.core.limits import MAX_JSON_DEPTH, MAX_JSON_VALUES
from requant.errors import MAX_PROBLEMS, ParseError
from requant.text import format_value, utf8_error

_INT32_MIN, _INT32_MAX = -(2**31), 2**31 - 1


def read_int(
    block: Mapping[str, Any],
    key: str,
    default: int | None = None,
    *,
    low: int = _INT32_MIN,
    high: int = _INT32_MAX,
) -> int:
    """Return an integer of a JSON object within ``low..high``; ``default`` if it is missing.

    Raises:
        ParseError: Missing without a default, no integer (``true`` and ``4.0`` are none), or
            out of bounds.
    """
    if key not in block:
        if default is not None:
            return default
        raise ParseError(f"{key!r} is missing")
    value = block[key]
    if not isinstance(value, int) or isinstance(value, bool):
        raise ParseError(f"{key!r} must be an integer, got {format_value(value)}")
    if not low <= value <= high:
        raise ParseError(f"{key!r} must lie between {low} and {high}, got {value}")
    return value


def reject_constant(name: str) -> NoReturn:
    """Reject NaN and Infinity, which ``json`` reads but JSON does not have."""
    raise ValueError(f"{name} is not a JSON number")


def parse_json_object(
    raw: bytes | memoryview,
    *,
    nan: bool = False,
    same_twice: bool = False,
    max_values: int = MAX_JSON_VALUES,
) -> tuple[dict[str, Any], list[str]]:
    """Parse a JSON text in UTF-8 that must be one object: the object, or {}, and the problems.

    ``nan`` accepts ``NaN`` and ``Infinity``, which are not JSON, and ``same_twice`` a key that
    occurs twice with equal values. More values than ``max_values`` are rejected before parsing.
    """
    twice: dict[str, None] = {}

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            first: dict[str, Any] = {}
            for key, item in pairs:
                if key in first and not (same_twice and first[key] == item):
                    twice[key] = None
                first[key] = item
        return value

    data = bytes(raw)
    # Each value follows a bracket or a comma; those within strings count as well.
    values = sum(data.count(mark) for mark in (b"{", b"[", b","))
    if values > max_values:
        return {}, [f"holds more than {max_values:,} JSON values"]
    try:
        text = data.decode("utf-8")
        value = json.loads(
            text, object_pairs_hook=unique, parse_constant=None if nan else reject_constant
        )
        if "\\u" in text:  # a lone surrogate is a str that nothing can print or write
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        return {}, [utf8_error(error)]
    except UnicodeEncodeError:
        return {}, ["is not JSON: half of a surrogate pair is alone"]
    except RecursionError:
        return {}, ["is nested too deeply"]
    except ValueError as error:
        reason = str(error).partition(";")[0]  # of long numbers: how Python's limit is raised
        return {}, [f"is not JSON: {reason}"]
    if not isinstance(value, dict):
        return {}, [f"is {format_value(value)}, expected an object"]
    if _depth(value) > MAX_JSON_DEPTH:
        return {}, [f"is nested too deeply: at most {MAX_JSON_DEPTH} levels are read"]
    keys = islice(twice, MAX_PROBLEMS)
    return value, [f"the key {format_value(key)} occurs more than once" for key in keys]


def _depth(value: object) -> int:
    """Count the levels of objects and lists, without recursion."""
    level: list[Any] = [value]
    depth = 0
    while level:
        depth += 1
        level = [
            item
            for outer in level
            for item in (outer.values() if isinstance(outer, dict) else outer)
            if type(item) is dict or type(item) is list  # what json makes, and much faster asked
        ]
    return depth
