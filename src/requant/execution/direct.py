"""Pipeline stage 4: rows that go from files to files in one native call a unit.

Rows that are copied, cast, encoded or decoded as they are stored (floats, E4M3 bytes with scales
of blocks, MLX's codes, GGUF's blocks), and integer codes that are moved into MLX's order, pass this
way where both ends are files; others pass through arrays (``operations``). So do the rows of a unit
in which a native call finds something wrong with scales or zero points: ``operations`` says what.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np

from requant.checkpoints.byte_ranges import FileRange
from requant.checkpoints.checkpoint import ComputedTensor, SourceTensor, cut
from requant.core.dtypes import KERNEL_FLOATS, NUMPY_DTYPE
from requant.execution.chunks import Chunk, matrix_runs
from requant.execution.damaged_scales import damaged_parts
from requant.execution.layer_stats import LayerStats
from requant.execution.operations import (
    decodes_rows,
    moved_blocks,
    row_encoding,
    stats_of,
    stored_rows,
)
from requant.execution.resources import ResourceLimits
from requant.execution.sink import OpenShards
from requant.execution.source_reader import RunCancelled, SourceReader
from requant.kernels import unit_repack, units
from requant.kernels.unit_repack import StoredCodes, StoredRect
from requant.packings.base import Packing, Rect, Scratch
from requant.planning.plan import Operation, Step

_CODES = ("weight", "scales", "biases")  # roles of words, scales and biases
Result = tuple[LayerStats, int, int]
"""Statistics, bytes read, bytes written."""


def is_direct(step: Step) -> bool:
    """Whether the rows of a step need no arrays between files."""
    if step.rows.order is not None or step.gptq or step.global_scale is not None:
        return False
    if any(isinstance(tensor, ComputedTensor) for tensor in step.inputs.values()):
        return False
    if step.packing is not None:
        return _is_direct_packing(step, step.packing)
    if step.source is not None:
        return step.operation in (Operation.DECODE, Operation.RECODE)
    if len(step.inputs) != 1 or step.scales_of is not None or "weight" not in step.inputs:
        return False
    if step.operation is Operation.COPY:
        return True
    is_float = step.inputs["weight"].info.dtype in KERNEL_FLOATS
    return is_float and step.operation in (Operation.CAST, Operation.ENCODE)


def _is_direct_packing(step: Step, packing: Packing) -> bool:
    if step.rows.step > 1 or not step.rows.count or not packing.matrix_rows:
        return False
    if step.operation is Operation.REPACK:
        codes = packing.stored_codes(0, packing.matrix_rows)
        if codes is None or step.outputs["scales"].info.dtype not in ("U8", *KERNEL_FLOATS):
            return False
        floats = codes.float_roles if isinstance(codes, StoredCodes) else ()
        return all(step.inputs[role].info.dtype in KERNEL_FLOATS for role in floats)
    if step.operation not in (Operation.DECODE, Operation.RECODE):
        return False
    return decodes_rows(step) or packing.row_form is not None


@dataclass(frozen=True, slots=True)
class DirectRows:
    """The files of a run, and what its workers may hold."""

    reader: SourceReader
    shards: OpenShards
    limits: ResourceLimits

    def run(self, unit: Chunk, scratch: Scratch, powers: np.ndarray | None = None) -> Result | None:
        """Read, convert and write the rows of a unit; ``powers`` are those of ``InputPowers``.

        Returns:
            None where scales, zero points or values are not finite or not as they should be, and
            only arrays show which: what was written is to be written again.

        Raises:
            CheckpointError: A source file cannot be read any more.
            OutputError: A write failed.
            RunCancelled: The run ends; the unit is not complete.
        """
        step, read = unit.step, 0
        found: LayerStats | None
        if step.operation is Operation.REPACK:
            return self._repack(unit, scratch)
        blocks, stats = self._block_scales(unit)
        for first, last, matrix in matrix_runs(unit):
            rows = replace(unit, start=unit.start + first, stop=unit.start + last)
            opened = _Opened(self.reader, self.shards)
            source = self._open(rows, opened)
            form = blocks if blocks is None else moved_blocks(blocks, first)
            with opened.reporting_errors():
                if step.operation is Operation.COPY:
                    found = self._copy(rows, source, opened.nbytes)
                elif step.encode is None:
                    found = self._decode(rows, source, form, stats.damaged > 0)
                else:
                    found = self._encode(rows, source, form, row_encoding(step, matrix, powers))
            if found is None:
                return None
            if found.first_nonfinite_row is not None:
                found.first_nonfinite_row += first
            stats.merge(found)
            read += opened.nbytes
        return stats, read, self._bytes_written(unit)

    def _open(self, rows: Chunk, opened: _Opened) -> units.Source | units.CodeParts:
        """The bytes of the rows: those of weights, or of words, scales and biases."""
        step = rows.step
        if step.packing is not None:
            first, last = step.rows.stored_rows(rows.start, rows.stop)
            rects = step.packing.required_rects(first, last)
            roles = rects if step.packing.row_form is not None else ("weight",)
            sources = {x: opened.rect(step.inputs[x], rects[x]).ranges for x in roles}
        else:
            sources = {}
            for role, tensor in step.inputs.items():
                size = step.row_bytes(tensor)
                sources[role] = opened.ranges(tensor, rows.start * size, rows.stop * size)
        if len(sources) == 1:
            return sources["weight"]
        return units.CodeParts(sources["weight"], sources["scales"], sources.get("biases"))

    def _copy(self, rows: Chunk, source: units.Source | units.CodeParts, nbytes: int) -> LayerStats:
        assert not isinstance(source, units.CodeParts)
        (target,), held = self._targets(rows), self.limits.block_bytes
        units.copy_rows(source, target, nbytes, block_bytes=held, stop=self.reader.stop)
        return LayerStats()

    def _decode(
        self,
        rows: Chunk,
        source: units.Source | units.CodeParts,
        blocks: units.BlockScales | None,
        is_damaged: bool,
    ) -> LayerStats | None:
        """Cast or decode; None where something may be damaged, and it is not known what."""
        step, (target,) = rows.step, self._targets(rows)
        stored = stored_rows(step, rows.rows, blocks)
        is_packed = step.packing is not None
        narrowed = is_packed
        if step.source is not None:
            # The one dtype with a narrower range than the values had.
            narrowed = step.dtype == "F16" and step.inputs["scales"].info.dtype != "F16"
        written = units.decode_rows(
            source,
            stored,
            target,
            step.outputs["weight"].info.dtype,
            counts_nonfinite=narrowed,
            block_bytes=self.limits.block_bytes,
            stop=self.reader.stop,
        )
        if written.is_damaged or (is_packed and written.nonfinite and not is_damaged):
            return None
        overflowed = 0 if is_damaged else written.overflowed + written.nonfinite
        return LayerStats(overflowed=overflowed)

    def _encode(
        self,
        rows: Chunk,
        source: units.Source | units.CodeParts,
        blocks: units.BlockScales | None,
        encoding: units.RowEncoding,
    ) -> LayerStats | None:
        found = units.encode_rows(
            source,
            stored_rows(rows.step, rows.rows, blocks),
            self._targets(rows),
            encoding,
            block_bytes=self.limits.block_bytes,
            stop=self.reader.stop,
        )
        return None if found.is_damaged else stats_of(found)

    def _block_scales(self, unit: Chunk) -> tuple[units.BlockScales | None, LayerStats]:
        """The scales of E4M3 bytes, if they are, and those that are NaN or infinite."""
        step, packing = unit.step, unit.step.packing
        if packing is None or not packing.has_byte_rows:
            return None, LayerStats()
        rows = step.rows.stored_rows(unit.start, unit.stop)
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

    def _repack(self, unit: Chunk, scratch: Scratch) -> Result | None:
        """Move codes into MLX's order."""
        step, packing = unit.step, unit.step.packing
        assert packing is not None and step.repack is not None
        first, last = step.rows.stored_rows(unit.start, unit.stop)
        codes, cuts = packing.stored_codes(first, last), packing.required_rects(first, last)
        opened = _Opened(self.reader, self.shards)
        roles = codes.roles if isinstance(codes, StoredCodes) else ["weight"]
        rects = {role: opened.rect(step.inputs[role], cuts[role]) for role in roles}
        room = self.limits.block_bytes * units.BLOCKS_HELD
        if packing.strided:
            room = self.limits.chunk_bytes_for(step)
        scales = step.outputs["scales"].info.dtype
        target = unit_repack.RepackTarget(
            step.repack,
            "F32" if scales == "U8" else scales,
            self._targets(unit),
            scratch.take("room", "U8", 1, room).reshape(-1),
        )
        rows = unit_repack.UnitRows(
            unit.rows,
            step.rows.columns,
            row_unit=packing.row_unit,
            first_row=unit.start,
            measures=step.measures_rounding,
        )
        stop = self.reader.stop
        with opened.reporting_errors():
            if isinstance(codes, StoredCodes):
                found = unit_repack.repack_integers(codes, rects, rows, target, stop)
            else:
                assert codes is not None
                found = unit_repack.repack_blocks(codes, rects["weight"], rows, target, stop)
        if found is None:
            return None
        stats = LayerStats(squared_error=found[0], squared_values=found[1])
        return (
            stats,
            sum(rect.rows * rect.width for rect in rects.values()),
            self._bytes_written(unit),
        )

    def _targets(self, rows: Chunk) -> list[units.FilePlace]:
        """Where the rows begin in each output: words, scales, biases."""
        step = rows.step
        return [
            units.FilePlace(
                self.shards.fd(out.file),
                out.offset + (step.rows.output_row + rows.start) * step.row_bytes(out),
            )
            for role in _CODES
            if (out := step.outputs.get(role)) is not None
        ]

    def _bytes_written(self, unit: Chunk) -> int:
        return unit.rows * sum(map(unit.step.row_bytes, unit.step.outputs.values()))


