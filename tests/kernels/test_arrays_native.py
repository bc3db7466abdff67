"""The NumPy face: shapes, strides, dtypes, defaults and what it rejects."""

import ml_dtypes
import numpy as np
import pytest

from requant.errors import (
    DivisibilityError,
    InvariantError,
    OutOfRangeError,
    RankMismatchError,
    ShapeMismatchError,
    UnknownValueError,
    UnsupportedDtypeError,
)
from requant.kernels import quantize as native
from requant.kernels.quantize import QuantizedTensors
from requant.quantization.config import Quantization
from requant.quantization.modes import check_quantization
from tests.support.inputs import DTYPES, assert_same_bits
from tests.support.reference import BF16, F32

LEGAL = [("affine", b, g) for b in (1, 2, 3, 4, 5, 6, 8) for g in (32, 64, 128)]
LEGAL += [("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)]


def normals(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("mode", "bits", "group_size"), LEGAL)
def test_shapes_and_dtypes(mode, bits, group_size, dtype):
    quantization = Quantization(group_size, bits, mode)
    w = normals(3, 2, 256).astype(dtype)
    words, scales, biases = native.quantize(w, quantization)
    assert (words.dtype, words.shape) == (np.uint32, (3, 2, 256 * bits // 32))
    assert scales.shape == (3, 2, 256 // group_size)
    if mode == "affine":
        assert scales.dtype == dtype
        assert (biases.dtype, biases.shape) == (dtype, scales.shape)
    else:
        assert scales.dtype == np.uint8
        assert biases is None
    values = native.dequantize(QuantizedTensors(words, scales, biases), quantization)
    assert (values.dtype, values.shape) == (dtype if mode == "affine" else BF16, w.shape)


@pytest.mark.parametrize(("mode", "bits", "group_size"), [("affine", 4, 64), ("nvfp4", 4, 16)])
def test_strides_do_not_matter(mode, bits, group_size):
    quantization = Quantization(group_size, bits, mode)
    w = normals(4, 6, 128)
    for view in (w.transpose(1, 0, 2), w[::2, ::-1], np.asfortranarray(w), w[:, :, ::-1]):
        strided = native.quantize(view, quantization)
        plain = native.quantize(np.ascontiguousarray(view), quantization)
        for one, other in zip(strided, plain, strict=True):
            if one is not None:
                assert_same_bits(one, other)
        parts = (None if p is None else np.asfortranarray(p) for p in strided)
        back = native.dequantize(QuantizedTensors(*parts), quantization)
        assert_same_bits(back, native.dequantize(plain, quantization))


@pytest.mark.parametrize(("mode", "bits", "group_size"), LEGAL[-4:])
def test_empty(mode, bits, group_size):
    quantization = Quantization(group_size, bits, mode)
    for shape in ((0, 128), (2, 0, 128), (3, 0)):
        parts = native.quantize(np.zeros(shape, np.float32), quantization)
        assert native.dequantize(parts, quantization).shape == shape


def test_scales_as_float8():
    w = normals(2, 64)
    for mode, bits, group_size, view in (
        ("mxfp4", 4, 32, ml_dtypes.float8_e8m0fnu),
        ("nvfp4", 4, 16, ml_dtypes.float8_e4m3fn),
    ):
        quantization = Quantization(group_size, bits, mode)
        tensors = native.quantize(w, quantization)
        viewed = tensors._replace(scales=tensors.scales.view(view))
        plain = native.dequantize(tensors, quantization)
        assert_same_bits(plain, native.dequantize(viewed, quantization))


def test_into_reused_buffers():
    w = normals(4, 128)
    affine = Quantization.affine(64, 5)
    tensors = native.quantize(w, affine)
    reused = QuantizedTensors(*map(np.ones_like, tensors))
    assert native.quantize_into(w, affine, reused) == 0
    for one, other in zip(reused, tensors, strict=True):
        assert_same_bits(one, other)
    out = np.empty((4, 128), ml_dtypes.bfloat16)
    native.dequantize_into(tensors, affine, out)
    assert_same_bits(out, native.dequantize(tensors, affine, dtype=BF16))


def test_into_rejects_what_it_would_have_to_copy():
    w = normals(4, 128)
    affine = Quantization.affine(64, 4)
    tensors = native.quantize(w, affine)
    scales, biases = tensors.scales, tensors.biases
    with pytest.raises(ValueError, match="C-contiguous"):
        native.quantize_into(w, affine, tensors._replace(biases=np.asfortranarray(biases)))
    with pytest.raises(ValueError, match="C-contiguous"):
        native.quantize_into(np.asfortranarray(w), affine, tensors)
    with pytest.raises(ValueError, match="expected 2 axes"):
        native.quantize_into(w[0], affine, tensors)
    with pytest.raises(UnsupportedDtypeError, match="the dtype of w"):
        native.quantize_into(w, affine, tensors._replace(scales=scales.astype(np.float16)))
    with pytest.raises(InvariantError, match="writes biases"):
        native.quantize_into(w, affine, tensors._replace(biases=None))


def test_global_scale():
    w = normals(2, 64)
    amax = np.abs(w).max()
    plain = native.quantize(w, Quantization(16, 4, "nvfp4"), global_scale=float(amax))
    boxed = native.quantize(
        w, Quantization(16, 4, "nvfp4"), global_scale=np.array([amax], np.float32)
    )
    assert_same_bits(plain[0], boxed[0])
    assert_same_bits(plain[1], boxed[1])
    values = native.dequantize(plain, Quantization(16, 4, "nvfp4"), global_scale=amax, dtype=BF16)
    assert values.dtype == F32
    with pytest.raises(InvariantError, match="only mode nvfp4"):
        native.quantize(w, Quantization(32, 4, "mxfp4"), global_scale=1.0)
    with pytest.raises(InvariantError, match="one number"):
        native.quantize(w, Quantization(16, 4, "nvfp4"), global_scale=np.ones(2, np.float32))


def test_legal_quantizations():
    for mode, bits, group_size in LEGAL:
        check_quantization(bits, group_size, mode)


@pytest.mark.parametrize(
    ("bits", "group_size", "mode", "name"),
    [
        (7, 64, "affine", "bits"),
        (0, 64, "affine", "bits"),
        (4, 16, "affine", "group_size"),
        (4, 0, "affine", "group_size"),
        (8, 32, "mxfp4", "bits"),
        (4, 64, "mxfp4", "group_size"),
        (4, 32, "mxfp8", "bits"),
        (4, 32, "nvfp4", "group_size"),
    ],
)
def test_illegal_quantizations(bits, group_size, mode, name):
    with pytest.raises(OutOfRangeError) as caught:
        check_quantization(bits, group_size, mode)
    assert caught.value.name == name


def test_unknown_mode():
    with pytest.raises(UnknownValueError) as caught:
        native.quantize(normals(2, 64), Quantization(64, 4, "int4"))
    assert caught.value.value == "int4"


@pytest.mark.parametrize("dtype", [np.float64, np.int32, np.uint8, np.dtype(">f4")])
def test_unsupported_weight(dtype):
    with pytest.raises(UnsupportedDtypeError) as caught:
        native.quantize(normals(2, 64).astype(dtype), Quantization.affine(64, 4))
    assert caught.value.supported == ("float32", "float16", "bfloat16")


def test_rejected_weights():
    with pytest.raises(RankMismatchError):
        native.quantize(normals(64), Quantization.affine(64, 4))
    with pytest.raises(DivisibilityError) as caught:
        native.quantize(normals(2, 100), Quantization.affine(64, 4))
    assert (caught.value.name, caught.value.value, caught.value.divisor) == ("in_features", 100, 64)


def test_rejected_triples():
    affine = Quantization.affine(64, 4)
    tensors = native.quantize(normals(2, 128), affine)
    words, scales, biases = tensors
    with pytest.raises(UnsupportedDtypeError):
        native.dequantize(tensors._replace(words=words.view(np.int32)), affine)
    with pytest.raises(UnsupportedDtypeError):
        native.dequantize(tensors._replace(scales=scales.astype(np.float64)), affine)
    with pytest.raises(UnsupportedDtypeError):
        native.dequantize(tensors, affine, dtype=np.int8)
    with pytest.raises(RankMismatchError):
        native.dequantize(QuantizedTensors(words[0], scales[0], biases[0]), affine)
    with pytest.raises(ShapeMismatchError) as caught:
        native.dequantize(tensors._replace(scales=scales[:, :1]), affine)
    assert (caught.value.expected, caught.value.actual) == ((2, 2), (2, 1))
    with pytest.raises(ShapeMismatchError):
        native.dequantize(tensors._replace(biases=biases[:1]), affine)
    with pytest.raises(DivisibilityError):
        native.dequantize(tensors._replace(words=words[:, :-1]), affine)
    with pytest.raises(InvariantError, match="needs biases"):
        native.dequantize(tensors._replace(biases=None), affine)
    mxfp4 = Quantization(32, 4, "mxfp4")
    tensors = native.quantize(normals(2, 128), mxfp4)
    with pytest.raises(InvariantError, match="has no biases"):
        native.dequantize(tensors._replace(biases=tensors.scales), mxfp4)
    with pytest.raises(UnsupportedDtypeError):
        native.dequantize(tensors._replace(scales=tensors.scales.astype(np.float32)), mxfp4)


def test_rejected_codes_and_words():
    with pytest.raises(OutOfRangeError):
        native.pack_words(np.zeros((1, 32), np.uint8), 9)
    with pytest.raises(UnsupportedDtypeError):
        native.pack_words(np.zeros((1, 32), np.int8), 4)
    with pytest.raises(DivisibilityError):
        native.pack_words(np.zeros((1, 33), np.uint8), 4)
    with pytest.raises(RankMismatchError):
        native.pack_words(np.zeros(32, np.uint8), 4)
    with pytest.raises(DivisibilityError):
        native.unpack_words(np.zeros((1, 4), np.uint32), 3)
    with pytest.raises(UnsupportedDtypeError):
        native.unpack_words(np.zeros((1, 3), np.int32), 3)
    with pytest.raises(RankMismatchError):
        native.unpack_words(np.zeros(3, np.uint32), 3)
