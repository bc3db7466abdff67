"""Time, memory and disk of converting from the hub, against downloading first and converting then.

A server on loopback sends at a fixed rate. Each round downloads everything with
huggingface_hub and converts it from the cache, in two processes; then converts while downloading,
and again with --consume-source. Printed are medians of the ratios within a round.

    python benchmarks/hub.py                   eight shards of 64 MB at 100 MB a second
    python benchmarks/hub.py --rate 50 --search best
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
import threading
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.support.hub_server import Hub, serving

NAME = "bench/model"
OPTIONS = ("--bits", "4", "--layout", "keep", "--quiet")
_DOWNLOAD = f"""
import sys
from concurrent.futures import ThreadPoolExecutor
from huggingface_hub import hf_hub_download
with ThreadPoolExecutor(2) as pool:
    list(pool.map(lambda file: hf_hub_download({NAME!r}, file), sys.argv[1:]))
"""


def checkpoint(shards: int, megabytes: int) -> dict[str, bytes]:
    """A dense model of equal shards, eight layers each."""
    random = np.random.default_rng(0)
    files, shard_of = {"config.json": b'{"model_type": "x"}'}, {}
    rows = megabytes * 10**6 // (8 * 2 * 2048)
    with tempfile.TemporaryDirectory() as place:
        for n in range(shards):
            name = f"model-{n + 1:05}-of-{shards:05}.safetensors"
            tensors = {
                f"l{n}.{k}.weight": random.standard_normal((rows, 2048), np.float32).astype(
                    np.float16
                )
                for k in range(8)
            }
            save_file(tensors, Path(place) / name)
            files[name] = (Path(place) / name).read_bytes()
            shard_of |= dict.fromkeys(tensors, name)
    files["model.safetensors.index.json"] = json.dumps({"weight_map": shard_of}).encode()
    return files


def run(work: Path, command: list[str], url: str) -> tuple[float, float, float]:
    """Seconds, most anonymous memory and most disk of source files, in MB."""
    env = os.environ | {"HF_ENDPOINT": url, "HF_HOME": str(work / "hf")}
    env |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    began = time.perf_counter()
    process = subprocess.Popen(command, cwd=work, env=env)
    memory = disk = 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
            memory = max(memory, int(status.partition("RssAnon:")[2].split()[0]))
        except (OSError, IndexError):
            pass
        disk = max(disk, held(work))
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{command} failed")
    return time.perf_counter() - began, memory / 1000, disk / 1e6


def held(work: Path) -> int:
    """Bytes of downloaded weight files, whole and cut."""
    places = (*work.glob("hf/hub/*/blobs/*"), *work.glob(".out*/hub/*"))
    total = 0
    for path in places:
        try:
            total += path.stat().st_blocks * 512
        except OSError:
            continue
    return total


def main() -> None:
    """Print the figures of all rounds."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rate", type=float, default=100, help="MB a second of all connections")
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--megabytes", type=int, default=64, help="of a shard")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--search", default="off")
    asked = parser.parse_args()
    files = checkpoint(asked.shards, asked.megabytes)
    convert = [sys.executable, "-m", "requant", "convert", NAME, "out", *OPTIONS]
    convert += ["--search", asked.search]
    free, lock = [time.monotonic()], threading.Lock()

    def throttled() -> bool:
        with lock:
            free[0] = max(free[0], time.monotonic()) + 65536 / (asked.rate * 1e6)
            wait = free[0] - time.monotonic()
        time.sleep(max(wait, 0))
        return True

    rows = []
    with tempfile.TemporaryDirectory() as place, serving(Hub({NAME: files})) as hub:
        hub.gates = dict.fromkeys(files, (0, throttled))
        work = Path(place)
        for _ in range(asked.rounds):
            separate = run(work, [sys.executable, "-c", _DOWNLOAD, *files], hub.url)
            then = run(work, convert, hub.url)
            clean(work)
            both = run(work, convert, hub.url)
            clean(work)
            consumed = run(work, [*convert, "--consume-source"], hub.url)
            clean(work)
            rows.append((separate[0], then[0], both, consumed))
            print(f"download {separate[0]:.2f} s, then convert {then[0]:.2f} s", end="; ")
            for name, (seconds, memory, disk) in (("at once", both), ("consumed", consumed)):
                print(f"{name} {seconds:.2f} s, {memory:.0f} MB, {disk:.0f} MB of disk", end="; ")
            print(flush=True)
    for name, at in (("at once", 2), ("with --consume-source", 3)):
        ratio = statistics.median(row[at][0] / (row[0] + row[1]) for row in rows)  # type: ignore[index]
        longer = statistics.median(row[at][0] / max(row[0], row[1]) for row in rows)  # type: ignore[index]
        print(f"{name}: {ratio:.2f} of one after the other, {longer:.2f} of the longer of the two")


def clean(work: Path) -> None:
    """Remove output and cache."""
    for name in ("out", "hf"):
        shutil.rmtree(work / name, ignore_errors=True)


if __name__ == "__main__":
    main()
