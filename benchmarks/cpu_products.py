"""Time of matrix products on a CPU: MLX's own and NumPy's, as calibration and evaluation use them.

    python benchmarks/cpu_products.py

Prints for each product the processor time of MLX divided by that of NumPy: a layer of 1536 inputs
and 576 outputs over 512 tokens, and attention of 9 heads over 512 tokens.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from requant.nn.blas_products import blas_products

_REPEATS = 5


def seconds(run: Callable[[], mx.array]) -> float:
    """Median processor time of a run, in seconds."""
    mx.eval(run())
    times = []
    for _ in range(_REPEATS):
        began = time.process_time()
        mx.eval(run())
        times.append(time.process_time() - began)
    return statistics.median(times)


def main() -> None:
    """Print the table."""
    linear, x = nn.Linear(1536, 576, bias=False), mx.random.normal((1, 512, 1536))
    q, k = mx.random.normal((1, 9, 512, 64)), mx.random.normal((1, 3, 512, 64))

    def attention() -> mx.array:
        return mx.fast.scaled_dot_product_attention(q, k, k, scale=0.125, mask="causal")

    runs: dict[str, Callable[[], mx.array]] = {"layer": lambda: linear(x), "attention": attention}
    print(f"{'':12}{'MLX, ms':>10}{'NumPy, ms':>11}{'ratio':>8}")
    for name, run in runs.items():
        plain = seconds(run)
        with blas_products():
            ours = seconds(run)
        print(f"{name:12}{1e3 * plain:10.1f}{1e3 * ours:11.1f}{plain / ours:8.1f}")


if __name__ == "__main__":
    main()
