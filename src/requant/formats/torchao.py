"""torchao folders in safetensors: tensor subclasses as single tensors, described in the metadata.

``a.b.weight`` is stored as ``a.b._weight_qdata``, ``a.b._weight_scale`` and so on; the file's
metadata has a JSON text for it with its type and settings. Weights in memory come without
metadata: then the config and the dtypes tell.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import replace
from typing import Any, Final

from requant.checkpoints.checkpoint import Checkpoint, SourceTensor
from requant.core.dtypes import KERNEL_FLOATS
from requant.core.strict_json import parse_json_object
from requant.formats.base import SourceLayer, SourceLayout, Tensors
from requant.formats.float8_layers import EXPONENTS, FLOAT8, float8_layer, mx_layer, tile_of
from requant.formats.input_scaled import input_scaled
from requant.formats.integer_layers import integer_layer, row_fields
from requant.formats.nvfp4_layers import nvfp4_layer
from requant.formats.quantization_block import (
    QuantizationBlock,
    as_table,
    claim_by_method,
    find_quantization_block,
)
from requant.formats.tensor_sorter import LayerError, TensorSorter, unexpected
from requant.packings.compressed_tensors import Zeros
from requant.packings.torchao import Swizzled, TorchaoInt4, TorchaoInteger
from requant.text import format_value

_PREFIX: Final = "_weight_"
_DEVICE: Final = ("Int4TilePackedTo4dTensor", "Int4PlainInt32Tensor", "Int4PreshuffledTensor")
_ACTIVATIONS: Final = "a scale of activations, which MLX does not quantize"


class Torchao:
    """A folder with ``quant_method: torchao``, or whose metadata describes torchao's tensors."""

    name = "torchao"
    layer_parts = "PATH._weight_qdata with PATH._weight_scale"

    def claims(self, checkpoint: Checkpoint) -> str | None:
        """The config names it; without one, the metadata of the files does."""
        names = (f"metadata: {key}" for key in checkpoint.metadata if key == "tensor_names")
        return claim_by_method(checkpoint, "torchao", names)

    def read(self, checkpoint: Checkpoint) -> SourceLayout:
        return _Reader(checkpoint).read()


