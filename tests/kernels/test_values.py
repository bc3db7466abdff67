"""Packing, casts, checks for non-finite values, and the rules of the bindings."""

import ctypes
import os
import platform
import subprocess
import sys
import threading

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from requant.kernels import _native
from requant.kernels import cast as values
from requant.kernels.quantize import pack_words, unpack_words
from tests.support import reference
from tests.support.inputs import DTYPES, assert_same_bits, bits, finite_inputs, nonfinite_inputs

NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
MANY = settings(max_examples=60)


@MANY
@given(
    width=st.integers(1, 8),
    rows=st.integers(0, 5),
    runs=st.integers(0, 9),
    seed=st.integers(0, 2**32 - 1),
)
def test_pack_and_unpack(width, rows, runs, seed):
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 2**width, (rows, 32 * runs), dtype=np.uint8)
    words = pack_words(codes, width)
    assert_same_bits(words, reference.pack(codes, width))
    assert_same_bits(unpack_words(words, width), codes)
    assert_same_bits(pack_words(codes.astype(np.uint32), width), words)


def test_three_bit_codes_cross_bytes():
    """Codes c0..c7 in three bytes: c2[1:0] c1 c0, c5[0] c4 c3 c2[2], c7 c6 c5[2:1]."""
    codes = np.zeros((1, 32), np.uint8)
    codes[0, :8] = 1, 2, 7, 4, 5, 6, 3, 0
    expected = [0b11_010_001, 0b0_101_100_1, 0b000_011_11]
    assert pack_words(codes, 3).view(np.uint8)[0, :3].tolist() == expected


def test_bits_above_the_width_are_dropped():
    codes = np.full((1, 32), 0xFF, np.uint8)
    codes[0, 1::2] = 0xF0
    assert pack_words(codes, 4).tolist() == [[0x0F0F0F0F] * 4]


def test_last_run_of_a_buffer_is_not_overrun():
    """Eight spare bytes behind the words stay as they were."""
    for width in range(1, 9):
        buffer = np.full(width + 2, 0xDEADBEEF, np.uint32)
        words = buffer[:width].reshape(1, width)
        _native.pack_words(np.full((1, 32), 0xFF, np.uint8), width, words)
        assert (words == 0xFFFFFFFF).all()
        assert (buffer[width:] == 0xDEADBEEF).all()


# ---------------------------------------------------------------- values
def all_values(dtype):
    if dtype.itemsize == 2:
        return np.arange(65536, dtype=np.uint16).view(dtype)
    some = [v.ravel() for v in (*finite_inputs(dtype).values(), *nonfinite_inputs(dtype).values())]
    return np.concatenate(some)


@pytest.mark.parametrize("dst", DTYPES)
@pytest.mark.parametrize("src", DTYPES)
def test_cast(src, dst):
    x = all_values(src)
    y = np.empty(x.shape, dst)
    overflows = _native.cast(bits(x), NAMES[src.name], bits(y), NAMES[dst.name])
    expected = x.astype(np.float32).astype(dst)
    assert_same_bits(y, expected)
    finite = np.isfinite(x.astype(np.float32))
    assert overflows == np.count_nonzero(finite & np.isinf(expected.astype(np.float32)))


def test_cast_halfway_values():
    x = np.arange(0, 2**32, 2**11 - 3, dtype=np.uint64).astype(np.uint32)
    ties = np.concatenate(
        [np.arange(65536, dtype=np.uint32) << 16 | low for low in (0x7FFF, 0x8000, 0x8001)]
        + [np.arange(2**19, dtype=np.uint32) << 13 | low for low in (0xFFF, 0x1000, 0x1001)]
    )
    for dst in DTYPES[1:]:
        for source in (x, ties):
            out = np.empty(source.shape, np.uint16)
            _native.cast(source, "F32", out, NAMES[dst.name])
            assert_same_bits(out.view(dst), source.view(np.float32).astype(dst))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nonfinite(dtype):
    name = NAMES[dtype.name]
    clean = np.concatenate([v.ravel() for v in finite_inputs(dtype).values()])
    assert _native.count_nonfinite(bits(clean), name) == 0
    assert _native.first_nonfinite(bits(clean), name) == -1
    rng = np.random.default_rng(0)
    for value in (np.inf, -np.inf, np.nan):
        spots = np.sort(rng.choice(clean.size, 7, replace=False))
        nonfinite = clean.copy()
        nonfinite[spots] = value
        assert _native.count_nonfinite(bits(nonfinite), name) == 7
        assert _native.first_nonfinite(bits(nonfinite), name) == spots[0]
        nonfinite = nonfinite.reshape(2, -1)
        assert _native.count_nonfinite(bits(nonfinite), name) == 7
    everything = all_values(dtype)
    count = np.count_nonzero(~np.isfinite(everything.astype(np.float32)))
    assert _native.count_nonfinite(bits(everything), name) == count


@pytest.mark.parametrize("dst", DTYPES)
def test_cast_into_counts_overflows(dst):
    """From float64 too, which NumPy rounds."""
    largest = 65504.0 if dst.name == "float16" else float(np.float32(3e38))
    wide = np.array([[1.0, -2.5, np.inf, -np.inf, largest, 0.1]])
    for src in (np.dtype(np.float64), np.dtype(np.float32)):
        source = wide.astype(src)
        target = np.empty(source.shape, dst)
        assert values.cast_into(source, target) == 0
        assert_same_bits(target, source.astype(dst))
    if dst.itemsize == 2:
        tops = np.array([65520.0, -1e6] if dst.name == "float16" else [3.4e38, -3.4e38], np.float32)
        for source in (tops, tops.astype(np.float64)):
            assert values.cast_into(source, np.empty(2, dst)) == 2


