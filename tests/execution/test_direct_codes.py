"""Codes from files to files: the bytes and statistics of the same rows through arrays.

The arrays are ``packing.repack`` and ``packing.decode``, which tests/packings holds against vectors
by hand and values of the formats' own tools.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from requant.errors import CheckpointError, OutputError
from requant.execution.chunks import Chunk
from requant.execution.direct import DirectRows, is_direct
from requant.execution.hessian_cache import HessianCache
from requant.execution.layer_stats import LayerStats
from requant.execution.operations import WorkerBuffers, make_outputs
from requant.execution.resources import ResourceLimits
from requant.execution.source_reader import RunCancelled
from requant.planning.plan import Operation, Step
from tests.support.stored_codes import DECODED, REPACKED, ROWS, gptq, step_of
from tests.support.unit_files import Files, Shards


@pytest.fixture
def files(tmp_path: Path) -> Iterator[Callable[[dict[str, np.ndarray]], Files]]:
    opened: list[Files] = []

    def make(tensors: dict[str, np.ndarray]) -> Files:
        opened.append(Files(tmp_path, tensors))
        return opened[-1]

    yield make
    for each in opened:
        each.close()


def through_arrays(
    step: Step, tensors: dict[str, np.ndarray], unit: Chunk
) -> tuple[dict[str, bytes], LayerStats]:
    if step.packing is None:
        rows = slice(unit.start, unit.stop)
        inputs = {role: np.ascontiguousarray(array[rows]) for role, array in tensors.items()}
        outputs, stats = make_outputs(unit, inputs, WorkerBuffers(HessianCache(1)))
        return {role: array.tobytes() for role, array in outputs.items()}, stats
    rects = step.packing.required_rects(unit.start, unit.stop)
    inputs = {
        role: np.ascontiguousarray(
            tensors[role].reshape(-1, tensors[role].shape[-1])[
                slice(*rect.rows), slice(*rect.columns)
            ]
        )
        for role, rect in rects.items()
    }
    outputs, stats = make_outputs(unit, inputs, WorkerBuffers(HessianCache(1)))
    return {role: array.tobytes() for role, array in outputs.items()}, stats


def units_of(step: Step, rows: int) -> Iterator[Chunk]:
    """All rows, in units of so many at most."""
    return Chunk(step, 0, ROWS).parts(rows * step.work_bytes_per_row)


def compare(
    files: Files, step: Step, tensors: dict[str, np.ndarray], rows: int, room: int
) -> LayerStats:
    """Run a step in units of ``rows``, with ``room`` bytes for a block; returns the statistics."""
    assert is_direct(step)
    direct = DirectRows(files.reader, Shards(files.shard), ResourceLimits(1, room))
    whole = LayerStats()
    for unit in units_of(step, rows):
        expected, stats = through_arrays(step, tensors, unit)
        result = direct.run(unit, WorkerBuffers(HessianCache(1)))
        assert result is not None
        made, _, written = result
        image = files.path.read_bytes()
        for role, out in step.outputs.items():
            at = out.offset + (step.rows.output_row + unit.start) * step.row_bytes(out)
            assert image[at : at + len(expected[role])] == expected[role], role
        assert written == sum(map(len, expected.values()))
        assert made.squared_error == pytest.approx(stats.squared_error, rel=1e-6)
        assert made.squared_values == pytest.approx(stats.squared_values, rel=1e-6)
        same = {"squared_error": 0.0, "squared_values": 0.0}
        assert replace(made, **same) == replace(stats, **same)
        whole.merge(made)
    return whole


CUTS = [(ROWS, 1 << 22), (64, 1 << 14), (ROWS, 100)]
"""Rows of a unit, and bytes for a block."""


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
@pytest.mark.parametrize("name", REPACKED)
def test_codes_that_are_moved(name: str, dtype: str, files: Any) -> None:
    packing, tensors = REPACKED[name](np.random.default_rng(3))
    made = files(tensors)
    step = step_of(made, packing, Operation.REPACK, dtype)
    for rows, room in CUTS:
        whole = compare(made, step, tensors, rows, room)
        assert (whole.squared_values > 0) == step.measures_rounding


@pytest.mark.parametrize("operation", [Operation.DECODE, Operation.RECODE])
@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
@pytest.mark.parametrize("name", DECODED)
def test_codes_that_are_decoded(name: str, dtype: str, operation: Operation, files: Any) -> None:
    packing, tensors = DECODED[name](np.random.default_rng(4))
    made = files(tensors)
    step = step_of(made, packing, operation, dtype)
    for rows, room in CUTS:
        compare(made, step, tensors, rows, room)


@pytest.mark.parametrize("operation", [Operation.DECODE, Operation.RECODE])
@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
@pytest.mark.parametrize("name", ["affine", "mxfp4", "mxfp8", "nvfp4"])
def test_layers_of_mlx(name: str, dtype: str, operation: Operation, files: Any) -> None:
    """The same without a packing: words, scales and biases row by row."""
    packing, tensors = DECODED[name](np.random.default_rng(4))
    made = files(tensors)
    step = step_of(made, packing, operation, dtype, above=0)
    step = replace(step, packing=None, source=packing.encoding)  # type: ignore[attr-defined]
    for rows, room in CUTS:
        compare(made, step, tensors, rows, room)


def test_values_that_float16_does_not_hold_are_counted(files: Any) -> None:
    packing, tensors = DECODED["affine"](np.random.default_rng(4))
    tensors["biases"][3, 2] = 1e30
    made = files(tensors)
    for dtype, overflowed in (("F16", 64), ("BF16", 0)):
        step = step_of(made, packing, Operation.DECODE, dtype, above=0)
        step = replace(step, packing=None, source=packing.encoding)  # type: ignore[attr-defined]
        assert compare(made, step, tensors, ROWS, 1 << 20).overflowed == overflowed


@pytest.mark.parametrize("name", ["awq", "awq gemv_fast", "gptq", "compressed-tensors", "Q4_1"])
def test_numbers_that_are_not_finite_are_left_to_arrays(name: str, files: Any) -> None:
    packing, tensors = REPACKED[name](np.random.default_rng(3))
    role = next((role for role in tensors if "scale" in role), "")
    if role:
        tensors[role][1, 1] = np.nan
    else:
        tensors["weight"][70, 2:4] = 0x00, 0x7C  # infinity
    made = files(tensors)
    step = step_of(made, packing, Operation.REPACK)
    direct = DirectRows(made.reader, Shards(made.shard), ResourceLimits(1, 1 << 20))
    unit = Chunk(step, 0, ROWS)
    assert through_arrays(step, tensors, unit)[1].damaged
    assert direct.run(unit, WorkerBuffers(HessianCache(1))) is None


@pytest.mark.parametrize("mode", ["affine", "mxfp4", "nvfp4"])
@pytest.mark.parametrize("operation", [Operation.DECODE, Operation.RECODE])
def test_scales_of_mlx_that_are_not_finite(mode: str, operation: Operation, files: Any) -> None:
    packing, tensors = DECODED[mode](np.random.default_rng(3))
    tensors["scales"][5, 1] = {"affine": np.inf, "mxfp4": 0xFF, "nvfp4": 0x7F}[mode]
    made = files(tensors)
    step = step_of(made, packing, operation)
    direct = DirectRows(made.reader, Shards(made.shard), ResourceLimits(1, 1 << 20))
    assert direct.run(Chunk(step, 0, ROWS), WorkerBuffers(HessianCache(1))) is None


def test_scales_that_a_dtype_does_not_hold_are_left_to_arrays(files: Any) -> None:
    packing, tensors = REPACKED["compressed-tensors"](np.random.default_rng(3))
    tensors["weight_scale"][7, 1] = 1e30
    made = files(tensors)
    step = step_of(made, packing, Operation.REPACK, "F16")
    direct = DirectRows(made.reader, Shards(made.shard), ResourceLimits(1, 1 << 20))
    assert direct.run(Chunk(step, 0, ROWS), WorkerBuffers(HessianCache(1))) is None


def test_zeros_that_contradict_the_config_are_left_to_arrays(files: Any) -> None:
    packing, tensors = REPACKED["gptq"](np.random.default_rng(3))
    made = files(tensors)
    direct = DirectRows(made.reader, Shards(made.shard), ResourceLimits(1, 1 << 20))
    claimed = replace(packing, symmetric=True)  # type: ignore[type-var]
    step = step_of(made, claimed, Operation.REPACK)
    assert direct.run(Chunk(step, 0, ROWS), WorkerBuffers(HessianCache(1))) is None


@pytest.mark.parametrize(
    ("change", "is_possible"),
    [
        ({}, True),
        ({"act_order": True}, False),
        ({"act_order": True, "sorted": True}, False),
        ({"word_bits": 16}, False),
        ({"planar": True}, False),  # planes of zeros
        ({"rows": 72}, False),
    ],
)
def test_what_passes_through_arrays(change: dict[str, Any], is_possible: bool) -> None:
    packing, _ = gptq(np.random.default_rng(0), 4)
    assert (replace(packing, **change).stored_codes(0, 64) is not None) == is_possible  # type: ignore[type-var]


@pytest.mark.parametrize("name", ["awq", "gptq", "compressed-tensors", "Q4_0"])
def test_a_source_that_was_cut(name: str, files: Any) -> None:
    """The last byte of the file is one of a panel, of scales or of a row."""
    packing, tensors = REPACKED[name](np.random.default_rng(3))
    made = files(tensors)
    path = made.path.with_name("in")
    nbytes = path.stat().st_size
    os.truncate(path, nbytes - 1)
    direct = DirectRows(made.reader, Shards(made.shard), ResourceLimits(1, 1 << 20))
    step = step_of(made, packing, Operation.REPACK)
    with pytest.raises(CheckpointError, match=f"in: ends at byte {nbytes - 1:,}: it was cut while"):
        direct.run(Chunk(step, 0, ROWS), WorkerBuffers(HessianCache(1)))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no full device")
@pytest.mark.parametrize("name", ["awq", "compressed-tensors", "Q4_0"])
def test_a_disk_that_is_full(name: str, files: Any) -> None:
    packing, tensors = REPACKED[name](np.random.default_rng(3))
    made = files(tensors)
    step = step_of(made, packing, Operation.REPACK)
    full = os.open("/dev/full", os.O_WRONLY)
    direct = DirectRows(made.reader, Shards(full), ResourceLimits(1, 1 << 20))
    try:
        with pytest.raises(OutputError, match="out: No space left"):
            direct.run(Chunk(step, 0, ROWS), WorkerBuffers(HessianCache(1)))
    finally:
        os.close(full)


@pytest.mark.parametrize("name", ["awq", "compressed-tensors", "Q4_0"])
def test_a_run_that_ends_ends_its_units(name: str, files: Any) -> None:
    packing, tensors = REPACKED[name](np.random.default_rng(3))
    made = files(tensors)
    made.reader.stop.set()
    direct = DirectRows(made.reader, Shards(made.shard), ResourceLimits(1, 1 << 20))
    with pytest.raises(RunCancelled):
        direct.run(
            Chunk(step_of(made, packing, Operation.REPACK), 0, ROWS), WorkerBuffers(HessianCache(1))
        )
    assert made.path.read_bytes() == b""
