"""What a format of an export holds, and how the layers are written that it holds.

A format is a row of ``TargetFormat`` and a ``LayerWriter``: ``planning.export`` decides about each
layer by the row, then makes one writer for all layers that keep codes, which gives the steps
of each and the ``quantization_config``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from requant.checkpoints.checkpoint import ComputedTensor, JoinedTensor, SourceTensor, cut
from requant.core.dtypes import TensorInfo
from requant.formats import SourceLayer
from requant.formats.widening import stored_rows, widened
from requant.packings.base import Packing
from requant.packings.exported import CodedMatrix
from requant.packings.zero_points import ZeroPoints
from requant.planning.plan import Operation, OutputTensor, RowMapping, Step
from requant.planning.steps import copy_step
from requant.quantization.config import Quantization, QuantMode
from requant.text import join_or


@dataclass(frozen=True, slots=True)
class HeldLayer:
    """A layer whose codes the format holds.

    Attributes:
        layer: The layer of the source.
        codes: MLX's quantization of its codes.
        written: That of the codes in the output: perhaps in more bits, or in smaller groups.
        scale_dtype: Header name of the dtype in which affine scales are written.
        zeros: Its zero points; none of the modes without.
        paths: Its path in the output; of a stack those of its matrices.
    """

    layer: SourceLayer
    codes: Quantization
    written: Quantization
    scale_dtype: str
    zeros: ZeroPoints
    paths: tuple[str, ...]

    @property
    def matrices(self) -> int:
        """Matrices of a stack; 1 of a matrix."""
        return prod(self.layer.shape[:-2])

    def matrix(self, number: int) -> tuple[CodedMatrix, Mapping[str, SourceTensor]]:
        """A matrix of the layer, and the tensors that hold it."""
        out_features, in_features = self.layer.shape[-2:]
        packing = self.layer.packing
        if packing is None and self.codes == self.written:
            parts: Mapping[str, SourceTensor] = self.layer.parts
            if len(self.layer.shape) > 2:
                parts = {role: part_of(x, number) for role, x in parts.items()}
            return CodedMatrix(out_features, in_features, self.written), parts
        packing = widened(packing or stored_rows(self.layer), self.codes, self.written)
        first = number * out_features
        made = CodedMatrix(out_features, in_features, self.written, packing, first)
        return made, self.layer.parts


def part_of(tensor: SourceTensor, number: int) -> JoinedTensor:
    """Matrix ``number`` of a tensor ``(matrices, ...)`` that is stored as it is."""
    assert not isinstance(tensor, ComputedTensor)
    info = TensorInfo(tensor.info.dtype, tensor.info.shape[1:])
    start = number * info.nbytes
    return JoinedTensor(tensor.name, info, tuple(cut(tensor, start, start + info.nbytes)))


class LayerWriter(ABC):
    """Writes the layers that keep their codes in one format."""

    @classmethod
    def settled(cls, layers: Sequence[HeldLayer]) -> list[HeldLayer]:
        """The same layers as the format writes them, where one decides about others."""
        return list(layers)

    def __init__(self, layers: Sequence[HeldLayer]) -> None:
        self.layers = layers

    @abstractmethod
    def tensors(self, layer: HeldLayer, number: int) -> Iterator[Step]:
        """The steps of one matrix of a layer."""

    @abstractmethod
    def block(self, ignored: Sequence[str]) -> dict[str, Any]:
        """The ``quantization_config``; ``ignored`` are the linear layers that are dense."""

    def steps(self, layer: HeldLayer) -> Iterator[Step]:
        """The steps of a layer."""
        for number in range(layer.matrices):
            yield from self.tensors(layer, number)


def export_step(
    layer: HeldLayer,
    name: str,
    info: TensorInfo,
    packing: Packing,
    parts: Mapping[str, SourceTensor],
) -> Step:
    """The step that writes a tensor by a packing."""
    roles = packing.required_rects(0, min(packing.row_unit, packing.rows))
    return Step(
        layer=layer.layer.path,
        operation=Operation.EXPORT,
        rows=RowMapping(count=packing.rows, columns=packing.columns),
        inputs={role: parts[role] for role in roles},
        outputs={"weight": OutputTensor(name, info)},
        dtype=info.dtype,
        packing=packing,
    )


def moved_step(
    layer: HeldLayer, part: SourceTensor, name: str, info: TensorInfo, *, is_scale: bool = False
) -> Step:
    """The step that copies the bytes of a tensor of MLX's under another name and dtype."""
    step = copy_step(layer.layer.path, part, OutputTensor(name, info))
    return replace(step, scales_of=layer.codes.mode) if is_scale else step


@dataclass(frozen=True, slots=True)
class TargetFormat:
    """What a format holds.

    Attributes:
        name: In words, for messages.
        writer: Writes its layers.
        widths: Bits of codes, by mode.
        groups: Sizes of affine groups.
        scale_dtypes: Dtypes of affine scales; others are rounded to the first.
        output_bits: Outputs times bits are a multiple of this.
        takes_tokens: Whether embeddings and heads may have codes.
        integer_zeros: Whether biases are ``-zero * scale`` with a zero point in the range of codes.
    """

    name: str
    writer: type[LayerWriter]
    widths: Mapping[QuantMode, tuple[int, ...]]
    groups: tuple[int, ...] = (32, 64, 128)
    scale_dtypes: tuple[str, ...] = ("F16", "BF16", "F32")
    output_bits: int = 1
    takes_tokens: bool = False
    integer_zeros: bool = True

    def why_not(self, codes: Quantization, shape: tuple[int, ...]) -> str:
        """Why it does not hold codes of a matrix, by what headers say; "" where it does."""
        widths = self.widths.get(codes.mode)
        if widths is None:
            modes = join_or([str(mode) for mode in self.widths])
            return f"its mode is {codes.mode}, {self.name} holds {modes}"
        if codes.bits not in widths:
            return f"{codes.bits} bits, {self.name} holds {join_or(list(map(str, widths)))}"
        if codes.mode is QuantMode.AFFINE and codes.group_size not in self.groups:
            groups = join_or(list(map(str, self.groups)))
            return f"groups of {codes.group_size}, {self.name} holds {groups}"
        if shape[-2] * codes.bits % self.output_bits:
            return f"{shape[-2]} outputs of {codes.bits} bits do not fill whole words"
        return ""

    def wider(self, codes: Quantization) -> Iterator[Quantization]:
        """Encodings of the format that hold these affine codes in more bits, narrowest first."""
        if codes.mode is QuantMode.AFFINE:
            for bits in sorted(self.widths.get(codes.mode, ())):
                if bits > codes.bits:
                    yield replace(codes, bits=bits)

    def scale_dtype(self, stored: str) -> str:
        """The dtype in which affine scales are written."""
        return stored if stored in self.scale_dtypes else self.scale_dtypes[0]
