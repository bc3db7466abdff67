"""Step 4 of the road: the plan's steps, cut into chunks of rows, on threads.

A worker owns one set of buffers for the whole run: it reads the rows of a chunk into them,
calls a kernel (which releases the GIL), and writes the results to their places in the
pre-sized shards. Chunks share nothing, so their order and number change no byte.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from requant.arrays import gptq, native, values
from requant.blueprint import Operation, Plan, Step
from requant.checkpoint import ComputedTensor, JoinedTensor, SourceTensor, StoredTensor
from requant.consuming import files_of
from requant.dtypes import HEADER_NAME, NUMPY_DTYPE
from requant.errors import CheckpointError, OutOfRangeError, Problem, RequantError, count_are
from requant.formats.packing import Cut, Packing
from requant.hessians import Hessians, bytes_for
from requant.journal import Done
from requant.schema import Quantization
from requant.source_folder import open_regular
from requant.writer import Ledger, Sink

# A chunk and what is made of it stay in a core's cache.
DEFAULT_CHUNK_BYTES = 4 << 20
# A chunk of a layer whose rows are spread over the whole tensor: read in runs of some KB.
STRIDED_CHUNK_BYTES = 64 << 20
# Python, NumPy and the plan itself, before the first buffer (measured: 45 to 60 MB).
BASE_MEMORY_BYTES = 80 << 20
# What the import of mlx-lm adds (measured: 41 MB).
MLX_LM_MEMORY_BYTES = 48 << 20
_POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class Budget:
    """How much runs at once: threads, and bytes that each may hold."""

    threads: int
    chunk_bytes: int
    strided_bytes: int = 0  # for steps that read in strides; 0: as any other
    beside_bytes: int = 0  # held beside the chunks: mlx-lm, and tensors that it computes

    def chunk_of(self, step: Step) -> int:
        """Bytes that a worker holds of a step at a time."""
        strided = step.packing is not None and step.packing.strided
        return max(self.chunk_bytes, self.strided_bytes) if strided else self.chunk_bytes

    @property
    def peak_bytes(self) -> int:
        """What the process holds at the most, mapped or cached file pages aside."""
        base = BASE_MEMORY_BYTES + self.beside_bytes
        return base + self.threads * max(self.chunk_bytes, self.strided_bytes)


def make_budget(
    plan: Plan,
    threads: int | None = None,
    max_memory: int | None = None,
    chunk_bytes: int | None = None,
) -> Budget:
    """Fit threads and chunks into the memory allowed.

    Args:
        plan: What is to be run; its longest row is the least that a worker holds.
        threads: Worker threads; None for every processor of this process.
        max_memory: Most bytes to hold, mapped pages aside; None for small chunks that
            suit a processor's cache.
        chunk_bytes: Overrules the size of a worker's chunk; for tests and tuning.

    Raises:
        OutOfRangeError: Not even one row a worker fits into ``max_memory``.
    """
    if threads is None:
        threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
        threads = threads or os.cpu_count() or 1
    if threads < 1:
        raise OutOfRangeError("at least one thread is needed", "threads", threads)
    longest = max((s.least_work_bytes for s in plan.steps if s.rows), default=1)
    if max_memory is None:
        strided = [s for s in plan.steps if s.packing is not None and s.packing.strided]
        widest = max((s.rows * s.work_bytes_per_row for s in strided), default=0)
        return Budget(
            threads,
            max(chunk_bytes or DEFAULT_CHUNK_BYTES, longest),
            0 if chunk_bytes else min(STRIDED_CHUNK_BYTES, widest),
            _beside(plan, threads),
        )
    least = BASE_MEMORY_BYTES + _beside(plan, 1) + longest
    if max_memory < least:
        what = (
            "largest tensor that mlx-lm computes" if _beside(plan, 1) > longest else "longest row"
        )
        message = f"the {what} of this model needs at least {least:,} bytes"
        raise OutOfRangeError(message, "max_memory", f"{max_memory:,}")
    while max_memory < BASE_MEMORY_BYTES + _beside(plan, threads) + threads * longest:
        threads -= 1
    beside = _beside(plan, threads)
    room = (max_memory - BASE_MEMORY_BYTES - beside) // threads
    return Budget(threads, min(chunk_bytes or DEFAULT_CHUNK_BYTES, room), beside_bytes=beside)


def _beside(plan: Plan, threads: int) -> int:
    """Bytes that are held beside the workers' chunks.

    One computed tensor at a time is made, from all of its inputs; meanwhile each other
    worker may hold another that is ready, and small ones of the same batch wait.
    """
    widest = max((step.columns for step in plan.steps if step.gptq), default=0)
    factored = bytes_for(widest, threads)
    if plan.relayout is None:
        return factored
    sizes = {
        name: sum(out.info.nbytes for out in step.outputs.values())
        for name, step in plan.materials.items()
    }
    tensors = [t for step in plan.steps for t in step.inputs.values()]
    ready, made = [0], [0]
    for tensor in tensors:
        if isinstance(tensor, ComputedTensor):
            ready.append(tensor.info.nbytes)
            made.append(tensor.info.nbytes + sum(sizes[name] for name in tensor.inputs))
    batch = min(sum(made), plan.relayout.batch_bytes)
    return factored + MLX_LM_MEMORY_BYTES + max(max(made), batch) + (threads - 1) * max(ready)


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run stands."""

    layer: str
    bytes_done: int
    bytes_total: int
    elapsed_s: float
    bytes_written: int = 0
    bytes_downloaded: int = 0
    bytes_to_download: int = 0


