"""What loaders that go by module path call the layers of a file with the source's names.

mlx-vlm renames tensors while it loads them, and then looks for a layer's own bits under the name
of its module. It tries that name, and the same without ``language_model.`` (mlx_vlm/utils.py,
_quantization_path_aliases).
"""

from __future__ import annotations

from collections.abc import Iterable

# Renamings that every model package of mlx-vlm with such names does.
_RENAMED = (
    ("model.language_model.", "language_model.model."),
    ("language_model.model.", "language_model.model."),
    ("model.visual.", "vision_tower."),
    ("visual.", "vision_tower."),
    ("model.vision_tower.", "vision_tower."),
    ("model.audio_tower.", "audio_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.embed_vision.", "embed_vision."),
    ("model.embed_audio.", "embed_audio."),
    ("llm.model.", "language_model.model."),
    ("llm.", "language_model."),
)


def module_names(paths: Iterable[str]) -> dict[str, str]:
    """Path -> what mlx-vlm calls it, where that differs and is no other layer's path."""
    paths = tuple(paths)
    taken = frozenset(paths)
    found: dict[str, str] = {}
    for path in paths:
        for old, new in _RENAMED:
            if path.startswith(old):
                name = new + path.removeprefix(old)
                if name != path and name not in taken:
                    found[path] = name
                break
    return found
