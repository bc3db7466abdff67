"""Check a source folder and its files by names, sizes and kinds: what it is, what may be read."""

from __future__ import annotations

import os
import re
import stat
from collections import defaultdict
from collections.abc import Iterable
from fnmatch import fnmatchcase
from itertools import count
from pathlib import Path, PurePosixPath

from requant.checkpoints.safetensors_header import find_unprintable
from requant.text import join_first, os_error_text

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
RECORD = "requant.json"  # what an output of requant was made from; its own output has another
# Files in which tools describe their quantization next to, or instead of, config.json. They are
# not copied: the output's config describes its quantization.
QUANTIZATION_FILES = (
    "quantize_config.json",
    "quant_config.json",
    "quantization_config.json",
    "hf_quant_config.json",
)

# Weights that are not read.
_PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")
_NO_PICKLES = (
    "Loading those can run code, so they are not read: load the model with transformers where "
    "you trust it, and save it as safetensors with save_pretrained"
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_HUB_GGUF = re.compile(rf"{_HUB_ID.pattern}:[\w.+/ -]+", re.ASCII)
_NUMBERED = re.compile(r"(.*)-([0-9]{5,6})-of-([0-9]{5,6})\.safetensors")
_MAX_NAME_BYTES = 255
_MAX_PATH_BYTES = 2048  # systems take 4096 with the folder's own


def natural_key(name: str) -> tuple[list[tuple[int, str]], str]:
    """Sort key under which ``model-2`` comes before ``model-10``."""
    parts = re.split(r"([0-9]+)", name)
    # Digits by value: of two numbers without leading zeros the longer is the greater.
    return [
        (len(part.lstrip("0")), part.lstrip("0")) if odd % 2 else (0, part)
        for odd, part in enumerate(parts)
    ], name


def file_size(folder: Path, name: str) -> tuple[int, str]:
    """Size of a regular file of a checkpoint and ``""``, or 0 and why there is no such file.

    Links are followed within the checkpoint.
    """
    path = folder / name
    try:
        status = path.stat()
    except FileNotFoundError:
        if path.is_symlink():
            return 0, f"is a link to {str(path.readlink())!r}, which does not exist"
        return 0, "does not exist"
    except OSError as error:
        return 0, f"cannot be read: {os_error_text(error)}"
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a device, pipe or socket"
        return 0, f"is {kind}, expected a regular file"
    message = _outside(folder, path)
    return (0, message) if message else (status.st_size, "")


def _outside(folder: Path, path: Path) -> str:
    """Return why a link is not followed (it leads out of its checkpoint), or "".

    The hub's cache is made of links, from ``snapshots/REVISION`` to the ``blobs`` next to it.
    """
    if not path.is_symlink():
        return ""
    root, target = folder.resolve(), path.resolve()
    homes = [root]
    if root.parent.name == "snapshots":
        homes.append(root.parent.parent / "blobs")
    if any(home in target.parents for home in homes):
        return ""
    return (
        f"is a link out of its folder, to {str(path.readlink())!r}, which is not followed; "
        "put the file itself there (a hard link will do)"
    )


def is_gguf(source: Path) -> bool:
    """Whether a source is a GGUF file, or a folder whose only weights are GGUF files."""
    try:
        if not source.is_dir():
            return source.suffix == ".gguf" and source.exists()
        names = [entry.name for entry in source.iterdir()]
    except (OSError, ValueError):
        return False
    weights = any(name.endswith(".safetensors") or name == INDEX for name in names)
    return not weights and any(name.endswith(".gguf") for name in names)


def check_folder(folder: Path) -> str:
    """Return why a path is not a folder to read from, or ""."""
    try:
        if folder.is_dir():
            return ""
        exists = folder.exists()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        return f"cannot be read: {error}"
    if exists and folder.suffix == ".safetensors":
        return f"is a file; give the folder that holds it and its config.json: {folder.parent}"
    if exists and folder.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        return f"is a pickle file, it seems. {_NO_PICKLES}"
    if exists:
        return "is a file, expected a folder with config.json and safetensors files"
    if _HUB_ID.fullmatch(str(folder)):
        return (
            "there is no such folder. If it is a model on the hub, download it first: "
            f"hf download {folder} --local-dir {folder.name}"
        )
    return "there is no such folder"


def check_shard_path(folder: Path, shard: str) -> str:
    """Return why the path of a shard in an index is not followed, or ""."""
    path = PurePosixPath(shard)
    if (
        not shard
        or find_unprintable(shard)
        or len(shard.encode()) > _MAX_PATH_BYTES
        or any(len(part.encode()) > _MAX_NAME_BYTES for part in path.parts)
    ):
        return "is not a file name"
    if path.is_absolute() or ".." in path.parts or "\\" in shard:
        return "leads out of the folder; expected a file name"
    if str(path) != shard:
        return f"is not a plain relative path; expected {str(path)!r}"
    if path.suffix != ".safetensors":
        return "is not a .safetensors file"
    # The file itself may be a link (caches are made of links), a folder on the way may not.
    if any((folder / parent).is_symlink() for parent in path.parents if parent.name):
        return "leads through a link to a folder, which is not followed"
    return ""


def find_gaps(names: Iterable[str]) -> list[tuple[str, str]]:
    """Sets of shards (``model-00001-of-00003.safetensors``) with gaps: a file of each, and why."""
    sets: dict[tuple[str, str], dict[int, str]] = defaultdict(dict)
    for name in names:
        match = _NUMBERED.fullmatch(name)
        if match:
            sets[match[1], match[3]][int(match[2])] = name
    gaps = []
    for (_, total), members in sorted(sets.items()):
        # Counted without walking to the total, which a name can put at a million.
        missing = int(total) - sum(1 <= number <= int(total) for number in members)
        if missing and len(members) < int(total):  # some writers count from 0
            gap = next(number for number in count(1) if number not in members)
            message = (
                f"{missing} of the {int(total)} shards of this set are missing, the first is "
                f"number {gap}; was the download complete?"
            )
            gaps.append((min(members.values()), message))
    return gaps


def describe_pickles(names: Iterable[str]) -> str:
    """Say what to do with pickle files; "" if there are none."""
    pickles = [name for name in names if any(fnmatchcase(name, x) for x in _PICKLES)]
    if not pickles:
        return ""
    return f"holds no safetensors files, only pickle files ({join_first(pickles)}). {_NO_PICKLES}"


def is_repository_id(source: str | os.PathLike[str]) -> bool:
    """Whether a source that is not on this disk has the form of a repository's id.

    A GGUF file of it may follow after a colon: ``org/name:Q4_K_M``.
    """
    text = os.fspath(source)
    formed = _HUB_ID.fullmatch(text) or _HUB_GGUF.fullmatch(text)
    return bool(formed) and not os.path.lexists(source)


def decode_filename(name: str) -> str:
    r"""A file name with bytes that are not UTF-8 spelled ``\xff``."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
