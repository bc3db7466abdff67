"""Load a vision model into mlx-vlm, converted in memory: ``requant.mlx_vlm.load``."""

from requant.mlx_vlm.generation import generate
from requant.mlx_vlm.image_prompts import check_images
from requant.mlx_vlm.loading import Loaded, load, load_with_report

__all__ = ["Loaded", "check_images", "generate", "load", "load_with_report"]
