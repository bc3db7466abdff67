"""Time to repack AutoAWQ gemm words into MLX's: our kernels against mlx-lm's transform.

    python benchmarks/repack.py                        in 4096, out 14336, group 128
    python benchmarks/repack.py --shape 14336x4096     in x out

Each side starts from the stored tensors in memory. mlx-lm and ``transform_weights`` end with
words, scales and biases, which are compared before anything is timed; "words" is the kernel
alone, writing into memory that was written before. Runs alternate, medians are printed.
mlx-lm runs on MLX's CPU backend, ours on one thread. Exits 1 if ``transform_weights`` is less
than 12 times as fast as mlx-lm.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import mlx.core as mx
import numpy as np
from mlx_lm.utils import _transform_awq_weights

from requant.kernels import _native, repack
from requant.weights.transform import transform_weights

Weights = dict[str, np.ndarray]
MINIMUM = 12.0  # times as fast as mlx-lm


def medians(contenders: dict[str, Callable[[], object]], runs: int) -> dict[str, float]:
    """Median seconds of each, in alternation, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(runs + 1):
        for name, function in contenders.items():
            began = time.perf_counter()
            function()
            if number:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(found) for name, found in seconds.items()}


def stored(n_in: int, n_out: int, group: int) -> Weights:
    """A layer as AutoAWQ stores it: every word random, scales about 0.01."""
    rng = np.random.default_rng(0)
    return {
        "up.qweight": rng.integers(0, 2**32, (n_in, n_out // 8), dtype=np.uint32),
        "up.qzeros": rng.integers(0, 2**32, (n_in // group, n_out // 8), dtype=np.uint32),
        "up.scales": (rng.random((n_in // group, n_out)) * 0.02).astype(np.float16),
    }


def main() -> None:
    """Parse the arguments, compare the results, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="4096x14336", help="in x out")
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--isa", choices=_native.available_isas())
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    if args.isa:
        _native.set_isa(args.isa)
    n_in, n_out = (int(n) for n in args.shape.split("x"))
    mx.set_default_device(mx.cpu)
    weights = stored(n_in, n_out, args.group)
    theirs = {name: mx.array(array) for name, array in weights.items()}
    mx.eval(theirs)
    block = {"quant_method": "awq", "bits": 4, "group_size": args.group, "version": "gemm"}
    words = np.empty((n_out, n_in // 8), np.uint32)

    def with_mlx_lm() -> dict[str, mx.array]:
        result, _ = _transform_awq_weights(theirs, block)
        mx.eval(result)
        return result

    def with_requant() -> dict[str, np.ndarray]:
        result, _ = transform_weights(weights, block)
        return result

    expected, actual = with_mlx_lm(), with_requant()
    for name, array in expected.items():
        same = np.array_equal(np.array(array).view(np.uint8), actual[name].view(np.uint8))
        if not same:
            sys.exit(f"{name} differs")
    took = medians(
        {
            "mlx-lm": with_mlx_lm,
            "transform_weights": with_requant,
            "words": lambda: repack.awq_gemm_into(weights["up.qweight"], words),
            "copy": lambda: np.copyto(words.reshape(-1), weights["up.qweight"].reshape(-1)),
        },
        args.runs,
    )
    print(f"AWQ gemm {args.shape} g{args.group}, kernels for {_native.isa()}; ms, mlx-lm's / ours")
    for name, seconds in took.items():
        print(f"{name:20}{seconds * 1e3:10.1f}{took['mlx-lm'] / seconds:10.1f}")
    if took["mlx-lm"] < MINIMUM * took["transform_weights"]:
        sys.exit(f"transform_weights is less than {MINIMUM:.0f} times as fast as mlx-lm")


if __name__ == "__main__":
    main()
