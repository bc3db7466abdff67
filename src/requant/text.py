"""How values, names and counts are written in messages."""

from __future__ import annotations

import json
from collections.abc import Sequence

_SHOWN_CHARS = 60  # of one value in a message


def format_value(value: object) -> str:
    """A value out of a file in a few characters, as JSON spells it; names as 'name'."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list | tuple | frozenset):
        if len(value) > 8 or any(isinstance(item, list | tuple | dict | str) for item in value):
            return f"a list of {len(value):,}"
        return "[" + ", ".join(format_value(item) for item in value) + "]"
    if isinstance(value, str):
        return repr(value if len(value) <= _SHOWN_CHARS else value[:_SHOWN_CHARS] + "...")
    text = json.dumps(value, default=str)
    return text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "..."


def pluralize(number: int, word: str) -> str:
    """``1 layer``, ``1,234 layers``."""
    return f"{number:,} {word}" if number == 1 else f"{number:,} {word}s"


def pluralize_are(number: int, word: str) -> str:
    """``1 value is``, ``1,234 values are``."""
    return f"{pluralize(number, word)} {'is' if number == 1 else 'are'}"


def damage(what: str, number: int, row: int) -> str:
    """``scales hold NaN or infinity (2 values, first in row 3): the source is damaged``."""
    where = f"{pluralize(number, 'value')}, first in row {row}"
    return f"{what} hold NaN or infinity ({where}): the source is damaged"


def join_or(values: Sequence[object]) -> str:
    """``32, 64 or 128``."""
    *rest, last = (str(value) for value in values)
    return f"{', '.join(rest)} or {last}" if rest else last


def format_range(low: int, high: int) -> str:
    """``9``, or ``9 to 12``."""
    return str(low) if low == high else f"{low} to {high}"


def utf8_error(error: UnicodeDecodeError) -> str:
    """What is wrong with bytes that are not text."""
    return f"is not UTF-8: byte {error.start:,} is 0x{error.object[error.start]:02x}"


def one_line(error: BaseException) -> str:
    """What another library says, in one line and with no full stop."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def join_first(names: Sequence[str], most: int = 3) -> str:
    """The first of many names, and how many more there are."""
    shown, more = ", ".join(names[:most]), len(names) - most
    return f"{shown} and {more:,} more" if more > 0 else shown
