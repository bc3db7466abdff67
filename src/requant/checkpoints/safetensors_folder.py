"""Pipeline stage 1: read a folder with safetensors as a Checkpoint.

Folder, shard index, safetensors headers and config.json are read and checked; tensor data are
not. All problems are found in one run and raised in one CheckpointError.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from requant.checkpoints.adapters import (
    ADAPTER_CONFIG,
    describe_adapter,
    describe_adapter_next_to,
    holds_only_an_adapter,
    problems_in,
)
from requant.checkpoints.checkpoint import (
    COMPARED,
    Checkpoint,
    OpenedSource,
    SourceFile,
    StoredTensor,
    weight_path,
)
from requant.checkpoints.folder_files import (
    CONFIG,
    INDEX,
    QUANTIZATION_FILES,
    RECORD,
    SINGLE,
    check_folder,
    check_shard_path,
    file_size,
    find_gaps,
    natural_key,
)
from requant.checkpoints.folder_listing import FolderListing, describe_no_weights, list_folder
from requant.checkpoints.safetensors_header import check_name, parse_header, read_raw_header
from requant.checkpoints.shard_index import Files, judge
from requant.core.files import open_regular
from requant.core.garbage import without_collections
from requant.core.limits import (
    MAX_CONFIG_BYTES,
    MAX_INDEX_BYTES,
    MAX_JSON_VALUES,
    MAX_RECORD_BYTES,
    MAX_RECORD_VALUES,
    MAX_SHARDS,
)
from requant.core.reasons import Note
from requant.core.strict_json import parse_json_object
from requant.errors import MAX_PROBLEMS, CheckpointError, Problem
from requant.text import format_value, os_error_text, pluralize

_WITHOUT_INDEX = "rewrite it, or delete the file to read every .safetensors file of the folder"

_COPY_CONFIG = "copy the one of the original model here, next to the weights"


@without_collections()
def read_folder(folder: Path, stubs: Path | None = None) -> Checkpoint:
    """Read a folder with safetensors, as ``sources.read_checkpoint`` says.

    Raises:
        CheckpointError: With all of its problems.
    """
    message = check_folder(folder)
    if message:
        raise CheckpointError(str(folder), [Problem(str(folder), message)])
    reader = _Reader(folder, stubs)
    config, config_text = reader.json(CONFIG)
    described = {
        name: reader.json(name)[0] for name in QUANTIZATION_FILES if (folder / name).exists()
    }
    shard_of = reader.index()
    listing = list_folder(folder, set(shard_of.values()))
    reader.problems += listing.problems
    if stubs is not None:
        names = {path.name for path in stubs.glob("*.safetensors")}
        gone = {name for name in names if not os.path.lexists(folder / name)}
        listing.weights += sorted(gone - set(shard_of.values()), key=natural_key)
    reader.adapters(listing, bool(shard_of))
    if not listing.weights and not reader.has_index:
        raise CheckpointError(str(folder), reader.without_weights(listing))
    tensors = reader.weights(shard_of, listing)
    if holds_only_an_adapter(tensors):
        raise CheckpointError(str(folder), [reader.adapter()])
    reader.problems += problems_in(tensors)
    if reader.problems:
        raise CheckpointError(str(folder), reader.problems)
    return Checkpoint(
        files=tuple(reader.files),
        tensors=MappingProxyType(tensors),
        config=config,
        config_text=config_text,
        side_files=tuple(listing.side_files),
        left_out=tuple(listing.left_out),
        notes=(*reader.notes, *listing.notes),
        quantization_files=MappingProxyType(described),
        metadata=MappingProxyType(reader.metadata),
        opened=OpenedSource(
            folder, header_stubs=stubs, compared=None if stubs is None else _compared(stubs)
        ),
    )


def _compared(stubs: Path) -> dict[str, bool]:
    """Comparisons of tensors by a stopped run, whose files may be deleted since."""
    try:
        compared = json.loads((stubs / COMPARED).read_bytes())
    except (OSError, ValueError):
        return {}
    return {key: value for key, value in compared.items() if isinstance(value, bool)}


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """Read a JSON object of a folder, as config.json is read.

    Raises:
        CheckpointError: There is no such file, or it is not a JSON object.
    """
    reader = _Reader(folder)
    value, _ = reader.json(name)
    if reader.problems:
        raise CheckpointError(str(folder), reader.problems)
    return value


def read_config(folder: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The config.json of a folder, parsed, and the files next to it that are copied to an output.

    Raises:
        CheckpointError: There is no valid config.json.
    """
    source = f"--config-from {folder}"
    if message := check_folder(folder):
        raise CheckpointError(source, [Problem(str(folder), message)])
    reader = _Reader(folder)
    config, _ = reader.json(CONFIG)
    listing = list_folder(folder, ())
    if problems := [*reader.problems, *listing.problems]:
        raise CheckpointError(source, problems)
    return config, tuple(listing.side_files)


