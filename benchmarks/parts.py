"""Overhead of a conversion in parts, and a prediction of the time of large ones on several nodes.

First, real runs on a small model of the same kind: the processor time of 1, 2 and 4 parts and the
join, relative to one process. Planning, which every part and the join repeat, is measured alone and
taken off both. Then the prediction: the cost of each step (``requant.planning.step_cost``) times a
factor measured on a still smaller model gives the time of each part. It is checked against the
longest part of the real runs, and applied to DeepSeek-V3 and Kimi-K2, whose headers are planned.

A node runs one part with all its cores. The whole takes planning twice (a part, the join), and the
larger of the longest part's time on its cores and the time of all bytes through the storage.

    python benchmarks/parts.py                             16 cores a node, 10 GB/s of storage
    python benchmarks/parts.py --nodes 1 8 64 --cores 64 --bandwidth 40
    python benchmarks/parts.py --models kimi-k2 --runs 1
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import planning

import requant
from requant.planning.parts import steps_of_part
from requant.planning.plan import Plan
from requant.planning.step_cost import step_cost
from requant.quantization.part import Part

SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "deepseek-v3": {
        "4 bits": {"bits": 4},
        "4 bits, search best": {"bits": 4, "search": "best"},
    },
    "kimi-k2": {
        "codes kept": {},
        "3 bits, search best": {"bits": 3, "search": "best"},
    },
}
COUNTS = (1, 2, 4)
RUN = """
import json, sys, requant
from pathlib import Path
source, output, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
if output == "plan":
    requant.plan(source, **options)
elif options is None:
    requant.join(output, threads=1)
else:
    requant.convert(source, output, threads=1, **options)
