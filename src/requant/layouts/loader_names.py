"""What loaders that go by module path call the layers of a file with the source's names.

mlx-vlm renames tensors while it loads them, and then looks for a layer's own bits under the name
of its module: that name, or the same without ``language_model.`` (mlx_vlm/utils.py,
_quantization_path_aliases). It and mlx-lm stack experts that are stored one by one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

# How the packages of mlx-vlm rename what comes before a layer, one after the other.
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
    """The same entries under the names of modules, where these differ and are not another layer's.

    Args:
        entries: Layer path -> what the config says of it.

    Returns:
        Name of a module -> what the config says of the layer. Experts of one module that
        differ have no common entry.
    """
    found: dict[str, Any] = {}
    unlike: set[str] = set()
    for path, entry in entries.items():
        stack = _stacked(path)
        names = (*_renamed(path), *((stack, *_renamed(stack)) if stack else ()))
        for name in names:
            if found.setdefault(name, entry) != entry:
                unlike.add(name)
    return {k: v for k, v in found.items() if k not in unlike and k not in entries}


def _renamed(path: str) -> Iterator[str]:
    for old, new in _RENAMED:
        if path.startswith(old):
            yield new + path.removeprefix(old)


def _stacked(path: str) -> str:
    """The module that holds an expert once all of them are stacked."""
    match = _EXPERT.fullmatch(path)
    if match is None:
        return ""
    return f"{match[1]}.switch_mlp.{_PROJECTIONS.get(match[2], match[2])}"
