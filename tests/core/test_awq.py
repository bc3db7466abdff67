"""AutoAWQ in memory: unpacking, the checks in their order, the conversion."""

from __future__ import annotations

import json

import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_np
from safetensors import safe_open

from requant.arrays import NUMPY
from requant.arrays import mlx as mlx_backend
from requant.awq_weights import AwqLoadConfig, transform_awq_weights, unpack_awq_weights
from requant.errors import (
    BackendError,
    DivisibilityError,
    InvariantError,
    KeyCollisionError,
    MissingKeyError,
    OutOfRangeError,
    ParseError,
    RankMismatchError,
    ShapeMismatchError,
    UnknownValueError,
    UnsupportedDtypeError,
)
from requant.schema import PerLayerQuantization, Quantization
from requant.weights import dequantize_weights
from tests.core.helpers import CountingMap, assert_bits, assert_same_arrays, memory_taken

# AutoAWQ's own order: the lowest nibble of a word holds output 0, the next output 2, ...
OUTPUT_IN_NIBBLE = (0, 2, 4, 6, 1, 3, 5, 7)
CONFIG = AwqLoadConfig(group_size=32)


def awq_words(codes):
    """(rows, 8 n) codes -> (rows, n) AutoAWQ words, int32."""
    codes = np.asarray(codes, np.uint32)
    words = np.zeros((codes.shape[0], codes.shape[1] // 8), np.uint32)
    for nibble, output in enumerate(OUTPUT_IN_NIBBLE):
        words |= codes[:, output::8] << np.uint32(4 * nibble)
    return words.view(np.int32)


def mlx_words(codes):
    """(rows, 8 n) codes -> (rows, n) words, first code in the lowest bits."""
    codes = np.asarray(codes, np.uint32)
    words = np.zeros((codes.shape[0], codes.shape[1] // 8), np.uint32)
    for nibble in range(8):
        words |= codes[:, nibble::8] << np.uint32(4 * nibble)
    return words


def stored(lib, name="up", *, n_in=64, words=2, groups=2, dtype="float16", zeros=True, value=0.5):
    """An AWQ layer; every code is 0, every zero 0."""
    parts = {
        f"{name}.qweight": lib.make(np.zeros((n_in, words)), "int32"),
        f"{name}.scales": lib.make(np.full((groups, 8 * words), value), dtype),
    }
    if zeros:
        parts[f"{name}.qzeros"] = lib.make(np.zeros((groups, words)), "int32")
    return parts


# ---- AwqLoadConfig


def test_config_defaults():
    assert AwqLoadConfig() == AwqLoadConfig(bits=4, group_size=128, zero_point=True, version="")
    assert AwqLoadConfig.from_dict({}) == AwqLoadConfig()


def test_config_reads_its_keys_and_ignores_others():
    block = {"bits": 3, "group_size": 64, "zero_point": False, "version": "gemv", "quant": None}
    assert AwqLoadConfig.from_dict(block) == AwqLoadConfig(3, 64, False, "gemv")


def test_config_is_frozen_and_hashable():
    with pytest.raises(AttributeError):
        AwqLoadConfig().bits = 8
    assert hash(AwqLoadConfig()) == hash(AwqLoadConfig())


def test_config_round_trips():
    config = AwqLoadConfig(4, 2**32 - 1, False, "gemm")
    assert AwqLoadConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("key", ["bits", "group_size"])
@pytest.mark.parametrize("value", [None, True, 4.0, "4", -1, 2**32, [4]], ids=repr)
def test_config_refuses_what_is_no_uint32(key, value):
    with pytest.raises(ParseError, match=key):
        AwqLoadConfig.from_dict({key: value})


@pytest.mark.parametrize("value", [None, 0, 1, "true"], ids=repr)
def test_config_refuses_a_zero_point_that_is_no_boolean(value):
    with pytest.raises(ParseError, match="zero_point"):
        AwqLoadConfig.from_dict({"zero_point": value})


@pytest.mark.parametrize("value", [None, 1, ["gemm"]], ids=repr)
def test_config_refuses_a_version_that_is_no_string(value):
    with pytest.raises(ParseError, match="version"):
        AwqLoadConfig.from_dict({"version": value})


@pytest.mark.parametrize("block", [None, [4, 128], "awq"])
def test_config_refuses_what_is_no_object(block):
    with pytest.raises(ParseError, match="object"):
        AwqLoadConfig.from_dict(block)


# ---- unpack_awq_weights


@pytest.mark.parametrize("dtype", ["int32", "uint32"])
def test_unpack_word_written_by_hand(lib, dtype):
    """Codes 0 to 7: even outputs in the low half, odd ones in the high half."""
    got = lib.read(unpack_awq_weights(lib.make([[0x75316420]], dtype)))
    assert_bits(got, np.array([[0, 1, 2, 3, 4, 5, 6, 7]], np.uint32))


def test_unpack_reads_a_negative_word_by_its_bits(lib):
    """0xF0FFFFFF: the top nibble, output 7, is 15; the one below, output 5, is 0."""
    got = lib.read(unpack_awq_weights(lib.make([[-0x0F000001]], "int32")))
    assert got.tolist() == [[15, 15, 15, 15, 15, 0, 15, 15]]


def test_unpack_never_converts_words_by_value(lib, monkeypatch):
    """Where a library clamps negative values, a conversion would lose the highest codes."""
    array = lib.make([[-1]], "int32")
    monkeypatch.delattr(type(NUMPY) if lib.name == "numpy" else mlx_backend, "astype")
    assert lib.read(unpack_awq_weights(array)).tolist() == [[15] * 8]


def test_unpack_keeps_rows_and_words_in_order(lib):
    words = lib.make([[0x0, 0x11111111], [0x22222222, 0x33333333]], "uint32")
    got = lib.read(unpack_awq_weights(words))
    assert got.tolist() == [[0] * 8 + [1] * 8, [2] * 8 + [3] * 8]


@pytest.mark.parametrize("shape", [(0, 2), (2, 0)])
def test_unpack_empty(lib, shape):
    got = lib.read(unpack_awq_weights(lib.make(np.zeros(shape), "int32")))
    assert got.shape == (shape[0], 8 * shape[1])


@pytest.mark.parametrize("shape", [(), (4,), (1, 2, 3)])
def test_unpack_refuses_other_than_two_axes(lib, shape):
    with pytest.raises(RankMismatchError) as caught:
        unpack_awq_weights(lib.make(np.zeros(shape), "int32"))
    assert (caught.value.rank, caught.value.shape) == (len(shape), shape)
    assert caught.value.layer is None


def test_unpack_refuses_the_rank_before_the_dtype(lib):
    with pytest.raises(RankMismatchError):
        unpack_awq_weights(lib.make([0.0], "float32"))


@pytest.mark.parametrize("dtype", ["float32", "int16", "uint8", "int64"])
def test_unpack_refuses_other_dtypes(lib, dtype):
    with pytest.raises(UnsupportedDtypeError) as caught:
        unpack_awq_weights(lib.make([[1]], dtype))
    assert (caught.value.dtype, caught.value.supported) == (dtype, ("uint32", "int32"))


def test_unpack_refuses_what_is_no_array():
    with pytest.raises(UnsupportedDtypeError) as caught:
        unpack_awq_weights([[1]])
    assert caught.value.layer is None


def test_unpack_refuses_what_mlx_cannot_hold():
    with pytest.raises(BackendError):
        unpack_awq_weights(mx.broadcast_to(mx.array([[1]], mx.uint32), (2, 2**28)))


@given(st_np.arrays(np.uint32, st_np.array_shapes(min_dims=2, max_dims=2)))
def test_unpack_any_words(lib, words):
    expected = np.empty((words.shape[0], 8 * words.shape[1]), np.uint32)
    for nibble, output in enumerate(OUTPUT_IN_NIBBLE):
        expected[:, output::8] = words // 16**nibble % 16
    for view in (np.uint32, np.int32):
        array = lib.make(words.view(view), np.dtype(view).name)
        assert_bits(lib.read(unpack_awq_weights(array)), expected)


# ---- transform_awq_weights: what comes out


def test_layer_written_by_hand(lib):
    """32 inputs, 8 outputs holding 0 to 7; zeros 4 and scales 0.5 give -2 to 1.5."""
    weights = {
        "up.qweight": lib.make(np.full((32, 1), 0x75316420), "int32"),
        "up.qzeros": lib.make([[0x44444444]], "int32"),
        "up.scales": lib.make(np.full((1, 8), 0.5), "float16"),
    }
    got, quantization = transform_awq_weights(weights, CONFIG)

    assert quantization == PerLayerQuantization.from_global(Quantization.affine(32, 4))
    assert list(got) == ["up.weight", "up.scales", "up.biases"]
    words = lib.read(got["up.weight"])
    assert_bits(words, np.array([[r * 0x11111111] * 4 for r in range(8)], np.uint32))
    assert_bits(lib.read(got["up.scales"]), np.full((8, 1), 0.5, np.float16))
    assert_bits(lib.read(got["up.biases"]), np.full((8, 1), -2.0, np.float16))
    dense = lib.read(dequantize_weights(got, quantization)["up.weight"])
    assert dense.tolist() == [[v] * 32 for v in (-2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5)]


@pytest.mark.parametrize("dtype", ["int32", "uint32"])
def test_codes_are_transposed_and_packed_along_the_inputs(lib, dtype):
    generator = np.random.default_rng(7)
    codes, zeros = generator.integers(0, 16, (64, 24)), generator.integers(0, 16, (2, 24))
    scales = generator.normal(size=(2, 24)).astype(np.float32)
    weights = {
        "up.qweight": lib.make(awq_words(codes).view(dtype), dtype),
        "up.qzeros": lib.make(awq_words(zeros).view(dtype), dtype),
        "up.scales": lib.make(scales, "float32"),
    }
    got, _ = transform_awq_weights(weights, CONFIG)
    assert_bits(lib.read(got["up.weight"]), mlx_words(codes.T))
    assert_bits(lib.read(got["up.scales"]), np.ascontiguousarray(scales.T))
    expected = -(zeros.T.astype(np.float32) * scales.T)
    assert_bits(lib.read(got["up.biases"]), np.ascontiguousarray(expected))


def test_bias_of_a_zero_of_zero_is_minus_zero(lib):
    got, _ = transform_awq_weights(stored(lib), CONFIG)
    assert_bits(lib.read(got["up.biases"]), np.full((16, 2), -0.0, np.float16))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_bias_is_rounded_once_to_the_dtype_of_the_scales(lib, dtype):
    zeros = np.arange(16).reshape(1, 16)
    weights = {
        "up.qweight": lib.make(np.zeros((32, 2)), "int32"),
        "up.qzeros": lib.make(awq_words(zeros), "int32"),
        "up.scales": lib.make(np.full((1, 16), 0.1), dtype),
    }
    got, _ = transform_awq_weights(weights, CONFIG)
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    scale = np.float64(np.array(0.1).astype(kind).astype(np.float32))
    exact = np.float32(-scale * zeros.T)  # a product of 28 significant bits, rounded in float32
    assert_bits(lib.read(got["up.biases"]), exact.astype(kind))


@pytest.mark.parametrize("zeros", [True, False], ids=["with qzeros", "without qzeros"])
def test_symmetric_config_takes_eight_for_every_zero(lib, zeros):
    config = AwqLoadConfig(group_size=32, zero_point=False)
    got, _ = transform_awq_weights(stored(lib, zeros=zeros, value=0.75), config)
    assert list(got) == ["up.weight", "up.scales", "up.biases"]
    assert_bits(lib.read(got["up.biases"]), np.full((16, 2), -6.0, np.float16))


def test_layer_without_zeros_takes_eight_for_every_zero(lib):
    weights = {**stored(lib, "a", zeros=False, value=0.75), **stored(lib, "b", value=0.75)}
    got, _ = transform_awq_weights(weights, CONFIG)
    assert_bits(lib.read(got["a.biases"]), np.full((16, 2), -6.0, np.float16))
    assert_bits(lib.read(got["b.biases"]), np.full((16, 2), -0.0, np.float16))


def test_symmetric_bias_overflows_to_inf_in_the_dtype_of_the_scales(lib):
    got, _ = transform_awq_weights(stored(lib, zeros=False, value=6e4), CONFIG)
    assert np.all(np.isneginf(lib.read(got["up.biases"])))


@pytest.mark.parametrize("version", ["", "gemm"])
def test_gemm_is_taken_by_either_name(lib, version):
    transform_awq_weights(stored(lib), AwqLoadConfig(group_size=32, version=version))


def test_own_bias_of_a_layer_passes(lib):
    weights = {**stored(lib), "up.bias": lib.make(np.ones(16), "float16")}
    got, _ = transform_awq_weights(weights, CONFIG)
    assert got["up.bias"] is weights["up.bias"]


def test_other_tensors_pass_as_they_are(lib):
    rest = {
        "norm.weight": lib.make(np.ones(8), "bfloat16"),
        "lm_head.weight": lib.make(np.ones((8, 8)), "float16"),
        "lone.scales": lib.make(np.ones(3), "int32"),
        "lone.qzeros": lib.make(np.ones(3), "float32"),
        "dense.biases": lib.make(np.ones(3), "float32"),
    }
    got, _ = transform_awq_weights({**rest, **stored(lib)}, CONFIG)
    assert_same_arrays({name: got[name] for name in rest}, rest)
    assert sorted(set(got) - set(rest)) == ["up.biases", "up.scales", "up.weight"]


def test_map_without_awq_layers_passes_whole(lib):
    weights = {"up.weight": lib.make(np.ones((2, 2)), "float32")}
    got, quantization = transform_awq_weights(weights, CONFIG)
    assert_same_arrays(got, weights)
    assert quantization.quantization == Quantization.affine(32, 4)


def test_group_size_zero_without_awq_layers_is_nobodys_business(lib):
    weights = {"up.weight": lib.make(np.ones((2, 2)), "float32")}
    _, quantization = transform_awq_weights(weights, AwqLoadConfig(group_size=0))
    assert quantization.quantization == Quantization.affine(0, 4)


def test_any_mapping_will_do_and_each_array_is_read_once(lib):
    weights = CountingMap(stored(lib))
    transform_awq_weights(weights, CONFIG)
    assert sorted(weights.reads) == ["up.qweight", "up.qzeros", "up.scales"]


def test_empty_map():
    assert transform_awq_weights({}, CONFIG)[0] == {}


def test_input_map_is_not_modified(lib):
    weights = stored(lib)
    before = dict(weights)
    transform_awq_weights(weights, CONFIG)
    assert_same_arrays(weights, before)
    assert np.all(lib.read(weights["up.qweight"]) == 0)


def test_layer_with_the_empty_path(lib):
    got, _ = transform_awq_weights(stored(lib, ""), CONFIG)
    assert sorted(got) == [".biases", ".scales", ".weight"]


# ---- one dtype for all scales


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        (["float16"], "float16"),
        (["bfloat16"], "bfloat16"),
        (["float16", "float16"], "float16"),
        (["float16", "float32"], "float32"),
        (["float32", "bfloat16"], "float32"),
        (["float64", "float32", "float16"], "float64"),
        (["float16", "bfloat16"], "float32"),
        (["bfloat16", "float16"], "float32"),
        (["bfloat16", "float32", "float16"], "float32"),
        (["float16", "bfloat16", "float64"], "float64"),
    ],
    ids=str,
)
def test_common_dtype(lib, dtypes, expected):
    weights = {}
    for index, dtype in enumerate(dtypes):
        weights |= stored(lib, f"layer{index}", dtype=dtype)
    got, _ = transform_awq_weights(weights, CONFIG)
    for index in range(len(dtypes)):
        for suffix in ("scales", "biases"):
            assert lib.read(got[f"layer{index}.{suffix}"]).dtype.name == expected
        assert lib.read(got[f"layer{index}.weight"]).dtype == np.uint32


def test_float16_and_bfloat16_keep_their_values_together(lib):
    weights = {
        **stored(lib, "a", dtype="float16", value=1 + 2**-10),
        **stored(lib, "b", dtype="bfloat16", value=2.0**100),
    }
    got, _ = transform_awq_weights(weights, CONFIG)
    assert np.all(lib.read(got["a.scales"]) == np.float32(1 + 2**-10))
    assert np.all(lib.read(got["b.scales"]) == np.float32(2.0**100))


def test_bias_is_rounded_to_its_layer_before_the_common_dtype(lib):
    """-3 * (1 + 2**-10) needs 12 bits: float16 rounds it to even, though float32 would hold it."""
    weights = {
        "a.qweight": lib.make(np.zeros((32, 1)), "int32"),
        "a.qzeros": lib.make([[0x33333333]], "int32"),
        "a.scales": lib.make(np.full((1, 8), 1 + 2**-10), "float16"),
        **stored(lib, "b", dtype="float32"),
    }
    got, _ = transform_awq_weights(weights, CONFIG)
    assert_bits(lib.read(got["a.biases"]), np.full((8, 1), -(3 + 2**-8), np.float32))


def test_passing_tensors_are_never_widened(lib):
    weights = {
        **stored(lib, "a", dtype="float16"),
        **stored(lib, "b", dtype="bfloat16"),
        "norm.weight": lib.make(np.ones(8), "bfloat16"),
        "lone.scales": lib.make(np.ones(8), "float16"),
        "a.bias": lib.make(np.ones(8), "float16"),
    }
    got, _ = transform_awq_weights(weights, CONFIG)
    for name in ("norm.weight", "lone.scales", "a.bias"):
        assert got[name] is weights[name]


# ---- what is refused


def refused(error, weights, config=CONFIG, layer=None):
    with pytest.raises(error) as caught:
        transform_awq_weights(weights, config)
    assert type(caught.value) is error
    assert caught.value.layer == layer
    return caught.value


def without(weights, *names):
    return {name: array for name, array in weights.items() if name not in names}


@pytest.mark.parametrize("version", ["gemv", "gemv_fast", "GEMM", "marlin", " "])
def test_other_versions(lib, version):
    error = refused(UnknownValueError, stored(lib), AwqLoadConfig(group_size=32, version=version))
    assert (error.value, error.supported) == (version, ("gemm", ""))


@pytest.mark.parametrize("bits", [0, 2, 3, 8, 2**32 - 1])
def test_other_bits(lib, bits):
    error = refused(OutOfRangeError, stored(lib), AwqLoadConfig(bits, 32))
    assert (error.name, error.value) == ("bits", bits)


@pytest.mark.parametrize("group_size", [2**31, 2**32 - 1, -1])
def test_group_size_that_mlx_has_no_int_for(lib, group_size):
    error = refused(OutOfRangeError, stored(lib), AwqLoadConfig(group_size=group_size))
    assert (error.name, error.value) == ("group_size", group_size)


def test_order_of_groups(lib):
    weights = {**stored(lib), "other.g_idx": lib.make(np.zeros(64), "int32")}
    refused(InvariantError, weights, layer="other.g_idx")


@pytest.mark.parametrize("dtype", ["int32", "uint8", "complex64"])
def test_scales_that_are_no_floats(lib, dtype):
    scales = lib.make(np.zeros((2, 16)), dtype)
    error = refused(UnsupportedDtypeError, {**stored(lib), "up.scales": scales}, layer="up.scales")
    assert set(error.supported) == {"float16", "float32", "float64", "bfloat16"}


def test_missing_scales(lib):
    error = refused(MissingKeyError, without(stored(lib), "up.scales"), layer="up")
    assert error.key == "up.scales"


@pytest.mark.parametrize("suffix", ["weight", "biases"])
def test_name_that_is_taken(lib, suffix):
    weights = {**stored(lib), f"up.{suffix}": lib.make(np.zeros(1), "float16")}
    assert refused(KeyCollisionError, weights, layer="up").key == f"up.{suffix}"


@pytest.mark.parametrize("suffix", ["qweight", "qzeros"])
@pytest.mark.parametrize("dtype", ["float32", "int16", "int64", "uint8"])
def test_words_of_another_dtype(lib, suffix, dtype):
    shape = {"qweight": (64, 2), "qzeros": (2, 2)}[suffix]
    weights = {**stored(lib), f"up.{suffix}": lib.make(np.zeros(shape), dtype)}
    error = refused(UnsupportedDtypeError, weights, layer=f"up.{suffix}")
    assert (error.dtype, error.supported) == (dtype, ("uint32", "int32"))


@pytest.mark.parametrize("suffix", ["qweight", "scales"])
@pytest.mark.parametrize("shape", [(), (64,), (1, 64, 2)])
def test_words_or_scales_of_another_rank(lib, suffix, shape):
    dtype = {"qweight": "int32", "scales": "float16"}[suffix]
    weights = {**stored(lib), f"up.{suffix}": lib.make(np.zeros(shape), dtype)}
    error = refused(RankMismatchError, weights, layer=f"up.{suffix}")
    assert (error.rank, error.shape) == (len(shape), shape)


def test_group_size_zero(lib):
    error = refused(OutOfRangeError, stored(lib), AwqLoadConfig(group_size=0), layer="up")
    assert (error.name, error.value) == ("group_size", 0)


def test_inputs_that_fill_no_groups(lib):
    error = refused(
        DivisibilityError, stored(lib), AwqLoadConfig(group_size=48), layer="up.qweight"
    )
    assert (error.name, error.value, error.divisor) == ("in_features", 64, 48)


def test_inputs_that_fill_no_words(lib):
    weights = stored(lib, n_in=12, groups=3)
    error = refused(DivisibilityError, weights, AwqLoadConfig(group_size=4), layer="up.qweight")
    assert (error.name, error.value, error.divisor) == ("in_features", 12, 8)


@pytest.mark.parametrize("shape", [(1, 16), (3, 16), (2, 15), (2, 2), (16, 2)])
def test_scales_of_another_shape(lib, shape):
    weights = {**stored(lib), "up.scales": lib.make(np.zeros(shape), "float16")}
    error = refused(ShapeMismatchError, weights, layer="up")
    assert (error.expected, error.actual) == ((2, 16), shape)


@pytest.mark.parametrize("shape", [(1, 2), (2, 16), (2,), (2, 2, 1), ()])
def test_zeros_of_another_shape(lib, shape):
    weights = {**stored(lib), "up.qzeros": lib.make(np.zeros(shape), "int32")}
    error = refused(ShapeMismatchError, weights, layer="up.qzeros")
    assert (error.expected, error.actual) == ((2, 2), shape)


def test_zeros_are_checked_even_where_they_are_not_used(lib):
    weights = {**stored(lib), "up.qzeros": lib.make(np.zeros((9, 9)), "int32")}
    config = AwqLoadConfig(group_size=32, zero_point=False)
    refused(ShapeMismatchError, weights, config, layer="up.qzeros")


def test_mixture_of_libraries():
    weights = {"up.qweight": np.zeros((32, 1), np.int32), "up.scales": mx.zeros((1, 8))}
    refused(InvariantError, weights, layer="up.scales")


# Each test breaks two things; the first in the order of the checks is the one reported.


def test_order_version_before_bits(lib):
    refused(UnknownValueError, stored(lib), AwqLoadConfig(bits=8, version="gemv"))


def test_order_bits_before_group_size(lib):
    assert refused(OutOfRangeError, stored(lib), AwqLoadConfig(8, 2**31)).name == "bits"


def test_order_group_size_before_order_of_groups(lib):
    weights = {**stored(lib), "up.g_idx": lib.make(np.zeros(64), "int32")}
    refused(OutOfRangeError, weights, AwqLoadConfig(group_size=2**31))


def test_order_of_groups_before_scales(lib):
    weights = {**without(stored(lib), "up.scales"), "up.g_idx": lib.make([0], "int32")}
    refused(InvariantError, weights, layer="up.g_idx")


def test_order_dtype_of_all_scales_before_missing_ones(lib):
    weights = {**without(stored(lib, "a"), "a.scales"), **stored(lib, "b", dtype="int32")}
    refused(UnsupportedDtypeError, weights, layer="b.scales")


def test_order_missing_scales_of_all_before_collisions(lib):
    weights = {
        **stored(lib, "a"),
        "a.weight": lib.make([0], "float16"),
        **without(stored(lib, "b"), "b.scales"),
    }
    refused(MissingKeyError, weights, layer="b")


def test_order_weight_before_biases_before_dtype(lib):
    weights = {**stored(lib), "up.qweight": lib.make(np.zeros((64, 2)), "float32")}
    weights["up.biases"] = lib.make([0], "float16")
    assert refused(KeyCollisionError, weights, layer="up").key == "up.biases"
    weights["up.weight"] = lib.make([0], "float16")
    assert refused(KeyCollisionError, weights, layer="up").key == "up.weight"


def test_order_dtype_before_rank_of_words(lib):
    weights = {**stored(lib), "up.qweight": lib.make(np.zeros(64), "float32")}
    refused(UnsupportedDtypeError, weights, layer="up.qweight")


def test_order_rank_of_words_before_rank_of_scales(lib):
    weights = {**stored(lib), "up.qweight": lib.make([0], "int32")}
    weights["up.scales"] = lib.make([0], "float16")
    refused(RankMismatchError, weights, layer="up.qweight")


def test_order_rank_before_group_size_zero(lib):
    weights = {**stored(lib), "up.scales": lib.make([0], "float16")}
    refused(RankMismatchError, weights, AwqLoadConfig(group_size=0), layer="up.scales")


def test_order_groups_before_shape_of_scales(lib):
    weights = {**stored(lib), "up.scales": lib.make([[0]], "float16")}
    refused(DivisibilityError, weights, AwqLoadConfig(group_size=48), layer="up.qweight")


def test_order_scales_before_zeros(lib):
    weights = {**stored(lib), "up.scales": lib.make([[0]], "float16")}
    weights["up.qzeros"] = lib.make([[0.0]], "float32")
    refused(ShapeMismatchError, weights, layer="up")


def test_order_dtype_before_shape_of_zeros(lib):
    weights = {**stored(lib), "up.qzeros": lib.make([0.0], "float32")}
    refused(UnsupportedDtypeError, weights, layer="up.qzeros")


def test_order_all_layers_are_checked_before_words_are_filled(lib):
    weights = {
        **stored(lib, "a", n_in=12, groups=3),
        **stored(lib, "b", n_in=16, groups=3),
    }
    refused(ShapeMismatchError, weights, AwqLoadConfig(group_size=4), layer="b")


def test_first_layer_by_name_is_reported(lib):
    weights = {**stored(lib, "b", groups=9), **stored(lib, "a", groups=9)}
    refused(ShapeMismatchError, weights, layer="a")


# ---- laziness


def test_mlx_arrays_are_not_evaluated():
    """4 TiB of codes: any evaluation would fail."""
    weights = {
        "up.qweight": mx.broadcast_to(mx.array(-1, mx.int32), (2**20, 2**17)),
        "up.qzeros": mx.broadcast_to(mx.array(-1, mx.int32), (2**15, 2**17)),
        "up.scales": mx.broadcast_to(mx.array(1.0, mx.float16), (2**15, 2**20)),
        **stored_bfloat16(),
    }
    got, _ = transform_awq_weights(weights, CONFIG)
    assert got["up.weight"].shape == (2**20, 2**17)
    assert got["up.biases"].shape == (2**20, 2**15)
    assert got["up.biases"].dtype == mx.float32


@pytest.mark.parametrize("zero_point", [True, False])
def test_no_array_is_evaluated_in_between(zero_point):
    weights = {
        "up.qweight": mx.ones((512, 64), mx.int32),
        "up.qzeros": mx.ones((16, 64), mx.int32),
        "up.scales": mx.ones((16, 512), mx.float16),
        "norm.weight": mx.ones((2**16,), mx.float32),
    }
    config = AwqLoadConfig(group_size=32, zero_point=zero_point)
    (got, _), taken = memory_taken(lambda: transform_awq_weights(weights, config))
    assert taken < 4096
    _, taken = memory_taken(lambda: mx.eval(*got.values()))
    assert taken >= sum(array.nbytes for array in got.values())


def test_unpack_does_not_evaluate_mlx_arrays():
    words = mx.ones((512, 64), mx.int32)
    codes, taken = memory_taken(lambda: unpack_awq_weights(words))
    assert taken < 4096
    _, taken = memory_taken(lambda: mx.eval(codes))
    assert taken >= codes.nbytes


def stored_bfloat16():
    return {
        "b.qweight": mx.broadcast_to(mx.array(-1, mx.int32), (2**20, 2**17)),
        "b.scales": mx.broadcast_to(mx.array(1.0, mx.bfloat16), (2**15, 2**20)),
    }


# ---- values


@st.composite
def layers(draw):
    """Codes, zeros and scales of a layer with an exact product in float32."""
    group_size = draw(st.sampled_from([32, 64, 128]))
    groups, n_out = draw(st.integers(1, 3)), 8 * draw(st.integers(1, 3))
    nibbles = st.integers(0, 15)
    codes = draw(st_np.arrays(np.uint32, (groups * group_size, n_out), elements=nibbles))
    zeros = draw(st_np.arrays(np.uint32, (groups, n_out), elements=nibbles))
    scales = draw(
        st_np.arrays(np.float16, (groups, n_out), elements=st.floats(-100, 100, width=16))
    )
    return group_size, codes, zeros, scales


@given(layers(), st.booleans())
def test_value_is_code_minus_zero_times_scale(lib, layer, zero_point):
    group_size, codes, zeros, scales = layer
    weights = {
        "up.qweight": lib.make(awq_words(codes), "int32"),
        "up.qzeros": lib.make(awq_words(zeros), "int32"),
        "up.scales": lib.make(scales, "float32"),
    }
    config = AwqLoadConfig(group_size=group_size, zero_point=zero_point)
    got, quantization = transform_awq_weights(weights, config)
    assert_bits(lib.read(got["up.weight"]), mlx_words(codes.T))

    dense = lib.read(dequantize_weights(got, quantization)["up.weight"])
    offset = np.repeat(zeros, group_size, axis=0).astype(np.float64) if zero_point else 8.0
    expected = (codes - offset) * np.repeat(scales, group_size, axis=0).astype(np.float64)
    assert dense.dtype == np.float32
    assert np.array_equal(dense, expected.T)


FIXTURES = ["awq-gemm-g128", "awq-gemm-g32", "awq-gemm-g64-bias", "awq-gemm-g64-skip"]


@pytest.mark.parametrize("name", FIXTURES)
def test_checkpoint_written_by_autoawq(lib, shared, name):
    """The values are those that AutoAWQ itself decodes, exactly, with the scales in float32."""
    folder = shared / "fixtures" / name
    block = json.loads((folder / "checkpoint/config.json").read_text())["quantization_config"]
    weights = {}
    with safe_open(folder / "checkpoint/model.safetensors", "np") as file:
        for key in file.keys():  # noqa: SIM118
            array = file.get_tensor(key)
            kind = "float32" if key.endswith(".scales") else array.dtype.name
            weights[key] = lib.make(array, kind)
    converted, quantization = transform_awq_weights(weights, AwqLoadConfig.from_dict(block))

    dense = dequantize_weights(converted, quantization)
    with safe_open(folder / "expected.safetensors", "np") as file:
        expected = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert expected
    for key, values in expected.items():
        assert np.array_equal(lib.read(dense[key]), values), key
    assert not any(key.endswith((".qweight", ".qzeros", ".scales")) for key in dense)
