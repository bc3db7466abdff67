"""Throughput of conversions with 1, 2, 4, ... threads, relative to one thread.

Nine kinds of work: bfloat16 to affine, mxfp4, nvfp4 and with ``--search best``; AutoAWQ and GPTQ
folders and a GGUF file of Q4_0 that are repacked; DeepSeek's FP8 to affine; all to 4 bits; and
codes of MLX to bfloat16. A row "copy" reads a source and writes as many bytes as its output has
into one file, with as many threads: no conversion is faster where the disk is the limit. Each round
runs every number of threads one after another; printed are medians. A conversion is timed in a
process of its own, after the imports.

    python benchmarks/threads.py                          1, 2, 4, ... as many as processors
    python benchmarks/threads.py --folder /dev/shm        files in memory
    python benchmarks/threads.py --kinds affine best --threads 1 2 --layers 4
    python benchmarks/threads.py --against OTHER/src      another version in turns with this one
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import formats
import gguf_files
import make_checkpoint

import requant

_CONVERT = """
import json, sys, time
import requant
source, output, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
requant.plan(source, layout="keep", **{k: v for k, v in options.items() if k != "threads"})
began, cpu = time.perf_counter(), time.process_time()
report = requant.convert(source, output, layout="keep", **options)
print(time.perf_counter() - began, time.process_time() - cpu)
"""
_COPY = """
import os, sys, threading, time
source, output, threads, nbytes = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
STEP = 1 << 20
weights = [e for e in os.scandir(source) if e.name.endswith((".safetensors", ".gguf"))]
sizes = [(e.path, e.stat().st_size) for e in weights]
total = sum(size for _, size in sizes)
jobs = iter([(path, at) for path, size in sizes for at in range(0, size, STEP)])
share, lock = nbytes / total, threading.Lock()
target = os.open(output, os.O_RDWR | os.O_CREAT, 0o666)
os.ftruncate(target, nbytes)
files, done = {path: os.open(path, os.O_RDONLY) for path, _ in sizes}, [0]
def work():
    block = memoryview(bytearray(STEP))
    while True:
        with lock:
            path, at = next(jobs, (None, 0))
            first = done[0]
            done[0] += STEP
        if path is None:
            return
        os.preadv(files[path], [block], at)
        start, stop = int(first * share), int((first + STEP) * share)
        os.pwrite(target, block[: stop - start], start)
began, cpu = time.perf_counter(), time.process_time()
workers = [threading.Thread(target=work) for _ in range(threads)]
[worker.start() for worker in workers]
[worker.join() for worker in workers]
os.fsync(target)
print(time.perf_counter() - began, time.process_time() - cpu)
"""


@dataclass(frozen=True)
class Kind:
    """A kind of work: the source, how it is made from a number of layers, and the options."""

    source: str
    make: Callable[[Path, int], object]
    options: dict[str, object]


def bfloat16(folder: Path, layers: int) -> None:
    """A Llama of the shape of 1 B parameters, if it has 16 layers."""
    stored = make_checkpoint.stored(make_checkpoint.llama_shapes(layers), fp8=False)
    make_checkpoint.write(folder, stored, 1 << 30, layers)


def float8(folder: Path, layers: int) -> None:
    """The same in DeepSeek's FP8."""
    stored = make_checkpoint.stored(make_checkpoint.llama_shapes(layers), fp8=True)
    make_checkpoint.write(folder, stored, 1 << 30, layers)


