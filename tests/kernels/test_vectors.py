"""Worked numbers that MLX 0.32.4 gave, written down: they hold without MLX and the reference.

The inputs are two rows of 32, exact in every dtype (A) or rounded into it (B). Further
groups of this kind are in test_affine.py and test_float_modes.py.
"""

import ml_dtypes
import numpy as np
import pytest

from requant.kernels.quantize import dequantize, quantize
from requant.quantization.config import Quantization
from tests.support import reference

BF16 = ml_dtypes.bfloat16
A = ((7 * np.arange(32) % 32 - 11) / 8).astype(np.float32).reshape(1, 32)
B = (((np.arange(32) ** 2 % 37) - 13) * 0.013).astype(np.float32).reshape(1, 32)


def hexes(array):
    width = 2 * array.dtype.itemsize
    uint = {2: np.uint8, 4: np.uint16, 8: np.uint32}[width]
    return " ".join(f"{value:0{width}x}" for value in array.view(uint).ravel())


def test_input_b():
    assert hexes(B.astype(BF16)) == (
        "be2d be20 bdf0 bd55 3d20 3e20 3e99 bc55 3e3a bda0 3e2d bd20 3e85 3dd5 bcd5 be05 "
        "3e8c 3e62 3e48 3e48 3e62 3e8c be05 bcd5 3dd5 3e85 bd20 3e2d bda0 3e3a bc55 3e99"
    )


@pytest.mark.parametrize(
    ("bits", "dtype", "values"),
    [
        (3, np.float32, "bf800000 bf000000 3f000000 3fc00000"),
        (6, np.float32, "bfabb514 bef9c190 3ebb5128 3fa3e706"),
        (6, np.float16, "bd5e b7d0 35d8 3d1f"),
        (6, BF16, "bfac bef8 3eb8 3fa4"),
        (8, np.float32, "bfae8ba4 bf000000 3ec1f078 3fa0f83e"),
        (8, np.float16, "bd74 b800 3610 3d08"),
        (8, BF16, "bfae bf00 3ec0 3fa1"),
    ],
)
def test_values_of_a(bits, dtype, values):
    parts = quantize(A.astype(dtype), Quantization.affine(32, bits))
    assert hexes(dequantize(parts, Quantization.affine(32, bits))[:, :4]) == values


def test_three_bit_codes_of_a():
    words, _, _ = quantize(A, Quantization.affine(32, 3))
    codes = [int(c) for c in "76421754206431764206531764207532"]
    stream = sum(code << 3 * k for k, code in enumerate(codes))
    assert words.tobytes() == stream.to_bytes(12, "little")


WORDS_OF_B = {
    3: "aa813bb6 1248d19a 11554b98",
    4: "a059ceff eb71b4d4 be133331 0a4d4b17",
    8: "bfe3f8ff aa004e8e b847ce40 eab16a15 39392b0e b1ea0e2b 47b8156a 00aa40ce",
}
AFFINE_B = [
    # bits, dtype, scale, bias, values
    (
        3,
        np.float32,
        "bd991687",
        "3e991687",
        "be191686 be191686 be191686 bd991688 3d991688 3e191687",
    ),
    (3, BF16, "bd99", "3e99", "be1a be1a be1a bd98 3d98 3e19"),
    (
        4,
        np.float32,
        "bcf4f0d8",
        "3e991687",
        "be191686 be191686 bdf4f0d8 bd74f0d8 3cf4f0d0 3e191687",
    ),
    (4, np.float16, "a7a8", "34c9", "b0ca b0ca afa8 aba8 27b0 30c9"),
    (4, BF16, "bcf5", "3e99", "be1a be1a bdf4 bd78 3cf0 3e19"),
    (
        8,
        np.float32,
        "baf06ec4",
        "3e991687",
        "be2ccf9c be1fa98e bdf06ec4 bd5260e8 3d1dc8b0 3e1fa98f",
    ),
    (8, BF16, "baf0", "3e99", "be2c be1e bdf0 bd50 3d20 3e20"),
]


