"""What a calibration takes, from headers alone: time, memory and disk.

Time is that of the matrix products: those of the layers, and those of the Hessians. A short product
on MLX's device, measured here and now, gives the speed.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from requant.calibration.block_run import MOST_HESSIAN_BYTES
from requant.calibration.collector import hessian_bytes
from requant.importance.layer_names import layer_key, same_input
from requant.nn.blas_products import blas_products, on_cpu
from requant.planning.plan import LayerPlan, Plan
from requant.text import format_seconds, format_size, pluralize

_SIZE = 1024  # tokens and inputs of the measured product; four times as many outputs
# Times the time of the products: what else a block computes and writes (SmolLM2-135M on a CPU).
_OVERHEAD = 1.6
_ACTIVE = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "top_k_experts")


@dataclass(frozen=True, slots=True)
class CalibrationCost:
    """What a calibration is expected to take.

    Attributes:
        tokens: Tokens of text, at most.
        hessians: Whether Hessians are collected.
        operations: Floating-point operations of matrix products.
        seconds: Time at the speed of this machine.
        memory_bytes: Memory that the largest block takes, with embedding, head and Hessians.
        disk_bytes: Room next to the output: statistics, and hidden states of the text.
    """

    tokens: int
    hessians: bool
    operations: int
    seconds: float
    memory_bytes: int
    disk_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """The cost as JSON data."""
        return asdict(self)

    def __str__(self) -> str:
        """The cost in one line."""
        what = " with Hessians" if self.hessians else ""
        return (
            f"calibration{what}: {pluralize(self.tokens, 'token')}, about "
            f"{format_seconds(self.seconds)}, {format_size(self.memory_bytes)} of memory, "
            f"{format_size(self.disk_bytes)} on the disk until the output is complete"
        )


def cost_of(plan: Plan, tokens: int, *, hessians: bool) -> CalibrationCost:
    """The cost of a calibration.

    Args:
        plan: The dense plan of the text model, as ``plan_text_model`` gives it.
        tokens: Tokens of the text.
        hessians: Whether Hessians are collected.
    """
    matrices = [layer for layer in plan.layers if len(layer.shape) > 1]
    blocks: dict[int, list[LayerPlan]] = {}
    for layer in matrices:
        key = layer_key(layer.layer)
        blocks.setdefault(-1 if key is None else key.block, []).append(layer)
    outside = blocks.pop(-1, [])
    in_blocks = [layer for block in blocks.values() for layer in block]
    share = _active_share(plan.config, in_blocks)
    operations = sum(_active(layer, share) for layer in in_blocks) * 2 * tokens
    stored = 0
    most = 0
    for block in blocks.values():
        read = _inputs(block) if hessians else []
        sizes = [hessian_bytes(prod(shape[:-2]), shape[-1]) for shape in read]
        stored += sum(sizes) // 2
        operations += sum(
            int(shape[-1] ** 2 * tokens * (share if len(shape) > 2 else 1.0)) for shape in read
        )
        weights = sum(4 * prod(layer.shape) for layer in block)
        most = max(most, weights + sum(sizes))
    width = max((layer.shape[-1] for layer in outside), default=0)
    return CalibrationCost(
        tokens=tokens,
        hessians=hessians,
        operations=operations,
        seconds=_OVERHEAD * operations / _operations_per_s(),
        memory_bytes=most + sum(4 * prod(layer.shape) for layer in outside),
        disk_bytes=stored + 2 * 4 * tokens * width,
    )


def _inputs(block: Sequence[LayerPlan]) -> list[tuple[int, ...]]:
    """Shapes of one layer of each set with the same input, none too wide for a Hessian."""
    shapes = {}
    for layer in block:
        key = layer_key(layer.layer)
        name: object = layer.layer if key is None else min(same_input(key), key=str)
        shapes[name] = layer.shape
    return [
        shape
        for shape in shapes.values()
        if hessian_bytes(prod(shape[:-2]), shape[-1]) <= MOST_HESSIAN_BYTES
    ]


def _active_share(config: Mapping[str, Any], layers: Sequence[LayerPlan]) -> float:
    """The share of a stack's experts that a token reaches."""
    experts = max((layer.shape[0] for layer in layers if len(layer.shape) > 2), default=1)
    found = [config.get(key) for key in _ACTIVE]
    active = next((n for n in found if isinstance(n, int) and 0 < n <= experts), experts)
    return active / experts


def _active(layer: LayerPlan, share: float) -> int:
    """Weights of a layer that one token is multiplied by."""
    return int(prod(layer.shape) * (share if len(layer.shape) > 2 else 1.0))


def _operations_per_s() -> float:
    """Floating-point operations a second of a layer's product, as calibration computes it."""
    import mlx.core as mx
    from mlx.nn.layers.linear import Linear

    dtype = mx.float32 if on_cpu() else mx.bfloat16
    layer, x = Linear(_SIZE, 4 * _SIZE, bias=False), mx.ones((1, _SIZE, _SIZE), dtype)
    layer.set_dtype(dtype)
    mx.eval(layer.weight, x)
    times = []
    with blas_products():
        for _ in range(3):
            began = time.perf_counter()
            mx.eval(layer(x))
            times.append(time.perf_counter() - began)
    return 8 * _SIZE**3 / max(min(times), 1e-9)
