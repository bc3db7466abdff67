"""The ``backend.Backend`` for ``mlx.core.array``: thin calls into MLX.

Every result is lazy. Nothing here evaluates an array, and nothing may: no ``item``, no
conversion to NumPy, no Python truth of an element.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np

from requant.errors import BackendError, InvariantError, ShapeMismatchError
from requant.quantization.config import Quantization

name = "mlx"


def dtype(array: mx.array) -> str:
    return str(array.dtype).removeprefix("mlx.core.")


def shape(array: mx.array) -> tuple[int, ...]:
    return tuple(array.shape)


def quantize(
    weight: mx.array,
    quantization: Quantization,
    search: str = "off",
    rows_are_tokens: bool = False,
) -> tuple[mx.array, mx.array, mx.array | None]:
    """``mx.quantize``: words, scales, and biases in affine mode.

    The caller keeps ``group_size=0`` away: ``mx.quantize`` divides by it before it checks, and
    the process dies.
    """
    if search != "off":
        raise InvariantError(
            f"[quantize_weights] search {search!r} computes on NumPy arrays; these are MLX's"
        )
    with _as_backend_error():
        words, scales, *biases = mx.quantize(weight, **_keywords(quantization))
    return words, scales, biases[0] if biases else None


def dequantize(
    words: mx.array, scales: mx.array, biases: mx.array | None, quantization: Quantization
) -> mx.array:
    """``mx.dequantize``, in the dtype that MLX chooses.

    MLX does not compare the last axes of scales and biases, and would read past the end of
    biases that are too short: that is rejected here.
    """
    if biases is not None and biases.shape != scales.shape:
        raise ShapeMismatchError("biases do not fit the scales", scales.shape, biases.shape)
    with _as_backend_error():
        return mx.dequantize(words, scales, biases, **_keywords(quantization))


def _keywords(quantization: Quantization) -> dict[str, Any]:
    bits, group_size = quantization.bits, quantization.group_size
    return {"group_size": group_size, "bits": bits, "mode": quantization.mode.value}


def view_uint32(array: mx.array) -> mx.array:
    return array.view(mx.uint32)


def astype(array: mx.array, dtype: str) -> mx.array:
    """Convert the values; the array itself where the dtype is the same."""
    return array.astype(getattr(mx, dtype))


def transpose(array: mx.array) -> mx.array:
    return mx.contiguous(array.T)


def multiply(left: mx.array, right: mx.array) -> mx.array:
    return mx.multiply(left, right)


def scale(array: mx.array, factor: float) -> mx.array:
    return mx.multiply(array, mx.full_like(array, factor))


def negative(array: mx.array) -> mx.array:
    return mx.negative(array)


def unpack(words: mx.array, shifts: Sequence[int], mask: int) -> mx.array:
    rows, count = words.shape
    with _as_backend_error():
        codes = mx.bitwise_and(
            mx.right_shift(words[:, :, None], mx.array(list(shifts), dtype=mx.uint32)),
            mx.array([mask], dtype=mx.uint32),
        )
        return codes.reshape(rows, count * len(shifts))


def pack(codes: mx.array, shifts: Sequence[int]) -> mx.array:
    rows, count = codes.shape
    with _as_backend_error():
        parts = codes.astype(mx.uint32).reshape(rows, count // len(shifts), len(shifts))
        shifted = mx.left_shift(parts, mx.array(list(shifts), dtype=mx.uint32))
        return shifted.sum(axis=2).astype(mx.uint32)


@contextmanager
def _as_backend_error() -> Iterator[None]:
    """MLX raises ValueError, TypeError, OverflowError or RuntimeError: one class for callers."""
    try:
        yield
    except Exception as error:
        raise BackendError(str(error)) from error


_UNSIGNED = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}


def empty(shape: Sequence[int], dtype: mx.Dtype) -> tuple[mx.array, memoryview]:
    """Memory of MLX to be filled from outside, without a copy: an array, and its bytes.

    Evaluate nothing that is made of the array before it is filled.
    """
    array = mx.zeros(shape, _UNSIGNED[dtype.size])
    mx.eval(array)
    return array.view(dtype), raw_bytes(array).data


def raw_bytes(array: mx.array) -> np.ndarray:
    """The memory of an evaluated, row-major array as a uint8 vector that shares it."""
    unsigned = np.array(array.view(_UNSIGNED[array.dtype.size]), copy=False)
    return unsigned.reshape(-1).view(np.uint8)


def is_array(value: Any) -> bool:
    """Whether this module takes ``value``."""
    return isinstance(value, mx.array)
