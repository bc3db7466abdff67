"""mxfp4, mxfp8 and nvfp4 kernels against the reference, MLX, and vectors by hand."""

import itertools

import ml_dtypes
import numpy as np
import pytest

from requant.kernels.quantize import (
    QuantizedTensors,
    dequantize,
    quantize,
    quantize_into,
    unpack_words,
)
from requant.quantization.config import Quantization
from tests.support import reference
from tests.support.inputs import DTYPES, assert_same_bits, finite_inputs, nonfinite_inputs
from tests.support.mlx_arrays import mlx_dequantize, mlx_quantize

pytestmark = pytest.mark.sweep(4)

MX = {"mxfp4": 4, "mxfp8": 8}
GLOBAL_SCALES = (None, 3.0, 0.3, 448.0, 1e-20, 1e20, 1.0)


def finite(dtype):
    return np.concatenate(list(finite_inputs(dtype).values()))


def nonfinite(dtype):
    return np.concatenate(list(nonfinite_inputs(dtype).values()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MX)
def test_mx_quantize(mode, dtype):
    """Equal to the reference everywhere, to MLX but for the groups its scale wraps around on."""
    w, bits = finite(dtype), MX[mode]
    words = np.empty((len(w), w.shape[1] * bits // 32), np.uint32)
    scales = np.empty((len(w), w.shape[1] // 32), np.uint8)
    flushed = quantize_into(w, Quantization(32, bits, mode), QuantizedTensors(words, scales))
    codes, ref_scales, ref_flushed = reference.mx_quantize(w, bits)
    assert_same_bits(words, reference.pack(codes, bits))
    assert_same_bits(scales, ref_scales)
    assert flushed == ref_flushed
    assert (flushed > 0) == (dtype.name != "float16")
    mlx_words, mlx_scales = mlx_quantize(w, 32, bits, mode)
    differ = scales != mlx_scales
    assert np.count_nonzero(differ) <= flushed
    assert (scales[differ] == 127).all()
    groups, mlx_groups = (a.reshape(*scales.shape, bits) for a in (words, mlx_words))
    assert not groups[differ].any()
    assert_same_bits(groups[~differ], mlx_groups[~differ])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MX)
def test_mx_quantize_nonfinite(mode, dtype):
    w = nonfinite(dtype)
    words, scales, _ = quantize(w, Quantization(32, MX[mode], mode))
    mlx_words, mlx_scales = mlx_quantize(w, 32, MX[mode], mode)
    assert_same_bits(words, mlx_words)
    assert_same_bits(scales, mlx_scales)


@pytest.mark.parametrize("out", DTYPES)
@pytest.mark.parametrize("mode", MX)
def test_mx_dequantize(mode, out):
    """Every scale byte with every code."""
    bits = MX[mode]
    scales = np.arange(256, dtype=np.uint8).reshape(32, 8)
    codes = np.arange(256, dtype=np.uint8)
    codes = np.stack([np.roll(codes, 32 * k) for k in range(8)]).repeat(4, axis=0)
    codes = codes.astype(np.uint8) & np.uint8(2**bits - 1)
    words = np.concatenate([reference.pack(np.roll(codes, 32 * k, 1), bits) for k in range(8)])
    scales = np.tile(scales, (8, 1))
    values = dequantize(QuantizedTensors(words, scales), Quantization(32, bits, mode), dtype=out)
    unpacked = reference.unpack(words, bits)
    assert_same_bits(values, reference.mx_dequantize(unpacked, scales, bits, out))
    assert_same_bits(values, mlx_dequantize(words, scales, None, 32, bits, mode, dtype=out))


@pytest.mark.parametrize("global_scale", GLOBAL_SCALES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nvfp4_quantize(dtype, global_scale):
    w = finite(dtype)
    words, scales, biases = quantize(w, Quantization(16, 4, "nvfp4"), global_scale=global_scale)
    assert biases is None
    codes, ref_scales = reference.nvfp4_quantize(w, global_scale)
    assert_same_bits(words, reference.pack(codes, 4))
    assert_same_bits(scales, ref_scales)
    mlx_words, mlx_scales = mlx_quantize(w, 16, 4, "nvfp4", global_scale)
    assert_same_bits(words, mlx_words)
    assert_same_bits(scales, mlx_scales)


@pytest.mark.parametrize("global_scale", [None, 3.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nvfp4_quantize_nonfinite(dtype, global_scale):
    w = nonfinite(dtype)
    words, scales, _ = quantize(w, Quantization(16, 4, "nvfp4"), global_scale=global_scale)
    mlx_words, mlx_scales = mlx_quantize(w, 16, 4, "nvfp4", global_scale)
    assert_same_bits(words, mlx_words)
    assert_same_bits(scales, mlx_scales)


@pytest.mark.parametrize(
    ("out", "global_scale"), list(itertools.product(DTYPES, GLOBAL_SCALES[:4]))
)
def test_nvfp4_dequantize(out, global_scale):
    """Every scale byte with every code."""
    scales = np.arange(256, dtype=np.uint8).reshape(8, 32)
    words = np.tile(np.array([0x76543210, 0xFEDCBA98], np.uint32), (8, 32))
    values = dequantize(
        QuantizedTensors(words, scales),
        Quantization(16, 4, "nvfp4"),
        global_scale=global_scale,
        dtype=out,
    )
    codes = reference.unpack(words, 4)
    assert_same_bits(values, reference.nvfp4_dequantize(codes, scales, out, global_scale))
    theirs = mlx_dequantize(
        words, scales, None, 16, 4, "nvfp4", dtype=out, global_scale=global_scale
    )
    assert_same_bits(values, theirs)


def test_every_e4m3_scale_and_its_neighbours():
    """Group maxima on, below and above every midpoint of the E4M3 grid."""
    grid = reference.decode_e4m3(np.arange(0x7F))
    points = np.concatenate([grid, (grid[1:] + grid[:-1]) / 2]).astype(np.float32) * 6
    points = np.concatenate([points, np.nextafter(points, 0), np.nextafter(points, np.inf)])
    points = np.resize(points, (-(-len(points) // 2) * 2)).astype(np.float32)
    w = np.zeros((len(points) // 2, 2, 16), np.float32)
    w[:, :, 3] = points.reshape(-1, 2)
    w[:, :, 4] = -points.reshape(-1, 2) / 3
    w = w.reshape(-1, 32)
    words, scales, _ = quantize(w, Quantization(16, 4, "nvfp4"))
    codes, ref_scales = reference.nvfp4_quantize(w)
    assert_same_bits(scales, ref_scales)
    assert_same_bits(words, reference.pack(codes, 4))


# ---------------------------------------------------------------- by hand
def group(values, size=32):
    w = np.zeros((1, size), np.float32)
    w[0, : len(values)] = values
    return w


def codes_of(words, bits, count):
    return " ".join(f"{c:0{bits // 4}x}" for c in unpack_words(words, bits)[0, :count])


def test_mxfp4_halfway_points_go_toward_zero():
    values = [6, 0.25, 0.2500001, 0.75, 1.25, 1.75, 2.5, 3.5, 5]
    values += [-0.25, -0.75, -1.75, -5, -6, -0.0, 0.74, 0.76, 0]
    words, scales, _ = quantize(group(values), Quantization(32, 4, "mxfp4"))
    assert scales.tolist() == [[0x7F]]
    assert codes_of(words, 4, 18) == "7 0 1 1 2 3 4 5 6 0 9 b e f 0 1 2 0"
    assert words.tolist() == [[0x54321107, 0x10FEB906, 2, 0]]


@pytest.mark.parametrize(
    ("values", "scale", "codes"),
    [([6.0000005, 1], 0x80, "5 1"), ([12, 6.5], 0x80, "7 5"), ([0], 0x7F, "0")],
)
def test_mxfp4_scale_is_rounded_up(values, scale, codes):
    words, scales, _ = quantize(group(values), Quantization(32, 4, "mxfp4"))
    assert scales.tolist() == [[scale]]
    assert codes_of(words, 4, len(values)) == codes


@pytest.mark.parametrize(("bits", "mode"), [(4, "mxfp4"), (8, "mxfp8")])
def test_group_below_e8m0_is_flushed(bits, mode):
    """MLX's byte would wrap around and make 1e37 of 1e-40."""
    w = np.concatenate([group([1e-40, -1e-40]), group([6.0])])
    words = np.empty((2, bits), np.uint32)
    scales = np.empty((2, 1), np.uint8)
    assert quantize_into(w, Quantization(32, bits, mode), QuantizedTensors(words, scales)) == 1
    assert scales[0, 0] == 127
    assert not words[0].any()
    assert words[1].any()


def test_mxfp8_by_hand():
    values = [448, 1, 17, 18, 19, -0.001, 2**-10, 1.5 * 2**-10, 464]
    words, scales, _ = quantize(group(values), Quantization(32, 8, "mxfp8"))
    assert scales.tolist() == [[0x80]]
    assert codes_of(words, 8, 9) == "76 30 50 51 52 80 00 00 76"


def test_mxfp8_bfloat16_by_hand():
    w = group([0.3, -0.1, 0.02, 1e-4]).astype(ml_dtypes.bfloat16)
    words, scales, _ = quantize(w, Quantization(32, 8, "mxfp8"))
    assert scales.tolist() == [[0x75]]
    assert codes_of(words, 8, 4) == "7a ed 5a 1d"
    values = dequantize(
        QuantizedTensors(words, scales), Quantization(32, 8, "mxfp8"), dtype=np.float32
    )
    assert values[0, :3].tolist() == [0.3125, -0.1015625, 0.01953125]


def test_nvfp4_by_hand():
    values = [0.5, -0.3, 0.2, 0.1, 0.05, -0.02, 0.01, 1.5]
    values += [0.25, 0.75, 0.6, 0.7, 0.8, 0.9, 1, -1.5, 3, 0.1]
    for global_scale, expected in ((None, [0x28, 0x30]), (3.0, [0x76, 0x7E])):
        words, scales, _ = quantize(
            group(values), Quantization(16, 4, "nvfp4"), global_scale=global_scale
        )
        assert scales.tolist() == [expected]
        assert words.tolist() == [[0x700012A4, 0xF6655452, 7, 0]]


@pytest.mark.parametrize(
    ("values", "scale", "codes"),
    [([0.00585, 0.003], 0, "0 0"), ([0.0059, 0.003], 1, None), ([1e6, 1], 0x7E, "7 0")],
)
def test_nvfp4_scale_range(values, scale, codes):
    words, scales, _ = quantize(group(values), Quantization(16, 4, "nvfp4"))
    assert scales[0, 0] == scale
    assert codes is None or codes_of(words, 4, len(values)) == codes


def test_byte_255_is_infinity():
    values = dequantize(
        QuantizedTensors(np.full((1, 4), 2, np.uint32), np.array([[255]], np.uint8)),
        Quantization(32, 4, "mxfp4"),
    )
    assert values[0, 0] == np.inf
    assert np.isnan(values[0, 1].astype(np.float32))
