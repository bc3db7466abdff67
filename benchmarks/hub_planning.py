"""Requests and time of planning from the hub, of a model of which thousands of tensors are read.

A server on loopback answers after a pause and sends the headers and scales of DeepSeek-V3 (FP8, its
first layers; holes where the weights are). Each number is that of a process with an empty cache.

    python benchmarks/hub_planning.py                      8 layers, 50 ms before each answer
    python benchmarks/hub_planning.py --against OTHER/src  next to another version of requant
"""

from __future__ import annotations

import argparse
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

import planning
from tests.support.hub_server import Hub, serving

NAME = "bench/model"


class SparseHub(Hub):
    """A hub of files too large to be hashed."""

    def digest(self, content: bytes) -> str:
        """Any hash: a plan downloads no whole file."""
        return f"{len(content):064x}"

    def blob(self, content: bytes) -> str:
        """Any id."""
        return f"{len(content):040x}"


class Run(NamedTuple):
    """What a plan took."""

    requests: int  # ranges of weight files
    sent_mb: float
    wall_s: float
    cpu_s: float
    peak_mb: float


def run(hub: Hub, layout: str, src: str | None) -> Run:
    """Plan in a process whose cache is empty."""
    with tempfile.TemporaryDirectory() as home:
        env = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": home, "HF_HUB_DISABLE_XET": "1"}
        env |= {} if src is None else {"PYTHONPATH": src}
        code = "import sys, requant; requant.plan(sys.argv[1], layout=sys.argv[2], bits=4)"
        before, sent, began = len(hub.log), hub.sent, time.perf_counter()
        process = subprocess.Popen([sys.executable, "-c", code, NAME, layout], env=env)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit("the plan failed")
    wall_s = time.perf_counter() - began
    asked = [path for _, path, part in hub.log[before:] if part and path.endswith(".safetensors")]
    cpu_s = usage.ru_utime + usage.ru_stime
    return Run(len(asked), (hub.sent - sent) / 1e6, wall_s, cpu_s, usage.ru_maxrss / 1024)


def contents(folder: Path) -> dict[str, Any]:
    """The files of a folder, mapped."""
    files: dict[str, Any] = {}
    for path in folder.iterdir():
        with path.open("rb") as file:
            files[path.name] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return files


def main() -> None:
    """Write the model, plan it and print medians."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=planning.MODELS, default="deepseek-v3")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--latency", type=float, default=50, help="ms before each answer")
    parser.add_argument("--layout", default="keep")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--against", metavar="SRC", help="the src of another version of requant")
    asked = parser.parse_args()
    planning.MODELS[asked.model] = planning.MODELS[asked.model]._replace(layers=asked.layers)
    versions = {"now": None} | ({} if asked.against is None else {"before": asked.against})
    with tempfile.TemporaryDirectory() as place:
        tensors = planning.write(Path(place) / "model", asked.model)
        hub = SparseHub({NAME: contents(Path(place) / "model")})
        hub.latency_s = asked.latency / 1000
        print(f"{tensors:,} tensors; {asked.latency:.0f} ms; load {os.getloadavg()[0]:.1f}")
        with serving(hub):
            rounds = [
                {name: run(hub, asked.layout, src) for name, src in versions.items()}
                for _ in range(asked.rounds)
            ]
    for name in versions:
        middle = Run(
            *(statistics.median(column) for column in zip(*(x[name] for x in rounds), strict=True))
        )
        print(
            f"{name:7} {middle.requests:,} requests, {middle.sent_mb:.1f} MB, "
            f"{middle.wall_s:.2f} s, {middle.cpu_s:.2f} s of processor time, "
            f"peak {middle.peak_mb:.0f} MB"
        )


if __name__ == "__main__":
    main()
