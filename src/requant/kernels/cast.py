"""Dense values in buffers of the caller: casts, NaN and infinity."""

from __future__ import annotations

from typing import Any

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


def _bits(values: Array) -> Array:
    return as_unsigned(values.reshape(-1))


def _name(values: Array) -> str:
    name = HEADER_NAME[values.dtype]
    assert name in KERNEL_FLOATS, name
    return name
