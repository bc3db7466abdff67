"""Downloading one file from the hub: huggingface_hub's own transfer against requant's.

A server on loopback sends the file. Each transfer is run to its end, killed at half of the file,
interrupted at half, and disconnected by the server at half; then the same command runs
again. Printed are seconds, the bytes sent in excess of the file's size, and the bytes left behind.

    python benchmarks/hub_resume.py                          a file of 1 GB
    python benchmarks/hub_resume.py --python OTHER/bin/python    another huggingface_hub
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.support.hub_server import Hub, serving

NAME, FILE = "bench/model", "model.safetensors"
_THEIRS = "from huggingface_hub import hf_hub_download as get; get({name!r}, {file!r}{more})"
_OURS = """
from requant.sources.downloads import Downloads, fetch_all
from requant.sources.hub_storage import HubCache, RemoteFile
cache = HubCache({name!r}, {commit!r})
file = RemoteFile({file!r}, {nbytes}, {digest!r})
fetch_all(Downloads({{file.name: file}}, cache), [file.name])
"""


def start(work: Path, command: list[str], url: str) -> subprocess.Popen[bytes]:
    """Start one transfer."""
    env = os.environ | {"HF_ENDPOINT": url, "HF_HOME": str(work / "hf")}
    env |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return subprocess.Popen(command, cwd=work, env=env, stderr=subprocess.DEVNULL)


def left(work: Path) -> int:
    """Bytes on the disk; a file that has two names counts once."""
    return sum(x.stat().st_size for x in work.rglob("*") if x.is_file() and not x.is_symlink())


def stopped_at_half(hub: Hub, work: Path, command: list[str], how: signal.Signals) -> str:
    """Send a signal at half of the file, then run the command again."""
    nbytes = len(hub.repositories[NAME][FILE])
    halted = [True]
    hub.gates[FILE] = (nbytes // 2, lambda: not halted[0])
    hub.sent = 0
    process = start(work, command, hub.url)
    while hub.sent < nbytes // 2 - (1 << 20):
        time.sleep(0.01)
    time.sleep(0.5)
    process.send_signal(how)
    process.wait()
    kept = left(work)
    hub.gates.clear()
    halted[0] = False
    time.sleep(0.2)
    again = start(work, command, hub.url)
    if again.wait():
        return "fails"
    return f"{hub.sent - nbytes:,} bytes again, {kept:,} kept, {left(work) - nbytes:,} left over"


def cut_at_half(hub: Hub, work: Path, command: list[str]) -> str:
    """The server closes the connection once; the command runs until it succeeds."""
    nbytes = len(hub.repositories[NAME][FILE])
    hub.sent, hub.cut_after = 0, nbytes // 2
    runs = 1
    while start(work, command, hub.url).wait():
        runs += 1
        if runs > 5:
            return "fails"
    return f"{hub.sent - nbytes:,} bytes again, {runs} runs"


def main() -> None:
    """Print one line for each transfer and event."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--only", default="", help="transfers whose title contains this")
    asked = parser.parse_args()
    content = os.urandom(1 << 20) * (asked.megabytes * 10**6 >> 20)
    with tempfile.TemporaryDirectory() as parent, serving(Hub({NAME: {FILE: content}})) as hub:
        facts = {"name": NAME, "file": FILE, "commit": Hub.commit(NAME), "nbytes": len(content)}
        facts["digest"] = hashlib.sha256(content).hexdigest()
        transfers = {
            "hf_hub_download, cache_dir": _THEIRS.format(**facts, more=""),
            "hf_hub_download, local_dir": _THEIRS.format(**facts, more=", local_dir='here'"),
            "requant.sources.downloads": _OURS.format(**facts),
        }
        work = Path(parent) / "work"
        for title, code in transfers.items():
            if asked.only not in title:
                continue
            command = [asked.python, "-c", code]
            seconds = []
            for _ in range(asked.rounds):
                work.mkdir()
                began = time.perf_counter()
                if start(work, command, hub.url).wait():
                    raise SystemExit(f"{title} failed")
                seconds.append(time.perf_counter() - began)
                shutil.rmtree(work)
            print(f"{title}: {min(seconds):.2f} s", flush=True)
            for how in (signal.SIGKILL, signal.SIGINT):
                work.mkdir()
                declared = stopped_at_half(hub, work, command, how)
                print(f"{title}, {how.name} at half: {declared}", flush=True)
                shutil.rmtree(work)
            work.mkdir()
            print(f"{title}, cut at half: {cut_at_half(hub, work, command)}", flush=True)
            shutil.rmtree(work)


if __name__ == "__main__":
    main()
