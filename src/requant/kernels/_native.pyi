"""
Kernels of requant.

Arrays are C-contiguous and outputs are allocated by the caller. Floats are passed
as bits, uint16 or uint32, with a dtype name: "F32", "F16" or "BF16".
"""

from collections.abc import Sequence
from typing import Any

import numpy.typing


def affine_quantize(w: numpy.typing.NDArray[Any], dtype: str, group_size: int, bits: int, words: numpy.typing.NDArray[Any], scales: numpy.typing.NDArray[Any], biases: numpy.typing.NDArray[Any]) -> None:
    """
    Quantizes to mode affine: a scale and a bias of the dtype of w for each group.
    """

def affine_dequantize(words: numpy.typing.NDArray[Any], scales: numpy.typing.NDArray[Any], scales_dtype: str, biases: numpy.typing.NDArray[Any], biases_dtype: str, group_size: int, bits: int, out: numpy.typing.NDArray[Any], out_dtype: str) -> None:
    """Values of mode affine; scales and biases may differ in dtype."""

def mx_quantize(w: numpy.typing.NDArray[Any], dtype: str, mode: str, words: numpy.typing.NDArray[Any], scales: numpy.typing.NDArray[Any]) -> int:
    """
    Quantizes to mxfp4 or mxfp8; returns the number of groups flushed to zero: too small for an E8M0 scale.
    """

def mx_dequantize(words: numpy.typing.NDArray[Any], scales: numpy.typing.NDArray[Any], mode: str, out: numpy.typing.NDArray[Any], out_dtype: str) -> None:
    """Values of mxfp4 or mxfp8."""

def nvfp4_quantize(w: numpy.typing.NDArray[Any], dtype: str, words: numpy.typing.NDArray[Any], scales: numpy.typing.NDArray[Any], global_scale: float | None = None) -> None:
    """Quantizes to nvfp4, with a global scale of the tensor or without."""

def nvfp4_dequantize(words: numpy.typing.NDArray[Any], scales: numpy.typing.NDArray[Any], out: numpy.typing.NDArray[Any], out_dtype: str, global_scale: float | None = None) -> None:
    """Values of nvfp4; F32 where there is a global scale."""

def affine_search(w: numpy.typing.NDArray[Any], dtype: str, group_size: int, bits: int, level: str, weights: numpy.typing.NDArray[Any] | None, by_magnitude: bool, words: numpy.typing.NDArray[Any], scales: numpy.typing.NDArray[Any], biases: numpy.typing.NDArray[Any]) -> None:
    """
    As affine_quantize, with scales and biases searched for; weights: float32 bits, one a column, or None; by_magnitude: whether they are multiplied with the magnitude of each value.
    """

def mx_search(w: numpy.typing.NDArray[Any], dtype: str, mode: str, level: str, weights: numpy.typing.NDArray[Any] | None, by_magnitude: bool, words: numpy.typing.NDArray[Any], scales: numpy.typing.NDArray[Any]) -> int:
    """
    As mx_quantize, with scales searched for; weights as those of affine_search.
    """

def nvfp4_search(w: numpy.typing.NDArray[Any], dtype: str, level: str, weights: numpy.typing.NDArray[Any] | None, by_magnitude: bool, words: numpy.typing.NDArray[Any], scales: numpy.typing.NDArray[Any], global_scale: float | None = None) -> None:
    """
    As nvfp4_quantize, with scales searched for; weights as those of affine_search.
    """

def column_sums(w: numpy.typing.NDArray[Any], dtype: str, magnitudes: numpy.typing.NDArray[Any], squares: numpy.typing.NDArray[Any]) -> None:
    """Adds each column's sum of magnitudes and of squares (bits of float64)."""

def weighted_errors(a: numpy.typing.NDArray[Any], b: numpy.typing.NDArray[Any], dtype: str, group_size: int, weights: numpy.typing.NDArray[Any] | None, by_magnitude: bool) -> tuple[float, float]:
    """
    The sums of weight * (a - b)^2 and of weight * a^2, with the weights that a search of a minimizes.
    """

