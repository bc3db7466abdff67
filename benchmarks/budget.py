"""Time, memory and bytes read of ``--budget``, next to another version of requant.

Each number is that of ``requant plan SOURCE --budget 4`` in a process of its own; versions take
turns within a round. The plans are compared: the choice must be the same.

    python benchmarks/budget.py SOURCE                      a folder or a GGUF file
    python benchmarks/budget.py SOURCE --against OTHER/src  next to another version
    python benchmarks/budget.py SOURCE --options --search fast
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

CODE = """
import sys
from requant.cli import run
source, budget, *options = sys.argv[1:]
try:
    run(["plan", source, "--budget", budget, "--json", *options])
except SystemExit as end:
    assert not end.code, end
with open("/proc/self/io") as file:
    print(file.readline().split()[1], file=sys.stderr)
"""


class Run(NamedTuple):
    """What a plan took."""

    cpu_s: float
    wall_s: float
    read_mb: float
    peak_mb: float


def run(src: str | None, arguments: list[str], output: Path) -> Run:
    """Plan in a process, whose plan goes to a file."""
    env = os.environ | ({} if src is None else {"PYTHONPATH": src})
    began = time.perf_counter()
    with output.open("wb") as plan:
        process = subprocess.Popen(
            [sys.executable, "-c", CODE, *arguments], stdout=plan, stderr=subprocess.PIPE, env=env
        )
        assert process.stderr is not None
        errors = process.stderr.read().decode()
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(errors)
    return Run(
        usage.ru_utime + usage.ru_stime,
        time.perf_counter() - began,
        int(errors.split()[-1]) / 1e6,
        usage.ru_maxrss / 1024,
    )


def main() -> None:
    """Run the versions in turns and print medians."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("source")
    parser.add_argument("--budget", default="4")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--against", metavar="SRC", help="the src of another version of requant")
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="of requant plan")
    asked = parser.parse_args()
    versions = {"now": None} | ({} if asked.against is None else {"before": asked.against})
    rounds: list[dict[str, Run]] = []
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as place:
        for _ in range(asked.rounds):
            arguments = [asked.source, asked.budget, *asked.options]
            rounds.append({x: run(src, arguments, Path(place) / x) for x, src in versions.items()})
        plans = {(Path(place) / name).read_bytes() for name in versions}
    print(f"load {load:.1f} before; {'the plans differ' if len(plans) > 1 else 'one plan'}")
    for name in versions:
        cpu_s, wall_s, read_mb, peak_mb = (
            statistics.median(column) for column in zip(*(x[name] for x in rounds), strict=True)
        )
        print(
            f"{name:7} {cpu_s:.2f} s of processor time, {wall_s:.2f} s, read {read_mb:.0f} MB, "
            f"peak {peak_mb:.0f} MB"
        )


if __name__ == "__main__":
    main()