class _Reader:
    """Reads the parts of one folder and collects their problems."""

    def __init__(self, folder: Path, stubs: Path | None = None) -> None:
        self.folder, self.stubs = folder, stubs
        self.files: list[SourceFile] = []
        self.metadata: dict[str, str] = {}
        self.problems: list[Problem] = []
        self.notes: list[Note] = []
        self.has_index = os.path.lexists(folder / INDEX)
        self.index_is_sound = False  # only then the files can be compared with it

    def report(self, where: str, message: str) -> None:
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(Problem(where, message))

    def json(self, name: str) -> tuple[dict[str, Any], str]:
        """Read a JSON object and its text; empty if there is none."""
        size, message = file_size(self.folder, name)
        most = {INDEX: MAX_INDEX_BYTES, RECORD: MAX_RECORD_BYTES}.get(name, MAX_CONFIG_BYTES)
        if not message and size > most:
            message = f"takes {size:,} bytes, at most {most:,} are read"
        if message:
            absent = name == CONFIG and not os.path.lexists(self.folder / name)
            self.report(name, message + (f"; {_COPY_CONFIG}" if absent else ""))
            return {}, ""
        try:
            with open(open_regular(self.folder / name), "rb", buffering=0) as file:
                raw = file.read(size)  # not a byte more, should the file grow meanwhile
        except OSError as error:
            self.report(name, f"cannot be read: {os_error_text(error)}")
            return {}, ""
        lax, values = name == CONFIG, MAX_RECORD_VALUES if name == RECORD else MAX_JSON_VALUES
        value, messages = parse_json_object(raw, nan=lax, same_twice=lax, max_values=values)
        for message in messages:
            self.report(name, message)
        return value, "" if messages else raw.decode("utf-8")

    def index(self) -> dict[str, str]:
        """Read the index, if there is one: tensor name -> shard, valid entries only."""
        if not self.has_index:
            return {}
        before = len(self.problems)
        value, _ = self.json(INDEX)
        if len(self.problems) > before:
            self.problems[before:] = [
                replace(x, message=f"{x.message}; {_WITHOUT_INDEX}") for x in self.problems[before:]
            ]
            return {}
        weight_map = value.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            found = f"is {format_value(weight_map)}" if "weight_map" in value else "is missing"
            message = "is empty" if weight_map == {} else found
            expected = f"expected an object with a file for each tensor; {_WITHOUT_INDEX}"
            self.report(f"{INDEX}: weight_map", f"{message}, {expected}")
            return {}
        shard_of: dict[str, str] = {}
        verdicts: dict[str, str] = {}
        for tensor, shard in weight_map.items():
            wrong = check_name(tensor)
            if wrong:
                self.report(f"{INDEX}: {format_value(tensor)}", wrong[0])
            elif not isinstance(shard, str):
                self.report(f"{INDEX}: {tensor}", f"is {format_value(shard)}, expected a file name")
            elif shard not in verdicts:
                verdicts[shard] = check_shard_path(self.folder, shard)
                if verdicts[shard]:
                    self.report(f"{INDEX}: {tensor}", f"{format_value(shard)} {verdicts[shard]}")
            if not wrong and isinstance(shard, str) and not verdicts[shard]:
                shard_of[tensor] = shard
        if len(verdicts) > MAX_SHARDS:
            self.report(INDEX, f"names {len(verdicts):,} files, at most {MAX_SHARDS:,} are read")
            return {}
        self.index_is_sound = len(self.problems) == before
        return shard_of

    def adapters(self, listing: FolderListing, has_shards: bool) -> None:
        """Remove adapter files from the weights and report them.

        Raises:
            CheckpointError: The folder holds an adapter and no model.
        """
        listing.weights = [x for x in listing.weights if x not in listing.adapters]
        alone = not listing.weights and not has_shards
        if alone and (listing.adapters or os.path.lexists(self.folder / ADAPTER_CONFIG)):
            raise CheckpointError(str(self.folder), [self.adapter()])
        for name in listing.adapters:
            self.report(name, describe_adapter_next_to(listing.adapters))

    def adapter(self) -> Problem:
        """The problem of a folder that holds an adapter."""
        config = _Reader(self.folder).json(ADAPTER_CONFIG)[0]
        return Problem(str(self.folder), describe_adapter(str(self.folder), config))

    def without_weights(self, listing: FolderListing) -> list[Problem]:
        """The problems of a folder without weights."""
        absent = not os.path.lexists(self.folder / CONFIG)
        others = [x for x in self.problems if not (absent and x.where == CONFIG)]
        return [*others, Problem(str(self.folder), describe_no_weights(self.folder, listing))]

    def weights(
        self, shard_of: Mapping[str, str], listing: FolderListing
    ) -> dict[str, StoredTensor]:
        """Read the header of each weight file, and compare the files with the index."""
        named = {*shard_of.values()}
        missing = [x for x in named if not os.path.lexists(weight_path(self.folder, self.stubs, x))]
        missing.sort(key=natural_key)
        names = sorted({*named, *listing.weights}.difference(missing), key=natural_key)
        if len(names) > MAX_SHARDS:
            message = f"holds {len(names):,} weight files, at most {MAX_SHARDS:,} are read"
            self.report(str(self.folder), message)
            raise CheckpointError(str(self.folder), self.problems)
        if not self.has_index:
            self.check_set(names)
        tensors, held = self.headers(names, Counter(shard_of.values()))
        if self.index_is_sound:
            damaged = set(names) - held.keys()
            problems, self.notes = judge(Files(shard_of, held, missing, listing.weights, damaged))
            for problem in problems:
                self.report(problem.where, problem.message)
        if names and not tensors and not self.problems:
            self.report(str(self.folder), "the weight files hold no tensors")
        return tensors

    def check_set(self, names: Sequence[str]) -> None:
        """Without an index: report files that may not belong to the model, and missing shards."""
        message = (
            f"is next to {SINGLE} without an index that says whether its tensors belong to the "
            f"model; move it out of the folder, or write {INDEX}"
        )
        for name in names if SINGLE in names else ():
            if name != SINGLE:
                self.report(name, message)
        for name, message in find_gaps(names):
            self.report(name, message)

    def headers(
        self, names: Iterable[str], placed: Mapping[str, int]
    ) -> tuple[dict[str, StoredTensor], dict[str, set[str]]]:
        """Read the header of each file: every tensor, and the tensors of each sound file."""
        tensors: dict[str, StoredTensor] = {}
        held: dict[str, set[str]] = {}
        for name in names:
            before = len(self.problems)
            entries = self.header(name, placed.get(name, 0))
            if len(self.problems) == before:  # the tensors of a damaged file are not known
                held[name] = {entry.name for entry in entries}
            for entry in entries:
                first = tensors.setdefault(entry.name, entry)
                if first is not entry and not self.has_index:
                    message = f"is in {first.file} too; keep one of the two and remove the other"
                    self.report(f"{name}: {entry.name}", message)
        return tensors, held

    def header(self, name: str, placed: int) -> list[StoredTensor]:
        """Read the header of a shard; its tensors in the order of their data."""
        path = weight_path(self.folder, self.stubs, name)
        size, message = file_size(path.parent if path.name == name else self.folder, name)
        raw = b""
        if not message:
            try:
                # Unbuffered, so that no more than the header is read.
                with open(open_regular(path), "rb", buffering=0) as file:
                    raw, message = read_raw_header(file, size)
            except OSError as error:
                message = f"cannot be read: {os_error_text(error)}"
        if message:
            if placed and not raw:
                message += f"; {INDEX} places {pluralize(placed, 'tensor')} in it"
            self.report(name, message)
            return []
        entries, metadata, problems = parse_header(raw, size - len(raw))
        self.metadata = metadata | self.metadata
        for problem in problems:
            self.report(f"{name}: {problem.where}", problem.message)
        self.files.append(SourceFile(name, size, hashlib.sha256(raw).hexdigest()))
        by_place = sorted((e.start, e.stop, tensor) for tensor, e in entries.items())
        return [
            StoredTensor(tensor, entries[tensor].info, name, len(raw) + start)
            for start, _, tensor in by_place
        ]