class EncodingError:
    """What was found while rows were encoded; each call adds to it."""

    def __init__(self) -> None: ...

    @property
    def squared_error(self) -> float: ...

    @property
    def squared_values(self) -> float: ...

    @property
    def max_error_steps(self) -> float: ...

    @property
    def nonfinite(self) -> int: ...

    @property
    def first_nonfinite(self) -> int:
        """
        Number of the first value that is NaN or infinite, among all so far, if nonfinite is not 0.
        """

    @property
    def flushed_groups(self) -> int: ...

def quantize_measured(w: numpy.typing.NDArray[Any], dtype: str, mode: str, group_size: int, bits: int, words: numpy.typing.NDArray[Any], scales: numpy.typing.NDArray[Any], biases: numpy.typing.NDArray[Any] | None, error: EncodingError) -> None:
    """
    Quantizes as the kernel of the mode does, and adds the error of the codes.
    """

def measure(w: numpy.typing.NDArray[Any], dtype: str, mode: str, group_size: int, bits: int, words: numpy.typing.NDArray[Any], scales: numpy.typing.NDArray[Any], biases: numpy.typing.NDArray[Any] | None, error: EncodingError) -> None:
    """Adds the error of codes that exist."""

def gptq_group(w: numpy.typing.NDArray[Any], start: int, group_size: int, bits: int, scales: numpy.typing.NDArray[Any], biases: numpy.typing.NDArray[Any], propagation: numpy.typing.NDArray[Any], codes: numpy.typing.NDArray[Any], errors: numpy.typing.NDArray[Any]) -> None:
    """
    Codes of a group's columns one by one; the error of each is propagated to the later columns of w, in place.
    """

def gptq_refine(w: numpy.typing.NDArray[Any], group_size: int, bits: int, sweeps: int, hessian: numpy.typing.NDArray[Any], codes: numpy.typing.NDArray[Any], dtype: str, scales: numpy.typing.NDArray[Any], biases: numpy.typing.NDArray[Any], gradients: numpy.typing.NDArray[Any], changes: numpy.typing.NDArray[Any]) -> None:
    """
    Scales, biases and codes refined group by group with the Hessian, so that the outputs' error falls, in place.
    """

def cast(src: numpy.typing.NDArray[Any], src_dtype: str, dst: numpy.typing.NDArray[Any], dst_dtype: str) -> int:
    """
    Rounds to nearest even; returns the number of finite values that became infinite.
    """

def count_nonfinite(w: numpy.typing.NDArray[Any], dtype: str) -> int:
    """The number of infinities and NaNs."""

def first_nonfinite(w: numpy.typing.NDArray[Any], dtype: str) -> int:
    """Flat index of the first infinity or NaN, or -1."""

def pack_words(codes: numpy.typing.NDArray[Any], bits: int, words: numpy.typing.NDArray[Any]) -> None:
    """Codes, one a byte, to words: each row one bit stream."""

def unpack_words(words: numpy.typing.NDArray[Any], bits: int, codes: numpy.typing.NDArray[Any]) -> None:
    """Words to codes, one a byte; undoes pack_words."""

def transpose(src: numpy.typing.NDArray[Any], out: numpy.typing.NDArray[Any]) -> None:
    """Rows to columns; elements of 8, 16 or 32 bits."""

def stream_columns(src: numpy.typing.NDArray[Any], bits: int, out: numpy.typing.NDArray[Any], out_bits: int, interleaved: bool, is_signed: bool) -> None:
    """
    Rows of inputs, each one bit stream along the outputs, to rows of outputs; out_bits 0: codes, one a byte.
    """

def planar_columns(src: numpy.typing.NDArray[Any], bits: int, out: numpy.typing.NDArray[Any], out_bits: int) -> None:
    """
    Bit planes down the rows (GPTQModel) to rows of outputs; out_bits 0: out holds codes, one a byte.
    """

