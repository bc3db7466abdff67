"""Pipeline stage 4: the operations on a chunk that was read: copy, cast, encode, decode, repack.

Arrays in, arrays out, through kernels that release the GIL; no files. Each thread has its own
``WorkerBuffers``.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from requant.core.dtypes import HEADER_NAME, NUMPY_DTYPE
from requant.errors import InvariantError, RequantError
from requant.execution.chunks import Chunk, matrix_runs
from requant.execution.damaged_scales import ROW_SCALES, damaged_inputs, damaged_outputs
from requant.execution.hessian_cache import HessianCache
from requant.execution.input_estimates import INPUT_POWER, powers_of_matrix
from requant.execution.layer_stats import LayerStats
from requant.importance.statistics_file import Importance
from requant.kernels import cast as values
from requant.kernels import gptq
from requant.kernels import quantize as native
from requant.kernels.input_power import weighted_error
from requant.kernels.quantize import QuantizedTensors
from requant.packings.base import Packing
from requant.planning.plan import EncodeParams, Operation, Step
from requant.quantization.config import Quantization

Arrays = dict[str, np.ndarray]


class WorkerBuffers:
    """One worker's memory: an array per role, as large as its largest use so far."""

    def __init__(self, hessians: HessianCache) -> None:
        self.hessians = hessians  # shared by all workers
        self._arrays: dict[str, np.ndarray] = {}

    def take(self, role: str, dtype: str, rows: int, row_bytes: int) -> np.ndarray:
        """An uninitialized ``(rows, row_bytes / itemsize)`` array of the role's memory."""
        nbytes = rows * row_bytes
        held = self._arrays.get(role)
        if held is None or held.nbytes < nbytes:
            held = self._arrays[role] = np.empty(nbytes, np.uint8)
        return held[:nbytes].view(NUMPY_DTYPE[dtype]).reshape(rows, -1)


def make_outputs(chunk: Chunk, inputs: Arrays, buffers: WorkerBuffers) -> tuple[Arrays, LayerStats]:
    """Run a chunk's operation: outputs by role, shape ``(rows, ...)``, and their statistics.

    ``inputs`` are by role the rows as stored, of a packed layer the rectangles that it cuts.

    Raises:
        RequantError: The data contradict themselves; ``layer`` says where.
    """
    step, outputs = chunk.step, {}
    for role, out in step.outputs.items():
        if step.operation is Operation.COPY:
            outputs[role] = inputs[role]
        else:
            size = step.row_bytes(out)
            outputs[role] = buffers.take(f"out {role}", out.info.dtype, chunk.rows, size)
    damaged = damaged_inputs(chunk, inputs)
    try:
        if step.packing is None:
            stats = _UNPACKED[step.operation](chunk, inputs, outputs, buffers)
        else:
            stats = _run_packed(chunk, step.packing, inputs, outputs, buffers)
            if not damaged.damaged and _may_hide_damage(chunk, outputs, stats):
                stats.merge(damaged_outputs(chunk, inputs, outputs, buffers))
        stats.merge(damaged)
        if stats.damaged:
            stats.overflowed = 0  # no dtype holds what is not a number
        return outputs, stats
    except RequantError as error:
        if damaged.damaged:  # what else is wrong follows from it
            message = f"{damaged.damage}. Take the file from its publisher again"
            raise InvariantError(message, layer=damaged.damaged_tensor) from error
        error.layer = error.layer or step.layer
        raise


def _may_hide_damage(chunk: Chunk, outputs: Arrays, stats: LayerStats) -> bool:
    """Whether only results show damage: in scales that are bytes, or lie within blocks."""
    operation = chunk.step.operation
    in_bytes = operation is Operation.REPACK and "biases" not in outputs
    return operation is not Operation.RECODE and (in_bytes or stats.overflowed > 0)


def _copy(chunk: Chunk, inputs: Arrays, outputs: Arrays, buffers: WorkerBuffers) -> LayerStats:
    return LayerStats()


def _cast(chunk: Chunk, inputs: Arrays, outputs: Arrays, buffers: WorkerBuffers) -> LayerStats:
    return LayerStats(overflowed=values.cast_into(inputs["weight"], outputs["weight"]))


def _encode(chunk: Chunk, inputs: Arrays, outputs: Arrays, buffers: WorkerBuffers) -> LayerStats:
    step, dense, stats = chunk.step, inputs["weight"], LayerStats()
    if step.inputs["weight"].info.dtype != step.dtype:
        wanted = buffers.take("dense", step.dtype, *_dense_shape(step, dense))
        stats.overflowed = values.cast_into(dense, wanted)
        dense = wanted
    return _quantize(chunk, dense, inputs, outputs, buffers, stats=stats)


