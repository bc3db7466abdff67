"""Tensors of GGUF files under Hugging Face's names; those that files fuse are split.

A fused tensor is cut by rows, so its parts are runs of bytes of the file: nothing is decoded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from types import MappingProxyType

from requant.checkpoints.byte_ranges import FileRange
from requant.checkpoints.checkpoint import JoinedTensor, StoredTensor
from requant.checkpoints.gguf_tensors import GgufModel, GgufTensor
from requant.core.dtypes import TensorInfo
from requant.core.reasons import Note, NoteCode
from requant.errors import Problem
from requant.gguf.architectures import SCALES, Architecture, Move, block_of, setting_of
from requant.gguf.header import TableEntry
from requant.gguf.metadata import Metadata
from requant.kernels.gguf import BlockType
from requant.text import format_value, join_first, pluralize

_MAX_EXPERTS = 1 << 14

Table = Mapping[str, tuple[str, TableEntry]]
"""Name in the file -> its file, and its line of the tensor table."""


@dataclass(frozen=True, slots=True)
class _Part:
    """A run of rows of each matrix of a tensor, or all of it."""

    entry: TableEntry  # as the file would have it on its own
    name_in_file: str  # of the whole
    ranges: tuple[FileRange, ...]  # where its bytes lie


@dataclass
class Naming:
    """The tensors of one model while they get their names."""

    metadata: Metadata  # of the model
    family: Architecture | None  # its architecture; None if it is not known
    problems: list[Problem] = field(default_factory=list)  # of the names and shapes
    notes: list[Note] = field(default_factory=list)  # for the user

    def name_all(self, table: Table) -> tuple[dict[str, StoredTensor | JoinedTensor], GgufModel]:
        """Every tensor by its name, and how it is stored."""
        tensors: dict[str, StoredTensor | JoinedTensor] = {}
        stored: dict[str, GgufTensor] = {}
        dropped: list[tuple[str, str]] = []
        unknown: list[str] = []
        for name, (file, entry) in table.items():
            reason = self._why_dropped(name)
            if reason is not None:
                dropped.append((name, reason))
                continue
            self._check_scale(name, file, table)
            for part in self._parts(entry, file, table):
                named = self.family.name_of(part.entry.name) if self.family else name
                if named is None:
                    unknown.append(name)
                    named = name
                if named in tensors:
                    message = f"would be named {named}, as {stored[named].name_in_file} is"
                    self.problems.append(Problem(f"{file}: {name}", message))
                    continue
                stored[named] = described = self._describe(part, named)
                info = stored_info(part.entry.kind, described.shape)
                tensors[named] = place_tensor(named, info, part.ranges)
        self._note_names(unknown)
        model = GgufModel(
            self.metadata.architecture,
            MappingProxyType(stored),
            _model_dtype((entry for _, entry in table.values()), self.family),
            tuple(dropped),
            (),
        )
        return tensors, model

    def _why_dropped(self, name: str) -> str | None:
        """The reason why a tensor is not a weight of the model, or None."""
        if self.family is None:
            return None
        block = block_of(name)
        if self.family.support.next_tokens and block is not None:
            prefix = f"{self.metadata.architecture}."
            count = self.metadata.find_int(f"{prefix}nextn_predict_layers") or 0
            if count and block >= self.metadata.need_int(f"{prefix}block_count") - count:
                return "it predicts further tokens, which MLX's classes do not"
        return setting_of(name)

    def _join(self, whole: str, names: tuple[str, ...], table: Table) -> Iterator[_Part]:
        """Tensors that are the rows of one, one after another."""
        found = [table[name] for name in names if name in table]
        entries = [entry for _, entry in found]
        first = entries[0]
        scaled = [f"{name.rpartition('.')[0]}{x}" for name in names for x in SCALES]
        if (
            len(found) < len(names)
            or any(e.kind != first.kind or e.shape[1:] != first.shape[1:] for e in entries)
            or any(name in table for name in scaled)
        ):
            stored = ", ".join(f"{e.name} {e.kind.name} {list(e.shape)}" for e in entries)
            message = f"{stored}: expected {' and '.join(names)}, of one type and width, unscaled"
            self.problems.append(Problem(f"{found[0][0]}: {first.name}", message))
            return
        rows = sum(entry.shape[0] for entry in entries)
        nbytes = sum(entry.nbytes for entry in entries)
        entry = TableEntry(whole, first.kind, (rows, *first.shape[1:]), first.offset, nbytes)
        ranges = tuple(FileRange(file, e.offset, e.nbytes) for file, e in found)
        yield _Part(entry, first.name, ranges)

    def _ordered(self, part: _Part, file: str) -> _Part:
        """A tensor with its rows in Hugging Face's order, as runs of bytes."""
        assert self.family is not None
        moves = self.family.moves_of(part.entry.name)
        rows = part.entry.shape[0] if part.entry.shape else 0
        if Move.VALUE_HEADS in moves:
            runs = self._dealt_runs(rows)
        elif Move.HEAD_GROUPS in moves:
            runs = self._grouped_runs(rows)
        else:
            return part
        if sum(size for _, size in runs) != rows:
            message = f"has {pluralize(rows, 'row')}, which no heads of this model give"
            self.problems.append(Problem(f"{file}: {part.entry.name}", message))
            return part
        cuts = [
            _cut(part.entry, file, part.entry.name, axis=0, start=start, size=size)
            for start, size in runs
        ]
        return replace(part, ranges=tuple(run for cut in cuts for run in cut.ranges))

    def _value_heads(self) -> tuple[int, int]:
        """Heads of keys of linear attention, and heads of values for each of them."""
        prefix = f"{self.metadata.architecture}.ssm."
        keys = self.metadata.need_int(f"{prefix}group_count")
        values = self.metadata.need_int(f"{prefix}time_step_rank")
        if values % keys:
            message = f"is {values:,}, not a multiple of ssm.group_count, {keys:,}"
            self.metadata.report(f"{prefix}time_step_rank", message)
        return keys, max(values // keys, 1)

    def _dealt_runs(self, rows: int) -> list[tuple[int, int]]:
        """Start and length of runs of rows; the last of them are those of heads of values.

        In the file the first value head of every key head comes first, then the second ones.
        """
        keys, each = self._value_heads()
        inner = self.metadata.need_int(f"{self.metadata.architecture}.ssm.inner_size")
        unit = 1 if rows == keys * each else inner // (keys * each)
        start = rows - unit * keys * each
        if start < 0:
            return []
        order = ((value * keys + key) for key in range(keys) for value in range(each))
        heads = [(start + unit * head, unit) for head in order]
        return [(0, start), *heads] if start else heads

    def _grouped_runs(self, rows: int) -> list[tuple[int, int]]:
        """Start and length of runs of rows: for each group its queries, key and value."""
        prefix = f"{self.metadata.architecture}.attention.head_count"
        heads = self.metadata.need_int(prefix)
        groups = self.metadata.find_int(f"{prefix}_kv") or heads
        if heads % groups or rows % (heads + 2 * groups):
            return []
        width, each = rows // (heads + 2 * groups), heads // groups
        runs = []
        for group in range(groups):
            runs.append((group * each * width, each * width))
            runs.append(((heads + group) * width, width))
            runs.append(((heads + groups + group) * width, width))
        return runs

    def _shape_of(self, part: _Part, moves: tuple[Move, ...]) -> tuple[int, ...]:
        """The shape in Hugging Face's terms."""
        shape = part.entry.shape
        if Move.ROW in moves and len(shape) == 1:
            return (1, *shape)
        changed = shape
        if Move.CHANNELS in moves and part.entry.name.endswith(".weight"):
            changed = (shape[0], 1, *shape[1:])
        elif Move.FLAT in moves:
            changed = (prod(shape),)
        if changed != shape and not part.entry.kind.dtype:
            message = f"{part.entry.kind.name} {list(shape)}, expected numbers, not blocks"
            self.problems.append(Problem(part.name_in_file, message))
            return shape
        return changed

    def _parts(self, entry: TableEntry, file: str, table: Table) -> Iterator[_Part]:
        """A tensor, what it is fused of, or what it is a part of."""
        joined, members = self.family.joined_of(entry.name) if self.family else ("", ())
        if joined:
            if entry.name == next(name for name in members if name in table):
                yield from self._join(joined, members, table)
            return
        names = self.family.fused_of(entry.name) if self.family else ()
        whole = _Part(entry, entry.name, (FileRange(file, entry.offset, entry.nbytes),))
        rows = entry.shape[0] if entry.shape else 0
        if self.family and (each := self.family.rows_of(entry.name, min(rows, _MAX_EXPERTS))):
            for row, name in enumerate(each):
                cut = _cut(entry, file, name, axis=0, start=row, size=1)
                yield replace(cut, entry=replace(cut.entry, shape=entry.shape[1:]))
            return
        if not names:
            yield self._ordered(whole, file) if self.family else whole
            return
        if entry.name.endswith(SCALES):  # one for all rows
            for name in names:
                yield replace(whole, entry=replace(entry, name=name))
            return
        is_matrix = entry.name.endswith(".weight")
        axis = len(entry.shape) - (2 if is_matrix else 1)
        rows = entry.shape[axis] if axis >= 0 else 0
        sizes = self._sizes(names, rows)
        is_odd = not rows or (not is_matrix and not entry.kind.dtype)
        if is_odd or sum(sizes) != rows or prod(entry.shape[:axis]) > _MAX_EXPERTS:
            wanted = pluralize(sum(sizes) or 2, "row")
            if prod(entry.shape[:axis]) > _MAX_EXPERTS:
                wanted = f"at most {_MAX_EXPERTS:,} experts"
            message = f"{entry.kind.name} {list(entry.shape)}, expected {wanted}"
            self.problems.append(Problem(f"{file}: {entry.name}", message))
            yield whole
            return
        start = 0
        for name, size in zip(names, sizes, strict=True):
            yield _cut(entry, file, name, axis=axis, start=start, size=size)
            start += size

    def _sizes(self, names: tuple[str, ...], rows: int) -> list[int]:
        """Rows of each part: of queries, keys and values, or halves."""
        if len(names) == 2:
            return [rows // 2] * 2
        prefix = f"{self.metadata.architecture}.attention."
        heads = self.metadata.need_int(f"{prefix}head_count")
        kv_heads = self.metadata.find_int(f"{prefix}head_count_kv") or heads
        hidden = self.metadata.need_int(f"{self.metadata.architecture}.embedding_length")
        keys = self.metadata.find_int(f"{prefix}key_length") or hidden // heads
        values = self.metadata.find_int(f"{prefix}value_length") or hidden // heads
        return [heads * keys, kv_heads * keys, kv_heads * values]

    def _describe(self, part: _Part, named: str) -> GgufTensor:
        entry, name = part.entry, part.name_in_file
        shape = entry.shape
        if self.family is None or entry.name.endswith(SCALES):
            return GgufTensor(entry.kind, shape, name)
        heads = self.family.heads_of(entry.name, self.metadata)
        moves = self.family.moves_of(entry.name)
        shape = self._shape_of(part, moves)
        rows = shape[-2] if entry.name.endswith(".weight") and len(shape) > 1 else shape[-1]
        if heads and rows % (2 * heads):
            twice = f"no multiple of twice its {pluralize(heads, 'head')}"
            self.problems.append(Problem(name, f"has {pluralize(rows, 'row')}, {twice}"))
            heads = 0
        return GgufTensor(
            entry.kind,
            shape,
            name,
            heads,
            is_shifted=self.family.is_shifted(entry.name),
            is_exponential=Move.EXPONENTIAL in moves,
            column_heads=self._value_heads() if Move.VALUE_COLUMNS in moves else (0, 0),
        )

    def _check_scale(self, name: str, file: str, table: Table) -> None:
        """A scale belongs to a tensor, which it is multiplied with."""
        path, _, suffix = name.rpartition(".")
        if self.family and f".{suffix}" in SCALES and f"{path}.weight" not in table:
            weight = format_value(f"{path}.weight")
            message = f"is a scale, but {weight} that it scales is not there"
            self.problems.append(Problem(f"{file}: {name}", message))

    def _note_names(self, unknown: list[str]) -> None:
        if self.family is None:
            known = self.metadata.architecture
            text = (
                f"The architecture {known!r} is not known here: tensors keep the names of the "
                "GGUF file, in its order of rows, and config.json says little."
            )
            self.notes.append(Note(NoteCode.UNKNOWN_ARCHITECTURE, text))
        elif unknown:
            family = self.family.model_type
            names = join_first(unknown)
            text = f"{names} have no name in Hugging Face's {family}: they keep their own."
            self.notes.append(Note(NoteCode.UNKNOWN_TENSOR_NAMES, text))


def _cut(entry: TableEntry, file: str, name: str, axis: int, start: int, size: int) -> _Part:
    """``size`` rows from ``start`` on of each matrix of a tensor, as a tensor called ``name``."""
    rows, matrices = entry.shape[axis], prod(entry.shape[:axis])
    row_bytes = entry.nbytes // (matrices * rows)
    first = entry.offset + start * row_bytes
    ranges = tuple(
        FileRange(file, first + matrix * rows * row_bytes, size * row_bytes)
        for matrix in range(matrices)
    )
    shape = (*entry.shape[:axis], size, *entry.shape[axis + 1 :])
    part = TableEntry(name, entry.kind, shape, first, matrices * size * row_bytes)
    return _Part(part, entry.name, ranges)


def place_tensor(
    name: str, info: TensorInfo, ranges: tuple[FileRange, ...]
) -> StoredTensor | JoinedTensor:
    """A tensor whose bytes lie in one place, or in several one after another."""
    if len(ranges) > 1:
        return JoinedTensor(name, info, ranges)
    return StoredTensor(name, info, ranges[0].file, ranges[0].offset)


def stored_info(kind: BlockType, shape: tuple[int, ...]) -> TensorInfo:
    """Dtype and shape of a tensor as it is stored: numbers, or bytes of blocks."""
    if kind.dtype:
        return TensorInfo(kind.dtype, shape)
    return TensorInfo("U8", (*shape[:-1], shape[-1] // kind.elements * kind.nbytes))


def _model_dtype(entries: Iterable[TableEntry], family: Architecture | None) -> str:
    """The dtype of values: float16, as the scales of blocks are, unless it is too narrow."""
    if family is not None and family.wide:
        return "BF16"
    kinds = Counter[str]()
    for entry in entries:
        if len(entry.shape) > 1:
            kinds[entry.kind.name] += entry.nbytes
    if "BF16" in kinds:
        return "BF16"
    return "F32" if set(kinds) == {"F32"} else "F16"
