"""The tensors of a matrix of codes in another format, made from MLX's words, scales and biases.

A packing here is only written: its rows are those of one tensor of the output. The formats' readers
are in ``formats`` and ``packings``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from requant.errors import InvariantError
from requant.kernels import quantize as native
from requant.kernels import repack
from requant.packings.base import Array, Packing, Parts, Rect, Scratch, Triple
from requant.packings.coded_matrix import CodedMatrix, ExportError, Window

_WHOLE_WORDS = 32  # codes of any width that fill whole words
_NIBBLES = np.array([0, 4, 1, 5, 2, 6, 3, 7])  # AutoAWQ: output r of eight is in this nibble


class Written(Packing):
    """A packing that is only written: there is nothing to decode."""

    def decode(self, parts: Parts, start: int, stop: int, out: Array, scratch: Scratch) -> None:
        raise InvariantError(f"{type(self).__name__} is not decoded")

    def error(self, parts: Parts, start: int, stop: int, scratch: Scratch) -> ExportError | None:
        """The error of new codes; None of codes that are kept, and of other tensors."""
        return None


@dataclass(frozen=True)
class Shape(Written):
    """int64 ``[2]``: outputs and inputs. Its one row needs no data."""

    shape: tuple[int, int]
    rows: int = 1
    columns: int = 2

    def required_rects(self, start: int, stop: int) -> dict[str, Rect]:
        return {}

    def repack(self, parts: Parts, start: int, stop: int, out: Triple, scratch: Scratch) -> None:
        """Fill ``out["weight"]`` with the shape."""
        out["weight"][:] = self.shape


@dataclass(frozen=True)
class GroupIndex(Written):
    """``g_idx`` int32 ``[in]``: the group of each input, one after another."""

    columns: int  # inputs
    group: int
    rows: int = 1

    def required_rects(self, start: int, stop: int) -> dict[str, Rect]:
        return {}

    def repack(self, parts: Parts, start: int, stop: int, out: Triple, scratch: Scratch) -> None:
        """Fill ``out["weight"]`` with the groups."""
        out["weight"].reshape(-1)[:] = np.arange(self.columns) // self.group


@dataclass(frozen=True)
class TensorScale(Written):
    """float32 ``[1]``: what the scales of an NVFP4 matrix are divided by.

    MLX multiplies them with ``global_scale / 2688``, if there is one (``GlobalScales``).
    """

    has_scale: bool  # whether there is a ``global_scale``
    rows: int = 1
    columns: int = 1

    def required_rects(self, start: int, stop: int) -> dict[str, Rect]:
        return {"global_scale": Rect((0, 1), (0, 1))} if self.has_scale else {}

    def repack(self, parts: Parts, start: int, stop: int, out: Triple, scratch: Scratch) -> None:
        """Fill ``out["weight"]`` with the number."""
        largest = np.float32(2688)
        out["weight"][:] = largest / parts["global_scale"] if self.has_scale else 1


@dataclass(frozen=True)
class OfMatrix(Written):
    """A tensor whose rows are made from windows of a matrix."""

    scratch_value_bytes: ClassVar[int] = 16  # of a number in a row: integers, and float32

    matrix: CodedMatrix

    def _window(self, start: int, stop: int) -> Window:
        raise NotImplementedError

    _roles: ClassVar[tuple[str, ...]] = ("scales", "biases")

    def required_rects(self, start: int, stop: int) -> dict[str, Rect]:
        return self.matrix.rects(self._window(start, stop), *self._roles)

    def to_dict(self) -> dict[str, Any]:
        data, packing = super().to_dict(), self.matrix.packing
        if packing is not None:
            data["matrix"] = {**data["matrix"], "packing": packing.to_dict()}
        return data

    def error(self, parts: Parts, start: int, stop: int, scratch: Scratch) -> ExportError | None:
        if "weight" not in self._roles:
            return None
        return self.matrix.error(parts, self._window(start, stop).outputs, scratch)

    @property
    def scratch_row_bytes(self) -> int:
        """The tensors of MLX that are made for a row, where they are not stored."""
        made = self.matrix
        if made.packing is None:
            return 0
        row = made.in_features * (made.encoding.bits + 8) // 8 + 8 * made.groups
        return made.packing.scratch_row_bytes + row * made.out_features // max(self.rows, 1)


class ByOutputs(OfMatrix):
    """A tensor whose rows are outputs."""

    @property
    def rows(self) -> int:  # type: ignore[override]
        return self.matrix.out_features

    @property
    def row_unit(self) -> int:  # type: ignore[override]
        return self.matrix.row_unit

    def _window(self, start: int, stop: int) -> Window:
        return Window((start, stop), (0, self.matrix.in_features))


class RowWords(ByOutputs):
    """Words ``[out, in * bits / 32]`` as MLX has them, under any integer dtype."""

    _roles: ClassVar[tuple[str, ...]] = ("weight", "scales", "biases")

    @property
    def columns(self) -> int:  # type: ignore[override]
        return self.matrix.in_features

    def repack(self, parts: Parts, start: int, stop: int, out: Triple, scratch: Scratch) -> None:
        """Fill ``out["weight"]`` with the bytes of the words."""
        words = self.matrix.words(parts, self._window(start, stop), scratch)
        target = out["weight"]
        target[:] = np.ascontiguousarray(words).view(target.dtype)


class RowScales(ByOutputs):
    """Scales ``[out, groups]``, rounded to the dtype of the tensor; bytes as they are."""

    @property
    def columns(self) -> int:  # type: ignore[override]
        return self.matrix.groups

    def repack(self, parts: Parts, start: int, stop: int, out: Triple, scratch: Scratch) -> None:
        """Fill ``out["weight"]`` with the scales."""
        made = self.matrix.triple(parts, self._window(start, stop), scratch)
        _fill(out["weight"], made["scales"])


def _fill(target: Array, scales: Array) -> None:
    if scales.dtype == np.uint8:
        target[:] = np.ascontiguousarray(scales).view(target.dtype)
        return
    with np.errstate(over="ignore", invalid="ignore"):
        target[:] = scales.astype(np.float32).astype(target.dtype)


@dataclass(frozen=True)
class ColumnZeros(OfMatrix):
    """compressed-tensors' zero points int32 ``[out * bits / 32, groups]``, along the outputs.

    Word ``(r, g)`` holds the zero points of group ``g`` of ``32 / bits`` outputs, the first in the
    lowest bits. At 4 bits and 10 outputs, the second row of words holds those of outputs 8 and 9,
    then zeros.
    """

    scratch_value_bytes: ClassVar[int] = 128  # scales and biases of 8 outputs, in float32

    @property
    def rows(self) -> int:  # type: ignore[override]
        return -(-self.matrix.out_features * self.matrix.encoding.bits // 32)

    @property
    def columns(self) -> int:  # type: ignore[override]
        return self.matrix.groups

    @property
    def _per_word(self) -> int:
        return 32 // self.matrix.encoding.bits

    @property
    def row_unit(self) -> int:  # type: ignore[override]
        return -(-self.matrix.row_unit // self._per_word)

    def _window(self, start: int, stop: int) -> Window:
        last = min(stop * self._per_word, self.matrix.out_features)
        return Window((start * self._per_word, last), (0, self.matrix.in_features))

    def repack(self, parts: Parts, start: int, stop: int, out: Triple, scratch: Scratch) -> None:
        """Fill ``out["weight"]`` with rows of words."""
        made = self.matrix.triple(parts, self._window(start, stop), scratch)
        zeros = self.matrix.zeros(made)
        padded = np.zeros(((stop - start) * self._per_word, self.columns), np.uint32)
        padded[: zeros.shape[0]] = zeros
        words = np.zeros((stop - start, self.columns), np.uint32)
        for place in range(self._per_word):
            words |= padded[place :: self._per_word] << np.uint32(place * self.matrix.encoding.bits)
        out["weight"][:] = words.view(np.int32)


class _ByInputs(OfMatrix):
    """A tensor whose rows are inputs, or groups of them, and whose columns are outputs.

    A row takes a column of MLX's tensors. Those of another packing are made as a whole.
    """

    strided: ClassVar[bool] = True
    inputs_of_row: ClassVar[int] = 1

    def _inputs(self, row: int) -> int:
        """The input with which a row begins."""
        return row * self.inputs_of_row

    @property
    def columns(self) -> int:  # type: ignore[override]
        return self.matrix.out_features

    @property
    def row_unit(self) -> int:  # type: ignore[override]
        return self._own_unit if self.matrix.packing is None else max(self.rows, 1)

    @property
    def _own_unit(self) -> int:
        """Rows that begin and end with whole words of MLX's."""
        return 1

    def _window(self, start: int, stop: int) -> Window:
        inputs = self._inputs(start), self._inputs(stop)
        return Window((0, self.matrix.out_features), inputs)


