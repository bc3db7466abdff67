"""Load a checkpoint into mlx-lm, converted in memory: ``requant.mlx_lm.load``."""

from requant.mlx_lm.generation import Generation, generate
from requant.mlx_lm.loading import Loaded, load, load_tokenizer, load_weights, load_with_report

__all__ = [
    "Generation",
    "Loaded",
    "generate",
    "load",
    "load_tokenizer",
    "load_weights",
    "load_with_report",
]
