"""Pipeline stage 4: the operations on a chunk that was read: copy, cast, encode, decode, repack.

Arrays in, arrays out, through kernels that release the GIL; no files. Each thread has its own
``WorkerBuffers``.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np

from requant.core.dtypes import HEADER_NAME, KERNEL_FLOATS, NUMPY_DTYPE
from requant.errors import InvariantError, RequantError
from requant.execution.chunks import Chunk, matrix_runs
from requant.execution.damaged_scales import ROW_SCALES, damaged_inputs, damaged_outputs
from requant.execution.hessian_cache import HessianCache
from requant.execution.input_estimates import INPUT_POWER, powers_of_matrix
from requant.execution.layer_stats import LayerStats
from requant.kernels import cast as values
from requant.kernels import gptq, units
from requant.kernels import quantize as native
from requant.kernels.quantize import QuantizedTensors
from requant.packings.base import Packing
from requant.packings.exported import Written
from requant.planning.plan import EncodeParams, Operation, Step
from requant.quantization.config import Quantization

Arrays = dict[str, np.ndarray]
_MEASURED = 16  # of so many rows one is measured for rounding errors


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
    if operation is Operation.EXPORT:  # integers, of inputs that were looked at
        return False
    in_bytes = operation is Operation.REPACK and "biases" not in outputs
    return operation is not Operation.RECODE and (in_bytes or stats.overflowed > 0)


def _copy(chunk: Chunk, inputs: Arrays, outputs: Arrays, buffers: WorkerBuffers) -> LayerStats:
    return LayerStats()


def _cast(chunk: Chunk, inputs: Arrays, outputs: Arrays, buffers: WorkerBuffers) -> LayerStats:
    return LayerStats(overflowed=values.cast_into(inputs["weight"], outputs["weight"]))


def _encode(chunk: Chunk, inputs: Arrays, outputs: Arrays, buffers: WorkerBuffers) -> LayerStats:
    step, dense, stats = chunk.step, inputs["weight"], LayerStats()
    if step.inputs["weight"].info.dtype not in KERNEL_FLOATS:
        wanted = buffers.take("dense", step.dtype, *_dense_shape(step, dense))
        stats.overflowed = values.cast_into(dense, wanted)
        dense = wanted
    powers = inputs.get(INPUT_POWER)
    stats.merge(encode_rows(chunk, dense, outputs, buffers.hessians, powers=powers))
    return stats


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
    powers = inputs.get(INPUT_POWER)
    return encode_rows(chunk, dense, outputs, buffers.hessians, powers=powers)


def _dense_shape(step: Step, rows_of: np.ndarray) -> tuple[int, int]:
    return rows_of.shape[0], step.rows.columns * NUMPY_DTYPE[step.dtype].itemsize


def _dequantize(
    source: Quantization, parts: Arrays, dense: np.ndarray, buffers: WorkerBuffers
) -> None:
    tensors, row_scales = QuantizedTensors.from_roles(parts), parts.get(ROW_SCALES)
    if row_scales is None:
        native.decode_into(tensors, source, dense)
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


def encode_rows(
    chunk: Chunk,
    dense: np.ndarray,
    outputs: Arrays,
    hessians: HessianCache,
    *,
    blocks: units.BlockScales | None = None,
    powers: np.ndarray | None = None,
) -> LayerStats:
    """Encode, and measure the quantization error while the values are in the cache.

    With ``blocks`` the rows are E4M3 bytes. ``powers`` are those of ``InputPowers``.
    """
    step, params, stats = chunk.step, chunk.step.encode, LayerStats()
    assert params is not None, f"{step.operation} without EncodeParams"
    for first, last, matrix in matrix_runs(chunk):
        part = {role: array[first:last] for role, array in outputs.items()}
        rows = dense[first:last]
        is_encoded = (
            params.gptq
            and not values.count_nonfinite(rows)
            and _quantize_gptq(params, rows, part, matrix, hessians)
        )
        if blocks is None:
            stored = units.StoredRows(HEADER_NAME[rows.dtype], *rows.shape)
        else:
            stored = stored_rows(step, last - first, moved_blocks(blocks, first))
        encoding, targets = row_encoding(step, matrix, powers), QuantizedTensors.from_roles(part)
        given = [array for array in targets if array is not None]
        found = stats_of(units.encode_rows(rows, stored, given, encoding, is_encoded=is_encoded))
        if found.first_nonfinite_row is not None:
            found.first_nonfinite_row += first
        stats.merge(found)
    return stats


def decodes_rows(step: Step) -> bool:
    """Whether a packed layer's rows are bytes that one native call decodes, and perhaps encodes."""
    return (
        step.operation in (Operation.RECODE, Operation.DECODE)
        and step.packing is not None
        and step.packing.has_byte_rows
        and step.rows.step == 1
        and not step.gptq
    )


def moved_blocks(blocks: units.BlockScales, rows: int) -> units.BlockScales:
    """The scales of rows that begin so many rows further on."""
    return blocks._replace(first_row=blocks.first_row + rows)


