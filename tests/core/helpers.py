"""What several tests of the core compare and build."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import mlx.core as mx
import numpy as np

from requant.schema import PerLayerQuantization, Quantization

AFFINE = PerLayerQuantization.from_global(Quantization.affine(32, 4))

# Every mode, with the bits and group sizes that MLX has for it.
LEGAL = [
    *((Quantization.affine(group, bits)) for group in (32, 64, 128) for bits in (1, 2, 3, 4, 5, 6)),
    Quantization.affine(64, 8),
    Quantization(32, 4, "mxfp4"),
    Quantization(32, 8, "mxfp8"),
    Quantization(16, 4, "nvfp4"),
]


class CountingMap(Mapping[str, Any]):
    """A weight map that is no dict, and notes which arrays are read from it."""

    def __init__(self, arrays: dict[str, Any]) -> None:
        self._arrays = arrays
        self.reads: list[str] = []

    def __getitem__(self, name: str) -> Any:
        self.reads.append(name)
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)


def config(group_size: int, bits: int, mode: str = "affine") -> PerLayerQuantization:
    """The same quantization for every layer."""
    return PerLayerQuantization.from_global(Quantization(group_size, bits, mode))


def mx_quantize(weight: mx.array, quantization: Quantization) -> dict[str, mx.array]:
    """What MLX itself stores for a layer, by suffix."""
    parts = mx.quantize(
        weight,
        group_size=quantization.group_size,
        bits=quantization.bits,
        mode=str(quantization.mode),
    )
    return dict(zip(("weight", "scales", "biases"), parts, strict=False))


def assert_bits(actual: np.ndarray, expected: np.ndarray) -> None:
    """Same dtype, shape and bytes."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert actual.tobytes() == expected.tobytes()


def assert_same_arrays(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    """The same names, and under each the very same array object."""
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        assert actual[name] is array, name


class Poison:
    """Lazy arrays that raise when they are evaluated: MLX cannot quantize float64.

    All of them share what fails: of two failures in one evaluation MLX 0.32 throws the first, and
    keeps the second for an evaluation that has nothing to do with it, or waits for ever. It fails
    once: every test needs arrays of its own.
    """

    def __init__(self) -> None:
        _, scales, _ = mx.quantize(mx.ones((1, 32), dtype=mx.float64), group_size=32, bits=4)
        self._scalar = scales.reshape(())

    def __call__(self, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
        return mx.broadcast_to(self._scalar.astype(dtype), shape)
