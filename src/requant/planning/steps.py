"""Turn the decision about a layer into steps: which operation, on which rows, into which tensors.

Pure: it counts rows and bytes from shapes and dtypes, and decides nothing about layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from math import lcm, prod
from types import MappingProxyType

from requant.checkpoints.checkpoint import ComputedTensor, SourceTensor
from requant.core.dtypes import FLOATS, TensorInfo, shared_info
from requant.formats import SourceLayer, SourceLayout
from requant.formats.base import RowOrder, RowRange
from requant.formats.widening import stored_rows, widened
from requant.layouts.relayout import Relayout
from requant.packings.base import EXACT, Exactness, Fidelity, Packing, rounded
from requant.planning.plan import EncodeParams, Operation, OutputTensor, RowMapping, RowsOf, Step
from requant.planning.target_selection import LayerDecision
from requant.quantization.config import Quantization, QuantMode
from requant.quantization.options import ConvertOptions
from requant.quantization.roles import rows_are_tokens


def layer_steps(
    layer: SourceLayer, target: Quantization | None, dtype: str, options: ConvertOptions
) -> Iterator[Step]:
    """The steps of one layer; its values have the ``dtype`` when they are stored or quantized."""
    if layer.packing is not None:
        yield from _packed_steps(layer, layer.packing, target, dtype, options)
    elif layer.encoding is None and target is None:
        yield _copy_or_cast_step(layer.path, layer.parts["weight"], dtype, layer.row_order)
    elif layer.encoding == target:
        assert target is not None
        for role, part in layer.parts.items():
            floats = part.info.dtype in FLOATS and role != "global_scale"
            step = _copy_or_cast_step(
                layer.path, part, options.dtype or part.info.dtype if floats else None
            )
            yield step if role == "weight" else replace(step, scales_of=target.mode)
    elif layer.keeps_codes(target):
        yield from _packed_steps(layer, stored_rows(layer), target, dtype, options)
    else:
        yield _coding_step(layer, target, dtype, options)


def _encode_params(
    layer: SourceLayer, target: Quantization, columns: int, options: ConvertOptions
) -> EncodeParams:
    """How rows of a layer are encoded; those that were cut at group borders have no columns."""
    estimate = None
    if options.search != "off" and len(layer.shape) > 1 and columns == layer.shape[-1]:
        estimate = RowsOf.TOKENS if rows_are_tokens(layer.path) else RowsOf.FEATURES
    return _shared_params(target, options.search, estimate)


@lru_cache(maxsize=1 << 12)
def _shared_params(target: Quantization, search: str, estimate: RowsOf | None) -> EncodeParams:
    return EncodeParams(target=target, search=search, estimate=estimate)


def values_step(step: Step) -> Step:
    """The step that makes the values which ``step`` encodes, row by row, and stores nothing."""
    shape = (step.rows.count, step.rows.columns)
    output = OutputTensor(f"{step.layer}.weight", TensorInfo(step.dtype, shape))
    return replace(step, operation=values_operation(step), outputs={"weight": output}, encode=None)


def values_operation(step: Step) -> Operation:
    """The operation that makes the values which ``step`` encodes, or stores."""
    if step.operation is Operation.RECODE:
        return Operation.DECODE
    if step.operation is Operation.ENCODE:
        is_same = step.inputs["weight"].info.dtype == step.dtype
        return Operation.COPY if is_same else Operation.CAST
    return step.operation


def _coding_step(
    layer: SourceLayer, target: Quantization | None, dtype: str, options: ConvertOptions
) -> Step:
    encoding = layer.encoding
    operation = Operation.ENCODE
    if encoding is not None:
        operation = Operation.DECODE if target is None else Operation.RECODE
    outputs = output_tensor_infos(layer.shape, dtype, target)
    units = [q.group_size for q in (encoding, target) if q is not None]
    unit = lcm(*units) if layer.row_order is None else layer.shape[-1]
    rows, columns = _row_view(layer.shape, unit)
    return Step(
        layer=layer.path,
        operation=operation,
        rows=RowMapping(count=rows, columns=columns, order=layer.row_order),
        inputs={role: part for role, part in layer.parts.items() if role != "global_scale"},
        outputs={
            role: OutputTensor(f"{layer.path}.{role}", info) for role, info in outputs.items()
        },
        source=encoding,
        encode=None if target is None else _encode_params(layer, target, columns, options),
        dtype=dtype,
        global_scale=layer.parts.get("global_scale"),
    )


def _packed_steps(
    layer: SourceLayer,
    packing: Packing,
    target: Quantization | None,
    dtype: str,
    options: ConvertOptions,
) -> Iterator[Step]:
    """Steps that move codes where they are kept, else decode, and encode again where requested.

    A layer under another layout than the source's takes one step for each run of rows. Where its
    members are stored in different ways, the codes of some may be kept and those of others not.
    """
    outputs = output_tensor_infos(layer.shape, dtype, target)
    if layer.packing is None and options.dtype is None:  # of MLX's own: each keeps its dtype
        own = {role: part.info.dtype for role, part in layer.parts.items() if role != "weight"}
        outputs = {**outputs, **{r: TensorInfo(x, outputs[r].shape) for r, x in own.items()}}
    names = {"weight": layer.dense_name} if target is None else {}
    encode = None if target is None else _encode_params(layer, target, packing.columns, options)
    output_row = 0
    whole = layer if layer.packing is packing else replace(layer, packing=packing)
    for run in layer.row_ranges or (RowRange(whole, 0, packing.rows),):
        operation, rows_packing = _operation_on(layer, run, target)
        yield Step(
            layer=layer.path,
            operation=operation,
            rows=_row_mapping(run, packing.columns, output_row),
            inputs=run.layer.parts,
            outputs={
                role: OutputTensor(names.get(role, f"{layer.path}.{role}"), x)
                for role, x in outputs.items()
            },
            encode=encode if operation is Operation.RECODE else None,
            repack=target if operation is Operation.REPACK else None,
            dtype=dtype,
            packing=rows_packing,
        )
        output_row += run.count
    if layer.keeps_codes(target):
        for role, tensor in layer.rotation_tensors.items():
            yield _copy_or_cast_step(layer.path, tensor, None, name=f"{layer.path}.{role}")
        if layer.global_scale:
            yield from _global_scale_steps(layer)


def _operation_on(
    layer: SourceLayer, run: RowRange, target: Quantization | None
) -> tuple[Operation, Packing]:
    """The operation on a run of a layer's rows, and the packing that reads them."""
    packing, encoding = run.layer.packing, run.layer.encoding
    assert packing is not None
    if target is None:
        return Operation.DECODE, packing
    # Codes of a rotated weight and values of a plain one never share a layer.
    alone = not layer.rotation_tensors and run.layer.keeps_codes(target)
    if encoding is None or not (alone or layer.keeps_codes(target)):
        return Operation.RECODE, packing
    return Operation.REPACK, widened(packing, encoding, target)