def stored_rows(step: Step, rows: int, blocks: units.BlockScales | None) -> units.StoredRows:
    """How rows of a step's inputs are stored; ``blocks`` are the scales of E4M3 bytes."""
    dtype, columns = step.inputs["weight"].info.dtype, step.rows.columns
    if blocks is not None:
        dtype = "F8_E4M3FNUZ" if dtype == "F8_E4M3FNUZ" else "F8_E4M3"  # plain bytes are E4M3
        return units.StoredRows(dtype, rows, columns, blocks)
    if step.packing is not None:
        return units.StoredRows("", rows, columns, step.packing.row_form)
    if step.source is None:
        return units.StoredRows(dtype, rows, columns)
    has_biases = step.source.mode.has_biases
    dtypes = [step.inputs[role].info.dtype for role in ("scales", "biases") if has_biases]
    return units.StoredRows("", rows, columns, units.MlxCodes(step.source, *dtypes))


def row_encoding(step: Step, matrix: int, powers: np.ndarray | None = None) -> units.RowEncoding:
    """How rows of one matrix of a stack are encoded.

    Errors are weighted with statistics of the inputs; without them, with the magnitude of each
    value and with ``powers``, those of ``InputPowers``, if there are any.
    """
    params = step.encode
    assert params is not None
    importance = params.importance
    encoding = units.RowEncoding(params.target, step.dtype)
    if params.search == "off":
        return encoding
    means = None if importance is None else importance.weights(matrix)
    weights = means
    if means is None and powers is not None:
        weights = powers_of_matrix(step, powers, matrix)
    by_magnitude = means is None
    return replace(encoding, search=params.search, weights=weights, by_magnitude=by_magnitude)


def stats_of(found: units.Found) -> LayerStats:
    """The statistics of rows that were encoded."""
    row = found.first_nonfinite_row
    return LayerStats(
        nonfinite=found.nonfinite,
        first_nonfinite_row=None if row < 0 else row,
        overflowed=found.overflowed,
        flushed_groups=found.flushed_groups,
        squared_error=found.squared_error,
        squared_values=found.squared_values,
        max_error_steps=found.max_error_steps,
        weighted_error=found.weighted_error,
        weighted_values=found.weighted_values,
    )


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
    if step.operation is Operation.EXPORT:
        packing.repack(inputs, *rows, outputs, buffers)
        error = packing.error(inputs, *rows, buffers) if isinstance(packing, Written) else None
        return LayerStats() if error is None else LayerStats(**error._asdict())
    if step.operation is Operation.RECODE and decodes_rows(step):
        stored = inputs["weight"].view(np.uint8)
        blocks = packing.block_scales(inputs, rows[0])
        return encode_rows(
            chunk,
            stored,
            outputs,
            buffers.hessians,
            blocks=blocks,
            powers=inputs.get(INPUT_POWER),
        )
    if step.operation is Operation.RECODE:
        width = step.rows.columns * NUMPY_DTYPE[step.dtype].itemsize
        results = {"weight": buffers.take("dense", step.dtype, chunk.rows, width)}
    strided = _StridedOutput(results, step.rows.step, rows[1] - rows[0], buffers)
    if step.operation is Operation.REPACK:
        packing.repack(inputs, *rows, strided.wide, buffers)
        strided.copy_selected_rows()
        floats = [array for array in outputs.values() if array.dtype not in (np.uint32, np.uint8)]
        stats = LayerStats(overflowed=sum(values.count_nonfinite(array) for array in floats))
        if step.measures_rounding and not stats.overflowed:
            stats.merge(_rounding_error(chunk, packing, inputs, outputs, buffers))
        return stats
    packing.decode(inputs, *rows, strided.wide["weight"], buffers)
    strided.copy_selected_rows()
    if step.operation is Operation.DECODE:
        return LayerStats(overflowed=values.count_nonfinite(outputs["weight"]))
    powers = inputs.get(INPUT_POWER)
    return encode_rows(chunk, results["weight"], outputs, buffers.hessians, powers=powers)


def _rounding_error(
    chunk: Chunk, packing: Packing, inputs: Arrays, outputs: Arrays, buffers: WorkerBuffers
) -> LayerStats:
    """The squared error that rounded scales and biases make, in every 16th row of the step."""
    step, stats = chunk.step, LayerStats()
    assert step.repack is not None
    exact = {}
    for role, array in outputs.items():
        dtype, width = HEADER_NAME[array.dtype], array.shape[1] * array.itemsize
        if role in ("scales", "biases"):
            dtype, width = "F32", 4 * array.shape[1]
        exact[role] = buffers.take(f"exact {role}", dtype, chunk.rows, width)
    rows = step.rows.stored_rows(chunk.start, chunk.stop)
    strided = _StridedOutput(exact, step.rows.step, rows[1] - rows[0], buffers)
    packing.repack(inputs, *rows, strided.wide, buffers)
    strided.copy_selected_rows()
    measured = slice(-chunk.start % _MEASURED, None, _MEASURED)
    count = len(range(*measured.indices(chunk.rows)))
    if not count:
        return stats
    decoded = []
    for tensors in (outputs, exact):
        found = np.empty((count, step.rows.columns), np.float32)
        parts = {role: np.ascontiguousarray(x[measured]) for role, x in tensors.items()}
        native.decode_into(QuantizedTensors.from_roles(parts), step.repack, found)
        decoded.append(found)
    decoded[0] -= decoded[1]
    sums = [float(np.einsum("ij,ij->", x, x, dtype=np.float64)) for x in decoded]
    stats.squared_error, stats.squared_values = sums
    return stats


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
