"""Sizes in bytes, and budgets: a size or bits per weight."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from requant.errors import UsageError

BUDGET_BITS = (2, 3, 4, 5, 6, 8)  # among which a budget chooses

SIZE_UNITS: dict[str, int] = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
SIZE_UNITS |= {f"{unit}IB": size for unit, size in SIZE_UNITS.items() if unit}
SIZE_UNITS |= {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_size(text: str) -> int:
    """Bytes of a size such as ``500MB``.

    ``KB``, ``MB``, ``GB`` count in thousands, ``KiB``, ``MiB``, ``GiB`` and the bare
    ``K``, ``M``, ``G`` in 1024s; upper or lower case; no unit means bytes.

    Raises:
        UsageError: The text is not a valid size, or less than a byte.

    Example:
        >>> parse_size("2GB"), parse_size("1.5KiB")
        (2000000000, 1536)
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    unit = SIZE_UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None:
        raise UsageError(f"{text!r} is not a valid size; write 500MB, 2GB, 1GiB or plain bytes")
    whole, _, part = match[1].partition(".")
    nbytes: int = int(whole + part) * unit // 10 ** len(part)
    if nbytes < 1:
        raise UsageError(f"{text!r} is less than one byte")
    return nbytes


def size_text(nbytes: int) -> str:
    """A size as ``parse_size`` reads it, in the largest binary unit that divides it.

    Example:
        >>> size_text(5 << 30), size_text(1000)
        ('5GiB', '1000')
    """
    for unit in "TGMK":
        if nbytes and nbytes % SIZE_UNITS[unit] == 0:
            return f"{nbytes // SIZE_UNITS[unit]}{unit}iB"
    return str(nbytes)


@dataclass(frozen=True, slots=True)
class SizeBudget:
    """The maximum size of an output."""

    text: str  # as it was typed
    amount: Fraction  # bits per weight, or bytes
    is_size: bool  # whether ``amount`` is bytes

    def limit(self, parameters: int) -> int:
        """The maximum of tensor data, in bytes, for a number of weights."""
        return int(self.amount if self.is_size else self.amount * parameters / 8)


def parse_budget(text: str | float) -> SizeBudget:
    """Read ``4.5`` (bits per weight) or ``12GB`` (bytes of tensors).

    Raises:
        UsageError: It is neither.

    Example:
        >>> parse_budget("4.5").limit(1000), parse_budget("2KB").limit(1000)
        (562, 2000)
    """
    words = str(text).strip()
    match = re.fullmatch(r"(\d{1,20}(?:\.\d{1,20})?)\s*([A-Za-z]*)", words)
    unit = SIZE_UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or isinstance(text, bool):
        raise UsageError(
            f"{words!r} is not a valid budget; write bits per weight (4.5) or a size (12GB)"
        )
    amount = Fraction(match[1]) * unit
    if not match[2] and not 0 < amount <= 32:
        raise UsageError(
            f"budget {words} means bits per weight, which are more than 0 and at most 32; a size "
            "has a unit, as in 12GB or 500MB"
        )
    return SizeBudget(words, amount, bool(match[2]))
