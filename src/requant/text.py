"""How values, names, counts and errors are written in messages and tables."""

from __future__ import annotations

import json
from collections.abc import Sequence

_SHOWN_CHARS = 60  # of one value in a message


def format_value(value: object) -> str:
    """Write a value of a file in at most some 60 characters, as JSON; texts as ``'text'``."""
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


def format_size(nbytes: float) -> str:
    """Three digits and a decimal unit: ``1.71 MB``."""
    if nbytes < 999.5:
        return f"{nbytes:.0f} B"
    units = iter(("kB", "MB", "GB", "TB"))
    unit = next(units)
    nbytes /= 1000
    while nbytes >= 999.5 and unit != "TB":
        unit, nbytes = next(units), nbytes / 1000
    return f"{nbytes:.{2 if nbytes < 9.995 else 1 if nbytes < 99.95 else 0}f} {unit}"


def format_seconds(seconds: float) -> str:
    """``0.42 s``, ``42 s``, ``3 min 05 s``, ``2 h 10 min``."""
    if seconds < 9.95:
        return f"{seconds:.2f} s" if seconds < 0.995 else f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def format_percent(share: float | None) -> str:
    """An error in percent with three digits; "" for None.

    A record has four digits and ``compare`` all of them: both are rounded to four first, so that
    they print the same.
    """
    return "" if share is None else f"{100 * float(f'{share:.4g}'):#.3g} %"


def os_error_text(error: OSError) -> str:
    """``Permission denied``: the message of an OSError without its number and path."""
    return error.strerror or str(error)


def utf8_error(error: UnicodeDecodeError) -> str:
    """``is not UTF-8: byte 12 is 0xff``."""
    return f"is not UTF-8: byte {error.start:,} is 0x{error.object[error.start]:02x}"


def one_line(error: BaseException) -> str:
    """The message of another library's error in one line, without a full stop."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def join_first(names: Sequence[str], most: int = 3) -> str:
    """``a, b, c and 4 more``."""
    shown, more = ", ".join(names[:most]), len(names) - most
    return f"{shown} and {more:,} more" if more > 0 else shown


def escape_control_chars(text: str) -> str:
    """Escape control characters, which a name from an untrusted file could send to a terminal."""
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape", "surrogatepass").decode()
        for c in text
    )
