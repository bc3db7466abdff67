"""ParoQuant's rotation of inputs in MLX: plain operations anywhere, one kernel on Metal.

The kernel is used on the GPU only, and only if it agrees with the plain operations on a small
random input; ``REQUANT_PLAIN_ROTATION=1`` turns it off.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, Final, cast

import mlx.core as mx

PLAIN: Final = "REQUANT_PLAIN_ROTATION"
MAX_GROUP: Final = 2048  # two inputs a thread, 1024 threads

# One threadgroup rotates one group of one row; a thread holds one pair of each round. Pairs of a
# round are disjoint, so that threads wait for each other between rounds only. A pair that is not
# rotated is not written either: no-op rounds may name an input twice.
KERNEL: Final = """
    uint lane = thread_position_in_threadgroup.x;
    uint group = threadgroup_position_in_grid.y;
    uint row = threadgroup_position_in_grid.z;
    threadgroup float values[GROUP];
    uint first = group * GROUP;
    size_t start = size_t(row) * INPUTS + first;
    for (uint k = lane; k < GROUP; k += GROUP / 2) {
        values[k] = float(x[start + k]) * scales[first + k];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint step = 0; step < ROUNDS; step++) {
        uint pair = step * (INPUTS / 2) + group * (GROUP / 2) + lane;
        float c = cosines[pair];
        float s = sines[pair];
        if (s != 0.0f || c != 1.0f) {
            uint i = uint(pairs[2 * pair]);
            uint j = uint(pairs[2 * pair + 1]);
            float left = values[i];
            float right = values[j];
            values[i] = c * left + s * right;
            values[j] = c * right - s * left;
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    for (uint k = lane; k < GROUP; k += GROUP / 2) {
        out[start + k] = T(values[k]);
    }
"""


class Rotation:
    """The rotation of one layer's inputs, prepared once.

    ``theta`` are angles ``[rounds, in / 2]``, ``pairs`` integers ``[rounds, in]`` counted within a
    group (2t and 2t + 1 are a pair), ``channel_scales`` ``[1, in]`` or ``[in]``, multiplied first;
    ``group`` inputs are rotated together.
    """

    def __init__(
        self, theta: mx.array, pairs: mx.array, channel_scales: mx.array, group: int
    ) -> None:
        self.group = group
        self.scales = channel_scales.reshape(-1).astype(mx.float32)
        angles = theta.astype(mx.float32)
        self.cosines, self.sines = mx.cos(angles), mx.sin(angles)
        self.pairs = pairs.astype(mx.int32)
        self._steps: list[tuple[mx.array, mx.array, mx.array]] = []
        mx.eval(self.scales, self.cosines, self.sines, self.pairs)

    def __call__(self, x: mx.array) -> mx.array:
        """``x`` ``[..., in]`` scaled and rotated in float32, in its own dtype."""
        if x.size and self.group <= MAX_GROUP and uses_metal(x.dtype):
            return self.on_metal(x)
        return self.plain(x)

    def plain(self, x: mx.array) -> mx.array:
        """Rotate with operations that every backend of MLX has."""
        if not self._steps:
            self._steps = [self._step(number) for number in range(self.pairs.shape[0])]
            mx.eval(self._steps)
        rotated = x.astype(mx.float32) * self.scales
        for partners, cos, sin in self._steps:
            rotated = rotated * cos + mx.take(rotated, partners, axis=-1) * sin
        return rotated.astype(x.dtype)

    def _step(self, number: int) -> tuple[mx.array, mx.array, mx.array]:
        """For each input: its partner, the cosine, and the sine with its sign."""
        count = self.pairs.shape[1]
        starts = mx.arange(count) // self.group * self.group
        listed = self.pairs[number] + starts
        other = listed.reshape(-1, 2)[:, ::-1].reshape(-1)
        sign = mx.where(mx.arange(count) % 2 == 0, 1.0, -1.0)
        # Inputs that no pair names keep themselves: the angle of a no-op round is 0.
        partners, cos, sin = mx.arange(count), mx.ones(count), mx.zeros(count)
        partners[listed] = other
        cos[listed] = mx.repeat(self.cosines[number], 2)
        sin[listed] = mx.repeat(self.sines[number], 2) * sign
        return partners, cos, sin

    def on_metal(self, x: mx.array) -> mx.array:
        """Rotate with the kernel; gradients come from the plain operations."""

        @mx.custom_function
        def rotated(x: mx.array) -> mx.array:
            return self.launch(x)

        @rotated.vjp
        def gradient(x: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
            return mx.vjp(self.plain, [x], [cotangent])[1][0]

        return cast(mx.array, rotated(x))

    def launch(self, x: mx.array) -> mx.array:
        """Run the kernel, without gradients."""
        rounds, count = self.pairs.shape
        sizes = {"GROUP": self.group, "INPUTS": count, "ROUNDS": rounds}
        (out,) = kernel()(
            inputs=[x, self.scales, self.cosines, self.sines, self.pairs],
            template=[("T", x.dtype), *sizes.items()],
            grid=(self.group // 2, count // self.group, x.size // count),
            threadgroup=(self.group // 2, 1, 1),
            output_shapes=[x.shape],
            output_dtypes=[x.dtype],
        )
        return cast(mx.array, out)


@cache
def kernel() -> Callable[..., Any]:
    """The kernel, compiled by MLX when it is called first."""
    compiled = mx.fast.metal_kernel(
        name="requant_rotation",
        input_names=["x", "scales", "cosines", "sines", "pairs"],
        output_names=["out"],
        source=KERNEL,
    )
    return cast(Callable[..., Any], compiled)


def uses_metal(dtype: mx.Dtype) -> bool:
    """Whether rotations of ``dtype`` go through the kernel here."""
    if os.environ.get(PLAIN, "") not in ("", "0") or not mx.metal.is_available():
        return False
    return mx.default_device() == mx.Device(mx.gpu) and _kernel_matches_reference(dtype)


_TOLERANCE = {mx.float32: 1e-5, mx.float16: 2e-3, mx.bfloat16: 2e-2}


@cache
def _kernel_matches_reference(dtype: mx.Dtype) -> bool:
    """Whether the kernel agrees with the plain operations; tried once for each dtype."""
    if dtype not in _TOLERANCE:
        return False
    rounds, group, groups = 3, 64, 2
    key = mx.random.key(7)
    order = [mx.random.permutation(group, key=mx.random.key(n)) for n in range(rounds * groups)]
    pairs = mx.concatenate(order).reshape(rounds, group * groups)
    theta = mx.random.normal((rounds, group * groups // 2), key=key)
    scales = mx.random.uniform(0.5, 2.0, (group * groups,), key=key)
    rotation = Rotation(theta, pairs, scales, group)
    x = mx.random.normal((3, group * groups), key=key).astype(dtype)
    try:
        expected, actual = (y.astype(mx.float32) for y in (rotation.plain(x), rotation.launch(x)))
        tolerance = _TOLERANCE[dtype]
        if bool(mx.allclose(actual, expected, rtol=tolerance, atol=tolerance)):
            return True
        why = f"is off by {mx.abs(actual - expected).max().item():.2g} in a trial"
    except Exception as error:
        why = f"cannot be run ({error})"
    warnings.warn(
        f"requant's Metal kernel for rotations {why}: plain operations take its place",
        RuntimeWarning,
        stacklevel=2,
    )
    return False
