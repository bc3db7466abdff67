"""mx.quantize and mx.dequantize on the CPU, NumPy arrays in and out."""

import mlx.core as mx
import numpy as np

from tests.support.mlx_reference import to_mx, to_numpy

_NAMES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


def to_mlx(array):
    return to_mx(np.ascontiguousarray(array))


def mlx_quantize(w, group_size, bits, mode, global_scale=None):
    scale = None if global_scale is None else mx.array(global_scale, mx.float32)
    with mx.stream(mx.cpu):
        parts = mx.quantize(to_mlx(w), group_size, bits, mode, global_scale=scale)
        return [to_numpy(part) for part in parts]


def mlx_dequantize(words, scales, biases, group_size, bits, mode, *, dtype=None, global_scale=None):
    scale = None if global_scale is None else mx.array(global_scale, mx.float32)
    with mx.stream(mx.cpu):
        return to_numpy(
            mx.dequantize(
                to_mlx(words),
                to_mlx(scales),
                None if biases is None else to_mlx(biases),
                group_size,
                bits,
                mode,
                global_scale=scale,
                dtype=None if dtype is None else _NAMES[dtype.name],
            )
        )
