"""Rows from files to files give the bytes and statistics of rows that pass through arrays."""

import os
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from requant.core.dtypes import TensorInfo
from requant.errors import CheckpointError, OutputError
from requant.execution.chunks import Chunk
from requant.execution.direct import DirectRows, is_direct
from requant.execution.executor import join_all
from requant.execution.hessian_cache import HessianCache
from requant.execution.layer_stats import LayerStats
from requant.execution.operations import WorkerBuffers, make_outputs
from requant.execution.resources import ResourceLimits
from requant.execution.source_reader import RunCancelled
from requant.kernels.units import BLOCKS_HELD
from requant.packings.floats import Float8
from requant.planning.plan import EncodeParams, Operation, OutputTensor, RowMapping, Step
from requant.quantization.config import Quantization
from tests.support.unit_files import GAP, Files, Shards

BF16, E4M3 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn)
TARGET = Quantization.affine(32, 4)
ROWS, COLUMNS, MATRIX = 21, 96, 7


class Weights:
    """Statistics of some matrices."""

    def weights(self, matrix: int) -> np.ndarray:
        return (np.linspace(0, 1, COLUMNS) ** (1 + 3 * matrix)).astype(np.float32)


def direct_rows(files: Files, shard: int | None = None) -> DirectRows:
    """Blocks of 300 bytes, and of 6 times as many where a block of outputs is held."""
    shards = Shards(files.shard if shard is None else shard)
    return DirectRows(files.reader, shards, ResourceLimits(1, 300 * BLOCKS_HELD))


@pytest.fixture
def files(tmp_path: Path) -> Iterator[Any]:
    opened: list[Files] = []

    def make(**tensors: np.ndarray) -> Files:
        opened.append(Files(tmp_path, tensors))
        return opened[-1]

    yield make
    for each in opened:
        each.close()


def step_of(files: Files, operation: Operation, outputs: dict[str, TensorInfo]) -> Step:
    """A step over all rows of a stack of three matrices."""
    placed, offset = {}, 64
    for role, info in outputs.items():
        placed[role] = OutputTensor(f"w.{role}", info, "out", offset)
        offset += info.nbytes + 8
    importance: Any = Weights()
    params = EncodeParams(target=TARGET, search="fast", importance=importance)
    return Step(
        layer="w",
        operation=operation,
        rows=RowMapping(count=ROWS, columns=COLUMNS),
        inputs=files.inputs,
        outputs=placed,
        encode=params if operation in (Operation.ENCODE, Operation.RECODE) else None,
        dtype="BF16",
    )


