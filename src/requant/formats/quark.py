"""AMD Quark folders: integers, FP8, FP4 and FP6 as the config's scheme for each layer says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from requant.checkpoints.checkpoint import Checkpoint, SourceTensor
from requant.core.dtypes import FLOATS, KERNEL_FLOATS
from requant.core.regex import Wildcards
from requant.formats.base import SourceLayer, SourceLayout, Tensors, packed_layer
from requant.formats.float8_layers import EXPONENTS, FLOAT8, block_pair, float8_stack, mx_layer
from requant.formats.integer_layers import integer_layer
from requant.formats.nvfp4_layers import nvfp4_layer, nvfp4_without_tensor_scale
from requant.formats.quantization_block import (
    as_table,
    claim_by_method,
    find_quantization_block,
    is_count,
)
from requant.formats.stacks import Experts, are_transposed
from requant.formats.tensor_sorter import LayerError, TensorSorter, unexpected
from requant.packings.quark import QuarkColumns, QuarkMx, QuarkRows
from requant.text import format_value, join_first, join_or

_ROLES: Final = ("weight", "weight_scale", "weight_zero_point", "weight_scale_2")
_INTEGERS: Final = ("int4", "uint4", "int8", "uint8")
_SCHEMES: Final = ("per_tensor", "per_channel", "per_group")
_ROTATIONS: Final = ("rotation", "quarot", "spinquant")
_E4M3: Final = ("F8_E4M3", "U8")  # arrays in memory may hold them as bytes
_WORDS: Final = {4: ("I32", "U32"), 8: ("I8", "U8")}  # bits -> dtypes of stored codes
_CODES_A_WORD: Final = {4: 8, 8: 1}
_PACKS: Final = ("reorder", "order")


class Quark:
    """A folder with ``quant_method: quark``."""

    name = "quark"
    layer_parts = "PATH.weight with PATH.weight_scale"

    def claims(self, checkpoint: Checkpoint) -> str | None:
        """The config names it; exports in the form of fp8 or awq are these formats' own."""
        return claim_by_method(checkpoint, "quark")

    def read(self, checkpoint: Checkpoint) -> SourceLayout:
        return _Reader(checkpoint).read()


@dataclass(frozen=True, slots=True)
class _Scheme:
    """The scheme of a layer's weight: ``dtype``, ``qscheme`` and so on; two levels for NVFP4."""

    where: str
    levels: tuple[Mapping[str, Any], ...]

    def word(self, key: str, level: int = 0) -> str:
        """A text in lower case, enum names without their class; "" where there is none."""
        value = self.levels[level].get(key) if level < len(self.levels) else None
        return value.lower().rpartition(".")[2] if isinstance(value, str) else ""


