"""compressed-tensors folders (llm-compressor, Kimi): integer, FP8, FP4 and FP6 layers.

The tensors of a layer tell its format; the config says what no shape can (the width of padded
codes, the group of a ragged row). Where the two contradict each other the layer is rejected here;
``other_layers`` reads it if shapes leave one reading.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, Final, NamedTuple

import numpy as np

from requant.checkpoints.checkpoint import Checkpoint, SourceTensor
from requant.core.dtypes import FLOATS
from requant.core.reasons import Reason, ReasonCode
from requant.formats.base import SourceLayer, SourceLayout, Tensors, scale_dtype
from requant.formats.compressed_tensors_config import CtConfig, Scheme
from requant.formats.float8_layers import EXPONENTS, FLOAT8, float8_stack, mx_layer
from requant.formats.integer_layers import groups_of, integer_layer, row_fields
from requant.formats.layer_names import layer_names
from requant.formats.nvfp4_layers import nvfp4_layer, nvfp4_without_tensor_scale
from requant.formats.quantization_block import find_quantization_block
from requant.formats.stacks import Experts, are_transposed, rows_with_one_scale
from requant.formats.tensor_sorter import LayerError, TensorSorter, unexpected
from requant.packings.compressed_tensors import CtActOrder, CtPacked, CtPlain, Zeros, packed_words
from requant.text import join_or

_ROLES: Final = (
    *("weight_packed", "weight", "weight_scale", "weight_zero_point", "weight_shape"),
    *("weight_g_idx", "weight_global_scale"),
)
# Of them, those that are read to describe a layer, in the order of the reads.
_READ: Final = ("weight_shape", "weight_g_idx", "weight_global_scale")
_SPARSE: Final = {
    **dict.fromkeys(
        ("scale_packed", "meta"), "marlin-24 (2:4-sparse codes in the tiles of a GPU kernel)"
    ),
    **dict.fromkeys(("compressed", "bitmask"), "sparse-bitmask (values without their zeros)"),
}
_WORDS = ("I32", "U32")
_BYTES = ("U8", "F8_E4M3")
_Declared = tuple[tuple[int, ...], ...] | None
"""The rows of a ``weight_shape``; None where there is none, or it is not read."""


class _Width(NamedTuple):
    """Bits of a code, and whether a word holds whole codes only."""

    bits: int
    padded: bool = False


class CompressedTensors:
    """A folder with ``quant_method: compressed-tensors``, or with packed weights of its kind."""

    name = "compressed-tensors"
    layer_parts = "PATH.weight_packed (I8 and F8_E4M3: PATH.weight) with PATH.weight_scale"

    def claims(self, checkpoint: Checkpoint) -> str | None:
        """The config names it, or the old key of its block does; else ``weight_packed`` decides."""
        block = find_quantization_block(checkpoint)
        if block is not None:
            by_key = block.keys[-1:] == ("compression_config",)
            known = block.method in ("compressed-tensors", "compressed_tensors")
            if not block.method and "config_groups" in block.block:
                known = "quant_algo" not in block.block and "quantization" not in block.block
            return f"{block.where}: compressed-tensors" if known or by_key else None
        parts = layer_names(checkpoint.tensors).tensors
        return next((part.name for n, part in parts.items() if n.endswith(".weight_packed")), None)

    def read(self, checkpoint: Checkpoint) -> SourceLayout:
        return _Reader(checkpoint).read()


class _Reader:
    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint, self.sorter = checkpoint, TensorSorter.by_role(checkpoint)
        self.config = CtConfig(find_quantization_block(checkpoint), self.sorter.problems)

    def read(self) -> SourceLayout:
        sorter = self.sorter
        layers = sorter.layers_with(_ROLES)
        sorter.read_ahead(layers.values(), _READ)
        for path, parts in layers.items():
            if not _has_codes(parts):
                continue
            scheme, declared = self.config.of(path), self._declared(parts)
            kind = (scheme, declared) if _is_integer(parts) else None
            make = partial(self._stack, scheme, declared)
            if layer := sorter.make(path, parts, make, kind):
                used = {part.name for part in layer.parts.values()}
                for part in parts.values():
                    if part.name not in used:
                        sorter.drop(part.name, "only says the shape of its weight")
        sorter.drop_runtime_scales()
        self._check_loose()
        if not sorter.quantized:
            message = "says compressed-tensors, but no layer has a weight_packed or a weight_scale"
            sorter.no_layer(self.config.where, message)
        return sorter.layout()

    def _check_loose(self) -> None:
        """Report tensors of sparse formats, and note layers that are dense though named."""
        sorter = self.sorter
        for tensor in sorter.left:
            role = tensor.name.rpartition(".")[2]
            if role in _SPARSE:
                sorter.problem(tensor.name, f"is a part of {_SPARSE[role]}, which is not read")
        schemes = self.config.named()
        named = [path for path, x in schemes if x.bits and not self.config.ignores(path)]
        sorter.note_dense(f"{self.config.where}.config_groups", named)

    def _stack(
        self, scheme: Scheme, declared: _Declared, path: str, parts: Tensors
    ) -> SourceLayer | None:
        """A layer; of a stack whose packed codes are stored ``(experts, in, out)``, by expert."""
        codes, scale = _codes(parts), parts.get("weight_scale")
        floats = codes.info.dtype in FLOAT8[:2]
        if scale is None or floats or not are_transposed(codes.info, scale.info):
            return self._layer(path, parts, scheme, declared)
        parts = {role: part for role, part in parts.items() if role != "weight_shape"}
        roles = tuple(role for role, part in parts.items() if len(part.info.shape) == 3)
        experts = Experts.of(codes.info.shape[0], parts, roles)
        layer = self._layer(path, experts.one(), scheme, None)
        return None if layer is None else experts.stack(layer)

    def _layer(
        self, path: str, parts: Tensors, scheme: Scheme, declared: _Declared
    ) -> SourceLayer | None:
        codes, scale = _codes(parts), parts.get("weight_scale")
        if scale is None:
            others = ", ".join(sorted(parts.keys() - {"weight", "weight_packed"}))
            siblings = f" (it has {others})" if others else ""
            message = f"{codes.name} has no weight_scale next to it{siblings}"
            raise LayerError(path, message)
        if len(codes.info.shape) < 2 or 0 in codes.info.shape:
            raise unexpected(codes, "a matrix or a stack of them")
        if "weight_packed" in parts and "weight" in parts:
            message = "has both weight_packed and weight; remove the one that is stale"
            raise LayerError(path, message)
        if "weight_packed" in parts:
            if codes.info.dtype in _WORDS:
                return self._packed(path, parts, scheme, declared)
            return self._small_floats(path, parts)
        if codes.info.dtype == "I8":
            return self._plain(path, parts, scheme)
        if codes.info.dtype == "U8" and (scheme.kind, scheme.bits) != ("float", 8):
            kind = f"{scheme.bits}-bit {scheme.kind}" if scheme.bits else scheme.kind
            said = f"{scheme.where} says {kind}" if scheme.where else ""
            message = f"{codes.info} next to {scale.name} is FP8 only where the config says so"
            message = f"{message}; {said or 'it says nothing of this layer'}"
            raise LayerError(codes.name, message)
        if codes.info.dtype in FLOAT8:
            dtype = scale_dtype(scale.info.dtype, self.sorter.dtype)
            return float8_stack(self.sorter, path, codes, scale, block=scheme.block, dtype=dtype)
        raise unexpected(codes, "I8 or F8_E4M3 codes")

    def _packed(
        self, path: str, parts: Tensors, scheme: Scheme, declared: _Declared
    ) -> SourceLayer | None:
        *leading, n_out, _ = parts["weight_packed"].info.shape
        n_in = _columns(path, parts, scheme, declared)
        width = self._width(parts["weight_packed"], n_in, scheme)
        shape = (*leading, n_out, n_in)
        fields = self._fields(path, parts, shape, scheme, width)
        if fields is None:
            return None
        packing = CtPacked(**fields, padded=width.padded)
        if self._act_order(path, parts, n_in, packing.group, scheme):
            each = len(parts["weight_g_idx"].info.shape) > 1
            packing = CtActOrder(**fields, padded=width.padded, index_of_each=each)
        return self._integer_layer(path, parts, shape, packing, "pack")

    def _width(self, packed: SourceTensor, n_in: int, scheme: Scheme) -> _Width:
        words = packed.info.shape[-1]
        widths = [
            _Width(bits, padded)
            for padded in (False, True)
            for bits in ((scheme.bits,) if scheme.bits else range(1, 9))
            if 1 <= bits <= 8 and packed_words(n_in, bits, padded) == words
        ]
        if scheme.bits is None and self.config.found is not None:
            # What words hold that are padded is too easily met by chance to determine the width.
            widths = [
                x
                for x in widths
                if 32 % x.bits == 0 or self.config.padded or _Width(x.bits) in widths
            ]
        if not widths:
            width = f"{scheme.bits} bits" if scheme.bits else "any width"
            expected = f", expected {packed_words(n_in, scheme.bits, False)}" if scheme.bits else ""
            raise LayerError(
                packed.name,
                f"{packed.info}: {words} words do not hold {n_in} inputs of {width}{expected}",
            )
        whole = [bits for bits, padded in widths if not padded]
        if len(whole) > 1:
            raise LayerError(
                packed.name,
                f"{packed.info} may hold {n_in} inputs of {join_or(whole)} bits; write num_bits "
                f"of its layer into {self.config.where or 'a quantization_config'}",
            )
        bits = widths[0].bits
        if _Width(bits, True) not in widths[1:] or 32 % bits == 0:
            return widths[0]
        if self.config.padded is None:  # both layouts take as many words
            raise LayerError(
                packed.name,
                f"{packed.info} may hold {n_in} inputs of {bits} bits "
                "as compressed-tensors packs them before or since 0.18, and "
                f"{self.config.where or 'no config'} gives no version that says which",
            )
        return _Width(bits, self.config.padded)

    def _plain(self, path: str, parts: Tensors, scheme: Scheme) -> SourceLayer | None:
        shape = parts["weight"].info.shape
        bits = scheme.bits or 8
        if not 1 <= bits <= 8:
            raise LayerError(f"{scheme.where}.num_bits", f"is {bits}, but {path}.weight holds int8")
        fields = self._fields(path, parts, shape, scheme, _Width(bits))
        if fields is None:
            return None
        return self._integer_layer(path, parts, shape, CtPlain(**fields), "int")

    def _fields(
        self, path: str, parts: Tensors, shape: tuple[int, ...], scheme: Scheme, width: _Width
    ) -> dict[str, Any] | None:
        group = self._group(path, parts, shape, scheme)
        zeros = self._zeros(path, parts, scheme, width)
        scale = parts["weight_scale"].info
        sharing = rows_with_one_scale(shape, scale.shape)
        if group is None or zeros is None or sharing is None:
            return None
        return row_fields(shape, scale, sharing[0], bits=width.bits, group=group, zero_points=zeros)

    def _integer_layer(
        self,
        path: str,
        parts: Tensors,
        shape: tuple[int, ...],
        packing: CtPacked | CtPlain,
        kind: str,
    ) -> SourceLayer:
        roles = packing.required_rects(0, min(packing.matrix, 32))
        used = {role: parts[role] for role in roles}
        tool = f"compressed-tensors {kind}"
        words = "a scale a row" if packing.scale_rows == 1 else "a scale a tensor"
        layer = integer_layer(self.sorter, path, used, shape, packing, tool=tool, scales=words)
        if not isinstance(packing, CtActOrder):
            return layer
        text = "act-order: its inputs take their scales from any group"
        reason = Reason(ReasonCode.ACT_ORDER, text)
        return replace(
            layer,
            stored_description=f"{layer.stored_description} act-order",
            policy=replace(layer.policy, reason=reason, act_order=True),
        )

    def _declared(self, parts: Tensors) -> _Declared:
        """The rows of ``weight_shape``, one or one an expert; None where it is not read."""
        packed, shape = parts.get("weight_packed"), parts.get("weight_shape")
        if packed is None or shape is None or not _is_shape_of(packed, shape):
            return None
        if packed.info.dtype not in _WORDS:
            return None
        rows = self.checkpoint.read_small_tensor(shape.name).reshape(-1, shape.info.shape[-1])
        return tuple(map(tuple, rows.tolist()))

    def _group(
        self, path: str, parts: Tensors, shape: tuple[int, ...], scheme: Scheme
    ) -> int | None:
        """Inputs that share a scale, by the scale's shape and the config."""
        scale = parts["weight_scale"]
        *leading, n_out, n_in = shape
        if scale.info.dtype not in FLOATS:
            self.sorter.problem(scale.name, f"{scale.info}, expected floats")
            return None
        rows, groups = rows_with_one_scale(shape, scale.info.shape) or (0, 0)
        declared_group = scheme.group_size
        by_row = len(scale.info.shape) == len(shape) and rows == 1
        if rows and not by_row and (len(shape) > 2 or rows > 1 or scale.info.size == 1):
            return n_in
        fits = by_row and groups > 0
        if fits and declared_group is not None:
            fits = groups == -(-n_in // declared_group)
            if fits:
                return declared_group
        likely = groups_of(n_in, groups) if fits else []
        if len(likely) == 1:
            return likely[0]
        if likely:
            self.sorter.problem(
                scale.name,
                f"{scale.info} fits groups of {join_or(likely)} in {n_in} inputs; write the "
                f"group_size of {path} into {self.config.where or 'a quantization_config'}",
            )
            return None
        expected = -(-n_in // declared_group) if declared_group else 1
        where = f" ({scheme.where}: group_size {declared_group})" if declared_group else ""
        wanted = [*leading, n_out, expected]
        self.sorter.problem(scale.name, f"{scale.info}, expected {wanted} for {list(shape)}{where}")
        return None

    def _zeros(self, path: str, parts: Tensors, scheme: Scheme, width: _Width) -> Zeros | None:
        """Where the zeros are; None with a problem."""
        points, scale = parts.get("weight_zero_point"), parts["weight_scale"].info
        if points is None:
            if scheme.symmetric is False:
                message = f"has no weight_zero_point, but {scheme.where} is not symmetric"
                self.sorter.problem(path, message)
                return None
            return Zeros.MIDDLE
        if points.info.dtype == "I8" and points.info.shape == scale.shape:
            return Zeros.SIGNED
        expected = f"I8 {list(scale.shape)}"
        packed = parts.get("weight_packed")
        if packed is not None and scale.shape[:-1] == packed.info.shape[:-1]:
            *leading, n_out, groups = scale.shape
            shape = (*leading, packed_words(n_out, *width), groups)
            if points.info.dtype in _WORDS and points.info.shape == shape:
                return Zeros.PACKED
            expected = f"I32 {list(shape)} or {expected}"
        self.sorter.problem(
            points.name, f"{points.info}, expected {expected} for {width.bits} bits"
        )
        return None

    def _act_order(self, path: str, parts: Tensors, n_in: int, group: int, scheme: Scheme) -> bool:
        """Whether the groups of inputs are shuffled."""
        index = parts.get("weight_g_idx")
        if index is None:
            if scheme.shuffled:
                message = f"has no weight_g_idx, but {scheme.where} says actorder {scheme.actorder}"
                raise LayerError(path, message)
            return False
        leading = parts["weight_packed"].info.shape[:-2]
        if index.info.dtype != "I32" or index.info.shape not in ((n_in,), (*leading, n_in)):
            raise unexpected(index, f"I32 {[*leading, n_in]}")
        of = self.checkpoint.read_small_tensor(index.name)
        if (of == -1).any():  # never set: compressed-tensors ignores it too
            return False
        groups = -(-n_in // group)
        if of.min() < 0 or of.max() >= groups:
            message = f"names groups {of.min()} to {of.max()}, but there are {groups}"
            raise LayerError(index.name, message)
        return bool((of != np.arange(n_in) // group).any())

    def _small_floats(self, path: str, parts: Tensors) -> SourceLayer:
        """FP4 and FP6 in bytes: the ratio of bytes to scales tells which."""
        packed, scale = parts["weight_packed"], parts["weight_scale"]
        *leading, n_out, nbytes = packed.info.shape
        same_rows = scale.info.shape[:-1] == (*leading, n_out) and packed.info.dtype == "U8"
        groups = scale.info.shape[-1] if same_rows else 0
        if "weight_global_scale" in parts:
            if scale.info.dtype in _BYTES and groups * 8 == nbytes and groups:
                factor = parts["weight_global_scale"]
                return nvfp4_layer(self.sorter, path, packed, scale, factor, divides=True)
        elif scale.info.dtype in _BYTES and groups * 8 == nbytes and groups:
            missing = "weight_global_scale that divides them"
            return nvfp4_without_tensor_scale(self.sorter, path, packed, scale, missing)
        elif scale.info.dtype in EXPONENTS and groups:
            if groups * 16 == nbytes:
                return mx_layer(path, packed, scale, self.sorter.dtype, bits=4)
            if groups * 24 == nbytes:
                return mx_layer(path, packed, scale, self.sorter.dtype, bits=6, element="e2m3")
        raise LayerError(
            packed.name,
            f"{packed.info} with a weight_scale {scale.info} is neither nvfp4 (16 inputs a scale, "
            "E4M3, weight_global_scale) nor mxfp4 or mxfp6 (32 inputs a scale, U8)",
        )


def _is_shape_of(packed: SourceTensor, shape: SourceTensor) -> bool:
    """Whether a ``weight_shape`` has two numbers, or all axes, for a layer or for each expert."""
    axes, last = len(packed.info.shape), shape.info.shape[-1:]
    fits = shape.info.shape[:-1] in ((), packed.info.shape[:-2]) and last in ((2,), (axes,))
    return shape.info.dtype.startswith(("I", "U")) and fits


def _columns(path: str, parts: Tensors, scheme: Scheme, declared: _Declared) -> int:
    """Inputs: what weight_shape says, else what the words hold."""
    packed, shape = parts["weight_packed"], parts.get("weight_shape")
    n_out, words = packed.info.shape[-2:]
    if shape is None:
        bits = scheme.bits
        if bits is None or not 1 <= bits <= 8 or words * 32 % bits:
            raise LayerError(path, "has no weight_shape, and the config does not give its inputs")
        return words * 32 // bits
    if declared is None:
        raise unexpected(shape, "two whole numbers: outputs, inputs")
    *leading, rows, columns = declared[0]
    if any(x != declared[0] for x in declared):
        raise LayerError(shape.name, "says other numbers for some experts than for the first")
    fits = (*leading, rows) in ((n_out,), packed.info.shape[:-1])
    if not fits or columns < 1:
        message = f"says {[*leading, rows, columns]}, but {packed.name} is {packed.info}"
        raise LayerError(shape.name, message)
    return columns


def _is_integer(parts: Tensors) -> bool:
    """Whether codes are integers in the order of their inputs: no value but weight_shape counts."""
    dtypes = _WORDS if "weight_packed" in parts else ("I8",)
    return _codes(parts).info.dtype in dtypes and "weight_g_idx" not in parts


def _codes(parts: Tensors) -> SourceTensor:
    return parts["weight_packed" if "weight_packed" in parts else "weight"]


def _has_codes(parts: Tensors) -> bool:
    """Whether a layer has codes; floats next to a scale are looked at later, by ``unclaimed``."""
    weight = parts.get("weight")
    if weight is not None and weight.info.dtype in FLOATS:
        return "weight_packed" in parts
    return "weight_packed" in parts or (weight is not None and parts.keys() != {"weight"})