def _row_mapping(run: RowRange, columns: int, output_row: int) -> RowMapping:
    mapping = _shared_mapping(run.count, columns, run.start, run.step, output_row)
    order = run.layer.row_order
    return mapping if order is None else replace(mapping, order=order)


@lru_cache(maxsize=1 << 14)
def _shared_mapping(count: int, columns: int, first: int, step: int, output_row: int) -> RowMapping:
    return RowMapping(count=count, columns=columns, first=first, step=step, output_row=output_row)


def with_global_scale(decisions: Iterable[LayerDecision]) -> frozenset[str]:
    """Paths of the layers whose output has a ``global_scale``."""
    return frozenset(
        x.layer.path
        for x in decisions
        if x.target is not None
        and x.layer.encoding == x.target
        and (x.layer.global_scale or "global_scale" in x.layer.parts)
    )


def _global_scale_steps(layer: SourceLayer) -> Iterator[Step]:
    """The tensor scales of an nvfp4 stack, one float32 a matrix."""
    count = sum(run.count for run in layer.global_scale)
    output = OutputTensor(f"{layer.path}.global_scale", TensorInfo("F32", (count,)))
    output_row = 0
    for run in layer.global_scale:
        yield Step(
            layer=layer.path,
            operation=Operation.DECODE,
            rows=RowMapping(count=run.count, columns=1, first=run.start, output_row=output_row),
            inputs=run.layer.parts,
            outputs={"weight": output},
            dtype="F32",
            packing=run.layer.packing,
        )
        output_row += run.count


