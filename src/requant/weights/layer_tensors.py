"""The tensors of a quantized layer in a weight map, and the checks of their layout.

A layer ``P`` is quantized when ``P.weight`` (packed uint32) has ``P.scales`` next to it, and in
affine mode ``P.biases`` too. A layer's own ``P.bias`` is another thing and plays no part here.

Only the layout is checked: which names exist, the dtype and rank of the words, the leading axes
of the scales. Bits, group size and the last axis are for ``mx.quantize`` and ``mx.dequantize``
(or our kernels) to judge.
"""

from __future__ import annotations

import enum
from typing import Final

from requant.errors import (
    InvariantError,
    KeyCollisionError,
    LengthMismatchError,
    MissingKeyError,
    RankMismatchError,
    ShapeMismatchError,
    UnsupportedDtypeError,
)
from requant.kernels.backend import Array, Backend, Weights
from requant.quantization.config import SKIP, PerLayerQuantization, Quantization

WEIGHT: Final = ".weight"
SCALES: Final = ".scales"
BIASES: Final = ".biases"


class QuantizedState(enum.Enum):
    """Whether a layer is quantized, judged by the tensors next to its weight."""

    DENSE = "absent"  # neither scales nor biases: a dense weight
    QUANTIZED = "valid"  # the layer is quantized already


def layer_of(name: str, suffix: str) -> str | None:
    """The layer path of a tensor name that ends in ``suffix``, else None."""
    return name.removesuffix(suffix) if name.endswith(suffix) else None


def quantized_state(
    backend: Backend, weights: Weights, layer: str, config: PerLayerQuantization
) -> QuantizedState:
    """Check the tensors next to ``{layer}.weight``.

    Args:
        backend: For the arrays of ``weights``.
        weights: The whole weight map; it holds ``{layer}.weight``.
        layer: The layer path.
        config: Determines the mode of the layer, and so whether it has biases.

    Returns:
        ``QuantizedState.DENSE`` or ``QuantizedState.QUANTIZED``.

    Raises:
        MissingKeyError: ``.biases`` without ``.scales``, or an affine layer without ``.biases``.
        KeyCollisionError: ``.scales`` in a layer that the config skips, or ``.biases`` in a mode
            that has none.
        InvariantError: ``.scales``, but the config says nothing about the layer.
        UnsupportedDtypeError: ``.scales`` next to a weight that is not uint32.
        RankMismatchError: The packed weight has fewer than two axes.
        LengthMismatchError: ``.scales`` and ``.weight`` differ in rank.
        ShapeMismatchError: They differ in an axis other than the last.
    """
    has_biases = layer + BIASES in weights
    if layer + SCALES not in weights:
        if has_biases:
            raise MissingKeyError("biases without scales", layer + SCALES, layer=layer)
        return QuantizedState.DENSE
    quantization = _quantization_of(layer, config)
    check_biases(layer, quantization, has_biases)
    _check_layout(backend, layer, weights[layer + WEIGHT], weights[layer + SCALES])
    return QuantizedState.QUANTIZED


def check_biases(layer: str, quantization: Quantization, has_biases: bool) -> None:
    """Affine layers have biases, layers of the float modes have none.

    Raises:
        MissingKeyError: An affine layer lacks them.
        KeyCollisionError: A layer of another mode has them.
    """
    mode = quantization.mode
    if mode.has_biases and not has_biases:
        raise MissingKeyError(f"mode {mode} needs biases", layer + BIASES, layer=layer)
    if has_biases and not mode.has_biases:
        raise KeyCollisionError(f"mode {mode} has no biases", layer + BIASES, layer=layer)


def _quantization_of(layer: str, config: PerLayerQuantization) -> Quantization:
    """The quantization of a layer that has scales."""
    if config.per_layer.get(layer) is SKIP:
        raise KeyCollisionError(
            "the config skips this layer, yet it has scales", layer + SCALES, layer=layer
        )
    quantization = config.quantization_for(layer)
    if quantization is None:
        raise InvariantError(
            "the layer has scales, but the config has neither a default quantization nor an "
            "entry for it",
            layer=layer,
        )
    return quantization


def _check_layout(backend: Backend, layer: str, words: Array, scales: Array) -> None:
    dtype = backend.dtype(words)
    if dtype != "uint32":
        raise UnsupportedDtypeError(
            "scales are next to a weight that is not packed", dtype, ["uint32"], layer=layer
        )
    expected, actual = backend.shape(words), backend.shape(scales)
    if len(expected) < 2:
        raise RankMismatchError(
            "a packed weight has two axes or more", len(expected), expected, layer=layer
        )
    if len(actual) != len(expected):
        raise LengthMismatchError(
            "scales and weight differ in rank", len(expected), len(actual), layer=layer
        )
    if actual[:-1] != expected[:-1]:
        raise ShapeMismatchError(
            "scales and weight agree in all axes but the last",
            expected[:-1],
            actual[:-1],
            layer=layer,
        )
