"""HQQ folders: integer codes with float zeros, each layer described by its own tensors.

Value: ``w = (code - zero) * scale``. Next to ``W_q``, ``scale`` and ``zero`` a layer stores its
shape, axis, width and packing as small tensors; they rule over the config.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from requant.checkpoints.checkpoint import Checkpoint
from requant.core.dtypes import FLOATS, NUMPY_DTYPE
from requant.core.reasons import Reason, ReasonCode
from requant.errors import Problem
from requant.formats.base import (
    SourceLayer,
    SourceLayout,
    Tensors,
    named_parts,
    packed_layer,
    scale_dtype,
)
from requant.formats.integer_layers import integer_layer
from requant.formats.quantization_block import (
    QuantizationBlock,
    as_table,
    claim_by_method,
    find_quantization_block,
)
from requant.formats.tensor_sorter import LayerError, TensorSorter
from requant.kernels.repack import HQQ
from requant.packings.hqq import W_Q, HqqColumns, HqqRows, element
from requant.packings.row_blocks import NEXT
from requant.text import format_value

_SUFFIX: Final = f".{W_Q}"
_CODES: Final = ("scale", "zero")
# What a layer stores about itself; "meta_" is HQQ's older prefix of scales in codes.
_DECLARED: Final = (
    *("shape", "axis", "nbits", "group_size", "packing", "compute_dtype", "unpack_view_dtype"),
    *("view_as_float", "channel_wise", "optimize", "round_zero", "quant_scale", "quant_zero"),
    *("offload_meta", "stores_quant_config", "encoded_state_dict"),
)
_IN_CODES: Final = ("scale_q", "zero_q", "meta_scale", "meta_zero")
# nbits -> packing, where a layer does not say it (hqq/core/quantize.py).
_PACKING_OF: Final[Mapping[float, str]] = {
    **dict.fromkeys((8, 7, 6, 5), "8bit_u8"),
    **{4: "4bit_u8", 3: "3bit_32", 2: "2bit_u8", 1: "1bit_u8"},
}
_MAX_SMALL_TENSOR = 64  # letters of a dtype or packing


class Hqq:
    """A folder with ``quant_method: hqq``, or with the tensors of one."""

    name = "hqq"
    layer_parts = "PATH.W_q with PATH.scale, PATH.zero and PATH.shape"

    def claims(self, checkpoint: Checkpoint) -> str | None:
        """The config names it; without one, ``W_q`` tells."""
        names = (name for name in checkpoint.tensors if name.endswith(_SUFFIX))
        return claim_by_method(checkpoint, "hqq", names)

    def read(self, checkpoint: Checkpoint) -> SourceLayout:
        sorter = TensorSorter(checkpoint)
        params = _Params(find_quantization_block(checkpoint), sorter.problems)
        paths = [n.removesuffix(_SUFFIX) for n in checkpoint.tensors if n.endswith(_SUFFIX)]
        layers = [_Layer(sorter, path, params) for path in paths]
        sorter.read_ahead((layer.declared for layer in layers), tuple(_DECLARED))
        for path, layer in zip(paths, layers, strict=True):
            sorter.make(path, layer.parts, layer.read)
            for part in layer.declared.values():
                sorter.drop(part.name, "says how W_q is stored")
        _check_loose(sorter, set(paths))
        if not paths:
            sorter.no_layer(params.where, "says quant_method hqq, but no tensor ends in .W_q")
        return sorter.layout()


def _check_loose(sorter: TensorSorter, paths: set[str]) -> None:
    """Report scales in codes, and parts of layers whose codes are missing."""
    for tensor in sorter.left:
        path, _, role = tensor.name.rpartition(".")
        if path in paths and (role in _IN_CODES or role.startswith("meta_")):
            sorter.problem(
                tensor.name,
                "holds scales or zeros as codes (quant_scale, quant_zero of old HQQ files), which "
                "are not read; save the model again with a current hqq",
            )
        elif role in ("nbits", "packing", "view_as_float") and path not in paths:
            sorter.problem(tensor.name, f"{tensor.info} has no {path}.W_q next to it")


class _Params:
    """``quant_config``: one set of parameters, or one for each kind of layer."""

    def __init__(self, found: QuantizationBlock | None, problems: list[Problem]) -> None:
        self.where = found.where if found is not None else "config.json: quantization_config"
        block = None if found is None else found.get("quant_config")
        self.block: Mapping[str, Any] = {}
        if isinstance(block, Mapping):
            self.block = block
        elif block is not None:
            message = f"is {format_value(block)}, expected an object"
            problems.append(Problem(f"{self.where}.quant_config", message))

    def of(self, path: str, key: str) -> Any:
        """A parameter of a layer; None where the config is silent."""
        names = (part for part in path.split(".") if not part.isdigit())
        tag = ".".join(name for name in names if name not in ("model", "layers"))
        block = as_table(self.block.get(tag, self.block))
        return as_table(block.get("weight_quant_params", block)).get(key)


class _Layer:
    """One layer: its tensors, and what they say."""

    def __init__(self, sorter: TensorSorter, path: str, params: _Params) -> None:
        self.sorter, self.path, self.params = sorter, path, params
        self.parts = named_parts(sorter.tensors, path, (W_Q, *_CODES))
        self.declared = named_parts(sorter.tensors, path, _DECLARED)

    def read(self, path: str, parts: Tensors) -> SourceLayer | None:
        before = len(self.sorter.problems)
        self._check_parts()
        shape, axis = self._shape(), self._axis()
        if len(self.sorter.problems) > before or shape is None:
            return None
        bits, packing = self._packing()
        group = self._group(shape, axis, packing)
        make = self._by_row if axis else self._by_column
        return make(shape, bits, group, packing)

    def _by_column(
        self, shape: tuple[int, int], bits: int, group: int, packing: str
    ) -> SourceLayer:
        """Axis 0: no mode of MLX holds its scales."""
        packed = HqqColumns(*shape, bits, group, packing, self.parts[W_Q].info.dtype)
        dtype = scale_dtype(self.parts["scale"].info.dtype, self.sorter.dtype)
        parts = self.parts | {f"{role}{NEXT}": part for role, part in self.parts.items()}
        stored = f"hqq {bits}-bit g{group} axis 0"
        reason = Reason(ReasonCode.NO_MLX_MODE, "axis 0: scales vary from input to input")
        return packed_layer(
            self.path, parts, shape, packed, dtype=dtype, stored=stored, reason=reason
        )

    def _by_row(self, shape: tuple[int, int], bits: int, group: int, packing: str) -> SourceLayer:
        """Axis 1: MLX's groups, where none spans two rows."""
        codes, scale, zero = (self.parts[role].info for role in (W_Q, *_CODES))
        packed = HqqRows(
            *shape,
            bits=bits,
            group=group,
            symmetric=False,
            scale_dtype=scale.dtype,
            packing=packing,
            packed_width=codes.shape[-1],
            zero_dtype=zero.dtype,
        )
        parts = self.parts | {f"{W_Q}{NEXT}": self.parts[W_Q]}
        scales = f"g{group}"
        return integer_layer(
            self.sorter, self.path, parts, shape, packed, tool="hqq", scales=scales
        )

    def _report(self, role: str, message: str) -> None:
        self.sorter.problems.append(self._error(role, message).problem)

    def _error(self, role: str, message: str) -> LayerError:
        return LayerError(f"{self.path}.{role}" if role else self.path, message)

    def _value(self, role: str) -> np.ndarray | None:
        """The values of a small tensor; None if the layer has none."""
        part = self.declared.get(role)
        if part is None:
            return None
        if part.info.size > _MAX_SMALL_TENSOR:
            self._report(role, f"{part.info}, expected a few numbers that say how W_q is stored")
            return None
        return self.sorter.checkpoint.read_small_tensor(part.name).reshape(-1)

    def _number(self, role: str, default: Any) -> Any:
        """One number, from its tensor or else from the config."""
        value = self._value(role)
        if value is None:
            declared = self.params.of(self.path, role)
            return default if declared is None else declared
        if value.size == 1:
            return value[0].item()
        self._report(role, f"{self.declared[role].info}, expected one number")
        return default

    def _text(self, role: str) -> str:
        value = self._value(role)
        if value is None:
            return ""
        if value.dtype.kind not in "iu":
            self._report(role, f"{self.declared[role].info}, expected letters as U8")
            return ""
        return value.astype(np.uint8).tobytes().decode("ascii", "replace")

    def _check_parts(self) -> None:
        for role in _CODES:
            part = self.parts.get(role)
            if part is None:
                self._report("", f"has packed codes, but no {self.path}.{role}")
            elif part.info.dtype not in FLOATS:
                self._report(role, f"{part.info}, expected floats")
        for role in ("quant_scale", "quant_zero"):
            if self._number(role, 0):
                self._report(role, "is true: scales or zeros in codes are not read")
        if len(self.parts[W_Q].info.shape) != 2:
            self._report(W_Q, f"{self.parts[W_Q].info}, expected two axes")

    def _shape(self) -> tuple[int, int] | None:
        value = self._value("shape")
        if value is None:
            self._report("", f"has no {self.path}.shape that says how many outputs and inputs")
        elif value.size != 2 or not (value > 0).all():
            self._report("shape", f"says {value.tolist()}, expected two counts, outputs and inputs")
        else:
            return int(value[0]), int(value[1])
        return None

    def _axis(self) -> int:
        axis = self._number("axis", 1)
        if axis not in (0, 1):
            self._report("axis", f"is {format_value(axis)}, expected 0 or 1")
        return int(axis == 1)

    def _packing(self) -> tuple[int, str]:
        """Bits of a code, and HQQ's name of the packing."""
        declared = self._number("nbits", None)
        if not isinstance(declared, int | float | None):
            raise self._error("nbits", f"is {format_value(declared)}, expected a number")
        bits = 2 if isinstance(declared, float) and round(declared, 2) == 1.58 else declared
        packing = self._text("packing") or _PACKING_OF.get(bits or 0)
        if packing not in HQQ:
            known = ", ".join(HQQ)
            where = "packing" if "packing" in self.declared else "nbits"
            found = repr(packing) if where == "packing" else repr(declared)
            raise self._error(where, f"is {found}; known packings are {known}")
        width = HQQ[packing].bits
        wide = packing == "8bit_u8"  # a byte holds narrower codes too
        # 1.58 bits are read back as 1.
        fitting = (5, 6, 7, 8) if wide else (width, 1) if packing == "2bit_u8" else (width,)
        if bits is not None and bits not in fitting:
            held = f"packing {packing!r} holds {'5 to 8' if wide else width} bits"
            raise self._error("nbits", f"is {format_value(declared)}, but {held}")
        return int(bits) if wide and bits is not None else width, packing

    def _group(self, shape: tuple[int, int], axis: int, packing: str) -> int:
        """The group that the tensors' shapes agree on."""
        codes, size = self.parts[W_Q].info, shape[0] * shape[1]
        scales = self.parts["scale"].info.size
        expected_dtype = element(packing)
        stored = NUMPY_DTYPE[codes.dtype]
        as_float = bool(self._number("view_as_float", 0))
        kind = "iu" if not as_float else "fV"
        if stored.kind not in kind or (not as_float and stored.itemsize != expected_dtype.itemsize):
            wanted = "floats (view_as_float)" if as_float else f"{expected_dtype.name} codes"
            raise self._error(W_Q, f"{codes}, expected {wanted}")
        if scales == 0 or size % scales:
            message = f"{self.parts['scale'].info} does not divide a weight of {shape}"
            raise self._error("scale", message)
        group = size // scales
        declared = self._number("group_size", None)
        if declared is not None and declared != group:
            measured = f"{scales:,} scales for {list(shape)} make groups of {group}"
            self._report("group_size", f"is {format_value(declared)}, but {measured}")
        view = (scales, group) if axis else (group, scales)
        packed = (HQQ[packing].block(view[0]), view[1] * expected_dtype.itemsize // stored.itemsize)
        if codes.shape != packed:
            expected = f"{list(packed)} for axis {axis}, packing {packing!r}, groups of {group}"
            raise self._error(W_Q, f"{codes}, expected {expected}")
        wanted_shape = (scales, 1) if axis else (1, scales)
        for role in _CODES:
            info = self.parts[role].info
            if info.shape != wanted_shape:
                expected = f"{list(wanted_shape)} for axis {axis}"
                raise self._error(role, f"{info}, expected {expected}")
        return group
