"""Overhead of a conversion in parts, and a prediction of the time of large ones on several nodes.

First, real runs on a small model of the same kind: the processor time of 1, 2 and 4 parts and the
join, relative to one process. Planning, which every part and the join repeat, is measured alone (a
part that has nothing to do plans and ends) and taken off both. Then the prediction: the cost of
each step (``requant.planning.step_cost``) times a factor measured on a still smaller model gives
the time of each part. It is checked against the longest part of the real runs, and applied to
DeepSeek-V3 and Kimi-K2, whose headers are planned.

A node runs one part with all its cores. The whole takes planning twice (a part, the join), and the
larger of the longest part's time on its cores and the time of all bytes through the storage. With
a budget there are two rounds, and the first reads all, encodes all layers with every candidate, and
plans them. GPTQ is counted for layers with Hessians, which are read from a file of statistics.

    python benchmarks/parts.py                             16 cores a node, 10 GB/s of storage
    python benchmarks/parts.py --nodes 1 8 64 --cores 64 --bandwidth 40
    python benchmarks/parts.py --models kimi-k2 --settings budget --runs 1
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
from functools import cache, partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import planning

import requant
from requant.bit_allocation.measure import GROUP_SIZES
from requant.importance.reader import LayerStatistics, write_statistics
from requant.output.staging import staging_dir
from requant.planning.parts import indices_of_part
from requant.planning.plan import Plan
from requant.planning.step_cost import gptq_cost, step_cost
from requant.quantization.part import Part
from requant.quantization.size_budget import BUDGET_BITS

# Options of each setting. A budget is measured with the search of its options.
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "deepseek-v3": {
        "rule": {"bits": 4},
        "search": {"bits": 4, "search": "best"},
        "budget": {"budget": 4.5},
        "gptq": {"bits": 4, "gptq": True},
    },
    "kimi-k2": {
        "rule": {},  # the codes of the source stay
        "search": {"bits": 3, "search": "best"},
        "budget": {"budget": 4},
        "gptq": {"bits": 3, "gptq": True},
    },
}
COUNTS = (1, 2, 4)
NOTHING = "1/10000"  # a part without layers: planning alone
RUN = """
import json, sys, requant
from pathlib import Path
source, output, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
if options is None:
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


def write_hessians(source: Path, file: Path, options: dict[str, Any]) -> None:
    """Write statistics with a Hessian for each layer that the options quantize."""
    plan = requant.plan(source, **options)
    layers, made = {}, {}
    for layer in plan.layers:
        if layer.target.startswith("affine"):
            *experts, _, n_in = layer.shape
            ones = np.ones((*experts, n_in), np.float32)
            layers[layer.layer] = LayerStatistics(ones, np.ones(prod(experts), np.float32))
            made[layer.layer] = partial(_hessian, n_in)
    write_statistics(file, layers, made)


@cache
def _hessian(n_in: int, expert: int) -> np.ndarray:
    x = np.random.default_rng(n_in).standard_normal((256, n_in), np.float32)
    return x.T @ x / 256 + np.eye(n_in, dtype=np.float32)


class Measured(NamedTuple):
    """Processor times of one round, in seconds; without planning."""

    one: float
    rounds: dict[int, list[list[float]]]  # number of parts -> of each round, each part's
    joins: dict[int, float]  # number of parts -> the join's

    def overhead(self, count: int) -> float:
        """All parts and the join, relative to one process."""
        return (sum(map(sum, self.rounds[count])) + self.joins[count]) / self.one

    def longest(self, count: int) -> float:
        """The time of all rounds, each as long as its longest part."""
        return sum(map(max, self.rounds[count]))


def measure(
    source: Path, scratch: Path, options: dict[str, Any], counts: tuple[int, ...]
) -> Measured:
    """One process, and each number of parts with its join; planning is taken off.

    With a budget, parts run twice: the last one of the first round converts already, so its share
    of the second round is counted with the first.
    """
    output, has_budget = scratch / "out", "budget" in options

    def run(given: dict[str, Any] | None) -> float:
        return cpu_s(source, output, given)

    first_plan_s = run({**options, "part": NOTHING})
    remove(output)
    one = run(options) - first_plan_s
    remove(output)
    rounds: dict[int, list[list[float]]] = {}
    joins = {}
    for count in counts:
        parts = [{**options, "part": f"{number}/{count}"} for number in range(1, count + 1)]
        rounds[count] = [[run(part) - first_plan_s for part in parts]]
        plan_s = run({**options, "part": NOTHING})
        if has_budget:
            rounds[count].append([run(part) - plan_s for part in parts])
            rounds[count][0][-1] -= plan_s  # it has planned the conversion too
        joins[count] = run(None) - plan_s
        remove(output)
    return Measured(one, rounds, joins)


