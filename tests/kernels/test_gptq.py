"""GPTQ: the kernels bit for bit as NumPy does it, and Hessians that are none."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from requant.core.dtypes import HEADER_NAME
from requant.errors import InvariantError, ShapeMismatchError
from requant.kernels import _native, gptq
from requant.kernels import quantize as native
from requant.kernels.float_views import as_unsigned
from requant.kernels.quantize import unpack_words
from requant.quantization.config import Quantization
from requant.quantization.modes import AFFINE_BITS
from tests.support.inputs import DTYPES, assert_same_bits

pytestmark = pytest.mark.sweep(2)


def hessian_of(n_in: int, tokens: int = 4096, seed: int = 0) -> np.ndarray:
    """Of inputs that go together in a few directions."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(tokens, n_in)) * 0.3
    x += rng.normal(size=(tokens, 8)) @ rng.normal(size=(8, n_in))
    return (x.T @ x / tokens).astype(np.float32)


def weights_of(rows: int, n_in: int, dtype: object = np.float32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.02, (rows, n_in)).astype(dtype)


def reference(w, start, group_size, bits, scales, biases, propagation):
    """The same steps, a column at a time over all rows, in float32."""
    w, codes = w.copy(), np.empty((len(w), group_size), np.uint8)
    top = np.float32(2**bits - 1)
    with np.errstate(all="ignore"):
        for j in range(start, start + group_size):
            t = np.where(scales != 0, (w[:, j] - biases) / scales, np.float32(0))
            code = np.rint(np.clip(t, np.float32(0), top))
            error = w[:, j] - (code * scales + biases)
            codes[:, j - start] = code
            w[:, j + 1 :] -= error[:, None] * propagation[j, j + 1 :]
    return w, codes


def refined(w, codes, scales, biases, hessian, group_size, bits, sweeps):
    """The refinement, a group of all rows at a time, in float32; least squares in float64."""
    q = codes.astype(np.float32)
    s, b = (x.astype(np.float32) for x in (scales, biases))
    n_in, stored = w.shape[1], scales.dtype
    gradient, top = np.zeros_like(w), np.float32(2**bits - 1)

    def subtract(target, factors, rows_of_hessian):
        for factor, row in zip(factors.T, rows_of_hessian, strict=True):
            target -= factor[:, None] * row

    def total(x):
        return sum(x.T.astype(np.float64), np.zeros(len(x)))

    groups = [slice(start, start + group_size) for start in range(0, n_in, group_size)]
    for number, g in enumerate(groups):
        error = w[:, g] - (q[:, g] * s[:, number, None] + b[:, number, None])
        subtract(gradient, -error, hessian[g])
    for _ in range(sweeps):
        for number, g in enumerate(groups):
            block = hessian[g, g]
            sums = sum(block, np.zeros(group_size, np.float32))
            values, code, local = w[:, g], q[:, g].copy(), gradient[:, g].copy()
            scale, bias = s[:, number].copy(), b[:, number].copy()
            before = values - (code * scale[:, None] + bias[:, None])
            error, used = before.copy(), scale != 0
            for _ in range(2):
                products = np.zeros_like(code)
                subtract(products, -code, block)
                qq, q1 = total(code * np.float64(1) * products), total(code * np.float64(1) * sums)
                ones = total(sums[None])[0]
                qg, g1 = total(code * np.float64(1) * local), total(local)
                determinant = qq * ones - q1 * q1
                slope = ((qg * ones - g1 * q1) / determinant).astype(np.float32)
                new_scale = (scale + slope).astype(stored).astype(np.float32)
                slope = new_scale.astype(np.float64) - scale
                offset = ((g1 - slope * q1) / ones).astype(np.float32)
                new_bias = (bias + offset).astype(stored).astype(np.float32)
                shift = new_bias.astype(np.float64) - bias
                change = slope * (slope * qq - 2 * qg) + shift * (shift * ones - 2 * g1)
                change += 2 * (slope * (shift * q1))
                kept = used & (determinant > 1e-6 * (qq * ones)) & (change < 0) & (new_scale != 0)
                kept &= np.isfinite(new_scale) & np.isfinite(new_bias)
                scale, bias = np.where(kept, new_scale, scale), np.where(kept, new_bias, bias)
                for i in range(group_size):
                    new = np.where(kept, values[:, i] - (code[:, i] * scale + bias), error[:, i])
                    subtract(local, (error[:, i] - new)[:, None], block[i : i + 1])
                    error[:, i] = new
                for i in range(group_size):
                    step = scale * block[i, i]
                    t = code[:, i] + local[:, i] / step
                    t = np.rint(np.clip(t, np.float32(0), top))
                    moved = used & (step != 0) & (t != code[:, i])
                    new = np.where(moved, values[:, i] - (t * scale + bias), error[:, i])
                    code[:, i] = np.where(moved, t, code[:, i])
                    subtract(local, (error[:, i] - new)[:, None], block[i : i + 1])
                    error[:, i] = new
            q[:, g], s[:, number], b[:, number] = code, scale, bias
            subtract(gradient, before - error, hessian[g])
    return q.astype(np.uint8), s.astype(stored), b.astype(stored)


