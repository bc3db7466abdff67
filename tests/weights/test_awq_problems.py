"""transform_awq_weights: what is rejected, and in which order."""

import mlx.core as mx
import numpy as np
import pytest

from requant.errors import (
    DivisibilityError,
    InvariantError,
    KeyCollisionError,
    MissingKeyError,
    OutOfRangeError,
    RankMismatchError,
    ShapeMismatchError,
    UnknownValueError,
    UnsupportedDtypeError,
)
from requant.weights.awq import AwqLoadConfig, transform_awq_weights
from tests.support.layers.awq import CONFIG, stored


def rejected(error, weights, config=CONFIG, layer=None):
    with pytest.raises(error) as caught:
        transform_awq_weights(weights, config)
    assert type(caught.value) is error
    assert caught.value.layer == layer
    return caught.value


@pytest.mark.parametrize("version", ["gemv", "gemv_fast", "GEMM", "marlin", " "])
def test_other_versions(lib, version):
    error = rejected(UnknownValueError, stored(lib), AwqLoadConfig(group_size=32, version=version))
    assert (error.value, error.supported) == (version, ("gemm", ""))


@pytest.mark.parametrize("bits", [0, 2, 3, 8, 2**32 - 1])
def test_other_bits(lib, bits):
    error = rejected(OutOfRangeError, stored(lib), AwqLoadConfig(bits, 32))
    assert (error.name, error.value) == ("bits", bits)


@pytest.mark.parametrize("group_size", [2**31, 2**32 - 1, -1])
def test_group_size_that_mlx_has_no_int_for(lib, group_size):
    error = rejected(OutOfRangeError, stored(lib), AwqLoadConfig(group_size=group_size))
    assert (error.name, error.value) == ("group_size", group_size)


@pytest.mark.parametrize("dtype", ["int32", "uint8", "complex64"])
def test_scales_that_are_not_floats(lib, dtype):
    scales = lib.make(np.zeros((2, 16)), dtype)
    error = rejected(UnsupportedDtypeError, {**stored(lib), "up.scales": scales}, layer="up.scales")
    assert set(error.supported) == {"float16", "float32", "float64", "bfloat16"}


@pytest.mark.parametrize("suffix", ["weight", "biases"])
def test_name_that_is_taken(lib, suffix):
    weights = {**stored(lib), f"up.{suffix}": lib.make(np.zeros(1), "float16")}
    assert rejected(KeyCollisionError, weights, layer="up").key == f"up.{suffix}"


@pytest.mark.parametrize("suffix", ["qweight", "qzeros"])
@pytest.mark.parametrize("dtype", ["float32", "int16", "int64", "uint8"])
def test_words_of_another_dtype(lib, suffix, dtype):
    shape = {"qweight": (64, 2), "qzeros": (2, 2)}[suffix]
    weights = {**stored(lib), f"up.{suffix}": lib.make(np.zeros(shape), dtype)}
    error = rejected(UnsupportedDtypeError, weights, layer=f"up.{suffix}")
    assert (error.dtype, error.supported) == (dtype, ("uint32", "int32"))


@pytest.mark.parametrize("suffix", ["qweight", "scales"])
@pytest.mark.parametrize("shape", [(), (64,), (1, 64, 2)])
def test_words_or_scales_of_another_rank(lib, suffix, shape):
    dtype = {"qweight": "int32", "scales": "float16"}[suffix]
    weights = {**stored(lib), f"up.{suffix}": lib.make(np.zeros(shape), dtype)}
    error = rejected(RankMismatchError, weights, layer=f"up.{suffix}")
    assert (error.rank, error.shape) == (len(shape), shape)


@pytest.mark.parametrize("shape", [(1, 16), (3, 16), (2, 15), (2, 2), (16, 2)])
def test_scales_of_another_shape(lib, shape):
    weights = {**stored(lib), "up.scales": lib.make(np.zeros(shape), "float16")}
    error = rejected(ShapeMismatchError, weights, layer="up")
    assert (error.expected, error.actual) == ((2, 16), shape)


@pytest.mark.parametrize("shape", [(1, 2), (2, 16), (2,), (2, 2, 1), ()])
def test_zeros_of_another_shape(lib, shape):
    weights = {**stored(lib), "up.qzeros": lib.make(np.zeros(shape), "int32")}
    error = rejected(ShapeMismatchError, weights, layer="up.qzeros")
    assert (error.expected, error.actual) == ((2, 2), shape)


WORD, HALF, HALVES = ([0], "int32"), ([0], "float16"), ([[0]], "float16")
SIZE = ("name", "group_size")

