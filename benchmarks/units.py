"""Processor time of a matrix of codes: from file to file in native calls, and through arrays.

The matrix has 11008 rows of 4096 values. Both ways alternate in one thread, files are in memory,
and medians are printed; "arrays" is what a conversion does with codes that no native call moves.

    python benchmarks/units.py                     repacked: AWQ, GPTQ, ...; decoded: modes of MLX
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.support import stored_codes as cases
from tests.support.unit_files import Files, Shards

from requant.execution.chunks import Chunk
from requant.execution.direct import DirectRows
from requant.execution.executor import _Run
from requant.execution.hessian_cache import HessianCache
from requant.execution.operations import WorkerBuffers, make_outputs
from requant.execution.resources import ResourceLimits
from requant.planning.plan import Operation, Step

ROWS, COLUMNS = 11008, 4096
LIMITS = ResourceLimits(1, 4 << 20, 64 << 20, unit_bytes=64 << 20)
KINDS = {
    "AWQ": (cases.REPACKED["awq"], Operation.REPACK),
    "GPTQ": (cases.REPACKED["gptq"], Operation.REPACK),
    "compressed-tensors": (cases.REPACKED["compressed-tensors"], Operation.REPACK),
    "Q4_0": (cases.REPACKED["Q4_0"], Operation.REPACK),
    "Q8_0": (cases.REPACKED["Q8_0"], Operation.REPACK),
    "affine, 4 bits": (lambda rng: cases.mlx(rng, "affine", 4, 64), Operation.DECODE),
    "mxfp4": (cases.DECODED["mxfp4"], Operation.DECODE),
}


class Reading:
    """What the reading of a chunk takes of a run."""

    _read_rows, _cut_parts = _Run._read_rows, _Run._cut_parts

    def __init__(self, files: Files) -> None:
        self.reader = files.reader


def through_arrays(step: Step, files: Files, buffers: WorkerBuffers) -> None:
    """Chunk by chunk: read, compute, write."""
    run = Reading(files)
    for unit in Chunk(step, 0, ROWS).parts(LIMITS.unit_bytes_for(step)):
        for chunk in unit.parts(LIMITS.chunk_bytes_for(step)):
            if step.packing is None:
                inputs = run._read_rows(chunk, buffers, {})
            else:
                inputs = run._cut_parts(chunk, step.packing, buffers)
            outputs, _ = make_outputs(chunk, inputs, buffers)
            for role, out in step.outputs.items():
                at = out.offset + (step.rows.output_row + chunk.start) * step.row_bytes(out)
                os.pwrite(files.shard, outputs[role].reshape(-1).view(np.uint8).data, at)


def directly(step: Step, files: Files, buffers: WorkerBuffers) -> None:
    """Unit by unit."""
    direct = DirectRows(files.reader, Shards(files.shard), LIMITS)
    for unit in Chunk(step, 0, ROWS).parts(LIMITS.unit_bytes_for(step)):
        assert direct.run(unit, buffers) is not None


def compare(name: str, runs: int, place: Path) -> None:
    """Print a line of the table."""
    make, operation = KINDS[name]
    packing, tensors = make(np.random.default_rng(0))
    files = Files(place, tensors)
    is_mlx = operation is Operation.DECODE
    step = cases.step_of(files, packing, operation, "BF16", above=0)
    if is_mlx:
        step = replace(step, packing=None, source=packing.encoding)
    buffers = WorkerBuffers(HessianCache(1))
    took: dict[str, list[float]] = {"arrays": [], "direct": []}
    for _ in range(runs + 1):
        for way, call in (("arrays", through_arrays), ("direct", directly)):
            began = time.thread_time()
            call(step, files, buffers)
            took[way].append(time.thread_time() - began)
    files.close()
    before, now = (1e3 * statistics.median(seconds[1:]) for seconds in took.values())
    nbytes = sum(array.nbytes for array in tensors.values()) / 1e6
    print(f"{name:20}{nbytes:8.1f}{before:9.1f}{now:9.1f}{now / before:7.2f}", flush=True)


def main() -> None:
    """Parse the arguments and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--runs", type=int, default=7)
    args = parser.parse_args()
    cases.ROWS, cases.COLUMNS = ROWS, COLUMNS
    print(f"{'':20}{'MB':>8}{'arrays':>9}{'direct':>9}{'ratio':>7}   ms of processor time")
    for name in args.kinds:
        with tempfile.TemporaryDirectory(dir="/dev/shm") as place:
            compare(name, args.runs, Path(place))


if __name__ == "__main__":
    main()
