"""The two ways in which a tensor of a library's layout is made: bytes of the source, or computed.

Plain data without MLX, so that plans can be read where MLX is not installed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from requant.core.dtypes import TensorInfo

# Small computed tensors share a run of ``sanitize``; inputs and results of one run stay below
# this, unless a single tensor is larger.
BATCH_BYTES = 64 << 20


class Extent(NamedTuple):
    """A range of bytes of a source tensor's data, or ``times`` of them ``stride`` bytes apart."""

    tensor: str
    start: int
    stop: int
    stride: int = 0
    times: int = 1

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return (self.stop - self.start) * self.times

    @property
    def ranges(self) -> Iterator[tuple[int, int]]:
        """Start and stop of each range, in order."""
        for index in range(self.times):
            yield self.start + index * self.stride, self.stop + index * self.stride


@dataclass(frozen=True, slots=True)
class ByteCopy:
    """A tensor whose bytes are bytes of source tensors.

    Attributes:
        info: Dtype and shape.
        extents: The bytes, in row-major order.
    """

    info: TensorInfo
    extents: tuple[Extent, ...]

    @property
    def inputs(self) -> tuple[str, ...]:
        """The source tensors that it needs, in order."""
        return tuple(dict.fromkeys(extent.tensor for extent in self.extents))


@dataclass(frozen=True, slots=True)
class ComputedByRule:
    """A tensor that the model class's ``sanitize`` computes.

    Attributes:
        info: Dtype and shape.
        inputs: The source tensors that it needs, in order.
    """

    info: TensorInfo
    inputs: tuple[str, ...]
