"""mlx-audio: ``mlx_audio/{tts,stt,...}/models/{family}/``, found by config and folder name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from requant.libraries.base import Library, read_table

_DOMAINS = ("tts", "stt", "sts", "lid", "music")  # in the order in which mlx_audio.convert looks
_HINTS = (
    "DETECTION_HINTS"  # of a family: {"model_type_aliases": {...}, "architectures": {...}, ...}
)
# The type by which a family's config calls itself where its folder has another name.
_OWN_TYPE = re.compile(
    r'^class ModelConfig\b[^\n]*\n(?:[ #\n][^\n]*\n)*?    model_type: str = "(\w+)"', re.M
)
# Text models that are parts of audio models too: their type alone says nothing of sound.
_TEXT_FAMILIES = frozenset({"llama", "qwen2", "qwen3", "dense", "mimo", "base"})


def _domain(folder: Path, config: Mapping[str, Any]) -> str:
    """The domain that has a class for the model; "" where none does by name."""
    words = (config.get(key) for key in ("model_type", "name", "_class_name"))
    names = {word.lower() for word in words if isinstance(word, str)} - _TEXT_FAMILIES
    heads = config.get("architectures")
    for domain in _DOMAINS if names else ():
        for family in sorted((folder / domain / "models").glob("*/__init__.py")):
            if _is_of_family(family, names, {*heads} if isinstance(heads, list) else set()):
                return domain
    return ""


def _is_of_family(module: Path, names: set[str], architectures: set[str]) -> bool:
    """Whether a family's package takes a model of these names, with one of these heads."""
    try:
        hints = read_table(module, _HINTS).get(_HINTS, {})
    except ValueError:
        hints = {}
    known = {module.parent.name, *hints.get("model_type_aliases", ())}
    for file in module.parent.glob("*.py"):
        known.update(_OWN_TYPE.findall(file.read_text(errors="replace")))
    own_heads = {*hints.get("architectures", ())}
    if own_heads and architectures and own_heads.isdisjoint(architectures):
        return False
    return not known.isdisjoint(names)


MLX_AUDIO = Library(
    name="mlx-audio",
    package="mlx_audio",
    extra="audio",
    find_class=lambda *of: bool(_domain(*of)),
    recipes=frozenset({"mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6"}),
    # Looking for the domain itself, the library imports all models, and one of them downloads.
    arguments=lambda *of: {"model_domain": _domain(*of) or None},
)