def marlin_words(src: numpy.typing.NDArray[Any], out: numpy.typing.NDArray[Any]) -> None:
    """4-bit codes in Marlin's tiles to rows of outputs."""

def awq_gemv_fast_words(src: numpy.typing.NDArray[Any], out: numpy.typing.NDArray[Any]) -> None:
    """4-bit codes in the order of AutoAWQ's gemv_fast to rows of outputs."""

def stream_codes(src: numpy.typing.NDArray[Any], bits: int, out: numpy.typing.NDArray[Any], padded: bool) -> None:
    """
    Codes of rows that are bit streams, or with padded, as many codes as fit in the low bits of each word.
    """

def extract_bitfield(src: numpy.typing.NDArray[Any], shift: int, bits: int, flip: int, out: numpy.typing.NDArray[Any], first: int, step: int) -> None:
    """
    Bits from shift on of each element, xor flip; row r of src becomes row first + r * step of out.
    """

def deinterleave_words(src: numpy.typing.NDArray[Any], out: numpy.typing.NDArray[Any]) -> None:
    """Words of 4-bit codes in AutoAWQ's order to words in order."""

def integer_values(codes: numpy.typing.NDArray[Any], scales: numpy.typing.NDArray[Any], zeros: numpy.typing.NDArray[Any], group: int, out: numpy.typing.NDArray[Any], out_dtype: str, difference: str) -> None:
    """
    (code - zero) * scale; difference: the dtype that code - zero is rounded to first.
    """

def float8_values(bytes: numpy.typing.NDArray[Any], scales: numpy.typing.NDArray[Any], block_rows: int, block_cols: int, first_row: int, out: numpy.typing.NDArray[Any], out_dtype: str, fnuz: bool) -> int:
    """
    E4M3 bytes times the scale of their block; returns the number of NaN bytes.
    """

def lut_values(bytes: numpy.typing.NDArray[Any], codebook: numpy.typing.NDArray[Any], absmax: numpy.typing.NDArray[Any], block: int, first: int, high_first: bool, out: numpy.typing.NDArray[Any], out_dtype: str) -> None:
    """
    codebook[code] * absmax of the block, two codes a byte; the first value is number first of its block.
    """

def gguf_block(type: int) -> tuple[int, int, int, int, bool] | None:
    """
    Values and bytes of a block, bits and group size of the affine codes that hold it (bits 0:
    none), and whether a float mode of MLX does; None for a number without blocks.
    """

def gguf_affine(type: int, blocks: numpy.typing.NDArray[Any], words: numpy.typing.NDArray[Any], scales: numpy.typing.NDArray[Any], biases: numpy.typing.NDArray[Any], dtype: str) -> None:
    """Blocks to words, scales and biases of mode affine."""

def gguf_fp4(type: int, blocks: numpy.typing.NDArray[Any], words: numpy.typing.NDArray[Any], scales: numpy.typing.NDArray[Any]) -> None:
    """Blocks to words and scales of a float mode of 4 bits."""

def gguf_values(type: int, blocks: numpy.typing.NDArray[Any], out: numpy.typing.NDArray[Any], dtype: str) -> None:
    """Values of blocks."""

class FileError(Exception):
    pass

class Stopped(Exception):
    pass

class StopFlag:
    """Set by one thread, to end the units of others at their next block."""

    def __init__(self) -> None: ...

    def set(self) -> None:
        """Ends the units that were given the flag: they raise Stopped."""

    def is_set(self) -> bool:
        """Whether set was called."""

def copy_rows(source: numpy.typing.NDArray[Any] | Sequence[tuple[int, int, int]], target: numpy.typing.NDArray[Any] | tuple[int, int], nbytes: int, block_bytes: int, stop: StopFlag | None) -> None:
    """
    Copies bytes. A source is an array or ranges (fd, offset, nbytes) of files, a target an array or a place
    (fd, offset). Raises FileError(is_write, index of the range or target, errno or 0 at the end, offset), and
    Stopped once the flag is set.
    """

