"""transform_awq_weights: what comes out, bit for bit, lazily, and the values of AutoAWQ itself."""

import json

import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_np
from safetensors import safe_open

from requant.quantization.config import PerLayerQuantization, Quantization
from requant.weights.awq import AwqLoadConfig, transform_awq_weights
from requant.weights.quantize import dequantize_weights
from tests.support.fixture_folders import fixture
from tests.support.layers.awq import CONFIG, awq_words, mlx_words, stored
from tests.support.quantized_weights import (
    CountingMap,
    assert_bits,
    assert_same_arrays,
    memory_taken,
)


# ---- what comes out
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
def test_checkpoint_written_by_autoawq(lib, name):
    """The values are those that AutoAWQ itself decodes, exactly, with the scales in float32."""
    folder = fixture(name)
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
