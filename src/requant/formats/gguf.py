"""GGUF files: blocks that MLX's modes hold keep their codes, others are decoded.

Which block types are which, and what a move costs, is docs/formats/gguf.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import ClassVar

import numpy as np

from requant.checkpoints.checkpoint import Checkpoint, SourceTensor
from requant.checkpoints.gguf_tensors import GgufModel, GgufTensor
from requant.core.dtypes import FLOATS
from requant.core.reasons import Reason, ReasonCode
from requant.errors import InvariantError, Problem
from requant.formats.base import (
    DefaultPolicy,
    SourceLayer,
    SourceLayout,
    Tensors,
    dense_layer,
    packed_layer,
)
from requant.kernels import cast as values
from requant.kernels.gguf import TYPES, BlockType, values_into, words_into
from requant.packings.base import (
    DTYPE_NAME,
    EXACT,
    Array,
    Fidelity,
    MatrixPacking,
    Packing,
    Parts,
    Rect,
    Scratch,
    Triple,
    is_narrower,
    rounded,
)
from requant.quantization.config import Quantization, QuantMode
from requant.text import pluralize_are

# Types whose scales and biases are float16 numbers as they are, or powers of two times those.
_HALVES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "TQ1_0", "TQ2_0", "Q1_0")
# Scales cover 16 or 8 values: new codes of 8 bits in the shortest groups add least to them.
_FALLBACK = Quantization.affine(32, 8)
# Halves of kv_b_proj (DeepSeek 2), as the converter stores them.
_KEYS, _VALUES = ".k_b_proj.weight", ".v_b_proj.weight"
_NAN_EXPONENT, _ZERO_SCALE, _SIGN = 255, 0x7F, 0x80


def _by_head(rows: Array, heads: int) -> Array:
    """Rows ``(heads * head_dim, n)`` in Hugging Face's order.

    llama.cpp turns neighbouring rows of a head together, Hugging Face row ``i`` with row
    ``i + head_dim / 2``.
    """
    pairs = rows.reshape(heads, -1, 2, rows.shape[-1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)


def _by_group(values: Array, heads: tuple[int, int]) -> Array:
    """Values along the last axis with heads in Hugging Face's order: in groups.

    llama.cpp has ``(heads of a group, groups)`` heads, Hugging Face ``(groups, heads)``.
    """
    groups, each = heads
    dealt = values.reshape(*values.shape[:-1], each, groups, -1)
    return np.ascontiguousarray(dealt.swapaxes(-3, -2)).reshape(values.shape)


@dataclass(frozen=True)
class _GgufRows(MatrixPacking):
    """Rows of one tensor; of whole heads where their rows change places.

    ``weight``: ``[..., rows, in]`` numbers, or bytes of blocks.
    """

    type_number: int  # of the type, as files write it
    width: int  # elements in a stored row
    head: int = 1  # rows of a head that change places; 1 where none do
    column_heads: tuple[int, int] = (0, 0)  # groups, and heads of each, if inputs change places

    @property
    def is_in_order(self) -> bool:
        """Whether neither rows nor inputs change places."""
        return self.head == 1 and self.column_heads[1] <= 1

    def place_columns(self, out: Array) -> None:
        """Give decoded values, or words, scales or biases, the order of their inputs."""
        if self.column_heads[1] > 1:
            out[...] = _by_group(out, self.column_heads)

    @property
    def kind(self) -> BlockType:
        """The type of the blocks."""
        return TYPES[self.type_number]

    @property
    def row_unit(self) -> int:  # type: ignore[override]  # a constant of other packings
        return self.head

    @property
    def stored_kind(self) -> tuple[object, ...]:
        return type(self), self.type_number

    def required_rects(self, start: int, stop: int) -> dict[str, Rect]:
        return {"weight": Rect((start, stop), (0, self.width))}

    def stored(self, parts: Parts) -> Array:
        """The rows as they are stored, in the output's order."""
        rows = parts["weight"]
        return rows if self.head == 1 else _by_head(rows, rows.shape[0] // self.head)


@dataclass(frozen=True)
class GgufValues(_GgufRows):
    """Plain numbers, from which one may have to be subtracted."""

    holds_codes: ClassVar[bool] = False

    shift: bool = False
    exponential: bool = False

    def decode(self, parts: Parts, start: int, stop: int, out: Array, scratch: Scratch) -> None:
        """The values, less one where ``shift`` says so (in float32), rounded once.

        Where ``exponential`` says so, x of stored values -exp(x).
        """
        stored = self.stored(parts)
        if self.shift:
            stored = stored.astype(np.float32) - np.float32(1)
        if self.exponential:
            with np.errstate(invalid="ignore", divide="ignore"):
                stored = np.log(-stored.astype(np.float64)).astype(np.float32)
        values.cast_into(stored, out)
        self.place_columns(out)

    def decoded_fidelity(self, dtype: str) -> Fidelity:
        """Exact where nothing is computed and no number rounds."""
        is_plain = not (self.shift or self.exponential) and self.kind.name in DTYPE_NAME
        if is_plain and not is_narrower(dtype, self.kind.name):
            return EXACT
        return super().decoded_fidelity(dtype)


@dataclass(frozen=True)
class GgufScaledValues(GgufValues):
    """Plain numbers that are multiplied with a scale.

    ``tensor_scale``: as for ``GgufBlocks``.
    """

    tensor_scales: int = 1  # numbers in ``tensor_scale``

    def required_rects(self, start: int, stop: int) -> dict[str, Rect]:
        scale = _scale_cut(self.tensor_scales, start // self.matrix)
        return super().required_rects(start, stop) | {"tensor_scale": scale}

    def decode(self, parts: Parts, start: int, stop: int, out: Array, scratch: Scratch) -> None:
        _scaled_into(self.stored(parts).astype(np.float32), parts, out)
        self.place_columns(out)

    def decoded_fidelity(self, dtype: str) -> Fidelity:
        return rounded("values", dtype)


def _scaled_into(wide: Array, parts: Parts, out: Array) -> None:
    with np.errstate(over="ignore", invalid="ignore"):
        wide *= parts["tensor_scale"].reshape(-1)[0]
    values.cast_into(wide, out)


def _scale_cut(scales: int, matrix: int) -> Rect:
    """The scale of a matrix: its own, or the one of all."""
    which = matrix if scales > 1 else 0
    return Rect((0, 1), (which, which + 1))


@dataclass(frozen=True)
class GgufVector(GgufValues):
    """One vector whose elements belong to heads: the bias of a layer with such rows."""

    heads: int = 0

    def stored(self, parts: Parts) -> Array:
        row = parts["weight"]
        return _by_head(row.reshape(-1, 1), self.heads).reshape(row.shape) if self.heads else row


@dataclass(frozen=True)
class GgufBlocks(_GgufRows):
    """Blocks of codes.

    ``tensor_scale``: one float32 for all matrices, or one for each; absent where it is 1.
    """

    tensor_scales: int = 0  # numbers in ``tensor_scale``; 0 where there is none

    @property
    def encoding(self) -> Quantization | None:
        encoding = self.kind.encoding
        if self.tensor_scales or encoding is None:
            return None
        groups, each = self.column_heads
        # A group of codes moves as a whole, or not at all.
        if each > 1 and self.columns // (groups * each) % encoding.group_size:
            return None
        return encoding

    def required_rects(self, start: int, stop: int) -> dict[str, Rect]:
        cuts = super().required_rects(start, stop)
        if self.tensor_scales:
            cuts["tensor_scale"] = _scale_cut(self.tensor_scales, start // self.matrix)
        return cuts

    @property
    def row_form(self) -> BlockType | None:
        return self.kind if self.is_in_order and not self.tensor_scales else None

    def stored_codes(self, start: int, stop: int) -> BlockType | None:
        return self.row_form

    def repack(self, parts: Parts, start: int, stop: int, out: Triple, scratch: Scratch) -> None:
        """Codes bit for bit; scales and biases rounded at most once."""
        words_into(self.kind, self.stored(parts), out["weight"], out["scales"], out.get("biases"))
        for array in out.values():
            self.place_columns(array)
        if "biases" not in out:
            _check_scales(self.kind, out["scales"])

    def decode(self, parts: Parts, start: int, stop: int, out: Array, scratch: Scratch) -> None:
        """Values in float32, as llama.cpp computes them; rounded once."""
        if not self.tensor_scales:
            values_into(self.kind, self.stored(parts), out)
        else:
            wide = scratch.take("wide", "F32", stop - start, 4 * self.columns)
            values_into(self.kind, self.stored(parts), wide)
            _scaled_into(wide, parts, out)
        self.place_columns(out)

    def fidelity(self, dtype: str) -> Fidelity:
        """Exact where scales and biases are numbers of ``dtype``."""
        name, encoding = self.kind.name, self.encoding
        affine = encoding is not None and encoding.mode is QuantMode.AFFINE
        if not affine or dtype == "F32" or (dtype == "F16" and name in _HALVES):
            return EXACT
        more = ", twice that where a bias follows from its scale"
        return rounded("scales and biases", dtype, more)


@dataclass(frozen=True)
class GgufDenseBlocks(GgufBlocks):
    """Blocks of what no layer of MLX holds quantized: vectors, convolutions, biases."""

    holds_codes: ClassVar[bool] = False


@dataclass(frozen=True)
class GgufHeads(MatrixPacking):
    """``kv_b_proj`` of compressed keys and values, of which files have the two halves.

    ``keys``: ``(heads, columns, key rows)``, each head transposed; ``weight``, the values:
    ``(heads, value rows, columns)``. A head's rows are those of its keys, then of its values.
    """

    holds_codes: ClassVar[bool] = False

    key_type: int  # numbers of the types, as files write them
    value_type: int
    key_rows: int  # rows of one head
    value_rows: int
    key_width: int  # elements in a stored row
    value_width: int

    @property
    def row_unit(self) -> int:  # type: ignore[override]  # a constant of other packings
        return self.key_rows + self.value_rows

    @property
    def encoding(self) -> Quantization | None:
        """None: groups of keys run along another axis than MLX's."""
        return None

    @property
    def stored_kind(self) -> tuple[object, ...]:
        return type(self), self.key_type, self.value_type

    def required_rects(self, start: int, stop: int) -> dict[str, Rect]:
        first, last = start // self.row_unit, stop // self.row_unit
        keys = Rect((first * self.columns, last * self.columns), (0, self.key_width))
        halves = Rect((first * self.value_rows, last * self.value_rows), (0, self.value_width))
        return {"keys": keys, "weight": halves}

    def repack(self, parts: Parts, start: int, stop: int, out: Triple, scratch: Scratch) -> None:
        raise InvariantError("the halves of kv_b_proj have no encoding of MLX's")

    def decode(self, parts: Parts, start: int, stop: int, out: Array, scratch: Scratch) -> None:
        """Values in float32, rounded once."""
        heads = (stop - start) // self.row_unit
        keys = _wide(self.key_type, parts["keys"], self.key_rows)
        halves = _wide(self.value_type, parts["weight"], self.columns)
        whole = np.concatenate(
            [
                keys.reshape(heads, self.columns, self.key_rows).swapaxes(1, 2),
                halves.reshape(heads, self.value_rows, self.columns),
            ],
            axis=1,
        )
        values.cast_into(whole.reshape(out.shape), out)

    def decoded_fidelity(self, dtype: str) -> Fidelity:
        names = {TYPES[number].name for number in (self.key_type, self.value_type)}
        if all(name in DTYPE_NAME and not is_narrower(dtype, name) for name in names):
            return EXACT
        return rounded("values", dtype)


def _wide(type_number: int, stored: Array, columns: int) -> Array:
    """Stored rows as float32 ``(rows, columns)``."""
    kind = TYPES[type_number]
    wide = np.empty((stored.shape[0], columns), np.float32)
    if kind.dtype:
        values.cast_into(stored, wide)
    else:
        values_into(kind, stored, wide)
    return wide


def _check_scales(kind: BlockType, scales: Array) -> None:
    """Bring scale bytes that the two sides read differently into line, or reject them.

    Raises:
        InvariantError: A byte that no writer makes, and MLX takes for something else.
    """
    if kind.name == "NVFP4":
        scales[scales == _ZERO_SCALE] = 0  # 0 for llama.cpp, NaN for MLX
        bad, what = int((scales >= _SIGN).sum()), "negative, which this type has not"
    else:
        bad, what = int((scales == _NAN_EXPONENT).sum()), "255, which is NaN in E8M0"
    if bad:
        raise InvariantError(f"{pluralize_are(bad, 'scale byte')} {what}: the source is damaged")


class Gguf:
    """A GGUF model."""

    name = "gguf"

    def claims(self, checkpoint: Checkpoint) -> str | None:
        """The file is one."""
        if checkpoint.gguf is None:
            return None
        return f"{checkpoint.files[0].name}: architecture {checkpoint.gguf.architecture!r}"

    def read(self, checkpoint: Checkpoint) -> SourceLayout:
        """One layer a tensor; extra scales belong to the tensors that they scale."""
        model = checkpoint.gguf
        assert model is not None
        dropped = list(model.dropped)
        layers: list[SourceLayer] = []
        problems: list[Problem] = []
        for name, tensor in checkpoint.tensors.items():
            path, _, role = name.rpartition(".")
            scales = role in ("scale", "input_scale") and f"{path}.weight" in model.tensors
            if name.endswith(_KEYS) and name.replace(_KEYS, _VALUES) in model.tensors:
                layers.append(_heads(name, model, checkpoint))
            elif name.endswith(_VALUES) and name.replace(_VALUES, _KEYS) in model.tensors:
                continue
            elif not scales:
                layers.append(_layer(tensor, model, checkpoint, problems))
            elif role == "input_scale":
                dropped.append((name, "MLX does not quantize activations"))
        return SourceLayout(tuple(layers), None, tuple(problems), tuple(dropped), notes=model.notes)


def _heads(name: str, model: GgufModel, checkpoint: Checkpoint) -> SourceLayer:
    """The layer whose two halves are stored apart."""
    names = {"keys": name, "weight": name.replace(_KEYS, _VALUES)}
    keys, halves = model.tensors[name], model.tensors[names["weight"]]
    heads, rank, key_rows = keys.shape
    value_rows = halves.shape[1]
    parts = {role: checkpoint.tensors[tensor] for role, tensor in names.items()}
    rows = heads * (key_rows + value_rows)
    packing = GgufHeads(
        rows=rows,
        columns=rank,
        matrix=rows,
        key_type=keys.kind.number,
        value_type=halves.kind.number,
        key_rows=key_rows,
        value_rows=value_rows,
        key_width=parts["keys"].info.shape[-1],
        value_width=parts["weight"].info.shape[-1],
    )
    path = name.replace(_KEYS, ".kv_b_proj")
    if keys.kind.dtype and halves.kind.dtype:
        return SourceLayer(
            path=path,
            parts=parts,
            encoding=None,
            shape=(rows, rank),
            dtype=model.dtype,
            packing=packing,
            stored_description=keys.kind.dtype,
        )
    reason = Reason(ReasonCode.NO_MLX_GROUP, "its groups run along the outputs, not the inputs")
    return packed_layer(
        path,
        parts,
        (rows, rank),
        packing,
        dtype=model.dtype,
        stored=f"gguf {keys.kind.name}",
        reason=reason,
    )


def _layer(
    tensor: SourceTensor, model: GgufModel, checkpoint: Checkpoint, problems: list[Problem]
) -> SourceLayer:
    stored = model.tensors[tensor.name]
    *leading, columns = stored.shape or (1,)
    rows = prod(leading)
    matrix = leading[-1] if leading else 1
    parts = {"weight": tensor}
    is_weight = tensor.name.endswith(".weight")
    path = tensor.name.removesuffix(".weight")
    scale = checkpoint.tensors.get(f"{path}.scale") if is_weight else None
    scales = 0
    if scale is not None and _scales(checkpoint, scale, rows // matrix, problems):
        parts["tensor_scale"] = scale
        scales = scale.info.size
        if stored.is_shifted or (stored.kind.dtype and stored.kind.dtype not in FLOATS):
            message = f"scales {tensor.name}, a norm or whole numbers: such a scale is not known"
            problems.append(Problem(scale.name, message))
    if stored.kind.dtype:
        return _plain(parts, stored, model.dtype, scales)
    is_layer = is_weight and len(stored.shape) in (2, 3)
    packing = (GgufBlocks if is_layer else GgufDenseBlocks)(
        rows=rows,
        columns=columns,
        matrix=matrix,
        type_number=stored.kind.number,
        width=tensor.info.shape[-1],
        head=matrix // stored.heads if stored.heads else 1,
        column_heads=stored.column_heads,
        tensor_scales=scales,
    )
    if not is_layer:
        return _decoded(parts, stored, model.dtype, packing)
    kind = stored.kind.name
    layer = packed_layer(
        path, parts, stored.shape, packing, dtype=model.dtype, stored=f"gguf {kind}"
    )
    if packing.encoding is not None:
        return layer
    text = f"a scale of {kind} covers fewer values than any of MLX's"
    reason = Reason(ReasonCode.NO_MLX_GROUP, text)
    if scales:
        reason = Reason(ReasonCode.TENSOR_SCALE, "a scale over the whole tensor is multiplied in")
    return replace(layer, policy=DefaultPolicy(fallback=_FALLBACK, reason=reason))


def _scales(
    checkpoint: Checkpoint, scale: SourceTensor, matrices: int, problems: list[Problem]
) -> bool:
    """Whether a tensor's scales change anything."""
    info = scale.info
    if info.dtype != "F32" or len(info.shape) > 1 or info.size not in (1, matrices):
        message = f"{info}, expected F32 with one number, or one for each of {matrices} matrices"
        problems.append(Problem(scale.name, message))
        return False
    return bool((checkpoint.read_small_tensor(scale.name) != 1).any())


def _plain(parts: Tensors, stored: GgufTensor, dtype: str, scales: int) -> SourceLayer:
    """A tensor of numbers; floats take the dtype of the model."""
    tensor = parts["weight"]
    layer = dense_layer(tensor)
    if stored.kind.dtype not in FLOATS:
        return layer
    is_dealt = stored.column_heads[1] > 1
    computed = stored.is_shifted or stored.is_exponential
    plain = not (stored.heads or computed or scales or is_dealt)
    if stored.kind.dtype == dtype and plain:
        return layer
    *leading, columns = stored.shape or (1,)
    rows = leading[-1] if leading else 1
    matrix = (prod(leading), columns, rows, stored.kind.number, columns)
    packing: GgufValues
    head = rows // stored.heads if leading and stored.heads else 1
    shift, exponential = stored.is_shifted, stored.is_exponential
    if scales:
        packing = GgufScaledValues(*matrix, head, stored.column_heads, tensor_scales=scales)
    elif leading:
        packing = GgufValues(
            *matrix, head, stored.column_heads, shift=shift, exponential=exponential
        )
    else:
        packing = GgufVector(*matrix, shift=shift, exponential=exponential, heads=stored.heads)
    return _decoded(parts, stored, "F32" if stored.is_exponential else dtype, packing)


def _decoded(parts: Tensors, stored: GgufTensor, dtype: str, packing: Packing) -> SourceLayer:
    name = parts["weight"].name
    return SourceLayer(
        path=name.removesuffix(".weight"),
        parts=parts,
        encoding=None,
        shape=stored.shape,
        dtype=dtype,
        packing=packing,
        name="" if name.endswith(".weight") else name,
    )