@dataclass(slots=True)
class Finding:
    """What the kernels saw in one layer; sums over its chunks."""

    nonfinite: int = 0
    first_nonfinite_row: int | None = None
    overflowed: int = 0
    flushed_groups: int = 0
    squared_error: float = 0.0
    squared_values: float = 0.0
    max_error_steps: float = 0.0

    def told(self) -> dict[str, float]:
        """What is not nothing."""
        nothing = Finding()
        return {k: v for k, v in asdict(self).items() if v != getattr(nothing, k)}

    def nonfinite_problem(self, layer: str) -> Problem:
        """What to say of a layer whose values are not all numbers."""
        return Problem(
            f"{layer}.weight",
            f"{count_are(self.nonfinite, 'value')} NaN or infinite, first in row "
            f"{self.first_nonfinite_row}; --allow-nonfinite leaves such layers as they are",
        )

    def add(self, other: Finding) -> None:
        """Merge what another chunk saw."""
        self.nonfinite += other.nonfinite
        self.overflowed += other.overflowed
        self.flushed_groups += other.flushed_groups
        self.squared_error += other.squared_error
        self.squared_values += other.squared_values
        self.max_error_steps = max(self.max_error_steps, other.max_error_steps)
        rows = [r for r in (self.first_nonfinite_row, other.first_nonfinite_row) if r is not None]
        self.first_nonfinite_row = min(rows, default=None)


@dataclass(slots=True)
class Outcome:
    """What a run did: findings by layer, and how long it took."""

    findings: dict[str, Finding] = field(default_factory=dict)
    elapsed_s: float = 0.0
    bytes_downloaded: int = 0


def run_plan(
    plan: Plan,
    folder: Sink,
    budget: Budget,
    progress: Callable[[Progress], None] | None = None,
    stop_at: Callable[[Finding], bool] | None = None,
) -> Outcome:
    """Run every step of ``plan`` into ``folder``.

    Args:
        plan: What is to be done.
        folder: Where the bytes go.
        budget: Threads and memory.
        progress: Called about ten times a second.
        stop_at: Ends the run, which is not whole then, at what was found in a chunk.

    Raises:
        CheckpointError: A source file changed, or cannot be read any more.
        HubError: A source file cannot be downloaded.
        OutputError: The disk refused a write.
    """
    before = folder.ledger.state.consumed if folder.ledger is not None else ()
    with _Source(plan, tuple(before), _needed(plan, folder.ledger)) as source:
        run = _Run(plan, source, folder, budget, stop_at)
        return run.go(progress)


