"""Layers that stock MLX lacks: quantized linear layers with rotated inputs (ParoQuant)."""

from requant.nn.rotated_linear import RotateQuantizedExperts, RotateQuantizedLinear, rotate_layers

__all__ = ["RotateQuantizedExperts", "RotateQuantizedLinear", "rotate_layers"]
