"""Codes from files to files: the bytes and statistics of the same rows through arrays.

The arrays are ``packing.repack`` and ``packing.decode``, which tests/packings holds against vectors
by hand and values of the formats' own tools.
"""

import os
from collections.abc import Callable, Iterator
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
from requant.execution.hessian_cache import HessianCache
from requant.execution.layer_stats import LayerStats
from requant.execution.operations import WorkerBuffers, make_outputs
from requant.execution.resources import ResourceLimits
from requant.execution.source_reader import RunCancelled
from requant.formats.gguf import GgufBlocks
from requant.formats.widening import MlxRows
from requant.kernels.gguf import BY_NAME
from requant.kernels.quantize import quantize
from requant.packings.awq import AwqFast, AwqGemm, AwqGemv, gemv_width
from requant.packings.base import Packing
from requant.packings.compressed_tensors import CtPacked, packed_words
from requant.packings.compressed_tensors import Zeros as CtZeros
from requant.packings.gptq import Gptq, Zeros
from requant.planning.plan import EncodeParams, Operation, OutputTensor, RowMapping, Step
from requant.quantization.config import Quantization
from tests.execution.test_direct import Files, Shards

BF16 = np.dtype(ml_dtypes.bfloat16)
ROWS, COLUMNS = 192, 256
Case = tuple[Packing, dict[str, np.ndarray]]