def _decode(chunk: Chunk, inputs: Arrays, outputs: Arrays, buffers: WorkerBuffers) -> LayerStats:
    step, dense, stats = chunk.step, outputs["weight"], LayerStats()
    assert step.source is not None
    _dequantize(step.source, inputs, dense, buffers)
    if step.dtype == "F16" and step.inputs["scales"].info.dtype != "F16":
        # The one dtype with a narrower range than the values had.
        stats.overflowed = values.count_nonfinite(dense)
    return stats


def _recode(chunk: Chunk, inputs: Arrays, outputs: Arrays, buffers: WorkerBuffers) -> LayerStats:
    step = chunk.step
    dense = buffers.take("dense", step.dtype, *_dense_shape(step, inputs["weight"]))
    assert step.source is not None
    _dequantize(step.source, inputs, dense, buffers)
    return _quantize(chunk, dense, inputs, outputs, buffers, stats=LayerStats())


def _dense_shape(step: Step, rows_of: np.ndarray) -> tuple[int, int]:
    return rows_of.shape[0], step.rows.columns * NUMPY_DTYPE[step.dtype].itemsize


def _dequantize(
    source: Quantization, parts: Arrays, dense: np.ndarray, buffers: WorkerBuffers
) -> None:
    tensors, row_scales = QuantizedTensors.from_roles(parts), parts.get(ROW_SCALES)
    if row_scales is None:
        native.dequantize_into(tensors, source, dense)
        return
    # MLX gives float32 here; a run of rows with one global scale is one call.
    wide = dense
    if dense.dtype != np.float32:
        wide = buffers.take("wide", "F32", dense.shape[0], 4 * dense.shape[1])
    borders = [0, *(np.flatnonzero(np.diff(row_scales)) + 1).tolist(), len(row_scales)]
    for start, stop in pairwise(borders):
        run = QuantizedTensors(tensors.words[start:stop], tensors.scales[start:stop])
        scale = float(row_scales[start])
        native.dequantize_into(run, source, wide[start:stop], global_scale=scale)
    if wide is not dense:
        values.cast_into(wide, dense)