def write_values(sources: Sequence[numpy.typing.NDArray[Any] | Sequence[tuple[int, int, int]]], kind: tuple[str] | tuple[str, numpy.typing.NDArray[Any], int, int, int] | tuple[str, int, int, str, str] | tuple[int], target: numpy.typing.NDArray[Any] | tuple[int, int], dtype: str, rows: int, cols: int, counts_nonfinite: bool, block_bytes: int, stop: StopFlag | None) -> tuple[int, int, bool]:
    """
    Casts or decodes rows to dtype. kind says how they are stored: (dtype,) of floats; (dtype, scales, rows and
    columns of a block, first row) of E4M3 bytes; (mode, group_size, bits, dtypes of scales and of biases) of
    words, scales and biases; (type,) of blocks of GGUF. Returns (finite values that became infinite, values that
    are not finite, if they are counted, whether a scale or bias of codes is not: then the rest is not done).
    """

def encode_rows(sources: Sequence[numpy.typing.NDArray[Any] | Sequence[tuple[int, int, int]]], kind: tuple[str] | tuple[str, numpy.typing.NDArray[Any], int, int, int] | tuple[str, int, int, str, str] | tuple[int], dtype: str, rows: int, cols: int, mode: str, group_size: int, bits: int, targets: Sequence[numpy.typing.NDArray[Any] | tuple[int, int]], level: str | None, weights: numpy.typing.NDArray[Any] | None, by_magnitude: bool, is_encoded: bool, block_bytes: int, stop: StopFlag | None) -> tuple[int, int, int, int, float, float, float, float, float, bool]:
    """
    The same, and encodes them into words, scales and biases, and measures the error; with is_encoded only
    measures. Returns (nonfinite values, their first row or -1, overflows, flushed groups, squared error, squared
    values, the largest error in steps, both sums with the weights of a search, whether a scale or bias of the
    source is not finite).
    """

def read_spaced(fd: int, offset: int, stride: int, into: numpy.typing.NDArray[Any]) -> None:
    """Reads rows of bytes that lie stride bytes apart."""

def repack_integers(words: tuple[tuple[Sequence[tuple[int, int, int]], int, int, int, int], str, int, bool, bool], scales: tuple[tuple[Sequence[tuple[int, int, int]], int, int, int, int], str, bool], zeros: tuple[str, tuple[Sequence[tuple[int, int, int]], int, int, int, int] | None, bool, bool, int, int, int, bool, str], group: int, rows: int, cols: int, group_size: int, bits: int, dtype: str, targets: Sequence[numpy.typing.NDArray[Any] | tuple[int, int]], row_unit: int, first_row: int, measures: bool, room: numpy.typing.NDArray[Any], stop: StopFlag | None) -> tuple[float, float] | None:
    """
    Moves integer codes of rows into MLX's words, and rounds scales and biases once. A rectangle is (ranges of
    files, rows, bytes of a row, left, width). words: (rectangle, order, bits, padded, interleaved); scales:
    (rectangle, dtype, whether (groups, rows)); zeros: (kind, rectangle or None, padded, interleaved, skipped, word
    offset, code offset, must be middle, dtype). room: uint8, for a block of outputs. Returns the squares of what
    rounding changes and of values, of every 16th row if measures; None if a number is not finite or not as claimed:
    the outputs are not complete then.
    """

def repack_gguf(blocks: tuple[Sequence[tuple[int, int, int]], int, int, int, int], type: int, rows: int, cols: int, mode: str, dtype: str, targets: Sequence[numpy.typing.NDArray[Any] | tuple[int, int]], first_row: int, measures: bool, room: numpy.typing.NDArray[Any], stop: StopFlag | None) -> tuple[float, float] | None:
    """The same with blocks of GGUF."""

def isa() -> str:
    """The instruction set whose kernels run."""

def set_isa(name: str) -> None:
    """Has the kernels of another instruction set run, in all threads."""

def available_isas() -> list[str]:
    """Instruction sets that this processor has kernels for, the best last."""
