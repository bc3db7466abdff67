"""Pipeline stage 4: rows that go from files to files in one native call a unit.

Rows that are copied, cast or encoded as they are stored, and E4M3 bytes with scales of blocks that
are encoded, pass this way where both ends are files; others pass through arrays (``operations``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from requant.checkpoints.checkpoint import ComputedTensor, cut
from requant.core.dtypes import KERNEL_FLOATS, NUMPY_DTYPE
from requant.execution.chunks import Chunk, matrix_runs
from requant.execution.damaged_scales import damaged_parts
from requant.execution.layer_stats import LayerStats
from requant.execution.operations import byte_rows, decodes_rows, row_encoding, stats_of
from requant.execution.sink import OpenShards
from requant.execution.source_reader import RunCancelled, SourceReader
from requant.kernels import units
from requant.packings.base import Packing
from requant.planning.plan import Operation, Step


def is_direct(step: Step) -> bool:
    """Whether the rows of a step need no arrays between files.

    Scales are looked at, and rows in another order are written one by one: these do.
    """
    stored = step.inputs.get("weight")
    if stored is None or isinstance(stored, ComputedTensor) or step.rows.order is not None:
        return False
    if step.packing is not None:
        return decodes_rows(step)
    if len(step.inputs) != 1 or step.scales_of is not None or step.gptq:
        return False
    if step.operation is Operation.COPY:
        return True
    is_float = stored.info.dtype in KERNEL_FLOATS
    return is_float and step.operation in (Operation.CAST, Operation.ENCODE)


@dataclass(frozen=True, slots=True)
class DirectRows:
    """The files of a run, and the bytes of a block."""

    reader: SourceReader
    shards: OpenShards
    block_bytes: int

    def run(self, unit: Chunk, powers: np.ndarray | None = None) -> tuple[LayerStats, int, int]:
        """Read, convert and write the rows of a unit: statistics, bytes read, bytes written.

        ``powers`` are those of ``InputPowers``.

        Raises:
            CheckpointError: A source file cannot be read any more.
            OutputError: A write failed.
            RunCancelled: The run ends; the unit is not complete.
        """
        step, stored = unit.step, unit.step.inputs["weight"]
        assert not isinstance(stored, ComputedTensor)
        blocks, stats = None, LayerStats()
        row_bytes, first_row = step.row_bytes(stored), unit.start
        if step.packing is not None:
            blocks, stats = self._block_scales(unit, step.packing)
            row_bytes, first_row = step.rows.columns, step.rows.first + unit.start
        for first, last, matrix in matrix_runs(unit):
            rows = replace(unit, start=unit.start + first, stop=unit.start + last)
            span = (first_row + first) * row_bytes, (first_row + last) * row_bytes
            source = self.reader.open_ranges(stored, *span)
            try:
                if step.encode is None:
                    found = self._move(rows, source)
                else:
                    encoding = row_encoding(step, matrix, powers)
                    if blocks is None:
                        stored_rows = units.StoredRows(
                            stored.info.dtype, rows.rows, step.rows.columns
                        )
                    else:
                        stored_rows = byte_rows(step, blocks, first, last)
                    found = self._encode(rows, encoding, source, stored_rows)
            except units.Stopped:
                raise RunCancelled from None
            except units.UnitFileError as error:
                if error.is_write:
                    raise self.shards.write_error(error) from error
                self.reader.fail(list(cut(stored, *span))[error.index], error)
            if found.first_nonfinite_row is not None:
                found.first_nonfinite_row += first
            stats.merge(found)
        return (
            stats,
            unit.rows * row_bytes,
            unit.rows * sum(map(step.row_bytes, step.outputs.values())),
        )

    def _block_scales(self, unit: Chunk, packing: Packing) -> tuple[units.BlockScales, LayerStats]:
        """The scales of bytes, and those that are NaN or infinite."""
        step, rows = unit.step, unit.step.rows.stored_rows(unit.start, unit.stop)
        parts = {}
        for role, rect in packing.required_rects(*rows).items():
            tensor = step.inputs[role]
            assert not isinstance(tensor, ComputedTensor)
            if role != "weight":
                shape = rect.rows[1] - rect.rows[0], rect.columns[1] - rect.columns[0]
                parts[role] = np.empty(shape, NUMPY_DTYPE[tensor.info.dtype])
                self.reader.read_cut(tensor, rect, parts[role])
        names = {role: tensor.name for role, tensor in step.inputs.items()}
        return packing.block_scales(parts, rows[0]), damaged_parts(packing, names, parts, *rows)

    def _move(self, rows: Chunk, source: list[units.FileBytes]) -> LayerStats:
        """Copy or cast."""
        step, dtype = rows.step, rows.step.inputs["weight"].info.dtype
        (target,) = self._targets(rows)
        nbytes = sum(part.nbytes for part in source)
        if step.operation is Operation.COPY:
            units.copy_rows(
                source, target, nbytes, block_bytes=self.block_bytes, stop=self.reader.stop
            )
            return LayerStats()
        count = nbytes // NUMPY_DTYPE[dtype].itemsize
        dtypes = dtype, step.outputs["weight"].info.dtype
        overflowed = units.cast_rows(
            source, dtypes, target, count, block_bytes=self.block_bytes, stop=self.reader.stop
        )
        return LayerStats(overflowed=overflowed)

    def _encode(
        self,
        rows: Chunk,
        encoding: units.RowEncoding,
        source: list[units.FileBytes],
        stored: units.StoredRows,
    ) -> LayerStats:
        found = units.encode_rows(
            source,
            stored,
            self._targets(rows),
            encoding,
            block_bytes=self.block_bytes,
            stop=self.reader.stop,
        )
        return stats_of(found)

    def _targets(self, rows: Chunk) -> list[units.FilePlace]:
        """Where the rows begin in each output: words, scales, biases."""
        step = rows.step
        return [
            units.FilePlace(
                self.shards.fd(out.file),
                out.offset + (step.rows.output_row + rows.start) * step.row_bytes(out),
            )
            for role in ("weight", "scales", "biases")
            if (out := step.outputs.get(role)) is not None
        ]