class _Reader:
    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint, self.sorter = checkpoint, TensorSorter.by_role(checkpoint)
        block = find_quantization_block(checkpoint)
        assert block is not None
        self.found = block
        self.export, self.by_path = block.table("export"), block.table("layer_quant_config")
        self.by_layer = Wildcards(self.by_path)
        self.fake = str(self.export.get("weight_format", "")).lower() == "fake_quantized"
        self._check_config()

    def read(self) -> SourceLayout:
        sorter = self.sorter
        for path, tensors in sorter.layers_with(_ROLES).items():
            if "weight" in tensors and tensors["weight"].info.dtype not in FLOATS:
                sorter.make(path, tensors, self._layer)
        sorter.drop_runtime_scales()
        self._check_named()
        if not sorter.quantized and not self.fake:
            sorter.no_layer(self.found.where, "says quark, but no layer has a weight_scale")
        return sorter.layout()

    def _check_config(self) -> None:
        block, sorter = self.found, self.sorter
        algorithms = str(block.get("algo_config") or "").lower()
        if any(word in algorithms for word in _ROTATIONS):
            sorter.problem(
                f"{block.where}.algo_config",
                "names a rotation, which the runtime may have to apply; MLX does not",
            )
        by_type = block.get("layer_type_quant_config")
        if by_type:
            sorter.problem(
                f"{block.where}.layer_type_quant_config",
                "gives schemes by class of layer, which names of tensors do not say; "
                "layer_quant_config by name is read",
            )

    def _check_named(self) -> None:
        """Say of a layer that the config names by its path, with a scheme, that it is dense."""
        rows = () if self.fake else self.by_path.items()
        named = [path for path, declared in rows if as_table(declared).get("weight")]
        self.sorter.note_dense(f"{self.found.where}.layer_quant_config", named)

    def _scheme(self, path: str) -> _Scheme:
        """The weight's scheme: that of the patterns that fit the layer, else the global one."""
        declared, where = self.found.get("global_quant_config"), "global_quant_config"
        fits = list(self.by_layer.matching(path))
        if fits:
            declared, where = self.by_path[fits[0]], f"layer_quant_config[{fits[0]!r}]"
            if any(self.by_path[pattern] != declared for pattern in fits):
                both = f"{self.found.where}.layer_quant_config"
                raise LayerError(
                    path, f"fits patterns of {both} that contradict each other: {join_first(fits)}"
                )
        weight = as_table(declared).get("weight")
        levels = weight if isinstance(weight, list) else [weight]
        where = f"{self.found.where}.{where}.weight"
        schemes = tuple(level for level in levels if isinstance(level, Mapping))
        if not schemes or len(schemes) < len(levels):
            raise LayerError(
                path, f"is quantized, but {where} is {format_value(weight)}, expected a scheme"
            )
        return _Scheme(where, schemes)

    def _layer(self, path: str, tensors: Tensors) -> SourceLayer:
        weight = tensors["weight"]
        if len(weight.info.shape) not in (2, 3) or 0 in weight.info.shape:
            raise unexpected(weight, "a matrix or a stack of them")
        scheme = self._scheme(path)
        dtype = scheme.word("dtype")
        experts = _one_by_one(tensors, dtype)
        if experts is not None:
            return experts.stack(self._layer(path, experts.one()))
        if dtype == "mx":
            return self._old_mx(path, tensors, scheme)
        if "weight_scale" not in tensors:
            raise LayerError(weight.name, f"{weight.info} has no {path}.weight_scale next to it")
        if dtype in _INTEGERS:
            return self._integer(path, tensors, scheme, dtype)
        if dtype == "fp4":
            return self._fp4(path, tensors, scheme)
        if dtype in ("fp6_e2m3", "fp6_e3m2"):
            return self._fp6(path, tensors, dtype.removeprefix("fp6_"))
        if dtype in ("fp8_e4m3", "fp8"):
            return self._fp8(path, tensors, scheme)
        known = ", ".join((*_INTEGERS, "fp4", "fp6_e2m3", "fp6_e3m2", "fp8_e4m3", "mx"))
        message = f"has dtype {format_value(dtype)} by {scheme.where}; read are {known}"
        raise LayerError(path, message, unknown=True)

    def _integer(self, path: str, tensors: Tensors, scheme: _Scheme, dtype: str) -> SourceLayer:
        """Codes of 4 or 8 bits: ``[in, out]`` with scales for groups, ``[out, in]`` for others."""
        weight, scale = tensors["weight"], tensors["weight_scale"]
        zeros = tensors.get("weight_zero_point")
        bits, qscheme = int(dtype[-1]), scheme.word("qscheme")
        pack = str(self.export.get("pack_method", "")).lower()
        if qscheme not in _SCHEMES:
            known = join_or(_SCHEMES)
            raise LayerError(
                path, f"has qscheme {format_value(qscheme)} by {scheme.where}; read is {known}"
            )
        if bits == 4 and pack not in _PACKS:
            message = (
                f"is {format_value(pack)}, expected {join_or(_PACKS)}: the order of 4-bit codes"
            )
            raise LayerError(f"{self.found.where}.export.pack_method", message)
        signed, words = dtype.startswith("int"), _WORDS[bits]
        if weight.info.dtype not in words:
            raise unexpected(weight, f"{words[0]} for {dtype}")
        if scale.info.dtype not in KERNEL_FLOATS:
            raise unexpected(scale, "floats")
        if zeros is None and not signed:
            raise LayerError(path, f"holds {dtype} codes, but has no {path}.weight_zero_point")
        fields = {
            "bits": bits,
            "symmetric": zeros is None or scheme.levels[0].get("symmetric") is True,
            "scale_dtype": scale.info.dtype,
            "signed": signed,
            "reordered": pack == "reorder",
            "has_zeros": zeros is not None,
        }
        packing: QuarkColumns | QuarkRows
        if qscheme == "per_group":
            packing = _by_column(tensors, scheme, fields)
        else:
            packing = _by_row(tensors, qscheme, fields)
        one = isinstance(packing, QuarkRows) and packing.one_scale
        shape, scales = (packing.rows, packing.columns), f"a scale a {'tensor' if one else 'row'}"
        parts = {role: tensors[role] for role in packing.required_rects(0, packing.rows)}
        return integer_layer(self.sorter, path, parts, shape, packing, tool="quark", scales=scales)

    def _fp4(self, path: str, tensors: Tensors, scheme: _Scheme) -> SourceLayer:
        weight, scale = tensors["weight"], tensors["weight_scale"]
        *rows, nbytes = weight.info.shape
        if weight.info.dtype != "U8":
            raise unexpected(weight, "U8, two codes a byte")
        factor = tensors.get("weight_scale_2")
        if factor is not None or len(scheme.levels) > 1:
            if factor is None and len(rows) == 1:
                raise LayerError(path, f"has two levels of scales, but no {path}.weight_scale_2")
            if scale.info.shape != (*rows, nbytes // 8) or scale.info.dtype not in _E4M3:
                raise unexpected(scale, f"F8_E4M3 {[*rows, nbytes // 8]}")
            if factor is None:
                missing = "weight_scale_2 that multiplies them"
                return nvfp4_without_tensor_scale(self.sorter, path, weight, scale, missing)
            return nvfp4_layer(self.sorter, path, weight, scale, factor, divides=False)
        if scale.info.shape != (*rows, nbytes // 16) or scale.info.dtype not in EXPONENTS:
            expected = f"U8 {[*rows, nbytes // 16]}: groups of 32 with E8M0 scales"
            raise unexpected(scale, expected)
        return mx_layer(path, weight, scale, self.sorter.dtype, bits=4)

    def _fp6(self, path: str, tensors: Tensors, element: str) -> SourceLayer:
        weight, scale = tensors["weight"], tensors["weight_scale"]
        *rows, nbytes = weight.info.shape
        groups, ragged = divmod(nbytes, 24)
        if weight.info.dtype != "U8" or ragged:
            raise unexpected(weight, "U8 [out, 24 * groups]")
        if scale.info.shape != (*rows, groups) or scale.info.dtype not in EXPONENTS:
            raise unexpected(scale, f"U8 {[*rows, groups]}")
        return mx_layer(path, weight, scale, self.sorter.dtype, bits=6, element=element)

    def _fp8(self, path: str, tensors: Tensors, scheme: _Scheme) -> SourceLayer:
        weight, scale = tensors["weight"], tensors["weight_scale"]
        if weight.info.dtype not in FLOAT8:
            raise unexpected(weight, "F8_E4M3 codes")
        block = scheme.levels[0].get("block_size")
        return float8_stack(self.sorter, path, weight, scale, block=block_pair(block))

    def _old_mx(self, path: str, tensors: Tensors, scheme: _Scheme) -> SourceLayer:
        weight = tensors["weight"]
        kind = scheme.word("mx_element_dtype") or "fp4"
        rows, nbytes = weight.info.shape
        groups, ragged = divmod(nbytes, 17)
        if kind not in ("fp4", "fp4_e2m1"):
            message = f"holds mx blocks of {format_value(kind)}; read are blocks of fp4"
            raise LayerError(path, message, unknown=True)
        if weight.info.dtype != "U8" or ragged:
            raise unexpected(weight, "U8 [out, 17 * groups of 32]")
        packing, dtype = QuarkMx(rows, 32 * groups), self.sorter.dtype
        parts, stored = {"weight": weight}, "mxfp4, old blocks"
        return packed_layer(path, parts, (rows, 32 * groups), packing, dtype=dtype, stored=stored)


def _by_column(tensors: Tensors, scheme: _Scheme, fields: Mapping[str, Any]) -> QuarkColumns:
    """Codes ``[in, out]``, packed along the outputs."""
    weight, scale = tensors["weight"], tensors["weight_scale"]
    columns, width = weight.info.shape
    rows = width * _CODES_A_WORD[fields["bits"]]
    groups = scale.info.shape[0] if scale.info.shape else 0
    if not groups or scale.info.shape != (groups, rows) or columns % groups:
        raise unexpected(scale, f"[groups, {rows}] for {weight.info}, stored [in, out]")
    _expect(tensors.get("weight_zero_point"), (groups, width), _WORDS[fields["bits"]])
    group, declared = columns // groups, scheme.levels[0].get("group_size")
    if is_count(declared) and declared != group:
        message = f"{scale.info} gives {group} inputs a scale, {scheme.where} says {declared}"
        raise LayerError(scale.name, message)
    return QuarkColumns(rows, columns, group=group, **fields)


def _by_row(tensors: Tensors, qscheme: str, fields: Mapping[str, Any]) -> QuarkRows:
    """Codes ``[out, in]``, packed along the inputs."""
    scale, zeros = tensors["weight_scale"], tensors.get("weight_zero_point")
    rows, width = tensors["weight"].info.shape
    columns = width * _CODES_A_WORD[fields["bits"]]
    one = scale.info.size == 1 and qscheme == "per_tensor"
    if not one and scale.info.shape != (rows,):
        raise unexpected(scale, f"[{rows}] for {qscheme}")
    if fields["bits"] == 4 and zeros is not None:
        message = "next to 4-bit codes with a scale a row: how it is packed is not known"
        raise LayerError(zeros.name, f"{zeros.info} {message}")
    _expect(zeros, scale.info.shape, ("I8", "U8", "I32"))
    return QuarkRows(rows, columns, group=columns, one_scale=one, **fields)


def _one_by_one(tensors: Tensors, dtype: str) -> Experts | None:
    """The experts of a stack that is read expert by expert: of integers, or stored transposed."""
    weight, scale = tensors["weight"], tensors.get("weight_scale")
    if len(weight.info.shape) < 3 or dtype.startswith("fp8"):
        return None
    transposed = scale is not None and are_transposed(weight.info, scale.info)
    if dtype in _INTEGERS or dtype == "mx":
        return Experts.of(weight.info.shape[0], tensors)
    roles = ("weight", "weight_scale") if transposed else ()
    return Experts.of(weight.info.shape[0], tensors, roles) if transposed else None


def _expect(part: SourceTensor | None, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
    if part is not None and (part.info.shape != shape or part.info.dtype not in dtypes):
        raise unexpected(part, f"{dtypes[0]} {list(shape)}")