"""


class Sizes(NamedTuple):
    """The sizes of a small model of the kind of a large one."""

    layers: int
    experts: int


def write_small(folder: Path, name: str, sizes: Sizes) -> None:
    """Write a small model with random weights, of the same kinds of tensors as the large one."""
    whole = planning.MODELS[name]
    small = whole._replace(
        layers=sizes.layers,
        dense_layers=1,
        experts=sizes.experts,
        hidden=2048,
        intermediate=4096,
        expert_intermediate=1024,
        heads=16,
        vocabulary=16384,
    )
    planning.MODELS[name] = small
    try:
        planning.write(folder, name)
    finally:
        planning.MODELS[name] = whole
    for path in sorted(folder.glob("*.safetensors")):
        fill(path)


def fill(path: Path) -> None:
    """Write random values where a shard has holes."""
    rng = np.random.default_rng(0)
    with path.open("r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        for name, entry in header.items():
            if name == "__metadata__" or name.endswith("weight_shape"):
                continue
            count = prod(entry["shape"])
            file.seek(8 + length + entry["data_offsets"][0])
            file.write(random_values(rng, entry["dtype"], count).tobytes())


def random_values(rng: np.random.Generator, dtype: str, count: int) -> np.ndarray:
    """Finite values: small ones of floats, any codes of integers."""
    if dtype == "I32":
        return rng.integers(0, 1 << 32, count, np.uint32)
    values = rng.standard_normal(count, np.float32)
    if dtype == "F8_E4M3":
        return (values * 100).clip(-440, 440).astype(ml_dtypes.float8_e4m3fn)
    values = np.abs(values) * 0.01 + 0.001
    return values.astype(ml_dtypes.bfloat16) if dtype == "BF16" else values


def cpu_s(source: Path, output: str | Path, options: dict[str, Any] | None) -> float:
    """Processor time of a process that plans, converts, runs a part, or joins."""
    command = [sys.executable, "-c", RUN, str(source), str(output), json.dumps(options)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(errors)
    return usage.ru_utime + usage.ru_stime


class Measured(NamedTuple):
    """Processor times of one round, in seconds; without planning."""

    one: float
    parts: dict[int, list[float]]  # number of parts -> each part's
    joins: dict[int, float]  # number of parts -> the join's


def measure(
    source: Path, scratch: Path, options: dict[str, Any], counts: tuple[int, ...]
) -> Measured:
    """One round: planning, one process, and each number of parts with its join."""
    output = scratch / "out"
    plan_s = cpu_s(source, "plan", options)

    def without_planning(given: dict[str, Any] | None) -> float:
        return cpu_s(source, output, given) - plan_s

    one = without_planning(options)
    shutil.rmtree(output)
    parts, joins = {}, {}
    for count in counts:
        numbers = range(1, count + 1)
        parts[count] = [without_planning({**options, "part": f"{n}/{count}"}) for n in numbers]
        joins[count] = without_planning(None)
        shutil.rmtree(output)
    return Measured(one, parts, joins)


def part_costs(plan: Plan, count: int) -> list[float]:
    """Seconds of one core for each part, by the costs of the steps alone."""
    costs = [step_cost(step) for step in plan.steps]
    parts = (steps_of_part(plan, Part(number, count)) for number in range(1, count + 1))
    return [sum(costs[number] for number in steps) / 1e9 for steps in parts]


def predict(plan: Plan, plan_s: float, factor: float, nodes: int, args: Any) -> float:
    """Seconds of a whole conversion on several nodes."""
    longest = max(part_costs(plan, nodes)) * factor / args.cores
    nbytes = sum(step.bytes_in for step in plan.steps) + plan.bytes_out
    return 2 * plan_s + max(longest, nbytes / (args.bandwidth * 1e9))


def run_model(name: str, scratch: Path, args: Any) -> None:
    """Measure, check and predict one model at each setting."""
    smaller, small, large = (scratch / x for x in ("smaller", "small", "large"))
    write_small(smaller, name, Sizes(2, args.experts))
    write_small(small, name, Sizes(args.layers, args.experts))
    planning.write(large, name)
    for words, setting in SETTINGS[name].items():
        options = {**setting, "layout": "keep"}
        plans = {path: requant.plan(path, **options) for path in (smaller, small)}
        began = time.process_time()
        whole = requant.plan(large, **options)
        plan_s = time.process_time() - began
        first = [measure(smaller, scratch, options, ()) for _ in range(args.runs)]
        factor = statistics.median(x.one for x in first) / sum(part_costs(plans[smaller], 1))
        rounds = [measure(small, scratch, options, COUNTS) for _ in range(args.runs)]
        print(f"{name}, {words}: {factor:.2f} x step_cost", flush=True)
        for count in COUNTS:
            ratio = statistics.median(
                (sum(x.parts[count]) + x.joins[count]) / x.one for x in rounds
            )
            longest = statistics.median(max(x.parts[count]) for x in rounds)
            predicted = max(part_costs(plans[small], count)) * factor
            print(
                f"  {count} parts and join {ratio:5.2f} x one process; longest part "
                f"{longest:6.2f} s, predicted {predicted:6.2f} s ({predicted / longest:.2f} x)"
            )
        for nodes in args.nodes:
            minutes = predict(whole, plan_s, factor, nodes, args) / 60
            print(
                f"  {nodes:3} nodes of {args.cores} cores, {args.bandwidth:g} GB/s: "
                f"{minutes:8.1f} minutes",
                flush=True,
            )


def main() -> None:
    """Parse the arguments, and measure and predict each model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, help="where to work; sparse files, about 3 GB")
    parser.add_argument("--models", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--layers", type=int, default=6, help="of the model that is converted")
    parser.add_argument("--experts", type=int, default=16, help="of a layer of it")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--cores", type=int, default=16, help="of a node")
    parser.add_argument("--bandwidth", type=float, default=10.0, help="GB/s of the storage")
    args = parser.parse_args()
    print(f"load {os.getloadavg()[0]:.1f}; medians of {args.runs}, processor time without planning")
    for name in args.models:
        with tempfile.TemporaryDirectory(dir=args.dir) as scratch:
            run_model(name, Path(scratch), args)


if __name__ == "__main__":
    main()