def random_words(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.integers(0, 1 << 32, shape, np.uint32).view(np.int32)


def scales(rng: np.random.Generator, *shape: int, dtype: Any = np.float16) -> np.ndarray:
    """Positive and negative; products with zeros round."""
    return (rng.standard_normal(shape) * 0.03).astype(dtype)


def awq(rng: np.random.Generator, bits: int, group: int, *, zeros: bool = True) -> Case:
    groups = COLUMNS // group
    tensors = {
        "qweight": random_words(rng, COLUMNS, ROWS * bits // 32),
        "scales": scales(rng, groups, ROWS),
    }
    if zeros:
        tensors["qzeros"] = random_words(rng, groups, ROWS * bits // 32)
    return AwqGemm(ROWS, COLUMNS, bits, group, not zeros, "F16", zeros), tensors


def awq_gemv(rng: np.random.Generator) -> Case:
    width = gemv_width(COLUMNS // 64, 64)
    assert width is not None
    return AwqGemv(ROWS, COLUMNS, 4, 64, False, "F16"), {
        "qweight": random_words(rng, ROWS, COLUMNS // 8),
        "qzeros": random_words(rng, ROWS, width),
        "scales": scales(rng, ROWS, 8 * width),
    }


def awq_fast(rng: np.random.Generator) -> Case:
    return AwqFast(ROWS, COLUMNS, 4, 128, False, "F16"), {
        "qweight": random_words(rng, ROWS // 4, COLUMNS // 2).view(np.int16),
        "scales": scales(rng, 8, ROWS),
        "qzeros": scales(rng, 8, ROWS),
    }


def gptq(
    rng: np.random.Generator,
    bits: int,
    group: int = 64,
    stored: Zeros = Zeros.AS_STORED,
    *,
    planar: bool = False,
    zeros: bool = True,
    dtype: str = "F16",
) -> Case:
    groups = COLUMNS // group
    tensors = {
        "qweight": random_words(rng, COLUMNS * bits // 32, ROWS),
        "scales": scales(rng, groups, ROWS, dtype=np.float16 if dtype == "F16" else BF16),
    }
    if zeros:
        tensors["qzeros"] = random_words(rng, groups, ROWS * bits // 32)
    packing = Gptq(ROWS, COLUMNS, bits, group, not zeros, dtype, planar, stored, has_zeros=zeros)
    return packing, tensors


def compressed(
    rng: np.random.Generator, bits: int, zeros: CtZeros, *, padded: bool, matrix: int = ROWS
) -> Case:
    """Matrices of 64 rows, where there are more than one, do not end with a word of zeros."""
    groups, experts = COLUMNS // 32, ROWS // matrix
    tensors = {
        "weight_packed": random_words(rng, ROWS, packed_words(COLUMNS, bits, padded)),
        "weight_scale": scales(rng, ROWS, groups, dtype=BF16),
    }
    if zeros is CtZeros.PACKED:
        high = packed_words(matrix, bits, padded)
        tensors["weight_zero_point"] = random_words(rng, experts * high, groups)
    symmetric = zeros is CtZeros.MIDDLE
    return CtPacked(
        ROWS, COLUMNS, bits, 32, symmetric, "BF16", matrix, 1, groups, zeros, padded
    ), tensors


def gguf(rng: np.random.Generator, name: str) -> Case:
    kind = BY_NAME[name]
    width = COLUMNS // kind.elements * kind.nbytes
    blocks = rng.integers(0, 256, (ROWS, width), np.uint8)
    each = blocks.reshape(ROWS, -1, kind.nbytes)
    if name == "MXFP4":
        each[:, :, 0] = rng.integers(100, 140, each.shape[:2])
    elif name == "NVFP4":
        each[:, :, :4] = rng.integers(0, 0x80, (*each.shape[:2], 4))
    else:  # the high bytes of float16 scales: no infinities
        at = {"Q4_0": [1], "Q4_1": [1, 3], "Q8_0": [1], "Q4_K": [1, 3], "Q6_K": [209]}[name]
        each[:, :, at] = rng.integers(0x20, 0x30, (*each.shape[:2], len(at)))
    packing = GgufBlocks(ROWS, COLUMNS, ROWS, kind.number, width)
    return packing, {"weight": blocks}


def mlx(rng: np.random.Generator, mode: str, bits: int, group: int) -> Case:
    target = Quantization(group, bits, mode)
    made = quantize(rng.standard_normal((ROWS, COLUMNS)).astype(BF16), target)
    tensors = {"weight": made.words, "scales": made.scales}
    if made.biases is not None:
        tensors["biases"] = made.biases
    return MlxRows(ROWS, COLUMNS, target, ("BF16",) * (len(tensors) - 1)), tensors


REPACKED: dict[str, Callable[[np.random.Generator], Case]] = {
    "awq": lambda rng: awq(rng, 4, 64),
    "awq, one group a row": lambda rng: awq(rng, 4, 256),
    "awq, no zeros": lambda rng: awq(rng, 4, 32, zeros=False),
    "awq, 8 bits": lambda rng: awq(rng, 8, 64),
    "awq, 5 bits": lambda rng: awq(rng, 5, 64),
    "awq, 7 bits": lambda rng: awq(rng, 7, 64),
    "awq gemv": awq_gemv,
    "awq gemv_fast": awq_fast,
    "gptq": lambda rng: gptq(rng, 4),
    "gptq v1": lambda rng: gptq(rng, 4, 128, Zeros.PLUS_ONE),
    "gptq v1 by words": lambda rng: gptq(rng, 4, 32, Zeros.WORD_PLUS_ONE),
    "gptq, 2 bits": lambda rng: gptq(rng, 2, 64, Zeros.PLUS_ONE),
    "gptq, 3 bits": lambda rng: gptq(rng, 3, 64, Zeros.WORD_PLUS_ONE),
    "gptq, 8 bits": lambda rng: gptq(rng, 8, 256),
    "gptq, no zeros, bfloat16": lambda rng: gptq(rng, 4, zeros=False, dtype="BF16"),
    "gptq, planes of 7 bits": lambda rng: gptq(rng, 7, planar=True, zeros=False),
    "gptq, planes of 5 bits": lambda rng: gptq(rng, 5, planar=True, zeros=False),
    "compressed-tensors": lambda rng: compressed(rng, 4, CtZeros.MIDDLE, padded=False),
    "compressed-tensors, 3 bits, padded": lambda rng: compressed(
        rng, 3, CtZeros.MIDDLE, padded=True
    ),
    "compressed-tensors, zeros": lambda rng: compressed(
        rng, 4, CtZeros.PACKED, padded=False, matrix=24
    ),
    "compressed-tensors, zeros, 6 bits, padded": lambda rng: compressed(
        rng, 6, CtZeros.PACKED, padded=True, matrix=64
    ),
    "Q4_0": lambda rng: gguf(rng, "Q4_0"),
    "Q4_1": lambda rng: gguf(rng, "Q4_1"),
    "Q8_0": lambda rng: gguf(rng, "Q8_0"),
    "Q4_K": lambda rng: gguf(rng, "Q4_K"),
    "MXFP4": lambda rng: gguf(rng, "MXFP4"),
    "NVFP4": lambda rng: gguf(rng, "NVFP4"),
}
DECODED: dict[str, Callable[[np.random.Generator], Case]] = {
    "affine": lambda rng: mlx(rng, "affine", 3, 64),
    "mxfp4": lambda rng: mlx(rng, "mxfp4", 4, 32),
    "mxfp8": lambda rng: mlx(rng, "mxfp8", 8, 32),
    "nvfp4": lambda rng: mlx(rng, "nvfp4", 4, 16),
    "Q6_K": lambda rng: gguf(rng, "Q6_K"),
    "Q4_0": lambda rng: gguf(rng, "Q4_0"),
}


@pytest.fixture
def files(tmp_path: Path) -> Iterator[Callable[[dict[str, np.ndarray]], Files]]:
    opened: list[Files] = []

    def make(tensors: dict[str, np.ndarray]) -> Files:
        opened.append(Files(tmp_path, tensors))
        return opened[-1]

    yield make
    for each in opened:
        each.close()


def step_of(
    files: Files, packing: Packing, operation: Operation, dtype: str = "F16", above: int = 32
) -> Step:
    """All rows of a packing, with so many rows above them in the output."""
    target: Quantization | None = getattr(packing, "encoding", None)
    encode = None
    if operation is Operation.RECODE:
        target = Quantization.affine(32, 8)
        encode = EncodeParams(target=target)
    elif operation is Operation.DECODE:
        target = None
    high = ROWS + above
    infos = {"weight": TensorInfo(dtype, (high, COLUMNS))}
    if target is not None:
        groups = high, COLUMNS // target.group_size
        infos = {"weight": TensorInfo("U32", (high, COLUMNS * target.bits // 32))}
        infos["scales"] = TensorInfo(dtype if target.mode.has_biases else "U8", groups)
        if target.mode.has_biases:
            infos["biases"] = infos["scales"]
    placed, offset = {}, 40
    for role, info in infos.items():
        placed[role] = OutputTensor(f"w.{role}", info, "out", offset)
        offset += info.nbytes + 8
    return Step(
        layer="w",
        operation=operation,
        rows=RowMapping(count=ROWS, columns=COLUMNS, output_row=above),
        inputs=files.inputs,
        outputs=placed,
        encode=encode,
        repack=target if operation is Operation.REPACK else None,
        dtype=dtype,
        packing=packing,
    )


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
