"""The protocol of a source format: which layers a checkpoint holds, and how they are stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from requant.checkpoint import Checkpoint, SourceTensor
from requant.errors import Problem
from requant.formats.packing import Packing
from requant.schema import PerLayerQuantization, Quantization


@dataclass(frozen=True, slots=True)
class Rows:
    """A run of rows of a source layer; several, one after another, make a renamed layer.

    Attributes:
        layer: As the source stores it.
        start: First row; the leading axes of a stack count as further rows.
        count: How many.
    """

    layer: SourceLayer
    start: int
    count: int


@dataclass(frozen=True, slots=True)
class SourceLayer:
    """One layer, or one tensor that belongs to none, as the source stores it.

    Attributes:
        path: Layer path (``model.layers.0.mlp.up_proj``), or the tensor's name where it
            is no ``.weight``.
        parts: Role -> stored tensor. A dense layer has ``weight`` alone; a quantized one
            of MLX ``weight``, ``scales`` and, in affine mode, ``biases``; a packed one the
            roles that its packing names.
        encoding: MLX's encoding that holds the stored codes as they are; None for a dense
            tensor, and for codes that no mode of MLX holds.
        shape: The logical shape, ``(..., out_features, in_features)``.
        dtype: Header name of the dtype that the values have once decoded; affine scales
            and biases take it.
        packing: How rows come out of ``parts``; None where the parts are row by row what
            MLX stores.
        stored: How the source stores it, in a few words ("awq gemm 4-bit g128").
        fallback: What becomes of a layer without ``encoding`` that was quantized, when
            nothing is wished; None leaves it dense.
        reason: Why it has no ``encoding``, or another group or width than the source.
        needs_wish: Why the user must say what becomes of it; "" where ``fallback`` serves.
        pieces: The rows of packed layers that it consists of, under another layout than the
            source's; empty where ``packing`` and ``parts`` are the whole layer.
    """

    path: str
    parts: Mapping[str, SourceTensor]
    encoding: Quantization | None
    shape: tuple[int, ...]
    dtype: str
    packing: Packing | None = None
    stored: str = ""
    fallback: Quantization | None = None
    reason: str = ""
    needs_wish: str = ""
    pieces: tuple[Rows, ...] = ()

    @property
    def is_quantized(self) -> bool:
        """Whether the source stores codes, though perhaps none that MLX could hold."""
        return self.encoding is not None or self.packing is not None or bool(self.stored)

    @property
    def is_weight(self) -> bool:
        """Whether this is a ``{layer}.weight``, the only thing that is ever quantized."""
        return self.packing is not None or self.parts["weight"].name == f"{self.path}.weight"

    @property
    def kept(self) -> Quantization | None:
        """What becomes of the layer when nothing is wished; None is dense."""
        return self.encoding or self.fallback


@dataclass(frozen=True, slots=True)
class SourceLayout:
    """Everything a format found: each tensor of the checkpoint is in a layer or dropped.

    Attributes:
        layers: In the order of the checkpoint's bytes.
        quantization: The MLX quantization that the source declares, if it is MLX's.
        problems: What is wrong with the checkpoint.
        dropped: Tensors that have no use in MLX, each with the reason.
        notes: What the user should know, one sentence each.
    """

    layers: tuple[SourceLayer, ...]
    quantization: PerLayerQuantization | None = None
    problems: tuple[Problem, ...] = ()
    dropped: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()


class Format(Protocol):
    """A source format.

    It works on headers and JSON, and on the few small tensors that decide what a layer is
    (``Checkpoint.peek``); no weights are read.
    """

    name: str

    def claims(self, checkpoint: Checkpoint) -> str | None:
        """Say why this checkpoint is of this format ("config.json: ..."), or None."""

    def read(self, checkpoint: Checkpoint) -> SourceLayout:
        """Sort every tensor into layers, and list what is wrong with them."""


def dense_layer(tensor: SourceTensor) -> SourceLayer:
    """Describe a tensor that is stored as its values."""
    name = tensor.name
    path = name.removesuffix(".weight") if name.endswith(".weight") else name
    return SourceLayer(path, {"weight": tensor}, None, tensor.info.shape, tensor.info.dtype)


def describe(encoding: Quantization | None, dtype: str) -> str:
    """How a layer is stored, in a few words: "BF16" or "affine 4-bit g64"."""
    if encoding is None:
        return dtype
    return f"{encoding.mode} {encoding.bits}-bit g{encoding.group_size}"
