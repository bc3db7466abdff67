"""Module paths under which loaders look for the layers of a file with the source's names.

mlx-vlm renames tensors while it loads them, and then looks for a layer's own bits under the path
of its module, with or without ``language_model.`` (mlx_vlm/utils.py,
_quantization_path_aliases). mlx-vlm and mlx-lm stack experts that are stored one by one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

# Prefixes of layer paths in files, and what models of mlx-vlm rename them to.
_RENAMED = (
    ("model.language_model.", "language_model.model."),
    ("model.text_model.", "language_model."),
    ("llm.", "language_model."),
    ("model.visual.", "vision_tower."),
    ("visual.", "vision_tower."),
    ("vit.", "vision_tower."),
    ("vpm.", "vision_tower."),
    ("model.vision_model.", "vision_tower."),
    ("model.vision_model.", "vision_model."),
    ("vision_model.", "vision_tower."),
    ("model.vision_tower.", "vision_tower."),
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("vision_tower.", "vision_tower.vision_model."),
    ("model.audio_tower.", "audio_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.connector.", "connector."),
    ("model.embed_vision.", "embed_vision."),
    ("model.embed_audio.", "embed_audio."),
)
_EXPERT = re.compile(r"(.+)\.experts\.\d+\.(\w+)")
_PROJECTIONS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def module_names(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a config under module paths that differ from the layer paths.

    Args:
        entries: Layer path -> its entry in the config.

    Returns:
        Module path -> entry. There is none where experts of one module differ.
    """
    renamed: dict[str, Any] = {}
    ambiguous: set[str] = set()
    for path, entry in entries.items():
        stack = _stacked(path)
        for name in (*_renamed(path), *((stack, *_renamed(stack)) if stack else ())):
            if renamed.setdefault(name, entry) != entry:
                ambiguous.add(name)
    return {k: v for k, v in renamed.items() if k not in ambiguous and k not in entries}


def _renamed(path: str) -> Iterator[str]:
    for old, new in _RENAMED:
        if path.startswith(old):
            yield new + path.removeprefix(old)


def _stacked(path: str) -> str:
    """The module of an expert once all of them are stacked; "" for other layers."""
    match = _EXPERT.fullmatch(path)
    return f"{match[1]}.switch_mlp.{_PROJECTIONS.get(match[2], match[2])}" if match else ""
