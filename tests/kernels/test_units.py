"""Rows from files or arrays to files or arrays: bytes of the kernels, errors against float64."""

import errno
import os
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from requant.kernels import units
from requant.kernels.quantize import QuantizedTensors, dequantize, quantize, quantize_into
from requant.kernels.units import (
    BlockScales,
    FileBytes,
    FilePlace,
    Found,
    RowEncoding,
    StopFlag,
    Stopped,
    StoredRows,
    UnitFileError,
)
from requant.quantization.config import Quantization
from tests.support.inputs import DTYPES, assert_same_bits

NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
BF16 = np.dtype(ml_dtypes.bfloat16)
FOUR_BITS = Quantization(64, 4, "affine")
MODES = [
    FOUR_BITS,
    Quantization(32, 3, "affine"),
    Quantization(128, 8, "affine"),
    Quantization(32, 4, "mxfp4"),
    Quantization(32, 8, "mxfp8"),
    Quantization(16, 4, "nvfp4"),
]
MANY = settings(max_examples=40)


def room(shape: tuple[int, int], dtype: np.dtype, target: Quantization) -> list[np.ndarray]:
    """Arrays for words, scales and perhaps biases, of ones."""
    made = quantize(np.zeros(shape, dtype), target)
    return [np.full_like(array, 1) for array in made if array is not None]


def encode(
    w: np.ndarray, encoding: RowEncoding, block_bytes: int = units.BLOCK_BYTES
) -> tuple[list[np.ndarray], Found]:
    dtype = {name: x for x, name in zip(DTYPES, map(NAMES.get, map(str, DTYPES)), strict=True)}
    out = room(w.shape, dtype[encoding.dtype], encoding.target)
    stored = StoredRows(NAMES[w.dtype.name], *w.shape)
    return out, units.encode_rows(w, stored, out, encoding, block_bytes=block_bytes)


