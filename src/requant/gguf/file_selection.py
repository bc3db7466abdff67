"""Selection of the GGUF files of a repository that make up a model, by name alone."""

from __future__ import annotations

import re
from collections.abc import Iterable

SUFFIX = ".gguf"
PART = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.gguf", re.DOTALL)
_KIND = re.compile(
    r"(?:^|[-._/])((?:UD-)?(?:I?Q[0-9](?:_[A-Z0-9]+)*|TQ[0-9]_[0-9]|BF16|F16|F32|"
    r"MXFP4(?:_MOE)?|NVFP4))$",
    re.IGNORECASE,
)
_MMPROJ = "mmproj"
WITHOUT = "none"
"""The value of ``--mmproj`` that takes the language model alone."""
_NO_MODEL = (_MMPROJ, "imatrix")


def is_mmproj_name(name: str) -> bool:
    """Whether a file is a vision part by its name, as those of llama.cpp are."""
    base = name.rpartition("/")[2].lower()
    return base.endswith(SUFFIX) and _MMPROJ in base


def gguf_models(files: Iterable[str]) -> dict[str, list[str]]:
    """The models of a repository: how each can be asked for -> its files, in order.

    That is the kind of quantization at the end of the name (``Q4_K_M``), and the name itself
    where it ends otherwise, or where two end alike.
    """
    found: dict[str, list[str]] = {}
    for file in sorted(files):
        base = file.rpartition("/")[2].lower()
        if base.endswith(SUFFIX) and not any(word in base for word in _NO_MODEL):
            part = PART.fullmatch(file)
            found.setdefault(part[1] if part else file.removesuffix(SUFFIX), []).append(file)
    kinds: dict[str, list[str]] = {}
    for stem in found:
        match = _KIND.search(stem)
        kinds.setdefault(match[1].upper() if match else stem, []).append(stem)
    return {
        kind if len(stems) == 1 else stem: found[stem]
        for kind, stems in kinds.items()
        for stem in stems
    }


def select_model(models: dict[str, list[str]], wanted: str) -> str | None:
    """The key of the model that is asked for by kind, by name or by the name of a file."""
    word = wanted.lower()
    for key, files in models.items():
        paths = {path.lower() for file in files for path in (file, file.rpartition("/")[2])}
        names = paths | {path.removesuffix(SUFFIX) for path in paths}
        if word == key.lower() or word in names:
            return key
    return None
