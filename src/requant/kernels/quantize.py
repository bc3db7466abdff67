"""Quantize and dequantize NumPy arrays with our own kernels.

The bits are those of MLX 0.32.4 on the CPU. Arrays may have any rank from 2 up
and any strides; the last axis is the one that is grouped and packed. bfloat16
and the 8-bit floats are those of ml_dtypes.

One departure: a group too small for an E8M0 scale (modes mxfp4 and mxfp8) is
flushed to zero, where MLX lets the scale's byte wrap around.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any, NamedTuple

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
from requant.kernels._native import EncodingError as EncodingError
from requant.kernels.cast import cast_into
from requant.kernels.float_views import as_unsigned, float_name
from requant.quantization.config import Quantization, QuantMode
from requant.quantization.modes import SEARCH_LEVELS, check_quantization

Array = NDArray[Any]

_BFLOAT16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
_FLOAT32: np.dtype[Any] = np.dtype(np.float32)
_SCALE_BYTES = ("uint8", "float8_e8m0fnu", "float8_e4m3fn")


class QuantizedTensors(NamedTuple):
    """The tensors of a quantized layer."""

    words: Array  # packed codes, uint32 ``(..., in_features * bits / 32)``
    # ``(..., in_features / group_size)``: float32, float16 or bfloat16 in affine mode, else uint8
    # (E8M0 for mxfp4 and mxfp8, E4M3 for nvfp4).
    scales: Array
    biases: Array | None = None  # like the scales in affine mode, else None

    @classmethod
    def from_roles(cls, arrays: Mapping[str, Array]) -> QuantizedTensors:
        """The tensors of a layer whose arrays are ``weight``, ``scales`` and perhaps ``biases``."""
        return cls(arrays["weight"], arrays["scales"], arrays.get("biases"))


def quantize(
    w: Array,
    quantization: Quantization,
    *,
    global_scale: float | Array | None = None,
    search: str | None = None,
    weights: Array | None = None,
    by_magnitude: bool = False,
) -> QuantizedTensors:
    """Quantize ``w`` of shape ``(..., out_features, in_features)``.

    Args:
        w: float32, float16 or bfloat16; in affine mode scales and biases get its dtype.
        quantization: One that ``check_quantization`` accepts.
        global_scale: Mode nvfp4 only: the greatest magnitude of the whole tensor.
        search: None for MLX's rule, bit for bit; "fast" or "best" to search for scales and
            biases with a smaller squared error (docs/quantization/search.md).
        weights: With a search: weights of the squared error, one for each input,
            ``(in_features,)``; not negative. All alike by default.
        by_magnitude: With a search: multiply the weight of each value with its magnitude plus
            0.375 times the mean magnitude of its group: large values are kept closer.

    Raises:
        OutOfRangeError: The mode does not take the bits or the group size.
        UnsupportedDtypeError: ``w`` has another dtype.
        RankMismatchError: ``w`` has fewer than two axes.
        DivisibilityError: ``in_features`` is not a multiple of the group size.
        InvariantError: A global scale outside nvfp4, or not one number; weights
            without a search, or not fit for one.
    """
    bits, group_size = _checked(quantization)
    float_name(w.dtype, "[quantize] cannot quantize w")
    global_scale = _global_scale("[quantize]", global_scale, quantization.mode)
    unit = f"a group takes {group_size} inputs"
    n_in = _check_last_axis("[quantize] w", w, group_size, unit, axis="in_features")
    has_biases = quantization.mode.has_biases
    groups = (*w.shape[:-1], n_in // group_size)
    out = QuantizedTensors(
        np.empty((*w.shape[:-1], n_in * bits // 32), np.uint32),
        np.empty(groups, w.dtype if has_biases else np.uint8),
        np.empty(groups, w.dtype) if has_biases else None,
    )
    quantize_into(
        _rows(w),
        quantization,
        _matrices(out),
        global_scale=global_scale,
        search=search,
        weights=weights,
        by_magnitude=by_magnitude,
    )
    return out


def quantize_into(
    w: Array,
    quantization: Quantization,
    out: QuantizedTensors,
    *,
    global_scale: float | None = None,
    search: str | None = None,
    weights: Array | None = None,
    by_magnitude: bool = False,
) -> int:
    """Quantize into arrays of the caller; every array 2-D and C-contiguous.

    The arguments are those of ``quantize``; the kernels check shapes, dtypes and layout
    (ValueError). Returns the number of groups flushed to zero, too small for an E8M0 scale.
    """
    bits, group_size = _checked(quantization)
    weights = search_weights(search, weights, w.shape[-1])
    name, mode = float_name(w.dtype, "[quantize] cannot quantize w"), quantization.mode.value
    values = as_unsigned(w)
    if mode == "affine":
        if out.biases is None:
            raise InvariantError("[quantize] affine mode writes biases: give an array for them")
        _same_dtype("scales", out.scales, w)
        _same_dtype("biases", out.biases, w)
        parts = out.words, as_unsigned(out.scales), as_unsigned(out.biases)
        if search is None:
            _native.affine_quantize(values, name, group_size, bits, *parts)
        else:
            _native.affine_search(
                values, name, group_size, bits, search, weights, by_magnitude, *parts
            )
        return 0
    words, scales = out.words, out.scales.view(np.uint8)
    if mode == "nvfp4":
        if search is None:
            _native.nvfp4_quantize(values, name, words, scales, global_scale)
        else:
            _native.nvfp4_search(
                values, name, search, weights, by_magnitude, words, scales, global_scale
            )
        return 0
    if search is None:
        return _native.mx_quantize(values, name, mode, words, scales)
    return _native.mx_search(values, name, mode, search, weights, by_magnitude, words, scales)


def quantize_measured(
    w: Array, quantization: Quantization, out: QuantizedTensors, error: EncodingError
) -> None:
    """Quantize by MLX's rule into arrays of the caller, and measure the error in the same pass.

    The codes are those of ``quantize_into`` without a search. A block of them is encoded, decoded
    and compared while it is in the cache.

    Args:
        w: float32, float16 or bfloat16, 2-D and C-contiguous.
        quantization: One that ``check_quantization`` accepts.
        out: As for ``quantize_into``; overwritten, without a meaning if ``error.nonfinite`` is not
            0 then.
        error: What earlier calls found for rows above these; added to. The sums are the same
            for any cut of a matrix into calls, if rows come in order.

    Raises:
        OutOfRangeError: The mode does not take the bits or the group size.
        UnsupportedDtypeError: ``w`` has another dtype.
        ValueError: Shapes, dtypes or layout do not fit.

    Example:
        >>> error = EncodingError()
        >>> w = np.linspace(-1, 1, 128, dtype=np.float32).reshape(2, 64)
        >>> quantization = Quantization.affine(64, 4)
        >>> out = quantize(w, quantization)
        >>> quantize_measured(w, quantization, out, error)
        >>> round(error.squared_values, 3), error.max_error_steps < 0.51, error.nonfinite
        (43.339, True, 0)
    """
    _native.quantize_measured(*_measured(w, quantization, out), error)


def measure(
    w: Array, quantization: Quantization, tensors: QuantizedTensors, error: EncodingError
) -> None:
    """Measure the error of codes that exist, as ``quantize_measured`` does for those it makes."""
    _native.measure(*_measured(w, quantization, tensors), error)


def _measured(
    w: Array, quantization: Quantization, tensors: QuantizedTensors
) -> tuple[Array, str, str, int, int, Array, Array, Array | None]:
    """The arguments of the kernels for a matrix and its tensors."""
    bits, group_size = _checked(quantization)
    name = float_name(w.dtype, "[quantize] cannot quantize w")
    words, scales, biases = tensors
    if quantization.mode.has_biases:
        _same_dtype("scales", scales, w)
        if biases is not None:
            _same_dtype("biases", biases, w)
            biases = as_unsigned(biases)
        scales = as_unsigned(scales)
    else:
        scales = scales.view(np.uint8)
    return as_unsigned(w), name, quantization.mode.value, group_size, bits, words, scales, biases


def dequantize(
    tensors: QuantizedTensors,
    quantization: Quantization,
    *,
    global_scale: float | Array | None = None,
    dtype: DTypeLike | None = None,
) -> Array:
    """Compute the values behind codes, as MLX does.

    Affine: ``P(S(code * scale) + bias)``, the product rounded to the dtype S of
    the scales and the sum to the promoted dtype P of scales and biases; then cast
    to ``dtype``. Float modes: element times scale, in ``dtype``.

    Args:
        tensors: As ``quantize`` returns them; scales of the float modes may also be ml_dtypes
            float8.
        quantization: Of the tensors.
        global_scale: Mode nvfp4 only; the result is then float32 in any case.
        dtype: float32, float16 or bfloat16; by default P in affine mode, else
            bfloat16.

    Raises:
        OutOfRangeError: The mode does not take the bits or the group size.
        UnsupportedDtypeError: An array or ``dtype`` has a dtype not named above.
        RankMismatchError: The words have fewer than two axes.
        DivisibilityError: A row of words does not consist of whole groups.
        ShapeMismatchError: The shapes do not belong together.
        InvariantError: Biases are missing or too many; a global scale outside
            nvfp4, or not one number.
    """
    bits, group_size = _checked(quantization)
    global_scale = _global_scale("[dequantize]", global_scale, quantization.mode)
    words = tensors.words
    if words.dtype != np.uint32:
        raise UnsupportedDtypeError("[dequantize] words", words.dtype.name, ("uint32",))
    group_words = group_size * bits // 32  # a whole number in every mode
    unit = f"a group takes {group_words} words"
    groups = _check_last_axis("[dequantize] words", words, group_words, unit) // group_words
    expected = (*words.shape[:-1], groups)
    if tensors.scales.shape != expected:
        raise ShapeMismatchError(
            "[dequantize] scales do not fit the words", expected, tensors.scales.shape
        )
    default = _check_scales(tensors, quantization.mode)
    if global_scale is not None:
        default, dtype = _FLOAT32, None
    out_dtype = default if dtype is None else np.dtype(dtype)
    float_name(out_dtype, "[dequantize] cannot produce dtype")
    out = np.empty((*words.shape[:-1], groups * group_size), out_dtype)
    dequantize_into(_matrices(tensors), quantization, _rows(out), global_scale=global_scale)
    return out


def dequantize_into(
    tensors: QuantizedTensors,
    quantization: Quantization,
    out: Array,
    *,
    global_scale: float | None = None,
) -> None:
    """Dequantize into ``out``; every array 2-D and C-contiguous, or a ValueError of the kernels.

    With a ``global_scale`` (nvfp4 only) ``out`` is float32.
    """
    bits, group_size = _checked(quantization)
    words, scales, biases = tensors
    values, name = as_unsigned(out), float_name(out.dtype, "[dequantize] cannot produce dtype")
    mode = quantization.mode.value
    if mode == "affine":
        if biases is None:
            raise InvariantError("[dequantize] affine mode needs biases; none are given")
        scales_name = float_name(scales.dtype, "[dequantize] scales")
        biases_name = float_name(biases.dtype, "[dequantize] biases")
        pairs = as_unsigned(scales), scales_name, as_unsigned(biases), biases_name
        _native.affine_dequantize(words, *pairs, group_size, bits, values, name)
    elif mode == "nvfp4":
        _native.nvfp4_dequantize(words, scales.view(np.uint8), values, name, global_scale)
    else:
        _native.mx_dequantize(words, scales.view(np.uint8), mode, values, name)


def decode_into(tensors: QuantizedTensors, quantization: Quantization, out: Array) -> None:
    """``dequantize_into``, in float32 where ``out`` is float32.

    MLX rounds values to the dtype of scales and biases; here they are widened first, so that
    ``code * scale + bias`` rounds to float32 alone. No copy is made for another dtype.
    """
    words, scales, biases = tensors
    if out.dtype == np.float32 and biases is not None:
        wide = [np.empty(array.shape, np.float32) for array in (scales, biases)]
        for array, into in zip((scales, biases), wide, strict=True):
            cast_into(array, into)
        tensors = QuantizedTensors(words, *wide)
    dequantize_into(tensors, quantization, out)


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
    count = _check_packing("[pack_words] codes", codes, ("uint8", "uint32"), bits, 32)
    words = np.empty((*codes.shape[:-1], count * bits // 32), np.uint32)
    _native.pack_words(_rows(codes.astype(np.uint8, copy=False)), bits, _rows(words))
    return words


def unpack_words(words: Array, bits: int) -> Array:
    """Unpack uint32 words ``(..., m)`` into uint8 codes ``(..., m * 32 / bits)``.

    Raises:
        OutOfRangeError: ``bits`` is not 1 to 8.
        UnsupportedDtypeError: ``words`` is not uint32.
        RankMismatchError: Fewer than two axes.
        DivisibilityError: The last axis is not a multiple of ``bits``.
    """
    count = _check_packing("[unpack_words] words", words, ("uint32",), bits, bits)
    codes = np.empty((*words.shape[:-1], count // bits * 32), np.uint8)
    _native.unpack_words(_rows(words), bits, _rows(codes))
    return codes


def _check_packing(
    where: str, array: Array, dtypes: tuple[str, ...], bits: int, multiple: int
) -> int:
    """Check what is packed or unpacked; ``bits`` words hold 32 codes."""
    if bits not in range(1, 9):
        raise OutOfRangeError("packed codes have 1 to 8 bits", "bits", bits)
    if array.dtype.name not in dtypes or not array.dtype.isnative:
        raise UnsupportedDtypeError(where, array.dtype.name, dtypes)
    return _check_last_axis(where, array, multiple, f"{bits} words hold 32 codes")


def _check_last_axis(where: str, array: Array, multiple: int, unit: str, *, axis: str = "") -> int:
    """Check that an array has rows whose length is a multiple; returns the length.

    For messages: ``where`` is operation and array, as in "[pack_words] codes", ``unit`` the reason,
    and ``axis`` the name of the length, if not that of the array.
    """
    if array.ndim < 2:
        raise RankMismatchError(f"{where} must have at least 2 axes", array.ndim, array.shape)
    length: int = array.shape[-1]
    if length % multiple:
        message = f"{where} has shape {list(array.shape)}, {unit}"
        raise DivisibilityError(message, axis or where.split()[-1], length, multiple)
    return length


def _checked(quantization: Quantization) -> tuple[int, int]:
    """Bits and group size, once they are known to be legal."""
    bits, group_size = quantization.bits, quantization.group_size
    check_quantization(bits, group_size, quantization.mode.value)
    return bits, group_size


def search_weights(search: str | None, weights: Array | None, n_in: int) -> Array | None:
    """Check the weights; as the kernels take them: float32 bits, scaled to at most 1."""
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
    scaled: Array = (wide / most if most > 0.0 else np.ones(n_in)).astype(np.float32)
    return scaled.view(np.uint32)


def _check_scales(tensors: QuantizedTensors, mode: QuantMode) -> np.dtype[Any]:
    """Check scales and biases; returns the dtype of the result by default."""
    _, scales, biases = tensors
    if not mode.has_biases:
        if scales.dtype.name not in _SCALE_BYTES:
            where = f"[dequantize] scales of mode {mode}"
            raise UnsupportedDtypeError(where, scales.dtype.name, _SCALE_BYTES)
        if biases is not None:
            raise InvariantError(
                f"[dequantize] mode {mode} has no biases; got {list(biases.shape)}"
            )
        return _BFLOAT16
    if biases is None:
        raise InvariantError("[dequantize] affine mode needs biases; none are given")
    float_name(scales.dtype, "[dequantize] scales")
    float_name(biases.dtype, "[dequantize] biases")
    if biases.shape != scales.shape:
        raise ShapeMismatchError(
            "[dequantize] biases do not fit the scales", scales.shape, biases.shape
        )
    return scales.dtype if scales.dtype == biases.dtype else _FLOAT32


def _global_scale(operation: str, value: float | Array | None, mode: QuantMode) -> float | None:
    if value is None:
        return None
    if mode is not QuantMode.NVFP4:
        raise InvariantError(
            f"{operation} only mode nvfp4 takes a global scale; the mode is {mode}"
        )
    if np.size(value) != 1:
        raise InvariantError(
            f"{operation} the global scale must be one number; got shape {list(np.shape(value))}"
        )
    return float(np.asarray(value, np.float32).reshape(()))


def _same_dtype(name: str, array: Array, w: Array) -> None:
    if array.dtype != w.dtype:
        raise UnsupportedDtypeError(
            f"[quantize] {name} must have the dtype of w", array.dtype.name, (w.dtype.name,)
        )


def _rows(array: Array) -> Array:
    """The same elements as a C-contiguous matrix; no copy where none is needed."""
    return np.ascontiguousarray(array).reshape(prod(array.shape[:-1]), array.shape[-1])


def _matrices(tensors: QuantizedTensors) -> QuantizedTensors:
    words, scales, biases = tensors
    return QuantizedTensors(_rows(words), _rows(scales), None if biases is None else _rows(biases))
