"""What a model takes next to text, by its config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Modalities(NamedTuple):
    """Whether a model takes images, and whether it takes sound."""

    images: bool
    sound: bool


def modalities(config: Mapping[str, Any]) -> Modalities:
    """The inputs other than text that a config describes, itself or one of its parts."""
    parts = [config, *(x for x in config.values() if isinstance(x, Mapping))]
    return Modalities(
        images=any(part.get("vision_config") for part in parts),
        sound=any(part.get("audio_config") for part in parts),
    )
