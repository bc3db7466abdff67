"""Layers that stock MLX has not: a quantized product of rotated inputs (ParoQuant)."""

from requant.nn.rotated_linear import RotateQuantizedExperts, RotateQuantizedLinear, rotate_layers

__all__ = ["RotateQuantizedExperts", "RotateQuantizedLinear", "rotate_layers"]
