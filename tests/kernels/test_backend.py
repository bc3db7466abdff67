"""Which backend is taken, and that the two agree bit for bit."""

import subprocess
import sys

import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_np

from requant.errors import BackendError, InvariantError, UnsupportedDtypeError
from requant.kernels import mlx_backend as mlx_backend
from requant.kernels.backend import NUMPY, backend_for
from requant.quantization.config import PerLayerQuantization, Quantization
from requant.weights.quantize import dequantize_weights, quantize_weights
from tests.support.array_libraries import MlxLibrary, NumPyLibrary
from tests.support.quantized_weights import LEGAL, assert_bits

MLX, NP = MlxLibrary(), NumPyLibrary()


# ---- which library
def test_numpy_arrays_get_the_numpy_backend():
    assert backend_for({"a": np.ones(1), "b": np.ones(2)}) is NUMPY


def test_mlx_arrays_get_the_mlx_backend():
    assert backend_for({"a": mx.ones(1)}) is mlx_backend


def test_memory_maps_are_numpy_arrays(tmp_path):
    np.save(tmp_path / "a.npy", np.ones((2, 32), np.float32))
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
    assert type(mapped) is np.memmap
    plan = PerLayerQuantization.from_global(Quantization.affine(32, 4))
    assert quantize_weights({"up.weight": mapped}, plan)["up.weight"].shape == (2, 4)


def test_empty_map_gets_some_backend():
    assert backend_for({}) is NUMPY


@pytest.mark.parametrize("first", ["mlx", "numpy"])
def test_mixture_is_rejected_and_named(first):
    arrays = [mx.ones(1), np.ones(1)] if first == "mlx" else [np.ones(1), mx.ones(1)]
    with pytest.raises(InvariantError) as caught:
        backend_for({"a": arrays[0], "b": arrays[1]})
    assert caught.value.layer == "b"


@pytest.mark.parametrize(
    "value", [[1.0], 1.0, None, memoryview(b"x"), np.float32(1)], ids=lambda v: type(v).__name__
)
def test_unsupported_type_is_rejected_and_named(value):
    with pytest.raises(UnsupportedDtypeError) as caught:
        backend_for({"a": np.ones(1), "b": value})
    assert caught.value.layer == "b"
    assert type(value).__name__ in caught.value.dtype
    assert isinstance(caught.value, TypeError)


