"""SPEC, the notation of a layer's quantization in overrides and recipes.

``8`` is bits, ``8:32`` bits and group size, ``mxfp4`` a mode, and ``skip`` leaves a layer as it is.
"""

from __future__ import annotations

import re

from requant.core.regex import PatternError, compile
from requant.errors import OutOfRangeError, UsageError
from requant.quantization.config import SKIP, Quantization, QuantMode, Skip
from requant.quantization.modes import resolve_quantization

Spec = Quantization | Skip


def parse_spec(text: str, base: Quantization | None = None) -> Spec:
    """Parse a SPEC; bits alone take the group size of ``base`` where that is affine, else 64.

    Raises:
        UsageError: The text is not a SPEC.
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
        raise UsageError(f"{text!r} is not a quantization of MLX: {error}") from error
    raise UsageError(
        f"{text!r} is not a valid SPEC; write bits (8), bits:group (8:32), a mode "
        f"({', '.join(mode.value for mode in QuantMode)}) or skip"
    )


def check_regex(pattern: str, option: str) -> None:
    """Raise UsageError where ``pattern`` is not a valid regular expression."""
    try:
        compile(pattern)
    except PatternError as error:
        raise UsageError(f"{option} {error}".strip()) from error


def format_spec(spec: Spec) -> str:
    """Write a spec as ``parse_spec`` reads it."""
    if not isinstance(spec, Quantization):
        return "skip"
    affine = spec.mode is QuantMode.AFFINE
    return f"{spec.bits}:{spec.group_size}" if affine else spec.mode.value
