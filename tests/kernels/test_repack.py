"""Codes moved into MLX's order, against the description of each layout in plain NumPy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from requant.kernels import repack
from tests.support import reference
from tests.support.inputs import assert_same_bits
from tests.support.layers import packers
from tests.support.reference import pack as mlx_words

MANY = settings(max_examples=40)
SEEDS = st.integers(0, 2**32 - 1)


def random_codes(seed, bits, *shape):
    return np.random.default_rng(seed).integers(0, 2**bits, shape, dtype=np.uint8)


def buffer(rows, columns, dtype=np.uint32):
    """Filled with what a kernel that forgets an element would leave."""
    return np.full((rows, columns), 0xA5, dtype)


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


def test_transpose_rejects_what_does_not_fit():
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
        (6, range(32), [0x440C2040, 0xA2481C61, 0x3CE34C2C, 0x544D2450, 0xA6585D65, 0x7DE75C6D]),
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
    return codes.reshape(rows, columns // 8, 8)[:, :, packers.INTERLEAVED].reshape(codes.shape)


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
    repack.stream_columns_into(nibbles(interleave(codes)), 4, out, interleaved=True, signed=signed)
    expected = codes ^ 8 if signed else codes
    assert_same_bits(out, nibbles(np.ascontiguousarray(expected.T)))


def test_wide_layer_crosses_bands():
    codes = random_codes(1, 4, 320, 2048)
    out = buffer(2048, 40)
    repack.awq_gemm_into(mlx_words(interleave(codes), 4), out)
    assert_same_bits(out, mlx_words(np.ascontiguousarray(codes.T), 4))


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
def test_columns_reject_what_does_not_fit(source, bits, out, out_bits, message):
    with pytest.raises(ValueError, match=message):
        repack.stream_columns_into(source, bits, out, out_bits=out_bits)


# ---------------------------------------------------------------- planes, tiles, quads


PLANES = {2: [2], 3: [2, 1], 4: [4], 5: [4, 1], 6: [4, 2], 7: [4, 2, 1], 8: [8]}


def planar(codes, bits):
    """Each row of codes as blocks of planes, one plane after the other."""
    rows, count = codes.shape
    blocks = codes.reshape(rows, count // 32, 32)
    words, low = [], 0
    for width in PLANES[bits]:
        plane = (blocks >> low) & (2**width - 1)
        words.append(mlx_words(plane.reshape(-1, 32), width).reshape(rows, count // 32, width))
        low += width
    return np.concatenate(words, axis=-1).reshape(rows, count * bits // 32)


@MANY
@given(
    bits=st.integers(2, 8),
    wider=st.integers(0, 2),
    blocks=st.integers(0, 6),
    outputs=st.integers(0, 150),
    seed=SEEDS,
)
def test_planar_columns(bits, wider, blocks, outputs, seed):
    codes = random_codes(seed, bits, outputs, 32 * blocks)
    source = np.ascontiguousarray(planar(codes, bits).T)
    out_bits = min(bits + wider, 8)
    words = buffer(outputs, blocks * out_bits)
    repack.planar_columns_into(source, bits, words, out_bits=out_bits)
    assert_same_bits(words, mlx_words(codes, out_bits))
    found = buffer(outputs, 32 * blocks, np.uint8)
    repack.planar_columns_into(source, bits, found)
    assert_same_bits(found, codes)


@pytest.mark.parametrize(
    ("bits", "codes", "words"),
    [
        (3, list(range(8)) * 4, [0xE4E4E4E4, 0xE4E4E4E4, 0xF0F0F0F0]),
        (5, range(32), [0x76543210, 0xFEDCBA98, 0x76543210, 0xFEDCBA98, 0xFFFF0000]),
        (6, range(32), [0x76543210, 0xFEDCBA98, 0x76543210, 0xFEDCBA98, 0, 0x55555555]),
    ],
)
def test_planes_written_by_hand(bits, codes, words):
    out = buffer(1, 32, np.uint8)
    repack.planar_columns_into(np.array(words, np.uint32).reshape(-1, 1), bits, out)
    assert out.tolist() == [list(codes)]


@pytest.mark.parametrize(("tiles_in", "tiles_out"), [(1, 1), (2, 3), (9, 2), (16, 1), (0, 1)])
def test_marlin(tiles_in, tiles_out):
    codes = random_codes(tiles_in, 4, 16 * tiles_in, 64 * tiles_out)
    out = buffer(64 * tiles_out, 2 * tiles_in)
    words = packers.marlin(codes.T, np.ones((64 * tiles_out, 1)), ("B", "s"))["B"]
    repack.marlin_into(words.view(np.uint32), out)
    rows = np.ascontiguousarray(codes.T)
    pairs = rows[:, ::2] | rows[:, 1::2] << 4
    assert_same_bits(out.view(np.uint8), pairs)


@pytest.mark.parametrize(("n_out", "n_in"), [(4, 64), (12, 192), (8, 640), (0, 64)])
def test_gemv_fast(n_out, n_in):
    codes = random_codes(n_out, 4, n_out, n_in)
    out = buffer(n_out, n_in // 8)
    ones = np.ones((n_out, n_in // 64))
    repack.gemv_fast_into(packers.fast(codes, ones, ones, "qzeros")["qweight"].view(np.uint16), out)
    assert_same_bits(out, mlx_words(codes, 4))


# ---------------------------------------------------------------- row by row
def padded_words(codes, bits):
    """32 // bits codes a word, the compressed-tensors layout before 0.18."""
    rows, count = codes.shape
    per = 32 // bits
    full = np.zeros((rows, -(-count // per) * per), np.uint32)
    full[:, :count] = codes
    shifts = np.arange(per, dtype=np.uint32) * np.uint32(bits)
    return (full.reshape(rows, full.shape[1] // per, per) << shifts).sum(-1, dtype=np.uint32)


def ragged_words(codes, bits):
    rows, count = codes.shape
    full = np.zeros((rows, -(-count // 32) * 32), np.uint8)
    full[:, :count] = codes
    return np.ascontiguousarray(mlx_words(full, bits)[:, : -(-count * bits // 32)])


@MANY
@given(
    bits=st.integers(1, 8),
    rows=st.integers(0, 40),
    count=st.integers(0, 150),
    extra=st.integers(0, 2),
    padded=st.booleans(),
    seed=SEEDS,
)
def test_stream_codes(bits, rows, count, extra, padded, seed):
    """Ends within words, and words of padding behind the codes."""
    codes = random_codes(seed, bits, rows, count)
    words = (padded_words if padded else ragged_words)(codes, bits)
    words = np.concatenate([words, buffer(rows, extra)], axis=1)
    out = buffer(rows, count, np.uint8)
    repack.stream_codes_into(words, bits, out, padded=padded)
    assert_same_bits(out, codes)
    transposed = buffer(count, rows, np.uint8)
    repack.stream_codes_into(np.ascontiguousarray(words.T), bits, transposed, axis=0, padded=padded)
    assert_same_bits(transposed, codes.T)


@pytest.mark.parametrize(
    ("bits", "codes", "padded", "words"),
    [
        (3, list(range(8)) * 4, True, [0x08FAC688, 0x1A23EB1A, 0x2C688FAC]),
        (5, range(32), True, [0x0A418820, 0x16A4A0E6, 0x2307B9AC]),
        (6, range(64), True, [0x040C2040, 0x09207185, 0x0E34C2CA]),
        (6, range(64), False, [0x440C2040, 0xA2481C61, 0x3CE34C2C]),
        (4, [0, 1, 7, 8, 9, 10, 14, 15], False, [0xFEA98710]),
    ],
)
def test_compressed_tensors_words_written_by_hand(bits, codes, padded, words):
    count = min(len(codes), (32 // bits * len(words)) if padded else 32 * len(words) // bits)
    out = buffer(1, count, np.uint8)
    repack.stream_codes_into(np.array([words], np.uint32), bits, out, padded=padded)
    assert out.tolist() == [list(codes)[:count]]


def test_compressed_tensors_zeros_written_by_hand():
    """Packed along the output rows, offset by 8: int32 [1, 2] = fcba9810 210fedcb."""
    words = np.array([[0xFCBA9810, 0x210FEDCB]], np.uint32)
    out = buffer(8, 2, np.uint8)
    repack.stream_codes_into(words, 4, out, axis=0)
    signed = out.astype(int) - 8
    assert signed[:, 0].tolist() == [-8, -7, 0, 1, 2, 3, 4, 7]
    assert signed[:, 1].tolist() == [3, 4, 5, 6, 7, -8, -7, -6]


@MANY
@given(bits=st.integers(1, 8), rows=st.integers(0, 6), runs=st.integers(0, 9), seed=SEEDS)
def test_unpack_into(bits, rows, runs, seed):
    codes = random_codes(seed, bits, rows, 32 * runs)
    back = buffer(rows, 32 * runs, np.uint8)
    repack.unpack_into(mlx_words(codes, bits), bits, back)
    assert_same_bits(back, codes)


def test_deinterleave():
    codes = random_codes(3, 4, 5, 96)
    out = buffer(5, 12)
    repack.deinterleave_into(mlx_words(interleave(codes), 4), out)
    assert_same_bits(out, mlx_words(codes, 4))
    word = np.array([[0x75316420]], np.uint32)
    repack.deinterleave_into(word, word)
    assert hex(word[0, 0]) == "0x76543210"


# ---------------------------------------------------------------- row blocks
def hqq_pack(codes, packing):
    """Parts of the rows one above the other, the first in the highest bits."""
    blocks = repack.HQQ[packing]
    rows, columns = codes.shape
    block = -(-rows // len(blocks.shifts))
    wide = np.uint32 if packing == "3bit_32" else np.uint8
    full = np.zeros((block * len(blocks.shifts), columns), wide)
    full[:rows] = codes
    packed = np.zeros((block, columns), wide)
    for number in range(len(blocks.shifts)):
        shift = wide(blocks.bits * (len(blocks.shifts) - 1 - number))
        packed |= full[number * block : (number + 1) * block] << shift
    return packed


@MANY
@given(
    packing=st.sampled_from(sorted(repack.HQQ)),
    eighths=st.integers(1, 12),
    columns=st.integers(0, 70),
    cut=st.tuples(st.integers(0, 96), st.integers(0, 96)),
    seed=SEEDS,
)
def test_hqq_rows(packing, eighths, columns, cut, seed):
    rows = 8 * eighths
    codes = random_codes(seed, repack.HQQ[packing].bits, rows, columns)
    start, stop = sorted(min(row, rows) for row in cut)
    out = buffer(stop - start, columns, np.uint8)
    repack.row_blocks_into(hqq_pack(codes, packing), repack.HQQ[packing], rows, start, out)
    assert_same_bits(out, codes[start:stop])


def test_hqq_byte_written_by_hand():
    """0x2f: 2 at the row itself, 15 half the rows further on."""
    out = buffer(2, 1, np.uint8)
    repack.row_blocks_into(np.array([[0x2F]], np.uint8), repack.HQQ["4bit_u8"], 2, 0, out)
    assert out.tolist() == [[2], [15]]


def test_a_part_of_the_packed_rows_is_enough():
    codes = random_codes(1, 2, 64, 32)
    packed = hqq_pack(codes, "2bit_u8")
    out = buffer(5, 32, np.uint8)
    repack.row_blocks_into(packed[3:9], repack.HQQ["2bit_u8"], 64, 20, out, first=3)
    assert_same_bits(out, codes[20:25])
    for first, start, message in (
        (3, 18, "packed: expected packed rows 2 to 7, got 3 to 9"),
        (3, 22, "packed: expected packed rows 6 to 11, got 3 to 9"),
        (0, 62, "out: rows 62 to 67 lie beyond the 64 of the matrix"),
    ):
        with pytest.raises(ValueError, match=message):
            repack.row_blocks_into(packed[3:9], repack.HQQ["2bit_u8"], 64, start, out, first=first)


def test_bitnet_column_written_by_hand():
    """Rows 1 0 -1 1 0 0 1 -1 are the bytes 92 19: rows 0, 2, 4, 6 and 1, 3, 5, 7."""
    out = buffer(8, 1, np.uint8)
    packed = np.array([[0x92], [0x19]], np.uint8)
    repack.row_blocks_into(packed, repack.BITNET, 8, 0, out)
    assert (out.astype(int) - 1).ravel().tolist() == [1, 0, -1, 1, 0, 0, 1, -1]


def test_modelopt_rows_written_by_hand():
    """[[1, 2, 3], [-1, -8, 7]] is f1 82 73."""
    out = buffer(2, 3, np.uint8)
    repack.row_pairs_into(np.array([[0xF1, 0x82, 0x73]], np.uint8), out)
    assert (out.astype(int) - 8).tolist() == [[1, 2, 3], [-1, -8, 7]]
    with pytest.raises(ValueError, match="out: expected 4 rows, got 2"):
        repack.row_pairs_into(buffer(2, 3, np.uint8), out)


def test_quark_mx_block_written_by_hand():
    """Scale 0.25, codes 0 to 15 twice: fe 10 32 54 ...; the E8M0 byte is 0x7d."""
    codes = bytes.fromhex("1032547698badcfe") * 2
    blocks = np.frombuffer((b"\xfe" + codes) * 6, np.uint8).reshape(2, 51)
    words, scales = buffer(2, 12), buffer(2, 3, np.uint8)
    repack.mx_blocks_into(blocks, words, scales)
    assert (scales == 0x7D).all()
    assert [hex(word) for word in words[1, :2]] == ["0x76543210", "0xfedcba98"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: repack.planar_columns_into(buffer(3, 1), 1, buffer(1, 3)),
            "bits: expected 2 to 8",
        ),
        (lambda: repack.planar_columns_into(buffer(4, 1), 3, buffer(1, 3)), "src: 4 rows are not"),
        (lambda: repack.marlin_into(buffer(1, 64), buffer(32, 2)), "src: 64 columns are not"),
        (lambda: repack.marlin_into(buffer(1, 128), buffer(64, 1)), "out: expected shape"),
        (lambda: repack.gemv_fast_into(buffer(1, 32, np.uint16), buffer(4, 4)), "src: 32 columns"),
        (lambda: repack.gemv_fast_into(buffer(1, 64), buffer(4, 8)), "src: expected uint16"),
        (
            lambda: repack.stream_codes_into(buffer(2, 3), 3, buffer(2, 33, np.uint8)),
            "src: 3 words of a row hold 32 codes, expected 33",
        ),
        (
            lambda: repack.stream_codes_into(buffer(2, 3), 3, buffer(2, 31, np.uint8), padded=True),
            "src: 3 words of a row hold 30 codes, expected 31",
        ),
        (lambda: repack.deinterleave_into(buffer(1, 4), buffer(1, 5)), "out: expected shape"),
    ],
)
def test_what_does_not_fit_is_rejected(call, message):
    with pytest.raises(ValueError, match=message):
        call()
