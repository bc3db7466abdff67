"""
Kernels of requant.

Arrays are C-contiguous and outputs are allocated by the caller. Floats are passed
as bits, uint16 or uint32, with a dtype name: "F32", "F16" or "BF16".
"""

from typing import Any

import numpy.typing


def affine_quantize(w: numpy.typing.NDArray[Any], dtype: str, group_size: int, bits: int, words: numpy.typing.NDArray[Any], scales: numpy.typing.NDArray[Any], biases: numpy.typing.NDArray[Any]) -> None: ...

def affine_dequantize(words: numpy.typing.NDArray[Any], scales: numpy.typing.NDArray[Any], scales_dtype: str, biases: numpy.typing.NDArray[Any], biases_dtype: str, group_size: int, bits: int, out: numpy.typing.NDArray[Any], out_dtype: str) -> None: ...

def mx_quantize(w: numpy.typing.NDArray[Any], dtype: str, mode: str, words: numpy.typing.NDArray[Any], scales: numpy.typing.NDArray[Any]) -> int:
    """
    Returns the number of groups flushed to zero: too small for an E8M0 scale.
    """

def mx_dequantize(words: numpy.typing.NDArray[Any], scales: numpy.typing.NDArray[Any], mode: str, out: numpy.typing.NDArray[Any], out_dtype: str) -> None: ...

def nvfp4_quantize(w: numpy.typing.NDArray[Any], dtype: str, words: numpy.typing.NDArray[Any], scales: numpy.typing.NDArray[Any], global_scale: float | None = None) -> None: ...

def nvfp4_dequantize(words: numpy.typing.NDArray[Any], scales: numpy.typing.NDArray[Any], out: numpy.typing.NDArray[Any], out_dtype: str, global_scale: float | None = None) -> None: ...

def affine_search(w: numpy.typing.NDArray[Any], dtype: str, group_size: int, bits: int, level: str, weights: numpy.typing.NDArray[Any] | None, words: numpy.typing.NDArray[Any], scales: numpy.typing.NDArray[Any], biases: numpy.typing.NDArray[Any]) -> None:
    """
    As affine_quantize, with scales and biases searched for; weights: float32 bits, one a column, or None.
    """

def gptq_group(w: numpy.typing.NDArray[Any], start: int, group_size: int, bits: int, scales: numpy.typing.NDArray[Any], biases: numpy.typing.NDArray[Any], propagation: numpy.typing.NDArray[Any], codes: numpy.typing.NDArray[Any], errors: numpy.typing.NDArray[Any]) -> None:
    """
    Codes of a group's columns one by one; each one's error is handed on to the later columns of w, in place.
    """

def mx_search(w: numpy.typing.NDArray[Any], dtype: str, mode: str, level: str, weights: numpy.typing.NDArray[Any] | None, words: numpy.typing.NDArray[Any], scales: numpy.typing.NDArray[Any]) -> int:
    """Returns what mx_quantize does."""

def nvfp4_search(w: numpy.typing.NDArray[Any], dtype: str, level: str, weights: numpy.typing.NDArray[Any] | None, words: numpy.typing.NDArray[Any], scales: numpy.typing.NDArray[Any], global_scale: float | None = None) -> None: ...

def pack_words(codes: numpy.typing.NDArray[Any], bits: int, words: numpy.typing.NDArray[Any]) -> None: ...

def unpack_words(words: numpy.typing.NDArray[Any], bits: int, codes: numpy.typing.NDArray[Any]) -> None: ...

def cast(src: numpy.typing.NDArray[Any], src_dtype: str, dst: numpy.typing.NDArray[Any], dst_dtype: str) -> int:
    """
    Rounds to nearest even; returns the number of finite values that became infinite.
    """

def count_nonfinite(w: numpy.typing.NDArray[Any], dtype: str) -> int: ...

def first_nonfinite(w: numpy.typing.NDArray[Any], dtype: str) -> int:
    """Flat index, or -1."""

def group_errors(a: numpy.typing.NDArray[Any], a_dtype: str, b: numpy.typing.NDArray[Any], b_dtype: str, group_size: int, group_max: numpy.typing.NDArray[Any]) -> tuple[float, float]:
    """
    Writes the largest |a - b| of each group (float32 bits); returns the sums of (a - b)^2 and of a^2.
    """

def transpose(src: numpy.typing.NDArray[Any], out: numpy.typing.NDArray[Any]) -> None: ...

def stream_columns(src: numpy.typing.NDArray[Any], bits: int, out: numpy.typing.NDArray[Any], out_bits: int, interleaved: bool, is_signed: bool) -> None:
    """out_bits 0: out holds codes, one a byte."""

def planar_columns(src: numpy.typing.NDArray[Any], bits: int, out: numpy.typing.NDArray[Any], out_bits: int) -> None:
    """out_bits 0: out holds codes, one a byte."""

def marlin_words(src: numpy.typing.NDArray[Any], out: numpy.typing.NDArray[Any]) -> None: ...

def awq_gemv_fast_words(src: numpy.typing.NDArray[Any], out: numpy.typing.NDArray[Any]) -> None: ...

def stream_codes(src: numpy.typing.NDArray[Any], bits: int, out: numpy.typing.NDArray[Any], padded: bool) -> None: ...

def extract_bitfield(src: numpy.typing.NDArray[Any], shift: int, bits: int, flip: int, out: numpy.typing.NDArray[Any], first: int, step: int) -> None:
    """Row r of src becomes row first + r * step of out."""

def deinterleave_words(src: numpy.typing.NDArray[Any], out: numpy.typing.NDArray[Any]) -> None: ...

def integer_values(codes: numpy.typing.NDArray[Any], scales: numpy.typing.NDArray[Any], zeros: numpy.typing.NDArray[Any], group: int, out: numpy.typing.NDArray[Any], out_dtype: str, difference: str) -> None: ...

def float8_values(bytes: numpy.typing.NDArray[Any], scales: numpy.typing.NDArray[Any], block_rows: int, block_cols: int, first_row: int, out: numpy.typing.NDArray[Any], out_dtype: str, fnuz: bool) -> int:
    """Returns the number of NaN bytes."""

def lut_values(bytes: numpy.typing.NDArray[Any], codebook: numpy.typing.NDArray[Any], absmax: numpy.typing.NDArray[Any], block: int, first: int, high_first: bool, out: numpy.typing.NDArray[Any], out_dtype: str) -> None: ...

def gguf_block(type: int) -> tuple[int, int, int, int, bool] | None:
    """
    Values and bytes of a block, bits and group size of the affine codes that hold it (bits 0:
    none), and whether a float mode of MLX does; None for a number without blocks.
    """

def gguf_affine(type: int, blocks: numpy.typing.NDArray[Any], words: numpy.typing.NDArray[Any], scales: numpy.typing.NDArray[Any], biases: numpy.typing.NDArray[Any], dtype: str) -> None: ...

def gguf_fp4(type: int, blocks: numpy.typing.NDArray[Any], words: numpy.typing.NDArray[Any], scales: numpy.typing.NDArray[Any]) -> None: ...

def gguf_values(type: int, blocks: numpy.typing.NDArray[Any], out: numpy.typing.NDArray[Any], dtype: str) -> None: ...

def isa() -> str: ...

def set_isa(name: str) -> None: ...

def available_isas() -> list[str]: ...
