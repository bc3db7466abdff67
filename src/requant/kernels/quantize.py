"""Quantize and dequantize NumPy arrays with our own kernels.

The bits are those of MLX 0.32.4 on the CPU. Arrays may have any rank from 2 up
and any strides; the last axis is the one that is grouped and packed. bfloat16
and the 8-bit floats are those of ml_dtypes.

One departure: a group too small for an E8M0 scale (modes mxfp4 and mxfp8) is
flushed to zero, where MLX lets the scale's byte wrap around.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike, NDArray

from requant.errors import (
    DivisibilityError,
    InvariantError,
    OutOfRangeError,
    RankMismatchError,
    ShapeMismatchError,
    UnknownValueError,
    UnsupportedDtypeError,
)
from requant.kernels import _native
from requant.quantization.modes import SEARCH_LEVELS, check_quantization

Array = NDArray[Any]

_BFLOAT16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
_FLOAT32: np.dtype[Any] = np.dtype(np.float32)
_KERNEL_NAME = {_FLOAT32: "F32", np.dtype(np.float16): "F16", _BFLOAT16: "BF16"}
_FLOAT_NAMES = ("float32", "float16", "bfloat16")
_BITS_VIEW: dict[int, np.dtype[Any]] = {2: np.dtype(np.uint16), 4: np.dtype(np.uint32)}
_SCALE_BYTES = {
    np.dtype(np.uint8),
    np.dtype(ml_dtypes.float8_e8m0fnu),
    np.dtype(ml_dtypes.float8_e4m3fn),
}


def quantize(
    w: Array,
    group_size: int,
    bits: int,
    mode: str,
    *,
    global_scale: float | Array | None = None,
    search: str | None = None,
    weights: Array | None = None,
) -> tuple[Array, Array, Array | None]:
    """Quantize ``w`` of shape ``(..., out_features, in_features)``.

    Args:
        w: float32, float16 or bfloat16.
        group_size: Inputs with one scale.
        bits: Bits a code.
        mode: One of ``MODES``.
        global_scale: Mode nvfp4 only: the greatest magnitude of the whole tensor.
        search: None for MLX's rule, bit for bit; "fast" or "best" to look for scales and
            biases with a smaller squared error (docs/quantization/search.md).
        weights: With a search: what a squared error counts, one number an input,
            ``(in_features,)``; not negative. All alike by default.

    Returns:
        Words, uint32 ``(..., in_features * bits / 32)``; scales
        ``(..., in_features / group_size)``, in affine mode of the dtype of
        ``w``, else uint8 (E8M0 for mxfp4 and mxfp8, E4M3 for nvfp4); biases like
        the scales in affine mode, else None.

    Raises:
        UnknownValueError: The mode is unknown.
        OutOfRangeError: The mode does not take ``bits`` or ``group_size``.
        UnsupportedDtypeError: ``w`` has another dtype.
        RankMismatchError: ``w`` has fewer than two axes.
        DivisibilityError: ``in_features`` is not a multiple of ``group_size``.
        InvariantError: A global scale outside nvfp4, or not one number; weights
            without a search, or not fit for one.
    """
    check_quantization(bits, group_size, mode)
    _kernel_name(w.dtype, "[quantize] cannot quantize w")
    scale = _global_scale("[quantize]", global_scale, mode)
    if w.ndim < 2:
        raise RankMismatchError("[quantize] w must have at least 2 axes", w.ndim, w.shape)
    n_in = w.shape[-1]
    if n_in % group_size:
        raise DivisibilityError(
            f"[quantize] w has shape {list(w.shape)}, a group takes {group_size} inputs",
            "in_features",
            n_in,
            group_size,
        )
    groups = (*w.shape[:-1], n_in // group_size)
    words = np.empty((*w.shape[:-1], n_in * bits // 32), np.uint32)
    affine = mode == "affine"
    scales = np.empty(groups, w.dtype if affine else np.uint8)
    biases = np.empty(groups, w.dtype) if affine else None
    biases_2d = None if biases is None else _rows(biases)
    parts = _rows(words), _rows(scales), biases_2d
    importance = _search_weights(search, weights, n_in)
    _quantize(_rows(w), group_size, bits, mode, *parts, scale, search, importance)
    return words, scales, biases


def quantize_into(
    w: Array,
    group_size: int,
    bits: int,
    mode: str,
    words: Array,
    scales: Array,
    biases: Array | None,
    *,
    search: str | None = None,
    weights: Array | None = None,
) -> int:
    """Quantize into arrays of the caller: 2-D, C-contiguous, as ``quantize`` returns them.

    ``search`` and ``weights`` are those of ``quantize``.

    Returns:
        The number of groups flushed to zero, too small for an E8M0 scale.

    Raises:
        ValueError: A shape, dtype or layout does not fit.
    """
    check_quantization(bits, group_size, mode)
    importance = _search_weights(search, weights, w.shape[-1])
    return _quantize(w, group_size, bits, mode, words, scales, biases, None, search, importance)


def dequantize(
    words: Array,
    scales: Array,
    biases: Array | None,
    group_size: int,
    bits: int,
    mode: str,
    *,
    global_scale: float | Array | None = None,
    dtype: DTypeLike | None = None,
) -> Array:
    """Compute the values behind ``words``, as MLX does.

    Affine: ``P(S(code * scale) + bias)``, the product rounded to the dtype S of
    the scales and the sum to the promoted dtype P of scales and biases; then cast
    to ``dtype``. Float modes: element times scale, in ``dtype``.

    Args:
        words: uint32 ``(..., in_features * bits / 32)``.
        scales: ``(..., in_features / group_size)``: float32, float16 or bfloat16
            in affine mode, else uint8 (or the bytes as an ml_dtypes float8).
        biases: As the scales in affine mode, else None.
        group_size: Inputs with one scale.
        bits: Bits a code.
        mode: One of ``MODES``.
        global_scale: Mode nvfp4 only; the result is then float32 in any case.
        dtype: float32, float16 or bfloat16; by default P in affine mode, else
            bfloat16.

    Raises:
        UnknownValueError: The mode is unknown.
        OutOfRangeError: The mode does not take ``bits`` or ``group_size``.
        UnsupportedDtypeError: An array or ``dtype`` has a dtype not named above.
        RankMismatchError: ``words`` has fewer than two axes.
        ShapeMismatchError: The shapes do not belong together.
        InvariantError: Biases are missing or too many; a global scale outside
            nvfp4, or not one number.
    """
    check_quantization(bits, group_size, mode)
    scale = _global_scale("[dequantize]", global_scale, mode)
    if words.dtype != np.uint32:
        raise UnsupportedDtypeError("[dequantize] words", words.dtype.name, ("uint32",))
    if words.ndim < 2:
        raise RankMismatchError(
            "[dequantize] words must have at least 2 axes", words.ndim, words.shape
        )
    n_words = words.shape[-1]
    n_in = n_words * 32 // bits
    if n_words * 32 != n_in * bits or n_in % group_size:
        raise DivisibilityError(
            f"[dequantize] words has shape {list(words.shape)}, "
            f"a group takes {group_size * bits // 32} words",
            "words",
            n_words,
            max(group_size * bits // 32, 1),
        )
    groups = (*words.shape[:-1], n_in // group_size)
    if scales.shape != groups:
        raise ShapeMismatchError("[dequantize] scales do not fit the words", groups, scales.shape)
    default = _check_scales(scales, biases, mode)
    if scale is not None:
        default, dtype = _FLOAT32, None
    out_dtype = default if dtype is None else np.dtype(dtype)
    _kernel_name(out_dtype, "[dequantize] cannot produce dtype")
    out = np.empty((*words.shape[:-1], n_in), out_dtype)
    biases_2d = None if biases is None else _rows(biases)
    _dequantize(_rows(words), _rows(scales), biases_2d, group_size, bits, mode, _rows(out), scale)
    return out


def dequantize_into(
    words: Array,
    scales: Array,
    biases: Array | None,
    group_size: int,
    bits: int,
    mode: str,
    out: Array,
    global_scale: float | None = None,
) -> None:
    """Dequantize into ``out``; every array 2-D and C-contiguous.

    With a ``global_scale`` (nvfp4 only) ``out`` is float32.

    Raises:
        ValueError: A shape, dtype or layout does not fit.
    """
    check_quantization(bits, group_size, mode)
    _dequantize(words, scales, biases, group_size, bits, mode, out, global_scale)


def pack_words(codes: Array, bits: int) -> Array:
    """Pack codes ``(..., n)``, uint8 or uint32, into uint32 words ``(..., n * bits / 32)``.

    The last axis is one little-endian bit stream: code ``k`` takes the bits from
    ``k * bits`` on. Bits of a code above ``bits`` are dropped.

    Raises:
        OutOfRangeError: ``bits`` is not 1 to 8.
        UnsupportedDtypeError: Codes of another dtype.
        RankMismatchError: Fewer than two axes.
        DivisibilityError: The last axis is not a multiple of 32.

    Example:
        >>> codes = np.arange(32, dtype=np.uint8).reshape(1, 32) % 16
        >>> [hex(word) for word in pack_words(codes, 4)[0]]
        ['0x76543210', '0xfedcba98', '0x76543210', '0xfedcba98']
    """
    _check_width(bits)
    if codes.dtype not in (np.uint8, np.uint32):
        raise UnsupportedDtypeError("[pack_words] codes", codes.dtype.name, ("uint8", "uint32"))
    if codes.ndim < 2:
        raise RankMismatchError(
            "[pack_words] codes must have at least 2 axes", codes.ndim, codes.shape
        )
    count = codes.shape[-1]
    if count % 32:
        raise DivisibilityError(
            f"[pack_words] codes has shape {list(codes.shape)}, {bits} words hold 32 codes",
            "codes",
            count,
            32,
        )
    words = np.empty((*codes.shape[:-1], count * bits // 32), np.uint32)
    narrow = codes if codes.dtype == np.uint8 else codes.astype(np.uint8)
    _native.pack_words(_rows(narrow), bits, _rows(words))
    return words


def unpack_words(words: Array, bits: int) -> Array:
    """Unpack uint32 words ``(..., m)`` into uint8 codes ``(..., m * 32 / bits)``.

    Raises:
        OutOfRangeError: ``bits`` is not 1 to 8.
        UnsupportedDtypeError: ``words`` is not uint32.
        RankMismatchError: Fewer than two axes.
        DivisibilityError: The last axis is not a multiple of ``bits``.
    """
    _check_width(bits)
    if words.dtype != np.uint32:
        raise UnsupportedDtypeError("[unpack_words] words", words.dtype.name, ("uint32",))
    if words.ndim < 2:
        raise RankMismatchError(
            "[unpack_words] words must have at least 2 axes", words.ndim, words.shape
        )
    count = words.shape[-1]
    if count % bits:
        raise DivisibilityError(
            f"[unpack_words] words has shape {list(words.shape)}, {bits} words hold 32 codes",
            "words",
            count,
            bits,
        )
    codes = np.empty((*words.shape[:-1], count // bits * 32), np.uint8)
    _native.unpack_words(_rows(words), bits, _rows(codes))
    return codes


def _quantize(
    w: Array,
    group_size: int,
    bits: int,
    mode: str,
    words: Array,
    scales: Array,
    biases: Array | None,
    global_scale: float | None,
    search: str | None,
    weights: Array | None,
) -> int:
    name = _kernel_name(w.dtype, "[quantize] cannot quantize w")
    values = _bits(w)
    if mode == "affine":
        if biases is None:
            raise InvariantError("[quantize] affine mode writes biases: give an array for them")
        _same_dtype("scales", scales, w)
        _same_dtype("biases", biases, w)
        parts = words, _bits(scales), _bits(biases)
        if search is None:
            _native.affine_quantize(values, name, group_size, bits, *parts)
        else:
            _native.affine_search(values, name, group_size, bits, search, weights, *parts)
        return 0
    scale_bytes = scales.view(np.uint8)
    if mode == "nvfp4":
        if search is None:
            _native.nvfp4_quantize(values, name, words, scale_bytes, global_scale)
        else:
            _native.nvfp4_search(values, name, search, weights, words, scale_bytes, global_scale)
        return 0
    if search is None:
        return _native.mx_quantize(values, name, mode, words, scale_bytes)
    return _native.mx_search(values, name, mode, search, weights, words, scale_bytes)


def _search_weights(search: str | None, weights: Array | None, n_in: int) -> Array | None:
    """The weights as the kernels take them: float32 bits, scaled to at most 1."""
    if search is not None and search not in SEARCH_LEVELS:
        raise UnknownValueError("[quantize] no such search", search, SEARCH_LEVELS)
    if weights is None:
        return None
    if search is None:
        raise InvariantError("[quantize] weights are for a search, and none is asked for")
    if weights.shape != (n_in,):
        raise ShapeMismatchError("[quantize] weights, one an input", (n_in,), weights.shape)
    wide = weights.astype(np.float64)
    most = float(wide.max(initial=0.0))
    if not (np.isfinite(wide).all() and wide.min(initial=0.0) >= 0.0):
        raise InvariantError("[quantize] weights must be finite and not negative")
    level: Array = (wide / most if most > 0.0 else np.ones(n_in)).astype(np.float32)
    return level.view(np.uint32)


def _dequantize(
    words: Array,
    scales: Array,
    biases: Array | None,
    group_size: int,
    bits: int,
    mode: str,
    out: Array,
    global_scale: float | None,
) -> None:
    name = _kernel_name(out.dtype, "[dequantize] cannot produce dtype")
    if mode == "affine":
        if biases is None:
            raise InvariantError("[dequantize] affine mode needs biases; none are given")
        scales_name = _kernel_name(scales.dtype, "[dequantize] scales")
        biases_name = _kernel_name(biases.dtype, "[dequantize] biases")
        _native.affine_dequantize(
            words,
            _bits(scales),
            scales_name,
            _bits(biases),
            biases_name,
            group_size,
            bits,
            _bits(out),
            name,
        )
    elif mode == "nvfp4":
        _native.nvfp4_dequantize(words, scales.view(np.uint8), _bits(out), name, global_scale)
    else:
        _native.mx_dequantize(words, scales.view(np.uint8), mode, _bits(out), name)


def _check_scales(scales: Array, biases: Array | None, mode: str) -> np.dtype[Any]:
    """Check what belongs to the scales; returns the dtype of the result by default."""
    if mode != "affine":
        if scales.dtype not in _SCALE_BYTES:
            supported = ("uint8", "float8_e8m0fnu", "float8_e4m3fn")
            raise UnsupportedDtypeError(
                f"[dequantize] scales of mode {mode}", scales.dtype.name, supported
            )
        if biases is not None:
            raise InvariantError(
                f"[dequantize] mode {mode} has no biases; got {list(biases.shape)}"
            )
        return _BFLOAT16
    if biases is None:
        raise InvariantError("[dequantize] affine mode needs biases; none are given")
    _kernel_name(scales.dtype, "[dequantize] scales")
    _kernel_name(biases.dtype, "[dequantize] biases")
    if biases.shape != scales.shape:
        raise ShapeMismatchError(
            "[dequantize] biases do not fit the scales", scales.shape, biases.shape
        )
    return scales.dtype if scales.dtype == biases.dtype else _FLOAT32


def _global_scale(operation: str, value: float | Array | None, mode: str) -> float | None:
    if value is None:
        return None
    if mode != "nvfp4":
        raise InvariantError(
            f"{operation} only mode nvfp4 takes a global scale; the mode is {mode}"
        )
    if np.size(value) != 1:
        raise InvariantError(
            f"{operation} the global scale must be one number; got shape {list(np.shape(value))}"
        )
    return float(np.asarray(value, np.float32).reshape(()))


def _check_width(bits: int) -> None:
    if bits not in range(1, 9):
        raise OutOfRangeError("packed codes have 1 to 8 bits", "bits", bits)


def _kernel_name(dtype: np.dtype[Any], message: str) -> str:
    name = _KERNEL_NAME.get(dtype)
    if name is None:
        raise UnsupportedDtypeError(message, dtype.name, _FLOAT_NAMES)
    return name


def _same_dtype(name: str, array: Array, w: Array) -> None:
    if array.dtype != w.dtype:
        raise UnsupportedDtypeError(
            f"[quantize] {name} must have the dtype of w", array.dtype.name, (w.dtype.name,)
        )


def _rows(array: Array) -> Array:
    """The same elements as a C-contiguous matrix; no copy where none is needed."""
    contiguous = np.ascontiguousarray(array)
    if contiguous.ndim == 2:
        return contiguous
    rows = int(np.prod(array.shape[:-1], dtype=np.int64))
    return contiguous.reshape(rows, array.shape[-1])


def _bits(array: Array) -> Array:
    """The values as unsigned integers of their size."""
    return array.view(_BITS_VIEW[array.dtype.itemsize])
