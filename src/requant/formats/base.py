"""The protocol of a source format: which layers a checkpoint holds, and how they are stored."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np

from requant.checkpoints.checkpoint import Checkpoint, SourceTensor
from requant.core.reasons import Note, NoteCode, Reason, ReasonCode
from requant.core.sharing import shared
from requant.errors import Problem
from requant.packings.base import Packing
from requant.quantization.config import PerLayerQuantization, Quantization

Tensors = Mapping[str, SourceTensor]
"""Role or name -> stored tensor."""


class NoReading(Problem):
    """A layer that no other reader may take: of a kind that none knows, or known to lack a part."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class RowOrder:
    """Rows of a layer in another order: row ``i`` of the output is row ``rows[i]``."""

    rows: np.ndarray = field(repr=False, compare=False)  # int64, read-only; compared by ``digest``
    # row ``i`` of the source becomes row ``inverse[i]`` of the output; read-only
    inverse: np.ndarray = field(repr=False, compare=False)
    digest: str  # SHA-256 of the order

    @staticmethod
    def of(order: np.ndarray, times: int = 1) -> RowOrder:
        """The order of one hidden vector, for each of ``times`` blocks of rows."""
        blocks = [order + block * order.size for block in range(times)]
        rows = np.concatenate(blocks).astype(np.int64)
        inverse = np.empty_like(rows)
        inverse[rows] = np.arange(rows.size)
        rows.flags.writeable = inverse.flags.writeable = False
        return RowOrder(rows, inverse, hashlib.sha256(rows.tobytes()).hexdigest())


_NO_TENSORS: Tensors = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class RowRange:
    """A run of rows of a source layer; several, one after another, make a renamed layer."""

    layer: SourceLayer  # as the source stores it
    start: int  # first row; the leading axes of a stack count as further rows
    count: int
    step: int = 1  # 2 takes every other row


@dataclass(frozen=True, slots=True, kw_only=True)
class DefaultPolicy:
    """The treatment of a layer's codes when nothing is requested for it."""

    # what a layer without ``encoding`` is requantized to; None leaves it dense
    fallback: Quantization | None = None
    # why it has no ``encoding``, or another group or width than the source
    reason: Reason | None = None
    # why the user must say what becomes of it; "" where ``fallback`` serves
    requires_choice: str = ""
    # whether only ``--act-order`` decides between ``fallback``, dense and rejection
    act_order: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceLayer:
    """One layer, or one tensor that belongs to none, as the source stores it."""

    # layer path (``model.layers.0.mlp.up_proj``), or the tensor's name where it is not a
    # ``.weight``
    path: str
    # role -> stored tensor. A dense layer has ``weight`` alone; a quantized one of MLX ``weight``,
    # ``scales`` and, in affine mode, ``biases``; a packed one the roles that its packing names
    parts: Tensors
    # MLX's encoding that holds the stored codes as they are; None for a dense tensor, and for codes
    # that no mode of MLX holds
    encoding: Quantization | None
    shape: tuple[int, ...]  # the logical shape, ``(..., out_features, in_features)``
    # header name of the dtype that the values have once decoded; affine scales and biases take it
    dtype: str
    # how rows come out of ``parts``; None where the parts are row by row what MLX stores
    packing: Packing | None = None
    stored_description: str = ""  # how the source stores it, in a few words ("awq gemm 4-bit g128")
    policy: DefaultPolicy = DefaultPolicy()  # the treatment of its codes when nothing is requested
    # the order in which the output stores the rows; None as the source
    row_order: RowOrder | None = None
    # the rows of packed layers that it consists of, under another layout than the source's; empty
    # where ``packing`` and ``parts`` are the whole layer
    row_ranges: tuple[RowRange, ...] = ()
    # role -> tensor of a rotation of the inputs, which is stored with the codes and needed to run
    # them. ``packing`` decodes to values without the rotation
    rotation_tensors: Tensors = field(default_factory=lambda: _NO_TENSORS)
    # of a packed tensor whose dense values are not ``{path}.weight``; else "". Stacks of fused
    # experts have no module: their codes become ``{path}.weight``, their values ``{path}`` or what
    # the tool calls them
    name: str = ""
    # the rows, one number each, that make up ``{path}.global_scale``: nvfp4 in experts, whose
    # tensor scales go out as numbers of their own
    global_scale: tuple[RowRange, ...] = ()
    # the same values under the name and in the shape that the tool gives them, where a row of the
    # source is not a row of the layer; model classes are shown this
    as_named: SourceLayer | None = None
    # whether its values are computed from decoded codes, which then neither ``encoding`` nor
    # ``packing`` describes
    is_decoded: bool = False

    @property
    def is_quantized(self) -> bool:
        """Whether the source stores codes, though perhaps none that MLX could hold."""
        coded = self.packing is not None and self.packing.holds_codes
        return self.encoding is not None or coded or self.is_decoded

    @property
    def stored_as(self) -> str:
        """The way in which the source stores it, in a few words."""
        if self.stored_description or self.is_quantized:
            return self.stored_description or describe_encoding(self.encoding, self.dtype)
        return self.parts["weight"].info.dtype if self.parts else self.dtype

    @property
    def dense_name(self) -> str:
        """The name of its tensor once it is dense."""
        if self.packing is None and not self.is_weight:
            return self.parts["weight"].name
        return self.name or f"{self.path}.weight"

    @property
    def is_weight(self) -> bool:
        """Whether this is a ``{layer}.weight``, or codes: the only things ever quantized."""
        if self.packing is not None:
            return not self.name or self.packing.holds_codes
        return self.parts["weight"].name == f"{self.path}.weight"

    @property
    def default_target(self) -> Quantization | None:
        """The target of the layer when nothing is requested; None is dense."""
        return self.encoding or self.policy.fallback

    def keeps_codes(self, target: Quantization | None) -> bool:
        """Whether the stored codes are moved unchanged where the output has ``target``.

        Under a request for another quantization a rotation is folded into the values, so that
        every loader runs the layer.
        """
        if self.rotation_tensors:
            return target == self.encoding
        return self.encoding is not None and target is not None and target.holds(self.encoding)