class GptqWords(_ByInputs):
    """``qweight`` int32 ``[in * bits / 32, out]``: MLX's words, transposed."""

    scratch_value_bytes: ClassVar[int] = 4  # the words of a row once more

    _roles: ClassVar[tuple[str, ...]] = ("weight",)

    @property
    def rows(self) -> int:  # type: ignore[override]
        return self.matrix.in_features * self.matrix.encoding.bits // 32

    @property
    def _own_unit(self) -> int:
        return self.matrix.encoding.bits

    def _inputs(self, row: int) -> int:
        return row * 32 // self.matrix.encoding.bits

    def repack(self, parts: Parts, start: int, stop: int, out: Triple, scratch: Scratch) -> None:
        """Fill ``out["weight"]`` with rows of words."""
        words = self.matrix.words(parts, self._window(start, stop), scratch)
        repack.transpose_into(np.ascontiguousarray(words), out["weight"].view(np.uint32))


class AwqWords(_ByInputs):
    """``qweight`` int32 ``[in, out / 8]``: codes of 4 bits, output ``r`` of eight in its nibble.

    Eight outputs that hold 0 to 7 for every input become words 0x75316420.

    The kernel that reads ``qweight`` turns eight codes of eight rows, the nibble of a row by its
    place in eight. Here the rows are MLX's, so that they are put in that order before, and the
    inputs that come out in it are put back.
    """

    scratch_value_bytes: ClassVar[int] = 1  # the words of a row twice

    _roles: ClassVar[tuple[str, ...]] = ("weight",)

    @property
    def rows(self) -> int:  # type: ignore[override]
        return self.matrix.in_features

    @property
    def _own_unit(self) -> int:
        return _WHOLE_WORDS

    def repack(self, parts: Parts, start: int, stop: int, out: Triple, scratch: Scratch) -> None:
        """Fill ``out["weight"]`` with rows of words."""
        words = self.matrix.words(parts, self._window(start, stop), scratch)
        rows, width = words.shape
        ordered = scratch.take("ordered", "U32", rows, 4 * width)
        ordered.reshape(rows // 8, 8, width)[:, _NIBBLES] = words.reshape(rows // 8, 8, width)
        turned = scratch.take("turned", "U32", 8 * width, rows // 2)
        repack.awq_gemm_into(ordered, turned)
        found = out["weight"].view(np.uint32).reshape(width, 8, rows // 8)
        found[:, _NIBBLES] = turned.reshape(width, 8, rows // 8)


class _ByGroups(_ByInputs):
    """A tensor whose rows are groups of inputs."""

    @property
    def rows(self) -> int:  # type: ignore[override]
        return self.matrix.groups

    def _inputs(self, row: int) -> int:
        return row * self.matrix.encoding.group_size


class GroupScales(_ByGroups):
    """``scales`` ``[groups, out]``, rounded to the dtype of the tensor."""

    def repack(self, parts: Parts, start: int, stop: int, out: Triple, scratch: Scratch) -> None:
        """Fill ``out["weight"]`` with the scales."""
        made = self.matrix.triple(parts, self._window(start, stop), scratch)
        _fill(out["weight"], made["scales"].T)


@dataclass(frozen=True)
class GptqZeros(_ByGroups):
    """``qzeros`` int32 ``[groups, out * bits / 32]``: a stream of zero points along the outputs."""

    minus_one: bool = False  # whether a field is the zero point less one (checkpoint_format gptq)

    def repack(self, parts: Parts, start: int, stop: int, out: Triple, scratch: Scratch) -> None:
        """Fill ``out["weight"]`` with rows of words.

        Raises:
            InvariantError: A zero point is 0 where fields are less one, which the plan excludes.
        """
        made = self.matrix.triple(parts, self._window(start, stop), scratch)
        zeros = self.matrix.zeros(made)
        if self.minus_one:
            if not zeros.all():
                raise InvariantError("a zero point is 0: the source was changed meanwhile")
            zeros -= np.uint8(1)
        fields = np.zeros((stop - start, -(-zeros.shape[0] // 32) * 32), np.uint8)
        fields[:, : zeros.shape[0]] = zeros.T
        words = native.pack_words(fields, self.matrix.encoding.bits).view(np.int32)
        out["weight"][:] = words[:, : out["weight"].shape[1]]


class AwqZeros(_ByGroups):
    """``qzeros`` int32 ``[groups, out / 8]``: nibbles in the order of ``qweight``."""

    def repack(self, parts: Parts, start: int, stop: int, out: Triple, scratch: Scratch) -> None:
        """Fill ``out["weight"]`` with rows of words."""
        made = self.matrix.triple(parts, self._window(start, stop), scratch)
        fields = self.matrix.zeros(made).T.reshape(stop - start, -1, 8).astype(np.uint32)
        words = (fields << (4 * _NIBBLES).astype(np.uint32)).sum(axis=2, dtype=np.uint32)
        out["weight"][:] = words.view(np.int32)
