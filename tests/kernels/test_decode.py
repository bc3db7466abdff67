"""Values behind stored codes, against NumPy with each rounding written out."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from requant.errors import UnknownValueError, UnsupportedDtypeError
from requant.kernels import decode
from tests.support.inputs import DTYPES, assert_same_bits
from tests.support.reference import F32, decode_e4m3, rounded

MANY = settings(max_examples=40)
SEEDS = st.integers(0, 2**32 - 1)
NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
FN, FNUZ = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e4m3fnuz


def floats(rng, *shape):
    """Magnitudes over the whole range of every dtype, subnormals and overflows included."""
    powers = np.exp2(rng.integers(-140, 120, shape) * rng.choice([0.05, 0.2, 1.0]))
    with np.errstate(over="ignore"):
        return (rng.standard_normal(shape) * powers).astype(np.float32)


def empty(dtype, rows, columns):
    return np.full((rows, columns), 0x5A5A).astype(dtype)


# ---------------------------------------------------------------- integers
@MANY
@given(
    rows=st.integers(0, 9),
    columns=st.integers(1, 200),
    group=st.integers(1, 220),
    dtype=st.sampled_from(DTYPES),
    difference=st.sampled_from(DTYPES),
    whole=st.booleans(),
    seed=SEEDS,
)
def test_integer_values(rows, columns, group, dtype, difference, whole, seed):
    rng = np.random.default_rng(seed)
    groups = -(-columns // group)
    codes = rng.integers(0, 256, (rows, columns), dtype=np.uint8)
    scales = floats(rng, rows, groups)
    zeros = rng.integers(0, 256, (rows, groups)).astype(np.float32)
    if not whole:
        zeros = (zeros + rng.random(zeros.shape)).astype(np.float32)
    out = empty(dtype, rows, columns)
    decode.integer_values_into(codes, scales, zeros, group, out, difference=NAMES[difference.name])
    of = np.arange(columns) // group
    distance = rounded(codes.astype(np.float32) - zeros[:, of], difference)
    assert_same_bits(out, (distance * scales[:, of]).astype(dtype))


def test_a_difference_in_bfloat16_is_rounded():
    """201 - 0.5 = 200.5 is a tie of two bfloat16 numbers; the even one is 200."""
    codes, one = np.array([[201]], np.uint8), np.ones((1, 1), np.float32)
    out = empty(F32, 1, 1)
    for name, value in (("F32", 200.5), ("F16", 200.5), ("BF16", 200.0)):
        decode.integer_values_into(codes, one, one / 2, 1, out, difference=name)
        assert out.tolist() == [[value]]


# ---------------------------------------------------------------- float8
@MANY
@given(
    rows=st.integers(0, 40),
    columns=st.integers(1, 200),
    block=st.tuples(st.integers(1, 50), st.integers(1, 220)),
    first_row=st.integers(0, 60),
    dtype=st.sampled_from(DTYPES),
    fnuz=st.booleans(),
    seed=SEEDS,
)
def test_e4m3_values(rows, columns, block, first_row, dtype, fnuz, seed):
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, (rows, columns), dtype=np.uint8)
    scales = floats(rng, -(-(first_row + rows) // block[0]) + 1, -(-columns // block[1]))
    out = empty(dtype, rows, columns)
    nans = decode.e4m3_values_into(codes, scales, *block, out, first_row=first_row, fnuz=fnuz)
    elements = codes.view(FNUZ if fnuz else FN).astype(np.float32)
    of_row = (first_row + np.arange(rows)) // block[0]
    of_column = np.arange(columns) // block[1]
    assert_same_bits(out, (elements * scales[np.ix_(of_row, of_column)]).astype(dtype))
    assert nans == np.count_nonzero(np.isnan(elements))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_byte(dtype):
    """The decoder written from the format's description, and the halves of the FNUZ variant."""
    codes = np.arange(256, dtype=np.uint8).reshape(1, 256)
    one = np.ones((1, 1), np.float32)
    out = empty(dtype, 1, 256)
    assert decode.e4m3_values_into(codes, one, 1, 256, out) == 2
    expected = decode_e4m3(codes)
    assert_same_bits(out, expected.astype(dtype))
    assert decode.e4m3_values_into(codes.view(FN), one, 1, 256, out, fnuz=True) == 1
    finite = ~np.isnan(expected)
    finite[0, 0x80] = False
    assert_same_bits(out[finite], (expected[finite] / 2).astype(dtype))
    assert out[0, 0x7F] == 240.0
    assert out[0, 0xFF] == -240.0
    assert np.isnan(out[0, 0x80])


def test_deepseek_block_written_by_hand():
    """Byte 0x3a is 1.25; with scale 0x3c4985f0 the bfloat16 value is 0x3c7c."""
    scales = np.array([[0x3C4985F0]], np.uint32).view(np.float32)
    out = empty(ml_dtypes.bfloat16, 1, 1)
    decode.e4m3_values_into(np.array([[0x3A]], np.uint8), scales, 128, 128, out)
    assert out.view(np.uint16).tolist() == [[0x3C7C]]


def test_many_nan_bytes_are_counted():
    codes = np.full((3, 1000), 0xFF, np.uint8)
    codes[1, ::7] = 0x80
    out = empty(F32, 3, 1000)
    assert decode.e4m3_values_into(codes, np.ones((1, 1), np.float32), 3, 1000, out) == 3000 - 143


