"""Quantized linear layers with rotated inputs, for models of mlx-lm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.nn.layers.linear import Linear
from mlx.nn.layers.quantized import QuantizedLinear
from mlx.utils import tree_unflatten

from requant.nn.rotation import Rotation


class _Rotated(Module):
    """Base of layers with rotated inputs: the parameters of the rotation, and its use."""

    def add_rotation(self, input_dims: int, rounds: int, rotation_group: int) -> None:
        """Add the parameters of an identity rotation."""
        self.rotation_group = rotation_group
        self.theta = mx.zeros((rounds, input_dims // 2))
        pairs = mx.arange(input_dims) % rotation_group
        self.pairs = mx.broadcast_to(pairs, (rounds, input_dims)).astype(mx.int16)
        self.channel_scales = mx.ones((1, input_dims))
        self._rotation: Rotation | None = None

    def rotate(self, x: mx.array) -> mx.array:
        """``x`` ``[..., in]`` scaled and rotated, in its own dtype."""
        if self._rotation is None:
            given = (self.theta, self.pairs, self.channel_scales)
            self._rotation = Rotation(*given, self.rotation_group)
        return self._rotation(x)


class RotateQuantizedLinear(QuantizedLinear, _Rotated):
    """ParoQuant's layer: scale the inputs, rotate them in pairs, then the quantized product.

    In each round the inputs of a group are paired off, and each pair is rotated by an angle
    (z-lab/paroquant, paroquant/optim/rotation.py)::

        x = x * channel_scales
        (x_i, x_j) = (cos a * x_i + sin a * x_j, cos a * x_j - sin a * x_i)

    The rotation is computed in float32 whatever the dtype of the inputs, and rounded once; on
    Metal by a kernel of requant's own (``requant.nn.rotation``), elsewhere by plain operations.

    Args:
        input_dims: Inputs.
        output_dims: Outputs.
        bias: Whether a bias is added.
        group_size: Inputs with one scale.
        bits: Bits a code.
        rounds: The number of rounds.
        rotation_group: Inputs that are rotated together.

    Parameters next to those of ``nn.QuantizedLinear``: ``theta`` ``[rounds, in / 2]``, ``pairs``
    integers ``[rounds, in]`` counted within a group (2t and 2t + 1 are a pair), and
    ``channel_scales`` ``[1, in]`` or ``[in]``.
    """

    def __init__(
        self,
        input_dims: int,
        output_dims: int,
        bias: bool = True,
        group_size: int = 128,
        bits: int = 4,
        rounds: int = 8,
        rotation_group: int = 128,
    ) -> None:
        super().__init__(input_dims, output_dims, bias, group_size, bits)
        self.add_rotation(input_dims, rounds, rotation_group)
        self.freeze()

    def __call__(self, x: mx.array) -> mx.array:
        """The layer's outputs ``[..., out]``."""
        result: mx.array = super().__call__(self.rotate(x))  # type: ignore[no-untyped-call]
        return result


class RotateQuantizedExperts(_Rotated):
    """The same for the stacked experts of a layer: one rotation, and a product for each expert.

    It is used where mlx-lm has a quantized ``SwitchLinear``, and is called like one. Arguments are
    those of ``RotateQuantizedLinear``, with the number of experts; ``output_dims`` counts the
    outputs of each.

    Parameters: ``weight``, ``scales`` and ``biases`` ``[experts, out, ...]``, ``bias``
    ``[experts, out]``, and those of the rotation.
    """

    def __init__(
        self,
        input_dims: int,
        output_dims: int,
        num_experts: int,
        bias: bool = False,
        group_size: int = 128,
        bits: int = 4,
        rounds: int = 8,
        rotation_group: int = 128,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.group_size, self.bits = group_size, bits
        weight = mx.zeros((num_experts, output_dims, input_dims))
        self.weight, self.scales, self.biases = mx.quantize(weight, group_size, bits)
        if bias:
            self.bias = mx.zeros((num_experts, output_dims))
        self.add_rotation(input_dims, rounds, rotation_group)
        self.freeze()

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """Outputs ``[..., 1, out]`` of the experts that ``indices`` name."""
        result = mx.gather_qmm(
            self.rotate(x),
            self.weight,
            self.scales,
            self.biases,
            rhs_indices=indices,
            transpose=True,
            group_size=self.group_size,
            bits=self.bits,
            sorted_indices=sorted_indices,
        )
        return result + mx.expand_dims(self.bias[indices], -2) if "bias" in self else result


class _Rotatable(Module):
    """A layer that becomes a rotated one when mlx-lm quantizes the model."""

    def __init__(self, layer: Any, theta: mx.array, rotation_group: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.weight = layer.weight
        if "bias" in layer:
            self.bias = layer.bias
        self._rounds, self._group = theta.shape[0], rotation_group

    def to_quantized(
        self,
        group_size: int | None = None,
        bits: int | None = None,
        mode: str = "affine",
        quantize_input: bool = False,
    ) -> RotateQuantizedLinear | RotateQuantizedExperts:
        """The rotated layer, for ``nn.quantize``, with the group size and bits of the config."""
        *experts, output_dims, input_dims = self.weight.shape
        codes = ("bias" in self, group_size or 128, bits or 4, self._rounds, self._group)
        if experts:
            return RotateQuantizedExperts(input_dims, output_dims, experts[0], *codes)
        return RotateQuantizedLinear(input_dims, output_dims, *codes)


def rotate_layers(model: Any, weights: Mapping[str, mx.array], rotation_group: int | None) -> None:
    """Replace every linear layer that has a rotation among ``weights`` by a rotated one.

    Call it before ``nn.quantize`` goes over ``model``, a built model of mlx-lm. Weights are under
    the model's own names; ``{layer}.theta`` marks a rotation of ``rotation_group`` inputs each.

    Raises:
        ValueError: The model has no linear layer of that name, or the config no group.
    """
    from mlx_lm.models.switch_layers import SwitchLinear

    layers = dict(model.named_modules())
    rotated = []
    for name, theta in weights.items():
        path = name.removesuffix(".theta")
        if path == name or f"{path}.pairs" not in weights:
            continue
        if not isinstance(layers.get(path), (Linear, SwitchLinear)) or not rotation_group:
            raise ValueError(f"{path} has a rotation, but is not a linear layer of the model")
        rotated.append((path, _Rotatable(layers[path], theta, rotation_group)))
    if rotated:
        model.update_modules(tree_unflatten(rotated))
