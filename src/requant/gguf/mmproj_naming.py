"""Tensors of a vision part (mmproj) under Hugging Face's names, with what its converter did undone.

All of it is a matter of places: rows that the file holds apart are joined, frames of a convolution
are interleaved, halves of a head are put back, so codes stay as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

from requant.checkpoints.byte_ranges import FileRange
from requant.checkpoints.checkpoint import JoinedTensor, StoredTensor
from requant.checkpoints.gguf_tensors import GgufTensor
from requant.errors import Problem
from requant.gguf.header import Header, TableEntry
from requant.gguf.mmproj_families import VisionFamily
from requant.gguf.naming import place_tensor, stored_info

_SUFFIX = re.compile(r"(.+)\.(weight|bias)")
_BLOCK = re.compile(r"v\.blk\.(\d{1,4})\.(.+)")
_DEEPSTACK = re.compile(r"v\.deepstack\.(\d{1,4})\.([a-z0-9]+)\.(weight|bias)")
_SECOND_FRAME = "v.patch_embd.weight.1"
_MAX_PIECES = 1 << 16


@dataclass
class VisionNaming:
    """The tensors of one vision part while they get their names.

    Attributes:
        header: Of the file.
        family: Its model.
        heads: Of the blocks.
        width: Inputs of a block.
        problems: Of names and shapes.
        dropped: Tensors that are copies of others, each with what it is.
    """

    header: Header
    family: VisionFamily
    heads: int
    width: int
    problems: list[Problem] = field(default_factory=list)
    dropped: list[tuple[str, str]] = field(default_factory=list)

    def name_all(self) -> tuple[dict[str, StoredTensor | JoinedTensor], dict[str, GgufTensor]]:
        """Every tensor by its name, and how it is stored."""
        sources: dict[str, list[TableEntry]] = {}
        for entry in self.header.tensors:
            if entry.name in self.family.copies:
                self.dropped.append((entry.name, self.family.copies[entry.name]))
                continue
            named = self.name_of(entry.name)
            if named is None:
                kind = self.family.model_type
                message = f"has no name in Hugging Face's {kind}, and may change what it computes"
                self._report(entry, message)
                continue
            if entry.shape:
                sources.setdefault(named, []).append(entry)
            else:
                self._report(entry, f"{entry.kind.name} [], expected at least one axis")
        sources |= {name: [entry] for name, entry in self.unused.items()}
        tensors: dict[str, StoredTensor | JoinedTensor] = {}
        stored: dict[str, GgufTensor] = {}
        for name, entries in sources.items():
            entries.sort(key=lambda entry: self._order(entry.name))
            first = entries[0]
            if len(entries) > 1 and not self._can_be_joined(entries):
                continue
            frames = entries[-1].name == _SECOND_FRAME
            shape = self._shape(name, entries, is_frames=frames)
            ranges = tuple(self._frames(entries) if frames else map(self._range, entries))
            heads = self._heads(first)
            stored[name] = GgufTensor(
                first.kind, shape, first.name, heads, first.name in self.family.shifted
            )
            tensors[name] = place_tensor(name, stored_info(first.kind, shape), ranges)
        return tensors, stored

    @property
    def unused(self) -> dict[str, TableEntry]:
        """Weights that the file leaves out and nothing is computed with, each with a stand-in."""
        entries = {entry.name: entry for entry in self.header.tensors}
        named = {self.name_of(name) for name in entries}
        found = self.family.stand_ins.items()
        return {new: entries[old] for new, old in found if old in entries and new not in named}

    def name_of(self, name: str) -> str | None:
        """Hugging Face's name of a tensor; None if the model has none of that name."""
        if found := _DEEPSTACK.fullmatch(name):
            path, parts = self.family.deepstack
            part = parts.get(found[2])
            if part is None:
                return None
            return f"{path}.{self.deepstack_layers.index(int(found[1]))}.{part}.{found[3]}"
        found = _BLOCK.fullmatch(name)
        parts = self.family.blocks if found else self.family.tops
        start = f"{self.family.block}.{int(found[1])}." if found else ""
        below = _named(found[2] if found else name, parts, is_swapped=self.is_swapped)
        return None if below is None else start + below

    @property
    def deepstack_layers(self) -> list[int]:
        """Blocks with a merger behind them, by the tensors."""
        found = (_DEEPSTACK.fullmatch(entry.name) for entry in self.header.tensors)
        return sorted({int(match[1]) for match in found if match})

    @property
    def is_swapped(self) -> bool:
        """Whether ``ffn_up`` is what comes down again, as in files of older converters."""
        shape = next((e.shape for e in self.header.tensors if _is_down(e.name)), ())
        return len(shape) > 1 and shape[-1] == self.width != shape[-2]

    def _order(self, name: str) -> tuple[int, str]:
        """The place of a tensor among those that it is joined with."""
        found = _BLOCK.fullmatch(name)
        part = found[2].rpartition(".")[0] if found else ""
        places = list(self.family.blocks)
        return (places.index(part) if part in places else 0, name)

    def _can_be_joined(self, entries: Sequence[TableEntry]) -> bool:
        """Whether entries of one name are parts of it, of one type and one width."""
        first = entries[0]
        is_pair = [entry.name for entry in entries][1:] == [_SECOND_FRAME]
        if not is_pair and len(entries) != 3:
            names = ", ".join(entry.name for entry in entries)
            self._report(first, f"has a name in common with others: {names}")
            return False
        for entry in entries[1:]:
            if entry.kind != first.kind or entry.shape != first.shape:
                message = f"{entry.kind.name} {list(entry.shape)}, expected {first.kind.name} "
                self._report(entry, message + f"{list(first.shape)}, as {first.name} is")
                return False
        if is_pair and (len(first.shape) != 4 or not first.kind.dtype):
            message = f"{first.kind.name} {list(first.shape)}, expected four axes of numbers"
            self._report(first, message)
            return False
        return True

    def _shape(
        self, name: str, entries: Sequence[TableEntry], *, is_frames: bool
    ) -> tuple[int, ...]:
        shape = entries[0].shape
        if is_frames:
            return (*shape[:2], len(entries), *shape[2:])
        rank = self.family.ranks.get(name, len(shape))
        while len(shape) > rank and shape[0] == 1:
            shape = shape[1:]
        shape = (1,) * (rank - len(shape)) + shape
        return (shape[0] * len(entries), *shape[1:])

    def _frames(self, entries: Sequence[TableEntry]) -> Iterator[FileRange]:
        """Bytes of a convolution over frames: of each filter and channel all frames."""
        first = entries[0]
        count = prod(first.shape[:2])
        if count > _MAX_PIECES:
            self._report(first, f"has {count:,} filters times channels, at most {_MAX_PIECES:,}")
            count = 0
        nbytes = first.nbytes // max(count, 1)
        for piece in range(count):
            for entry in entries:
                yield FileRange(self.header.file, entry.offset + piece * nbytes, nbytes)

    def _range(self, entry: TableEntry) -> FileRange:
        return FileRange(self.header.file, entry.offset, entry.nbytes)

    def _heads(self, entry: TableEntry) -> int:
        """Heads whose rows are put back; 0 where none are."""
        found = _BLOCK.fullmatch(entry.name)
        if found is None or found[2].rpartition(".")[0] not in self.family.permuted:
            return 0
        rows = entry.shape[-2] if len(entry.shape) > 1 else entry.shape[-1]
        if rows % (2 * self.heads):
            self._report(entry, f"has {rows:,} rows, no multiple of twice its {self.heads} heads")
            return 0
        return self.heads

    def _report(self, entry: TableEntry, message: str) -> None:
        self.problems.append(Problem(f"{self.header.file}: {entry.name}", message))


def _is_down(name: str) -> bool:
    return name.startswith("v.blk.") and name.endswith(".ffn_down.weight")


def _named(name: str, parts: Mapping[str, str], *, is_swapped: bool) -> str | None:
    """A name by the table of a family: as a whole, or without its suffix."""
    if name in parts:
        return parts[name]
    found = _SUFFIX.fullmatch(name)
    path, suffix = (found[1], f".{found[2]}") if found else (name, "")
    if is_swapped:
        path = {"ffn_up": "ffn_down", "ffn_down": "ffn_up"}.get(path, path)
    below = parts.get(path)
    return None if below is None else below + suffix
