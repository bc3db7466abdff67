"""One adapter for each array library, so that every test body runs on both."""

from typing import Any

import ml_dtypes
import mlx.core as mx
import numpy as np


class NumPyLibrary:
    """Makes and reads NumPy arrays."""

    name = "numpy"

    def make(self, values: Any, dtype: str) -> np.ndarray:
        """Convert values (or an array) to an array of this dtype."""
        return np.asarray(values).astype(np.dtype(getattr(ml_dtypes, dtype, dtype)))

    def read(self, array: np.ndarray) -> np.ndarray:
        """The array in NumPy's terms, bit for bit."""
        assert isinstance(array, np.ndarray)
        return array


class MlxLibrary:
    """Makes and reads MLX arrays, by their bits."""

    name = "mlx"

    def make(self, values: Any, dtype: str) -> mx.array:
        """Convert values (or an array) to an array of this dtype."""
        array = NumPyLibrary().make(values, dtype)
        if dtype == "bfloat16":
            return mx.array(array.view(np.uint16)).view(mx.bfloat16)
        return mx.array(array, dtype=getattr(mx, dtype))

    def read(self, array: mx.array) -> np.ndarray:
        """The array in NumPy's terms, bit for bit."""
        assert isinstance(array, mx.array)
        if array.dtype == mx.bfloat16:
            return np.array(array.view(mx.uint16)).view(ml_dtypes.bfloat16)
        return np.array(array)


Library = NumPyLibrary | MlxLibrary
