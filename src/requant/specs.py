"""The language of quantizations: the SPEC that overrides and recipes give a layer.

``8`` is bits, ``8:32`` bits and group size, ``mxfp4`` a mode, ``skip`` leaves a layer alone.
"""

from __future__ import annotations

import re

from requant.arrays.native import check_quantization
from requant.errors import OutOfRangeError, UnknownValueError, UsageError
from requant.patterns import PatternError, compiled
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
    """Raise UsageError where ``pattern`` is no regular expression."""
    try:
        compiled(pattern)
    except PatternError as error:
        raise UsageError(f"{option} {error}") from error
