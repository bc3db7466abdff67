"""Memory and journal of a run against the number of its chunks, and of the run that resumes it.

The same few values (not zeros, which have no statistics to keep) are converted in chunks of ever
fewer rows. Each run is killed when nine tenths are done, and another resumes it; printed are the
peaks of both processes, and the journal at the kill. The first row has the fewest chunks and is the
reference.

    python benchmarks/chunks.py
    python benchmarks/chunks.py --rows 16384 --chunk-rows 4096 64 4 1
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import requant

sys.path.insert(0, str(Path(__file__).parent))

from make_checkpoint import write

TENSORS, COLUMNS = 32, 64
_RUN = """
import os, signal, sys
import requant
source, output, chunk_bytes, share = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
def progress(now):
    if now.bytes_done >= share * now.bytes_total:
        os.kill(os.getpid(), signal.SIGKILL)
options = dict(bits=4, layout="keep", threads=2)
requant.convert(source, output, **options, chunk_bytes=chunk_bytes, progress=progress)
"""


def measure(source: Path, output: Path, chunk_bytes: int, share: float) -> tuple[float, float]:
    """Convert in a child until ``share`` is done; its time and its peak of anonymous memory, MB."""
    command = [sys.executable, "-c", _RUN, str(source), str(output), str(chunk_bytes), str(share)]
    began = time.perf_counter()
    process = subprocess.Popen(command)
    peak = 0

    def sample() -> None:
        nonlocal peak
        while process.poll() is None:
            status = Path(f"/proc/{process.pid}/status").read_text()
            fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
            peak = max(peak, int(fields.get("RssAnon", "0 kB").split()[0]))
            time.sleep(0.01)

    sampler = threading.Thread(target=sample)
    sampler.start()
    sampler.join()
    if process.returncode not in (0, -signal.SIGKILL):
        sys.exit(f"the conversion failed: {process.returncode}")
    return time.perf_counter() - began, peak / 1024


def main() -> None:
    """Convert the same source in more and more chunks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=8192, help=f"of each of {TENSORS} tensors")
    parser.add_argument("--chunk-rows", type=int, nargs="+", default=[2048, 64, 8, 1])
    parser.add_argument("--dir", type=Path, help="where to work")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        source, output = Path(folder) / "source", Path(folder) / "output"
        names = (f"model.layers.{n}.mlp.up_proj.weight" for n in range(TENSORS))
        write(source, dict.fromkeys(names, ("BF16", (args.rows, COLUMNS))), 1 << 30, TENSORS)
        row_bytes = requant.plan(source, bits=4, layout="keep").steps[0].work_bytes_per_row
        print(f"load {os.getloadavg()[0]:.1f}")
        print(f"{'chunks':>9}{'s':>8}{'anon MB':>9}{'ratio':>7}{'journal MB':>12}", end="")
        print(f"{'resumed: anon MB':>18}{'ratio':>7}")
        first = None
        for chunk_rows in args.chunk_rows:
            took, peak = measure(source, output, chunk_rows * row_bytes, 0.9)
            journal = output.with_name(".output.requant-partial") / "journal"
            journal_mb = journal.stat().st_size / 1e6
            _, resumed = measure(source, output, chunk_rows * row_bytes, 2.0)
            first = first or (peak, resumed)
            print(
                f"{TENSORS * -(-args.rows // chunk_rows):9}{took:8.1f}{peak:9.0f}"
                f"{peak / first[0]:7.2f}{journal_mb:12.2f}{resumed:18.0f}{resumed / first[1]:7.2f}",
                flush=True,
            )
            shutil.rmtree(output)


if __name__ == "__main__":
    main()