def remove(output: Path) -> None:
    """Remove an output, or what parts of it have left."""
    for folder in (output, staging_dir(output)):
        if folder.exists():
            shutil.rmtree(folder)


def costs_of(plan: Plan, setting: str) -> list[list[float]]:
    """Nanoseconds of one core for each step, of each round."""
    steps = plan.steps
    convert = [step_cost(step) + (gptq_cost(step) if setting == "gptq" else 0) for step in steps]
    if setting != "budget":
        return [convert]
    candidates = len(BUDGET_BITS) * len(GROUP_SIZES)
    trials = [candidates * cost for step, cost in zip(steps, convert, strict=True) if step.encode]
    return [trials, convert]


def longest_s(plan: Plan, setting: str, count: int) -> float:
    """Seconds of one core of the longest part, summed over rounds."""
    return sum(longest_of(costs, count) for costs in costs_of(plan, setting)) / 1e9


def longest_of(costs: list[float], count: int) -> float:
    """The cost of the longest of several parts."""
    parts = (indices_of_part(costs, Part(number, count)) for number in range(1, count + 1))
    return max(sum(costs[index] for index in part) for part in parts)


def predict(plan: Plan, setting: str, plan_s: float, factor: float, nodes: int, args: Any) -> float:
    """Seconds of a whole conversion on several nodes."""
    longest = longest_s(plan, setting, nodes) * factor / args.cores
    nbytes = sum(step.bytes_in for step in plan.steps) + plan.bytes_out
    plans = 2.0
    if setting == "budget":
        nbytes += sum(step.bytes_in for step in plan.steps)
        plans += len(BUDGET_BITS) * len(GROUP_SIZES)
    return plans * plan_s + max(longest, nbytes / (args.bandwidth * 1e9))


def run_model(name: str, scratch: Path, args: Any) -> None:
    """Measure, check and predict one model at each setting."""
    smaller, small, large = (scratch / x for x in ("smaller", "small", "large"))
    write_small(smaller, name, Sizes(2, args.experts))
    write_small(small, name, Sizes(args.layers, args.experts))
    planning.write(large, name)
    for setting in args.settings:
        base = {**SETTINGS[name][setting], "layout": "keep"}
        # A plan for costs: without statistics, and of a budget with the layers at 4 bits.
        uniform = {k: x for k, x in base.items() if k not in ("gptq", "budget")}
        if setting == "gptq":
            uniform["search"] = "best"
        if setting == "budget":
            uniform |= {"bits": 4, "search": "fast"}
        plans = {path: requant.plan(path, **uniform) for path in (smaller, small)}
        began = time.process_time()
        whole = requant.plan(large, **uniform)
        plan_s = time.process_time() - began

        def measured(
            source: Path,
            counts: tuple[int, ...],
            setting: str = setting,
            base: Any = base,
            uniform: Any = uniform,
        ) -> list[Measured]:
            options = dict(base)
            if setting == "gptq":
                options["statistics"] = str(scratch / "hessians.safetensors")
                write_hessians(source, Path(options["statistics"]), uniform)
            return [measure(source, scratch, options, counts) for _ in range(args.runs)]

        one = statistics.median(x.one for x in measured(smaller, ()))
        factor = one / longest_s(plans[smaller], setting, 1)
        rounds = measured(small, COUNTS)
        print(f"{name}, {setting}: {factor:.2f} x step_cost", flush=True)
        for count in COUNTS:
            ratio = statistics.median(x.overhead(count) for x in rounds)
            longest = statistics.median(x.longest(count) for x in rounds)
            predicted = longest_s(plans[small], setting, count) * factor
            print(
                f"  {count} parts and join {ratio:5.2f} x one process; longest part "
                f"{longest:6.2f} s, predicted {predicted:6.2f} s ({predicted / longest:.2f} x)",
                flush=True,
            )
        for nodes in args.nodes:
            minutes = predict(whole, setting, plan_s, factor, nodes, args) / 60
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
    parser.add_argument("--settings", nargs="+", choices=SETTINGS["kimi-k2"], default=None)
    parser.add_argument("--layers", type=int, default=6, help="of the model that is converted")
    parser.add_argument("--experts", type=int, default=16, help="of a layer of it")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--cores", type=int, default=16, help="of a node")
    parser.add_argument("--bandwidth", type=float, default=10.0, help="GB/s of the storage")
    args = parser.parse_args()
    args.settings = args.settings or list(SETTINGS["kimi-k2"])
    print(f"load {os.getloadavg()[0]:.1f}; medians of {args.runs}, processor time without planning")
    for name in args.models:
        with tempfile.TemporaryDirectory(dir=args.dir) as scratch:
            run_model(name, Path(scratch), args)


if __name__ == "__main__":
    main()