def packed(kind: str) -> Callable[[Path, int], object]:
    """Layers of a Llama of 7 B parameters, each about twice as many as those of the others."""
    return lambda folder, layers: formats.write(folder, formats.KINDS[kind], max(layers // 2, 1))


def q4_0(folder: Path, layers: int) -> None:
    """The Llama of 1 B parameters in blocks of llama.cpp."""
    gguf_files.write(folder / "model.gguf", "Q4_0", layers)


def codes(folder: Path, layers: int) -> None:
    """The same in affine codes of 4 bits."""
    dense = folder.with_name("dense")
    bfloat16(dense, layers)
    requant.convert(dense, folder, layout="keep", bits=4)
    shutil.rmtree(dense)


KINDS = {
    "affine": Kind("bf16", bfloat16, {"bits": 4}),
    "mxfp4": Kind("bf16", bfloat16, {"mode": "mxfp4"}),
    "nvfp4": Kind("bf16", bfloat16, {"mode": "nvfp4"}),
    "best": Kind(
        "small", lambda folder, n: bfloat16(folder, n // 8), {"bits": 4, "search": "best"}
    ),
    "awq": Kind("awq", packed("awq"), {}),
    "gptq": Kind("gptq", packed("gptq"), {}),
    "q4_0": Kind("q4_0", q4_0, {}),
    "fp8": Kind("fp8", float8, {"bits": 4}),
    "decode": Kind("mlx", codes, {"dequantize": True}),
}


def weights_in(folder: Path) -> int:
    """Bytes of the weight files of a folder."""
    files = [*folder.glob("*.safetensors"), *folder.glob("*.gguf")]
    return sum(path.stat().st_size for path in files)


def timed(code: str, *arguments: object, source: Path | None = None) -> tuple[float, float]:
    """Seconds, and seconds of processor time, that a child reports; ``source`` is its requant."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    env = os.environ | ({} if source is None else {"PYTHONPATH": str(source.absolute())})
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=env)
    if done.returncode:
        sys.exit(f"a child failed: {done.returncode}")
    wall, cpu = map(float, done.stdout.split())
    return wall, cpu


def remove(path: Path) -> None:
    """Remove what a run wrote."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


Runs = dict[int, list[tuple[float, float]]]
"""Number of threads -> seconds and processor seconds of each run."""


def row(runs: Runs, nbytes: int, name: str) -> None:
    """Print a row: GB/s and CPU seconds with the fewest threads, then ratios to them."""
    walls, cpus = (
        {threads: statistics.median(run[n] for run in each) for threads, each in runs.items()}
        for n in (0, 1)
    )
    first = next(iter(walls))
    ratios = "".join(
        f"{walls[first] / walls[threads]:8.2f} ({cpus[threads] / cpus[first]:4.2f})"
        for threads in walls
    )
    speed = nbytes / 1e9 / walls[first]
    print(f"{name:14}{nbytes / 1e9:6.2f}{speed:7.2f}{cpus[first]:7.2f}{ratios}", flush=True)


def conversions(
    kind: Kind, source: Path, output: Path, args: argparse.Namespace
) -> tuple[dict[str, Runs], int]:
    """Runs of each version, and the bytes of an output."""
    versions = {"": None} | ({} if args.against is None else {" before": args.against})
    found: dict[str, Runs] = {name: {n: [] for n in args.threads} for name in versions}
    nbytes = 0
    for _ in range(args.runs):
        for threads in args.threads:
            options = json.dumps({**kind.options, "threads": threads})
            for name, version in versions.items():
                run = timed(_CONVERT, source, output, options, source=version)
                found[name][threads].append(run)
                nbytes = weights_in(output)
                remove(output)
    return found, nbytes


def copies(source: Path, output: Path, nbytes: int, args: argparse.Namespace) -> Runs:
    """Runs that read the source and write ``nbytes``."""
    found: Runs = {threads: [] for threads in args.threads}
    for _ in range(args.runs):
        for threads in args.threads:
            found[threads].append(timed(_COPY, source, output, threads, nbytes))
            remove(output)
    return found


def main() -> None:
    """Make the sources, run, and print the table."""
    processors = len(os.sched_getaffinity(0))
    powers = [1 << n for n in range(processors.bit_length()) if 1 << n <= processors]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--threads", type=int, nargs="+", default=powers)
    parser.add_argument("--layers", type=int, default=16, help="16: 2.1 GB of bfloat16")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to work")
    parser.add_argument("--against", type=Path, help="the src folder of another version")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as place:
        output = Path(place) / "out"
        load = os.getloadavg()[0]
        print(f"requant {requant.__version__}, {processors} processors, load {load:.1f}")
        print(f"{'':14}{'GB':>6}{'GB/s':>7}{'CPU s':>7}", end="")
        print("".join(f"{threads:8} ( CPU)" for threads in args.threads))
        written: dict[str, int] = {}
        for name in args.kinds:
            kind = KINDS[name]
            source = Path(place) / kind.source
            if not source.exists():
                kind.make(source, args.layers)
                os.sync()
            found, nbytes = conversions(kind, source, output, args)
            for version, runs in found.items():
                row(runs, weights_in(source), f"{name}{version}")
            if kind.source not in written:
                written[kind.source] = nbytes
                runs = copies(source, output, nbytes, args)
                row(runs, weights_in(source), f"copy of {kind.source}")


if __name__ == "__main__":
    main()
