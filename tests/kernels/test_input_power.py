"""Estimates of the power of inputs, and errors weighted by them, against float64 NumPy."""

import itertools

import ml_dtypes
import numpy as np
import pytest

from requant.kernels import _native
from requant.kernels.input_power import (
    ColumnSums,
    estimated_power,
    input_power,
    sampled_blocks,
    weighted_error,
)
from tests.support.inputs import DTYPES

RNG = np.random.default_rng(7)


def heavy_columns(rows, columns):
    """Weights whose columns are normal at one end and mostly near zero at the other."""
    shape = RNG.standard_normal((rows, columns))
    return shape * np.abs(shape) ** np.linspace(0, 2, columns) * np.exp(RNG.normal(0, 1, columns))


def summed(w, borders=()):
    sums = ColumnSums(w.shape[1])
    for first, last in itertools.pairwise([0, *borders, len(w)]):
        sums.add(w[first:last])
    return sums


@pytest.mark.parametrize("dtype", DTYPES)
def test_power_of_columns(dtype):
    w = heavy_columns(192, 96).astype(dtype)
    wide = w.astype(np.float64)
    square, magnitude = (wide**2).mean(0), np.abs(wide).mean(0)
    # 192 of 192 + 64 rows leave 8 of the exponent's 10.
    expected = (square / magnitude**2) ** 8 / square
    found = input_power(summed(w))
    assert found.dtype == np.float32 and found.max() == 1
    np.testing.assert_allclose(found, expected / expected.max(), rtol=1e-6)
    expected = (square / magnitude**2) ** -6.0
    np.testing.assert_allclose(
        input_power(summed(w), rows_are_tokens=True), expected / expected.max(), rtol=1e-6
    )


def test_heavy_tails_and_small_weights_are_large_inputs():
    """Of columns in order of their tails, with the same mean square."""
    w = heavy_columns(4096, 64)
    w /= np.sqrt((w**2).mean(0))
    w[:, 3] /= 4
    power = input_power(summed(w.astype(np.float32)))
    assert power[3] > 8 * power[[2, 4]].max()
    assert power[-8:].min() > 100 * power[4:12].max()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_for_any_chunk_and_build(dtype, isa):
    w = heavy_columns(257, 101).astype(dtype)
    whole = summed(w)
    _native.set_isa("baseline")
    for sums in (summed(w), summed(w, (1, 2, 100, 256))):
        assert (sums.magnitudes == whole.magnitudes).all()
        assert (sums.squares == whole.squares).all()
    _native.set_isa(isa)


def test_columns_of_zeros_count_least():
    w = heavy_columns(64, 32).astype(np.float32)
    w[:, 5] = 0
    power = input_power(summed(w))
    assert power[5] == power.min() > 0
    for dead in (np.zeros((8, 32), np.float32), np.full((8, 32), np.inf, np.float32)):
        assert (input_power(summed(dead)) == 1).all()


def test_blocks_of_a_long_matrix():
    assert list(sampled_blocks(4095)) == [(0, 4095)]
    blocks = list(sampled_blocks(8200))
    assert blocks[:2] == [(0, 64), (256, 320)] and blocks[-1] == (8192, 8200)
    w = heavy_columns(8200, 16).astype(ml_dtypes.bfloat16)
    chosen = np.concatenate([w[first:last] for first, last in blocks])
    assert (estimated_power(w) == input_power(summed(chosen))).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", [16, 32, 64, 128])
@pytest.mark.parametrize("by_magnitude", [False, True])
def test_weighted_error(dtype, group_size, by_magnitude, isa):
    w = heavy_columns(5, 256).astype(dtype)
    w[0] = 0
    decoded = (w.astype(np.float64) + RNG.normal(0, 0.1, w.shape)).astype(dtype)
    columns = RNG.random(256).astype(np.float32)
    wide, weights = w.astype(np.float64), np.tile(columns.astype(np.float64), (5, 1))
    if by_magnitude:
        sizes = np.abs(wide).reshape(5, -1, group_size)
        mean = sizes.mean(-1, keepdims=True)
        factor = np.divide(sizes, mean, where=mean > 0, out=np.full(sizes.shape, 0.625)) + 0.375
        weights *= factor.reshape(w.shape)
    squares = (wide - decoded.astype(np.float64)) ** 2
    found = weighted_error(w, decoded, group_size, columns, by_magnitude)
    np.testing.assert_allclose(found, [(weights * x).sum() for x in (squares, wide**2)], 1e-12)
    _native.set_isa("baseline")
    assert weighted_error(w, decoded, group_size, columns, by_magnitude) == found
    _native.set_isa(isa)
