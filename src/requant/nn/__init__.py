"""Layers that stock MLX lacks, and faster products of its own layers on a CPU.

``rotated_linear`` has quantized linear layers with rotated inputs (ParoQuant); ``blas_products``
computes the products of float32 layers with NumPy's BLAS.
"""

from requant.nn.rotated_linear import RotateQuantizedExperts, RotateQuantizedLinear, rotate_layers

__all__ = ["RotateQuantizedExperts", "RotateQuantizedLinear", "rotate_layers"]
