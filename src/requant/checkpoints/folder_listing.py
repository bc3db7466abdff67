"""Sort the files of a source: weights, files to copy, files to leave out.

Only names, sizes and kinds of files count; small JSON files are read where they may name weights
in subfolders (``subfolders``). Folders and repositories on the hub are sorted in the same way.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from itertools import islice
from pathlib import Path

from requant.checkpoints import subfolders
from requant.checkpoints.adapters import ADAPTER_CONFIG, is_adapter_file
from requant.checkpoints.folder_files import (
    CONFIG,
    INDEX,
    QUANTIZATION_FILES,
    RECORD,
    SINGLE,
    decode_filename,
    describe_pickles,
    file_size,
    natural_key,
)
from requant.core.files import open_regular
from requant.core.limits import MAX_ENTRIES, MAX_INDEX_BYTES
from requant.core.reasons import Note, NoteCode
from requant.core.strict_json import parse_json_object
from requant.errors import CheckpointError, Problem
from requant.text import join_first, os_error_text

# Never listed: caches and version control, which are not part of the checkpoint.
_SKIPPED = {".git", ".cache", "__pycache__"}
# Weights in formats that are not read. They would be stale in the output.
_STALE = {
    **dict.fromkeys(("pytorch_model*", "*.pt", "*.pth", "*.ckpt"), "weights in pickle files"),
    "*.gguf": "weights in GGUF",
    "*.h5": "weights in HDF5",
    "*.msgpack": "weights for Flax",
    "*.onnx": "weights in ONNX",
    "*.onnx_data": "weights in ONNX",
    "openvino_model*": "weights for OpenVINO",
    "*.ot": "weights for Rust's tch",
    "consolidated*": "a second copy of the weights, in Mistral's or Meta's own layout",
    "*.safetensors.index.json": "index of other weights",
    RECORD: "describes the conversion that made the source",
    **dict.fromkeys(QUANTIZATION_FILES, "describes the source's quantization"),
}
_STALE_BIN_BYTES = 1 << 20  # a *.bin above this is weights; below, often a vocabulary


@dataclass
class FolderListing:
    """The files of a folder by their use; paths are relative."""

    weights: list[str] = field(default_factory=list)  # *.safetensors directly in the folder
    adapters: list[str] = field(default_factory=list)  # files, some of them weights, by name
    side_files: list[str] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    nested: list[str] = field(default_factory=list)  # *.safetensors below it, whatever they are

    def sort(self) -> None:
        """Sort every list by names."""
        self.weights.sort(key=natural_key)
        self.adapters.sort(key=natural_key)
        self.side_files.sort()
        self.left_out.sort()


def describe_no_weights(folder: Path, listing: FolderListing) -> str:
    """Say what a folder without weights holds instead."""
    names = [*(name for name, _ in listing.left_out), *listing.side_files]
    if listing.nested:
        first = subfolders.first_module(names, partial(_small_file, folder))
        homes = sorted({x.rpartition("/")[0] for x in listing.nested}, key=natural_key)
        home = first if first in homes else homes[0]
        found = f"holds safetensors files in subfolders only ({join_first(listing.nested)})"
        return f"{found}; give the folder of the model itself: {folder / home}"
    no_weights = f"holds no weights: no {SINGLE}, no {INDEX}, no other *.safetensors file"
    return describe_pickles(names) or no_weights


def list_folder(folder: Path, shards: Collection[str]) -> FolderListing:
    """Sort every file below a folder into weights, side files and what is left out.

    The ``shards`` that the index names are in none of the lists.

    Raises:
        CheckpointError: The folder holds more than is read.
    """
    listing = FolderListing()
    names = [x for x in _walk(folder, listing) if x not in shards and x not in (CONFIG, INDEX)]
    sizes = {name: file_size(folder, name) for name in names}
    nbytes = {name: size for name, (size, message) in sizes.items() if not message}
    if (folder / CONFIG).is_file():
        nbytes[CONFIG] = file_size(folder, CONFIG)[0]
    below = _judge(nbytes, partial(_small_file, folder))
    listing.notes += below.notes
    listing.nested = sorted(x for x in nbytes if x.endswith(".safetensors") and "/" in x)
    separate: dict[str, str] = {}
    for name in names:
        home, why = below.separate_reason(name)
        if home:
            separate[home + "/"] = why
        else:
            _sort_file(listing, folder, name, below, sizes)
    listing.left_out += separate.items()
    _leave_second_copies(listing, any(os.path.lexists(folder / name) for name in shards))
    copied = [x for x in listing.side_files if below.namer(x) and _is_weights(x, nbytes[x])]
    if copied:
        namers = join_first(sorted({*map(below.namer, copied)}))
        listed = join_first(sorted(copied))
        text = f"Weights copied unchanged, named by {namers}: {listed}."
        listing.notes.append(Note(NoteCode.COPIED_WEIGHTS, text))
    listing.sort()
    return listing


def files_to_download(sizes: Mapping[str, int], read: Callable[[str], bytes]) -> list[str]:
    """Return the files of a repository that a conversion reads: those ``list_folder`` keeps.

    ``sizes`` are bytes by relative path; ``read`` gives the content of a small file.
    """
    sizes = {x: n for x, n in sizes.items() if not set(x.split("/")[:-1]) & _SKIPPED}
    sizes = {x: n for x, n in sizes.items() if not x.startswith("original/")}
    shards = _shards(sizes, read)
    below = _judge({x: n for x, n in sizes.items() if x not in shards}, read)
    weights = [x for x in sizes if "/" not in x and x.endswith(".safetensors")]
    second = [x for x in weights if x.startswith("consolidated") and x not in shards]

    def is_read(name: str) -> bool:
        if name in shards:
            return True
        if below.separate_reason(name)[0]:
            return False
        if name in weights:
            return name not in second or len(second) == len(weights)
        if name in (CONFIG, INDEX, ADAPTER_CONFIG, *QUANTIZATION_FILES):
            return True
        return not _why_left_out(name, sizes[name], below, sizes)

    return sorted(filter(is_read, sizes), key=natural_key)


def _shards(sizes: Mapping[str, int], read: Callable[[str], bytes]) -> set[str]:
    """The files below a repository that its index names as shards of the model."""
    nested = {x for x in sizes if "/" in x and x.endswith(".safetensors")}
    if not nested or not 0 < sizes.get(INDEX, 0) <= MAX_INDEX_BYTES:
        return set()
    weight_map = parse_json_object(read(INDEX))[0].get("weight_map")
    named = weight_map.values() if isinstance(weight_map, dict) else ()
    return nested & {name for name in named if isinstance(name, str)}


def _walk(folder: Path, listing: FolderListing) -> list[str]:
    """Every file below a folder that may be a part of the checkpoint."""
    files: list[str] = []
    seen = 0
    pending = [""]
    while pending:  # a loop, since a hostile tree can be deeper than the stack
        below = pending.pop()
        try:
            with os.scandir(folder / below) as scanned:
                entries = list(islice(scanned, MAX_ENTRIES + 1 - seen))
        except OSError as error:
            where = decode_filename(below) or str(folder)
            listing.problems.append(Problem(where, f"cannot be listed: {os_error_text(error)}"))
            continue
        seen += len(entries)
        if seen > MAX_ENTRIES:
            message = f"holds more than {MAX_ENTRIES:,} files and folders, which are not read"
            raise CheckpointError(str(folder), [Problem(str(folder), message)])
        for entry in sorted(entries, key=lambda entry: entry.name):
            name = f"{below}{entry.name}"
            if entry.name in _SKIPPED:
                continue
            if not entry.is_dir(follow_symlinks=False):
                files.append(name)
            elif name == "original":
                listing.left_out.append(("original/", _STALE["consolidated*"]))
            elif decode_filename(name) != name:
                listing.left_out.append((decode_filename(name) + "/", "the name is not UTF-8"))
            else:
                pending.append(name + "/")
    return files


def _judge(sizes: Mapping[str, int], read: Callable[[str], bytes]) -> subfolders.Subfolders:
    """Sort the weights below a source, and those for other libraries."""
    weights = [x for x, n in sizes.items() if _is_weights(x, n) and decode_filename(x) == x]
    pointers = {x for x, n in sizes.items() if n <= subfolders.MAX_POINTER_BYTES}
    names = sizes.keys()
    return subfolders.judge(names, weights, lambda x: read(x) if x in pointers else b"")


def _small_file(folder: Path, name: str) -> bytes:
    """The content of a file that may name folders; empty if it cannot be read."""
    size, message = file_size(folder, name)
    if message or size > subfolders.MAX_POINTER_BYTES:
        return b""
    try:
        with open(open_regular(folder / name), "rb") as file:
            return file.read(size)
    except OSError:
        return b""


def _leave_second_copies(listing: FolderListing, has_shards: bool) -> None:
    """Leave out weights in Mistral's own layout where there are others."""
    second = [name for name in listing.weights if name.startswith("consolidated")]
    if has_shards or len(second) < len(listing.weights):
        listing.weights = [name for name in listing.weights if name not in second]
        listing.left_out += ((name, _STALE["consolidated*"]) for name in second)


