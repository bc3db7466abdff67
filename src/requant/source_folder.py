"""What lies in a source folder: weight files, files to carry over, files to leave out.

Only names, sizes and kinds of files are looked at here; nothing is opened.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Collection
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from requant.errors import Problem

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

# Never listed: caches and version control, which are no part of the checkpoint.
_SKIPPED = {".git", ".cache", "__pycache__"}
# Weights in formats that are not read. They would be stale in the output.
PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")
_STALE = {
    **dict.fromkeys(("pytorch_model*", "*.pt", "*.pth", "*.ckpt"), "weights in a pickle file"),
    "*.gguf": "weights in GGUF",
    "*.h5": "weights in HDF5",
    "*.msgpack": "weights for Flax",
    "*.onnx": "weights in ONNX",
    "*.onnx_data": "weights in ONNX",
    "*.ot": "weights for Rust's tch",
    "consolidated*": "a second copy of the weights, in Mistral's or Meta's own layout",
    "*.safetensors.index.json": "index of other weights",
}
_STALE_BIN_BYTES = 1 << 20  # a *.bin above this is weights; below, often a vocabulary


@dataclass
class Listing:
    """Everything in a folder, sorted into what becomes of it; paths are relative."""

    weights: list[str] = field(default_factory=list)  # *.safetensors directly in the folder
    side_files: list[str] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def sort(self) -> None:
        """Bring every list into an order that depends on names only."""
        self.weights.sort(key=natural_key)
        self.side_files.sort()
        self.left_out.sort()


def natural_key(name: str) -> tuple[list[tuple[int, str]], str]:
    """Sort key under which ``model-2`` comes before ``model-10``."""
    parts = re.split(r"([0-9]+)", name)
    # Digits by value: of two numbers without leading zeros the longer is the greater.
    return [
        (len(part.lstrip("0")), part.lstrip("0")) if odd % 2 else (0, part)
        for odd, part in enumerate(parts)
    ], name


def file_size(path: Path) -> tuple[int, str]:
    """Size of a regular file, links followed.

    Returns:
        The size and ``""``, or 0 and why there is no such file.
    """
    try:
        found = path.stat()
    except FileNotFoundError:
        if path.is_symlink():
            return 0, f"is a link to {str(path.readlink())!r}, which does not exist"
        return 0, "does not exist"
    except OSError as error:
        return 0, f"cannot be read: {error.strerror or error}"
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a device, pipe or socket"
        return 0, f"is {kind}, expected a regular file"
    return found.st_size, ""


def list_folder(folder: Path, shards: Collection[str]) -> Listing:
    """Sort every file below a folder into weights, side files and what is left out.

    Args:
        folder: The source.
        shards: Relative paths that the index names; they are in none of the lists.
    """
    listing = Listing()
    pending = [""]
    while pending:  # a loop, since a hostile tree can be deeper than the stack
        below = pending.pop()
        try:
            with os.scandir(folder / below) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            listing.problems.append(
                Problem(printable(below) or str(folder), f"cannot be listed: {error.strerror}")
            )
            continue
        for entry in entries:
            name = f"{below}{entry.name}"
            if entry.name in _SKIPPED or name in shards or name in (CONFIG, INDEX):
                continue
            if entry.is_dir(follow_symlinks=False):
                if name == "original":
                    listing.left_out.append(("original/", _STALE["consolidated*"]))
                elif printable(name) != name:
                    listing.left_out.append((printable(name) + "/", "the name is not UTF-8"))
                else:
                    pending.append(name + "/")
            else:
                _sort_file(listing, folder, name)
    if shards or SINGLE in listing.weights or os.path.lexists(folder / INDEX):
        for name in [n for n in listing.weights if n.startswith("consolidated")]:
            listing.weights.remove(name)
            listing.left_out.append((name, _STALE["consolidated*"]))
    listing.sort()
    return listing


def printable(name: str) -> str:
    r"""A file name with bytes that are not UTF-8 spelled ``\xff``."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _sort_file(listing: Listing, folder: Path, name: str) -> None:
    if printable(name) != name:
        listing.left_out.append((printable(name), "the name is not UTF-8"))
        return
    base = name.rpartition("/")[2]
    if base.endswith(".safetensors"):
        if name == base:
            listing.weights.append(name)  # even a dangling link: reading it says so
        else:
            listing.left_out.append((name, "weights in a subfolder"))
        return
    size, message = file_size(folder / name)
    if message.startswith("is a folder"):
        message = "a link to a folder is not followed"
    reason = message or _stale(base, size)
    if reason:
        listing.left_out.append((name, reason))
    elif os.access(folder / name, os.R_OK):
        listing.side_files.append(name)
    else:
        listing.problems.append(Problem(name, "cannot be read: permission denied"))


def _stale(base: str, size: int) -> str:
    for pattern, reason in _STALE.items():
        if fnmatchcase(base, pattern):
            return reason
    if base.endswith(".bin") and size > _STALE_BIN_BYTES:
        return f"weights in another format (a .bin file of {size} bytes)"
    return ""
