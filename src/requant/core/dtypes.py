"""Dtypes as safetensors headers spell them, their sizes and their NumPy equivalents."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod

import ml_dtypes
import numpy as np

# Header name -> NumPy dtype.
NUMPY_DTYPE: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "C64": np.dtype(np.complex64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
}

HEADER_NAME: dict[np.dtype, str] = {dtype: name for name, dtype in NUMPY_DTYPE.items()}

# Dtypes that MLX can quantize and the kernels read.
KERNEL_FLOATS = ("F32", "F16", "BF16")
FLOATS = ("F32", "F16", "BF16", "F64")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Dtype (as in a safetensors header) and shape of a tensor; no data."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that the tensor takes in a file."""
        return _nbytes(self.dtype, self.shape)

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


@lru_cache(maxsize=4096)
def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    return prod(shape) * NUMPY_DTYPE[dtype].itemsize


@lru_cache(maxsize=1 << 14)
def shared_info(dtype: str, shape: tuple[int, ...]) -> TensorInfo:
    """A ``TensorInfo``, the same object for the same dtype and shape: models repeat few shapes."""
    return TensorInfo(dtype, shape)