def refine(w, codes, scales, biases, hessian, group_size, bits, sweeps):
    """The kernel; nothing given is changed."""
    codes, scales, biases = codes.copy(), scales.copy(), biases.copy()
    scratch = np.empty(w.shape, np.uint32), np.empty((len(w), group_size), np.uint32)
    parts = codes, HEADER_NAME[scales.dtype], as_unsigned(scales), as_unsigned(biases)
    views = [np.ascontiguousarray(x).view(np.uint32) for x in (w, hessian)]
    _native.gptq_refine(views[0], group_size, bits, sweeps, views[1], *parts, *scratch)
    return codes, scales, biases


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", AFFINE_BITS)
@settings(max_examples=4)
@given(st.integers(0, 9), st.sampled_from([32, 64, 128]), st.integers(1, 4), st.randoms())
def test_refinement_is_the_reference(bits, dtype, rows, group_size, groups, random) -> None:
    rng = np.random.default_rng(random.getrandbits(32))
    n_in = group_size * groups
    w = rng.normal(0, 0.02, (rows, n_in)).astype(dtype)
    hessian = hessian_of(n_in, tokens=256, seed=random.getrandbits(32))
    hessian = np.triu(hessian) + np.triu(hessian, 1).T
    dead = rng.random(n_in) < 0.05
    hessian[dead], hessian[:, dead] = 0.0, 0.0
    words, scales, biases = native.quantize(w, Quantization.affine(group_size, bits))
    codes = unpack_words(words, bits)
    moved = rng.random(codes.shape) < 0.3
    codes[moved] = rng.integers(0, 2**bits, moved.sum())
    scales[rng.random(scales.shape) < 0.1] = 0
    args = w.astype(np.float32), codes, scales, biases, hessian, group_size, bits, 2
    for made, expected in zip(refine(*args), refined(*args), strict=True):
        assert_same_bits(made, expected)


def weighted_least_squares(w, codes, hessian):
    """Scales and biases of a row's groups, by which its outputs' error is least: NumPy's own."""
    root = np.linalg.cholesky(hessian).T  # e H e^T = |root e|^2
    groups, group_size = codes.shape
    columns = np.zeros((w.size, 2 * groups))
    for number in range(groups):
        part = slice(number * group_size, (number + 1) * group_size)
        columns[part, 2 * number], columns[part, 2 * number + 1] = codes[number], 1.0
    fit = np.linalg.lstsq(root @ columns, root @ w, rcond=None)[0].reshape(groups, 2)
    residual = root @ (w - columns @ fit.ravel())
    return fit, float(residual @ residual)


def test_scales_and_biases_become_the_least_squares_of_their_codes() -> None:
    """Within what float32 holds, after many sweeps."""
    hessian = hessian_of(192).astype(np.float64) + 0.01 * np.eye(192)
    w = weights_of(3, 192)
    words, scales, biases = native.quantize(w, Quantization.affine(64, 3))
    args = unpack_words(words, 3), scales, biases, hessian.astype(np.float32)
    codes, scales, biases = refine(w, *args, 64, 3, 60)
    for row in range(3):
        groups = codes[row].reshape(-1, 64)
        fit, least = weighted_least_squares(w[row].astype(np.float64), groups, hessian)
        found = groups * scales[row, :, None].astype(np.float64) + biases[row, :, None]
        e = w[row] - found.ravel()
        assert e @ hessian @ e == pytest.approx(least, rel=1e-3)
        np.testing.assert_allclose(scales[row], fit[:, 0], rtol=1e-2)


