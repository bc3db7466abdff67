"""What several tests of the core compare and build."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np

from requant.quantization.config import PerLayerQuantization, Quantization

T = TypeVar("T")

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
    """A weight map that is not a dict, and notes which arrays are read from it."""

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


def memory_taken(call: Callable[[], T]) -> tuple[T, int]:
    """What a call returns, and how far MLX's memory rose above what was held: bytes.

    A lazy array takes none until it is evaluated, so that a call which evaluates nothing takes
    no more than its own constants do.
    """
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    result = call()
    return result, max(0, mx.get_peak_memory() - held)
