"""The protocol of a packing: rows of a layer out of tensors in another order than MLX's.

A packing is frozen data (it is a part of the plan) with three duties: say which rectangle of
which tensor a range of output rows needs, turn these rectangles into MLX's words, scales and
biases, and turn them into dense values. It never sees a file: ``execution.source_reader`` reads
rows from a checkpoint, ``weights.transform`` slices them from arrays in memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from math import gcd
from typing import Any, ClassVar, Protocol

import numpy as np

from requant.core.json_pieces import as_data
from requant.errors import InvariantError
from requant.kernels import decode, repack
from requant.kernels import quantize as native
from requant.kernels.gguf import BlockType
from requant.kernels.unit_repack import StoredCodes
from requant.kernels.units import BlockScales, MlxCodes
from requant.quantization.config import Quantization, QuantMode
from requant.text import format_range

Array = np.ndarray
Parts = Mapping[str, Array]
"""Role -> the rectangle that ``required_rects`` asked for, two axes, C-contiguous."""
Triple = Mapping[str, Array]
"""Rows of the output: weight, scales and, in affine mode, biases."""


class Exactness(StrEnum):
    """The relation of the output's values to the source's."""

    EXACT = "exact"  # stored values or codes moved bit for bit
    ROUNDED = "rounded"  # each value, scale or bias rounded once to the stored dtype
    REENCODED = "re-encoded"  # new codes were computed


@dataclass(frozen=True, slots=True)
class Fidelity:
    """The exactness of ``repack``: the class, and for "rounded" the bound in words."""

    exactness: Exactness
    bound: str = ""


EXACT = Fidelity(Exactness.EXACT)


@dataclass(frozen=True, slots=True)
class Rect:
    """A rectangle of a tensor seen as a matrix of its last axis (a vector is one row)."""

    rows: tuple[int, int]
    columns: tuple[int, int]


def flat_cut(start: int, stop: int, width: int) -> Rect:
    """Elements ``start`` to ``stop`` of a tensor whose last axis is ``width``.

    They are whole rows of that axis, or lie in one of them.
    """
    row = start // width
    if start % width == 0 and stop % width == 0:
        return Rect((row, stop // width), (0, width))
    return Rect((row, row + 1), (start - row * width, stop - row * width))


class Scratch(Protocol):
    """Memory that a worker keeps for its whole run."""

    def take(self, role: str, dtype: str, rows: int, row_bytes: int) -> Array:
        """An uninitialized ``(rows, row_bytes / itemsize)`` array; one a role at a time."""


class Packing(ABC):
    """Rows of one layer; the experts of a stack count as further rows."""

    rows: int  # output rows, experts included
    columns: int  # logical values in a row
    # a range of rows starts at a multiple of this within its matrix, and ends at one or at the
    # matrix's end
    row_unit: ClassVar[int] = 1
    # whether a range of rows is spread over the whole tensor, so that few large ranges are read
    # faster than many small ones
    strided: ClassVar[bool] = False
    # whether the part ``weight`` is E4M3 bytes, row by row, which a native call decodes and encodes
    # with ``block_scales`` alone
    has_byte_rows: ClassVar[bool] = False
    # bytes of scratch memory that ``decode`` takes for a value
    scratch_value_bytes: ClassVar[int] = 4
    holds_codes: ClassVar[bool] = True  # else values are only in another order or dtype

    @property
    def matrix_rows(self) -> int:
        """Output rows of one matrix; a range of rows never crosses two."""
        return self.rows

    @property
    def stored_kind(self) -> tuple[object, ...]:
        """The way of storing, whatever the size: equal for layers that are stored alike."""
        return (type(self),)

    @property
    def scratch_row_bytes(self) -> int:
        """Bytes of scratch memory that ``repack`` takes for a row, where they are many."""
        return 0

    @abstractmethod
    def required_rects(self, start: int, stop: int) -> dict[str, Rect]:
        """The rectangle of each part that the rows ``start`` to ``stop`` need."""

    def repack(self, parts: Parts, start: int, stop: int, out: Triple, scratch: Scratch) -> None:
        """Fill ``out`` (weight, scales and, in affine mode, biases) with rows of the layer."""
        raise NotImplementedError(f"{type(self).__name__} has no encoding")

    @abstractmethod
    def decode(self, parts: Parts, start: int, stop: int, out: Array, scratch: Scratch) -> None:
        """Fill ``out``, ``(rows, columns)``, with values rounded once to its dtype."""

    def stored_codes(self, start: int, stop: int) -> StoredCodes | BlockType | None:
        """How a native call moves the codes of these rows, as ``repack`` does; None: none does."""
        return None

    @property
    def row_form(self) -> MlxCodes | BlockType | None:
        """How rows of all parts are stored that a native call decodes; None: none does."""
        return None

    def block_scales(self, parts: Parts, start: int) -> BlockScales:
        """The scales of rows from ``start`` on, where ``has_byte_rows``."""
        raise NotImplementedError(f"{type(self).__name__} has no rows of bytes")

    def fidelity(self, dtype: str) -> Fidelity:
        """Return how exact ``repack`` is when scales and biases are stored as ``dtype``."""
        return EXACT

    def decoded_fidelity(self, dtype: str) -> Fidelity:
        """Return how exact ``decode`` is in ``dtype``."""
        return rounded("values", dtype)

    def to_dict(self) -> dict[str, Any]:
        """The packing as JSON data; equal packings give equal data."""
        return {"kind": type(self).__name__, **as_data(self)}


@dataclass(frozen=True)
class MatrixPacking(Packing):
    """A packing of matrices of equal height."""

    rows: int
    columns: int
    matrix: int  # output rows of one matrix

    @property
    def matrix_rows(self) -> int:
        return self.matrix


class WrappedPacking(Packing):
    """A packing that takes its rows from another one, ``layer``, and changes them.

    What a subclass does not override is as in that packing.
    """

    layer: Packing

    @property
    def matrix_rows(self) -> int:
        return self.layer.matrix_rows

    @property
    def row_unit(self) -> int:  # type: ignore[override]  # a constant of other packings
        return self.layer.row_unit

    @property
    def strided(self) -> bool:  # type: ignore[override]
        return self.layer.strided

    @property
    def scratch_value_bytes(self) -> int:  # type: ignore[override]
        return self.layer.scratch_value_bytes

    def required_rects(self, start: int, stop: int) -> dict[str, Rect]:
        return self.layer.required_rects(start, stop)

    def decode(self, parts: Parts, start: int, stop: int, out: Array, scratch: Scratch) -> None:
        self.layer.decode(parts, start, stop, out, scratch)

    def fidelity(self, dtype: str) -> Fidelity:
        return self.layer.fidelity(dtype)

    def decoded_fidelity(self, dtype: str) -> Fidelity:
        return self.layer.decoded_fidelity(dtype)

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "layer": self.layer.to_dict()}


PRECISION = {"F16": 11, "BF16": 8, "F32": 24}
"""Significant bits of a dtype, the implied one included."""
_RANGE = {"F16": 5, "BF16": 8, "F32": 8}  # bits of the exponent
DTYPE_NAME = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}


def is_narrower(dtype: str, stored: str) -> bool:
    """Whether some number of dtype ``stored`` rounds when it is kept as ``dtype``."""
    less = PRECISION[dtype] < PRECISION.get(stored, 53)
    return less or _RANGE[dtype] < _RANGE.get(stored, 11)


def rounded(what: str, dtype: str, more: str = "") -> Fidelity:
    """The fidelity of a packing where ``what`` is rounded to ``dtype``; ``more`` is added."""
    if dtype not in PRECISION:
        return Fidelity(Exactness.ROUNDED)
    relative = f"relative error at most {2.0 ** -PRECISION[dtype]:.2g}"
    bound = f"{what} rounded to {DTYPE_NAME[dtype]}, {relative}{more}"
    return Fidelity(Exactness.ROUNDED, bound)


def mlx_group(group: int, n_in: int) -> int | None:
    """MLX's largest group that lies within groups of ``group`` and divides a row, or None.

    A source group of 256, of a whole row, or one that leaves a ragged end becomes several
    MLX groups with the same scale.
    """
    common = gcd(group, n_in)
    return next((size for size in (128, 64, 32) if common % size == 0), None)


def mlx_bits(bits: int) -> int:
    """The width that holds ``bits``-bit codes unchanged: MLX's kernels know no 1 and no 7."""
    return {1: 2, 7: 8}.get(bits, bits)


