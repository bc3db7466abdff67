"""dequantize_weights: what is reconstructed, what passes through, what is rejected."""

import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest

from requant.errors import (
    BackendError,
    DivisibilityError,
    InvariantError,
    KeyCollisionError,
    MissingKeyError,
    OutOfRangeError,
    RankMismatchError,
    RequantError,
    ShapeMismatchError,
    UnsupportedDtypeError,
)
from requant.quantization.config import SKIP, PerLayerQuantization, Quantization
from requant.weights.quantize import dequantize_weights, quantize_weights
from tests.support.damage import damage
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

# Codes 0 to 15, twice: one affine group of 32 at 4 bits.
WORDS = [[0x76543210, 0xFEDCBA98, 0x76543210, 0xFEDCBA98]]
CODES = [*range(16), *range(16)]


def affine(lib, layer="up", scale=0.5, bias=-4.0, dtype="float32"):
    """One row of the codes 0 to 15, twice."""
    return {
        f"{layer}.weight": lib.make(WORDS, "uint32"),
        f"{layer}.scales": lib.make([[scale]], dtype),
        f"{layer}.biases": lib.make([[bias]], dtype),
    }


def without(weights, *names):
    return {name: array for name, array in weights.items() if name not in names}


# ---- what is reconstructed
def test_value_is_code_times_scale_plus_bias(lib):
    got = dequantize_weights(affine(lib), AFFINE)
    assert list(got) == ["up.weight"]
    assert_bits(lib.read(got["up.weight"]), np.array([[c * 0.5 - 4 for c in CODES]], np.float32))


def test_bfloat16_rounds_twice_as_mlx_does(lib):
    """Section 12.5 of the layouts page."""
    got = dequantize_weights(affine(lib, scale=0.1, bias=-0.80078125, dtype="bfloat16"), AFFINE)
    half = "bf4d bf33 bf1a bf00 becd be9a be4c bdd0 0000 3dd0 3e4c 3e9a 3ece 3f01 3f19 3f33"
    expected = [int(word, 16) for word in half.split()]
    assert lib.read(got["up.weight"]).view(np.uint16).tolist() == [expected * 2]


def test_mxfp4_by_hand(lib):
    """Code 2 is 1.0, code 7 is 6.0, code 10 is -1.0; scale byte 128 is 2."""
    weights = {
        "up.weight": lib.make([[0x00000A72, 0, 0, 0]], "uint32"),
        "up.scales": lib.make([[128]], "uint8"),
    }
    dense = lib.read(dequantize_weights(weights, config(32, 4, "mxfp4"))["up.weight"])
    assert dense.dtype == ml_dtypes.bfloat16
    assert dense.astype(np.float32)[0].tolist() == [2.0, 12.0, -2.0] + [0.0] * 29


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("quantization", LEGAL, ids=str)
def test_bits_are_those_of_mlx(lib, quantization, dtype):
    values = np.random.default_rng(4).normal(size=(6, 256)).astype(np.float32)
    parts = mx_quantize(mx.array(values).astype(getattr(mx, dtype)), quantization)
    expected = mx.dequantize(
        *parts.values(),
        group_size=quantization.group_size,
        bits=quantization.bits,
        mode=str(quantization.mode),
    )
    weights = {}
    for suffix, array in parts.items():
        kind = str(array.dtype).removeprefix("mlx.core.")
        raw = (
            np.array(array.view(mx.uint16)).view(ml_dtypes.bfloat16)
            if kind == "bfloat16"
            else np.array(array)
        )
        weights[f"up.{suffix}"] = lib.make(raw, kind)
    plan = PerLayerQuantization.from_global(quantization)
    got = lib.read(dequantize_weights(weights, plan)["up.weight"])
    assert got.dtype.name == str(expected.dtype).removeprefix("mlx.core.")
    word = {2: "uint16", 4: "uint32"}[got.dtype.itemsize]
    assert_bits(got.view(word), np.array(expected.view(getattr(mx, word))))


def test_round_trip_keeps_rank_and_neighbours(lib):
    values = np.arange(2 * 3 * 64).reshape(2, 3, 64) % 16
    weights = {
        "experts.weight": lib.make(values, "float32"),
        "norm.weight": lib.make(np.ones(64), "float32"),
    }
    got = dequantize_weights(quantize_weights(weights, AFFINE), AFFINE)
    assert list(got) == ["experts.weight", "norm.weight"]
    assert got["norm.weight"] is weights["norm.weight"]
    np.testing.assert_allclose(lib.read(got["experts.weight"]), values, atol=1e-5)