def codes(matrices: int = 3) -> dict[str, TensorInfo]:
    """The outputs of a stack."""
    groups = TensorInfo("BF16", (matrices, MATRIX, COLUMNS // 32))
    words = TensorInfo("U32", (matrices, MATRIX, COLUMNS // 8))
    return {"weight": words, "scales": groups, "biases": groups}


def compare(files: Files, step: Step, inputs: dict[str, np.ndarray], rows: slice) -> LayerStats:
    """Run rows of a step both ways; returns the statistics."""
    unit = Chunk(step, rows.start, rows.stop)
    assert is_direct(step)
    outputs, expected = make_outputs(unit, inputs, WorkerBuffers(HessianCache(1)))
    result = direct_rows(files).run(unit, WorkerBuffers(HessianCache(1)))
    assert result is not None
    made, read, written = result
    image = files.path.read_bytes()
    for role, out in step.outputs.items():
        row_bytes = out.info.nbytes // (out.info.size // out.info.shape[-1])
        at = out.offset + (step.rows.output_row + rows.start) * row_bytes
        data = outputs[role].tobytes()
        if not made.nonfinite:
            assert image[at : at + len(data)] == data, role
    assert written == sum(array.nbytes for array in outputs.values())
    assert read == inputs["weight"].nbytes
    if not made.nonfinite:  # else the errors are of other blocks
        assert made.squared_error == pytest.approx(expected.squared_error, rel=1e-6)
        assert made.max_error_steps == expected.max_error_steps
    same = {"squared_error": 0.0, "squared_values": 0.0, "max_error_steps": 0.0}
    assert replace(made, **same) == replace(expected, **same)
    return made


def values() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((ROWS, COLUMNS)).astype(BF16)


def test_matrices_of_a_stack_have_their_own_weights(files: Any) -> None:
    """Rows 5 to 15 are of all three matrices."""
    w = values()
    made = files(weight=w)
    step = step_of(made, Operation.ENCODE, codes())
    assert not compare(made, step, {"weight": w[5:15]}, slice(5, 15)).nonfinite


def test_the_first_row_that_is_not_a_number(files: Any) -> None:
    w = values()
    w[9, 4] = w[14, 0] = np.nan
    made = files(weight=w)
    step = step_of(made, Operation.ENCODE, codes())
    found = compare(made, step, {"weight": w[5:15]}, slice(5, 15))
    assert (found.nonfinite, found.first_nonfinite_row) == (2, 4)


@pytest.mark.parametrize("operation", [Operation.COPY, Operation.CAST])
def test_rows_that_stay_dense(files: Any, operation: Operation) -> None:
    w = values()
    made = files(weight=w)
    dtype = "BF16" if operation is Operation.COPY else "F32"
    step = step_of(made, operation, {"weight": TensorInfo(dtype, (21, COLUMNS))})
    compare(made, step, {"weight": w[5:15]}, slice(5, 15))


@pytest.mark.parametrize("operation", [Operation.RECODE, Operation.DECODE])
@pytest.mark.parametrize("damaged", [False, True])
def test_bytes_with_scales_of_blocks(files: Any, damaged: bool, operation: Operation) -> None:
    """Blocks of 4 rows and 64 columns: two by two a matrix. The output has one more matrix."""
    stored = values().astype(E4M3)
    scales = np.linspace(0.5, 2, 12, dtype=np.float32).reshape(6, 2)
    if damaged:
        scales[3, 1] = np.inf
    made = files(weight=stored, scale=scales)
    packing = Float8(ROWS, COLUMNS, MATRIX, (4, 64), 2)
    dense = {"weight": TensorInfo("BF16", (4, MATRIX, COLUMNS))}
    step = step_of(made, operation, dense if operation is Operation.DECODE else codes(4))
    rows = replace(step.rows, output_row=MATRIX)
    step = replace(step, packing=packing, rows=rows)
    inputs = {"weight": stored[8:14], "scale": scales[2:4]}
    found = compare(made, step, inputs, slice(8, 14))  # rows of the second matrix
    assert bool(found.damaged) == damaged
    assert bool(found.nonfinite) == (damaged and operation is Operation.RECODE)


def test_a_source_that_was_cut(files: Any) -> None:
    made = files(weight=values())
    step = step_of(made, Operation.COPY, {"weight": TensorInfo("BF16", (21, COLUMNS))})
    os.truncate(made.path.with_name("in"), GAP + 1000)
    direct = direct_rows(made)
    with pytest.raises(CheckpointError, match="in: ends at byte 1,024: it was cut while"):
        direct.run(Chunk(step, 0, ROWS), WorkerBuffers(HessianCache(1)))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no full device")
def test_a_disk_that_is_full(files: Any) -> None:
    made = files(weight=values())
    step = step_of(made, Operation.COPY, {"weight": TensorInfo("BF16", (21, COLUMNS))})
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        with pytest.raises(OutputError, match="out: No space left"):
            direct_rows(made, full).run(Chunk(step, 0, ROWS), WorkerBuffers(HessianCache(1)))
    finally:
        os.close(full)


def test_a_run_that_ends_ends_its_units(files: Any) -> None:
    made = files(weight=values())
    dense = {"weight": TensorInfo("BF16", (21, COLUMNS))}
    made.reader.stop.set()
    for operation, outputs in ((Operation.COPY, dense), (Operation.ENCODE, codes())):
        with pytest.raises(RunCancelled):
            step = step_of(made, operation, outputs)
            direct_rows(made).run(Chunk(step, 0, ROWS), WorkerBuffers(HessianCache(1)))
    assert made.path.read_bytes() == b""


class Interrupted(threading.Thread):
    """Ctrl-C comes while it is waited for."""

    joins = 0

    def join(self, timeout: float | None = None) -> None:
        self.joins += 1
        if self.joins == 1:
            raise KeyboardInterrupt
        super().join(timeout)


def test_ctrl_c_does_not_leave_threads_with_files_that_are_closed() -> None:
    threads = [Interrupted(target=time.sleep, args=[0.05]) for _ in range(2)]
    for thread in threads:
        thread.start()
    with pytest.raises(KeyboardInterrupt):
        join_all(threads)
    assert not any(thread.is_alive() for thread in threads)


def test_rows_in_another_order_pass_through_arrays(files: Any) -> None:
    from requant.formats.base import RowOrder

    made = files(weight=values())
    step = step_of(made, Operation.COPY, {"weight": TensorInfo("BF16", (21, COLUMNS))})
    order = RowOrder.of(np.arange(ROWS)[::-1].copy())
    assert not is_direct(replace(step, rows=replace(step.rows, order=order)))
