"""Codes moved into MLX's order, against the description of each layout in plain NumPy."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from requant.arrays import repack
from tests.native import reference
from tests.native.inputs import assert_same_bits

MANY = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
SEEDS = st.integers(0, 2**32 - 1)
INTERLEAVE = [0, 2, 4, 6, 1, 3, 5, 7]


def random_codes(seed, bits, *shape):
    return np.random.default_rng(seed).integers(0, 2**bits, shape, dtype=np.uint8)


def buffer(rows, columns, dtype=np.uint32):
    """Filled with what a kernel that forgets an element would leave."""
    return np.full((rows, columns), 0xA5, dtype)


def mlx_words(codes, bits):
    return reference.pack(codes, bits)


# ---------------------------------------------------------------- transposes


@MANY
@given(
    rows=st.integers(0, 140),
    columns=st.integers(0, 300),
    dtype=st.sampled_from([np.uint8, np.uint16, np.uint32]),
    seed=SEEDS,
)
def test_transpose(rows, columns, dtype, seed):
    rng = np.random.default_rng(seed)
    source = rng.integers(0, np.iinfo(dtype).max, (rows, columns), dtype, endpoint=True)
    out = buffer(columns, rows, dtype)
    repack.transpose_into(source, out)
    assert_same_bits(out, source.T)


def test_transpose_refuses_what_does_not_fit():
    for source, out, message in (
        (buffer(2, 3), buffer(2, 3), r"out: expected shape \(3, 2\), got \(2, 3\)"),
        (buffer(2, 3), buffer(3, 2, np.uint16), "out: expected uint32, got uint16"),
        (buffer(2, 3).view(np.float32), buffer(3, 2), "src: expected uint32, got float32"),
        (buffer(2, 3).astype(np.uint64), buffer(3, 2), "src: expected uint8, uint16 or uint32"),
        (buffer(2, 6)[:, ::2], buffer(3, 2), "src: expected a C-contiguous array"),
    ):
        with pytest.raises(ValueError, match=message):
            repack.transpose_into(source, out)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_gptq_words_are_the_transpose(bits):
    """A column of a GPTQ qweight is the bit stream of one output."""
    codes = random_codes(bits, bits, 96, 40)  # (in, out)
    qweight = np.ascontiguousarray(mlx_words(np.ascontiguousarray(codes.T), bits).T)
    out = buffer(40, 96 * bits // 32)
    repack.transpose_into(qweight, out)
    assert_same_bits(reference.unpack(out, bits), codes.T)


@pytest.mark.parametrize(
    ("bits", "codes", "words"),
    [
        (4, [1, 2, 3, 4, 5, 6, 7, 8] * 4, [0x87654321] * 4),
        (2, [0, 1, 2, 3] * 8, [0xE4E4E4E4] * 2),
        (3, list(range(8)) * 4, [0x88FAC688, 0xC688FAC6, 0xFAC688FA]),
        (5, range(32), [0x8A418820, 0xC5A92839, 0xCA307B9A, 0x38BDAB49, 0xFFBBCDEB]),
        (
            6,
            range(32),
            [0x440C2040, 0xA2481C61, 0x3CE34C2C, 0x544D2450, 0xA6585D65, 0x7DE75C6D],
        ),
        (8, [0, 1, 2, 3] * 8, [0x03020100] * 8),
    ],
)
def test_streams_written_by_hand(bits, codes, words):
    column = np.array(words, np.uint32).reshape(-1, 1)
    out = buffer(1, len(words))
    repack.transpose_into(column, out)
    assert reference.unpack(out, bits).tolist() == [list(codes)]


# ---------------------------------------------------------------- columns to rows


def interleave(codes):
    """(in, out) codes in the order in which AutoAWQ stores eight outputs."""
    rows, columns = codes.shape
    return codes.reshape(rows, columns // 8, 8)[:, :, INTERLEAVE].reshape(codes.shape)


@MANY
@given(
    bits=st.integers(1, 8),
    wider=st.integers(0, 2),
    inputs=st.integers(0, 9),
    outputs=st.integers(0, 9),
    interleaved=st.booleans(),
    signed=st.booleans(),
    seed=SEEDS,
)
def test_stream_columns(bits, wider, inputs, outputs, interleaved, signed, seed):
    out_bits = min(bits + wider, 8)
    codes = random_codes(seed, bits, 32 * inputs, 32 * outputs)
    stored = interleave(codes) if interleaved else codes
    out = buffer(32 * outputs, inputs * out_bits)
    source = mlx_words(stored, bits)
    repack.stream_columns_into(
        source, bits, out, out_bits=out_bits, interleaved=interleaved, signed=signed
    )
    expected = codes ^ (1 << (bits - 1)) if signed else codes
    assert_same_bits(out, mlx_words(np.ascontiguousarray(expected.T), out_bits))


@MANY
@given(
    bits=st.integers(1, 8),
    inputs=st.integers(0, 150),
    outputs=st.integers(0, 5),
    interleaved=st.booleans(),
    signed=st.booleans(),
    seed=SEEDS,
)
def test_columns_as_codes(bits, inputs, outputs, interleaved, signed, seed):
    """Zeros: as many groups as there are, one code a byte."""
    codes = random_codes(seed, bits, inputs, 32 * outputs)
    source = mlx_words(interleave(codes) if interleaved else codes, bits)
    out = buffer(32 * outputs, inputs, np.uint8)
    repack.stream_columns_into(source, bits, out, interleaved=interleaved, signed=signed)
    assert_same_bits(out, (codes ^ (1 << (bits - 1)) if signed else codes).T)


@MANY
@given(inputs=st.integers(0, 40), outputs=st.integers(0, 70), signed=st.booleans(), seed=SEEDS)
def test_nibble_columns_of_any_eights(inputs, outputs, signed, seed):
    """Four bits: multiples of 8 either way, across the borders of tiles and bands."""
    codes = random_codes(seed, 4, 8 * inputs, 8 * outputs)
    shifts = 4 * np.arange(8, dtype=np.uint32)

    def nibbles(matrix):
        rows, columns = matrix.shape
        eights = matrix.reshape(rows, columns // 8, 8).astype(np.uint32)
        return (eights << shifts).sum(-1, dtype=np.uint32)

    out = buffer(8 * outputs, inputs)
    source = nibbles(interleave(codes))
    repack.stream_columns_into(source, 4, out, interleaved=True, signed=signed)
    expected = codes ^ 8 if signed else codes
    assert_same_bits(out, nibbles(np.ascontiguousarray(expected.T)))


def test_wide_layer_crosses_bands():
    codes = random_codes(1, 4, 320, 2048)
    out = buffer(2048, 40)
    repack.awq_gemm_into(mlx_words(interleave(codes), 4), out)
    assert_same_bits(out, mlx_words(np.ascontiguousarray(codes.T), 4))


def test_awq_word_written_by_hand():
    """Outputs 0 to 7 with codes 1 to 8 are stored as 0x86427531."""
    out = buffer(8, 1)
    repack.awq_gemm_into(np.full((8, 1), 0x86427531, np.uint32), out)
    assert [hex(word) for word in out[:, 0]] == [f"0x{str(code) * 8}" for code in range(1, 9)]


def test_quark_orders_written_by_hand():
    """uint4 0..7 in one word: 75316420 with reorder, 76543210 without."""
    for word, interleaved in ((0x75316420, True), (0x76543210, False)):
        out = buffer(8, 1)
        source = np.full((8, 1), word, np.uint32)
        repack.stream_columns_into(source, 4, out, interleaved=interleaved)
        assert out[:, 0].tolist() == [0x11111111 * code for code in range(8)]


@pytest.mark.parametrize(
    ("source", "bits", "out", "out_bits", "message"),
    [
        (buffer(8, 1), 0, buffer(8, 1), 4, "bits: expected 1 to 8, got 0"),
        (buffer(8, 1), 4, buffer(8, 1), 3, "out_bits: expected 4 to 8, got 3"),
        (buffer(4, 1), 4, buffer(8, 1), 4, "src: 4 columns are not a multiple of 8"),
        (buffer(8, 2), 4, buffer(8, 1), 4, r"src: expected shape \(8, 1\), got \(8, 2\)"),
        (buffer(3, 1), 4, buffer(8, 4, np.uint8), 4, r"out: expected shape \(8, 3\), got \(8, 4\)"),
        (buffer(32, 5), 5, buffer(32, 6), 5, r"out: expected shape \(32, 5\), got \(32, 6\)"),
        (buffer(8, 5), 5, buffer(32, 1), 5, "out: 8 codes of 5 bits do not fill whole words"),
    ],
)
def test_columns_refuse_what_does_not_fit(source, bits, out, out_bits, message):
    with pytest.raises(ValueError, match=message):
        repack.stream_columns_into(source, bits, out, out_bits=out_bits)
