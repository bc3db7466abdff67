"""quantize_weights: what is taken, what passes through, what is rejected."""

from __future__ import annotations

import re

import mlx.core as mx
import numpy as np
import pytest

from requant.errors import (
    BackendError,
    InvariantError,
    KeyCollisionError,
    LengthMismatchError,
    MissingKeyError,
    OutOfRangeError,
    RankMismatchError,
    RequantError,
    ShapeMismatchError,
    UnsupportedDtypeError,
)
from requant.quantization.config import SKIP, PerLayerQuantization, Quantization
from requant.weights.quantize import default_eligible, quantize_weights
from tests.support.quantized_weights import (
    AFFINE,
    LEGAL,
    CountingMap,
    assert_bits,
    assert_same_arrays,
    config,
    memory_taken,
    mx_quantize,
)

FLOATS = ("float32", "float16", "bfloat16")


def triple(lib, *, words=(2, 4), scales=(2, 1), biases=(2, 1), dtype="float32"):
    """A quantized layer "up" with parts of these shapes; None leaves one out."""
    parts = {
        "up.weight": (words, "uint32"),
        "up.scales": (scales, dtype),
        "up.biases": (biases, dtype),
    }
    return {
        name: lib.make(np.ones(shape), kind)
        for name, (shape, kind) in parts.items()
        if shape is not None
    }


# ---- what is quantized


def test_vector_from_the_format_description(lib):
    """Section 12.1 of the layouts page: one group of 32, 4 bits, bytes written by hand."""
    values = [((7 * i % 32) - 11) / 8 for i in range(32)]
    got = quantize_weights({"up.weight": lib.make([values], "float32")}, AFFINE)

    words = lib.read(got["up.weight"])
    assert [f"{word:08x}" for word in words[0]] == ["7ae258cf", "be269c04", "f26ad048", "36ae148c"]
    assert lib.read(got["up.scales"]).view(np.uint32).tolist() == [[0xBE800000]]
    assert lib.read(got["up.biases"]).view(np.uint32).tolist() == [[0x40200000]]
    assert list(got) == ["up.weight", "up.scales", "up.biases"]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("quantization", LEGAL, ids=str)