def normal(rows: int, columns: int, dtype: np.dtype, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(dtype)


@pytest.mark.parametrize("target", MODES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_block_gives_the_bytes_of_the_kernel(target: Quantization, dtype: np.dtype) -> None:
    w = normal(37, 256, dtype)
    expected = [x for x in quantize(w, target) if x is not None]
    decoded = dequantize(QuantizedTensors(*expected), target, dtype=dtype).astype(np.float64)
    wide, steps = w.astype(np.float64), scale_steps(expected[1], target)
    error = np.abs(wide - decoded).reshape(*steps.shape, target.group_size).max(-1)
    for block_bytes in (0, 1, 5000, 1 << 20):
        out, found = encode(w, RowEncoding(target, NAMES[dtype.name]), block_bytes)
        for mine, theirs in zip(out, expected, strict=True):
            assert_same_bits(mine, theirs)
        assert found[:4] == (0, -1, 0, 0)
        assert found.squared_error == pytest.approx(((wide - decoded) ** 2).sum(), rel=1e-6)
        assert found.squared_values == pytest.approx((wide**2).sum(), rel=1e-6)
        ratio = np.divide(error, steps, out=np.zeros_like(error), where=steps > 0)
        assert found.max_error_steps == pytest.approx(ratio.max(), rel=1e-6)


def scale_steps(scales: np.ndarray, target: Quantization) -> np.ndarray:
    """The distance of neighbouring codes, or the value of element 1.0."""
    if target.mode.value == "nvfp4":
        return scales.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    if scales.dtype == np.uint8:
        return scales.view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    return np.abs(scales.astype(np.float64))


@pytest.mark.parametrize("target", MODES, ids=str)
@pytest.mark.parametrize("level", ["fast", "best"])
def test_a_search_takes_the_weights(target: Quantization, level: str) -> None:
    w = normal(5, 128, BF16)
    weights = np.random.default_rng(1).random(128).astype(np.float32)
    out, _ = encode(w, RowEncoding(target, "BF16", level, weights), 700)
    for mine, theirs in zip(out, quantize(w, target, search=level, weights=weights), strict=False):
        assert_same_bits(mine, theirs)
    if target == FOUR_BITS:
        unweighted, _ = encode(w, RowEncoding(target, "BF16", level), 700)
        assert any((a != b).any() for a, b in zip(out, unweighted, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_are_cast_first(dtype: np.dtype) -> None:
    w = normal(9, 64, np.dtype(np.float32))
    out, found = encode(w, RowEncoding(FOUR_BITS, NAMES[dtype.name]), 300)
    for mine, theirs in zip(out, quantize(w.astype(dtype), FOUR_BITS), strict=True):
        assert_same_bits(mine, theirs)
    assert found.overflowed == 0


@pytest.mark.parametrize("fnuz", [False, True])
@pytest.mark.parametrize("target", [FOUR_BITS, MODES[3]], ids=str)
def test_bytes_are_decoded_first(target: Quantization, fnuz: bool) -> None:
    """Blocks of 4 rows and 48 columns; the first row is the fourth of its block."""
    rng = np.random.default_rng(2)
    kind = np.dtype(ml_dtypes.float8_e4m3fnuz if fnuz else ml_dtypes.float8_e4m3fn)
    stored = rng.standard_normal((10, 128)).astype(kind)
    scales = (rng.random((4, 3)) + 0.5).astype(np.float32)
    wide = stored.astype(np.float32) * scales[(np.arange(10) + 3) // 4][:, np.arange(128) // 48]
    expected = [x for x in quantize(wide.astype(BF16), target) if x is not None]
    rows = StoredRows("F8_E4M3FNUZ" if fnuz else "F8_E4M3", 10, 128, BlockScales(scales, 4, 48, 3))
    for block_bytes in (0, 700, 1 << 20):
        out = room(wide.shape, BF16, target)
        encoding = RowEncoding(target, "BF16")
        found = units.encode_rows(stored, rows, out, encoding, block_bytes=block_bytes)
        for mine, theirs in zip(out, expected, strict=True):
            assert_same_bits(mine, theirs)
        squares = (wide.astype(BF16).astype(np.float64) ** 2).sum()
        assert found.squared_values == pytest.approx(squares, rel=1e-6)
    bad = stored.copy()
    bad[7, 1] = np.nan
    found = units.encode_rows(bad, rows, out, encoding, block_bytes=0)
    assert (found.nonfinite, found.first_nonfinite_row) == (1, 7)


def test_blocks_that_are_not_numbers_are_counted_and_left_out() -> None:
    w = normal(8, 64, np.dtype(np.float32))
    w[3, 5], w[3, 9], w[6, 0] = np.nan, np.inf, 1e30  # the last overflows float16
    out, found = encode(w, RowEncoding(FOUR_BITS, "F16"), 256)  # blocks of one row
    assert found[:4] == (3, 3, 1, 0)
    expected = quantize(w.astype(np.float16), FOUR_BITS)
    for mine, theirs in zip(out, expected, strict=True):
        assert not mine[[3, 6]].any()
        assert_same_bits(np.delete(mine, [3, 6], 0), np.delete(theirs, [3, 6], 0))
    good = np.delete(w, [3, 6], 0).astype(np.float16).astype(np.float64)
    assert found.squared_values == pytest.approx((good**2).sum(), rel=1e-6)


def test_groups_too_small_for_a_scale_are_counted() -> None:
    w = np.full((3, 64), 1e-40, np.float32)
    assert encode(w, RowEncoding(MODES[3], "F32"), 300)[1].flushed_groups == 6


def test_codes_that_are_there_are_only_measured() -> None:
    target, w = FOUR_BITS, normal(6, 64, BF16)
    out = room(w.shape, BF16, target)
    quantize_into(w[::-1].copy(), target, QuantizedTensors(*out))
    before = [array.copy() for array in out]
    encoding = RowEncoding(target, "BF16")
    found = units.encode_rows(w, StoredRows("BF16", *w.shape), out, encoding, is_encoded=True)
    for mine, theirs in zip(out, before, strict=True):
        assert_same_bits(mine, theirs)
    decoded = dequantize(QuantizedTensors(*out), target).astype(np.float64)
    expected = ((w.astype(np.float64) - decoded) ** 2).sum()
    assert found.squared_error == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("target", "byte", "step"),
    [(MODES[3], 124, 0.125), (MODES[4], 130, 8.0), (MODES[5], 0x28, 0.25)],
)
def test_step_of_a_scale_byte(target: Quantization, byte: int, step: float) -> None:
    """Words of zero are zeros, so the error is the value."""
    w = np.zeros((1, target.group_size), np.float32)
    w[0, 5] = 0.5
    out = room(w.shape, w.dtype, target)
    out[0][:], out[1][:] = 0, byte
    encoding = RowEncoding(target, "F32")
    found = units.encode_rows(w, StoredRows("F32", *w.shape), out, encoding, is_encoded=True)
    assert (found.squared_error, found.max_error_steps) == (0.25, 0.5 / step)


@pytest.mark.parametrize("by_magnitude", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_errors_take_the_weights_of_a_search(dtype: np.dtype, by_magnitude: bool) -> None:
    w, columns = normal(11, 64, dtype), np.linspace(0, 2, 64).astype(np.float32)
    name = NAMES[dtype.name]
    encoding = RowEncoding(FOUR_BITS, name, "fast", weights=columns, by_magnitude=by_magnitude)
    out, found = encode(w, encoding, 300)
    decoded = dequantize(QuantizedTensors(*out), FOUR_BITS).astype(np.float64)
    wide, weights = w.astype(np.float64), columns / 2.0  # the largest counts 1
    if by_magnitude:  # rows are one group each
        means = np.abs(wide).mean(-1, keepdims=True)
        weights = weights * (np.abs(wide) / means + 0.375)
    error, values = (weights * (wide - decoded) ** 2).sum(), (weights * wide**2).sum()
    assert found.weighted_error == pytest.approx(error, rel=1e-6)
    assert found.weighted_values == pytest.approx(values, rel=1e-6)


# ---------------------------------------------------------------- files
class Files:
    """A file with some bytes, and one of zeros."""

    def __init__(self, folder: Path, data: bytes) -> None:
        (folder / "in").write_bytes(data)
        self.source = os.open(folder / "in", os.O_RDONLY)
        self.path = folder / "out"
        self.target = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("units")


@pytest.fixture
def files(folder: Path) -> Iterator[type[Files]]:
    opened: list[Files] = []

    class Kept(Files):
        def __init__(self, data: bytes) -> None:
            super().__init__(folder, data)
            opened.append(self)

    yield Kept  # type: ignore[misc]
    for each in opened:
        os.close(each.source)
        os.close(each.target)


def pieces(draw: st.DrawFn, nbytes: int) -> list[int]:
    """Borders of ranges, which may be empty, and split values."""
    return [0, *sorted(draw(st.lists(st.integers(0, nbytes), max_size=3))), nbytes]


@MANY
@given(data=st.data(), rows=st.integers(0, 9), block_bytes=st.sampled_from([0, 300, 1 << 20]))
def test_rows_pass_from_files_to_files(
    data: st.DataObject, rows: int, block_bytes: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    w, gap = normal(rows, 64, BF16, seed=rows), 5
    borders = data.draw(st.composite(pieces)(w.nbytes))
    stored, ranges = bytearray(), []
    for start, stop in pairwise(borders):
        stored += b"?" * gap
        ranges.append((len(stored), stop - start))
        stored += w.tobytes()[start:stop]
    files = Files(tmp_path_factory.mktemp("rows"), bytes(stored))
    try:
        source = [FileBytes(files.source, *part) for part in ranges]
        expected = [x.tobytes() for x in quantize(w, FOUR_BITS) if x is not None]
        places, at = [], 3
        for part in expected:
            places.append(at)
            at += len(part) + gap
        targets = [FilePlace(files.target, place) for place in places]
        encoding = RowEncoding(FOUR_BITS, "BF16")
        found = units.encode_rows(
            source, StoredRows("BF16", *w.shape), targets, encoding, block_bytes=block_bytes
        )
        assert found.nonfinite == 0
        image = files.path.read_bytes()
        for place, part in zip(places, expected, strict=True):
            assert image[place : place + len(part)] == part
        assert len(image) <= at
        os.ftruncate(files.target, 0)
        units.copy_rows(source, FilePlace(files.target, 7), w.nbytes, block_bytes=block_bytes)
        assert files.path.read_bytes()[7:] == w.tobytes()
        wide, flat = np.empty((w.size, 1), np.float32), StoredRows("BF16", w.size, 1)
        cast = units.decode_rows(source, flat, wide, "F32", block_bytes=block_bytes)
        assert cast == (0, 0, False)
        assert_same_bits(wide.reshape(w.shape), w.astype(np.float32))
    finally:
        os.close(files.source)
        os.close(files.target)


def test_a_cast_counts_what_overflows(files: type[Files]) -> None:
    w = np.array([1.0, 1e30, -1e30, np.inf], np.float32)
    made = files(w.tobytes())  # type: ignore[call-arg]
    source = [FileBytes(made.source, 0, w.nbytes)]
    target = FilePlace(made.target, 0)
    values = StoredRows("F32", 4, 1)
    cast = units.decode_rows(source, values, target, "F16", counts_nonfinite=True, block_bytes=4)
    assert cast == (2, 3, False)
    with np.errstate(over="ignore"):
        assert made.path.read_bytes() == w.astype(np.float16).tobytes()


def test_a_file_that_ends_too_early(files: type[Files]) -> None:
    made = files(bytes(300))  # type: ignore[call-arg]
    source = [FileBytes(made.source, 0, 100), FileBytes(made.source, 100, 412)]
    with pytest.raises(UnitFileError) as raised:
        units.copy_rows(source, FilePlace(made.target, 0), 512, block_bytes=64)
    error = raised.value
    assert (error.is_write, error.index, error.errno, error.offset) == (False, 1, 0, 300)


def test_a_file_that_cannot_be_read(files: type[Files]) -> None:
    made = files(b"")  # type: ignore[call-arg]
    write_only = os.open(made.path, os.O_WRONLY)
    try:
        with pytest.raises(UnitFileError) as raised:
            units.read_spaced(write_only, 4, 8, np.empty((2, 2), np.uint8))
    finally:
        os.close(write_only)
    assert (raised.value.is_write, raised.value.errno) == (False, errno.EBADF)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no full device")
@pytest.mark.parametrize("block_bytes", [0, 1 << 20])
def test_the_output_that_cannot_be_written_is_named(files: type[Files], block_bytes: int) -> None:
    w = normal(8, 64, BF16)
    made = files(w.tobytes())  # type: ignore[call-arg]
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        places = [FilePlace(made.target, 0), FilePlace(made.target, 0), FilePlace(full, 9)]
        with pytest.raises(UnitFileError, match="No space left") as raised:
            units.encode_rows(
                [FileBytes(made.source, 0, w.nbytes)],
                StoredRows("BF16", *w.shape),
                places,
                RowEncoding(FOUR_BITS, "BF16"),
                block_bytes=block_bytes,
            )
    finally:
        os.close(full)
    error = raised.value
    assert (error.is_write, error.index, error.errno) == (True, 2, errno.ENOSPC)


def test_rows_that_lie_apart(files: type[Files]) -> None:
    image = np.arange(60, dtype=np.uint8).reshape(5, 12)
    made = files(image.tobytes())  # type: ignore[call-arg]
    into = np.empty((3, 4), np.uint8)
    units.read_spaced(made.source, 12 + 3, 12, into)
    assert_same_bits(into, image[1:4, 3:7])
    with pytest.raises(UnitFileError) as raised:
        units.read_spaced(made.source, 36 + 9, 12, into)
    assert (raised.value.errno, raised.value.offset) == (0, 60)


# ---------------------------------------------------------------- stopping
@pytest.mark.parametrize("from_file", [False, True])
def test_a_flag_that_is_set_ends_every_kind_of_unit(files: type[Files], from_file: bool) -> None:
    w = normal(8, 64, BF16)
    made = files(w.tobytes())  # type: ignore[call-arg]
    ranges = [FileBytes(made.source, 0, w.nbytes)]
    row = ranges if from_file else w.reshape(-1, 1)
    target, stop = FilePlace(made.target, 0), StopFlag()
    assert not stop.is_set()
    stop.set()
    assert stop.is_set()
    with pytest.raises(Stopped):
        data = ranges if from_file else w.view(np.uint8).reshape(1, -1)
        units.copy_rows(data, target, w.nbytes, stop=stop)
    with pytest.raises(Stopped):
        units.decode_rows(row, StoredRows("BF16", w.size, 1), target, "F32", stop=stop)
    with pytest.raises(Stopped):
        units.encode_rows(
            ranges if from_file else w,
            StoredRows("BF16", *w.shape),
            [target] * 3,
            RowEncoding(FOUR_BITS, "BF16"),
            stop=stop,
        )
    assert made.path.read_bytes() == b""


def test_a_flag_ends_a_unit_that_runs() -> None:
    """Between its first rows and its last; a busy machine may need more than one attempt."""
    w = np.tile(normal(64, 1024, BF16), (64, 1))
    encoding = RowEncoding(FOUR_BITS, "BF16", "best")

    def ends_within() -> bool:
        stop, out = StopFlag(), room(w.shape, BF16, FOUR_BITS)
        timer = threading.Timer(0.005, stop.set)
        timer.start()
        try:
            units.encode_rows(w, StoredRows("BF16", *w.shape), out, encoding, stop=stop)
        except Stopped:
            return bool((out[0][0] != 1).any() and (out[0][-1] == 1).all())
        finally:
            timer.join()
        return False

    assert any(ends_within() for _ in range(50))


# ---------------------------------------------------------------- arguments
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": np.zeros((2, 32), BF16)}, r"source: expected shape \(2, 64\), got \(2, 32\)"),
        ({"source": [(0, 0, 255)]}, "source: expected ranges of 256 bytes, got 255"),
        (
            {"source": [(0, 0, 0)], "stored": StoredRows("BF16", 1 << 58, 64)},
            r"source: \(288230376151711744, 64\) is too large",
        ),
        ({"source": [(0, 0, (1 << 64) - 1), (0, 0, 257)]}, "source: the ranges are too large"),
        ({"stored": StoredRows("BF16", 2, 63)}, "63 columns are not a multiple of 64"),
        ({"stored": StoredRows("I32", 2, 64)}, "expected F32, F16 or BF16, got I32"),
        (
            {"stored": StoredRows("F8_E4M3", 2, 64)},
            "dtype: expected F32, F16 or BF16, got F8_E4M3",
        ),
        (
            {
                "stored": StoredRows(
                    "F8_E4M3", 2, 64, BlockScales(np.ones((1, 1), np.float32), 2, 64, 1)
                )
            },
            r"block_scales: row 2 in blocks of 2 lies beyond shape \(1, 1\)",
        ),
        ({"targets": [np.zeros((2, 8), np.uint32)]}, "targets: expected 3, got 1"),
        ({"scales": np.zeros((2, 2), BF16)}, r"scales: expected shape \(2, 1\), got \(2, 2\)"),
        ({"biases": np.zeros((2, 1), np.float32)}, "biases: expected uint16, got uint32"),
        ({"words": FilePlace(0, 0), "is_encoded": True}, "targets: expected arrays with codes"),
    ],
)
def test_arguments_that_do_not_fit(change: dict[str, object], message: str) -> None:
    made = room((2, 64), BF16, FOUR_BITS)
    words, scales, biases = (
        change.get(role, array)
        for role, array in zip(("words", "scales", "biases"), made, strict=True)
    )
    source = change.get("source", np.zeros((2, 64), BF16))
    stored = change.get("stored", StoredRows("BF16", 2, 64))
    targets = change.get("targets", [words, scales, biases])
    is_encoded = bool(change.get("is_encoded"))
    with pytest.raises(ValueError, match=message):
        units.encode_rows(
            source,  # type: ignore[arg-type]
            stored,  # type: ignore[arg-type]
            targets,  # type: ignore[arg-type]
            RowEncoding(FOUR_BITS, "BF16"),
            is_encoded=is_encoded,
        )
