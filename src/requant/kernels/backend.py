"""The array operations of ``weights``, once for each array library.

``backend_for`` returns the backend for the type of the arrays: ``mlx_backend`` for
``mlx.core.array`` (lazy), ``NUMPY`` for ``numpy.ndarray`` (with our kernels). MLX is imported only
for callers who hold its arrays, and who therefore have it loaded.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeAlias, cast

import ml_dtypes
import numpy as np

from requant.errors import InvariantError, UnsupportedDtypeError
from requant.kernels import quantize as native
from requant.kernels.input_power import estimated_power
from requant.quantization.config import Quantization

Array: TypeAlias = Any
"""An ``mlx.core.array`` or a ``numpy.ndarray``."""

Weights: TypeAlias = Mapping[str, Array]
"""Tensor name to array; all of one library."""

_KNOWN_TYPES = ("mlx.core.array", "numpy.ndarray")


class Backend(Protocol):
    """The operations on arrays of one library. Dtypes go by name ("float32", "bfloat16")."""

    @property
    def name(self) -> str:
        """For messages."""

    def dtype(self, array: Array, /) -> str:
        """Name of the dtype."""

    def shape(self, array: Array, /) -> tuple[int, ...]:
        """Lengths of the axes."""

    def quantize(
        self,
        weight: Array,
        quantization: Quantization,
        search: str = "off",
        rows_are_tokens: bool = False,
        /,
    ) -> tuple[Array, Array, Array | None]:
        """Words, scales, and biases in affine mode; group_size is positive.

        ``rows_are_tokens``, for a search: the weight is an embedding or a head.
        """

    def dequantize(
        self, words: Array, scales: Array, biases: Array | None, quantization: Quantization, /
    ) -> Array:
        """The dense weight."""

    def view_uint32(self, array: Array, /) -> Array:
        """The same bits as uint32; the source has 32-bit elements."""

    def astype(self, array: Array, dtype: str, /) -> Array:
        """Convert the values."""

    def transpose(self, array: Array, /) -> Array:
        """Swap the two axes, rows contiguous again."""

    def multiply(self, left: Array, right: Array, /) -> Array:
        """Element by element."""

    def scale(self, array: Array, factor: float, /) -> Array:
        """Times one number, in the dtype of the array."""

    def negative(self, array: Array, /) -> Array:
        """Element by element; zero becomes minus zero."""

    def unpack(self, words: Array, shifts: Sequence[int], mask: int, /) -> Array:
        """(rows, n) words -> (rows, n * len(shifts)) codes: ``(word >> shift) & mask``, uint32."""

    def pack(self, codes: Array, shifts: Sequence[int], /) -> Array:
        """(rows, n * len(shifts)) codes -> (rows, n) words: ``code << shift`` joined, uint32."""


class _NumPy:
    """NumPy arrays; quantize and dequantize are our kernels, bit for bit MLX's CPU backend."""

    name = "numpy"

    def dtype(self, array: np.ndarray) -> str:
        return array.dtype.name

    def shape(self, array: np.ndarray) -> tuple[int, ...]:
        return array.shape

    def quantize(
        self,
        weight: np.ndarray,
        quantization: Quantization,
        search: str = "off",
        rows_are_tokens: bool = False,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        values = _plain(weight)
        if search == "off" or values.ndim < 2 or not values.size:
            return native.quantize(values, quantization, search=None if search == "off" else search)
        made = [
            native.quantize(
                matrix,
                quantization,
                search=search,
                weights=estimated_power(matrix, rows_are_tokens),
                by_magnitude=True,
            )
            for matrix in values.reshape(-1, *values.shape[-2:])
        ]
        words, scales, biases = (
            None if parts[0] is None else np.stack(parts).reshape(*values.shape[:-1], -1)
            for parts in zip(*made, strict=True)
        )
        assert words is not None and scales is not None
        return words, scales, biases

    def dequantize(
        self,
        words: np.ndarray,
        scales: np.ndarray,
        biases: np.ndarray | None,
        quantization: Quantization,
    ) -> np.ndarray:
        return native.dequantize(
            native.QuantizedTensors(
                _plain(words), _plain(scales), None if biases is None else _plain(biases)
            ),
            quantization,
        )

    def view_uint32(self, array: np.ndarray) -> np.ndarray:
        return _plain(array).view(np.uint32)

    def astype(self, array: np.ndarray, dtype: str) -> np.ndarray:
        with np.errstate(all="ignore"):  # an overflow is inf, as in MLX
            return array.astype(getattr(ml_dtypes, dtype, dtype), copy=False)

    def transpose(self, array: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(array.T)

    def multiply(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):
            product: np.ndarray = left * right
        return product

    def scale(self, array: np.ndarray, factor: float) -> np.ndarray:
        return self.multiply(array, np.full_like(array, factor))

    def negative(self, array: np.ndarray) -> np.ndarray:
        return -array

    def unpack(self, words: np.ndarray, shifts: Sequence[int], mask: int) -> np.ndarray:
        rows, count = words.shape
        codes = (words[:, :, None] >> np.array(shifts, np.uint32)) & np.uint32(mask)
        return codes.reshape(rows, count * len(shifts))

    def pack(self, codes: np.ndarray, shifts: Sequence[int]) -> np.ndarray:
        rows, count = codes.shape
        parts = codes.reshape(rows, count // len(shifts), len(shifts))
        words = np.zeros(parts.shape[:2], np.uint32)
        for index, shift in enumerate(shifts):
            words |= parts[:, :, index] << np.uint32(shift)
        return words


NUMPY: Backend = _NumPy()


def backend_for(weights: Weights) -> Backend:
    """The backend for the arrays of a weight map; NumPy's for an empty map.

    Raises:
        UnsupportedDtypeError: A value is an array of neither library; ``.dtype`` is its type.
        InvariantError: The map mixes the two libraries.
    """
    found: Backend | None = None
    for name, array in weights.items():
        backend = _backend_of(array)
        if backend is None:
            kind = type(array)
            raise UnsupportedDtypeError(
                "not an array that requant computes with",
                f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins."),
                _KNOWN_TYPES,
                layer=name,
            )
        if found is not None and backend is not found:
            raise InvariantError(
                f"a weight map holds arrays of one library; this one is of {backend.name}, "
                f"those before it of {found.name}",
                layer=name,
            )
        found = backend
    return NUMPY if found is None else found


def _backend_of(array: object) -> Backend | None:
    if isinstance(array, np.ndarray):
        return NUMPY
    if "mlx.core" not in sys.modules:  # then the caller cannot have MLX arrays at all
        return None
    from requant.kernels import mlx_backend as mlx

    return cast(Backend, mlx) if mlx.is_array(array) else None


def _plain(array: np.ndarray) -> np.ndarray:
    """Native byte order, as kernels want it; the array itself where it has it."""
    return array.astype(array.dtype.newbyteorder("="), copy=False)
