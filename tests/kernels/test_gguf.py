"""GGUF blocks: every type against the gguf package and against vectors written by hand."""

from collections.abc import Callable

import gguf
import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from requant.kernels import _native
from requant.kernels.gguf import BY_NAME, TYPES, BlockType, values_into, words_into
from requant.quantization.config import QuantMode
from tests.support.gguf_files import HALVES, random_blocks
from tests.support.mlx_arrays import to_mlx

pytestmark = pytest.mark.sweep(1)

BLOCKS = [kind for kind in TYPES.values() if not kind.dtype]
KNOWN = [kind for kind in BLOCKS if kind.name != "Q1_0"]  # the package cannot decode that one
FITTING = [kind for kind in KNOWN if kind.encoding is not None]
EXACT_IN_F16 = {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "TQ1_0", "TQ2_0"}
MANY = settings(max_examples=20)
DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]
QS = "f0e1d2c3b4a5968778695a4b3c2d1e0f"


def by_name(kind: BlockType) -> str:
    return kind.name


def peer(kind: BlockType, blocks: np.ndarray) -> np.ndarray:
    return gguf.dequantize(blocks, gguf.GGMLQuantizationType[kind.name]).astype(np.float32)


def test_sizes_are_those_of_the_package() -> None:
    sizes = {q.value: size for q, size in gguf.GGML_QUANT_SIZES.items()}
    for kind in TYPES.values():
        if kind.dtype:
            assert gguf.GGMLQuantizationType(kind.number).name == kind.name
        elif kind.number in sizes:
            assert (kind.elements, kind.nbytes) == sizes[kind.number], kind.name
    missing = {q.name for q in gguf.GGMLQuantizationType if q.value not in TYPES}
    assert missing == {"Q8_1", "Q8_K"}


@pytest.mark.parametrize("kind", KNOWN, ids=by_name)
@MANY
@given(rows=st.integers(1, 5), count=st.integers(1, 9), seed=st.integers(0, 2**32))
def test_values_are_those_of_the_package(kind: BlockType, rows: int, count: int, seed: int) -> None:
    blocks = random_blocks(kind, rows, count, seed)
    expected = peer(kind, blocks)
    for dtype in DTYPES:
        out = np.empty((rows, count * kind.elements), dtype)
        values_into(kind, blocks, out)
        with np.errstate(over="ignore"):
            wanted = expected.astype(dtype)
        assert out.tobytes() == wanted.tobytes(), dtype


@pytest.mark.parametrize("isa", [None])  # no fixture: one reference for all builds
@pytest.mark.parametrize("kind", KNOWN, ids=by_name)
def test_every_number_of_a_scale(kind: BlockType, isa: None, set_isa: Callable[..., None]) -> None:
    """All float16 scales, infinities and NaN included, and all scale bytes of the others."""
    halves = np.arange(65536, dtype=np.uint16)[:, None].view(np.uint8)
    blocks = random_blocks(kind, len(halves), 1, 0)
    blocks = blocks.reshape(len(halves), kind.nbytes)
    for at in HALVES.get(kind.name, (0,)):
        blocks[:, at : at + 2] = halves
    if kind.name == "MXFP4":
        blocks[:, 0] = halves[:, 0]
    if kind.name == "NVFP4":
        blocks[:, :2] = halves
    with np.errstate(invalid="ignore", over="ignore"):
        expected = peer(kind, blocks)
    for build in _native.available_isas():
        set_isa(build)
        out = np.empty((len(halves), kind.elements), np.float32)
        values_into(kind, blocks, out)
        assert np.array_equal(out, expected, equal_nan=True), build


