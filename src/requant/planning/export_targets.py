"""What a format of an export holds, and how the layers are written that it holds.

A format is a row of ``TargetFormat`` and a ``LayerWriter``: ``planning.export`` decides about each
layer by the row, then makes one writer for all layers that keep codes, which gives the steps
of each and the ``quantization_config``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from requant.core.dtypes import TensorInfo
from requant.formats import SourceLayer
from requant.formats.base import fallback_for
from requant.formats.widening import stored_rows, widened
from requant.packings.base import Packing
from requant.packings.coded_matrix import CodedMatrix, Reencoded
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
        is_encoded_again: Whether the codes are new ones, of the values behind those of the source.
    """

    layer: SourceLayer
    codes: Quantization
    written: Quantization
    scale_dtype: str
    zeros: ZeroPoints
    is_encoded_again: bool = False

    def matrix(self) -> CodedMatrix:
        """The codes as the output has them."""
        layer, packing = self.layer, self.layer.packing
        if self.is_encoded_again:
            packing = Reencoded(packing or stored_rows(layer), self.written, self.scale_dtype)
        elif packing is not None or self.codes != self.written:
            packing = widened(packing or stored_rows(layer), self.codes, self.written)
        out_features, in_features = layer.shape
        return CodedMatrix(out_features, in_features, self.written, packing)


class LayerWriter(ABC):
    """Writes the layers that keep their codes in one format."""

    @classmethod
    def settled(cls, layers: Sequence[HeldLayer]) -> list[HeldLayer]:
        """The same layers as the format writes them, where one decides about others."""
        return list(layers)

    def __init__(self, layers: Sequence[HeldLayer]) -> None:
        self.layers = layers

    @abstractmethod
    def steps(self, layer: HeldLayer) -> Iterator[Step]:
        """The steps of a layer."""

    @abstractmethod
    def block(self, ignored: Sequence[str]) -> dict[str, Any]:
        """The ``quantization_config``; ``ignored`` are the linear layers that are dense."""


def export_step(layer: HeldLayer, name: str, info: TensorInfo, packing: Packing) -> Step:
    """The step that writes a tensor of a layer by a packing."""
    roles = packing.required_rects(0, min(packing.row_unit, packing.rows))
    return Step(
        layer=layer.layer.path,
        operation=Operation.EXPORT,
        rows=RowMapping(count=packing.rows, columns=packing.columns),
        inputs={role: layer.layer.parts[role] for role in roles},
        outputs={"weight": OutputTensor(f"{layer.layer.path}.{name}", info)},
        dtype=info.dtype,
        packing=packing,
    )


def moved_step(layer: HeldLayer, role: str, name: str, info: TensorInfo) -> Step:
    """The step that copies the bytes of a tensor of MLX's under another name and dtype."""
    path = layer.layer.path
    step = copy_step(path, layer.layer.parts[role], OutputTensor(f"{path}.{name}", info))
    return replace(step, scales_of=layer.codes.mode) if role == "scales" else step


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

    def encoded_again(self, shape: tuple[int, ...]) -> Quantization | None:
        """The encoding of new codes for values that it has no codes for: 8 bits, where it has."""
        target = fallback_for(shape[-1])
        return None if target is None or self.why_not(target, shape) else target

    def scale_dtype(self, stored: str) -> str:
        """The dtype in which affine scales are written."""
        return stored if stored in self.scale_dtypes else self.scale_dtypes[0]
