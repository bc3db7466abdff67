"""The language of quantizations: the SPEC that overrides and recipes give a layer.

``8`` is bits, ``8:32`` bits and group size, ``mxfp4`` a mode, ``skip`` leaves a layer alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from requant.arrays.native import check_quantization
from requant.errors import OutOfRangeError, UnknownValueError, UsageError
from requant.patterns import PatternError, compile
from requant.schema import SKIP, Quantization, QuantMode, Skip

Spec = Quantization | Skip

# MLX's own group size and bits for each mode (what mx.quantize takes when told nothing).
MODE_DEFAULTS = {
    QuantMode.AFFINE: (64, 4),
    QuantMode.MXFP4: (32, 4),
    QuantMode.MXFP8: (32, 8),
    QuantMode.NVFP4: (16, 4),
}


def resolve_quantization(
    bits: int | None = None, group_size: int | None = None, mode: str | None = None
) -> Quantization:
    """Fill what is not said with MLX's defaults for the mode, and check the whole.

    Raises:
        UnknownValueError: ``mode`` is no MLX mode.
        OutOfRangeError: The mode has no such bits or group size.
    """
    tags = [known.value for known in QuantMode]
    tag = QuantMode.AFFINE.value if mode is None else mode.lower()
    if tag not in tags:
        raise UnknownValueError("no such quantization mode", str(mode), tags)
    default_group_size, default_bits = MODE_DEFAULTS[QuantMode(tag)]
    quantization = Quantization(
        default_group_size if group_size is None else group_size,
        default_bits if bits is None else bits,
        QuantMode(tag),
    )
    check_quantization(quantization.bits, quantization.group_size, tag)
    return quantization


def parse_spec(text: str, base: Quantization | None = None) -> Spec:
    """Parse the right side of an override.

    ``skip`` leaves a layer as it is; ``8`` is affine with 8 bits and the group size of
    ``base`` where that is affine, else 64; ``8:32`` names the group size; ``mxfp4``,
    ``mxfp8``, ``nvfp4`` and ``affine`` stand for the mode with its defaults.

    Raises:
        UsageError: The text is none of these.
    """
    word = text.strip().lower()
    if word == "skip":
        return SKIP
    try:
        if word in [mode.value for mode in QuantMode]:
            return resolve_quantization(mode=word)
        if match := re.fullmatch(r"(\d{1,3})(?::(\d{1,6}))?", word):
            group_size = int(match[2]) if match[2] else None
            if group_size is None and base is not None and base.mode is QuantMode.AFFINE:
                group_size = base.group_size
            return resolve_quantization(int(match[1]), group_size)
    except OutOfRangeError as error:
        raise UsageError(f"{text!r} is no quantization of MLX: {error}") from error
    raise UsageError(
        f"{text!r} is no SPEC; write bits (8), bits:group (8:32), a mode "
        f"({', '.join(mode.value for mode in QuantMode)}) or skip"
    )


def check_regex(pattern: str, option: str) -> None:
    """Raise UsageError where ``pattern`` is not a valid regular expression."""
    try:
        compile(pattern)
    except PatternError as error:
        raise UsageError(f"{option} {error}".strip()) from error


def format_spec(spec: Spec) -> str:
    """A spec as it is typed."""
    if not isinstance(spec, Quantization):
        return "skip"
    affine = spec.mode is QuantMode.AFFINE
    return f"{spec.bits}:{spec.group_size}" if affine else spec.mode.value


SIZE_UNITS: dict[str, int] = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
SIZE_UNITS |= {f"{unit}IB": size for unit, size in SIZE_UNITS.items() if unit}
SIZE_UNITS |= {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_size(text: str) -> int:
    """Bytes of a size such as ``500MB``.

    ``KB``, ``MB``, ``GB`` count in thousands, ``KiB``, ``MiB``, ``GiB`` and the bare
    ``K``, ``M``, ``G`` in 1024s; upper or lower case; no unit means bytes.

    Raises:
        UsageError: The text is no size, or less than a byte.

    Example:
        >>> parse_size("2GB"), parse_size("1.5KiB")
        (2000000000, 1536)
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    unit = SIZE_UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None:
        raise UsageError(f"{text!r} is no size; write 500MB, 2GB, 1GiB or plain bytes")
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
    units = ((unit, SIZE_UNITS[unit]) for unit in ("TIB", "GIB", "MIB", "KIB"))
    for unit, size in units:
        if nbytes and nbytes % size == 0:
            return f"{nbytes // size}{unit[0]}iB"
    return str(nbytes)


@dataclass(frozen=True, slots=True)
class SizeBudget:
    """How large an output may be.

    Attributes:
        text: As it was typed.
        amount: Bits per weight, or bytes.
        is_size: It is bytes.
    """

    text: str
    amount: Fraction
    is_size: bool

    def limit(self, parameters: int) -> int:
        """Most bytes of tensor data for a model of so many weights."""
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
        raise UsageError(f"{words!r} is no budget; write bits per weight (4.5) or a size (12GB)")
    amount = Fraction(match[1]) * unit
    if not match[2] and not 0 < amount <= 32:
        raise UsageError(
            f"budget {words} means bits per weight, which are more than 0 and at most 32; a size "
            "has a unit, as in 12GB or 500MB"
        )
    return SizeBudget(words, amount, bool(match[2]))