# What is changed in the layer "up" and in the config; class, layer and fields of the error.
BROKEN = {
    "an order of groups": ({"g_idx": WORD}, {}, InvariantError, "up.g_idx"),
    "no scales": ({"scales": None}, {}, MissingKeyError, "up", ("key", "up.scales")),
    "a group of 0": ({}, {"group_size": 0}, OutOfRangeError, "up", SIZE, ("value", 0)),
    "half a group": (
        {},
        {"group_size": 48},
        DivisibilityError,
        "up.qweight",
        *(("name", "in_features"), ("value", 64), ("divisor", 48)),
    ),
    # Two things are wrong; the first in the order of the checks is the one reported.
    "version before bits": ({}, {"bits": 8, "version": "gemv"}, UnknownValueError, None),
    "bits first": ({}, {"bits": 8, "group_size": 2**31}, OutOfRangeError, None, ("name", "bits")),
    "size before order": ({"g_idx": WORD}, {"group_size": 2**31}, OutOfRangeError, None),
    "order before scales": ({"g_idx": WORD, "scales": None}, {}, InvariantError, "up.g_idx"),
    "weight before biases": (
        {"biases": HALF, "weight": HALF},
        {},
        KeyCollisionError,
        "up",
        ("key", "up.weight"),
    ),
    "biases before dtype": (
        {"biases": HALF, "qweight": ([[0.0] * 2] * 64, "float32")},
        {},
        KeyCollisionError,
        "up",
        ("key", "up.biases"),
    ),
    "dtype before rank": ({"qweight": ([0], "float32")}, {}, UnsupportedDtypeError, "up.qweight"),
    "words first": ({"qweight": WORD, "scales": HALF}, {}, RankMismatchError, "up.qweight"),
    "rank before group": ({"scales": HALF}, {"group_size": 0}, RankMismatchError, "up.scales"),
    "group first": ({"scales": HALVES}, {"group_size": 48}, DivisibilityError, "up.qweight"),
    "scales first": ({"scales": HALVES, "qzeros": HALVES}, {}, ShapeMismatchError, "up"),
    "dtype of zeros": ({"qzeros": ([0], "float32")}, {}, UnsupportedDtypeError, "up.qzeros"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_first_thing_wrong_is_reported(lib, case):
    parts, config, error, layer, *fields = BROKEN[case]
    weights = stored(lib)
    for suffix, part in parts.items():
        weights.pop(f"up.{suffix}", None)
        if part is not None:
            weights[f"up.{suffix}"] = lib.make(*part)
    found = rejected(error, weights, AwqLoadConfig(**{"group_size": 32, **config}), layer=layer)
    assert [(name, getattr(found, name)) for name, _ in fields] == fields


def test_zeros_are_checked_even_where_they_are_not_used(lib):
    weights = {**stored(lib), "up.qzeros": lib.make(np.zeros((9, 9)), "int32")}
    config = AwqLoadConfig(group_size=32, zero_point=False)
    rejected(ShapeMismatchError, weights, config, layer="up.qzeros")


def test_inputs_that_fill_no_words(lib):
    weights = stored(lib, n_in=12, groups=3)
    error = rejected(DivisibilityError, weights, AwqLoadConfig(group_size=4), layer="up.qweight")
    assert (error.name, error.value, error.divisor) == ("in_features", 12, 8)


def test_mixture_of_libraries():
    weights = {"up.qweight": np.zeros((32, 1), np.int32), "up.scales": mx.zeros((1, 8))}
    rejected(InvariantError, weights, layer="up.scales")


# The checks run over all layers one after the other.
def test_order_dtype_of_all_scales_before_missing_ones(lib):
    weights = stored(lib, "a") | stored(lib, "b", dtype="int32")
    del weights["a.scales"]
    rejected(UnsupportedDtypeError, weights, layer="b.scales")


def test_order_missing_scales_of_all_before_collisions(lib):
    weights = {**stored(lib, "a"), "a.weight": lib.make([0], "float16"), **stored(lib, "b")}
    del weights["b.scales"]
    rejected(MissingKeyError, weights, layer="b")


def test_order_all_layers_are_checked_before_words_are_filled(lib):
    weights = {**stored(lib, "a", n_in=12, groups=3), **stored(lib, "b", n_in=16, groups=3)}
    rejected(ShapeMismatchError, weights, AwqLoadConfig(group_size=4), layer="b")


def test_first_layer_by_name_is_reported(lib):
    weights = {**stored(lib, "b", groups=9), **stored(lib, "a", groups=9)}
    rejected(ShapeMismatchError, weights, layer="a")
