"""Speed of each kernel in GB/s of dense values, against MLX and against a copy of the same bytes.

    python benchmarks/kernels.py                       bf16, 4096 x 14336, one thread and two
    python benchmarks/kernels.py --dtype float32 --modes affine:3:64 mxfp8
    python benchmarks/kernels.py --isa avx2            another build of the kernels
    python benchmarks/kernels.py --against OLD.so --shape 16x4096 --runs 41   in cache

A mode is affine:BITS:GROUP or a name. Runs alternate between the contenders, and medians
are printed. MLX runs on its CPU backend, which uses one thread for these operations. With
--against, the compiled module of another version, the kernels of both are timed in turns, in
processor time of one thread, and what a conversion does with a chunk: the values are checked,
encoded, and the error is measured.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from types import ModuleType

import ml_dtypes
import numpy as np

from requant.kernels import _native
from requant.kernels import quantize as native
from requant.kernels.quantize import QuantizedTensors
from requant.quantization.config import Quantization

DEFAULT = ["affine:2:64", "affine:3:64", "affine:4:64", "affine:5:64", "affine:6:64", "affine:8:64"]
DEFAULT += ["mxfp4", "mxfp8", "nvfp4"]
FLOAT_MODES = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}
CHUNK_ROWS = 128  # a converter's chunk: its input and output stay in a core's cache


def timed(function: Callable[[], object]) -> float:
    """Seconds that one call takes."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def medians(contenders: dict[str, Callable[[], object]], runs: int) -> dict[str, float]:
    """Median seconds of each, in alternation, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(runs + 1):
        for name, function in contenders.items():
            took = timed(function)
            if number:
                seconds[name].append(took)
    return {name: statistics.median(found) for name, found in seconds.items()}


def by_chunks(call: Callable[[slice], object], rows: int, threads: int) -> None:
    """Run ``call`` over all rows, chunk by chunk; each thread takes a run of them."""

    def run(start: int, stop: int) -> None:
        for row in range(start, stop, CHUNK_ROWS):
            call(slice(row, row + CHUNK_ROWS))

    borders = [rows * n // threads for n in range(threads + 1)]
    others = [threading.Thread(target=run, args=pair) for pair in pairwise(borders[1:])]
    for other in others:
        other.start()
    run(0, borders[1])
    for other in others:
        other.join()


def load_module(path: str) -> ModuleType:
    """Another build of the kernels' module."""
    spec = importlib.util.spec_from_file_location("requant.kernels._native", path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cpu_seconds(module: ModuleType, call: Callable[[], object]) -> float:
    """Seconds of this thread's processor time that a call takes with the kernels of a module."""
    here, native._native = native._native, module
    try:
        call()
        began = time.thread_time()
        call()
        return time.thread_time() - began
    finally:
        native._native = here


def quantization_of(mode: str) -> Quantization:
    """The quantization that a mode's name stands for."""
    name, _, rest = mode.partition(":")
    if name == "affine":
        bits, group_size = (int(part) for part in rest.split(":"))
    else:
        bits, group_size = FLOAT_MODES[name]
    return Quantization(group_size, bits, name)


def compare(mode: str, w: np.ndarray, runs: int, other: ModuleType) -> tuple[str, ...]:
    """One line of the table of two versions: both speeds and their ratio, three times."""
    quantization = quantization_of(mode)
    out, decoded = native.quantize(w, quantization), np.empty_like(w)

    def encode() -> None:
        native.quantize_into(w, quantization, out)

    def decode() -> None:
        native.dequantize_into(out, quantization, decoded)

    def measured() -> None:
        native.quantize_measured(w, quantization, out, native.EncodingError())

    cells = [mode]
    for call in (encode, decode, measured):
        seconds = [(cpu_seconds(other, call), cpu_seconds(_native, call)) for _ in range(runs)]
        old, new = (w.nbytes / statistics.median(took) / 1e9 for took in zip(*seconds, strict=True))
        cells += [f"{old:.2f}", f"{new:.2f}", f"{new / old:.2f}"]
    return tuple(cells)


def measure(mode: str, w: np.ndarray, runs: int, with_mlx: bool) -> tuple[str, ...]:
    """One line of the table."""
    quantization = quantization_of(mode)
    bits, group_size, name = quantization.bits, quantization.group_size, quantization.mode.value
    tensors = native.quantize(w, quantization)
    out = np.empty_like(w)
    rows = len(w)

    def part(chunk: slice) -> QuantizedTensors:
        return QuantizedTensors(*(None if x is None else x[chunk] for x in tensors))

    def encode(chunk: slice) -> None:
        native.quantize_into(w[chunk], quantization, part(chunk))

    def decode(chunk: slice) -> None:
        native.dequantize_into(part(chunk), quantization, out[chunk])

    contenders: dict[str, Callable[[], object]] = {
        "copy": lambda: np.copyto(out.view(np.uint8), w.view(np.uint8)),
        "encode": lambda: by_chunks(encode, rows, 1),
        "encode2": lambda: by_chunks(encode, rows, 2),
        "decode": lambda: by_chunks(decode, rows, 1),
        "decode2": lambda: by_chunks(decode, rows, 2),
    }
    if with_mlx:
        import mlx.core as mx

        mx.set_default_device(mx.cpu)
        w_mx = mx.array(w.astype(np.float32)).astype(getattr(mx, w.dtype.name))
        quantized = mx.quantize(w_mx, group_size, bits, name)
        mx.eval(w_mx, *quantized)
        contenders["mlx encode"] = lambda: mx.eval(*mx.quantize(w_mx, group_size, bits, name))
        contenders["mlx decode"] = lambda: mx.eval(
            mx.dequantize(*quantized, group_size=group_size, bits=bits, mode=name)
        )
    took = medians(contenders, runs)
    rate = {key: w.nbytes / seconds / 1e9 for key, seconds in took.items()}
    cells = [mode, f"{rate['copy']:.1f}"]
    for what in ("encode", "decode"):
        cells += [f"{rate[what]:.2f}", f"{rate[what + '2'] / rate[what]:.2f}"]
        theirs = rate.get(f"mlx {what}")
        cells += [f"{theirs:.3f}", f"{rate[what] / theirs:.1f}"] if theirs else ["", ""]
    return tuple(cells)


def main() -> None:
    """Parse the arguments and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--shape", default="4096x14336")
    parser.add_argument("--modes", nargs="+", default=DEFAULT)
    parser.add_argument("--isa", choices=_native.available_isas())
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--skip-mlx", action="store_true")
    parser.add_argument("--against", metavar="OLD.so", help="the module of another version")
    args = parser.parse_args()
    if args.isa:
        _native.set_isa(args.isa)
    shape = tuple(int(n) for n in args.shape.split("x"))
    values = np.random.default_rng(0).standard_normal(shape, dtype=np.float32) * 0.02
    dtype = ml_dtypes.bfloat16 if args.dtype == "bfloat16" else args.dtype
    w = values.astype(dtype)
    print(f"{args.dtype} {args.shape}, kernels for {_native.isa()}, GB/s of dense values")
    if args.against:
        other = load_module(args.against)
        other.set_isa(_native.isa())
        heads = [
            f"{what} {word}" for what in ("enc", "dec", "chunk") for word in ("old", "new", "x")
        ]
        print(
            "".join(f"{cell:>11}" if n else f"{cell:12}" for n, cell in enumerate(["mode", *heads]))
        )
        for mode in args.modes:
            line = compare(mode, w, args.runs, other)
            print("".join(f"{c:>11}" if n else f"{c:12}" for n, c in enumerate(line)), flush=True)
        return
    head = ("mode", "copy", "encode", "x2", "mlx", "ratio", "decode", "x2", "mlx", "ratio")
    print("".join(f"{cell:>9}" if n else f"{cell:12}" for n, cell in enumerate(head)))
    for mode in args.modes:
        cells = measure(mode, w, args.runs, not args.skip_mlx)
        print("".join(f"{c:>9}" if n else f"{c:12}" for n, c in enumerate(cells)), flush=True)


if __name__ == "__main__":
    main()