# ---------------------------------------------------------------- 4-bit codes
@MANY
@given(
    rows=st.integers(0, 5),
    columns=st.integers(1, 150),
    half_block=st.sampled_from([1, 8, 32, 200]),
    first=st.integers(0, 199),
    high_first=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=SEEDS,
)
def test_lut_values(rows, columns, half_block, first, high_first, dtype, seed):
    """Blocks run on from row to row; a range of rows may begin within one."""
    rng = np.random.default_rng(seed)
    block, count = 2 * half_block, rows * columns * 2
    first = 2 * (first % half_block)
    codes = rng.integers(0, 256, (rows, columns), dtype=np.uint8)
    book, absmax = floats(rng, 16), floats(rng, -(-(first + count) // block))
    out = empty(dtype, rows, 2 * columns)
    decode.lut_values_into(codes, book, absmax, block, out, first=first, high_first=high_first)
    nibbles = np.stack([codes >> 4, codes & 15], axis=-1)
    nibbles = (nibbles if high_first else nibbles[..., ::-1]).reshape(-1)
    scale = absmax[(first + np.arange(count)) // block]
    assert_same_bits(out, (book[nibbles] * scale).astype(dtype).reshape(out.shape))


def test_nf4_byte_written_by_hand():
    """Byte 0x6a: -0.09105 A, then +0.24611 A."""
    nf4 = [-1, -0.69619, -0.52507, -0.39492, -0.28444, -0.18477, -0.09105, 0]
    nf4 += [0.07958, 0.16093, 0.24611, 0.33792, 0.44071, 0.56262, 0.72296, 1]
    book, two = np.array(nf4, np.float32), np.full(1, 2, np.float32)
    out = empty(F32, 1, 2)
    decode.lut_values_into(np.array([[0x6A]], np.uint8), book, two, 64, out)
    assert_same_bits(out, np.array([[-0.09105, 0.24611]], np.float32) * 2)


# ---------------------------------------------------------------- scales and biases
def test_scale_bytes():
    every = np.arange(256, dtype=np.uint8).reshape(2, 128)
    e8m0 = decode.scale_values(every, "F8_E8M0").ravel()
    assert_same_bits(e8m0[:255], np.exp2(np.arange(255.0) - 127).astype(np.float32))
    assert np.isnan(e8m0[255])
    assert_same_bits(decode.scale_values(every.view(FN), "F8_E4M3"), decode_e4m3(every))
    fnuz = decode.scale_values(every, "F8_E4M3FNUZ")
    assert_same_bits(fnuz, every.view(FNUZ).astype(np.float32))
    assert decode.scale_values(np.array([0x7A], np.uint8), "F8_E8M0").tolist() == [2.0**-5]
    with pytest.raises(UnknownValueError, match="F8_E5M2"):
        decode.scale_values(every, "F8_E5M2")


# ---------------------------------------------------------------- rejections
def test_wrong_arguments_are_rejected():
    codes, one = np.zeros((4, 64), np.uint8), np.ones((4, 1), np.float32)
    out = empty(F32, 4, 64)
    for call, message in (
        (lambda: decode.integer_values_into(codes, one, one, 32, out), r"scales: expected shape"),
        (lambda: decode.integer_values_into(codes, one, one[:3], 64, out), "zeros: expected shape"),
        (lambda: decode.integer_values_into(codes, one, one, 0, out), "group: expected 1 or more"),
        (
            lambda: decode.integer_values_into(codes, one, one, 64, out[:, :32]),
            r"out: expected shape \(4, 64\), got \(4, 32\)",
        ),
        (
            lambda: decode.integer_values_into(codes, one, one, 64, out, difference="F64"),
            "expected F32, F16 or BF16, got F64",
        ),
        (
            lambda: decode.e4m3_values_into(codes, one, 1, 64, out, first_row=1),
            r"scales: row 4 in blocks of 1 lies beyond shape \(4, 1\)",
        ),
        (lambda: decode.e4m3_values_into(codes, one, 1, 0, out), "block_cols: expected 1 or more"),
        (lambda: decode.e4m3_values_into(codes, one, 1, 64, out, first_row=-1), "first_row"),
        (lambda: decode.e4m3_values_into(codes[:, ::2], one, 1, 64, out), "C-contiguous"),
        (
            lambda: decode.lut_values_into(codes, one[:, 0].copy(), one, 64, out),
            "codebook: expected 16",
        ),
        (
            lambda: decode.lut_values_into(codes[:2], np.ones(16, np.float32), one[:3], 64, out),
            "absmax: 256 values from number 0 of a block of 64 on need 4, got 3",
        ),
        (
            lambda: decode.lut_values_into(codes, np.ones(16, np.float32), one, 64, out),
            "out: expected shape",
        ),
        (
            lambda: decode.lut_values_into(codes, np.ones(16, np.float32), one, 64, out, first=64),
            "first: expected 0 to block - 1",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(UnsupportedDtypeError, match="scales"):
        decode.e4m3_values_into(codes, one.astype(np.float16), 1, 64, out)
    with pytest.raises(UnsupportedDtypeError, match="out"):
        decode.e4m3_values_into(codes, one, 1, 64, out.astype(np.float64))
