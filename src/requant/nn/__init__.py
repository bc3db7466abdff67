"""Layers that stock MLX lacks, and faster products of its own layers on a CPU.

``rotated_linear`` has quantized linear layers with rotated inputs (ParoQuant); ``blas_products``
computes the products of float32 layers with NumPy's BLAS.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from requant.nn.rotated_linear import (
        RotateQuantizedExperts,
        RotateQuantizedLinear,
        rotate_layers,
    )

__all__ = ["RotateQuantizedExperts", "RotateQuantizedLinear", "rotate_layers"]


def __getattr__(name: str) -> Any:
    """Import a layer when it is used: MLX is needed for the layers, not for their neighbours."""
    if name in __all__:
        from requant.nn import rotated_linear

        return getattr(rotated_linear, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