@pytest.mark.sweep(1)
def test_numpy_path_does_not_import_mlx():
    program = (
        "import sys, numpy as np\n"
        "from requant.quantization.config import *\n"
        "from requant.weights.quantize import quantize_weights\n"
        "plan = PerLayerQuantization.from_global(Quantization.affine(32, 4))\n"
        "quantize_weights({'up.weight': np.ones((2, 32), np.float32)}, plan)\n"
        "assert not any(name.partition('.')[0] == 'mlx' for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


# ---- both libraries give the same bits
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("quantization", LEGAL, ids=str)
def test_numpy_equals_mlx(quantization, dtype):
    generator = np.random.default_rng(5)
    values = generator.normal(size=(7, 384)) * 2.0 ** generator.integers(-9, 9, size=(7, 1))
    values[0] = 0
    values[1, ::3] = 0.25
    plan = PerLayerQuantization.from_global(quantization)
    packed = [
        quantize_weights({"up.weight": library.make(values, dtype)}, plan) for library in (NP, MLX)
    ]
    dense = [dequantize_weights(weights, plan) for weights in packed]
    for ours, theirs in (packed, dense):
        assert list(ours) == list(theirs)
        for name in ours:
            assert_bits(NP.read(ours[name]), MLX.read(theirs[name]))


@given(
    st_np.arrays(
        np.float32, (2, 64), elements=st.floats(-1e4, 1e4, width=32, allow_subnormal=False)
    ),
    st.sampled_from([quantization for quantization in LEGAL if quantization.group_size <= 64]),
)
def test_numpy_equals_mlx_on_any_values(values, quantization):
    # MLX lets the scale byte of the tiniest mxfp groups wrap; ours flushes them.
    values = np.where(np.abs(values) < 1e-30, np.float32(0), values)
    plan = PerLayerQuantization.from_global(quantization)
    ours = quantize_weights({"up.weight": values}, plan)
    theirs = quantize_weights({"up.weight": mx.array(values)}, plan)
    for name in theirs:
        assert_bits(ours[name], MLX.read(theirs[name]))


def test_group_too_small_for_its_scale_byte_becomes_zero_on_numpy():
    values = np.full((1, 32), 1e-40, np.float32)
    plan = PerLayerQuantization.from_global(Quantization(32, 4, "mxfp4"))
    got = quantize_weights({"up.weight": values}, plan)
    assert got["up.scales"].tolist() == [[127]]
    assert got["up.weight"].tolist() == [[0, 0, 0, 0]]


def test_big_endian_arrays_mean_their_values():
    values = np.random.default_rng(6).normal(size=(2, 32)).astype(np.float32)
    plan = PerLayerQuantization.from_global(Quantization.affine(32, 4))
    expected = quantize_weights({"up.weight": values}, plan)
    got = quantize_weights({"up.weight": values.astype(">f4")}, plan)
    for name in expected:
        assert_bits(got[name], expected[name])
    swapped = {name: array.astype(array.dtype.newbyteorder(">")) for name, array in got.items()}
    assert_bits(
        dequantize_weights(swapped, plan)["up.weight"],
        dequantize_weights(expected, plan)["up.weight"],
    )


# ---- the single operations


BACKENDS = {"mlx": mlx_backend, "numpy": NUMPY}


@pytest.mark.parametrize(
    "dtype", ["float32", "float16", "bfloat16", "float64", "uint8", "int32", "uint32", "bool"]
)
def test_dtype_names_are_those_of_numpy(lib, dtype):
    dtype = "bool_" if dtype == "bool" and lib.name == "mlx" else dtype
    array = lib.make([0, 1], dtype)
    assert BACKENDS[lib.name].dtype(array).rstrip("_") == dtype.rstrip("_")


def test_backends_name_themselves():
    assert (NUMPY.name, mlx_backend.name) == ("numpy", "mlx")


def test_view_keeps_the_bits_of_signed_words(lib):
    array = lib.make([[-1, -(2**31), 5]], "int32")
    got = lib.read(BACKENDS[lib.name].view_uint32(array))
    assert_bits(got, np.array([[2**32 - 1, 2**31, 5]], np.uint32))


def test_astype_overflows_to_inf_in_silence(lib):
    got = lib.read(BACKENDS[lib.name].astype(lib.make([1e30], "float32"), "float16"))
    assert_bits(got, np.array([np.inf], np.float16))


def test_astype_to_bfloat16_rounds_to_even(lib):
    got = lib.read(
        BACKENDS[lib.name].astype(lib.make([1 + 2**-8, 1 + 3 * 2**-8], "float32"), "bfloat16")
    )
    assert_bits(got, np.array([1.0, 1 + 2**-6], ml_dtypes.bfloat16))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_scale_keeps_the_dtype(lib, dtype):
    got = lib.read(BACKENDS[lib.name].scale(lib.make([1, -2], dtype), -8))
    assert_bits(got, NP.make([-8, 16], dtype))


def test_scale_overflows_to_inf_in_silence(lib):
    got = lib.read(BACKENDS[lib.name].scale(lib.make([6e4], "float16"), -8))
    assert_bits(got, np.array([-np.inf], np.float16))


def test_negative_of_zero_is_minus_zero(lib):
    got = lib.read(BACKENDS[lib.name].negative(lib.make([0.0], "float32")))
    assert_bits(got, np.array([-0.0], np.float32))


def test_transpose_gives_contiguous_rows(lib):
    got = lib.read(BACKENDS[lib.name].transpose(lib.make([[1, 2, 3], [4, 5, 6]], "float16")))
    assert_bits(got, np.array([[1, 4], [2, 5], [3, 6]], np.float16))
    assert got.flags.c_contiguous


def test_unpack_takes_the_shifts_in_order(lib):
    words = lib.make([[0x76543210, 0xFEDCBA98]], "uint32")
    got = lib.read(BACKENDS[lib.name].unpack(words, (28, 0), 15))
    assert_bits(got, np.array([[7, 0, 15, 8]], np.uint32))


def test_pack_puts_codes_at_their_shifts(lib):
    got = lib.read(BACKENDS[lib.name].pack(lib.make([[1, 2, 3, 15]], "uint32"), (0, 28)))
    assert_bits(got, np.array([[0x20000001, 0xF0000003]], np.uint32))


def test_mlx_errors_keep_their_cause():
    huge = mx.broadcast_to(mx.array([[1]], mx.uint32), (4, 2**28))
    with pytest.raises(BackendError) as caught:
        mlx_backend.unpack(huge, range(8), 1)
    assert caught.value.__cause__ is not None
    assert caught.value.layer is None