class _Opened:
    """Parts of tensors, open to be read in one call, in the order in which errors number them."""

    def __init__(self, reader: SourceReader, shards: OpenShards) -> None:
        self._reader, self._shards = reader, shards
        self._parts: list[FileRange] = []

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self._parts)

    def ranges(self, tensor: SourceTensor, start: int, stop: int) -> list[units.FileBytes]:
        """Bytes ``start`` to ``stop`` of a tensor."""
        assert not isinstance(tensor, ComputedTensor)
        self._parts += cut(tensor, start, stop)
        return self._reader.open_ranges(tensor, start, stop)

    def rect(self, tensor: SourceTensor, rect: Rect) -> StoredRect:
        """A rectangle of a tensor, whose rows are opened whole."""
        dtype, shape = tensor.info.dtype, tensor.info.shape
        size = NUMPY_DTYPE[dtype].itemsize
        row_bytes = (shape[-1] if shape else 1) * size
        (first, last), (left, right) = rect.rows, rect.columns
        ranges = self.ranges(tensor, first * row_bytes, last * row_bytes)
        width = (right - left) * size
        return StoredRect(
            ranges,
            rows=last - first,
            row_bytes=row_bytes,
            left=left * size,
            width=width,
            dtype=dtype,
        )

    @contextmanager
    def reporting_errors(self) -> Iterator[None]:
        """Turn errors of a native call into those of a run."""
        try:
            yield
        except units.Stopped:
            raise RunCancelled from None
        except units.UnitFileError as error:
            if error.is_write:
                raise self._shards.write_error(error) from error
            self._reader.fail(self._parts[error.index], error)
