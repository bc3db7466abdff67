"""Time and memory of whole conversions: requant, mlx_lm.convert, and plain reading and writing.

Each round runs the three one after another on the same source, so that a change in the
machine's speed affects all of them. Printed are medians, and medians of the ratios within a round.
The baseline reads the source and writes as many bytes as the output has, with fsync: no converter
can be faster than that without overlapping the two.

    python benchmarks/convert.py                       1 B parameters to 4 bits
    python benchmarks/convert.py --modes mxfp4 mxfp8   requant alone, against its affine run
    python benchmarks/convert.py --source FOLDER --skip-mlx-lm
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
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).parent
_FLOOR = """
import os, sys
source, output, nbytes = sys.argv[1], sys.argv[2], int(sys.argv[3])
buffer = memoryview(bytearray(4 << 20))
for name in sorted(os.listdir(source)):
    if name.endswith((".safetensors", ".gguf")):
        with open(os.path.join(source, name), "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
with open(output, "wb", buffering=0) as file:
    while nbytes:
        nbytes -= file.write(buffer[:min(nbytes, len(buffer))])
    os.fsync(file.fileno())
"""


def floor(source: Path, output: Path, nbytes: int) -> list[str]:
    """A command that reads every weight file of ``source`` and writes ``nbytes``."""
    return [sys.executable, "-c", _FLOOR, str(source), str(output), str(nbytes)]


@dataclass(frozen=True)
class Run:
    """Time and memory of a finished process."""

    wall_s: float
    cpu_s: float
    peak_mb: float  # resident, file pages included
    anonymous_mb: float  # without the pages of files


def measure(command: list[str]) -> Run:
    """Run a command and return its time and memory."""
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=env)
    anonymous = 0

    def sample() -> None:
        nonlocal anonymous
        while process.returncode is None:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
            except OSError:
                return
            fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
            if "RssAnon" in fields:
                anonymous = max(anonymous, int(fields["RssAnon"].split()[0]))
            time.sleep(0.01)

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    wall_s = time.perf_counter() - began
    sampler.join()
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{errors.decode()}")
    cpu_s = usage.ru_utime + usage.ru_stime
    return Run(wall_s, cpu_s, usage.ru_maxrss / 1024, anonymous / 1024)


def requant(source: Path, output: Path, *options: str) -> list[str]:
    """The measured command; ``--layout keep`` avoids the import of mlx-lm, about a second."""
    command = [sys.executable, "-m", "requant", "convert", str(source), str(output)]
    return [*command, "--quiet", "--layout", "keep", *options]


def rounds(
    contenders: dict[str, Callable[[Path], list[str]]], scratch: Path, runs: int
) -> dict[str, list[Run]]:
    """Run one warm-up and ``runs`` rounds of all contenders in turn; outputs are removed."""
    found: dict[str, list[Run]] = {name: [] for name in contenders}
    for number in range(runs + 1):
        for name, command in contenders.items():
            output = scratch / "output"
            os.sync()
            run = measure(command(output))
            if number:
                found[name].append(run)
            if output.is_dir():
                shutil.rmtree(output)
            else:
                output.unlink(missing_ok=True)
    return found


def report(found: dict[str, list[Run]], reference: str, as_json: bool) -> None:
    """Print medians and the ratios to the reference, round by round."""
    rows = []
    for name, runs in found.items():
        ratios = [r.wall_s / ref.wall_s for r, ref in zip(runs, found[reference], strict=True)]
        middle = {
            key: statistics.median(getattr(run, key) for run in runs) for key in asdict(runs[0])
        }
        rows.append({"name": name, **middle, "ratio": statistics.median(ratios)})
    if as_json:
        print(json.dumps({"reference": reference, "rows": rows}))
        return
    print(f"{'':22}{'wall s':>8}{'cpu s':>8}{'peak MB':>9}{'anon MB':>9}   wall / {reference}")
    for row in rows:
        print(
            f"{row['name']:22}{row['wall_s']:8.2f}{row['cpu_s']:8.2f}{row['peak_mb']:9.0f}"
            f"{row['anonymous_mb']:9.0f}   {row['ratio']:.2f}"
        )


def main() -> None:
    """Parse the arguments, make the source if need be, and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, help="a dense folder; made when not given")
    parser.add_argument("--dir", type=Path, help="where to work; about 6 GB are needed")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--modes", nargs="*", default=[], help="compare modes with affine")
    parser.add_argument("--skip-mlx-lm", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        scratch = Path(folder)
        source = args.source
        if source is None:
            source = scratch / "source"
            script = HERE / "make_checkpoint.py"
            subprocess.run([sys.executable, script, source], check=True)
        first = scratch / "output"
        subprocess.run(requant(source, first, "--bits", str(args.bits)), check=True)
        nbytes = sum(file.stat().st_size for file in first.glob("*.safetensors"))
        shutil.rmtree(first)
        bits = str(args.bits)
        contenders: dict[str, Callable[[Path], list[str]]] = {
            "requant": lambda out: requant(source, out, "--bits", bits),
        }
        for mode in args.modes:
            contenders[f"requant {mode}"] = lambda out, mode=mode: requant(
                source, out, "--mode", mode
            )
        contenders["floor"] = lambda out: floor(source, out, nbytes)
        if not args.skip_mlx_lm and not args.modes:
            contenders["mlx_lm.convert"] = lambda out: [
                sys.executable, "-m", "mlx_lm", "convert", "--hf-path", str(source),
                "--mlx-path", str(out), "-q", "--q-bits", bits,
            ]  # fmt: skip
        report(rounds(contenders, scratch, args.runs), "requant", args.json)


if __name__ == "__main__":
    main()
