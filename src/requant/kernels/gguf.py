"""Blocks of GGUF files: their types, and kernels that repack them or compute their values.

Every function writes into an array of the caller and takes matrices: two axes, C-contiguous.
A row of blocks is uint8 ``(rows, in_features / elements * nbytes)``.

A shape, dtype or layout that does not fit is a ``ValueError`` that says what was expected.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from requant.core.dtypes import NUMPY_DTYPE
from requant.kernels import _native
from requant.kernels.decode import float_bits
from requant.quantization.config import Quantization, QuantMode

Array = NDArray[Any]

_MODES = {39: QuantMode.MXFP4, 40: QuantMode.NVFP4}
_GROUPS = {QuantMode.MXFP4: 32, QuantMode.NVFP4: 16}


@dataclass(frozen=True)
class BlockType:
    """A type of tensor in a GGUF file."""

    number: int  # as files write it
    name: str  # as llama.cpp calls it
    dtype: str = ""  # header name of plain numbers; "" for blocks

    @property
    def _block(self) -> tuple[int, int, int, int, bool]:
        found = _native.gguf_block(self.number)
        assert found is not None, self.name
        return found

    @property
    def itemsize(self) -> int:
        """Bytes of a plain number."""
        return NUMPY_DTYPE[self.dtype].itemsize

    @property
    def elements(self) -> int:
        """Values of one block."""
        return self._block[0]

    @property
    def nbytes(self) -> int:
        """Bytes of one block."""
        return self._block[1]

    @property
    def encoding(self) -> Quantization | None:
        """MLX's encoding of the same codes; None where scales cover fewer than 32 values."""
        _, _, bits, group, fp4 = self._block
        if fp4:
            mode = _MODES[self.number]
            return Quantization(_GROUPS[mode], 4, mode)
        return Quantization.affine(group, bits) if bits else None


_BLOCKS = """
    2:Q4_0 3:Q4_1 6:Q5_0 7:Q5_1 8:Q8_0 10:Q2_K 11:Q3_K 12:Q4_K 13:Q5_K 14:Q6_K 16:IQ2_XXS 17:IQ2_XS
    18:IQ3_XXS 19:IQ1_S 20:IQ4_NL 21:IQ3_S 22:IQ2_S 23:IQ4_XS 29:IQ1_M 34:TQ1_0 35:TQ2_0 39:MXFP4
    40:NVFP4 41:Q1_0
"""
_PLAIN = {0: "F32", 1: "F16", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 30: "BF16"}

TYPES: dict[int, BlockType] = {
    **{int(n): BlockType(int(n), name) for n, name in (x.split(":") for x in _BLOCKS.split())},
    **{number: BlockType(number, name, name) for number, name in _PLAIN.items()},
}
"""Number -> type. Q8_1 (9) and Q8_K (15) are llama.cpp's own, never stored; others are gone."""

BY_NAME: dict[str, BlockType] = {kind.name: kind for kind in TYPES.values()}


def words_into(
    kind: BlockType, blocks: Array, words: Array, scales: Array, biases: Array | None = None
) -> None:
    """Move the codes of blocks into MLX's words; scales and biases are rounded once.

    A bias that follows from the scale is computed from the scale as it is stored.

    Args:
        kind: A type with an ``encoding``.
        blocks: Rows of blocks.
        words: uint32 ``(rows, in_features * bits / 32)``; overwritten.
        scales: ``(rows, in_features / group_size)``: float32, float16 or bfloat16, or uint8 in
            the float modes, whose scale bytes are moved as they are. Overwritten.
        biases: In affine mode, like the scales; overwritten.
    """
    if biases is None:
        _native.gguf_fp4(kind.number, blocks, words, scales)
        return
    bits, name = float_bits(scales, "scales")
    _native.gguf_affine(kind.number, blocks, words, bits, float_bits(biases, "biases")[0], name)


def values_into(kind: BlockType, blocks: Array, out: Array) -> None:
    """Compute the values of blocks in float32, as the ``gguf`` package does; rounded once.

    Args:
        kind: A type of blocks.
        blocks: Rows of blocks.
        out: ``(rows, in_features)``: float32, float16 or bfloat16; overwritten.

    Example:
        >>> import numpy as np
        >>> block = np.frombuffer(bytes.fromhex("0038f0e1d2c3b4a5968778695a4b3c2d1e0f"), np.uint8)
        >>> values = np.empty((1, 32), np.float32)
        >>> values_into(BY_NAME["Q4_0"], block.reshape(1, 18), values)
        >>> values[0, :3].tolist()
        [-4.0, -3.5, -3.0]
    """
    bits, name = float_bits(out, "out")
    _native.gguf_values(kind.number, blocks, bits, name)
