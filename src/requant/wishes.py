"""What the user wants: one frozen record, checked before anything is read.

The same record serves ``plan`` and ``convert``, the command line and Python.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from requant.arrays.native import check_quantization
from requant.errors import OutOfRangeError, UnknownValueError, UsageError
from requant.schema import SKIP, Quantization, QuantMode, Skip

# MLX's own group size and bits for each mode (what mx.quantize takes when told nothing).
MODE_DEFAULTS = {
    QuantMode.AFFINE: (64, 4),
    QuantMode.MXFP4: (32, 4),
    QuantMode.MXFP8: (32, 8),
    QuantMode.NVFP4: (16, 4),
}
DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}

LAYOUTS = ("auto", "keep", "mlx-lm")
ACT_ORDERS = ("requantize", "dense", "refuse")

Spec = Quantization | Skip
Override = tuple[str, Spec]


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


def parse_override(
    text: str | tuple[str, Spec | str], base: Quantization | None = None
) -> Override:
    """Parse ``REGEX=SPEC``; the last ``=`` divides, so a regex may hold one.

    Raises:
        UsageError: No ``=``, an unknown SPEC, or a regex that does not compile.
    """
    if isinstance(text, tuple):
        pattern, spec = text
    else:
        pattern, equals, spec = text.rpartition("=")
        if not equals or not pattern:
            raise UsageError(f"override {text!r} is not REGEX=SPEC, as in 'lm_head=8'")
    check_regex(pattern, "override")
    return pattern, parse_spec(spec, base) if isinstance(spec, str) else spec


def check_regex(pattern: str, option: str) -> None:
    """Raise UsageError where ``pattern`` is no regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise UsageError(f"{option} {pattern!r} is no regular expression: {error}") from error


@dataclass(frozen=True, slots=True)
class Wishes:
    """What to do with a source; every field as the option of the same name.

    Attributes:
        quantization: Target of every chosen layer. None keeps a quantized source as
            it is, and stands for MLX's default (affine, 4 bits, group 64) on a dense one.
        dequantize: Write every layer dense.
        dtype: Header name ("BF16") for floating tensors; None keeps each one's own.
        overrides: Regex on the layer path -> target; the last match wins.
        only: Regexes; a layer that none of them matches is left as it is.
        layout: "keep" leaves tensors their names; "mlx-lm" gives them the names, shapes and
            choice of layers of mlx-lm's own converter; "auto" does so where mlx-lm can.
        act_order: What becomes of GPTQ layers whose inputs are out of order, where the order
            cannot be moved into another layer: "requantize" (8 bits), "dense" or "refuse".
        max_shard_bytes: Output shards are cut before they exceed this.
        spoiled: Layers that a first pass found to hold NaN or infinity; left as they are.
    """

    quantization: Quantization | None = None
    dequantize: bool = False
    dtype: str | None = None
    overrides: tuple[Override, ...] = ()
    only: tuple[str, ...] = ()
    layout: str = "auto"
    max_shard_bytes: int = 5 << 30
    spoiled: frozenset[str] = frozenset()
    act_order: str = "requantize"

    @staticmethod
    def build(
        quantization: Quantization | None = None,
        *,
        bits: int | None = None,
        group_size: int | None = None,
        mode: str | None = None,
        dequantize: bool = False,
        dtype: str | None = None,
        overrides: Iterable[str | tuple[str, Spec | str]] = (),
        only: Sequence[str] = (),
        layout: str = "auto",
        max_shard_bytes: int = 5 << 30,
        act_order: str = "requantize",
    ) -> Wishes:
        """Check and assemble what the command line and the Python doors take.

        Raises:
            UsageError: Wishes contradict each other or cannot be parsed.
            OutOfRangeError: MLX has no such bits or group size in the mode.
            UnknownValueError: Unknown mode or dtype.
        """
        if quantization is not None:
            if (bits, group_size, mode) != (None, None, None):
                raise UsageError("give either a Quantization, or bits, group_size and mode")
            check_quantization(quantization.bits, quantization.group_size, quantization.mode.value)
        elif (bits, group_size, mode) != (None, None, None):
            quantization = resolve_quantization(bits, group_size, mode)
        if dequantize and quantization is not None:
            raise UsageError("choose one: dequantize, or bits, group size and mode")
        if dtype is not None and dtype not in DTYPES:
            raise UnknownValueError("no such dtype", dtype, list(DTYPES))
        if layout not in LAYOUTS:
            raise UnknownValueError("no such layout", layout, LAYOUTS)
        if act_order not in ACT_ORDERS:
            raise UnknownValueError("no such way with act-order", act_order, ACT_ORDERS)
        if max_shard_bytes < 1:
            raise UsageError(f"a shard of {max_shard_bytes} bytes holds nothing")
        only = (only,) if isinstance(only, str) else tuple(only)
        for pattern in only:
            check_regex(pattern, "only")
        return Wishes(
            quantization,
            dequantize,
            None if dtype is None else DTYPES[dtype],
            tuple(parse_override(text, quantization) for text in overrides),
            only,
            layout,
            max_shard_bytes,
            act_order=act_order,
        )
