"""quantize_weights: what is taken, what passes through, what is rejected."""

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


SKIPPED = PerLayerQuantization(Quantization(32, 4), {"up": SKIP})
OWN = PerLayerQuantization(None, {"up": Quantization(32, 4)})

MODES = ("mxfp4", "mxfp8", "nvfp4")

# Parts of a layer "up" that is quantized already, and the quantization.
TRIPLES = {
    "no weight": ({"words": None}, AFFINE),
    "affine": ({}, AFFINE),
    **{x: ({"biases": None, "dtype": "uint8"}, config(32, 4, x)) for x in MODES},
    "its own entry, without default": ({}, OWN),
    "three axes": ({"words": (5, 2, 4), "scales": (5, 2, 1), "biases": (5, 2, 1)}, AFFINE),
    # Last axis, scale dtype, shape of the biases and legal bits are dequantize's to judge.
    "only its layout": ({"scales": (2, 9), "biases": (7,), "dtype": "int32"}, config(3, 99)),
}


@pytest.mark.parametrize("case", TRIPLES)
def test_triple_passes(lib, case):
    parts, plan = TRIPLES[case]
    unchanged(triple(lib, **parts), plan)


def test_ineligible_layer_passes(lib):
    dense = {"up.weight": lib.make(np.ones((2, 32)), "float32")}
    for weights in (dense, triple(lib)):
        unchanged(weights, eligible=lambda path, weight: False)


# Shape and dtype of a dense layer "up", and the quantization.
DENSE = {
    "skipped": ((2, 32), "float32", SKIPPED),
    "without any quantization": ((2, 32), "float32", PerLayerQuantization()),
    **{f"shape {shape}": (shape, "float32", AFFINE) for shape in ((), (32,), (64,))},
    **{f"last axis {last}": ((32, last), "float32", AFFINE) for last in (1, 31, 33, 48)},
    # mx.quantize would divide by it, and take the process down.
    "group size 0": ((2, 32), "float32", config(0, 4)),
    **{f"group size -32, shape {x}": (x, "float32", config(-32, 4)) for x in ((), (32,))},
    "integers that do not fit": ((2, 5), "int32", AFFINE),
}


@pytest.mark.parametrize("case", DENSE)
def test_dense_layer_passes(lib, case):
    shape, dtype, plan = DENSE[case]
    unchanged({"up.weight": lib.make(np.ones(shape), dtype)}, plan)


# ---- what is rejected: the parts of a layer contradict each other
def rejected(error, weights, plan=AFFINE, layer="up", **options):
    with pytest.raises(error) as caught:
        quantize_weights(weights, plan, **options)
    assert type(caught.value) is error
    assert caught.value.layer == layer
    assert str(caught.value).startswith(f"{layer}: ")
    return caught.value


FLOAT_MODE = PerLayerQuantization(Quantization(32, 4), {"up": Quantization(32, 4, "mxfp4")})
DENSE_WEIGHT, FLAT, WORDS_ONLY = (
    ((2, 32), "float32"),
    ((32,), "float32"),
    ("supported", ("uint32",)),
)
SCALES, BIASES = ("key", "up.scales"), ("key", "up.biases")
NOTHING = PerLayerQuantization()

# Parts of the triple, a dense weight in place of the words, quantization, class and its fields.
CONTRADICTIONS = [
    ({"scales": None}, None, AFFINE, MissingKeyError, SCALES),
    ({"scales": None}, DENSE_WEIGHT, AFFINE, MissingKeyError, SCALES),
    ({"scales": None}, None, SKIPPED, MissingKeyError, SCALES),
    ({}, None, SKIPPED, KeyCollisionError, SCALES),
    ({}, None, NOTHING, InvariantError),
    ({"biases": None}, None, AFFINE, MissingKeyError, BIASES),
    *(({}, None, config(32, 4, mode), KeyCollisionError, BIASES) for mode in MODES),
    ({}, None, FLOAT_MODE, KeyCollisionError, BIASES),
    ({}, DENSE_WEIGHT, AFFINE, UnsupportedDtypeError, ("dtype", "float32"), WORDS_ONLY),
    ({}, ((2, 32), "int32"), AFFINE, UnsupportedDtypeError, ("dtype", "int32"), WORDS_ONLY),
    ({}, ((2, 32), "uint8"), AFFINE, UnsupportedDtypeError, ("dtype", "uint8"), WORDS_ONLY),
    ({"words": ()}, None, AFFINE, RankMismatchError, ("rank", 0), ("shape", ())),
    ({"words": (4,)}, None, AFFINE, RankMismatchError, ("rank", 1), ("shape", (4,))),
    ({"scales": (2,)}, None, AFFINE, LengthMismatchError, ("expected", 2), ("actual", 1)),
    ({"scales": (1, 2, 1)}, None, AFFINE, LengthMismatchError, ("expected", 2), ("actual", 3)),
    (
        {"words": (5, 2, 4), "scales": (5, 3, 1)},
        None,
        AFFINE,
        ShapeMismatchError,
        ("expected", (5, 2)),
        ("actual", (5, 3)),
    ),
    # Two things are wrong; the first in the order of the checks is the one reported.
    ({"biases": None}, None, SKIPPED, KeyCollisionError),  # skip before biases
    ({"biases": None}, FLAT, AFFINE, MissingKeyError),  # biases before dtype
    ({}, FLAT, AFFINE, UnsupportedDtypeError),  # dtype before rank
    ({"words": (4,), "scales": (2, 1)}, None, AFFINE, RankMismatchError),  # rank before scales
    ({"scales": (3,)}, None, AFFINE, LengthMismatchError),  # rank of scales before their axes
]


@pytest.mark.parametrize("case", CONTRADICTIONS, ids=range(len(CONTRADICTIONS)))
def test_contradiction_is_rejected(lib, case):
    parts, dense, plan, error, *fields = case
    weights = triple(lib, **parts)
    if dense is not None:
        weights["up.weight"] = lib.make(np.ones(dense[0]), dense[1])
    found = rejected(error, weights, plan)
    assert [(name, getattr(found, name)) for name, _ in fields] == fields


def test_mode_of_the_layer_decides_over_the_default(lib):
    unchanged(triple(lib, biases=None), FLOAT_MODE)


def test_parts_are_checked_before_eligibility(lib):
    rejected(MissingKeyError, triple(lib, scales=None), eligible=lambda path, weight: False)


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
    assert re.search("mlx.*numpy", str(rejected(InvariantError, weights, layer="b.weight")))


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
