"""A matrix of codes that an export writes: where its words, scales and zero points come from.

They come from MLX's own tensors, of which any rectangle can be read, or out of the packing of
another format, whose rows are then repacked first, or are new codes of decoded values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from requant.core.dtypes import NUMPY_DTYPE
from requant.errors import InvariantError
from requant.kernels import quantize as native
from requant.kernels.cast import count_nonfinite
from requant.packings.base import Array, Packing, Parts, Rect, Scratch, Triple, WrappedPacking
from requant.packings.zero_points import integer_zeros
from requant.quantization.config import Quantization, QuantMode


class ExportError(NamedTuple):
    """The error of codes that an export made, over the rows of one call."""

    squared_error: float
    squared_values: float
    nonfinite: int  # scales that are NaN or infinite, as values are or float16 is


class Window(NamedTuple):
    """Outputs and inputs of a matrix: a rectangle of its codes."""

    outputs: tuple[int, int]
    inputs: tuple[int, int]


@dataclass(frozen=True)
class CodedMatrix:
    """A matrix of codes, and where they come from.

    Attributes:
        out_features: Outputs, the rows of MLX's tensors.
        in_features: Inputs.
        encoding: MLX's quantization of the codes as the output has them.
        packing: Gives rows of MLX's tensors in this encoding; None where the parts ``weight``,
            ``scales`` and ``biases`` are such rows already.
        first_row: Row of ``packing`` that the first output is.
    """

    out_features: int
    in_features: int
    encoding: Quantization
    packing: Packing | None = None

    @property
    def groups(self) -> int:
        """Groups of one output."""
        return self.in_features // self.encoding.group_size

    @property
    def row_unit(self) -> int:
        """Outputs that are read together."""
        return 1 if self.packing is None else self.packing.row_unit

    def rects(self, window: Window, *roles: str) -> dict[str, Rect]:
        """The rectangles of the parts from which ``roles`` of a window are made."""
        if self.packing is not None:
            return self.packing.required_rects(*window.outputs)
        return {role: Rect(window.outputs, self._columns(window, role)) for role in roles}

    def _columns(self, window: Window, role: str) -> tuple[int, int]:
        """The columns of a tensor of MLX's that hold these inputs."""
        start, stop = window.inputs
        if role == "weight":
            return start * self.encoding.bits // 32, stop * self.encoding.bits // 32
        return start // self.encoding.group_size, stop // self.encoding.group_size

    def triple(self, parts: Parts, window: Window, scratch: Scratch) -> Mapping[str, Array]:
        """Words, scales and biases of a window; those that ``rects`` was asked for.

        Of a packing scales and biases are float32, in which ``zero * scale`` does not round.
        """
        if self.packing is None:
            return parts
        rows, size = window.outputs[1] - window.outputs[0], self.encoding
        made = {
            "weight": scratch.take("made weight", "U32", rows, self.in_features * size.bits // 8)
        }
        if size.mode is QuantMode.AFFINE:
            for role in ("scales", "biases"):
                made[role] = scratch.take(f"made {role}", "F32", rows, 4 * self.groups)
        else:
            made["scales"] = scratch.take("made scales", "U8", rows, self.groups)
        self.packing.repack(parts, *window.outputs, made, scratch)
        return {role: x[:, slice(*self._columns(window, role))] for role, x in made.items()}

    def words(self, parts: Parts, window: Window, scratch: Scratch) -> Array:
        """Words of a window, uint32; made of a packing they have the zero points in range.

        Codes in more bits than the source's may have a zero point below 0: both are moved up.
        """
        made = self.triple(parts, window, scratch)
        words = made["weight"].view(np.uint32)
        if self.packing is None or self.encoding.mode is not QuantMode.AFFINE:
            return words
        below = np.maximum(-integer_zeros(made["scales"], made["biases"]), 0).astype(np.uint8)
        if not below.any():
            return words
        codes = native.unpack_words(np.ascontiguousarray(words), self.encoding.bits)
        codes += np.repeat(below, self.encoding.group_size, axis=1)
        return native.pack_words(codes, self.encoding.bits)

    def zeros(self, made: Mapping[str, Array]) -> Array:
        """Zero points of a triple, uint8.

        Raises:
            InvariantError: One is out of range, which the plan excludes.
        """
        zeros = integer_zeros(made["scales"], made["biases"])
        if self.packing is not None:
            zeros = np.maximum(zeros, 0)
        if ((zeros < 0) | (zeros >= 1 << self.encoding.bits)).any():
            raise InvariantError("a zero point is out of range: the source was changed meanwhile")
        return zeros.astype(np.uint8)

    def error(self, parts: Parts, outputs: tuple[int, int], scratch: Scratch) -> ExportError | None:
        """The error of new codes of some outputs; None where codes are kept."""
        if not isinstance(self.packing, Reencoded):
            return None
        made = self.triple(parts, Window(outputs, (0, self.in_features)), scratch)
        values = self.packing.values(parts, *outputs, scratch)
        decoded = np.empty_like(values)
        native.decode_into(native.QuantizedTensors.from_roles(made), self.encoding, decoded)
        with np.errstate(over="ignore", invalid="ignore"):
            decoded -= values
            error, total = (
                float(np.einsum("ij,ij->", x, x, dtype=np.float64)) for x in (decoded, values)
            )
        return ExportError(error, total, count_nonfinite(made["scales"]))


@dataclass(frozen=True)
class Reencoded(WrappedPacking):
    """Values of another packing in new codes, whose zero points are integers in range.

    The range of a group, with 0 in it, is divided into equal steps; a step is a number of the dtype
    in which scales are written.
    """

    layer: Packing
    encoding: Quantization  # of the new codes, affine
    scale_dtype: str  # header name

    @property
    def rows(self) -> int:  # type: ignore[override]
        return self.layer.rows

    @property
    def columns(self) -> int:  # type: ignore[override]
        return self.layer.columns

    @property
    def scratch_row_bytes(self) -> int:
        """Values, quotients, codes and decoded values of a row."""
        return 16 * self.columns

    def values(self, parts: Parts, start: int, stop: int, scratch: Scratch) -> Array:
        """The values of rows, float32."""
        dense = scratch.take("values", "F32", stop - start, 4 * self.columns)
        self.layer.decode(parts, start, stop, dense, scratch)
        return dense

    def repack(self, parts: Parts, start: int, stop: int, out: Triple, scratch: Scratch) -> None:
        """Fill ``out``, scales and biases in float32."""
        size, rows = self.encoding.group_size, stop - start
        values = self.values(parts, start, stop, scratch).reshape(rows, -1, size)
        most = np.float32((1 << self.encoding.bits) - 1)
        low = np.minimum(values.min(axis=2), np.float32(0))
        dtype = NUMPY_DTYPE[self.scale_dtype]
        with np.errstate(over="ignore", invalid="ignore"):  # the caller counts infinities
            scales = (np.maximum(values.max(axis=2), np.float32(0)) - low) / most
            scales = scales.astype(dtype).astype(np.float32)
            scales[scales == 0] = dtype.type(1)  # nothing but zeros, or less than a step
            zeros = np.clip(np.rint(-low / scales), 0, most)
            codes = np.rint(values / scales[:, :, None]) + zeros[:, :, None]
            codes = np.clip(codes, 0, most).astype(np.uint8).reshape(rows, -1)
            out["biases"][:] = -zeros * scales
        out["weight"][:] = native.pack_words(codes, self.encoding.bits)
        out["scales"][:] = scales