def test_no_single_change_of_a_code_would_be_better() -> None:
    w, n_in = weights_of(5, 128), 128
    hessian = hessian_of(n_in)
    words, scales, biases = native.quantize(w, Quantization.affine(64, 3))
    codes, scales, biases = refine(w, unpack_words(words, 3), scales, biases, hessian, 64, 3, 40)
    steps = scales.astype(np.float64).repeat(64, 1)
    e = w - (codes * steps + biases.astype(np.float64).repeat(64, 1))
    for direction in (-1, 1):
        change = direction * steps
        gained = change**2 * np.diagonal(hessian) - 2 * change * (e @ hessian)
        moved = codes.astype(int) + direction
        within = (moved >= 0) & (moved <= 7)
        assert gained[within].min() > -1e-9


@pytest.mark.parametrize("bits", AFFINE_BITS)
@settings(max_examples=15)
@given(st.integers(0, 9), st.sampled_from([32, 64, 128]), st.integers(1, 6), st.randoms())
def test_kernel_is_the_reference(bits, rows, group_size, groups, random) -> None:
    rng = np.random.default_rng(random.getrandbits(32))
    n_in = group_size * groups
    start = group_size * int(rng.integers(groups))
    w = rng.normal(size=(rows, n_in)).astype(np.float32)
    propagation = np.triu(rng.normal(size=(n_in, n_in)) * 0.1).astype(np.float32)
    scales = (rng.normal(size=rows) * 0.3).astype(np.float32)
    scales[rng.random(rows) < 0.1] = 0.0
    biases = rng.normal(size=rows).astype(np.float32)
    expected_w, expected = reference(w, start, group_size, bits, scales, biases, propagation)
    codes = np.empty((rows, group_size), np.uint8)
    errors = np.empty((rows, group_size), np.uint32)
    columns = [a.view(np.uint32)[:, None] for a in (scales, biases)]
    parts = [*columns, propagation.view(np.uint32)]
    _native.gptq_group(w.view(np.uint32), start, group_size, bits, *parts, codes, errors)
    assert codes.tolist() == expected.tolist()
    stop = start + group_size  # the group's own columns are only work space
    assert_same_bits(w[:, stop:], expected_w[:, stop:])
    assert_same_bits(w[:, :start], expected_w[:, :start])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_whole_layer_is_the_reference(dtype, bits) -> None:
    w = weights_of(24, 192, dtype)
    made = gptq.compensation_of(hessian_of(192), 192)
    words, scales, biases = gptq.quantize(w, made, Quantization.affine(64, bits))
    values, parts = w.astype(np.float32), []
    for group in range(3):
        part = np.ascontiguousarray(values[:, 64 * group : 64 * group + 64].astype(dtype))
        importance = made.importance[64 * group : 64 * group + 64]
        _, s, b = native.quantize(
            part, Quantization.affine(64, bits), search="best", weights=importance
        )
        wide = [a[:, 0].astype(np.float32) for a in (s, b)]
        values, group_codes = reference(values, 64 * group, 64, bits, *wide, made.propagation)
        parts.append([group_codes, s, b])
    found = [np.concatenate(x, 1) for x in zip(*parts, strict=True)]
    found = refined(w.astype(np.float32), *found, made.hessian, 64, bits, 3)
    assert unpack_words(words, bits).tolist() == found[0].tolist()
    assert_same_bits(scales, found[1])
    assert_same_bits(biases, found[2])


def test_any_ranges_of_rows_give_the_same_bytes() -> None:
    w = weights_of(37, 128)
    made = gptq.compensation_of(hessian_of(128), 128)
    whole = gptq.quantize(w, made, Quantization.affine(64, 4))
    cuts = [0, 1, 6, 23, 37]
    parts = [
        gptq.quantize(np.ascontiguousarray(w[a:b]), made, Quantization.affine(64, 4))
        for a, b in pairwise(cuts)
    ]
    for number, expected in enumerate(whole):
        assert_same_bits(np.concatenate([part[number] for part in parts]), expected)


def output_error(w, parts, bits, hessian) -> float:
    """Mean squared error of the layer's outputs, ``tr(D H D^T)``."""
    words, scales, biases = (a.astype(np.float64) if a.dtype != np.uint32 else a for a in parts)
    codes = unpack_words(words, bits).reshape(*scales.shape, -1)
    d = (codes * scales[..., None] + biases[..., None]).reshape(w.shape) - w
    return float(np.einsum("ri,ij,rj", d, hessian.astype(np.float64), d))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_outputs_are_nearer_than_by_the_search(bits) -> None:
    w, hessian = weights_of(64, 256), hessian_of(256)
    made = gptq.quantize(w, gptq.compensation_of(hessian, 256), Quantization.affine(64, bits))
    searched = native.quantize(w, Quantization.affine(64, bits), search="best")
    assert output_error(w, made, bits, hessian) < 0.5 * output_error(w, searched, bits, hessian)