def _needed(plan: Plan, ledger: Ledger | None) -> list[str]:
    """The source files that are still to be read, as they are needed."""
    before = Done() if ledger is None else ledger.state
    order = range(len(plan.steps)) if ledger is None else ledger.order
    steps = (plan.steps[n] for n in order if any(before.left(n, plan.steps[n].rows)))
    return list(dict.fromkeys(name for step in steps for name in files_of(step, plan)))


class _Stopped(Exception):
    """The run ends, and what this worker waits for does not come any more."""


class _Source:
    """The source's files, open for positioned reads from any thread.

    Those of a folder are opened at once, those of the hub when they have come.
    """

    def __init__(self, plan: Plan, consumed: Collection[str], needed: Sequence[str]) -> None:
        self.consumed, self.needed = consumed, needed
        self.path, self.sizes = plan.checkpoint.path, {f.name: f.nbytes for f in plan.files}
        self.supply = plan.checkpoint.supply
        self.stop = threading.Event()
        self.fds: dict[str, int] = {}
        self._opening = threading.Lock()

    def __enter__(self) -> _Source:
        if self.supply is not None:
            self.supply.begin(self.needed)
            return self
        try:
            for name in self.sizes:
                if name not in self.consumed:
                    self._open(name, self.path / name)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _open(self, name: str, path: Path) -> None:
        try:
            self.fds[name] = open_regular(path)
        except OSError as error:
            self._fail(name, error.strerror or str(error))
        actual, planned = os.fstat(self.fds[name]).st_size, self.sizes[name]
        if actual != planned:
            self._fail(name, f"has {actual:,} bytes now, {planned:,} when it was planned")

    def __exit__(self, *_: object) -> None:
        if self.supply is not None:
            self.supply.end()
        for fd in self.fds.values():
            os.close(fd)
        self.fds.clear()

    def forget(self, name: str) -> None:
        """Close a file that nothing will be read of any more."""
        fd = self.fds.pop(name, None)
        if fd is not None:
            os.close(fd)
        if self.supply is not None:
            self.supply.release(name)

    def _fd(self, name: str) -> int:
        """An open file; one that is on its way is waited for."""
        fd = self.fds.get(name)
        if fd is not None or self.supply is None:
            return self.fds[name]
        path = self.supply.take(name, self.stop.is_set)
        if path is None:
            raise _Stopped
        with self._opening:
            if name not in self.fds:
                self._open(name, path)
            return self.fds[name]

    def read_tensor(
        self, tensor: StoredTensor | JoinedTensor, start: int, into: memoryview
    ) -> None:
        """Fill ``into`` with a tensor's bytes from ``start`` on, wherever they lie."""
        for part in tensor.ranges:
            if not into:
                return
            if start < part.nbytes:
                size = min(part.nbytes - start, len(into))
                self.read(part.file, part.offset + start, into[:size])
                into, start = into[size:], part.nbytes
            start -= part.nbytes

    def read_cut(self, tensor: StoredTensor | JoinedTensor, cut: Cut, into: np.ndarray) -> None:
        """Fill ``into`` with a rectangle of a tensor; whole rows are one read."""
        width = tensor.info.shape[-1] if tensor.info.shape else 1
        size = into.dtype.itemsize
        (first, last), (left, right) = cut.rows, cut.columns
        if right - left == width:
            self.read_tensor(tensor, first * width * size, _bytes(into))
            return
        for number, row in enumerate(range(first, last)):
            self.read_tensor(tensor, (row * width + left) * size, _bytes(into[number]))

    def read(self, file: str, offset: int, into: memoryview) -> None:
        """Fill ``into`` with the bytes at ``offset``."""
        fd = self._fd(file)
        while into:
            try:
                got = os.preadv(fd, [into], offset)
            except OSError as error:
                self._fail(file, error.strerror or str(error))
            if got == 0:
                self._fail(file, f"ends at byte {offset:,}: it was cut while it was read")
            into, offset = into[got:], offset + got

    def _fail(self, file: str, message: str) -> None:
        raise CheckpointError(str(self.path), [Problem(file, message)])


