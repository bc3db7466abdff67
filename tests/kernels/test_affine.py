"""Affine kernels against the NumPy reference, MLX, and vectors written down by hand."""

import itertools

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from requant.kernels.quantize import QuantizedTensors, dequantize, pack_words, quantize
from requant.quantization.config import Quantization
from requant.quantization.modes import AFFINE_BITS, AFFINE_GROUP_SIZES
from tests.support import reference
from tests.support.inputs import DTYPES, assert_same_bits, finite_inputs, nonfinite_inputs
from tests.support.mlx_arrays import mlx_dequantize, mlx_quantize

pytestmark = pytest.mark.sweep(6)

CASES = list(itertools.product(AFFINE_BITS, AFFINE_GROUP_SIZES, DTYPES))


@pytest.mark.parametrize(("bits", "group_size", "dtype"), CASES)
def test_quantize_equals_reference_and_mlx(bits, group_size, dtype):
    inputs = {**finite_inputs(dtype), **nonfinite_inputs(dtype)}
    w = np.concatenate(list(inputs.values()))
    words, scales, biases = quantize(w, Quantization.affine(group_size, bits))
    codes, ref_scales, ref_biases = reference.affine_quantize(w, group_size, bits)
    assert_same_bits(words, reference.pack(codes, bits))
    assert_same_bits(scales, ref_scales)
    assert_same_bits(biases, ref_biases)
    for ours, theirs in zip(
        (words, scales, biases), mlx_quantize(w, group_size, bits, "affine"), strict=True
    ):
        assert_same_bits(ours, theirs)


