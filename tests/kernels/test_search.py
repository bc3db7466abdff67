"""Searched scales: never worse than MLX's rule, by an objective computed here in float64."""

import itertools

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from requant.errors import InvariantError, ShapeMismatchError, UnknownValueError
from requant.kernels.quantize import (
    QuantizedTensors,
    dequantize,
    quantize,
    quantize_into,
    unpack_words,
)
from requant.quantization.config import Quantization
from requant.quantization.modes import AFFINE_BITS
from tests.support.inputs import BITS, COLS, DTYPES, assert_same_bits, finite_inputs

pytestmark = pytest.mark.sweep(6)

FLOAT_MODES = [("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)]
SPECS = [("affine", bits, group) for bits in AFFINE_BITS for group in (32, 64, 128)] + FLOAT_MODES
LEVELS = ("fast", "best")


def magnitudes(w, group_size):
    """What ``by_magnitude`` multiplies weights with, but for a factor of each group."""
    sizes = np.abs(w.astype(np.float64)).reshape(len(w), -1, group_size)
    mean = sizes.mean(-1, keepdims=True)
    usable = (mean * group_size > 1e-30) & (mean * group_size < 1e30)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(usable, sizes / mean + 0.375, 1.0).reshape(w.shape)


def group_errors(w, parts, mode, bits, group_size, weights=None):
    """Weighted squared error of each group, from stored codes and scales, in float64.

    Affine values are ``code * scale + bias`` without the rounding of a result, which
    depends on who multiplies; the values of the float modes are exact in float32.
    """
    words, scales, biases = parts
    if mode == "affine":
        codes = unpack_words(words, bits).astype(np.float64).reshape(*scales.shape, group_size)
        values = codes * scales.astype(np.float64)[..., None]
        values = (values + biases.astype(np.float64)[..., None]).reshape(w.shape)
    else:
        values = dequantize(
            QuantizedTensors(words, scales), Quantization(group_size, bits, mode), dtype=np.float32
        )
    squares = (w.astype(np.float64) - values.astype(np.float64)) ** 2
    squares *= 1.0 if weights is None else weights.astype(np.float64)
    return squares.reshape(*scales.shape, group_size).sum(-1)


def no_worse(after, before):
    """By group; a rule whose scale is infinite leaves nothing to be compared with."""
    return (after <= before * (1 + 1e-12)) | ~np.isfinite(before)


def adversarial(dtype):
    """Rows whose groups are constant, clustered, one outlier, sparse, tiny or huge."""
    rng = np.random.default_rng(3)
    largest = 3e4 if dtype == np.float16 else 1e38
    two = rng.choice([-1.0, 1.0], (8, COLS)) + rng.normal(0, 1e-3, (8, COLS))
    outlier = rng.normal(0, 0.01, (8, COLS))
    outlier[:, ::64] = 50.0
    ramp = np.tile(np.arange(COLS) % 16 * 0.125, (2, 1))
    sparse = np.where(rng.random((8, COLS)) < 0.05, rng.normal(0, 1, (8, COLS)), 0.0)
    offset = 1000.0 + rng.normal(0, 0.05, (8, COLS))
    tiny = rng.normal(0, 1, (8, COLS)) * np.exp2(rng.integers(-149, -90, (8, 1)))
    wide = rng.uniform(-1, 1, (8, COLS)) * largest
    heavy = rng.standard_t(2, (16, COLS)) * 0.02
    rows = [np.zeros((1, COLS)), np.ones((1, COLS)), two, outlier, ramp, sparse, offset, tiny]
    rows += [wide, heavy, rng.normal(0, 0.02, (32, COLS))]
    return np.clip(np.concatenate(rows), -largest, largest).astype(dtype)


@pytest.mark.parametrize(("mode", "bits", "group_size"), SPECS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", LEVELS)
def test_no_group_is_worse_than_the_rule(mode, bits, group_size, dtype, level):
    quantization = Quantization(group_size, bits, mode)
    rng = np.random.default_rng(5)
    w = np.concatenate([adversarial(dtype), *finite_inputs(dtype).values()])
    spread = np.exp2(rng.normal(0, 3, COLS))
    holes = np.where(rng.random(COLS) < 0.3, 0.0, rng.random(COLS))
    holes[:128] = 0.0  # whole groups without weight
    rule = quantize(w, quantization)
    for weights, by_magnitude in itertools.product((None, spread, holes), (False, True)):
        chosen = {"weights": weights, "by_magnitude": by_magnitude}
        found = quantize(w, quantization, search=level, **chosen)
        counted = np.float64(1) if weights is None else weights.astype(np.float32)
        counted = counted * (magnitudes(w, group_size) if by_magnitude else 1.0)
        before = group_errors(w, rule, mode, bits, group_size, counted)
        after = group_errors(w, found, mode, bits, group_size, counted)
        assert no_worse(after, before).all()


@pytest.mark.parametrize(
    ("mode", "bits", "group_size", "fast", "best"),
    [
        ("affine", 2, 64, 0.72, 0.66),
        ("affine", 3, 64, 0.83, 0.75),
        ("affine", 4, 64, 0.88, 0.80),
        ("affine", 5, 64, 0.90, 0.83),
        ("affine", 6, 64, 0.90, 0.83),
        ("affine", 8, 64, 0.63, 0.60),
        ("mxfp4", 4, 32, 0.90, 0.90),
        ("nvfp4", 4, 16, 0.80, 0.76),
    ],
)
def test_error_of_normal_weights(mode, bits, group_size, fast, best):
    """Squared error as a share of the rule's, in bfloat16."""
    quantization = Quantization(group_size, bits, mode)
    w = (np.random.default_rng(0).standard_normal((64, 4096)) * 0.02).astype(ml_dtypes.bfloat16)
    rule = group_errors(w, quantize(w, quantization), mode, bits, group_size).sum()
    for level, share in (("fast", fast), ("best", best)):
        found = quantize(w, quantization, search=level)
        assert group_errors(w, found, mode, bits, group_size).sum() < share * rule


@pytest.mark.parametrize(("mode", "bits", "group_size"), SPECS)
def test_weights_move_the_error_where_it_counts_less(mode, bits, group_size):
    quantization = Quantization(group_size, bits, mode)
    rng = np.random.default_rng(1)
    w = rng.normal(0, 0.3, (64, COLS)).astype(np.float32)
    weights = np.where(np.arange(COLS) % 8 == 0, 100.0, 0.01)
    spec = (mode, bits, group_size, weights)
    blind = quantize(w, quantization, search="best")
    seeing = quantize(w, quantization, search="best", weights=weights)
    missing, kept = (group_errors(w, parts, *spec).sum() for parts in (blind, seeing))
    assert kept <= missing if mode == "mxfp8" else kept < 0.97 * missing


@pytest.mark.parametrize(("mode", "bits", "group_size"), [("affine", 3, 64), ("affine", 4, 64)])
def test_large_values_are_kept_closer_by_magnitude(mode, bits, group_size):
    """The squared error of the largest eighth of each group falls, that of the others rises."""
    w = np.random.default_rng(4).standard_t(4, (64, 4096)).astype(np.float32)
    quantization = Quantization(group_size, bits, mode)
    is_large = np.abs(w).reshape(64, -1, group_size)
    is_large = (is_large >= np.quantile(is_large, 0.875, axis=-1, keepdims=True)).reshape(w.shape)
    plain, kept = (
        quantize(w, quantization, search="best", by_magnitude=chosen) for chosen in (False, True)
    )
    for chosen, less in ((is_large, True), (~is_large, False)):
        errors = [group_errors(w, x, mode, bits, group_size, chosen).sum() for x in (plain, kept)]
        assert bool(errors[1] < errors[0]) is less


@pytest.mark.parametrize(("mode", "bits", "group_size"), SPECS)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("by_magnitude", [False, True])
def test_same_bytes_for_any_chunk_and_build(mode, bits, group_size, level, by_magnitude, isa):
    from requant.kernels import _native

    quantization = Quantization(group_size, bits, mode)
    w = np.concatenate([adversarial(DTYPES[2]), *finite_inputs(DTYPES[2]).values()])
    chosen = {"search": level, "weights": np.random.default_rng(2).random(COLS)}
    chosen["by_magnitude"] = by_magnitude
    whole = quantize(w, quantization, **chosen)
    parts = [None if part is None else np.empty_like(part) for part in whole]
    for start, stop in itertools.pairwise([0, 1, 2, 5, 18, len(w)]):
        rows = [None if part is None else part[start:stop] for part in parts]
        chunk = w[start:stop]
        quantize_into(chunk, quantization, QuantizedTensors(*rows), **chosen)
    _native.set_isa("baseline")
    plainest = quantize(w, quantization, **chosen)
    _native.set_isa(isa)
    for a, b, c in zip(whole, parts, plainest, strict=True):
        if a is not None:
            assert_same_bits(b, a)
            assert_same_bits(c, a)


@pytest.mark.parametrize("global_scale", [None, 0.07, 3.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", LEVELS)
def test_nvfp4_next_to_the_rule(dtype, level, global_scale, isa):
    """A group that keeps the rule's scale keeps its codes; one that does not loses less."""
    w = np.concatenate([adversarial(dtype), *finite_inputs(dtype).values()])
    nvfp4, scale = Quantization(16, 4, "nvfp4"), {"global_scale": global_scale}
    rule, found = quantize(w, nvfp4, **scale), quantize(w, nvfp4, **scale, search=level)
    kept = found[1] == rule[1]
    eights = [words.view(np.uint64).reshape(kept.shape) for words in (rule[0], found[0])]
    assert 0 < kept.mean() < 1
    assert (eights[0] == eights[1])[kept].all()
    values = [dequantize(parts, nvfp4, **scale, dtype=np.float32) for parts in (rule, found)]
    before, after = ((w.astype(np.float64) - x.astype(np.float64)) ** 2 for x in values)
    before, after = (squares.reshape(*kept.shape, 16).sum(-1) for squares in (before, after))
    assert no_worse(after, before).all()
    assert (after < before)[~kept & np.isfinite(before)].all()


@settings(max_examples=40)
@given(st.data())
def test_any_bits_are_not_worse(data):
    """Random bit patterns, finite ones, in any shape and spec."""
    mode, bits, group_size = data.draw(st.sampled_from(SPECS))
    quantization = Quantization(group_size, bits, mode)
    dtype = data.draw(st.sampled_from(DTYPES))
    shape = (
        data.draw(st.integers(1, 20)),
        group_size * data.draw(st.integers(1, 3)) * (2 if group_size == 16 else 1),
    )
    seed = data.draw(st.integers(0, 2**32 - 1))
    uint = BITS[dtype.itemsize]
    w = np.random.default_rng(seed).integers(0, np.iinfo(uint).max, shape, uint).view(dtype)
    w = np.where(np.isfinite(w.astype(np.float32)), w, dtype.type(0))
    rule = quantize(w, quantization)
    for level in LEVELS:
        found = quantize(w, quantization, search=level)
        before = group_errors(w, rule, mode, bits, group_size)
        after = group_errors(w, found, mode, bits, group_size)
        assert no_worse(after, before).all()


def test_exactly_representable_values_stay():
    """Codes times a scale plus a bias, all in bfloat16: nothing to win, nothing lost."""
    w = (np.tile(np.arange(16), (4, 8)) * 0.25 - 2.0).astype(ml_dtypes.bfloat16)
    for level in LEVELS:
        tensors = quantize(w, Quantization.affine(64, 4), search=level)
        assert_same_bits(dequantize(tensors, Quantization.affine(64, 4)), w)


def test_what_is_rejected():
    w = np.ones((2, 64), np.float32)
    with pytest.raises(UnknownValueError, match=r"quick.*fast.*best"):
        quantize(w, Quantization.affine(64, 4), search="quick")
    with pytest.raises(ShapeMismatchError, match="one an input"):
        quantize(w, Quantization.affine(64, 4), search="fast", weights=np.ones(32))
    with pytest.raises(InvariantError, match="for a search"):
        quantize(w, Quantization.affine(64, 4), weights=np.ones(64))
    for bad in (np.nan, np.inf, -1.0):
        weights = np.ones(64)
        weights[3] = bad
        with pytest.raises(InvariantError, match="finite and not negative"):
            quantize(w, Quantization.affine(64, 4), search="fast", weights=weights)