class _Buffers:
    """One worker's memory: an array per role, as large as its largest use so far.

    Attributes:
        hessians: What all workers share of GPTQ.
    """

    def __init__(self, hessians: Hessians) -> None:
        self.hessians = hessians
        self._arrays: dict[str, np.ndarray] = {}

    def take(self, role: str, dtype: str, rows: int, row_bytes: int) -> np.ndarray:
        """An uninitialised ``(rows, row_bytes / itemsize)`` array of the role's memory."""
        nbytes = rows * row_bytes
        held = self._arrays.get(role)
        if held is None or held.nbytes < nbytes:
            held = self._arrays[role] = np.empty(nbytes, np.uint8)
        return held[:nbytes].view(NUMPY_DTYPE[dtype]).reshape(rows, -1)


_Arrays = dict[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class _Chunk:
    step: Step
    start: int
    stop: int
    number: int = -1  # of the step in the plan

    def parts(self, chunk_bytes: int) -> Iterator[_Chunk]:
        """The same rows in pieces that a worker's buffers hold."""
        step = self.step
        rows = max(1, chunk_bytes // max(1, step.work_bytes_per_row))
        if step.packing is None:
            for start in range(self.start, self.stop, rows):
                yield replace(self, start=start, stop=min(start + rows, self.stop))
            return
        rows = max(rows // step.packing.row_unit, 1) * step.packing.row_unit
        start = self.start  # rows of a piece count from the packed layer's first_row
        while start < self.stop:
            within = step.packed_rows(start, start + 1)[0] % step.packing.matrix_rows
            left = -(-(step.packing.matrix_rows - within) // step.row_step)
            room = min(rows if step.row_step > 1 else rows - within % rows, left)
            yield replace(self, start=start, stop=min(start + room, self.stop))
            start += room


def _chunks(steps: Sequence[Step], budget: Budget, ledger: Ledger | None) -> Iterator[_Chunk]:
    """What workers take one by one; a computed tensor stays with the worker that has it."""
    before = Done() if ledger is None else ledger.state
    for number in range(len(steps)) if ledger is None else ledger.order:
        step = steps[number]
        for start, stop in list(before.left(number, step.rows)):
            whole = _Chunk(step, start, stop, number)
            if any(isinstance(tensor, ComputedTensor) for tensor in step.inputs.values()):
                yield whole
            else:
                yield from whole.parts(budget.chunk_of(step))


class _Run:
    """The state that workers share: the list of chunks, the counters, the first error."""

    def __init__(
        self,
        plan: Plan,
        source: _Source,
        folder: Sink,
        budget: Budget,
        stop_at: Callable[[Finding], bool] | None,
    ) -> None:
        self.plan, self.source, self.folder, self.budget = plan, source, folder, budget
        self.ledger: Ledger | None = folder.ledger
        self.chunks = _chunks(plan.steps, budget, self.ledger)
        self.lock = threading.Lock()
        self.error: BaseException | None = None
        self.stop, self.stop_at = source.stop, stop_at
        self.done = threading.Event()
        self.running = budget.threads
        self.hessians = Hessians(budget.threads)
        self.outcome = Outcome()
        self.layer, self.bytes_done, self.bytes_written = "", 0, 0
        if self.ledger is not None:
            self._take_up(self.ledger.state)

    def _take_up(self, before: Done) -> None:
        """Count what an earlier run did and found."""
        for number, found in before.found:
            finding = Finding(**found)  # type: ignore[arg-type]  # as asdict gave it
            layer = self.plan.steps[number].layer
            self.outcome.findings.setdefault(layer, Finding()).add(finding)
        for number, ranges in before.rows.items():
            step = self.plan.steps[number]
            rows = sum(stop - start for start, stop in ranges)
            self.bytes_done += step.bytes_in * rows // max(step.rows, 1)

    def go(self, progress: Callable[[Progress], None] | None) -> Outcome:
        began = time.perf_counter()
        threads = [
            threading.Thread(target=self._work, name=f"requant-{n}", daemon=True)
            for n in range(self.budget.threads)
        ]
        for thread in threads:
            thread.start()
        try:
            while not self.done.wait(_POLL_S):
                if progress is not None:
                    progress(self._progress(began))
        finally:
            self.stop.set()
            for thread in threads:
                thread.join()
        if self.error is not None:
            raise self.error
        if progress is not None:
            progress(self._progress(began))
        self.outcome.elapsed_s = time.perf_counter() - began
        if self.source.supply is not None:
            self.outcome.bytes_downloaded = self.source.supply.bytes_here
        return self.outcome

    def _progress(self, began: float) -> Progress:
        supply = self.source.supply
        return Progress(
            self.layer,
            self.bytes_done,
            self.plan.bytes_in,
            time.perf_counter() - began,
            self.bytes_written,
            0 if supply is None else supply.bytes_here,
            0 if supply is None else supply.bytes_expected,
        )

    def _work(self) -> None:
        buffers = _Buffers(self.hessians)
        try:
            while not self.stop.is_set():
                with self.lock:
                    chunk = next(self.chunks, None)
                if chunk is None:
                    break
                self._do_all(chunk, buffers)
        except _Stopped:
            pass
        except BaseException as error:
            with self.lock:
                self.error = self.error or error
            self.stop.set()
        with self.lock:
            self.running -= 1
            if not self.running or self.error is not None:
                self.done.set()

    def _do_all(self, chunk: _Chunk, buffers: _Buffers) -> None:
        computed = {
            tensor.name: self.plan.relayout.compute(
                tensor.name, lambda name, into: self._fill(name, into, buffers)
            )
            for tensor in chunk.step.inputs.values()
            if isinstance(tensor, ComputedTensor) and self.plan.relayout is not None
        }
        if not computed:
            self._do(chunk, buffers, computed)
            return
        for part in chunk.parts(self.budget.chunk_bytes):
            if self.stop.is_set():
                return
            self._do(part, buffers, computed)

    def _fill(self, name: str, into: memoryview, buffers: _Buffers) -> None:
        """Write the dense values of what a computed tensor is made from."""
        step = self.plan.materials[name]
        whole = _Chunk(step, 0, step.rows)
        for part in whole.parts(self.budget.chunk_of(step)):
            outputs, _, _ = self._make(part, buffers, {})
            (data,) = map(_bytes, outputs.values())
            (out,) = step.outputs.values()
            row_bytes = step.row_bytes(out)
            for first, last, place in _runs(part):
                stop = (place + last - first) * row_bytes
                into[place * row_bytes : stop] = data[first * row_bytes : last * row_bytes]

    def _do(self, chunk: _Chunk, buffers: _Buffers, computed: _Arrays) -> None:
        step, written = chunk.step, 0
        outputs, finding, read = self._make(chunk, buffers, computed)
        for role, out in step.outputs.items():
            row_bytes = step.row_bytes(out)
            data = _bytes(outputs[role])
            for first, last, place in _runs(chunk):
                offset = out.offset + (step.into_row + place) * row_bytes
                self.folder.write(out.file, offset, data[first * row_bytes : last * row_bytes])
            written += data.nbytes
        if finding.first_nonfinite_row is not None:
            finding.first_nonfinite_row += step.into_row + chunk.start
        with self.lock:
            self.outcome.findings.setdefault(step.layer, Finding()).add(finding)
            self.layer = step.layer
            self.bytes_done += read
            self.bytes_written += written
        if self.stop_at is not None and self.stop_at(finding):
            self.stop.set()
            return
        if self.ledger is not None:
            for name in self.ledger.done(chunk.number, chunk.start, chunk.stop, finding.told()):
                self.source.forget(name)

    def _make(
        self, chunk: _Chunk, buffers: _Buffers, computed: _Arrays
    ) -> tuple[_Arrays, Finding, int]:
        """Outputs by role, what was found in them, and how many bytes were read."""
        step, rows = chunk.step, chunk.stop - chunk.start
        outputs: _Arrays = {}
        inputs = {} if step.packing is None else self._cut_parts(chunk, buffers)
        read = sum(array.nbytes for array in inputs.values())
        for role, tensor in step.inputs.items() if step.packing is None else ():
            row_bytes = step.row_bytes(tensor)
            array = buffers.take(f"in {role}", tensor.info.dtype, rows, row_bytes)
            if isinstance(tensor, ComputedTensor):
                start = chunk.start * row_bytes
                _bytes(array)[:] = computed[tensor.name][start : start + array.nbytes].data
            else:
                self.source.read_tensor(tensor, chunk.start * row_bytes, _bytes(array))
            inputs[role] = array
            read += array.nbytes
        if step.global_scale is not None:
            inputs[_ROW_SCALES] = self._row_scales(chunk, step.global_scale)
        for role, out in step.outputs.items():
            if step.operation is Operation.COPY:
                outputs[role] = inputs[role]
                continue
            outputs[role] = buffers.take(f"out {role}", out.info.dtype, rows, step.row_bytes(out))
        try:
            if step.packing is None:
                finding = _COMPUTE[step.operation](chunk, inputs, outputs, buffers)
            else:
                finding = _unpack(chunk, step.packing, inputs, outputs, buffers)
        except RequantError as error:
            error.layer = error.layer or step.layer
            raise
        return outputs, finding, read

    def _cut_parts(self, chunk: _Chunk, buffers: _Buffers) -> _Arrays:
        """The rectangles of a packed layer's parts that a chunk needs."""
        step, found = chunk.step, {}
        assert step.packing is not None
        rows = step.packed_rows(chunk.start, chunk.stop)
        for role, cut in step.packing.cuts(*rows).items():
            tensor = step.inputs[role]
            assert not isinstance(tensor, ComputedTensor)
            height = cut.rows[1] - cut.rows[0]
            width = (cut.columns[1] - cut.columns[0]) * NUMPY_DTYPE[tensor.info.dtype].itemsize
            found[role] = buffers.take(f"in {role}", tensor.info.dtype, height, width)
            self.source.read_cut(tensor, cut, found[role])
        return found

    def _row_scales(self, chunk: _Chunk, stored: SourceTensor) -> np.ndarray:
        """The global scale of each row of a chunk, from one for all or one an expert."""
        assert not isinstance(stored, ComputedTensor)
        scales = np.empty(stored.info.size, np.float32)
        self.source.read_tensor(stored, 0, _bytes(scales))
        expert = np.arange(chunk.start, chunk.stop) * scales.size // chunk.step.rows
        return scales[expert]


def _runs(chunk: _Chunk) -> Iterator[tuple[int, int, int]]:
    """Rows of a chunk that stay together: first, last, and the place of the first."""
    if chunk.step.row_order is None:
        yield 0, chunk.stop - chunk.start, chunk.start
        return
    places = chunk.step.row_order.places[chunk.start : chunk.stop]
    borders = [0, *(np.flatnonzero(np.diff(places) != 1) + 1).tolist(), len(places)]
    for first, last in pairwise(borders):
        yield first, last, int(places[first])


def _bytes(array: np.ndarray) -> memoryview:
    """The memory of a C-contiguous array, flat."""
    return array.reshape(-1).view(np.uint8).data


_ROW_SCALES = "row scales"


def _copy(chunk: _Chunk, inputs: _Arrays, outputs: _Arrays, buffers: _Buffers) -> Finding:
    return Finding()


def _cast(chunk: _Chunk, inputs: _Arrays, outputs: _Arrays, buffers: _Buffers) -> Finding:
    return Finding(overflowed=values.cast_into(inputs["weight"], outputs["weight"]))


def _encode(chunk: _Chunk, inputs: _Arrays, outputs: _Arrays, buffers: _Buffers) -> Finding:
    step, dense, finding = chunk.step, inputs["weight"], Finding()
    if step.inputs["weight"].info.dtype != step.dtype:
        wanted = buffers.take("dense", step.dtype, *_dense_shape(step, dense))
        finding.overflowed = values.cast_into(dense, wanted)
        dense = wanted
    return _quantize(chunk, dense, outputs, buffers, finding)


def _decode(chunk: _Chunk, inputs: _Arrays, outputs: _Arrays, buffers: _Buffers) -> Finding:
    step, dense, finding = chunk.step, outputs["weight"], Finding()
    assert step.source is not None
    _dequantize(step.source, inputs, dense, buffers)
    if step.dtype == "F16" and step.inputs["scales"].info.dtype != "F16":
        # The one dtype with a narrower range than the values had.
        finding.overflowed = values.count_nonfinite(dense)
    return finding


def _recode(chunk: _Chunk, inputs: _Arrays, outputs: _Arrays, buffers: _Buffers) -> Finding:
    step = chunk.step
    dense = buffers.take("dense", step.dtype, *_dense_shape(step, inputs["weight"]))
    assert step.source is not None
    _dequantize(step.source, inputs, dense, buffers)
    return _quantize(chunk, dense, outputs, buffers, Finding())


def _dense_shape(step: Step, rows_of: np.ndarray) -> tuple[int, int]:
    return rows_of.shape[0], step.columns * NUMPY_DTYPE[step.dtype].itemsize


def _dequantize(source: Quantization, parts: _Arrays, dense: np.ndarray, buffers: _Buffers) -> None:
    words, scales, row_scales = parts["weight"], parts["scales"], parts.get(_ROW_SCALES)
    encoding = (source.group_size, source.bits, source.mode.value)
    if row_scales is None:
        native.dequantize_into(words, scales, parts.get("biases"), *encoding, dense)
        return
    # MLX gives float32 here; a run of rows with one global scale is one call.
    wide = dense if dense.dtype == np.float32 else buffers.take("wide", "F32", *_wide(dense))
    borders = [0, *(np.flatnonzero(np.diff(row_scales)) + 1).tolist(), len(row_scales)]
    for start, stop in pairwise(borders):
        native.dequantize_into(
            words[start:stop],
            scales[start:stop],
            None,
            *encoding,
            wide[start:stop],
            float(row_scales[start]),
        )
    if wide is not dense:
        values.cast_into(wide, dense)


def _wide(dense: np.ndarray) -> tuple[int, int]:
    return dense.shape[0], 4 * dense.shape[1]


def _quantize(
    chunk: _Chunk, dense: np.ndarray, outputs: _Arrays, buffers: _Buffers, finding: Finding
) -> Finding:
    """Encode, and measure what was lost while the chunk is still in the cache."""
    step = chunk.step
    target = step.target
    assert target is not None
    finding.nonfinite = values.count_nonfinite(dense)
    if finding.nonfinite:
        finding.first_nonfinite_row = values.first_nonfinite_row(dense)
        return finding
    rows, scales = dense.shape[0], outputs["scales"]
    for first, last, matrix in _runs_of_a_matrix(chunk):
        if step.gptq and _compensate(step, dense, outputs, first, last, matrix, buffers.hessians):
            continue
        weights = None if step.importance is None else step.importance.weights(matrix)
        finding.flushed_groups += native.quantize_into(
            dense[first:last],
            target.group_size,
            target.bits,
            target.mode.value,
            outputs["weight"][first:last],
            scales[first:last],
            outputs["biases"][first:last] if "biases" in outputs else None,
            search=None if step.search == "off" else step.search,
            weights=weights,
        )
    decoded = buffers.take("decoded", step.dtype, rows, dense.nbytes // rows)
    _dequantize(target, outputs, decoded, buffers)
    group_max = buffers.take("group_max", "F32", rows, 4 * scales.shape[1])
    finding.squared_error, finding.squared_values, finding.max_error_steps = values.encoding_error(
        dense, decoded, scales, target.mode.value, group_max
    )
    if step.weigh and step.importance is not None:
        finding.squared_error, finding.squared_values = _weighed(chunk, dense, decoded)
    return finding


def _runs_of_a_matrix(chunk: _Chunk) -> Iterator[tuple[int, int, int]]:
    """Rows of a chunk that belong to one matrix of a stack: first, last, and which it is."""
    step, count = chunk.step, chunk.stop - chunk.start
    if step.importance is None:  # nothing asks which
        yield 0, count, 0
        return
    rows = np.arange(chunk.start, chunk.stop)
    places = rows if step.row_order is None else step.row_order.places[rows]
    matrices = (places + step.into_row) // step.outputs["weight"].info.shape[-2]
    borders = [0, *(np.flatnonzero(np.diff(matrices)) + 1).tolist(), count]
    for first, last in pairwise(borders):
        yield first, last, int(matrices[first])


def _weighed(chunk: _Chunk, dense: np.ndarray, decoded: np.ndarray) -> tuple[float, float]:
    """Squared errors and squared values of a chunk, each input counted as its mean square."""
    error = energy = 0.0
    importance = chunk.step.importance
    assert importance is not None
    for first, last, matrix in _runs_of_a_matrix(chunk):
        weights = importance.weights(matrix)
        wide = dense[first:last].astype(np.float32)
        lost = decoded[first:last].astype(np.float32) - wide
        sums = [np.einsum("ri,ri->i", x, x, dtype=np.float64) for x in (lost, wide)]
        counted = [float(x.sum() if weights is None else x @ weights) for x in sums]
        error, energy = error + counted[0], energy + counted[1]
    return error, energy


def _compensate(
    step: Step,
    dense: np.ndarray,
    outputs: _Arrays,
    first: int,
    last: int,
    matrix: int,
    hessians: Hessians,
) -> bool:
    """Encode rows of one matrix with their errors handed on; False where no token reached it."""
    assert step.importance is not None
    assert step.target is not None
    made = hessians.compensation(step.importance, matrix)
    if made is None:
        return False
    target = step.target
    parts = gptq.quantize(dense[first:last], made, target.group_size, target.bits, step.search)
    for role, array in zip(("weight", "scales", "biases"), parts, strict=True):
        outputs[role][first:last] = array
    return True


def _unpack(
    chunk: _Chunk, packing: Packing, inputs: _Arrays, outputs: _Arrays, buffers: _Buffers
) -> Finding:
    """Move or decode the rows of a packed layer."""
    step = chunk.step
    rows = step.packed_rows(chunk.start, chunk.stop)
    between = _Between(outputs, step.row_step, rows[1] - rows[0], buffers)
    if step.operation is Operation.REPACK:
        packing.unpack(inputs, *rows, between.wide, buffers)
        between.thin()
        floats = [array for array in outputs.values() if array.dtype not in (np.uint32, np.uint8)]
        return Finding(overflowed=sum(values.count_nonfinite(array) for array in floats))
    if step.operation is Operation.DECODE:
        packing.dense(inputs, *rows, between.wide["weight"], buffers)
        between.thin()
        return Finding(overflowed=values.count_nonfinite(outputs["weight"]))
    width = step.columns * NUMPY_DTYPE[step.dtype].itemsize
    dense = buffers.take("dense", step.dtype, chunk.stop - chunk.start, width)
    between = _Between({"weight": dense}, step.row_step, rows[1] - rows[0], buffers)
    packing.dense(inputs, *rows, between.wide["weight"], buffers)
    between.thin()
    return _quantize(chunk, dense, outputs, buffers, Finding())


class _Between:
    """Room for rows of which only every ``step``-th is wanted; the outputs themselves at 1."""

    def __init__(self, outputs: _Arrays, step: int, rows: int, buffers: _Buffers) -> None:
        self.outputs, self.step = outputs, step
        self.wide = outputs
        if step > 1:
            self.wide = {
                role: buffers.take(
                    f"wide {role}", HEADER_NAME[array.dtype], rows, array.shape[1] * array.itemsize
                )
                for role, array in outputs.items()
            }

    def thin(self) -> None:
        """Move the rows that are wanted into the outputs."""
        if self.step > 1:
            for role, array in self.outputs.items():
                array[:] = self.wide[role][:: self.step]


_COMPUTE = {
    Operation.COPY: _copy,
    Operation.CAST: _cast,
    Operation.ENCODE: _encode,
    Operation.DECODE: _decode,
    Operation.RECODE: _recode,
}
