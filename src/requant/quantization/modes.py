"""The modes of MLX: which bits and group sizes each takes, and their defaults."""

from __future__ import annotations

from requant.errors import OutOfRangeError, UnknownValueError
from requant.quantization.config import Quantization, QuantMode
from requant.text import join_or

SEARCH_LEVELS = ("fast", "best")
MODES = tuple(mode.value for mode in QuantMode)
AFFINE_BITS = (1, 2, 3, 4, 5, 6, 8)
AFFINE_GROUP_SIZES = (32, 64, 128)
# Group size and bits that mx.quantize takes by default; the float modes have no others.
MODE_DEFAULTS = {
    QuantMode.AFFINE: (64, 4),
    QuantMode.MXFP4: (32, 4),
    QuantMode.MXFP8: (32, 8),
    QuantMode.NVFP4: (16, 4),
}


def check_quantization(bits: int, group_size: int, mode: str) -> None:
    """Check that MLX supports a quantization.

    ========  ======================  ============
    mode      bits                    group_size
    ========  ======================  ============
    affine    1, 2, 3, 4, 5, 6 or 8   32, 64, 128
    mxfp4     4                       32
    mxfp8     8                       32
    nvfp4     4                       16
    ========  ======================  ============

    Raises:
        UnknownValueError: The mode is none of these.
        OutOfRangeError: ``bits`` or ``group_size`` is none of the mode's.
    """
    if mode not in MODES:
        raise UnknownValueError("[quantization] unknown mode", str(mode), MODES)
    only_group, only_bits = MODE_DEFAULTS[QuantMode(mode)]
    legal_bits = AFFINE_BITS if mode == "affine" else (only_bits,)
    legal_groups = AFFINE_GROUP_SIZES if mode == "affine" else (only_group,)
    if bits not in legal_bits:
        raise OutOfRangeError(f"{mode} takes {join_or(legal_bits)}", "bits", bits)
    if group_size not in legal_groups:
        raise OutOfRangeError(f"{mode} takes {join_or(legal_groups)}", "group_size", group_size)


def resolve_quantization(
    bits: int | None = None, group_size: int | None = None, mode: str | None = None
) -> Quantization:
    """Complete a quantization with MLX's defaults for the mode, and check it.

    Raises:
        UnknownValueError: ``mode`` is not a mode of MLX.
        OutOfRangeError: The mode has no such bits or group size.
    """
    tag = QuantMode.AFFINE.value if mode is None else mode.lower()
    if tag not in MODES:
        raise UnknownValueError("no such quantization mode", str(mode), MODES)
    default_group_size, default_bits = MODE_DEFAULTS[QuantMode(tag)]
    quantization = Quantization(
        default_group_size if group_size is None else group_size,
        default_bits if bits is None else bits,
        QuantMode(tag),
    )
    check_quantization(quantization.bits, quantization.group_size, tag)
    return quantization
