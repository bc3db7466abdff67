"""Time and squared error of each level of scale search, relative to mx.quantize.

    python benchmarks/search.py                        bf16, 512 x 4096, normal weights
    python benchmarks/search.py --dtype float32 --isa avx2

`slower` is processor time relative to the plain kernel in the same run, the minimum of several
runs each; `error` is the sum of squared errors relative to mx.quantize.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import ml_dtypes
import numpy as np

from requant.kernels import _native
from requant.kernels import quantize as native
from requant.kernels.quantize import QuantizedTensors
from requant.quantization.config import Quantization

SPECS = [("affine", bits, 64) for bits in (2, 3, 4, 5, 6, 8)]
SPECS += [
    ("affine", 4, 32),
    ("affine", 4, 128),
    ("mxfp4", 4, 32),
    ("mxfp8", 8, 32),
    ("nvfp4", 4, 16),
]


def least_time(call: Callable[[], object], runs: int) -> float:
    """Processor seconds of the quickest run."""
    seconds = []
    for _ in range(runs):
        began = time.thread_time()
        call()
        seconds.append(time.thread_time() - began)
    return min(seconds)


def squared_error(w: np.ndarray, tensors: QuantizedTensors, quantization: Quantization) -> float:
    """Of the values that codes, scales and biases represent, without a last rounding."""
    words, scales, biases = tensors
    if biases is None:
        values = native.dequantize(tensors, quantization, dtype=np.float32)
    else:
        codes = native.unpack_words(words, quantization.bits).reshape(*scales.shape, -1)
        values = codes * scales.astype(np.float64)[..., None]
        values = (values + biases.astype(np.float64)[..., None]).reshape(w.shape)
    return float(((w.astype(np.float64) - values) ** 2).sum())


def main() -> None:
    """Parse the arguments and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--shape", default="512x4096")
    parser.add_argument("--isa", choices=_native.available_isas())
    parser.add_argument("--runs", type=int, default=7)
    args = parser.parse_args()
    if args.isa:
        _native.set_isa(args.isa)
    shape = tuple(int(n) for n in args.shape.split("x"))
    values = np.random.default_rng(0).standard_normal(shape) * 0.02
    w = values.astype(ml_dtypes.bfloat16 if args.dtype == "bfloat16" else args.dtype)
    print(f"{args.dtype} {args.shape}, kernels for {_native.isa()}, one thread")
    print(f"{'mode':16}{'off Gv/s':>10}" + f"{'error':>10}{'slower':>8}" * 2)
    for mode, bits, group_size in SPECS:
        cells, plain_s, plain_error = "", 0.0, 0.0
        quantization = Quantization(group_size, bits, mode)
        for level in (None, "fast", "best"):
            parts = native.quantize(w, quantization, search=level)
            into = QuantizedTensors(*(None if x is None else np.empty_like(x) for x in parts))

            def encode(into=into, spec=quantization, level=level) -> None:
                native.quantize_into(w, spec, into, search=level)

            took = least_time(encode, args.runs)
            error = squared_error(w, parts, quantization)
            if level is None:
                plain_s, plain_error = took, error
                cells += f"{w.size / took / 1e9:10.2f}"
            else:
                cells += f"{error / plain_error:10.3f}{took / plain_s:7.1f}x"
        print(f"{mode + f' {bits} g{group_size}':16}{cells}", flush=True)


if __name__ == "__main__":
    main()
