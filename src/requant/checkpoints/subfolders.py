"""Find the subfolders of a source with weights that belong to the model and are copied unchanged.

A folder belongs to it if a copied file names it (``modules.json`` of sentence-transformers,
``model_index.json`` of diffusers, any config), or if it has a config.json of another model (a
speech tokenizer). Another copy of the model, a checkpoint of its training or an adapter does not,
and then none of its files is copied. Only names and small JSON files are read.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

from requant.checkpoints.adapters import ADAPTER_CONFIG
from requant.core.reasons import Note, NoteCode
from requant.core.strict_json import parse_json_object

MODULES = "modules.json"
PIPELINE = "model_index.json"
MAX_POINTER_BYTES = 1 << 20  # of a file that names folders
_MAX_POINTERS = 200
_CONFIG = "config.json"
# Keys whose values are never paths, though a folder may have the same name.
_NO_PATHS = {"dtype", "torch_dtype", "model_type", "architectures", "library_name"}
_TRAINING = re.compile(r"checkpoint-[0-9]+")
# The same weights for other libraries, where safetensors are next to them.
COPIES = ("pytorch_model*", "tf_model*", "flax_model*", "rust_model*", "model*.onnx*", "openvino_*")
# Modules of sentence-transformers that have weights.
_WITH_WEIGHTS = {"Dense", "LSTM", "CNN", "LayerNorm", "WordEmbeddings", "StaticEmbedding"}


@dataclass(frozen=True)
class Subfolders:
    """The weights below a source, by whether they are copied."""

    # Folder, or file, that is copied -> the file that names it.
    named: Mapping[str, str] = field(default_factory=dict)
    # Folder that is left out as a whole -> why.
    separate: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[Note, ...] = ()

    def namer(self, name: str) -> str:
        """The file that makes another a part of the model; "" where none does."""
        return next((self.named[x] for x in (*_above(name), name) if x in self.named), "")

    def separate_reason(self, name: str) -> tuple[str, str]:
        """The folder around a file that is left out as a whole, and why; or two empty texts."""
        return next(((x, self.separate[x]) for x in _above(name) if x in self.separate), ("", ""))

    def is_copy(self, name: str, names: Collection[str]) -> bool:
        """Whether a file of a copied folder holds the same weights as safetensors next to it."""
        below, _, base = name.rpartition("/")
        if not any(fnmatchcase(base, pattern) for pattern in COPIES):
            return False
        return any(x.endswith(".safetensors") and x.rpartition("/")[0] == below for x in names)


def names_folders(name: str) -> bool:
    """Whether a file is one of those that may name others: a config, or a list of modules."""
    base = name.rpartition("/")[2]
    return base in (MODULES, PIPELINE) or ("config" in base and base.endswith(".json"))


def judge(
    names: Collection[str], weights: Collection[str], read: Callable[[str], bytes]
) -> Subfolders:
    """Sort the subfolders with weights, and single files with weights for other libraries.

    ``names`` is every file below the source, ``weights`` those of them that would be left out as
    weights; ``read`` gives the bytes of a small file, none if it cannot be read.
    """
    pointers = sorted((x for x in names if names_folders(x)), key=lambda x: (x.count("/"), x))
    pointers = pointers[:_MAX_POINTERS]
    notes = tuple(_missing(_modules(names, read), names))
    if not weights:
        return Subfolders(notes=notes)
    parsed = cache(lambda name: _parse(read(name)))

    folders = {folder for name in names for folder in _above(name)}
    places = folders | {x for x in weights if not x.endswith(".safetensors")}
    named: dict[str, str] = {}
    for pointer in pointers:
        below = pointer.rpartition("/")[0]
        for text in _strings(parsed(pointer)):
            path = posixpath.normpath(posixpath.join(below, text)) if text else ""
            if path in places and path not in (".", below):
                named.setdefault(path, pointer)
    separate: dict[str, str] = {}
    root = parsed(_CONFIG) if _CONFIG in names else {}
    for folder in sorted({folder for name in weights for folder in _above(name)}):
        if any(x in named or x in separate for x in (*_above(folder), folder)):
            continue
        why, config = "", f"{folder}/{_CONFIG}"
        if _TRAINING.fullmatch(folder.rpartition("/")[2]):
            why = "a checkpoint of its training; give this folder to convert it"
        elif f"{folder}/{ADAPTER_CONFIG}" in names:
            why = "an adapter (LoRA or a relative), which is not applied; merge it first to have it"
        elif config in names and root and _same_model(root, parsed(config)):
            why = "another copy of the model; give this folder to convert it"
        elif config in names:
            named[folder] = config
        if why:
            separate[folder] = why
    return Subfolders(named, separate, notes)


def first_module(names: Collection[str], read: Callable[[str], bytes]) -> str:
    """The folder in which sentence-transformers keeps the model itself; "" for the source."""
    first = next(iter(_modules(names, read)), None)
    path = first.get("path") if isinstance(first, dict) else None
    return posixpath.normpath(path) if isinstance(path, str) and path else ""


def _modules(names: Collection[str], read: Callable[[str], bytes]) -> list[Any]:
    """The entries of ``modules.json``."""
    entries = _parse(read(MODULES)).get("modules") if MODULES in names else None
    return entries if isinstance(entries, list) else []


def _missing(modules: Iterable[Any], names: Collection[str]) -> Iterator[Note]:
    """Say which modules of sentence-transformers lack their weights."""
    for entry in modules:
        if not isinstance(entry, dict):
            continue
        kind, path = str(entry.get("type", "")).rpartition(".")[2], entry.get("path")
        if kind not in _WITH_WEIGHTS or not isinstance(path, str) or not path:
            continue
        below = posixpath.normpath(path) + "/"
        if not any(x.startswith(below) and x.endswith((".safetensors", ".bin")) for x in names):
            yield Note(
                NoteCode.MISSING_MODULE_WEIGHTS,
                f"{MODULES} names {path}, and no weights of it are there: was the download "
                "complete? sentence-transformers does not load the result without them.",
            )


def _above(name: str) -> list[str]:
    """The folders around a file, the outermost first."""
    parts = name.split("/")[:-1]
    return ["/".join(parts[: n + 1]) for n in range(len(parts))]


def _same_model(root: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    kind = root.get("model_type")
    same = all(root.get(key) == other.get(key) for key in ("model_type", "architectures"))
    return kind is not None and same


def _parse(raw: bytes) -> dict[str, Any]:
    """A JSON object, or a list as the value of "modules"; empty where it is neither."""
    if raw.lstrip()[:1] == b"[":
        raw = b'{"modules":' + raw + b"}"
    value, problems = parse_json_object(raw, nan=True, same_twice=True)
    return {} if problems else value


def _strings(value: Mapping[str, Any]) -> Iterator[str]:
    """Every key and text of a JSON value that may name a path."""
    pending: list[Any] = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            for key, inner in item.items():
                yield key
                if key not in _NO_PATHS:
                    pending.append(inner)
        elif isinstance(item, list):
            pending += item
        elif isinstance(item, str):
            yield item