# ---------------------------------------------------------------- bindings
def words(rows, cols):
    return np.empty((rows, cols), np.uint32)


def halves(rows, cols):
    return np.zeros((rows, cols), np.uint16)


GOOD = {
    **{"w": halves(2, 64), "dtype": "BF16", "group_size": 64, "bits": 4, "words": words(2, 8)},
    **{"scales": halves(2, 1), "biases": halves(2, 1)},
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w": halves(2, 64).astype(np.uint32)}, "w: expected uint16, got uint32"),
        ({"w": halves(2, 64).astype(np.int16)}, "w: expected uint16, got int16"),
        ({"w": halves(64, 2).T}, "w: expected a C-contiguous array"),
        ({"w": halves(2, 128)[:, ::2]}, "w: expected a C-contiguous array"),
        ({"w": np.zeros(64, np.uint16)}, r"w: expected 2 axes, got shape \(64,\)"),
        ({"w": halves(2, 48)}, "48 columns are not a multiple of 64"),
        ({"dtype": "F64"}, "dtype: expected F32, F16 or BF16, got F64"),
        ({"group_size": 0}, "group_size: expected 32, 64 or 128, got 0"),
        ({"bits": 7}, "bits: expected"),
        ({"bits": -1}, "bits: expected"),
        ({"words": words(2, 9)}, r"words: expected shape \(2, 8\), got \(2, 9\)"),
        ({"words": words(8, 2).T}, "words: expected a C-contiguous array"),
        ({"scales": halves(1, 2)}, r"scales: expected shape \(2, 1\), got \(1, 2\)"),
        ({"biases": words(2, 1)}, "biases: expected uint16, got uint32"),
    ],
)
def test_affine_quantize_rejects(change, message):
    with pytest.raises(ValueError, match=message):
        _native.affine_quantize(**{**GOOD, **change})


def test_read_only_output_is_rejected():
    frozen = words(2, 8)
    frozen.flags.writeable = False
    with pytest.raises(TypeError):
        _native.affine_quantize(**{**GOOD, "words": frozen})


def test_read_only_input_is_fine():
    w = halves(2, 64)
    w.flags.writeable = False
    _native.affine_quantize(**{**GOOD, "w": w})


def test_other_kernels_reject():
    byte = np.zeros((2, 2), np.uint8)
    with pytest.raises(ValueError, match="mode: expected mxfp4 or mxfp8, got mxfp6"):
        _native.mx_quantize(halves(2, 64), "F16", "mxfp6", words(2, 8), byte)
    with pytest.raises(ValueError, match=r"out: expected shape \(2, 64\), got \(2, 32\)"):
        _native.mx_dequantize(words(2, 8), byte, "mxfp4", halves(2, 32), "F16")
    with pytest.raises(ValueError, match="the result is F32, got BF16"):
        _native.nvfp4_dequantize(words(2, 4), byte, halves(2, 32), "BF16", 1.0)
    with pytest.raises(ValueError, match="bits: expected 1 to 8, got 9"):
        _native.pack_words(np.zeros((1, 32), np.uint8), 9, words(1, 9))
    with pytest.raises(ValueError, match="dst: expected shape"):
        _native.cast(np.zeros(3, np.uint16), "F16", np.zeros(4, np.uint16), "BF16")
    with pytest.raises(ValueError, match="isa: expected one of baseline"):
        _native.set_isa("mmx")


@pytest.mark.slow
def test_isa_from_the_environment(isa):
    code = "from requant.kernels import _native; print(_native.isa())"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "REQUANT_ISA": isa, "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == isa


def test_row_chunks_and_threads_change_nothing():
    rng = np.random.default_rng(1)
    w = bits(rng.standard_normal((64, 256)).astype(ml_dtypes.bfloat16))
    whole = words(64, 24), halves(64, 4), halves(64, 4)
    _native.affine_quantize(w, "BF16", 64, 3, *whole)
    parts = words(64, 24), halves(64, 4), halves(64, 4)

    def work(start):
        for row in range(start, 64, 4):
            _native.affine_quantize(
                w[row : row + 1], "BF16", 64, 3, *(part[row : row + 1] for part in parts)
            )

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(whole, parts, strict=True):
        assert_same_bits(one, other)


@pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"),
    reason="sets the register through Linux's C library, in its x86-64 layout",
)
def test_subnormals_survive_a_thread_that_flushes_them():
    """A library may have left the thread flushing subnormals to zero: not ours to obey."""
    zero, tiny = np.zeros((1, 8), np.uint32), np.full((1, 1), 5e-39, np.float32)
    out = np.empty((1, 32), np.uint32)
    libm = ctypes.CDLL("libm.so.6")
    before = ctypes.create_string_buffer(64)
    assert libm.fegetenv(before) == 0
    flushing = ctypes.create_string_buffer(before.raw, 64)
    mxcsr = int.from_bytes(before.raw[28:32], "little")  # behind the x87 part
    flushing[28:32] = (mxcsr | 0x8040).to_bytes(4, "little")  # flush results and operands
    libm.fesetenv(flushing)
    try:
        _native.affine_dequantize(zero, bits(tiny), "F32", bits(tiny), "F32", 32, 8, out, "F32")
        after = ctypes.create_string_buffer(64)
        libm.fegetenv(after)
    finally:
        libm.fesetenv(before)
    assert (out == bits(tiny)[0, 0]).all()
    assert int.from_bytes(after.raw[28:32], "little") & 0x8040 == 0x8040  # and put back