@dataclass(frozen=True, slots=True)
class ActOrderFold:
    """A layer that can keep its codes if the layers before it change the order of their rows."""

    consumer: SourceLayer  # the layer as it then is, with an encoding
    producers: Mapping[str, RowOrder]  # path -> the order of its rows


@dataclass(frozen=True, slots=True)
class SourceLayout:
    """Everything a format found: each tensor of the checkpoint is in a layer or dropped."""

    layers: tuple[SourceLayer, ...]  # in the order of the checkpoint's bytes
    quantization: PerLayerQuantization | None = None  # what the source declares, if it is MLX's
    problems: tuple[Problem, ...] = ()  # everything that is wrong with the checkpoint
    dropped: tuple[tuple[str, str], ...] = ()  # tensors without use in MLX, each with the reason
    notes: tuple[Note, ...] = ()  # for the user
    folds: tuple[ActOrderFold, ...] = ()  # layers that may be kept by reordering others
    rotation: Mapping[str, Any] | None = None  # the entry of an output's config for rotated layers
    # the problem of a config that names a format of which no layer is; reported only where no
    # tensor holds codes (``unclaimed``)
    unfulfilled: Problem | None = None

    def without_rotations(self) -> SourceLayout:
        """The same with every rotation folded into the values of its layer."""
        reason = Reason(ReasonCode.ROTATION_FOLDED, "its rotation is folded into the weight")
        layers = tuple(
            replace(x, encoding=None, rotation_tensors={}, policy=replace(x.policy, reason=reason))
            if x.rotation_tensors
            else x
            for x in self.layers
        )
        return replace(self, layers=layers, rotation=None)

    def with_act_order_folded(self, keeps: Callable[[SourceLayer], bool]) -> SourceLayout:
        """The same with every fold whose consumer ``keeps`` its codes, and a note of them."""
        changed: dict[str, SourceLayer] = {}
        orders: dict[str, RowOrder] = {}
        for fold in self.folds:
            if keeps(fold.consumer):
                changed[fold.consumer.path] = fold.consumer
                orders |= fold.producers
        if not changed:
            return self
        layers = tuple(
            replace(changed.get(layer.path, layer), row_order=orders.get(layer.path))
            for layer in self.layers
        )
        note = Note(
            NoteCode.ACT_ORDER_MOVED,
            f"act-order of {len(changed)} layers was moved into the rows of the layers before "
            "them: their codes stay as they are.",
        )
        return replace(self, layers=layers, notes=(*self.notes, note))


class Format(Protocol):
    """A source format.

    It works on headers and JSON, and on the few small tensors that decide what a layer is
    (``Checkpoint.read_small_tensor``); no weights are read.
    """

    name: str

    def claims(self, checkpoint: Checkpoint) -> str | None:
        """Say why this checkpoint is of this format ("config.json: ..."), or None."""

    def read(self, checkpoint: Checkpoint) -> SourceLayout:
        """Sort every tensor into layers, and list what is wrong with them."""


def named_parts(tensors: Tensors, path: str, roles: Iterable[str]) -> dict[str, SourceTensor]:
    """Role -> the tensor ``{path}.{role}``, for those of ``roles`` that there are."""
    return {role: tensors[name] for role in roles if (name := f"{path}.{role}") in tensors}


def dense_layer(tensor: SourceTensor) -> SourceLayer:
    """Describe a tensor that is stored as its values."""
    name = tensor.name
    path = name.removesuffix(".weight")
    shape, dtype = tensor.info.shape, tensor.info.dtype
    return SourceLayer(path=path, parts={"weight": tensor}, encoding=None, shape=shape, dtype=dtype)


def packed_layer(
    path: str,
    parts: Tensors,
    shape: tuple[int, ...],
    packing: Packing,
    *,
    dtype: str,
    stored: str,
    reason: Reason | None = None,
) -> SourceLayer:
    """Describe a layer of codes by its packing.

    Where the packing has no encoding, for ``reason``, the layer becomes what ``fallback_for`` says.
    """
    encoding: Quantization | None = getattr(packing, "encoding", None)
    fallback = fallback_for(shape[-1]) if encoding is None else None
    return SourceLayer(
        path=path,
        parts=parts,
        encoding=shared(encoding),
        shape=shared(shape),
        dtype=dtype,
        packing=packing,
        stored_description=shared(stored),
        policy=shared(DefaultPolicy(fallback=fallback, reason=reason)),
    )


def describe_encoding(encoding: Quantization | None, dtype: str) -> str:
    """Describe how a layer is stored: "BF16" or "affine 4-bit g64"."""
    if encoding is None:
        return dtype
    return f"{encoding.mode} {encoding.bits}-bit g{encoding.group_size}"


def fallback_for(n_in: int) -> Quantization | None:
    """Return the default target of codes that no MLX mode holds: 8 bits, or None for dense.

    8 bits in groups of 64 add 0.4 to 0.6 % of relative RMS to a 4-bit source, where 4 bits
    again would add as much error as the source has.
    """
    group = next((size for size in (64, 32) if n_in % size == 0), None)
    return None if group is None else Quantization.affine(group, 8)


def scale_dtype(stored: str, model: str) -> str:
    """The dtype of scales and biases in the output: 16 bits stay, others become the model's.

    MLX computes in float32 wherever float32 scales meet 16-bit activations.
    """
    return stored if stored in ("F16", "BF16") else model
