"""The MLX libraries: what each can load, how it converts, and how it runs a model."""

from __future__ import annotations

from requant.libraries.base import (
    NO_CLASS_HINT,
    LayoutError,
    Library,
    Request,
    UnknownModelError,
)
from requant.libraries.mlx_audio import MLX_AUDIO
from requant.libraries.mlx_embeddings import MLX_EMBEDDINGS
from requant.libraries.mlx_lm import MLX_LM
from requant.libraries.mlx_vlm import MLX_VLM

__all__ = [
    "LIBRARIES",
    "MLX_LM",
    "NO_CLASS_HINT",
    "LayoutError",
    "Library",
    "Request",
    "UnknownModelError",
]

LIBRARIES = {x.name: x for x in (MLX_LM, MLX_VLM, MLX_AUDIO, MLX_EMBEDDINGS)}
"""Every library by its name, which is also the value of ``--layout``."""
