"""Pipeline stage 4: stored scales and zero points that are NaN or infinite.

The values behind them are NaN or infinite in any dtype, so that the source is damaged whatever
dtype was requested.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import numpy as np

from requant.core.dtypes import KERNEL_FLOATS, NUMPY_DTYPE
from requant.execution.chunks import Chunk
from requant.execution.layer_stats import LayerStats
from requant.kernels import cast as values
from requant.packings.base import Packing, Scratch
from requant.planning.plan import Step
from requant.quantization.config import QuantMode

# Roles of scales, zero points and tables; others are codes, perhaps under a float dtype.
_SCALES = re.compile(r"scale|zero|absmax|bias|divisor|offset|map$")
_FLOATS = frozenset(NUMPY_DTYPE[name] for name in (*KERNEL_FLOATS, "F64"))
_NAN_E8M0, _NAN_E4M3, _SIGNLESS = 0xFF, 0x7F, 0x7F
_SCALES_IN_BYTES = {
    NUMPY_DTYPE["F8_E4M3"]: QuantMode.NVFP4,
    NUMPY_DTYPE["F8_E8M0"]: QuantMode.MXFP8,
}

ROW_SCALES = "row scales"
"""The role of the global scale of each row (NVFP4), next to those of the inputs."""

Arrays = Mapping[str, np.ndarray]


def damaged_inputs(chunk: Chunk, inputs: Arrays) -> LayerStats:
    """Scales, biases and zero points of quantized rows that are NaN or infinite, as stored."""
    step, stats = chunk.step, LayerStats()
    if step.packing is not None:
        names = {role: part.name for role, part in step.inputs.items()}
        rows = step.rows.stored_rows(chunk.start, chunk.stop)
        return damaged_parts(step.packing, names, inputs, *rows)
    if step.global_scale is not None and not np.isfinite(inputs[ROW_SCALES]).all():
        stats.merge(_damage(1, step.global_scale.name, 0))
    for role, mode in _scales_damaged_rows(step):
        array, part, first = inputs[role], step.inputs[role], chunk.start
        if step.rows.columns == 1 and part.info.shape:  # a row is one number
            width = part.info.shape[-1]
            bad = np.flatnonzero(_is_bad(array, mode).reshape(-1))
            if bad.size:
                stats.merge(_damage(bad.size, part.name, (first + int(bad[0])) // width))
        else:
            stats.merge(_damaged_rows(_is_bad(array, mode), part.name, first))
    return stats


def damaged_parts(
    packing: Packing, names: Mapping[str, str], parts: Arrays, start: int, stop: int
) -> LayerStats:
    """Scales and zero points of rows ``start`` to ``stop`` of a packed layer: NaN or infinite ones.

    By role, ``names`` has the tensors and ``parts`` the rectangles that the rows need.
    """
    stats = LayerStats()
    for role, cut in packing.required_rects(start, stop).items():
        if _SCALES.search(role):
            stats.merge(_damaged_rows(_is_bad(parts[role], None), names[role], cut.rows[0]))
    return stats


def _scales_damaged_rows(step: Step) -> Iterator[tuple[str, QuantMode | None]]:
    """The roles of an MLX layer's scales and biases among the inputs, each with its mode."""
    if step.scales_of is not None:
        yield "weight", step.scales_of
    elif step.source is not None:
        for role in ("scales", "biases"):
            if role in step.inputs:
                yield role, step.source.mode


def damaged_outputs(chunk: Chunk, inputs: Arrays, outputs: Arrays, scratch: Scratch) -> LayerStats:
    """Damage of a packed layer that its results show: in scales that are bytes, or in blocks."""
    step, packing = chunk.step, chunk.step.packing
    assert packing is not None
    first, last = step.rows.stored_rows(chunk.start, chunk.stop)
    if step.target is not None and step.target.mode is not QuantMode.AFFINE:
        bad = _is_bad(outputs["scales"], step.target.mode)
        return _damaged_rows(bad, step.outputs["scales"].name, first, step.rows.step)
    name = next(iter(step.inputs.values())).name
    wide = np.empty((last - first, packing.columns), np.float32)
    packing.decode(inputs, first, last, wide, scratch)
    bad = ~np.isfinite(wide[:: step.rows.step])
    return _damaged_rows(bad, name, first, step.rows.step, "values")


def _damaged_rows(
    bad: np.ndarray, name: str, first: int, step: int = 1, what: str = "scales"
) -> LayerStats:
    """The damage of rows ``first``, ``first + step``, ... of a tensor."""
    rows = np.flatnonzero(bad.any(axis=1))
    if not rows.size:
        return LayerStats()
    return _damage(int(bad.sum()), name, first + int(rows[0]) * step, what)


def _is_bad(array: np.ndarray, mode: QuantMode | None) -> np.ndarray:
    """Which numbers are NaN or infinite; bytes are scales of the mode, if any."""
    mode = _SCALES_IN_BYTES.get(array.dtype, mode)
    if array.dtype in _FLOATS:
        if array.dtype != np.float64 and not values.count_nonfinite(array):
            return np.zeros(array.shape, np.bool_)
        return np.asarray(~np.isfinite(array))
    if mode is None or array.dtype.itemsize > 1:
        return np.zeros(array.shape, np.bool_)
    stored = array.view(np.uint8)
    if mode is QuantMode.NVFP4:
        return np.asarray((stored & _SIGNLESS) == _NAN_E4M3)
    return np.asarray(stored == _NAN_E8M0)


def _damage(number: int, tensor: str, row: int, what: str = "scales") -> LayerStats:
    return LayerStats(damaged=number, damaged_tensor=tensor, damaged_what=what, damaged_row=row)
