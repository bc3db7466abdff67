"""Pipeline stage 4: threads and sizes of chunks, so that a run keeps to its memory limit."""

from __future__ import annotations

import os
from dataclasses import dataclass

from requant.checkpoints.checkpoint import ComputedTensor
from requant.errors import OutOfRangeError
from requant.execution.hessian_cache import bytes_for
from requant.kernels.units import BLOCK_BYTES, BLOCKS_HELD
from requant.layouts.outputs import BATCH_BYTES
from requant.planning.plan import Plan, Step

# A chunk and what is made of it stay in a core's cache.
DEFAULT_CHUNK_BYTES = 4 << 20
# A chunk of a layer whose rows are spread over the whole tensor: read in runs of some KB.
STRIDED_CHUNK_BYTES = 64 << 20
# What a worker takes, and records when it is done, counted as chunks are: enough that what Python
# does for it takes no time, little enough that a progress bar moves and little is done again.
UNIT_BYTES = 64 << 20
_UNITS_PER_THREAD = 8  # at least, of a small model, so that all threads end at about the same time
_UNIT_PARTS = {"off": 1, "fast": 4, "best": 16}  # searches take longer
# Python, NumPy and the plan itself, before the first buffer (measured: 45 to 60 MB).
BASE_MEMORY_BYTES = 80 << 20
# Steps whose input powers are kept, for each thread.
KEPT_INPUT_POWERS = 2
# What the import of a library adds (measured: 41 MB for mlx-lm).
MLX_LM_MEMORY_BYTES = 48 << 20


