"""The tensors of a quantized layer in a weight map, and the checks of their layout.

A layer ``P`` is quantized when ``P.weight`` (packed uint32) has ``P.scales`` next to it, and in
affine mode ``P.biases`` too. A layer's own ``P.bias`` is another thing and plays no part here.

Only the layout is checked: which names exist, the dtype and rank of the words, the leading axes
of the scales. Bits, group size and the last axis are for ``mx.quantize`` and ``mx.dequantize``
(or our kernels) to judge.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from requant.errors import (
    InvariantError,
    KeyCollisionError,
    LengthMismatchError,
    MissingKeyError,
    RankMismatchError,
    RequantError,
    ShapeMismatchError,
    UnsupportedDtypeError,
)
from requant.kernels.backend import Array, Backend, Weights
from requant.quantization.config import SKIP, PerLayerQuantization, Quantization

WEIGHT: Final = ".weight"
SCALES: Final = ".scales"
BIASES: Final = ".biases"


def layer_of(name: str, suffix: str) -> str | None:
    """The layer path of a tensor name that ends in ``suffix``, else None."""
    return name.removesuffix(suffix) if name.endswith(suffix) else None


def is_quantized(
    backend: Backend, weights: Weights, layer: str, config: PerLayerQuantization
) -> bool:
    """Whether ``{layer}.weight``, which ``weights`` holds, has scales; checks what is next to it.

    ``config`` determines the mode of the layer, and so whether it has biases.

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
    with attach_layer(layer):
        if layer + SCALES in weights:
            check_biases(layer, _quantization_of(layer, config), has_biases)
            _check_layout(backend, weights[layer + WEIGHT], weights[layer + SCALES])
            return True
        if has_biases:
            raise MissingKeyError("biases without scales", layer + SCALES)
        return False


@contextmanager
def attach_layer(layer: str) -> Iterator[None]:
    """Set ``layer`` on errors raised inside, unless they name another."""
    try:
        yield
    except RequantError as error:
        if error.layer is None:
            error.layer = layer
        raise


def check_biases(layer: str, quantization: Quantization, has_biases: bool) -> None:
    """Check that an affine layer has biases, and one of the float modes has none.

    Raises:
        MissingKeyError: An affine layer lacks them.
        KeyCollisionError: A layer of another mode has them.
    """
    mode = quantization.mode
    if mode.has_biases and not has_biases:
        raise MissingKeyError(f"mode {mode} needs biases", layer + BIASES)
    if has_biases and not mode.has_biases:
        raise KeyCollisionError(f"mode {mode} has no biases", layer + BIASES)


def _quantization_of(layer: str, config: PerLayerQuantization) -> Quantization:
    """The quantization of a layer that has scales."""
    if config.per_layer.get(layer) is SKIP:
        raise KeyCollisionError("the config skips this layer, yet it has scales", layer + SCALES)
    quantization = config.quantization_for(layer)
    if quantization is None:
        raise InvariantError(
            "the layer has scales, but the config has neither a default quantization nor an "
            "entry for it"
        )
    return quantization


def _check_layout(backend: Backend, words: Array, scales: Array) -> None:
    dtype = backend.dtype(words)
    if dtype != "uint32":
        message = "scales are next to a weight that is not packed"
        raise UnsupportedDtypeError(message, dtype, ["uint32"])
    expected, actual = backend.shape(words), backend.shape(scales)
    if len(expected) < 2:
        raise RankMismatchError("a packed weight has two axes or more", len(expected), expected)
    if len(actual) != len(expected):
        raise LengthMismatchError("scales and weight differ in rank", len(expected), len(actual))
    if actual[:-1] != expected[:-1]:
        message = "scales and weight agree in all axes but the last"
        raise ShapeMismatchError(message, expected[:-1], actual[:-1])
