"""unpack_awq_weights: words into codes, by their bits, lazily."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra import numpy as st_np

from requant.errors import BackendError, RankMismatchError, UnsupportedDtypeError
from requant.kernels import mlx_backend as mlx_backend
from requant.kernels.backend import NUMPY
from requant.weights.awq import unpack_awq_weights
from tests.support.layers.awq import OUTPUT_IN_NIBBLE
from tests.support.quantized_weights import assert_bits, memory_taken


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
    assert lib.read(unpack_awq_weights(words)).tolist() == [[0] * 8 + [1] * 8, [2] * 8 + [3] * 8]


@pytest.mark.parametrize("shape", [(0, 2), (2, 0)])
def test_unpack_empty(lib, shape):
    got = lib.read(unpack_awq_weights(lib.make(np.zeros(shape), "int32")))
    assert got.shape == (shape[0], 8 * shape[1])


@pytest.mark.parametrize("shape", [(), (4,), (1, 2, 3)])
def test_unpack_rejects_other_than_two_axes(lib, shape):
    with pytest.raises(RankMismatchError) as caught:
        unpack_awq_weights(lib.make(np.zeros(shape), "int32"))
    assert (caught.value.rank, caught.value.shape) == (len(shape), shape)
    assert caught.value.layer is None


def test_unpack_rejects_the_rank_before_the_dtype(lib):
    with pytest.raises(RankMismatchError):
        unpack_awq_weights(lib.make([0.0], "float32"))


@pytest.mark.parametrize("dtype", ["float32", "int16", "uint8", "int64"])
def test_unpack_rejects_other_dtypes(lib, dtype):
    with pytest.raises(UnsupportedDtypeError) as caught:
        unpack_awq_weights(lib.make([[1]], dtype))
    assert (caught.value.dtype, caught.value.supported) == (dtype, ("uint32", "int32"))


def test_unpack_rejects_what_is_not_an_array():
    with pytest.raises(UnsupportedDtypeError) as caught:
        unpack_awq_weights([[1]])
    assert caught.value.layer is None


def test_unpack_rejects_what_mlx_cannot_hold():
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


def test_unpack_does_not_evaluate_mlx_arrays():
    words = mx.ones((512, 64), mx.int32)
    codes, taken = memory_taken(lambda: unpack_awq_weights(words))
    assert taken < 4096
    _, taken = memory_taken(lambda: mx.eval(codes))
    assert taken >= codes.nbytes
