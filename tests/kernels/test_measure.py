"""Quantizing and measuring in one pass, against the separate steps and float64."""

import itertools

import ml_dtypes
import numpy as np
import pytest

from requant.kernels import _native
from requant.kernels.quantize import (
    EncodingError,
    QuantizedTensors,
    dequantize,
    measure,
    quantize,
    quantize_measured,
)
from requant.quantization.config import Quantization
from tests.support.inputs import DTYPES, assert_same_bits, finite_inputs

MODES = [Quantization.affine(group, bits) for group, bits in [(32, 2), (64, 3), (64, 4), (128, 5)]]
MODES += [Quantization.affine(32, 6), Quantization.affine(64, 8), Quantization.affine(64, 1)]
MODES += [Quantization(32, 4, "mxfp4"), Quantization(32, 8, "mxfp8"), Quantization(16, 4, "nvfp4")]
CASES = list(itertools.product(MODES, DTYPES))


def like(tensors):
    """Arrays of the same shapes that hold something else."""
    return QuantizedTensors(*(None if x is None else np.ones_like(x) for x in tensors))


def found(error):
    return error.squared_error, error.squared_values, error.max_error_steps


def steps_of(scales, quantization):
    """The size of each group's step, float32."""
    if quantization.mode == "affine":
        return np.abs(scales.astype(np.float32))
    kind = ml_dtypes.float8_e4m3fn if quantization.mode == "nvfp4" else ml_dtypes.float8_e8m0fnu
    return np.abs(scales.view(kind).astype(np.float32))


def reference(w, decoded, scales, quantization):
    """The definition: 16 lanes a group in float32, groups one after another in float64."""
    groups = (-1, quantization.group_size // 16, 16)
    x, y = (part.astype(np.float32).reshape(groups) for part in (w, decoded))
    with np.errstate(over="ignore"):
        squares = [(x - y) * (x - y), x * x]
    sums = []
    for square in squares:
        lanes = square[:, 0]
        for step in range(1, square.shape[1]):
            with np.errstate(over="ignore"):
                lanes = lanes + square[:, step]
        of_lanes = np.add.accumulate(lanes.astype(np.float64), axis=0)[-1]
        sums.append(float(np.add.accumulate(of_lanes)[-1]))
    with np.errstate(over="ignore"):
        most = np.abs(x - y).max((1, 2))
    units = steps_of(scales, quantization).reshape(-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.where(units > 0, most / units, np.float32(0))
    return *sums, float(ratios.max())


def normal(dtype, rows=40, cols=512):
    values = np.random.default_rng(3).standard_normal((rows, cols)) * 0.02
    return values.astype(np.float32).astype(dtype)


@pytest.mark.parametrize(("quantization", "dtype"), CASES)
def test_equals_the_separate_steps(quantization, dtype):
    """Codes of quantize, and the sums over what dequantize makes of them."""
    for w in (normal(dtype), np.concatenate(list(finite_inputs(dtype).values()))):
        expected = quantize(w, quantization)
        decoded = dequantize(expected, quantization, dtype=dtype)
        # Codes of the largest values decode to infinity: errors without a size.
        kept = np.isfinite(decoded.astype(np.float32)).all(1)
        w, decoded = w[kept], decoded[kept]
        expected = QuantizedTensors(*(None if x is None else x[kept] for x in expected))
        sums = reference(w, decoded, expected.scales, quantization)
        out, error, again = like(expected), EncodingError(), EncodingError()
        quantize_measured(w, quantization, out, error)
        measure(w, quantization, expected, again)
        for ours, theirs in zip(out, expected, strict=True):
            if ours is not None:
                assert_same_bits(ours, theirs)
        assert np.array_equal(found(error), sums, equal_nan=True)
        assert np.array_equal(found(again), sums, equal_nan=True)
        assert (error.nonfinite, again.nonfinite, again.flushed_groups) == (0, 0, 0)


@pytest.mark.parametrize(("quantization", "dtype"), CASES[:: len(DTYPES) + 1])
def test_sums_do_not_depend_on_the_cut(quantization, dtype):
    w = normal(dtype)
    tensors = quantize(w, quantization)
    whole = EncodingError()
    quantize_measured(w, quantization, tensors, whole)
    parts = EncodingError()
    for start, stop in itertools.pairwise((0, 1, 8, 9, 23, 40)):
        part = QuantizedTensors(*(None if x is None else x[start:stop] for x in tensors))
        quantize_measured(w[start:stop], quantization, part, parts)
    assert found(parts) == found(whole)


@pytest.mark.parametrize("quantization", MODES)
def test_sums_are_those_of_float64(quantization):
    w = normal(ml_dtypes.bfloat16)
    tensors, error = quantize(w, quantization), EncodingError()
    quantize_measured(w, quantization, tensors, error)
    x = w.astype(np.float64)
    d = x - dequantize(tensors, quantization).astype(np.float64)
    assert error.squared_error == pytest.approx((d * d).sum(), rel=1e-6)
    assert error.squared_values == pytest.approx((x * x).sum(), rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantization", MODES[2:3] + MODES[-3:])
def test_nonfinite_values_are_counted(quantization, dtype):
    """Across calls; the first one is numbered from the first value of the first call."""
    w = normal(dtype, 12)
    tensors, error = quantize(w, quantization), EncodingError()
    quantize_measured(w, quantization, tensors, error)
    assert (error.nonfinite, error.first_nonfinite) == (0, 0)
    w[7, 300], w[9, 0], w[11, 511] = np.nan, -np.inf, np.inf
    quantize_measured(w, quantization, tensors, error)
    assert (error.nonfinite, error.first_nonfinite) == (3, 12 * 512 + 7 * 512 + 300)
    measure(w, quantization, tensors, error)
    assert (error.nonfinite, error.first_nonfinite) == (6, 12 * 512 + 7 * 512 + 300)


def test_flushed_groups_are_counted():
    w = np.full((2, 64), 1e-40, np.float32)
    quantization = Quantization(32, 8, "mxfp8")
    tensors, error = quantize(w, quantization), EncodingError()
    quantize_measured(w, quantization, tensors, error)
    assert error.flushed_groups == 4


def test_wrong_arrays_are_rejected():
    w = normal(np.dtype(np.float32), 2).view(np.uint32)
    words, scales = np.empty((2, 64), np.uint32), np.empty((2, 8), np.uint32)
    error = EncodingError()
    with pytest.raises(ValueError, match="biases: expected an array for mode affine"):
        _native.quantize_measured(w, "F32", "affine", 64, 4, words, scales, None, error)
    with pytest.raises(ValueError, match=r"scales: expected shape \(2, 8\), got \(2, 4\)"):
        arrays = words, scales[:, :4], scales, error
        _native.quantize_measured(w, "F32", "affine", 64, 4, *arrays)
    with pytest.raises(ValueError, match="expected group_size 16 and bits 4, got 32 and 4"):
        _native.measure(w, "F32", "nvfp4", 32, 4, words, scales, None, error)
    with pytest.raises(ValueError, match="biases: expected None for mode mxfp4"):
        _native.measure(w, "F32", "mxfp4", 32, 4, words, scales, scales, error)
