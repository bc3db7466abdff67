"""Stacks of experts whose matrices a reader knows one by one, or that are stored transposed.

A reader is shown the tensors of one expert (``Experts.one``), describes it as it describes any
layer, and ``Experts.stack`` makes the stack of that: expert ``e`` is what the same reader makes
of the ``e``-th part of each tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from requant.checkpoints.checkpoint import SourceTensor
from requant.core.dtypes import TensorInfo
from requant.formats.base import SourceLayer, Tensors
from requant.formats.tensor_sorter import LayerError
from requant.packings.experts import Place, StackedExperts
from requant.text import pluralize


@dataclass(frozen=True)
class Experts:
    """The tensors of a stack, and where an expert's parts are in them."""

    count: int
    parts: Tensors  # tensors by the names that a reader gives them
    places: Mapping[str, Place]  # name of a tensor -> where an expert's part is

    @staticmethod
    def of(count: int, parts: Tensors, transposed: Sequence[str] = ()) -> Experts:
        """Split tensors into ``count`` experts; ``transposed`` are roles of ``(experts, in, out)``.

        Raises:
            LayerError: A tensor has another number of experts.
        """
        places = {}
        first = next((part for part in parts.values() if part.info.shape[:1] == (count,)), None)
        for role, part in parts.items():
            shape = part.info.shape
            if shape == (count,):
                places[part.name] = Place(0)
            elif shape and shape[0] == count:
                places[part.name] = Place(prod(shape[1:-1]), role in transposed)
            elif part.info.size == 1 or len(shape) == 1:
                places[part.name] = Place(-1)
            else:
                stack = f" as {first.name} is {first.info}" if first is not None else ""
                message = f"expected {pluralize(count, 'expert')} on its first axis,{stack}"
                raise LayerError(part.name, f"{part.info}, {message}")
        return Experts(count, parts, places)

    def one(self) -> dict[str, SourceTensor]:
        """The tensors of one expert, by role; shapes only, as the data is that of all."""
        return {role: self._one(part) for role, part in self.parts.items()}

    def _one(self, part: SourceTensor) -> SourceTensor:
        place = self.places[part.name]
        if place.height < 0:
            return part
        shape = part.info.shape[1:]
        if place.transposed:
            shape = (*shape[:-2], shape[-1], shape[-2])
        return replace(part, info=TensorInfo(part.info.dtype, shape))

    def stack(self, layer: SourceLayer) -> SourceLayer:
        """The stack of experts that are each stored as ``layer``."""
        assert layer.packing is not None
        whole = {part.name: part for part in self.parts.values()}
        parts = {role: whole[part.name] for role, part in layer.parts.items()}
        places = tuple((role, self.places[part.name]) for role, part in parts.items())
        packing = StackedExperts(layer.packing, self.count, places)
        return replace(layer, parts=parts, shape=(self.count, *layer.shape), packing=packing)


def are_transposed(codes: TensorInfo, scales: TensorInfo) -> bool:
    """Whether groups of inputs run down the axis before the last: ``(experts, in, out)``."""
    if len(codes.shape) != 3 or len(scales.shape) != 3:
        return False
    (count, height, width), (scaled, groups, n_out) = codes.shape, scales.shape
    return count == scaled and n_out == width > 1 and groups < height


def rows_with_one_scale(shape: Sequence[int], scale: Sequence[int]) -> tuple[int, int] | None:
    """Rows of a layer that share their scales, and scales in a row; None where none fit.

    Args:
        shape: Of the layer, ``(..., out, in)``.
        scale: One number, one a matrix, one a row (with or without an axis of 1), groups
            ``(..., out, groups)``, or for stacks one each for gate and up: ``(experts, 2)``.
    """
    *leading, n_out, _ = shape
    matrices, grid = prod(leading), tuple(scale)
    if prod(grid) == 1:
        return matrices * n_out, 1
    if grid == (*leading, n_out):
        return 1, 1
    if len(grid) == len(shape) and grid[:-1] == (*leading, n_out) and grid[-1] > 0:
        return 1, grid[-1]
    if not leading or grid[: len(leading)] != tuple(leading):
        return None
    each = prod(grid[len(leading) :])
    if each == 1:
        return n_out, 1
    halves = each == 2 and len(grid) == len(leading) + 1 and n_out % 2 == 0 and leading != [1]
    return (n_out // 2, 1) if halves else None