def intermediate_steps(
    layout: SourceLayout, relayout: Relayout | None, options: ConvertOptions
) -> dict[str, Step]:
    """The steps that decode the inputs of computed tensors; name of an input -> step."""
    if relayout is None:
        return {}
    parts = (part for layer in layout.layers for part in layer.parts.values())
    names = dict.fromkeys(x for p in parts if isinstance(p, ComputedTensor) for x in p.inputs)
    return {name: _intermediate_step(relayout.source_layers[name], options) for name in names}


def _intermediate_step(layer: SourceLayer, options: ConvertOptions) -> Step:
    if layer.packing is not None:
        return next(_packed_steps(layer, layer.packing, None, layer.dtype, options))
    if layer.encoding is not None:
        return _coding_step(layer, None, layer.dtype, options)
    return _copy_or_cast_step(layer.path, layer.parts["weight"], None)


@lru_cache(maxsize=1 << 12)
def output_tensor_infos(
    shape: tuple[int, ...], dtype: str, quantization: Quantization | None
) -> Mapping[str, TensorInfo]:
    """Shapes and dtypes of a layer's tensors in the output, by role.

    Args:
        shape: ``(..., out_features, in_features)``.
        dtype: Header name of the dense values; affine scales and biases take it.
        quantization: The target, whose group size divides ``in_features``; None for dense.
    """
    if quantization is None:
        return MappingProxyType({"weight": shared_info(dtype, shape)})
    *leading, n_in = shape
    groups = (*leading, n_in // quantization.group_size)
    infos = {"weight": shared_info("U32", (*leading, n_in * quantization.bits // 32))}
    if quantization.mode is QuantMode.AFFINE:
        scales = shared_info(dtype, groups)
        return MappingProxyType(infos | {"scales": scales, "biases": scales})
    return MappingProxyType(infos | {"scales": shared_info("U8", groups)})


def _copy_or_cast_step(
    layer: str, part: SourceTensor, dtype: str | None, order: RowOrder | None = None, name: str = ""
) -> Step:
    """Copy or cast one tensor, value by value, or row by row into another order."""
    dtype = dtype or part.info.dtype
    output = OutputTensor(name or part.name, TensorInfo(dtype, part.info.shape))
    operation = Operation.COPY if dtype == part.info.dtype else Operation.CAST
    rows = part.info.size if order is None else order.rows.size
    columns = 1 if order is None else part.info.size // rows
    return Step(
        layer=layer,
        operation=operation,
        rows=RowMapping(count=rows, columns=columns, order=order),
        inputs={"weight": part},
        outputs={"weight": output},
        dtype=dtype,
    )


def copy_step(layer: str, part: SourceTensor, output: OutputTensor) -> Step:
    """Copy the bytes of a tensor into one of equal size, perhaps of another dtype and name."""
    return replace(_copy_or_cast_step(layer, part, None), outputs={"weight": output})


# A row longer than this is cut at group borders: memory must not grow with a tensor's width.
_LONGEST_ROW = 1 << 20


def _row_view(shape: tuple[int, ...], unit: int) -> tuple[int, int]:
    """Rows and columns that chunks are cut by; groups never span two rows.

    Example: ``(2, 4, 64)`` is 8 rows of 64 values. ``(4, 1 << 21)`` with groups of 64 is 1 << 17
    rows of 64 values: the same bytes, but a worker may hold less than a whole row of the tensor.
    """
    columns = shape[-1]
    if columns > _LONGEST_ROW and columns % unit == 0:
        columns = unit
    return prod(shape) // columns if columns else 0, columns


_WIDENS = {("F16", "F32"), ("BF16", "F32"), ("F16", "F64"), ("BF16", "F64"), ("F32", "F64")}


def fidelity(step: Step) -> Fidelity:
    """How the values of a step's result compare with the source's."""
    if step.operation in (Operation.ENCODE, Operation.RECODE):
        return Fidelity(Exactness.REENCODED)
    if step.operation is Operation.COPY:
        return Fidelity(Exactness.EXACT)
    if step.operation is Operation.REPACK and step.packing is not None:
        return step.packing.fidelity(step.dtype)
    if step.operation is Operation.DECODE and step.packing is not None:
        return step.packing.decoded_fidelity(step.dtype)
    if step.operation is Operation.CAST:
        pair = (step.inputs["weight"].info.dtype, step.dtype)
        what = "values" if step.scales_of is None else "scales and biases"
        return EXACT if pair in _WIDENS else rounded(what, step.dtype)
    return rounded("values", step.dtype)