def arrays(kind: BlockType, blocks: np.ndarray, dtype: type) -> tuple[np.ndarray, ...]:
    quantization = kind.encoding
    assert quantization is not None
    rows, n_in = blocks.shape[0], blocks.shape[1] // kind.nbytes * kind.elements
    words = np.empty((rows, n_in * quantization.bits // 32), np.uint32)
    shape = (rows, n_in // quantization.group_size)
    if quantization.mode is QuantMode.AFFINE:
        parts = (words, np.empty(shape, dtype), np.empty(shape, dtype))
    else:
        parts = (words, np.empty(shape, np.uint8))
    words_into(kind, blocks, *parts)
    return parts


def mlx_values(kind: BlockType, parts: tuple[np.ndarray, ...]) -> np.ndarray:
    """What MLX computes; affine in float64 from its parts, so that nothing rounds."""
    spec = kind.encoding
    assert spec is not None
    words, scales, *biases = parts
    if not biases:
        options = {"group_size": spec.group_size, "bits": 4, "mode": spec.mode.value}
        return np.array(mx.dequantize(to_mlx(words), to_mlx(scales), **options, dtype=mx.float32))
    ones = mx.ones(scales.shape)
    options = {"group_size": spec.group_size, "bits": spec.bits}
    codes = np.array(mx.dequantize(to_mlx(words), ones, mx.zeros(scales.shape), **options))
    spread = [np.repeat(x.astype(np.float64), spec.group_size, 1) for x in (scales, *biases)]
    return codes * spread[0] + spread[1]


@pytest.mark.parametrize("kind", FITTING, ids=by_name)
@MANY
@given(rows=st.integers(1, 5), count=st.integers(1, 9), seed=st.integers(0, 2**32))
def test_words_hold_the_codes(kind: BlockType, rows: int, count: int, seed: int) -> None:
    """Exact in float32, and in float16 where the document says so; else scales round once."""
    blocks = random_blocks(kind, rows, count, seed)
    if kind.name == "NVFP4":  # a byte that MLX takes for NaN; the package for 0
        blocks[blocks == 0x7F] = 0x7E
    expected = peer(kind, blocks)
    fine = arrays(kind, blocks, np.float32)
    assert kind.encoding is not None
    if kind.encoding.mode is not QuantMode.AFFINE:
        assert np.array_equal(mlx_values(kind, fine), expected)
        return
    exact = mlx_values(kind, fine)
    # The package rounds d * code, d * scale * code of K types has more than 24 bits.
    room = 2.0**-24 * np.abs(exact).max() if kind.name.endswith("_K") else 0.0
    assert np.abs(exact.astype(np.float32) - expected).max() <= 2 * room
    for dtype in DTYPES[1:]:
        words, scales, biases = arrays(kind, blocks, dtype)
        assert words.tobytes() == fine[0].tobytes()
        assert scales.tobytes() == fine[1].astype(dtype).tobytes()
        # Twice rounded, by half a unit each: of the scale, and of what is made of it.
        error = np.abs(biases.astype(np.float64) - fine[2].astype(np.float64))
        assert (error <= 2.0**-7 * np.abs(fine[2]) + 2.0**-17).all()
        if dtype is np.float16 and kind.name in EXACT_IN_F16:
            values = mlx_values(kind, (words, scales, biases)).astype(np.float32)
            assert np.array_equal(values, expected)


def hand(name: str, block: str) -> list[float]:
    kind = BY_NAME[name]
    out = np.empty((1, kind.elements), np.float32)
    values_into(kind, np.frombuffer(bytes.fromhex(block), np.uint8).reshape(1, -1), out)
    return [float(x) for x in out[0]]


def test_vectors_written_by_hand() -> None:
    values = hand("Q4_0", "0038" + QS)
    assert [values[i] for i in (0, 1, 15, 16, 31)] == [-4, -3.5, 3.5, 3.5, -4]
    values = hand("Q4_1", "003800bd" + QS)
    assert [values[i] for i in (0, 1, 15, 16, 31)] == [-1.25, -0.75, 6.25, 6.25, -1.25]
    values = hand("Q5_0", "003801800000" + QS)
    assert [values[i] for i in (0, 1, 15, 16, 31)] == [0, -7.5, 7.5, -0.5, -8]
    assert hand("Q8_0", "003880ff00017f" + "00" * 27)[:5] == [-64, -0.5, 0, 0.5, 63.5]
    values = hand("Q4_K", "00380034010203049ea1e4e7a5d60738" + "52" * 128)
    assert values[::32] == [-6.5, -3.25, -6, 0.25, -5.5, 3.75, -5, 7.25]
    assert hand("MXFP4", "80" + QS)[:16] == [
        0,
        1,
        2,
        3,
        4,
        6,
        8,
        12,
        0,
        -1,
        -2,
        -3,
        -4,
        -6,
        -8,
        -12,
    ]


def test_one_bit_blocks() -> None:
    """128 signs, lowest bit first: the package has no decoder, so two bytes by hand."""
    assert hand("Q1_0", "0038" + "05" + "00" * 15)[:4] == [0.5, -0.5, 0.5, -0.5]
    block = np.frombuffer(bytes.fromhex("003805" + "00" * 15), np.uint8).reshape(1, 18)
    parts = arrays(BY_NAME["Q1_0"], block, np.float16)
    assert mlx_values(BY_NAME["Q1_0"], parts)[0].tolist() == hand("Q1_0", "003805" + "00" * 15)


def test_q8_word_written_by_hand() -> None:
    block = bytes.fromhex("003880ff00017f" + "00" * 27)
    words, scales, biases = arrays(
        BY_NAME["Q8_0"], np.frombuffer(block, np.uint8).reshape(1, -1), np.float16
    )
    assert hex(words[0, 0]) == "0x81807f00"
    assert (scales[0, 0], biases[0, 0]) == (0.5, -64)


def test_what_does_not_fit_is_rejected() -> None:
    blocks, words = np.zeros((2, 18), np.uint8), np.zeros((2, 4), np.uint32)
    scales = np.zeros((2, 1), np.float16)
    with pytest.raises(ValueError, match="17 bytes of a row are not a multiple of the 18"):
        words_into(BY_NAME["Q4_0"], np.zeros((2, 17), np.uint8), words, scales, scales.copy())
    with pytest.raises(ValueError, match="scales: expected shape"):
        words_into(BY_NAME["Q4_0"], blocks, words, np.zeros((1, 1), np.float16), scales)
    with pytest.raises(ValueError, match="no affine codes of MLX hold number 14"):
        q6 = np.zeros((2, 210), np.uint8)
        words_into(BY_NAME["Q6_K"], q6, words, scales, scales.copy())
    with pytest.raises(ValueError, match="no block type of GGUF has number 99"):
        values_into(BlockType(99, "?"), blocks, np.zeros((2, 32), np.float32))
