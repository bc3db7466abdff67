"""Float arrays as kernels take them: the bits as unsigned integers, and the name of the dtype."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from requant.core.dtypes import HEADER_NAME, KERNEL_FLOATS
from requant.errors import UnsupportedDtypeError

FLOAT_NAMES = ("float32", "float16", "bfloat16")
_UNSIGNED: dict[int, np.dtype[Any]] = {2: np.dtype(np.uint16), 4: np.dtype(np.uint32)}


def as_unsigned(array: NDArray[Any]) -> NDArray[Any]:
    """The bits of floats as unsigned integers of their size."""
    return array.view(_UNSIGNED[array.dtype.itemsize])


def float_name(dtype: np.dtype[Any], message: str) -> str:
    """The name that kernels give a dtype: F32, F16 or BF16.

    Raises:
        UnsupportedDtypeError: With the message; the dtype is none of them.
    """
    name = HEADER_NAME.get(dtype, "")
    if name not in KERNEL_FLOATS:
        raise UnsupportedDtypeError(message, dtype.name, FLOAT_NAMES)
    return name