class _Reader:
    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint, self.sorter = checkpoint, TensorSorter(checkpoint)
        self.found = find_quantization_block(checkpoint) or QuantizationBlock("metadata", {})
        self.default = self._default()

    def read(self) -> SourceLayout:
        sorter = self.sorter
        parts: dict[str, dict[str, SourceTensor]] = {}
        for name, tensor in sorter.tensors.items():
            path, _, last = name.rpartition(".")
            if last.startswith(_PREFIX):
                parts.setdefault(path, {})[last.removeprefix(_PREFIX)] = tensor
        parts = {path: tensors for path, tensors in parts.items() if "qdata" in tensors}
        for path, tensors in parts.items():
            for role in tensors.keys() & {"act_per_tensor_scale", "act_scale"}:
                sorter.drop(tensors[role].name, _ACTIVATIONS)
            sorter.make(path, tensors, self._layer)
        self._check_described(parts.keys())
        if not parts:
            sorter.no_layer(self.found.where, "says torchao, but no tensor is a _weight_qdata")
        return sorter.layout()

    def _default(self) -> Mapping[str, Any]:
        """``_data`` of the config's default scheme, its ``_type`` under "type"."""
        declared = as_table(self.found.table("quant_type").get("default"))
        data = declared.get("_data")
        return {**data, "type": str(declared.get("_type"))} if isinstance(data, Mapping) else {}

    def _check_described(self, paths: Set[str]) -> None:
        """A quantized weight that the metadata describes must be there."""
        for name, text in self.checkpoint.metadata.items():
            path = name.removesuffix(".weight")
            if path == name or path in paths or name in self.sorter.tensors:
                continue
            declared, _ = parse_json_object(text.encode())
            if declared.get("_type") not in (None, "Tensor"):
                message = f"describes its {declared['_type']}, but {path}.{_PREFIX}qdata is missing"
                self.sorter.problem(f"metadata: {name}", message)

    def _described(self, path: str, tensors: Tensors) -> tuple[str, Mapping[str, Any]]:
        """Type and settings of a weight: its metadata, else what config and dtypes tell."""
        text = self.checkpoint.metadata.get(f"{path}.weight")
        if text is None:
            return self._guessed(path, tensors)
        declared, wrong = parse_json_object(text.encode())
        where = f"metadata: {path}.weight"
        data = declared.get("_data", {})
        if wrong or not isinstance(declared.get("_type"), str) or not isinstance(data, Mapping):
            why = wrong[0] if wrong else "has no _type and _data"
            raise LayerError(where, f"does not describe a tensor: {why}")
        names = declared.get("_tensor_data_names")
        if isinstance(names, list):
            for name in names:
                if str(name) not in tensors:
                    absent = f"{path}.{_PREFIX}{name}"
                    raise LayerError(where, f"names {format_value(name)}, but {absent} is missing")
        return declared["_type"], data

    def _guessed(self, path: str, tensors: Tensors) -> tuple[str, Mapping[str, Any]]:
        kind, qdata = self.default.get("type", ""), tensors.get("qdata")
        if kind.startswith("Intx"):
            return "IntxUnpackedToInt8Tensor", {"target_dtype": self.default.get("weight_dtype")}
        if kind.startswith("Int8") and qdata is not None and qdata.info.dtype == "I8":
            return "Int8Tensor", {}
        if kind.startswith("Float8"):
            return "Float8Tensor", {}
        what = format_value(kind)
        message = f"has no metadata that gives its type, and the config's {what} does not either"
        raise LayerError(path, message)

    def _layer(self, path: str, tensors: Tensors) -> SourceLayer:
        kind, data = self._described(path, tensors)
        if kind in _DEVICE:
            raise LayerError(path, f"is an {kind}: codes in the order of a GPU kernel, not read")
        make = {
            "Int8Tensor": self._integer,
            "IntxUnpackedToInt8Tensor": self._integer,
            "Int4Tensor": self._int4,
            "Float8Tensor": self._float8,
            "MXTensor": self._mx,
            "NVFP4Tensor": self._nvfp4,
        }
        if kind not in make:
            raise LayerError(path, f"is of type {format_value(kind)}; known are {', '.join(make)}")
        if "scale" not in tensors:
            raise LayerError(path, f"has no {path}.{_PREFIX}scale")
        qdata, scale = tensors["qdata"], tensors["scale"]
        if len(qdata.info.shape) != 2 or 0 in (*qdata.info.shape, *scale.info.shape):
            raise unexpected(qdata, "a matrix")
        layer = make[kind](path, tensors, data)
        inputs = tensors.get("act_pre_scale")
        if inputs is None:
            return layer
        if inputs.info.dtype not in KERNEL_FLOATS or inputs.info.size != layer.shape[-1]:
            raise unexpected(inputs, f"one float for each of {layer.shape[-1]} inputs")
        if inputs.info.shape[-1:] != layer.shape[-1:]:
            raise unexpected(inputs, f"[{layer.shape[-1]}]")
        return input_scaled(layer, inputs)

    def _integer(self, path: str, tensors: Tensors, data: Mapping[str, Any]) -> SourceLayer:
        qdata, scale, zeros = tensors["qdata"], tensors["scale"], tensors.get("zero_point")
        if qdata.info.dtype != "I8":
            raise unexpected(qdata, "I8 codes")
        (rows, columns), bits = qdata.info.shape, _bits(path, data)
        one = scale.info.size == 1
        wide = scale.info.shape[-1] if scale.info.shape else 1
        whole = one or (scale.info.shape == (rows, wide) and columns % wide == 0)
        if scale.info.dtype not in KERNEL_FLOATS or not whole:
            raise unexpected(scale, f"floats [{rows}, groups] for {qdata.info}")
        if zeros is not None and (zeros.info.shape != scale.info.shape or zeros.info.dtype != "I8"):
            raise unexpected(zeros, f"I8 {list(scale.info.shape)}, one next to each scale")
        group, scale_rows = (columns, rows) if one else (columns // wide, 1)
        fields = row_fields(qdata.info.shape, scale.info, scale_rows, bits=bits, group=group)
        parts = {"weight": qdata, "weight_scale": scale}
        if zeros is not None:
            parts["weight_zero_point"] = zeros
            fields |= {"zero_points": Zeros.SIGNED, "symmetric": self._symmetric(zeros)}
        packing = TorchaoInteger(**fields)
        words = "a scale a tensor" if one else "a scale a row"
        shape = qdata.info.shape
        return integer_layer(self.sorter, path, parts, shape, packing, tool="torchao", scales=words)

    def _symmetric(self, zeros: SourceTensor) -> bool:
        """Whether every zero is 0: as the config says (held against the data later), or read."""
        if str(_enum_word(self.default.get("mapping_type"))).upper() == "SYMMETRIC":
            return True
        return not self.checkpoint.read_small_tensor(zeros.name).any()

    def _int4(self, path: str, tensors: Tensors, data: Mapping[str, Any]) -> SourceLayer:
        qdata, scale, zeros = tensors["qdata"], tensors["scale"], tensors.get("zero_point")
        rows, nbytes = qdata.info.shape
        if qdata.info.dtype not in ("I8", "U8") or zeros is None:
            what = "zero_point" if zeros is None else "I8 codes"
            raise unexpected(qdata, f"{what} of an Int4Tensor")
        groups = scale.info.shape[0]
        if scale.info.shape != (groups, rows) or (2 * nbytes) % groups:
            raise unexpected(scale, f"[groups, {rows}]")
        if zeros.info.shape != scale.info.shape:
            raise unexpected(zeros, str(list(scale.info.shape)))
        for part in (scale, zeros):
            if part.info.dtype not in KERNEL_FLOATS:
                raise unexpected(part, "floats")
        columns = 2 * nbytes
        group, dtype = columns // groups, scale.info.dtype
        packing = TorchaoInt4(rows, columns, 4, group, symmetric=False, scale_dtype=dtype)
        parts = {"qdata": qdata, "scale": scale, "zero_point": zeros}
        return integer_layer(self.sorter, path, parts, (rows, columns), packing, tool="torchao")

    def _float8(self, path: str, tensors: Tensors, data: Mapping[str, Any]) -> SourceLayer:
        qdata, scale = tensors["qdata"], tensors["scale"]
        if qdata.info.dtype not in FLOAT8:
            raise unexpected(qdata, "F8_E4M3 codes")
        tile = tile_of(qdata.info.shape, scale.info.shape, None)
        if tile is None or scale.info.dtype not in KERNEL_FLOATS:
            raise LayerError(scale.name, f"{scale.info} fits no tiling of {qdata.info}")
        return float8_layer(
            self.checkpoint, path, qdata, scale=scale, tile=tile, dtype=self.sorter.dtype
        )

    def _mx(self, path: str, tensors: Tensors, data: Mapping[str, Any]) -> SourceLayer:
        qdata, scale = tensors["qdata"], tensors["scale"]
        bits = 8 if qdata.info.dtype == "F8_E4M3" else 4
        if bits == 4 and qdata.info.dtype != "U8":
            raise unexpected(qdata, "F8_E4M3 or packed FP4 (U8) codes")
        if data.get("block_size", 32) != 32:
            message = f"has blocks of {format_value(data.get('block_size'))}; MLX's are of 32"
            raise LayerError(path, message)
        if scale.info.dtype not in EXPONENTS:
            raise unexpected(scale, "F8_E8M0")
        layer = mx_layer(path, qdata, scale, self.sorter.dtype, bits)
        return _unswizzled(layer, scale, 32, data)

    def _nvfp4(self, path: str, tensors: Tensors, data: Mapping[str, Any]) -> SourceLayer:
        qdata, scale = tensors["qdata"], tensors["scale"]
        if qdata.info.dtype != "U8":
            raise unexpected(qdata, "U8, two codes a byte")
        if data.get("block_size", 16) != 16:
            message = f"has blocks of {format_value(data.get('block_size'))}; MLX's are of 16"
            raise LayerError(path, message)
        if scale.info.dtype not in ("F8_E4M3", "U8"):
            raise unexpected(scale, "F8_E4M3")
        factor = tensors.get("per_tensor_scale")
        layer = nvfp4_layer(self.sorter, path, qdata, scale, factor, divides=False)
        return _unswizzled(layer, scale, 16, data)


def _unswizzled(
    layer: SourceLayer, scale: SourceTensor, group: int, data: Mapping[str, Any]
) -> SourceLayer:
    """The layer with its scales row by row, however they are stored."""
    assert layer.packing is not None
    rows, columns = layer.shape
    groups, ragged = divmod(columns, group)
    if ragged:
        raise LayerError(layer.path, f"has {columns} inputs, no multiple of its groups of {group}")
    if not data.get("is_swizzled_scales"):
        if scale.info.shape != (rows, groups):
            raise unexpected(scale, f"[{rows}, {groups}]")
        return layer
    packing = Swizzled(rows, columns, layer.packing, groups)
    across = 16 * -(-groups // 4)
    expected = (packing.stored_bytes() // across, across)
    if scale.info.shape != expected:
        raise unexpected(scale, f"{list(expected)}, swizzled")
    return replace(
        layer, packing=packing, stored_description=f"{layer.stored_description}, swizzled scales"
    )


def _enum_word(value: Any) -> Any:
    """A word, or that of an enum as torchao serializes it: ``{"_data": "int4"}``."""
    return value.get("_data") if isinstance(value, Mapping) else value


def _bits(path: str, data: Mapping[str, Any]) -> int:
    """The width that ``target_dtype`` names: "int4"."""
    word = _enum_word(data.get("target_dtype"))
    if word is None:
        return 8
    if str(word) not in {f"int{bits}" for bits in range(1, 9)}:
        raise LayerError(path, f"has target_dtype {format_value(word)}, expected int1 to int8")
    return int(str(word).removeprefix("int"))
