"""bitsandbytes folders: LLM.int8 rows, and nf4 and fp4 tables with or without nested absmax.

Values: ``w = code * SCB / 127``; ``w = quant_map[code] * absmax``.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from math import prod
from typing import Any, Final

from requant.checkpoints.checkpoint import Checkpoint, SourceTensor
from requant.core.dtypes import KERNEL_FLOATS, NUMPY_DTYPE
from requant.core.reasons import Reason, ReasonCode
from requant.core.strict_json import parse_json_object
from requant.formats.base import (
    SourceLayer,
    SourceLayout,
    Tensors,
    named_parts,
    packed_layer,
    scale_dtype,
)
from requant.formats.integer_layers import integer_layer, row_fields
from requant.formats.quantization_block import DTYPE_WORDS, find_quantization_block, is_count
from requant.formats.tensor_sorter import LayerError, TensorSorter, unexpected
from requant.packings.bitsandbytes import BnbInt8, BnbTable
from requant.text import format_value

_STATE: Final = ".quant_state.bitsandbytes__"
_TABLES: Final = ("nf4", "fp4")
_ROLES: Final = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
# The orders of 8-bit codes that current bitsandbytes does not load.
_ORDERS: Final = {1: "col32", 2: "col_turing", 3: "col_ampere"}
_REASON = Reason(ReasonCode.NO_MLX_MODE, "a table of 16 values, which no mode of MLX holds")


class Bitsandbytes:
    """A folder with ``quant_method: bitsandbytes``, or with the tensors of one."""

    name = "bitsandbytes"
    layer_parts = (
        "PATH.weight with PATH.SCB, or with PATH.weight.absmax, PATH.weight.quant_map and "
        "PATH.weight.quant_state.bitsandbytes__nf4 (or fp4)"
    )

    def claims(self, checkpoint: Checkpoint) -> str | None:
        """The config names it (old ones by ``load_in_4bit``); otherwise tensors decide."""
        block = find_quantization_block(checkpoint)
        if block is not None:
            loads = block.get("load_in_4bit") or block.get("load_in_8bit")
            known = block.method == "bitsandbytes" or (not block.method and loads)
            return f"{block.where}: bitsandbytes" if known else None
        names = checkpoint.tensors
        return next((name for name in names if _STATE in name or name.endswith(".SCB")), None)

    def read(self, checkpoint: Checkpoint) -> SourceLayout:
        sorter = TensorSorter(checkpoint)
        read = (_STATE, ".weight_format")
        checkpoint.read_ahead(name for name in checkpoint.tensors if any(x in name for x in read))
        for name in checkpoint.tensors:
            if name.endswith(".SCB"):
                path = name.removesuffix(".SCB")
                parts = named_parts(sorter.tensors, path, ("weight", "SCB"))
                sorter.make(path, parts, lambda path, parts: _int8_layer(sorter, path, parts))
            elif _STATE in name:
                weight = name.partition(_STATE)[0]
                path = weight.removesuffix(".weight")
                parts = named_parts(sorter.tensors, weight, _ROLES)
                if weight in sorter.tensors:
                    parts["weight"] = sorter.tensors[weight]
                sorter.drop(name, "says how the codes are stored")
                sorter.claim((part.name for part in parts.values()), path)
                sorter.make(path, parts, partial(_table, sorter, name))
        if not sorter.quantized:
            message = "says bitsandbytes, but no tensor ends in .SCB or has a quant_state"
            sorter.no_layer("config.json: quantization_config", message)
        return sorter.layout()


def _int8_layer(sorter: TensorSorter, path: str, tensors: Tensors) -> SourceLayer:
    scale, weight = tensors["SCB"], tensors.get("weight")
    order = sorter.tensors.get(f"{path}.weight_format")
    if order is not None:
        sorter.drop(order.name, "gives the order of the codes")
        if order.info.size != 1:
            raise LayerError(order.name, f"is {order.info}, expected one number")
        stored = sorter.checkpoint.read_small_tensor(order.name).item()
        if stored != 0:
            known = _ORDERS.get(stored, "unknown")
            message = f"is {[stored]} ({known}), expected 0: codes row by row"
            raise LayerError(order.name, message)
    if weight is None:
        raise LayerError(scale.name, f"has no {path}.weight next to it")
    shape = weight.info.shape
    if weight.info.dtype != "I8" or len(shape) != 2 or 0 in shape:
        message = f"{weight.info} next to {scale.name}, expected I8 [out, in]"
        raise LayerError(weight.name, message)
    if scale.info.dtype not in KERNEL_FLOATS or scale.info.size != shape[0]:
        raise unexpected(scale, f"F32 [{shape[0]}] for {weight.info}")
    packing = BnbInt8(**row_fields(shape, scale.info, scale_rows=1))
    parts = {"weight": weight, "weight_scale": scale}
    return integer_layer(sorter, path, parts, shape, packing, tool="bitsandbytes")


def _table(sorter: TensorSorter, name: str, path: str, parts: Tensors) -> SourceLayer | None:
    """The layer that the quant_state ``name`` describes."""
    before, (weight_name, _, kind) = len(sorter.problems), name.partition(_STATE)
    state, weight = _state(sorter, name), parts.get("weight")
    if weight is None:
        sorter.problem(name, f"describes {weight_name}, which is missing")
    if kind not in _TABLES:
        sorter.problem(name, f"is of type {format_value(kind)}; known are {', '.join(_TABLES)}")
    if state is None or weight is None or len(sorter.problems) > before:
        return None
    packing = _table_packing(sorter, state, weight, parts)
    dtype = scale_dtype(DTYPE_WORDS.get(str(state.get("dtype")), "F32"), sorter.dtype)
    stored = f"bitsandbytes {kind}{' with nested absmax' * bool(packing.nested_block)}"
    used = {role: parts[role] for role in packing.required_rects(0, 1) if role in parts}
    shape = tuple(state["shape"])
    return packed_layer(path, used, shape, packing, dtype=dtype, stored=stored, reason=_REASON)


def _state(sorter: TensorSorter, name: str) -> Mapping[str, Any] | None:
    """The JSON of a quant_state with a shape and whole numbers where they are due."""
    state, wrong = parse_json_object(sorter.checkpoint.read_small_tensor(name).tobytes())
    if wrong:
        sorter.problem(name, f"is not a quant_state: {wrong[0]}")
        return None
    shape = state.get("shape")
    if not isinstance(shape, list) or len(shape) < 2 or not all(map(is_count, shape)):
        expected = "expected two counts or more, [out, in]"
        sorter.problem(name, f"gives shape {format_value(shape)}, {expected}")
        return None
    if not is_count(block := state.get("blocksize")):
        sorter.problem(name, f"gives blocksize {format_value(block)}, expected a count")
        return None
    return state


def _table_packing(
    sorter: TensorSorter, state: Mapping[str, Any], weight: SourceTensor, parts: Tensors
) -> BnbTable:
    """The packing, once every tensor has the dtype and size that the state demands."""
    *leading, columns = state["shape"]
    rows, block = prod(leading), state["blocksize"]
    storage = NUMPY_DTYPE[weight.info.dtype].itemsize
    nbytes = -(-rows * columns // 2)
    if weight.info.nbytes != -(-nbytes // storage) * storage or weight.info.shape[-1:] != (1,):
        elements = -(-nbytes // storage)
        expected = f"[{elements}, 1] of {weight.info.dtype} for {state['shape']}"
        raise unexpected(weight, f"{expected}, two codes a byte")
    blocks = -(-rows * columns // block)
    offset = state.get("nested_offset")
    wanted = {"absmax": ("F32", blocks), "quant_map": ("F32", 16)}
    nested = state.get("nested_blocksize", 0)
    if offset is not None or nested != 0:
        in_float32 = isinstance(offset, int | float) and abs(offset) < 2**127
        if not is_count(nested) or not in_float32:
            raise LayerError(
                weight.name,
                f"its quant_state gives nested_blocksize {format_value(nested)} and nested_offset "
                f"{format_value(offset)}, expected two numbers",
            )
        wanted |= {
            "absmax": ("U8", blocks),
            "nested_absmax": ("F32", -(-blocks // nested)),
            "nested_quant_map": ("F32", 256),
        }
    for role, (dtype, count) in wanted.items():
        part = parts.get(role)
        if part is None:
            sorter.problem(weight.name, f"has no {weight.name}.{role}")
        elif part.info.dtype != dtype or part.info.shape != (count,):
            sorter.problem(part.name, f"{part.info}, expected {dtype} [{count}]")
    offset = float(offset or 0)
    return BnbTable(rows, columns, block, storage, nested_block=nested, nested_offset=offset)