@dataclass(frozen=True)
class IntegerPacking(Packing):
    """``w = (code - zero) * scale`` with a scale and a zero for each group of inputs."""

    rows: int
    columns: int
    bits: int  # bits of a stored code
    group: int  # inputs that share a scale in the source; the last group may be shorter
    # whether every zero is the power of two in the middle, so that ``zero * scale`` is exact in any
    # dtype
    symmetric: bool
    scale_dtype: str  # header name of the stored scales

    # whether ``scales`` rounds: scales that are computed from what is stored
    computes_scales: ClassVar[bool] = False
    # roles of codes and of their order, from which no scale and no zero is made
    code_roles: ClassVar[tuple[str, ...]] = (
        *("qweight", "weight_packed", "weight", "g_idx", "weight_g_idx", "W_q", "B"),
    )

    @property
    def stored_kind(self) -> tuple[object, ...]:
        return type(self), self.bits, self.group

    def group_rects(self, start: int, stop: int) -> dict[str, Rect]:
        """Those of ``required_rects`` that ``scales`` and ``biases`` need."""
        rects = self.required_rects(start, stop)
        return {role: rect for role, rect in rects.items() if role not in self.code_roles}

    @property
    def groups(self) -> int:
        """Groups of one row in the source."""
        return -(-self.columns // self.group)

    @property
    def encoding(self) -> Quantization | None:
        """MLX's encoding of the same codes; None if no group of MLX's fits."""
        group = mlx_group(self.group if self.groups > 1 else self.columns, self.columns)
        if group is None:
            return None
        return Quantization(group, mlx_bits(self.bits), QuantMode.AFFINE)

    def words(self, parts: Parts, start: int, stop: int, out: Array, scratch: Scratch) -> None:
        """Fill ``out``, uint32 ``(rows, columns * mlx_bits / 32)``, with the codes.

        Where stored words can be moved as they are, or by one kernel, a format does that instead.
        """
        out[:] = native.pack_words(self.codes(parts, start, stop, scratch), mlx_bits(self.bits))

    @abstractmethod
    def codes(self, parts: Parts, start: int, stop: int, scratch: Scratch) -> Array:
        """The codes, uint8 ``(rows, columns)``."""

    @abstractmethod
    def scales(self, parts: Parts, start: int, stop: int) -> Array:
        """The stored scales, ``(rows, groups)``."""

    def zeros(self, parts: Parts, start: int, stop: int) -> Array | float:
        """The zeros, float32 ``(rows, groups)``, or one for all."""
        return float(1 << (self.bits - 1))

    def _checked_zeros(self, parts: Parts, start: int, stop: int) -> Array | float:
        zeros = self.zeros(parts, start, stop)
        if self.symmetric and isinstance(zeros, Array):
            _check_symmetric(zeros, self.bits)
        return zeros

    def biases(self, parts: Parts, start: int, stop: int, scales: Array) -> Array:
        """``-zero * scale`` of the scales as they are stored in the output; float32."""
        zeros = self._checked_zeros(parts, start, stop)
        product = np.float32(-1) * zeros * scales.astype(np.float32)
        return np.asarray(product, np.float32)

    def repack(self, parts: Parts, start: int, stop: int, out: Triple, scratch: Scratch) -> None:
        """Codes bit for bit; scales and biases rounded at most once, and repeated."""
        self.words(parts, start, stop, out["weight"], scratch)
        dtype = out["scales"].dtype
        with np.errstate(over="ignore"):  # the caller counts infinities
            scales = self.scales(parts, start, stop).astype(dtype)
            biases = self.biases(parts, start, stop, scales).astype(dtype)
        spread = self._group_of(out["scales"].shape[1])
        np.take(scales, spread, axis=1, out=out["scales"])
        np.take(biases, spread, axis=1, out=out["biases"])

    def decode(self, parts: Parts, start: int, stop: int, out: Array, scratch: Scratch) -> None:
        """``(code - zero) * scale`` in float32, rounded once."""
        codes = np.ascontiguousarray(self.codes(parts, start, stop, scratch))
        scales = np.ascontiguousarray(self.scales(parts, start, stop), np.float32)
        zeros = np.empty_like(scales)
        zeros[:] = self._checked_zeros(parts, start, stop)
        decode.integer_values_into(codes, scales, zeros, self.group, out)

    def fidelity(self, dtype: str) -> Fidelity:
        """Exact where neither a scale nor a bias can round."""
        narrower = is_narrower(dtype, self.scale_dtype)
        kept, precision = PRECISION.get(self.scale_dtype, 53), PRECISION[dtype]
        if not narrower and (self.symmetric or kept + self.bits <= precision):
            return EXACT
        # Half a unit in the last place of the largest bias, in steps of the scale.
        steps = f"at most {(2**self.bits - 1) * 2.0**-precision:.2g} steps"
        if narrower:
            return rounded("scales", dtype, f"; biases {steps}")
        return Fidelity(Exactness.ROUNDED, f"biases rounded to {DTYPE_NAME[dtype]}, {steps}")

    def _group_of(self, groups: int) -> Array:
        """The source group in which each of ``groups`` MLX groups lies."""
        size = self.columns // groups
        return np.arange(groups) * size // self.group


def affine_into(codes: Array, scales: Array, biases: Array, group: int, out: Array) -> None:
    """Fill ``out`` with ``code * scale + bias`` in float32, rounded once more.

    ``codes`` is ``(rows, columns)``; scales and biases are ``(rows, groups)``.
    """
    of = np.arange(codes.shape[1]) // group
    scales, biases = (part.astype(np.float32)[:, of] for part in (scales, biases))
    with np.errstate(over="ignore"):  # the caller counts infinities
        out[:] = codes.astype(np.float32) * scales + biases


def _check_symmetric(zeros: Array, bits: int) -> None:
    """Hold zeros against the claim that each is the middle of the codes.

    Raises:
        InvariantError: One is not.
    """
    middle = 1 << (bits - 1)
    if not (zeros == middle).all():
        raise InvariantError(
            f"the config calls the layer symmetric, so that every zero is {middle}, but its "
            f"zeros are {format_range(int(zeros.min()), int(zeros.max()))}; correct that setting "
            "(sym, symmetric or zero_point, by tool), or the format that says how zeros are stored"
        )


def stream_codes(words: Array, bits: int, count: int) -> Array:
    """Unpack rows of one little-endian bit stream into ``count`` codes of 1 to 8 bits, uint8.

    ``words`` are integers of any width, ``(rows, n)``; the stream may end within a word.
    """
    rows = words.shape[0]
    stream = np.ascontiguousarray(words).view(np.uint8).reshape(rows, -1)
    if stream.shape[1] % 4:
        stream = np.pad(stream, ((0, 0), (0, -stream.shape[1] % 4)))
    codes = np.empty((rows, count), np.uint8)
    repack.stream_codes_into(stream.view(np.uint32), bits, codes)
    return codes
