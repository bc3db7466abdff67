"""Dense values in buffers of the caller: casts, NaN and infinity, quantization error."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from requant.core.dtypes import HEADER_NAME, KERNEL_FLOATS
from requant.kernels import _native
from requant.kernels.float_views import as_unsigned

Array = np.ndarray[Any, np.dtype[Any]]


def cast_into(source: Array, target: Array) -> int:
    """Round every value of ``source`` to the dtype of ``target``, nearest even.

    Args:
        source: Floats, C-contiguous; float64 goes through NumPy.
        target: As many floats (float32, float16 or bfloat16), C-contiguous; overwritten.

    Returns:
        How many finite values became infinite.
    """
    if source.dtype == np.float64:
        with np.errstate(over="ignore"):
            target.reshape(-1)[:] = source.reshape(-1)
        return int(np.isinf(target).sum()) - int(np.isinf(source).sum())
    return int(_native.cast(_bits(source), _name(source), _bits(target), _name(target)))


def count_nonfinite(values: Array) -> int:
    """How many values are NaN or infinite (float32, float16 or bfloat16)."""
    return int(_native.count_nonfinite(_bits(values), _name(values)))


def first_nonfinite_row(values: Array) -> int | None:
    """The first row of a matrix that holds NaN or infinity, or None."""
    index = int(_native.first_nonfinite(_bits(values), _name(values)))
    return None if index < 0 else index // values.shape[-1]


def encoding_error(
    dense: Array, decoded: Array, scales: Array, mode: str, group_max: Array
) -> tuple[float, float, float]:
    """The quantization error between values and what their codes decode to.

    Args:
        dense: Values that were quantized, C-contiguous.
        decoded: The decoded values, of the same shape.
        scales: As stored, one a group.
        mode: MLX's name; decides how scale bytes are read.
        group_max: A float32 buffer of one value a group; overwritten.

    Returns:
        The sums of squared errors and of squared values, and the largest error in units
        of its group's step: the magnitude of the scale, which is the distance of
        neighbouring codes in affine mode and the value of element 1.0 in the others.
    """
    group_size = dense.size // scales.size
    pair = _bits(dense), _name(dense), _bits(decoded), _name(decoded)
    most = group_max.reshape(-1)
    squares, norm = _native.group_errors(*pair, group_size, most.view(np.uint32))
    steps = _steps(scales, mode)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        ratio = most / steps
    return float(squares), float(norm), float(np.max(ratio, where=steps > 0, initial=0.0))


def _steps(scales: Array, mode: str) -> Array:
    """The step of each group, float32."""
    if mode == "nvfp4":
        scales = scales.view(ml_dtypes.float8_e4m3fn)
    elif scales.dtype == np.uint8:
        scales = scales.view(ml_dtypes.float8_e8m0fnu)
    steps: Array = np.abs(scales.reshape(-1).astype(np.float32))
    return steps


def _bits(values: Array) -> Array:
    return as_unsigned(values.reshape(-1))


def _name(values: Array) -> str:
    name = HEADER_NAME[values.dtype]
    assert name in KERNEL_FLOATS, name
    return name
