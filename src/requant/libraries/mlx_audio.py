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
    named = config.get("architectures")
    heads = {*named} if isinstance(named, list) else set()
    families = [x for d in _DOMAINS for x in sorted((folder / d / "models").glob("*/__init__.py"))]
    for names_of in (_names, _own_types) if names else ():
        for family in families:
            if not names.isdisjoint(names_of(family, heads)):
                return family.parts[-4]
    return ""


def _names(family: Path, heads: set[str]) -> set[str]:
    """The types that a family takes by its folder and hints; none where it asks for other heads."""
    try:
        hints = read_table(family, _HINTS).get(_HINTS, {})
    except ValueError:
        hints = {}
    own_heads = {*hints.get("architectures", ())}
    if own_heads and heads and own_heads.isdisjoint(heads):
        return set()
    return {family.parent.name, *hints.get("model_type_aliases", ())}


def _own_types(family: Path, _: set[str]) -> set[str]:
    """The types by which a family's config calls itself."""
    texts = (file.read_text(errors="replace") for file in family.parent.glob("*.py"))
    return {name for text in texts for name in _OWN_TYPE.findall(text)}


MLX_AUDIO = Library(
    name="mlx-audio",
    package="mlx_audio",
    extra="audio",
    find_class=lambda *of: bool(_domain(*of)),
    recipes=frozenset({"mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6"}),
    copied=("*.pt",),
    # Looking for the domain itself, the library imports all models, and one of them downloads.
    arguments=lambda *of: {"model_domain": _domain(*of) or None},
)