def test_bits_are_those_of_mlx(lib, quantization, dtype):
    values = np.random.default_rng(1).normal(size=(6, 256)).astype(np.float32)
    plan = PerLayerQuantization.from_global(quantization)
    got = quantize_weights({"up.weight": lib.make(values, dtype)}, plan)

    expected = mx_quantize(mx.array(values).astype(getattr(mx, dtype)), quantization)
    assert set(got) == {f"up.{suffix}" for suffix in expected}
    for suffix, array in expected.items():
        kind = str(array.dtype).removeprefix("mlx.core.")
        if kind == "bfloat16":
            assert lib.read(got[f"up.{suffix}"]).dtype.name == kind
            raw = lib.read(got[f"up.{suffix}"]).view(np.uint16)
            assert_bits(raw, np.array(array.view(mx.uint16)))
        else:
            assert_bits(lib.read(got[f"up.{suffix}"]), np.array(array))


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
def test_float_modes_write_byte_scales_and_no_biases(lib, mode):
    group, bits = {"mxfp4": (32, 4), "mxfp8": (32, 8), "nvfp4": (16, 4)}[mode]
    got = quantize_weights(
        {"up.weight": lib.make(np.ones((2, 64)), "float16")}, config(group, bits, mode)
    )
    assert list(got) == ["up.weight", "up.scales"]
    assert lib.read(got["up.scales"]).dtype == np.uint8
    assert lib.read(got["up.scales"]).shape == (2, 64 // group)


def test_leading_axes_are_kept(lib):
    values = np.random.default_rng(2).normal(size=(3, 2, 64))
    got = quantize_weights({"up.weight": lib.make(values, "float32")}, AFFINE)
    flat = quantize_weights({"up.weight": lib.make(values.reshape(6, 64), "float32")}, AFFINE)
    assert lib.read(got["up.weight"]).shape == (3, 2, 8)
    assert lib.read(got["up.scales"]).shape == (3, 2, 2)
    for name in got:
        assert_bits(lib.read(got[name]).reshape(lib.read(flat[name]).shape), lib.read(flat[name]))


def test_strided_input_gives_the_same_bits(lib):
    values = np.random.default_rng(3).normal(size=(64, 8))
    strided = lib.make(values, "float32").T
    plain = lib.make(values.T.copy(), "float32")
    got = quantize_weights({"up.weight": strided}, AFFINE)
    expected = quantize_weights({"up.weight": plain}, AFFINE)
    for name in got:
        assert_bits(lib.read(got[name]), lib.read(expected[name]))


def test_layer_override_wins_over_the_default(lib):
    plan = PerLayerQuantization(Quantization(32, 4), {"up": Quantization(64, 8)})
    weights = {
        "up.weight": lib.make(np.ones((2, 64)), "float32"),
        "down.weight": lib.make(np.ones((2, 64)), "float32"),
    }
    got = quantize_weights(weights, plan)
    assert lib.read(got["up.weight"]).shape == (2, 16)
    assert lib.read(got["up.scales"]).shape == (2, 1)
    assert lib.read(got["down.weight"]).shape == (2, 8)
    assert lib.read(got["down.scales"]).shape == (2, 2)


def test_without_a_default_only_named_layers_are_taken(lib):
    plan = PerLayerQuantization(None, {"up": Quantization(32, 4)})
    weights = {
        "up.weight": lib.make(np.ones((2, 32)), "float32"),
        "down.weight": lib.make(np.ones((2, 32)), "float32"),
    }
    got = quantize_weights(weights, plan)
    assert sorted(got) == ["down.weight", "up.biases", "up.scales", "up.weight"]
    assert got["down.weight"] is weights["down.weight"]


def test_layer_with_the_empty_path(lib):
    got = quantize_weights({".weight": lib.make(np.ones((2, 32)), "float32")}, AFFINE)
    assert sorted(got) == [".biases", ".scales", ".weight"]


def test_own_bias_of_a_layer_is_not_a_sibling(lib):
    weights = {
        "up.weight": lib.make(np.ones((2, 32)), "float32"),
        "up.bias": lib.make(np.ones(2), "float32"),
    }
    got = quantize_weights(weights, AFFINE)
    assert sorted(got) == ["up.bias", "up.biases", "up.scales", "up.weight"]
    assert got["up.bias"] is weights["up.bias"]


def test_input_map_is_not_modified(lib):
    weights = {"up.weight": lib.make(np.ones((2, 32)), "float32")}
    before = dict(weights)
    got = quantize_weights(weights, AFFINE)
    assert_same_arrays(weights, before)
    assert got is not weights
    assert np.all(lib.read(weights["up.weight"]) == 1)


def test_any_mapping_will_do_and_each_array_is_read_once(lib):
    weights = CountingMap({"up.weight": lib.make(np.ones((2, 32)), "float32")})
    quantize_weights(weights, AFFINE)
    assert weights.reads == ["up.weight"]


def test_empty_map_gives_an_empty_map():
    assert quantize_weights({}, AFFINE) == {}


# ---- what passes through


def unchanged(weights, plan=AFFINE, eligible=default_eligible):
    assert_same_arrays(quantize_weights(weights, plan, eligible), weights)


def test_names_that_do_not_end_in_weight_pass(lib):
    names = ["up.qweight", "up.weight_scale", "weight", "up.weight.data", "up_weight"]
    unchanged({name: lib.make(np.ones((2, 32)), "float32") for name in names})


def test_lone_scales_and_biases_without_weight_pass(lib):
    unchanged(triple(lib, words=None))


def test_ineligible_layer_passes(lib):
    unchanged(
        {"up.weight": lib.make(np.ones((2, 32)), "float32")}, eligible=lambda path, weight: False
    )


def test_eligible_is_asked_with_path_and_array(lib):
    weights = {
        "a.up.weight": lib.make(np.ones((2, 32)), "float32"),
        "a.norm.weight": lib.make(np.ones(32), "float32"),
        "a.bias": lib.make(np.ones(32), "float32"),
        **triple(lib),
    }
    asked = []

    def eligible(path, weight):
        asked.append((path, weight is weights[f"{path}.weight"]))
        return path.endswith("up")

    quantize_weights(weights, AFFINE, eligible)
    # Neither other names nor layers that are quantized already are asked about.
    assert asked == [("a.up", True), ("a.norm", True)]


def test_eligible_may_be_wrong_in_its_own_way(lib):
    def eligible(path, weight):
        raise KeyError(path)

    with pytest.raises(KeyError):
        quantize_weights({"up.weight": lib.make(np.ones((2, 32)), "float32")}, AFFINE, eligible)


def test_eligible_cannot_overrule_shape_or_skip(lib):
    plan = PerLayerQuantization(Quantization(32, 4), {"up": SKIP})
    weights = {
        "up.weight": lib.make(np.ones((2, 32)), "float32"),
        "norm.weight": lib.make(np.ones(32), "float32"),
    }
    unchanged(weights, plan, lambda path, weight: True)


def test_default_eligible_takes_everything(lib):
    assert default_eligible("norm", lib.make(np.ones(1), "float32")) is True


def test_skipped_layer_passes(lib):
    plan = PerLayerQuantization(Quantization(32, 4), {"up": SKIP})
    unchanged({"up.weight": lib.make(np.ones((2, 32)), "float32")}, plan)


def test_layer_without_any_quantization_passes(lib):
    unchanged({"up.weight": lib.make(np.ones((2, 32)), "float32")}, PerLayerQuantization())


@pytest.mark.parametrize("shape", [(), (32,), (64,)])
def test_fewer_than_two_axes_pass(lib, shape):
    unchanged({"up.weight": lib.make(np.ones(shape), "float32")})


@pytest.mark.parametrize("last", [1, 31, 33, 48])
def test_last_axis_off_the_group_passes(lib, last):
    unchanged({"up.weight": lib.make(np.ones((32, last)), "float32")})


def test_group_size_zero_passes(lib):
    """mx.quantize would divide by it, and take the process down."""
    unchanged({"up.weight": lib.make(np.ones((2, 32)), "float32")}, config(0, 4))


@pytest.mark.parametrize("shape", [(), (32,)])
def test_negative_group_size_is_not_looked_at_below_two_axes(lib, shape):
    unchanged({"up.weight": lib.make(np.ones(shape), "float32")}, config(-32, 4))


def test_integer_weight_that_does_not_fit_passes(lib):
    unchanged({"up.weight": lib.make(np.ones((2, 5)), "int32")})


def test_affine_triple_passes(lib):
    unchanged(triple(lib))


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
def test_float_mode_triple_passes(lib, mode):
    unchanged(triple(lib, biases=None, dtype="uint8"), config(32, 4, mode))


def test_triple_with_its_own_entry_passes_without_default(lib):
    unchanged(triple(lib), PerLayerQuantization(None, {"up": Quantization(32, 4)}))


def test_triple_of_three_axes_passes(lib):
    unchanged(triple(lib, words=(5, 2, 4), scales=(5, 2, 1), biases=(5, 2, 1)))


def test_triple_is_not_checked_beyond_its_layout(lib):
    """Last axis, scale dtype, shape of the biases and legal bits are dequantize's to judge."""
    unchanged(triple(lib, scales=(2, 9), biases=(7,), dtype="int32"), config(3, 99))


def test_triple_that_is_ineligible_passes(lib):
    unchanged(triple(lib), eligible=lambda path, weight: False)


# ---- what is rejected: the parts of a layer contradict each other


def rejected(error, weights, plan=AFFINE, layer="up", **options):
    with pytest.raises(error) as caught:
        quantize_weights(weights, plan, **options)
    assert type(caught.value) is error
    assert caught.value.layer == layer
    assert str(caught.value).startswith(f"{layer}: ")
    return caught.value


def test_biases_without_scales(lib):
    assert rejected(MissingKeyError, triple(lib, scales=None)).key == "up.scales"


def test_biases_without_scales_next_to_a_dense_weight(lib):
    weights = {**triple(lib, scales=None), "up.weight": lib.make(np.ones((2, 32)), "float32")}
    assert rejected(MissingKeyError, weights).key == "up.scales"


def test_biases_without_scales_in_a_skipped_layer(lib):
    plan = PerLayerQuantization(Quantization(32, 4), {"up": SKIP})
    assert rejected(MissingKeyError, triple(lib, scales=None), plan).key == "up.scales"


def test_scales_in_a_skipped_layer(lib):
    plan = PerLayerQuantization(Quantization(32, 4), {"up": SKIP})
    assert rejected(KeyCollisionError, triple(lib), plan).key == "up.scales"


def test_scales_without_any_quantization(lib):
    rejected(InvariantError, triple(lib), PerLayerQuantization())


def test_affine_scales_without_biases(lib):
    assert rejected(MissingKeyError, triple(lib, biases=None)).key == "up.biases"


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
def test_biases_in_a_float_mode(lib, mode):
    assert rejected(KeyCollisionError, triple(lib), config(32, 4, mode)).key == "up.biases"


def test_mode_of_the_layer_decides_over_the_default(lib):
    plan = PerLayerQuantization(Quantization(32, 4), {"up": Quantization(32, 4, "mxfp4")})
    assert rejected(KeyCollisionError, triple(lib), plan).key == "up.biases"
    unchanged(triple(lib, biases=None), plan)


@pytest.mark.parametrize("dtype", ["float32", "int32", "uint8"])
def test_scales_next_to_a_weight_that_is_not_packed(lib, dtype):
    weights = {**triple(lib), "up.weight": lib.make(np.ones((2, 32)), dtype)}
    error = rejected(UnsupportedDtypeError, weights)
    assert (error.dtype, error.supported) == (dtype, ("uint32",))


@pytest.mark.parametrize("shape", [(), (4,)])
def test_packed_weight_of_fewer_than_two_axes(lib, shape):
    error = rejected(RankMismatchError, triple(lib, words=shape, scales=shape, biases=shape))
    assert (error.rank, error.shape) == (len(shape), shape)


@pytest.mark.parametrize("shape", [(2,), (1, 2, 1)])
def test_scales_of_another_rank(lib, shape):
    error = rejected(LengthMismatchError, triple(lib, scales=shape))
    assert (error.expected, error.actual) == (2, len(shape))


def test_scales_of_other_leading_axes(lib):
    weights = triple(lib, words=(5, 2, 4), scales=(5, 3, 1))
    error = rejected(ShapeMismatchError, weights)
    assert (error.expected, error.actual) == ((5, 2), (5, 3))


def test_parts_are_checked_before_eligibility(lib):
    rejected(MissingKeyError, triple(lib, scales=None), eligible=lambda path, weight: False)


def test_order_skip_before_biases(lib):
    plan = PerLayerQuantization(Quantization(32, 4), {"up": SKIP})
    rejected(KeyCollisionError, triple(lib, biases=None), plan)


def test_order_biases_before_dtype(lib):
    weights = {**triple(lib, biases=None), "up.weight": lib.make(np.ones(32), "float32")}
    rejected(MissingKeyError, weights)


def test_order_dtype_before_rank(lib):
    weights = {**triple(lib), "up.weight": lib.make(np.ones(32), "float32")}
    rejected(UnsupportedDtypeError, weights)


def test_order_rank_before_scales(lib):
    rejected(RankMismatchError, triple(lib, words=(4,), scales=(2, 1)))


def test_order_rank_of_scales_before_their_axes(lib):
    rejected(LengthMismatchError, triple(lib, words=(2, 4), scales=(3,)))


# ---- what is rejected: the parameters or the arrays


def test_negative_group_size(lib):
    weights = {"up.weight": lib.make(np.ones((2, 32)), "float32")}
    error = rejected(OutOfRangeError, weights, config(-32, 4))
    assert (error.name, error.value) == ("group_size", -32)


def test_bits_that_no_mode_has(lib):
    weights = {"up.weight": lib.make(np.ones((2, 32)), "float32")}
    kind = {"mlx": BackendError, "numpy": OutOfRangeError}[lib.name]
    error = rejected(kind, weights, config(32, 7))
    assert "7" in str(error)
    if lib.name == "mlx":
        assert isinstance(error.__cause__, ValueError)


def test_group_size_that_no_mode_has(lib):
    weights = {"up.weight": lib.make(np.ones((2, 32)), "float32")}
    kind = {"mlx": BackendError, "numpy": OutOfRangeError}[lib.name]
    rejected(kind, weights, config(16, 4))


def test_group_size_that_the_mode_lacks(lib):
    weights = {"up.weight": lib.make(np.ones((2, 64)), "float32")}
    kind = {"mlx": BackendError, "numpy": OutOfRangeError}[lib.name]
    rejected(kind, weights, config(64, 4, "mxfp4"))


@pytest.mark.parametrize("dtype", ["int32", "uint8"])
def test_integer_weight(lib, dtype):
    weights = {"up.weight": lib.make(np.ones((2, 32)), dtype)}
    kind = {"mlx": BackendError, "numpy": UnsupportedDtypeError}[lib.name]
    rejected(kind, weights)


def test_float64_weight_on_numpy():
    error = rejected(UnsupportedDtypeError, {"up.weight": np.ones((2, 32))})
    assert error.dtype == "float64"
    assert set(error.supported) == {"float32", "float16", "bfloat16"}


def test_first_layer_at_fault_is_named(lib):
    weights = {
        "a.weight": lib.make(np.ones((2, 32)), "float32"),
        "b.weight": lib.make(np.ones((2, 32)), "int32"),
    }
    with pytest.raises(RequantError) as caught:
        quantize_weights(weights, AFFINE)
    assert caught.value.layer == "b"


def test_mixture_of_libraries():
    weights = {"a.weight": np.ones((2, 32), np.float32), "b.weight": mx.ones((2, 32))}
    error = rejected(InvariantError, weights, layer="b.weight")
    assert re.search("mlx.*numpy", str(error))


@pytest.mark.parametrize(
    "value", [[[1.0] * 32], 1.0, None, np.float32(1)], ids=lambda v: type(v).__name__
)
def test_value_that_is_not_an_array(value):
    error = rejected(UnsupportedDtypeError, {"up.weight": value}, layer="up.weight")
    assert error.supported == ("mlx.core.array", "numpy.ndarray")


# ---- laziness


def test_mlx_arrays_are_not_evaluated():
    """4 TiB of weights: any evaluation would fail."""
    huge = mx.broadcast_to(mx.array(1.0), (2**20, 2**20))
    got = quantize_weights({"up.weight": huge, "down.weight": huge}, AFFINE)
    assert got["up.weight"].shape == (2**20, 2**17)
    assert got["up.scales"].shape == (2**20, 2**15)


def test_no_array_is_evaluated_in_between():
    weights = {
        "up.weight": mx.ones((4096, 256), mx.float32),
        "down.weight": mx.ones((4096, 32), mx.uint32),
        "down.scales": mx.ones((4096, 8), mx.float32),
        "down.biases": mx.ones((4096, 8), mx.float32),
        "norm.weight": mx.ones((2**16,), mx.float32),
    }
    got, taken = memory_taken(lambda: quantize_weights(weights, AFFINE))
    assert taken < 4096
    _, taken = memory_taken(lambda: mx.eval(*got.values()))
    assert taken >= sum(array.nbytes for array in got.values())
