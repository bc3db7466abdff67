"""Integer zero points of affine groups, against Python's own integers and words by hand."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from requant.errors import InvariantError
from requant.packings.coded_matrix import CodedMatrix
from requant.packings.exported import ColumnZeros, Shape
from requant.packings.zero_points import examine_zeros, integer_zeros
from requant.quantization.config import Quantization

Arrays = dict[str, np.ndarray]


def bf16(values: Any) -> np.ndarray:
    """Values rounded to bfloat16."""
    return np.asarray(values, ml_dtypes.bfloat16)


class NoScratch:
    """A packing that takes scratch memory fails."""

    def take(self, role: str, dtype: str, rows: int, row_bytes: int) -> np.ndarray:
        raise AssertionError(role)


def zeros_of(out: int, groups: int, bits: int) -> ColumnZeros:
    """The packing of a matrix with groups of 32."""
    return ColumnZeros(CodedMatrix(out, 32 * groups, Quantization.affine(32, bits)))


def words_of(parts: Arrays, packing: ColumnZeros, start: int, stop: int) -> np.ndarray:
    cut = {
        role: np.ascontiguousarray(parts[role][slice(*rect.rows)])
        for role, rect in packing.required_rects(start, stop).items()
    }
    out = np.full((stop - start, packing.columns), -1, np.int32)
    packing.repack(cut, start, stop, {"weight": out}, NoScratch())
    return out


def test_words_written_by_hand() -> None:
    """Ten outputs with the zero points 0 to 9: the first eight in a word, the others in the next.

    The scale of odd outputs is negative, and so is the sign of ``-bias / scale`` turned twice.
    """
    zeros = np.arange(10, dtype=np.float32)[:, None]
    scales = np.where(np.arange(10)[:, None] % 2, -0.5, 0.25).astype(np.float32)
    parts = {"scales": scales, "biases": -zeros * scales}
    found = words_of(parts, zeros_of(10, 1, 4), 0, 2)
    assert found.view(np.uint32).tolist() == [[0x76543210], [0x98]]
    assert words_of(parts, zeros_of(10, 1, 8), 1, 3).tolist() == [[0x07060504], [0x0908]]


def test_shape() -> None:
    out = np.zeros((1, 2), np.int64)
    Shape((10, 64)).repack({}, 0, 1, {"weight": out}, NoScratch())
    assert out.tolist() == [[10, 64]]


@given(st.data())
def test_any_rows_give_the_words_of_the_whole(data: st.DataObject) -> None:
    bits, out = data.draw(st.sampled_from([4, 8])), data.draw(st.integers(1, 40))
    random = np.random.default_rng(data.draw(st.integers(0, 99)))
    zeros = random.integers(0, 1 << bits, (out, 3))
    scales = random.choice([-1, 1], (out, 3)).astype(np.float32) / 64
    parts = {"scales": scales, "biases": (-zeros * scales).astype(np.float32)}
    rows = -(-out * bits // 32)
    packing = zeros_of(out, 3, bits)
    words = words_of(parts, packing, 0, rows)
    for group in range(3):
        stream = sum(int(zero) << (row * bits) for row, zero in enumerate(zeros[:, group]))
        column = words[:, group].view(np.uint32)
        assert sum(int(word) << (32 * row) for row, word in enumerate(column)) == stream
    start = data.draw(st.integers(0, rows - 1))
    stop = data.draw(st.integers(start + 1, rows))
    assert (words_of(parts, packing, start, stop) == words[start:stop]).all()


def test_zero_points_out_of_range_are_not_packed() -> None:
    parts = {"scales": np.ones((8, 1), np.float32), "biases": np.full((8, 1), -16, np.float32)}
    with pytest.raises(InvariantError, match="out of range"):
        words_of(parts, zeros_of(8, 1, 4), 0, 1)


def test_the_nearest_integer() -> None:
    scales = np.array([2.0, -2.0, 0.0, 1e-38], np.float32)
    biases = np.array([-6.9, -6.9, 0.0, -3e38], np.float32)
    zeros = integer_zeros(scales, biases)
    assert zeros.tolist() == [3.0, -3.0, 0.0, np.inf]
    assert not np.signbit(integer_zeros(np.ones(1), np.zeros(1))).any()  # 0, not -0


def test_classes_of_groups() -> None:
    """One group of each kind: exact, one rounding away, off the grid, out of range."""
    scales = bf16(np.array([0.75, 0.671875, 1.0, 1.0, 0.0]))
    # 15 * 0.671875 = 10.078125, which bfloat16 rounds to 10.0625.
    exact = examine_zeros(scales[:2], bf16(np.array([-5.25, -10.0625])), 4, "BF16")
    assert (exact.rounded, exact.off_grid, exact.out_of_range) == (0, 0, 0)
    rounded = examine_zeros(scales[1:2], bf16(np.array([-10.125])), 4, "BF16")
    assert (rounded.rounded, rounded.off_grid, rounded.out_of_range) == (1, 0, 0)
    assert rounded.max_steps == pytest.approx((10.125 - 10.078125) / 0.671875)
    off = examine_zeros(scales[2:3], bf16(np.array([-2.25])), 4, "BF16")
    assert (off.rounded, off.off_grid, off.out_of_range) == (0, 1, 0)
    out = examine_zeros(scales[2:4], bf16(np.array([-16.0, 1.0])), 4, "BF16")
    assert (out.rounded, out.off_grid, out.out_of_range) == (0, 0, 2)
    assert examine_zeros(scales[2:4], bf16(np.array([-16.0, 1.0])), 8, "BF16").out_of_range == 1
    # A scale of zero holds one value, the bias: no zero point gives it unless it is 0.
    assert examine_zeros(scales[4:], bf16(np.array([0.0])), 4, "BF16").off_grid == 0
    assert examine_zeros(scales[4:], bf16(np.array([3.0])), 4, "BF16").off_grid == 1


def test_nonfinite_and_middle() -> None:
    found = examine_zeros(np.array([np.inf, 1]), np.array([1, np.nan]), 4, "F32")
    assert found.nonfinite == 2
    scales = np.array([0.5, -0.25], ml_dtypes.bfloat16)
    middle = examine_zeros(scales, -8 * scales, 4, "BF16")
    assert middle.all_middle(4) and not middle.all_middle(8)
    assert not middle.merged(examine_zeros(scales, 0 * scales, 4, "BF16")).all_middle(4)
    assert middle.merged(middle).groups == 4