def test_independent_inputs_have_nothing_to_propagate() -> None:
    w = weights_of(8, 128)
    made = gptq.compensation_of(np.eye(128, dtype=np.float32), 128)
    assert made.propagation.tolist() == np.eye(128).tolist()
    words, *_ = gptq.quantize(w, made, Quantization.affine(64, 4))
    assert (words == native.quantize(w, Quantization.affine(64, 4), search="best")[0]).mean() > 0.9


def test_shares_by_hand() -> None:
    """H = [[2, 1], [1, 2]]: the second input compensates half of the error of the first."""
    made = gptq.compensation_of(np.array([[2.0, 1.0], [1.0, 2.0]]), 2, damping=0.0)
    np.testing.assert_allclose(made.propagation, [[1.0, -0.5], [0.0, 1.0]], rtol=1e-6)


def test_a_singular_hessian_is_damped_until_it_can_be_factored() -> None:
    x = np.random.default_rng(0).normal(size=(3, 64))
    exact = gptq.compensation_of((x.T @ x).astype(np.float32), 64)
    assert exact.damping == gptq.DAMPING
    slightly_negative = np.diag([1.0] * 63 + [0.5]) - 1.05 / 64 * np.ones((64, 64))
    made = gptq.compensation_of(slightly_negative, 64)
    assert made.damping > gptq.DAMPING and np.isfinite(made.propagation).all()


def test_dead_inputs_take_and_give_nothing() -> None:
    hessian = hessian_of(64)
    hessian[5], hessian[:, 5] = 0.0, 0.0
    made = gptq.compensation_of(hessian, 64)
    assert made.dead == 1
    assert made.propagation[5].tolist() == np.eye(64)[5].tolist()
    assert made.propagation[:, 5].tolist() == np.eye(64)[:, 5].tolist()


def test_a_layer_that_saw_nothing_is_searched_alone() -> None:
    w = weights_of(4, 64)
    made = gptq.compensation_of(np.zeros((64, 64), np.float32), 64)
    assert made.dead == 64
    words, scales, biases = gptq.quantize(w, made, Quantization.affine(64, 4))
    searched = native.quantize(w, Quantization.affine(64, 4), search="best")
    assert_same_bits(scales, searched[1])
    assert_same_bits(biases, searched[2])
    assert (words == searched[0]).all()


@pytest.mark.parametrize(
    "make_nonfinite",
    [
        lambda h: h.__setitem__((3, 4), np.nan),
        lambda h: h.__setitem__((3, 4), np.inf),
        lambda h: h.__setitem__((3, 3), -1.0),
        lambda h: h.__imul__(0).__setitem__((0, 1), 1e30) or h.__setitem__((0, 0), 1.0),
    ],
)
def test_what_is_not_a_hessian_is_rejected(make_nonfinite) -> None:
    hessian = np.eye(64, dtype=np.float32)
    make_nonfinite(hessian)
    if (hessian.diagonal() == 0).any():
        hessian[1, 1] = 1.0
    with pytest.raises(InvariantError, match="hessian"):
        gptq.compensation_of(hessian, 64)


def test_shapes_that_disagree_are_both_reported() -> None:
    with pytest.raises(ShapeMismatchError, match=r"\[64, 64\], got \[32, 32\]"):
        gptq.compensation_of(np.eye(32), 64)
    with pytest.raises(ShapeMismatchError, match=r"\[128, 128\], got \[64, 64\]"):
        gptq.quantize(
            weights_of(2, 128), gptq.compensation_of(np.eye(64), 64), Quantization.affine(64, 4)
        )


@pytest.mark.parametrize("n", [1, 2, 63, 128, 129, 255, 300])
def test_the_inverse_of_a_triangle_is_numpy_s(n: int) -> None:
    rng = np.random.default_rng(n)
    triangle = np.triu(rng.normal(size=(n, n)) * 0.1) + 2.0 * np.eye(n)
    made = np.zeros((n, n))
    gptq._invert_upper(triangle, made)
    np.testing.assert_allclose(made, np.linalg.inv(triangle), rtol=1e-9, atol=1e-12)
    assert not np.tril(made, -1).any()