@pytest.mark.parametrize(("bits", "dtype", "scale", "bias", "values"), AFFINE_B)
def test_affine_b(bits, dtype, scale, bias, values):
    parts = quantize(B.astype(dtype), Quantization.affine(32, bits))
    words = WORDS_OF_B[bits]
    if (bits, dtype) == (8, BF16):
        words = words.replace("39392b0e", "38382b0e")  # the input itself was rounded
    assert [hexes(part) for part in parts] == [words, scale, bias]
    assert hexes(dequantize(parts, Quantization.affine(32, bits))[:, :6]) == values


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16])
@pytest.mark.parametrize(
    ("mode", "bits", "group_size", "words", "scales", "values"),
    [
        (
            "mxfp4",
            4,
            32,
            "0641accd c93695a5 9c665566 605a5963",
            "7b",
            "be40 be00 be00 bd80 3d00 3e00",
        ),
        (
            "mxfp8",
            8,
            32,
            "e5eff2f3 d57a7262 e273ea74 f0dd6d78 74747679 ddf07976 73e2786d 7ad574ea",
            "75",
            "be30 be20 bdf0 bd50 3d20 3e20",
        ),
        (
            "nvfp4",
            4,
            16,
            "9752acdd d947a5b6 9d766667 796b5a74",
            "15 15",
            "be1c be1c bdd0 bd50 3d50 3e1c",
        ),
    ],
)
def test_float_modes_b(mode, bits, group_size, words, scales, values, dtype):
    parts = quantize(B.astype(dtype), Quantization(group_size, bits, mode))
    assert [hexes(part) for part in parts[:2]] == [words, scales]
    assert hexes(dequantize(parts, Quantization(group_size, bits, mode))[:, :6]) == values


def test_nvfp4_b_with_a_global_scale():
    amax = np.abs(B).max()
    assert hexes(amax.reshape(1)) == "3e991687"
    parts = quantize(B, Quantization(16, 4, "nvfp4"), global_scale=amax)
    assert hexes(parts[0]) == "9752acdd d947a5b6 9d766667 796b5a74"
    assert hexes(parts[1]) == "7e 7e"
    values = dequantize(parts, Quantization(16, 4, "nvfp4"), global_scale=amax)
    assert hexes(values[:, :6]) == "be191687 be191687 bdcc1e09 bd4c1e09 3d4c1e09 3e191687"


TO_FP8 = [
    (0.0, 0x00),
    (-0.0, 0x80),
    (1.0, 0x38),
    (448.0, 0x7E),
    (2.0**-9, 0x01),
    (2.0**-10, 0x00),
    (1.5 * 2**-10, 0x01),
    (2.0**-6, 0x08),
    (17.0, 0x58),
    (19.0, 0x5A),
    (1.0625, 0x38),
    (1.1875, 0x3A),
]


@pytest.mark.parametrize(("value", "code"), TO_FP8)
def test_e4m3(value, code):
    """In a group whose largest value is 448 the scale is 1 and mxfp8 stores E4M3 itself."""
    w = np.full((1, 32), 448.0, np.float32)
    w[0, 3] = value
    words, scales, _ = quantize(w, Quantization(32, 8, "mxfp8"))
    assert scales.tolist() == [[127]]
    assert words.view(np.uint8)[0, 3] == code
    assert reference.encode_e4m3(value) == code


@pytest.mark.parametrize(
    ("value", "code"), [(449.0, 0x7E), (464.0, 0x7E), (1e9, 0x7E), (np.inf, 0x7E), (-1e9, 0xFE)]
)
def test_e4m3_saturates(value, code):
    assert reference.encode_e4m3(value) == code
    w = np.zeros((1, 32), np.float32)
    w[0, 0] = abs(value) * 6  # an nvfp4 scale is E4M3 too, of the largest value over 6
    if np.isfinite(value):
        _, scales, _ = quantize(w, Quantization(16, 4, "nvfp4"))
        assert scales[0, 0] == code & 0x7F
