"""The protocol of a source format: which layers a checkpoint holds, and how they are stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from requant.checkpoint import Checkpoint, SourceTensor
from requant.errors import Problem
from requant.schema import PerLayerQuantization, Quantization


@dataclass(frozen=True, slots=True)
class SourceLayer:
    """One layer, or one tensor that belongs to none, as the source stores it.

    Attributes:
        path: Layer path (``model.layers.0.mlp.up_proj``), or the tensor's name where it
            is no ``.weight``.
        parts: Role -> stored tensor. A dense layer has ``weight`` alone; a quantized one
            ``weight``, ``scales`` and, in affine mode, ``biases``.
        encoding: How the codes are to be read; None for a dense tensor.
        shape: The logical shape, ``(..., out_features, in_features)``.
        dtype: Header name of the dtype that the values have once decoded.
    """

    path: str
    parts: Mapping[str, SourceTensor]
    encoding: Quantization | None
    shape: tuple[int, ...]
    dtype: str

    @property
    def is_weight(self) -> bool:
        """Whether this is a ``{layer}.weight``, the only thing that is ever quantized."""
        return self.parts["weight"].name == f"{self.path}.weight"


@dataclass(frozen=True, slots=True)
class SourceLayout:
    """Everything a format found: each tensor of the checkpoint is in exactly one layer."""

    layers: tuple[SourceLayer, ...]
    quantization: PerLayerQuantization | None
    problems: tuple[Problem, ...] = ()


class Format(Protocol):
    """A source format. All of it works on headers and JSON; no tensor data is read."""

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
