"""Pipeline stage 4: run the plan's steps on threads, from the source's files into a sink.

A worker takes a unit of rows at a time. Where these are copied, cast or encoded from files to
files, ``direct`` passes the whole unit to one native call. Else the worker cuts it into chunks: it
reads the rows of a chunk into its buffers, has ``operations`` compute the outputs, and passes these
to the sink with their offsets. This is the only module of the pipeline that starts threads; it
knows no path of the output.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np

from requant.checkpoints.checkpoint import ComputedTensor, SourceTensor
from requant.core.dtypes import NUMPY_DTYPE
from requant.execution.chunks import Chunk, computed_inputs, contiguous_runs, remaining_units
from requant.execution.completed_work import CompletedWork
from requant.execution.damaged_scales import ROW_SCALES
from requant.execution.direct import DirectRows, is_direct
from requant.execution.hessian_cache import HessianCache
from requant.execution.input_estimates import INPUT_POWER, InputPowers
from requant.execution.layer_stats import LayerStats, RunResult
from requant.execution.operations import Arrays, WorkerBuffers, make_outputs
from requant.execution.resources import KEPT_INPUT_POWERS, ResourceLimits
from requant.execution.sink import ProgressLog, Sink, order_of
from requant.execution.source_reader import RunCancelled, SourceReader, bytes_of
from requant.kernels.blas_threads import one_blas_thread
from requant.packings.base import Packing
from requant.planning.plan import Plan, Step
from requant.planning.plan_source import PlanSource
from requant.planning.release_order import source_files_of

_POLL_S = 0.1

TakePowers = Callable[[int, np.ndarray], None]
"""Called with the number of a step and the powers of its inputs, those of ``InputPowers``."""


@dataclass(frozen=True, slots=True)
class Progress:
    """The progress of a run: bytes of a conversion, or steps of the calibration before it."""

    layer: str
    bytes_done: int
    bytes_total: int
    elapsed_s: float
    bytes_written: int = 0
    bytes_downloaded: int = 0
    bytes_to_download: int = 0
    # Windows of a text times blocks of the model that they went through; 0 while converting.
    steps_done: int = 0
    steps_total: int = 0
    steps_before: int = 0  # done by an earlier run


def run_plan(
    plan: Plan,
    source: PlanSource,
    sink: Sink,
    limits: ResourceLimits,
    progress: Callable[[Progress], None] | None = None,
    stop_at: Callable[[LayerStats], bool] | None = None,
    take_powers: TakePowers | None = None,
) -> RunResult:
    """Run every step of ``plan`` into ``sink``.

    ``progress`` is called about ten times a second, ``stop_at`` with the statistics of each unit;
    true ends the run, incomplete. ``take_powers`` is called with the estimated powers of a step's
    inputs, if there are any, before rows of it are written.

    Raises:
        CheckpointError: A source file changed, or cannot be read any more.
        HubError: A source file cannot be downloaded.
        OutputError: A write failed.
    """
    before = sink.progress_log.state.deleted_sources if sink.progress_log is not None else ()
    needed = _files_to_read(plan, sink.progress_log)
    reader = SourceReader(plan.files, source.opened, tuple(before), needed)
    has_hessians = any(step.gptq for step in plan.steps)
    with reader, one_blas_thread() if has_hessians else nullcontext():
        run = _Run(plan, source, reader, sink, limits, stop_at=stop_at, take_powers=take_powers)
        return run.run(progress)


def _files_to_read(plan: Plan, progress_log: ProgressLog | None) -> list[str]:
    """The source files that are still to be read, in the order in which they are needed."""
    before = CompletedWork() if progress_log is None else progress_log.state
    order = order_of(plan.steps, progress_log)
    steps = (plan.steps[n] for n in order if any(before.remaining(n, plan.steps[n].rows.count)))
    return list(dict.fromkeys(name for step in steps for name in source_files_of(step, plan)))


def join_all(threads: Iterable[threading.Thread]) -> None:
    """Wait for threads, also through Ctrl-C: they hold numbers of files that are closed next."""
    interrupt = None
    for thread in threads:
        while thread.is_alive():
            try:
                thread.join()
            except KeyboardInterrupt as error:
                interrupt = error
    if interrupt is not None:
        raise interrupt


class _Run:
    """The state that workers share: the units of work, the counters, the first error."""

    def __init__(
        self,
        plan: Plan,
        source: PlanSource,
        reader: SourceReader,
        sink: Sink,
        limits: ResourceLimits,
        stop_at: Callable[[LayerStats], bool] | None,
        take_powers: TakePowers | None,
    ) -> None:
        self.plan, self.source, self.reader = plan, source, reader
        self.sink, self.limits = sink, limits
        self.progress_log: ProgressLog | None = sink.progress_log
        order = order_of(plan.steps, self.progress_log)
        self.bytes_in = sum(plan.steps[number].bytes_in for number in order)
        self.units = remaining_units(plan.steps, limits, self.progress_log)
        shards = sink.shards
        self.direct = None if shards is None else DirectRows(reader, shards, limits)
        self.lock = threading.Lock()
        self.error: BaseException | None = None
        self.stop, self.stop_at = reader.stop, stop_at
        self.take_powers = take_powers
        self.done = threading.Event()
        self.running = limits.threads
        self.hessians = HessianCache(limits.threads, limits.factorizations)
        self.input_powers = InputPowers(KEPT_INPUT_POWERS * limits.threads)
        self.outcome = RunResult()
        self.layer, self.bytes_done, self.bytes_written = "", 0, 0
        if self.progress_log is not None:
            self._restore(self.progress_log.state)

    def _restore(self, before: CompletedWork) -> None:
        """Add what an earlier run did, and its statistics."""
        for number, stats in before.stats.items():
            layer = self.plan.steps[number].layer
            self.outcome.findings.setdefault(layer, LayerStats()).merge(stats)
        for number in before.rows:
            step = self.plan.steps[number]
            rows = before.done_rows(number)
            self.bytes_done += step.bytes_in * rows // max(step.rows.count, 1)

    def run(self, progress: Callable[[Progress], None] | None) -> RunResult:
        began = time.perf_counter()
        threads = [
            threading.Thread(target=self._work, name=f"requant-{n}", daemon=True)
            for n in range(self.limits.threads)
        ]
        for thread in threads:
            thread.start()
        try:
            while not self.done.wait(_POLL_S):
                if progress is not None:
                    progress(self._progress(began))
        finally:
            self.stop.set()
            join_all(threads)
        if self.error is not None:
            raise self.error
        if progress is not None:
            progress(self._progress(began))
        self.outcome.elapsed_s = time.perf_counter() - began
        if self.reader.downloader is not None:
            self.outcome.bytes_downloaded = self.reader.downloader.bytes_here
        return self.outcome

    def _progress(self, began: float) -> Progress:
        downloader = self.reader.downloader
        return Progress(
            layer=self.layer,
            bytes_done=self.bytes_done,
            bytes_total=self.bytes_in,
            elapsed_s=time.perf_counter() - began,
            bytes_written=self.bytes_written,
            bytes_downloaded=0 if downloader is None else downloader.bytes_here,
            bytes_to_download=0 if downloader is None else downloader.bytes_expected,
        )

    def _work(self) -> None:
        buffers = WorkerBuffers(self.hessians)
        try:
            while not self.stop.is_set():
                with self.lock:
                    unit = next(self.units, None)
                if unit is None:
                    break
                self._run_whole(unit, buffers)
        except RunCancelled:
            pass
        except BaseException as error:
            with self.lock:
                self.error = self.error or error
            self.stop.set()
        with self.lock:
            self.running -= 1
            if not self.running or self.error is not None:
                self.done.set()

    def _run_whole(self, whole: Chunk, buffers: WorkerBuffers) -> None:
        """Run a unit; one with computed tensors, or for GPTQ, in smaller ones that are recorded."""
        step = whole.step
        computed = {
            tensor.name: self.source.compute(
                tensor.name, lambda name, into: self._fill_intermediate(name, into, buffers)
            )
            for tensor in computed_inputs(step)
        }
        if step.estimate is not None:  # before the buffers hold the rows
            powers = self.input_powers.of(whole, lambda x: self._decode(x, buffers, computed))
            computed = {**computed, INPUT_POWER: powers}
            if self.take_powers is not None:
                self.take_powers(whole.number, powers)
        for unit in whole.parts(self.limits.unit_bytes_for(step)):
            if not self.stop.is_set():
                self._run_unit(unit, buffers, computed)

    def _decode(
        self, chunk: Chunk, buffers: WorkerBuffers, computed: Arrays
    ) -> Iterator[tuple[Chunk, np.ndarray]]:
        """Rows of a step that stores nothing: chunks, each with its values."""
        for part in chunk.parts(self.limits.chunk_bytes_for(chunk.step)):
            outputs, _, _ = self._compute_chunk(part, buffers, computed)
            yield part, outputs["weight"].reshape(part.rows, -1)

    def _fill_intermediate(self, name: str, into: memoryview, buffers: WorkerBuffers) -> None:
        """Write the dense values of an input of a computed tensor."""
        step = self.plan.intermediates[name]
        whole = Chunk(step, 0, step.rows.count)
        for part in whole.parts(self.limits.chunk_bytes_for(step)):
            outputs, stats, _ = self._compute_chunk(part, buffers, {})
            if stats.damaged:
                with self.lock:
                    self.outcome.findings.setdefault(step.layer, LayerStats()).merge(stats)
            (data,) = map(bytes_of, outputs.values())
            (out,) = step.outputs.values()
            row_bytes = step.row_bytes(out)
            for first, last, row in contiguous_runs(part):
                stop = (row + last - first) * row_bytes
                into[row * row_bytes : stop] = data[first * row_bytes : last * row_bytes]

    def _run_unit(self, unit: Chunk, buffers: WorkerBuffers, computed: Arrays) -> None:
        """Convert and write the rows of a unit, then record it.

        Rows in which ``direct`` finds something wrong pass through arrays, which say what.
        """
        step, result = unit.step, None
        if self.direct is not None and is_direct(step):
            result = self.direct.run(unit, buffers, computed.get(INPUT_POWER))
        if result is not None:
            stats, read, written = result
            self._count(step, read, written)
        else:
            stats = LayerStats()
            for chunk in unit.parts(self.limits.chunk_bytes_for(step)):
                if self.stop.is_set():
                    return
                stats.merge(self._run_chunk(chunk, buffers, computed, chunk.start - unit.start))
        if stats.first_nonfinite_row is not None:
            stats.first_nonfinite_row += step.rows.output_row + unit.start
        with self.lock:
            self.outcome.findings.setdefault(step.layer, LayerStats()).merge(stats)
        if self.stop_at is not None and self.stop_at(stats):
            self.stop.set()
            return
        if self.progress_log is not None:
            for name in self.progress_log.mark_done(unit.number, unit.start, unit.stop, stats):
                self.reader.close_file(name)

    def _run_chunk(
        self, chunk: Chunk, buffers: WorkerBuffers, computed: Arrays, first_row: int
    ) -> LayerStats:
        """Convert and write a chunk, whose first row is ``first_row`` of its unit."""
        step, written = chunk.step, 0
        outputs, stats, read = self._compute_chunk(chunk, buffers, computed)
        for role, out in step.outputs.items():
            row_bytes = step.row_bytes(out)
            data = bytes_of(outputs[role])
            for first, last, row in contiguous_runs(chunk):
                # A run of the chunk's rows, first to last, begins at this row of the tensor.
                offset = out.offset + (step.rows.output_row + row) * row_bytes
                self.sink.write(out.file, offset, data[first * row_bytes : last * row_bytes])
            written += data.nbytes
        self._count(step, read, written)
        if stats.first_nonfinite_row is not None:
            stats.first_nonfinite_row += first_row
        return stats

    def _count(self, step: Step, read: int, written: int) -> None:
        """Add to what ``progress`` shows."""
        with self.lock:
            self.layer = step.layer
            self.bytes_done += read
            self.bytes_written += written

    def _compute_chunk(
        self, chunk: Chunk, buffers: WorkerBuffers, computed: Arrays
    ) -> tuple[Arrays, LayerStats, int]:
        """Outputs by role, their statistics, and how many bytes were read."""
        step = chunk.step
        if step.packing is None:
            inputs = self._read_rows(chunk, buffers, computed)
        else:
            inputs = self._cut_parts(chunk, step.packing, buffers)
        read = sum(array.nbytes for array in inputs.values())
        if INPUT_POWER in computed:
            inputs[INPUT_POWER] = computed[INPUT_POWER]
        if step.global_scale is not None:
            inputs[ROW_SCALES] = self._row_scales(chunk, step.global_scale)
        return *make_outputs(chunk, inputs, buffers), read

    def _read_rows(self, chunk: Chunk, buffers: WorkerBuffers, computed: Arrays) -> Arrays:
        """The chunk's rows of every tensor of its step."""
        step, arrays = chunk.step, {}
        for role, tensor in step.inputs.items():
            row_bytes = step.row_bytes(tensor)
            start = chunk.start * row_bytes
            array = buffers.take(f"in {role}", tensor.info.dtype, chunk.rows, row_bytes)
            if isinstance(tensor, ComputedTensor):
                bytes_of(array)[:] = computed[tensor.name][start : start + array.nbytes].data
            else:
                self.reader.read_tensor(tensor, start, bytes_of(array))
            arrays[role] = array
        return arrays

    def _cut_parts(self, chunk: Chunk, packing: Packing, buffers: WorkerBuffers) -> Arrays:
        """The rectangles of a packed layer's parts that a chunk needs."""
        step, arrays = chunk.step, {}
        rows = step.rows.stored_rows(chunk.start, chunk.stop)
        for role, cut in packing.required_rects(*rows).items():
            tensor = step.inputs[role]
            assert not isinstance(tensor, ComputedTensor)
            height = cut.rows[1] - cut.rows[0]
            width = (cut.columns[1] - cut.columns[0]) * NUMPY_DTYPE[tensor.info.dtype].itemsize
            arrays[role] = buffers.take(f"in {role}", tensor.info.dtype, height, width)
            self.reader.read_cut(tensor, cut, arrays[role])
        return arrays

    def _row_scales(self, chunk: Chunk, stored: SourceTensor) -> np.ndarray:
        """The global scale of each row of a chunk, from one for all or one an expert."""
        assert not isinstance(stored, ComputedTensor)
        scales = np.empty(stored.info.size, np.float32)
        self.reader.read_tensor(stored, 0, bytes_of(scales))
        # 8 rows and 2 scales: rows 0 to 3 take the first, 4 to 7 the second.
        expert = np.arange(chunk.start, chunk.stop) * scales.size // chunk.step.rows.count
        return scales[expert]