def test_layer_override_gives_the_parameters(lib):
    plan = PerLayerQuantization(Quantization(64, 8), {"up": Quantization(32, 4)})
    got = dequantize_weights(affine(lib), plan)
    assert lib.read(got["up.weight"])[0, :2].tolist() == [-4.0, -3.5]


def test_layer_override_is_enough_without_default(lib):
    plan = PerLayerQuantization(None, {"up": Quantization(32, 4)})
    assert lib.read(dequantize_weights(affine(lib), plan)["up.weight"]).shape == (1, 32)


def test_own_bias_of_a_layer_stays(lib):
    weights = {**affine(lib), "up.bias": lib.make([1.0], "float32")}
    got = dequantize_weights(weights, AFFINE)
    assert sorted(got) == ["up.bias", "up.weight"]
    assert got["up.bias"] is weights["up.bias"]


def test_layer_with_the_empty_path(lib):
    assert list(dequantize_weights(affine(lib, layer=""), AFFINE)) == [".weight"]


def test_order_of_the_names_does_not_matter(lib):
    assert list(dequantize_weights(dict(reversed(affine(lib).items())), AFFINE)) == ["up.weight"]


def test_float8_view_of_the_scales_is_their_bytes_on_numpy():
    words = np.array([[0x00000A72, 0, 0, 0]], np.uint32)
    for mode, group, count, view in [
        ("mxfp4", 32, 1, ml_dtypes.float8_e8m0fnu),
        ("mxfp8", 32, 1, ml_dtypes.float8_e8m0fnu),
        ("nvfp4", 16, 2, ml_dtypes.float8_e4m3fn),
    ]:
        bits = 8 if mode == "mxfp8" else 4
        packed = np.repeat(words, 2, axis=1) if bits == 8 else words
        scales = np.full((1, count), 0x38, np.uint8)
        plan = config(group, bits, mode)
        expected = dequantize_weights({"up.weight": packed, "up.scales": scales}, plan)
        got = dequantize_weights({"up.weight": packed, "up.scales": scales.view(view)}, plan)
        assert_bits(got["up.weight"], expected["up.weight"])


def test_input_map_is_not_modified(lib):
    weights = affine(lib)
    before = dict(weights)
    dequantize_weights(weights, AFFINE)
    assert_same_arrays(weights, before)


def test_any_mapping_will_do_and_each_array_is_read_once(lib):
    weights = CountingMap(affine(lib))
    dequantize_weights(weights, AFFINE)
    assert weights.reads == ["up.weight", "up.scales", "up.biases"]


def test_empty_map_gives_an_empty_map():
    assert dequantize_weights({}, AFFINE) == {}


# ---- what passes through
def unchanged(weights, plan=AFFINE):
    assert_same_arrays(dequantize_weights(weights, plan), weights)


def test_dense_weights_pass(lib):
    unchanged({"up.weight": lib.make(np.ones((2, 32)), "float32")})


@pytest.mark.parametrize(
    "missing", ["scales biases", "weight biases", "weight", "weight scales"], ids="no {}".format
)
def test_parts_of_a_layer_alone_pass(lib, missing):
    unchanged(without(affine(lib), *(f"up.{suffix}" for suffix in missing.split())))


@pytest.mark.parametrize("dtype", ["float32", "int32", "bfloat16"])
def test_biases_next_to_a_dense_weight_pass(lib, dtype):
    unchanged({**without(affine(lib), "up.scales"), "up.weight": lib.make(np.ones((2, 32)), dtype)})


@pytest.mark.parametrize("shape", [(), (4,)])
def test_biases_next_to_a_uint32_of_fewer_than_two_axes_pass(lib, shape):
    weights = without(affine(lib), "up.scales")
    unchanged({**weights, "up.weight": lib.make(np.ones(shape), "uint32")})


def test_other_names_pass(lib):
    names = ["scales", "biases", "weight", "up.scales.x", "up_scales"]
    unchanged({name: lib.make(np.ones((2, 32)), "float32") for name in names})


# ---- what is rejected
def rejected(error, weights, plan=AFFINE, layer="up"):
    with pytest.raises(error) as caught:
        dequantize_weights(weights, plan)
    assert type(caught.value) is error
    assert caught.value.layer == layer
    return caught.value


SKIPPED = PerLayerQuantization(Quantization(32, 4), {"up": SKIP})