def _sort_file(
    listing: FolderListing,
    folder: Path,
    name: str,
    below: subfolders.Subfolders,
    sizes: Mapping[str, tuple[int, str]],
) -> None:
    if decode_filename(name) != name:
        listing.left_out.append((decode_filename(name), "the name is not UTF-8"))
        return
    if "/" not in name and is_adapter_file(name):
        listing.adapters.append(name)
    if "/" not in name and name.endswith(".safetensors"):
        listing.weights.append(name)  # even a dangling link: reading it says so
        return
    size, message = sizes[name]
    # The walk does not enter links. Path.is_dir would raise where a target cannot be reached.
    if message and os.path.isdir(folder / name):  # noqa: PTH112
        message = "a link to a folder is not followed"
    reason = message or _why_left_out(name, size, below, sizes.keys())
    if reason:
        listing.left_out.append((name, reason))
    elif os.access(folder / name, os.R_OK):
        listing.side_files.append(name)
    else:
        listing.problems.append(Problem(name, "cannot be read: permission denied"))


def _why_left_out(
    name: str, size: int, below: subfolders.Subfolders, names: Collection[str]
) -> str:
    """Why a file that is not a weight file of the model is not copied; "" where it is."""
    if below.namer(name):
        return "the same weights in another format" if below.is_copy(name, names) else ""
    if name == ADAPTER_CONFIG:
        return "describes an adapter, which is not here"
    return _stale(name.rpartition("/")[2], size) or (
        "weights in a subfolder that no config names" if name.endswith(".safetensors") else ""
    )


def _is_weights(name: str, size: int) -> bool:
    """Whether a file would be left out as weights, unless a config names it."""
    base = name.rpartition("/")[2]
    if base.endswith(".safetensors"):
        return "/" in name
    if "/" not in name and any(fnmatchcase(base, pattern) for pattern in subfolders.COPIES):
        return False
    no_weights = base.endswith(".json") or base in (RECORD, *QUANTIZATION_FILES)
    return not no_weights and bool(_stale(base, size))


def _stale(base: str, size: int) -> str:
    lower = base.lower()
    for pattern, reason in _STALE.items():
        if fnmatchcase(lower, pattern):
            return reason
    if lower.endswith(".safetensors") and lower != base:
        return "weights under a name that is not read; end it in .safetensors"
    if lower.endswith(".bin") and size > _STALE_BIN_BYTES:
        return f"weights in another format (a .bin file of {size} bytes)"
    return ""
