"""mlx-audio: ``mlx_audio/{tts,stt,...}/models/{family}/``, found by config and folder name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from requant.libraries.base import Library, module_exists, read_table

_HINTS = "DETECTION_HINTS"  # of a family: {"model_type_aliases": {...}, ...}
_DOMAINS = ("tts", "stt", "sts", "lid", "music")  # in the order in which mlx_audio.convert looks
# Text models that are parts of audio models too: their type alone says nothing of sound.
_TEXT_FAMILIES = frozenset({"llama", "qwen3", "dense", "mimo", "base"})


def _domain(folder: Path, config: Mapping[str, Any]) -> str:
    """The domain that has a class for the model; "" where none names it."""
    words = (config.get(key) for key in ("model_type", "name", "_class_name"))
    names = {word.lower() for word in words if isinstance(word, str)} - _TEXT_FAMILIES
    for domain in _DOMAINS:
        models = folder / domain / "models"
        has_family = any(module_exists(models, name) for name in names)
        if has_family or not names.isdisjoint(_aliases(models)):
            return domain
    return ""


def _aliases(models: Path) -> set[str]:
    """Other model types of the families in a folder."""
    found: set[str] = set()
    for file in models.glob("*/__init__.py"):
        try:
            hints = read_table(file, _HINTS)
            found.update(hints.get(_HINTS, {}).get("model_type_aliases", ()))
        except ValueError:
            continue
    return found


MLX_AUDIO = Library(
    name="mlx-audio",
    package="mlx_audio",
    extra="audio",
    find_class=lambda *of: bool(_domain(*of)),
    recipes=frozenset({"mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6"}),
    # Looking for the domain itself, the library imports all models, and one of them downloads.
    arguments=lambda *of: {"model_domain": _domain(*of)},
)
