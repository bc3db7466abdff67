"""Text files as documents: the whole file, or one a line of a ``.jsonl``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from requant.errors import ParseError
from requant.text import format_value, utf8_error

_IMAGE_KEYS = ("image", "images")


def read_documents(path: Path) -> Iterator[str]:
    """The documents of a file that are text alone; rows that name images are left out.

    A line of JSON is a string, or an object with the string ``text``.

    Raises:
        ParseError: A line is neither, or the file is not UTF-8.
    """
    if path.suffix != ".jsonl":
        yield _read(path)
        return
    for number, row in _rows(path):
        if _names_images(row):
            continue
        found = row.get("text") if isinstance(row, Mapping) else row
        if not isinstance(found, str):
            raise ParseError(
                f"{path}: line {number} is {format_value(row)}, expected a string "
                'or an object with a string "text"'
            )
        yield found


def read_image_rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The objects of a ``.jsonl`` file that name images, each with the number of its line.

    Raises:
        ParseError: A line is not JSON, or the file is not UTF-8.
    """
    if path.suffix == ".jsonl":
        yield from ((number, row) for number, row in _rows(path) if _names_images(row))


def _names_images(row: Any) -> bool:
    return isinstance(row, Mapping) and any(row.get(key) for key in _IMAGE_KEYS)


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(_read(path).splitlines(), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ParseError(f"{path}: line {number} is not valid JSON: {error}") from error


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ParseError(f"{path}: {utf8_error(error)}") from error