@pytest.mark.parametrize(
    ("missing", "plan", "error", "key"),
    [
        ("scales", AFFINE, MissingKeyError, "up.scales"),
        ("scales", SKIPPED, MissingKeyError, "up.scales"),
        ("", PerLayerQuantization(), InvariantError, None),
        ("", SKIPPED, InvariantError, None),
        ("biases", PerLayerQuantization(), InvariantError, None),  # before missing biases
        ("biases", AFFINE, MissingKeyError, "up.biases"),
    ],
)
def test_layer_that_the_quantization_does_not_fit(lib, missing, plan, error, key):
    assert getattr(rejected(error, without(affine(lib), f"up.{missing}"), plan), "key", None) == key


def test_lost_scales_are_found_before_anything_is_computed(lib):
    weights = {**affine(lib, "a"), **without(affine(lib, "b"), "b.scales")}
    rejected(MissingKeyError, weights, config(32, 7), layer="b")


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
def test_float_mode_layer_with_biases(lib, mode):
    assert rejected(KeyCollisionError, affine(lib), config(32, 4, mode)).key == "up.biases"


# What the array library itself rejects: MLX in words of its own, our kernels by class.
BROKEN = [
    ("nothing", (32, 7), OutOfRangeError),
    ("nothing", (-32, 4), OutOfRangeError),
    ("nothing", (0, 4), OutOfRangeError),
    ("nothing", (32, 0), OutOfRangeError),
    ("weight = F32 [1, 32] 1", (32, 4), UnsupportedDtypeError),
    ("weight = U32 [4] 1; scales = F32 [1] 1; biases = F32 [1] 1", (32, 4), RankMismatchError),
    ("scales = F32 [3, 1] 1; biases = F32 [3, 1] 1", (32, 4), ShapeMismatchError),
    ("scales = F32 [1, 2] 1; biases = F32 [1, 2] 1", (32, 4), ShapeMismatchError),
    ("scales = I32 [1, 1] 1; biases = I32 [1, 1] 1", (32, 4), UnsupportedDtypeError),
    ("weight = U32 [1, 3] 1", (32, 4), DivisibilityError),
]


@pytest.mark.parametrize(("changes", "quantization", "kind"), BROKEN)
def test_backend_rejects(lib, changes, quantization, kind):
    group_size, bits = quantization
    changed = {}
    damage(changes, changed)
    weights = affine(lib)
    weights |= {f"up.{x}": lib.make(array, array.dtype.name) for x, array in changed.items()}
    error = rejected(BackendError if lib.name == "mlx" else kind, weights, config(group_size, bits))
    assert isinstance(error, RequantError)
    if lib.name == "mlx":
        assert error.__cause__ is not None


def test_biases_of_another_shape_than_the_scales(lib):
    """MLX looks at the leading axes only, and would read past the end of short biases."""
    weights = {
        "up.weight": lib.make([[0] * 8], "uint32"),
        "up.scales": lib.make([[1, 2]], "float32"),
        "up.biases": lib.make([[1]], "float32"),
    }
    error = rejected(ShapeMismatchError, weights)
    assert (error.expected, error.actual) == ((1, 2), (1, 1))


def test_float_mode_scales_that_are_not_bytes(lib):
    weights = without(affine(lib), "up.biases")
    kind = BackendError if lib.name == "mlx" else UnsupportedDtypeError
    rejected(kind, weights, config(32, 4, "mxfp4"))


def test_mixture_of_libraries():
    weights = {"a.weight": np.ones((2, 4), np.uint32), "a.scales": mx.ones((2, 1))}
    rejected(InvariantError, weights, layer="a.scales")


# ---- laziness
def test_mlx_arrays_are_not_evaluated():
    """4 TiB of values: any evaluation would fail."""
    weights = {
        "up.weight": mx.broadcast_to(mx.array(1, mx.uint32), (2**20, 2**17)),
        "up.scales": mx.broadcast_to(mx.array(1.0), (2**20, 2**15)),
        "up.biases": mx.broadcast_to(mx.array(1.0), (2**20, 2**15)),
    }
    assert dequantize_weights(weights, AFFINE)["up.weight"].shape == (2**20, 2**20)


def test_no_array_is_evaluated_in_between():
    weights = {
        "up.weight": mx.ones((4096, 32), mx.uint32),
        "up.scales": mx.ones((4096, 8), mx.float32),
        "up.biases": mx.ones((4096, 8), mx.float32),
        "norm.weight": mx.ones((2**16,), mx.float32),
    }
    got, taken = memory_taken(lambda: dequantize_weights(weights, AFFINE))
    assert taken < 4096
    _, taken = memory_taken(lambda: mx.eval(*got.values()))
    assert taken >= sum(array.nbytes for array in got.values())
