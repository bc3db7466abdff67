"""
Kernels of requant.

Arrays are C-contiguous and outputs are allocated by the caller. Floats are passed
as bits, uint16 or uint32, with a dtype name: "F32", "F16" or "BF16".
"""

from typing import Annotated

from numpy.typing import NDArray


def affine_quantize(w: Annotated[NDArray, dict(device='cpu', writable=False)], dtype: str, group_size: int, bits: int, words: Annotated[NDArray, dict(device='cpu')], scales: Annotated[NDArray, dict(device='cpu')], biases: Annotated[NDArray, dict(device='cpu')]) -> None: ...

def affine_dequantize(words: Annotated[NDArray, dict(device='cpu', writable=False)], scales: Annotated[NDArray, dict(device='cpu', writable=False)], scales_dtype: str, biases: Annotated[NDArray, dict(device='cpu', writable=False)], biases_dtype: str, group_size: int, bits: int, out: Annotated[NDArray, dict(device='cpu')], out_dtype: str) -> None: ...

def mx_quantize(w: Annotated[NDArray, dict(device='cpu', writable=False)], dtype: str, mode: str, words: Annotated[NDArray, dict(device='cpu')], scales: Annotated[NDArray, dict(device='cpu')]) -> int:
    """
    Returns the number of groups flushed to zero: too small for an E8M0 scale.
    """

def mx_dequantize(words: Annotated[NDArray, dict(device='cpu', writable=False)], scales: Annotated[NDArray, dict(device='cpu', writable=False)], mode: str, out: Annotated[NDArray, dict(device='cpu')], out_dtype: str) -> None: ...

def nvfp4_quantize(w: Annotated[NDArray, dict(device='cpu', writable=False)], dtype: str, words: Annotated[NDArray, dict(device='cpu')], scales: Annotated[NDArray, dict(device='cpu')], global_scale: float | None = None) -> None: ...

def nvfp4_dequantize(words: Annotated[NDArray, dict(device='cpu', writable=False)], scales: Annotated[NDArray, dict(device='cpu', writable=False)], out: Annotated[NDArray, dict(device='cpu')], out_dtype: str, global_scale: float | None = None) -> None: ...

def pack_words(codes: Annotated[NDArray, dict(device='cpu', writable=False)], bits: int, words: Annotated[NDArray, dict(device='cpu')]) -> None: ...

def unpack_words(words: Annotated[NDArray, dict(device='cpu', writable=False)], bits: int, codes: Annotated[NDArray, dict(device='cpu')]) -> None: ...

def cast(src: Annotated[NDArray, dict(device='cpu', writable=False)], src_dtype: str, dst: Annotated[NDArray, dict(device='cpu')], dst_dtype: str) -> int:
    """
    Rounds to nearest even; returns the number of finite values that became infinite.
    """

def count_nonfinite(w: Annotated[NDArray, dict(device='cpu', writable=False)], dtype: str) -> int: ...

def first_nonfinite(w: Annotated[NDArray, dict(device='cpu', writable=False)], dtype: str) -> int:
    """Flat index, or -1."""

def group_errors(a: Annotated[NDArray, dict(device='cpu', writable=False)], a_dtype: str, b: Annotated[NDArray, dict(device='cpu', writable=False)], b_dtype: str, group_size: int, group_max: Annotated[NDArray, dict(device='cpu')]) -> tuple[float, float]:
    """
    Writes the largest |a - b| of each group (float32 bits); returns the sums of (a - b)^2 and of a^2.
    """

def isa() -> str: ...

def set_isa(name: str) -> None: ...

def available_isas() -> list[str]: ...