@dataclass(frozen=True, slots=True)
class ResourceLimits:
    """The number of threads, and the bytes that each may hold."""

    threads: int
    chunk_bytes: int
    strided_bytes: int = 0  # for steps that read in strides; 0: as any other
    overhead_bytes: int = 0  # held next to the chunks: the library, and tensors that it computes
    factorizations: int = 1  # Hessians that are factored at a time
    unit_bytes: int = 0  # of the rows that are taken and recorded at a time; 0: a chunk

    @property
    def block_bytes(self) -> int:
        """Bytes of a block of ``kernels.units``, so that a call holds no more than a chunk."""
        return min(BLOCK_BYTES, self.chunk_bytes // BLOCKS_HELD)

    def unit_bytes_for(self, step: Step) -> int:
        """Bytes of the rows of a step that a worker takes at a time, counted as for chunks."""
        unit = 0 if step.gptq else self.unit_bytes // _UNIT_PARTS[step.search]
        return max(unit, self.chunk_bytes_for(step))

    def chunk_bytes_for(self, step: Step) -> int:
        """Bytes that a worker holds of a step at a time."""
        strided = step.packing is not None and step.packing.strided
        return max(self.chunk_bytes, self.strided_bytes) if strided else self.chunk_bytes

    @property
    def peak_bytes(self) -> int:
        """The most bytes that the process holds, without mapped or cached file pages."""
        base = BASE_MEMORY_BYTES + self.overhead_bytes
        return base + self.threads * max(self.chunk_bytes, self.strided_bytes)


def plan_resources(
    plan: Plan,
    threads: int | None = None,
    max_memory: int | None = None,
    chunk_bytes: int | None = None,
) -> ResourceLimits:
    """Fit threads and chunks into ``max_memory`` bytes, mapped pages aside.

    A worker holds the longest row of the plan at least. By default there is a thread for every
    processor of this process, with small chunks that suit its cache; ``chunk_bytes`` overrules
    their size, for tests and tuning. As many Hessians are factored at a time as the memory holds,
    without ``max_memory`` half of the machine's.

    Raises:
        OutOfRangeError: Not even one row a worker fits into ``max_memory``.
    """
    threads = _usable_processors() if threads is None else threads
    if threads < 1:
        raise OutOfRangeError("at least one thread is needed", "threads", threads)
    longest = max((s.min_work_bytes for s in plan.steps if s.rows.count), default=1)
    if max_memory is None:
        strided = [s for s in plan.steps if s.packing is not None and s.packing.strided]
        widest = max((s.rows.count * s.work_bytes_per_row for s in strided), default=0)
        spare = _memory_of_machine() // 2 - _overhead_bytes(plan, threads)
        factorizations = _factorizations(plan, threads, spare)
        return ResourceLimits(
            threads,
            max(chunk_bytes or DEFAULT_CHUNK_BYTES, longest),
            0 if chunk_bytes else min(STRIDED_CHUNK_BYTES, widest),
            _overhead_bytes(plan, threads, factorizations),
            factorizations,
            unit_bytes=0 if chunk_bytes else _unit_bytes(plan, threads),
        )
    _check_memory(plan, max_memory, longest)
    while max_memory < BASE_MEMORY_BYTES + _overhead_bytes(plan, threads) + threads * longest:
        threads -= 1
    room = max_memory - BASE_MEMORY_BYTES - _overhead_bytes(plan, threads)
    wanted = chunk_bytes or DEFAULT_CHUNK_BYTES
    factorizations = _factorizations(plan, threads, room - threads * max(wanted, longest))
    overhead = _overhead_bytes(plan, threads, factorizations)
    room = (max_memory - BASE_MEMORY_BYTES - overhead) // threads
    return ResourceLimits(
        threads,
        min(wanted, room),
        overhead_bytes=overhead,
        factorizations=factorizations,
        unit_bytes=0 if chunk_bytes else _unit_bytes(plan, threads),
    )


def _unit_bytes(plan: Plan, threads: int) -> int:
    """Bytes of a unit: fewer where a model would be too few units for the threads."""
    return min(UNIT_BYTES, plan.bytes_in // (threads * _UNITS_PER_THREAD))


def _factorizations(plan: Plan, threads: int, spare: int) -> int:
    """Hessians to factor at a time: one, and as many more as ``spare`` bytes hold."""
    widest = _most_gptq_inputs(plan)
    more = spare // bytes_for(widest, 0, 1) if widest else 0
    return 1 + min(max(more, 0), threads - 1)


def _most_gptq_inputs(plan: Plan) -> int:
    return max((step.rows.columns for step in plan.steps if step.gptq), default=0)


def _memory_of_machine() -> int:
    """Bytes of physical memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _usable_processors() -> int:
    """Processors that this process may run on."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    return usable or os.cpu_count() or 1


def _check_memory(plan: Plan, max_memory: int, longest: int) -> None:
    """Reject a limit that does not hold one worker with the longest row."""
    overhead = _overhead_bytes(plan, 1)
    least = BASE_MEMORY_BYTES + overhead + longest
    if max_memory >= least:
        return
    parts = [f"{BASE_MEMORY_BYTES:,} for Python, NumPy and the plan"]
    if overhead:
        parts.append(f"{overhead:,} for {_held_next_to(plan)}")
    parts.append(f"{longest:,} for the longest row of the model")
    needs = f"at least {least:,} bytes are needed: {', '.join(parts[:-1])} and {parts[-1]}"
    message = f"{needs}; give --max-memory {least}"
    raise OutOfRangeError(message, "max_memory", f"{max_memory:,}")


def _held_next_to(plan: Plan) -> str:
    """What ``_overhead_bytes`` counts, for messages."""
    held = [] if plan.layout == "keep" else [f"{plan.layout} and the tensors that it computes"]
    held += ["factors of Hessians (--gptq)"] if any(step.gptq for step in plan.steps) else []
    held += ["powers of inputs (--search)"] if any(step.estimate for step in plan.steps) else []
    return " and ".join(held)


def _input_power_bytes(plan: Plan, threads: int) -> int:
    """Of the sums of columns that each thread makes, and of the input powers that are kept."""
    sizes = (
        (step.rows.count // step.matrix_rows + 1) * step.rows.columns
        for step in plan.steps
        if step.estimate is not None
    )
    return max(sizes, default=0) * threads * (16 + 4 * KEPT_INPUT_POWERS)


def _overhead_bytes(plan: Plan, threads: int, factorizations: int = 1) -> int:
    """Bytes that are held next to the workers' chunks.

    One computed tensor at a time is made, from all of its inputs; meanwhile each other
    worker may hold another that is ready, and small ones of the same batch wait.
    """
    factored = bytes_for(_most_gptq_inputs(plan), threads, factorizations)
    factored += _input_power_bytes(plan, threads)
    if plan.layout == "keep":
        return factored
    sizes = {
        name: sum(out.info.nbytes for out in step.outputs.values())
        for name, step in plan.intermediates.items()
    }
    tensors = [t for step in plan.steps for t in step.inputs.values()]
    computed = [tensor for tensor in tensors if isinstance(tensor, ComputedTensor)]
    results = [0, *(t.info.nbytes for t in computed)]
    with_inputs = [0, *(t.info.nbytes + sum(sizes[x] for x in t.inputs) for t in computed)]
    batch = min(sum(with_inputs), BATCH_BYTES)
    in_work = max(max(with_inputs), batch)
    return factored + MLX_LM_MEMORY_BYTES + in_work + (threads - 1) * max(results)
