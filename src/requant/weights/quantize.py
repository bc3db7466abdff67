"""Quantize and dequantize a whole weight map, by tensor names alone."""

from __future__ import annotations

from collections.abc import Callable

from requant.errors import InvariantError, MissingKeyError, OutOfRangeError
from requant.kernels.backend import Array, Backend, Weights, backend_for
from requant.quantization.config import PerLayerQuantization, Quantization
from requant.quantization.roles import rows_are_tokens
from requant.weights.layer_tensors import (
    BIASES,
    SCALES,
    WEIGHT,
    attach_layer,
    check_biases,
    is_quantized,
    layer_of,
)


def default_eligible(path: str, weight: Array) -> bool:
    """Every ``.weight`` may be quantized.

    The shape still decides. Where the architecture is known, a narrower rule is safer: a norm
    with a two-axis weight, say, would be quantized as well.

    Args:
        path: The layer's path: the tensor's name without ``.weight``.
        weight: The tensor.

    Returns:
        True.
    """
    return True


def quantize_weights(
    weights: Weights,
    config: PerLayerQuantization,
    eligible: Callable[[str, Array], bool] = default_eligible,
    *,
    search: str = "off",
) -> dict[str, Array]:
    """Quantize the eligible layers of a weight map.

    A ``{layer}.weight`` is quantized if ``eligible`` says so, ``config`` has a quantization for
    the layer, and the array has two axes or more, the last a multiple of ``group_size``. Of
    shape ``(..., out, in)``, it becomes

    * ``{layer}.weight``, uint32, ``(..., out, in * bits / 32)``: codes packed along the input
      axis, first code in the lowest bits;
    * ``{layer}.scales``, ``(..., out, in / group_size)``: the weight's dtype in affine mode,
      uint8 in the float modes;
    * ``{layer}.biases``, like the scales, in affine mode only.

    Every other entry passes through as the same array, layers that are quantized already among
    them. ``weights`` is not modified, and MLX arrays stay lazy: nothing is evaluated.

    Args:
        weights: Tensor name to array, as ``mx.load`` returns it; NumPy arrays work the same.
        config: The default quantization and the per-layer overrides.
        eligible: Called as ``eligible(layer, array)``; true means quantize.
        search: NumPy arrays only: "fast" or "best" look for scales and biases with a smaller
            weighted error at the same size (docs/quantization/search.md); "off" is MLX's rule.

    Returns:
        A new weight map, of the library that came in.

    Raises:
        MissingKeyError: A layer has ``.biases`` but no ``.scales``, or is affine and has
            ``.scales`` but no ``.biases``.
        KeyCollisionError: A layer that the config skips has ``.scales``, or one of a float mode
            has ``.biases``.
        InvariantError: A layer has ``.scales`` and no quantization in the config, or the map
            mixes array libraries, or a search is asked for on MLX arrays.
        UnknownValueError: No such search.
        UnsupportedDtypeError: ``.scales`` next to a weight that is not uint32, a NumPy weight
            that is not float32, float16 or bfloat16, or an unsupported array type.
        RankMismatchError, LengthMismatchError, ShapeMismatchError: The shapes of a layer that
            is quantized already contradict each other.
        OutOfRangeError: ``group_size`` is negative; on NumPy also one that the mode lacks, and
            so with ``bits``.
        BackendError: ``mx.quantize`` rejected a layer.

    Example:
        >>> import mlx.core as mx
        >>> weights = {"up.weight": mx.ones((8, 64)), "norm.weight": mx.ones(64)}
        >>> config = PerLayerQuantization.from_global(Quantization.affine(64, 4))
        >>> quantized = quantize_weights(weights, config)
        >>> sorted(quantized)
        ['norm.weight', 'up.biases', 'up.scales', 'up.weight']
        >>> quantized["up.weight"].shape
        (8, 8)
    """
    weights = dict(weights)
    backend = backend_for(weights)
    targets = _targets(backend, weights, config, eligible)
    result: dict[str, Array] = {}
    for name, array in weights.items():
        layer = layer_of(name, WEIGHT)
        if layer is None or layer not in targets:
            result[name] = array
            continue
        with attach_layer(layer):
            words, scales, biases = backend.quantize(
                array, targets[layer], search, rows_are_tokens(layer)
            )
        result[layer + WEIGHT] = words
        result[layer + SCALES] = scales
        if biases is not None:
            result[layer + BIASES] = biases
    return result


