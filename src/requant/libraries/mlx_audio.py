"""mlx-audio: ``mlx_audio/{tts,stt,...}/models/{family}/``, found by config and folder name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from requant.libraries.base import Library, module_exists, read_table

_HINTS = "DETECTION_HINTS"  # of a family: {"model_type_aliases": {...}, ...}
# Text models that are parts of audio models too: their type alone says nothing of sound.
_TEXT_FAMILIES = frozenset({"llama", "qwen3", "dense", "mimo"})


def _find_class(folder: Path, config: Mapping[str, Any]) -> bool:
    words = (config.get(key) for key in ("model_type", "name", "_class_name"))
    names = {word.lower() for word in words if isinstance(word, str)} - _TEXT_FAMILIES
    for models in folder.glob("*/models"):
        if any(module_exists(models, name) for name in names if name != "base"):
            return True
        if not names.isdisjoint(_aliases(models)):
            return True
    return False


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
    find_class=_find_class,
    recipes=frozenset({"mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6"}),
)