def _quantize(
    chunk: Chunk,
    dense: np.ndarray,
    inputs: Arrays,
    outputs: Arrays,
    buffers: WorkerBuffers,
    *,
    stats: LayerStats,
) -> LayerStats:
    """Encode, and measure the quantization error while the chunk is in the cache."""
    step, params = chunk.step, chunk.step.encode
    assert params is not None, f"{step.operation} without EncodeParams"
    target = params.target
    stats.nonfinite = values.count_nonfinite(dense)
    if stats.nonfinite:
        stats.first_nonfinite_row = values.first_nonfinite_row(dense)
        return stats
    rows, scales = dense.shape[0], outputs["scales"]
    weights = partial(_error_weights, step, params, inputs)
    for first, last, matrix in matrix_runs(chunk):
        part = {role: array[first:last] for role, array in outputs.items()}
        rows_of_matrix = dense[first:last]
        if params.gptq and _quantize_gptq(params, rows_of_matrix, part, matrix, buffers.hessians):
            continue
        stats.flushed_groups += native.quantize_into(
            rows_of_matrix,
            target,
            QuantizedTensors.from_roles(part),
            search=None if params.search == "off" else params.search,
            **weights(matrix)._asdict(),
        )
    decoded = buffers.take("decoded", step.dtype, rows, dense.nbytes // rows)
    _dequantize(target, outputs, decoded, buffers)
    group_max = buffers.take("group_max", "F32", rows, 4 * scales.shape[1])
    stats.squared_error, stats.squared_values, stats.max_error_steps = values.encoding_error(
        dense, decoded, scales, target.mode.value, group_max
    )
    if params.search != "off":
        for first, last, matrix in matrix_runs(chunk):
            pair = dense[first:last], decoded[first:last]
            error, energy = weighted_error(*pair, target.group_size, *weights(matrix))
            stats.weighted_error += error
            stats.weighted_values += energy
    if params.weighted_error and params.importance is not None:
        weighted = _weighted_error(chunk, params.importance, dense, decoded)
        stats.squared_error, stats.squared_values = weighted
    return stats


class ErrorWeights(NamedTuple):
    """How the squared errors of a matrix are weighted, as ``quantize_into`` takes it."""

    weights: np.ndarray | None  # float32, one for each input; None for all alike
    by_magnitude: bool


def _error_weights(step: Step, params: EncodeParams, inputs: Arrays, matrix: int) -> ErrorWeights:
    """The weights of a matrix: statistics of its inputs, or what is estimated without them."""
    if params.search == "off":
        return ErrorWeights(None, False)
    if params.importance is not None:
        means = params.importance.weights(matrix)
        if means is not None:
            return ErrorWeights(means, False)
    powers = inputs.get(INPUT_POWER)
    if powers is None:
        return ErrorWeights(None, True)
    return ErrorWeights(powers_of_matrix(step, powers, matrix), True)


def _weighted_error(
    chunk: Chunk, importance: Importance, dense: np.ndarray, decoded: np.ndarray
) -> tuple[float, float]:
    """Squared errors and squared values of a chunk, each input weighted with its mean square."""
    error = energy = 0.0
    for first, last, matrix in matrix_runs(chunk):
        weights = importance.weights(matrix)
        wide = dense[first:last].astype(np.float32)
        weighted_error = decoded[first:last].astype(np.float32) - wide
        sums = [np.einsum("ri,ri->i", x, x, dtype=np.float64) for x in (weighted_error, wide)]
        counted = [float(x.sum() if weights is None else x @ weights) for x in sums]
        error, energy = error + counted[0], energy + counted[1]
    return error, energy


def _quantize_gptq(
    params: EncodeParams, dense: np.ndarray, outputs: Arrays, matrix: int, hessians: HessianCache
) -> bool:
    """Encode rows of one matrix by GPTQ; False where no token reached the matrix."""
    if params.importance is None:
        return False
    compensation = hessians.compensation(params.importance, matrix)
    if compensation is None:
        return False
    tensors = gptq.quantize(dense, compensation, params.target, params.search)
    for role, array in zip(("weight", "scales", "biases"), tensors, strict=True):
        outputs[role][:] = array
    return True


def _run_packed(
    chunk: Chunk, packing: Packing, inputs: Arrays, outputs: Arrays, buffers: WorkerBuffers
) -> LayerStats:
    """Repack, decode or recode the rows of a packed layer."""
    step = chunk.step
    rows = step.rows.stored_rows(chunk.start, chunk.stop)
    results = outputs
    if step.operation is Operation.RECODE:
        width = step.rows.columns * NUMPY_DTYPE[step.dtype].itemsize
        results = {"weight": buffers.take("dense", step.dtype, chunk.rows, width)}
    strided = _StridedOutput(results, step.rows.step, rows[1] - rows[0], buffers)
    if step.operation is Operation.REPACK:
        packing.repack(inputs, *rows, strided.wide, buffers)
        strided.copy_selected_rows()
        floats = [array for array in outputs.values() if array.dtype not in (np.uint32, np.uint8)]
        return LayerStats(overflowed=sum(values.count_nonfinite(array) for array in floats))
    packing.decode(inputs, *rows, strided.wide["weight"], buffers)
    strided.copy_selected_rows()
    if step.operation is Operation.DECODE:
        return LayerStats(overflowed=values.count_nonfinite(outputs["weight"]))
    return _quantize(chunk, results["weight"], inputs, outputs, buffers, stats=LayerStats())


class _StridedOutput:
    """Room for rows of which only every ``step``-th is wanted; the outputs themselves at 1.

    Example: rows 1 to 3 of a step with ``first=1, step=2`` are the stored rows 3 and 5. The
    packing decodes the stored rows 3, 4 and 5 into ``wide``; ``copy_selected_rows`` takes the first
    and third.
    """

    def __init__(self, outputs: Arrays, step: int, rows: int, buffers: WorkerBuffers) -> None:
        self.outputs, self.step = outputs, step
        self.wide = outputs
        if step > 1:
            self.wide = {
                role: buffers.take(
                    f"wide {role}", HEADER_NAME[array.dtype], rows, array.shape[1] * array.itemsize
                )
                for role, array in outputs.items()
            }

    def copy_selected_rows(self) -> None:
        """Move the rows that are wanted into the outputs."""
        if self.step > 1:
            for role, array in self.outputs.items():
                array[:] = self.wide[role][:: self.step]


_UNPACKED = {
    Operation.COPY: _copy,
    Operation.CAST: _cast,
    Operation.ENCODE: _encode,
    Operation.DECODE: _decode,
    Operation.RECODE: _recode,
}