def dequantize_weights(weights: Weights, config: PerLayerQuantization) -> dict[str, Array]:
    """Dequantize every quantized layer of a weight map.

    Each layer with ``.weight`` and ``.scales`` becomes one ``{layer}.weight`` of shape
    ``(..., out, in)``: in affine mode of the common dtype of scales and biases, in the float
    modes bfloat16. Every other entry passes through as the same array; so do ``.scales`` and
    ``.biases`` that have no ``.weight``, and ``.biases`` next to a dense one. ``weights`` is not
    modified, and MLX arrays stay lazy: nothing is evaluated.

    Args:
        weights: Tensor name to array. Scale bytes of the float modes are uint8, or on NumPy
            the ml_dtypes number format they hold.
        config: The quantization of each layer.

    Returns:
        A new weight map, of the library that came in.

    Raises:
        MissingKeyError: An affine layer lacks ``.biases``, or a packed weight has ``.biases``
            but no ``.scales``.
        KeyCollisionError: A layer of a float mode has ``.biases``.
        InvariantError: The config has no quantization for a quantized layer (or skips it), or
            the map mixes array libraries.
        RequantError: The parts of a layer do not fit together: ``BackendError`` where
            ``mx.dequantize`` says so, a class of its own where our kernels do.

    Example:
        >>> import numpy as np
        >>> weights = {
        ...     "up.weight": np.array([[0x76543210, 0, 0, 0xF0000000]], np.uint32),
        ...     "up.scales": np.array([[0.5]], np.float32),
        ...     "up.biases": np.array([[-1.0]], np.float32),
        ... }
        >>> config = PerLayerQuantization.from_global(Quantization.affine(32, 4))
        >>> dense = dequantize_weights(weights, config)["up.weight"]
        >>> dense[0, :4].tolist(), float(dense[0, 31])
        ([-1.0, -0.5, 0.0, 0.5], 6.5)
    """
    weights = dict(weights)
    backend = backend_for(weights)
    _reject_missing_scales(backend, weights)
    quantized = {
        layer
        for name in weights
        if (layer := layer_of(name, SCALES)) is not None and layer + WEIGHT in weights
    }
    result: dict[str, Array] = {}
    for name, array in weights.items():
        if (layer := layer_of(name, WEIGHT)) in quantized and layer is not None:
            result[name] = _dequantize_layer(backend, weights, layer, config)
        elif layer_of(name, SCALES) not in quantized and layer_of(name, BIASES) not in quantized:
            result[name] = array
    return result


def _targets(
    backend: Backend,
    weights: Weights,
    config: PerLayerQuantization,
    eligible: Callable[[str, Array], bool],
) -> dict[str, Quantization]:
    """The layers to quantize; the whole map is checked before the first is touched."""
    targets = {}
    for name, array in weights.items():
        layer = layer_of(name, WEIGHT)
        # The tensors next to a weight are checked whether or not it is to be quantized.
        if layer is None:
            continue
        if is_quantized(backend, weights, layer, config) or not eligible(layer, array):
            continue
        found = config.quantization_for(layer)
        if found is not None and _fits(layer, backend.shape(array), found.group_size):
            targets[layer] = found
    return targets


def _fits(layer: str, shape: tuple[int, ...], group_size: int) -> bool:
    """Whether a weight of this shape can be cut into groups; others stay dense."""
    if len(shape) < 2:
        return False
    if group_size < 0:
        raise OutOfRangeError("must not be negative", "group_size", group_size, layer=layer)
    return group_size != 0 and shape[-1] % group_size == 0


def _reject_missing_scales(backend: Backend, weights: Weights) -> None:
    """A packed weight with biases and no scales would pass for a dense one."""
    for name in weights:
        layer = layer_of(name, BIASES)
        if layer is None or layer + SCALES in weights or layer + WEIGHT not in weights:
            continue
        weight = weights[layer + WEIGHT]
        if backend.dtype(weight) == "uint32" and len(backend.shape(weight)) >= 2:
            raise MissingKeyError(
                "a packed weight has biases but no scales", layer + SCALES, layer=layer
            )


def _dequantize_layer(
    backend: Backend, weights: Weights, layer: str, config: PerLayerQuantization
) -> Array:
    biases = weights.get(layer + BIASES)
    with attach_layer(layer):
        quantization = config.quantization_for(layer)
        if quantization is None:
            raise InvariantError("the layer has scales, but the config has no quantization for it")
        check_biases(layer, quantization, biases is not None)
        words, scales = weights[layer + WEIGHT], weights[layer + SCALES]
        return backend.dequantize(words, scales, biases, quantization)
