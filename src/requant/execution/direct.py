"""Pipeline stage 4: rows that go from files to files in one native call a unit.

Rows that are copied, cast or encoded as they are stored pass this way where both ends are files;
others pass through arrays (``operations``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from requant.checkpoints.checkpoint import ComputedTensor, cut
from requant.core.dtypes import KERNEL_FLOATS, NUMPY_DTYPE
from requant.execution.chunks import Chunk, matrix_runs
from requant.execution.layer_stats import LayerStats
from requant.execution.operations import row_encoding, stats_of
from requant.execution.sink import OpenShards
from requant.execution.source_reader import SourceReader
from requant.kernels import units
from requant.planning.plan import Operation, Step


def is_direct(step: Step) -> bool:
    """Whether the rows of a step need no arrays between files.

    Scales are looked at, and rows in another order are written one by one: these do.
    """
    if step.packing is not None or step.rows.order is not None or step.scales_of is not None:
        return False
    stored = step.inputs.get("weight")
    if len(step.inputs) != 1 or stored is None or isinstance(stored, ComputedTensor):
        return False
    if step.operation is Operation.COPY:
        return True
    is_float = stored.info.dtype in KERNEL_FLOATS
    return is_float and (
        step.operation is Operation.CAST or (step.operation is Operation.ENCODE and not step.gptq)
    )


@dataclass(frozen=True, slots=True)
class DirectRows:
    """The files of a run, and the bytes of a block."""

    reader: SourceReader
    shards: OpenShards
    block_bytes: int

    def run(self, unit: Chunk) -> tuple[LayerStats, int, int]:
        """Read, convert and write the rows of a unit: statistics, bytes read, bytes written.

        Raises:
            CheckpointError: A source file cannot be read any more.
            OutputError: A write failed.
        """
        step, stats = unit.step, LayerStats()
        for first, last, matrix in matrix_runs(unit):
            found = self._run_rows(
                replace(unit, start=unit.start + first, stop=unit.start + last), matrix
            )
            if found.first_nonfinite_row is not None:
                found.first_nonfinite_row += first
            stats.merge(found)
        read = unit.rows * step.row_bytes(step.inputs["weight"])
        return stats, read, unit.rows * sum(map(step.row_bytes, step.outputs.values()))

    def _run_rows(self, rows: Chunk, matrix: int) -> LayerStats:
        step, stored = rows.step, rows.step.inputs["weight"]
        assert not isinstance(stored, ComputedTensor)
        row_bytes = step.row_bytes(stored)
        span = rows.start * row_bytes, rows.stop * row_bytes
        source = self.reader.open_ranges(stored, *span)
        try:
            return self._convert(rows, matrix, source, stored.info.dtype)
        except units.UnitFileError as error:
            if error.is_write:
                raise self.shards.write_error(error) from error
            self.reader.fail(list(cut(stored, *span))[error.index], error)

    def _convert(
        self, rows: Chunk, matrix: int, source: list[units.FileBytes], dtype: str
    ) -> LayerStats:
        step, block_bytes = rows.step, self.block_bytes
        targets = [
            units.FilePlace(
                self.shards.fd(out.file),
                out.offset + (step.rows.output_row + rows.start) * step.row_bytes(out),
            )
            for role in ("weight", "scales", "biases")
            if (out := step.outputs.get(role)) is not None
        ]
        if step.operation is Operation.ENCODE:
            stored, encoding = (dtype, rows.rows, step.rows.columns), row_encoding(step, matrix)
            return stats_of(
                units.encode_rows(source, stored, targets, encoding, block_bytes=block_bytes)
            )
        (target,) = targets
        nbytes = sum(part.nbytes for part in source)
        if step.operation is Operation.COPY:
            units.copy_rows(source, target, nbytes, block_bytes)
            return LayerStats()
        count = nbytes // NUMPY_DTYPE[dtype].itemsize
        dtypes = dtype, step.outputs["weight"].info.dtype
        return LayerStats(
            overflowed=units.cast_rows(source, dtypes, target, count, block_bytes=block_bytes)
        )
