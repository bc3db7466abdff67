"""Which part of a plan one process runs, where several run one plan."""

from __future__ import annotations

import re
from dataclasses import dataclass

from requant.errors import UsageError
from requant.text import format_value

MAX_PARTS = 10_000
_TEXT = re.compile(r"([0-9]{1,6})/([0-9]{1,6})", re.ASCII)


@dataclass(frozen=True, slots=True, order=True)
class Part:
    """Part ``number`` of ``count``; numbers start at 1.

    Example:
        >>> Part.parse("3/8")
        Part(number=3, count=8)
        >>> str(Part(3, 8))
        '3/8'
    """

    number: int
    count: int

    @classmethod
    def parse(cls, text: object) -> Part:
        """Read ``number/count``.

        Raises:
            UsageError: It is not that, or there is no such part.
        """
        if isinstance(text, Part):
            return text
        match = _TEXT.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise UsageError(
                f"--part {format_value(text)} is not NUMBER/COUNT, as 1/8 is for the first of 8"
            )
        part = cls(int(match[1]), int(match[2]))
        if not 1 <= part.number <= part.count <= MAX_PARTS:
            raise UsageError(
                f"--part {part}: parts are numbered from 1 to their count, at most {MAX_PARTS:,}"
            )
        return part

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"