@pytest.mark.parametrize(("bits", "group_size", "dtype"), CASES)
def test_dequantize_equals_reference_and_mlx(bits, group_size, dtype):
    """Random words under random scale bits, NaN and infinities among them."""
    rng = np.random.default_rng(bits)
    words = rng.integers(0, 2**32, (24, 512 * bits // 32), dtype=np.uint32)
    uint = np.uint32 if dtype.itemsize == 4 else np.uint16
    some = rng.integers(
        0, np.iinfo(uint).max, (2, 24, 512 // group_size), dtype=uint, endpoint=True
    )
    scales, biases = some.view(dtype)
    scales[:12] = rng.standard_normal(scales[:12].shape).astype(dtype)
    biases[:12] = rng.standard_normal(biases[:12].shape).astype(dtype)
    values = dequantize(
        QuantizedTensors(words, scales, biases), Quantization.affine(group_size, bits)
    )
    codes = reference.unpack(words, bits)
    assert_same_bits(values, reference.affine_dequantize(codes, scales, biases, group_size))
    assert_same_bits(values, mlx_dequantize(words, scales, biases, group_size, bits, "affine"))


@pytest.mark.parametrize("bits", AFFINE_BITS)
@pytest.mark.parametrize(("s", "b"), list(itertools.product(DTYPES, DTYPES)))
def test_dequantize_mixed_dtypes(s, b, bits):
    """Scales of one dtype, biases of another, to every dtype."""
    rng = np.random.default_rng(bits)
    words = rng.integers(0, 2**32, (16, 16 * bits), dtype=np.uint32)
    scales = rng.standard_normal((16, 8)).astype(s)
    biases = rng.standard_normal((16, 8)).astype(b)
    codes = reference.unpack(words, bits)
    for out in (None, *DTYPES):
        values = dequantize(
            QuantizedTensors(words, scales, biases), Quantization.affine(64, bits), dtype=out
        )
        assert_same_bits(values, reference.affine_dequantize(codes, scales, biases, 64, out))
        theirs = mlx_dequantize(words, scales, biases, 64, bits, "affine", dtype=out)
        assert_same_bits(values, theirs)


@settings(max_examples=40)
@given(
    bits=st.sampled_from(AFFINE_BITS),
    group_size=st.sampled_from(AFFINE_GROUP_SIZES),
    dtype=st.sampled_from(DTYPES),
    leading=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    groups=st.integers(1, 40),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_shape(bits, group_size, dtype, leading, groups, seed):
    """Any rank, any number of groups: blocks of every length end where they must."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((*leading, groups * group_size)).astype(dtype)
    parts = quantize(w, Quantization.affine(group_size, bits))
    flat = w.reshape(-1, w.shape[-1])
    codes, *expected = reference.affine_quantize(flat, group_size, bits)
    expected = (reference.pack(codes, bits), *expected)
    for ours, theirs in zip(parts, expected, strict=True):
        assert_same_bits(ours, theirs.reshape(*leading, -1))
    values = reference.affine_dequantize(codes, *expected[1:], group_size)
    assert_same_bits(
        dequantize(parts, Quantization.affine(group_size, bits)), values.reshape(w.shape)
    )


# ---------------------------------------------------------------- by hand
A = ((7 * np.arange(32) % 32 - 11) / 8).astype(np.float32).reshape(1, 32)

WORDS_OF_A = {
    1: "cc673398",
    2: "b1a16c6b 5b1ac6c6",
    3: "82979537 dc14dcb9 4ef0a6e5",
    4: "7ae258cf be269c04 f26ad048 36ae148c",
    5: "7835471f b9640775 050fb748 17f1593d 3369b126",
    6: "46523c7f 300e76be b7b21797 67d4241f 286ff8a6 31ba7711",
    8: "528cc6ff 74ade719 94ce003a b6ef215b d608427c f829639d 104a84be 326ba5df",
}
SCALE_OF_A = {  # float32, float16, bfloat16
    1: ("40780000", "43c0", "4078"),
    2: ("bfa00000", "bd00", "bfa0"),
    3: ("bf000000", "b800", "bf00"),
    4: ("be800000", "b400", "be80"),
    5: ("be000000", "b000", "be00"),
    6: ("bd79c190", "abce", "bd7a"),
    8: ("bc783e10", "a3c2", "bc78"),
}


def hexes(array):
    width = 2 * array.dtype.itemsize
    uint = {2: np.uint8, 4: np.uint16, 8: np.uint32}[width]
    return " ".join(f"{value:0{width}x}" for value in array.view(uint).ravel())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", AFFINE_BITS)
def test_worked_group(bits, dtype):
    """32 multiples of 1/8 from -11/8 to 20/8, exact in every dtype."""
    words, scales, biases = quantize(A.astype(dtype), Quantization.affine(32, bits))
    assert hexes(words) == WORDS_OF_A[bits]
    assert hexes(scales) == SCALE_OF_A[bits][DTYPES.index(dtype)]
    assert float(biases[0, 0]) == (-1.375 if bits == 1 else 2.5)


EDGES = [
    # group, the last value filling the rest; bits; codes; scale; bias
    ([0, 0], 1, [0], "33d6bf95", "00000000"),
    ([0, 0], 4, [0], "b3d6bf95", "00000000"),
    ([1, 1], 4, [0], "b3d6bf95", "3f800000"),
    ([-2, -2], 4, [0], "b3d6bf95", "c0000000"),
    ([1, 2, 1.5, 1], 1, [0, 1, 0, 0], "3f800000", "3f800000"),
    ([1, 2, 1.5, 1], 4, [15, 0, 7, 15], "bd888889", "40000000"),
    ([-1, -2, -1.5, -1], 4, [15, 0, 7, 15], "3d888889", "c0000000"),
    ([-1, 1, 0, 0.5], 4, [14, 0, 7, 3], "be124925", "3f800000"),
    ([5e-8, 0], 4, [0, 0], "b3d6bf95", "00000000"),
    ([np.nan, 1, -1, 0], 4, [0, 0, 14, 7], "be124925", "3f800000"),
    ([np.inf, 1, -1, 0], 1, [0], "7f800000", "bf800000"),
    ([3e38, -3e38, 1, 0], 1, [0], "7f800000", "ff61b1e6"),
    ([3e38, -3e38, 1, 0], 4, [0], "ff800000", "00000000"),
    ([-0.0, 0, 1], 1, [0, 0, 1], "3f800000", "80000000"),
    ([0.0, -0.0, 1], 1, [0, 0, 1], "3f800000", "00000000"),
]


@pytest.mark.parametrize(("group", "bits", "codes", "scale", "bias"), EDGES)
def test_edge_groups(group, bits, codes, scale, bias):
    w = np.full((1, 32), group[-1], np.float32)
    w[0, : len(group)] = group
    expected = np.full((1, 32), codes[-1], np.uint8)
    expected[0, : len(codes)] = codes
    words, scales, biases = quantize(w, Quantization.affine(32, bits))
    assert hexes(words) == hexes(pack_words(expected, bits))
    assert hexes(scales) == scale
    assert hexes(biases) == bias


def test_group_with_infinity_has_no_scale():
    w = np.zeros((1, 32), np.float32)
    w[0, :3] = np.inf, 1, -1
    words, scales, biases = quantize(w, Quantization.affine(32, 4))
    assert not words.any()
    assert np.isnan(scales[0, 0])
    assert biases[0, 0] == np.inf


def test_range_beyond_float16():
    w = np.zeros((1, 32), np.float16)
    w[0, :2] = 65504, -65504
    words, scales, biases = quantize(w, Quantization.affine(32, 4))
    assert [int(words[0, 0]) >> shift & 15 for shift in (0, 4, 8)] == [0, 15, 8]
    assert (hexes(scales), hexes(biases)) == ("efff", "7bff")


def test_two_roundings_in_bfloat16():
    """Codes 0 to 15, scale 0.1, bias -0.8: product and sum are each rounded to bfloat16."""
    words = np.array([[0x76543210, 0xFEDCBA98] * 2], np.uint32)
    scales = np.array([[0.1]], ml_dtypes.bfloat16)
    biases = (np.array([[-8]], np.float32) * scales.astype(np.float32)).astype(scales.dtype)
    values = dequantize(QuantizedTensors(words, scales, biases), Quantization.affine(32, 4))
    assert hexes(values[:, :16]) == (
        "bf4d bf33 bf1a bf00 becd be9a be4c bdd0 0000 3dd0 3e4c 3e9a 3ece 3f01 3f19 3f33"
    )
    wide = [array.astype(np.float32) for array in (scales, biases)]
    values = dequantize(
        QuantizedTensors(words, *wide), Quantization.affine(32, 4), dtype=ml_dtypes.bfloat16
    )
    assert hexes(values[:, :16]) == (
        "bf4d bf33 bf1a bf00 becd be9a be4d bdcd 0000 3dcd 3e4d 3e9a 3ecd 3f00 3f1a 3f33"
    )
