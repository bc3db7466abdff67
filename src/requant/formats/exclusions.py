"""Layers that a config calls dense, or leaves out, and that are stored quantized all the same.

Every tool has a list of its own for this, and lists are wrong more often than tensors: a layer
whose tensors are complete is read, and a note says what the config says of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import replace
from typing import Any, Final

from requant.checkpoints.checkpoint import Checkpoint
from requant.core.reasons import Note, NoteCode
from requant.core.regex import Pattern, PatternError, Wildcards
from requant.errors import Problem
from requant.formats.base import SourceLayer, SourceLayout
from requant.formats.quantization_block import QuantizationBlock, as_table, find_quantization_block
from requant.text import join_first, pluralize_are

# Lists of names: exact paths, modules that hold a layer or the end of its path; with "*" or "?"
# wildcards, behind "re:" regular expressions.
_LISTS: Final = (
    *("ignore", "ignored_layers", "modules_to_not_convert", "exclude_modules", "exclude"),
    *("llm_int8_skip_modules", "skip_modules", "modules_to_skip"),
)
# The list of the layers in a block that are quantized, and of no others.
_POSITIVE: Final = "modules_in_block_to_quantize"
_DENSE_BITS: Final = 16
_NAMED: Final = 3  # of many layers, how many a note names
_MOST_PARTS = 24  # of a path of which every part may be an entry
_BLOCK = re.compile(r"\.\d+\.(?!.*\.\d+\.)")  # the last number in a path
_PLAIN = re.compile(r"[\w.-]+")


def with_exclusions(checkpoint: Checkpoint, layout: SourceLayout) -> SourceLayout:
    """The layout with a note of each list that names layers which hold codes.

    Where a list is due, any other value is a problem.
    """
    block = find_quantization_block(checkpoint)
    if block is None:
        return layout
    block = block.inner
    coded = {layer.path: layer for layer in layout.layers if layer.is_quantized}
    problems: list[Problem] = []
    texts = []
    for key, entries in _lists(block, problems):
        if hits := dict(_named(entries, coded)):
            names = join_first([repr(entry) for entry in dict.fromkeys(hits.values())], _NAMED)
            texts.append(f"{key} calls {names} dense, but {_stored(hits, coded)}")
    if left_out := list(_left_out(block.get(_POSITIVE), coded)):
        texts.append(f"{_POSITIVE} leaves layers out, but {_stored(left_out, coded)}")
    code = NoteCode.QUANTIZED_THOUGH_EXCLUDED
    notes = [Note(code, f"{block.where}.{text}") for text in texts]
    return replace(layout, problems=(*layout.problems, *problems), notes=(*layout.notes, *notes))


def excluded_paths(block: QuantizationBlock, paths: Iterable[str]) -> set[str]:
    """The layers that some list of a config calls dense."""
    paths = list(paths)
    lists = list(_lists(block, []))
    return {path for _, entries in lists for path, _ in _named(entries, paths)}


def _stored(paths: Iterable[str], coded: Mapping[str, SourceLayer]) -> str:
    names = list(paths)
    kinds = list(dict.fromkeys(coded[path].stored_as for path in names))
    are = pluralize_are(len(names), "layer")
    return (
        f"{are} stored as {join_first(kinds, _NAMED)} with every tensor that this takes "
        f"({join_first(names, _NAMED)}): read as stored."
    )


def _lists(
    block: QuantizationBlock, problems: list[Problem]
) -> Iterator[tuple[str, Iterable[str]]]:
    """Every list of a config, and the keys of tables that say "not this one"."""
    for key in _LISTS:
        names = block.names(key, problems)
        if names:
            yield key, names
    dynamic, extra = block.table("dynamic"), block.table("extra_config")
    rules = [key for key, rule in dynamic.items() if key.startswith("-:") or rule is False]
    yield "dynamic", [f"re:{rule.removeprefix('-:').removeprefix('+:')}" for rule in rules]
    yield "extra_config", [_as_entry(key) for key, rule in extra.items() if _is_dense(rule)]
    fqn = block.get("modules_to_config") or block.get("module_fqn_to_config")
    tables = {"layer_quant_config": block.get("layer_quant_config"), "module_fqn_to_config": fqn}
    for key, table in tables.items():
        yield key, [name for name, rule in as_table(table).items() if rule is None]


def _is_dense(rule: Any) -> bool:
    bits = as_table(rule).get("bits")
    return isinstance(bits, int) and bits >= _DENSE_BITS


def _named(entries: Iterable[str], paths: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Each layer that an entry names, with the entry."""
    entries = tuple(entries)
    plain = {entry for entry in entries if not entry.startswith("re:") and not _is_wild(entry)}
    wild = Wildcards(entry for entry in entries if not entry.startswith("re:") and _is_wild(entry))
    first_parts = {entry.partition(".")[0] for entry in plain}
    patterns = list(_patterns(entries))
    if not entries:
        return
    for path in paths:
        entry = next((run for run in _runs(path, first_parts) if run in plain), None)
        entry = entry or next(iter(wild.matching(path)), None)
        entry = entry or next((text for text, pattern in patterns if pattern.match(path)), None)
        if entry is not None:
            yield path, entry


def _is_wild(entry: str) -> bool:
    return bool(re.search(r"[*?\[]", entry))


def _patterns(entries: Iterable[str]) -> Iterator[tuple[str, Pattern]]:
    for entry in entries:
        if entry.startswith("re:"):
            try:
                yield entry, Pattern(entry.removeprefix("re:"))
            except PatternError:  # the format's own reader says so
                continue


def _as_entry(key: str) -> str:
    """A key of AutoRound's table: a path, or a regular expression found anywhere in one."""
    return key if _PLAIN.fullmatch(key) else f"re:.*(?:{key})"


def _left_out(table: Any, paths: Iterable[str]) -> Iterator[str]:
    """The layers in a block that a list of lists of names does not hold."""
    rows = table if isinstance(table, list) else []
    names = {name for row in rows for name in (row if isinstance(row, list) else [row])}
    if names:
        for path in paths:
            inside = _BLOCK.search(path)
            if inside is not None and path[inside.end() :] not in names:
                yield path


def _runs(path: str, first_parts: Set[str]) -> Iterator[str]:
    """The names by which an entry may mean a layer: whole parts of its path, one after another.

    They begin with one of ``first_parts``.
    """
    parts = path.split(".")
    inner = len(parts) <= _MOST_PARTS
    for first in range(len(parts)):
        if parts[first] not in first_parts:
            continue
        for last in range(len(parts), first, -1):
            if inner or first == 0 or last == len(parts):
                yield ".".join(parts[first:last])
