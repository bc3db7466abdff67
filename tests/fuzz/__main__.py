"""The fuzzer: ``scripts/fuzz --inputs 1000000``; findings go to tests/fuzz/seeds as files."""

import argparse
import hashlib
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

from tests.fuzz import harness

# Parts of 105 inputs; folders and records take the longest by far.
SHARES = {
    **{"header": 33, "pattern": 10, "folder": 30, "gguf": 12, "index": 12, "record": 3},
    "statistics": 5,
}


class Slow(BaseException):
    """An input took too long."""


def alarm(*_: object) -> None:
    raise Slow


def tried(read: Any, value: Any) -> str:
    """What went wrong with an input, or nothing."""
    signal.setitimer(signal.ITIMER_REAL, harness.SLOW_S)
    try:
        read(value)
    except Slow:
        return f"took more than {harness.SLOW_S} s\n" + "".join(traceback.format_exc())
    except Exception:
        return "".join(traceback.format_exc())
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return ""


def main() -> int:
    """Run, print a line every so often, and say what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default=",".join(SHARES), help="some of these only")
    parser.add_argument(
        "--memory", type=int, default=4 << 30, help="bytes of address space; 0: any"
    )
    parser.add_argument("--keep", type=Path, default=harness.SEEDS, help="where findings go")
    asked = parser.parse_args()
    if wrong := sorted(set(asked.kinds.split(",")) - set(SHARES)):
        parser.error(f"--kinds: no {', '.join(wrong)}; there are {', '.join(SHARES)}")
    if asked.memory:
        resource.setrlimit(resource.RLIMIT_AS, (asked.memory, asked.memory))
    signal.signal(signal.SIGALRM, alarm)
    shares = {kind: SHARES[kind] for kind in asked.kinds.split(",")}
    rng, folders = random.Random(asked.seed), harness.corpus()
    kinds, found, began = Counter[str](), Counter[str](), time.time()
    with tempfile.TemporaryDirectory(
        dir="/dev/shm" if Path("/dev/shm").is_dir() else None
    ) as place:
        readers = harness.readers(Path(place) / "source")
        for number in range(1, asked.inputs + 1):
            (kind,) = rng.choices(list(shares), shares.values())
            kinds[kind] += 1
            value = harness.make_input(kind, folders, rng)
            wrong = tried(readers[kind], value)
            if wrong:
                # One file for each place in the code, however many inputs lead there.
                at = [line.strip() for line in wrong.splitlines() if "src/requant" in line][-1:]
                what = " ".join([*at, wrong.splitlines()[-1].partition(":")[0]])
                found[what] += 1
                name = f"{kind}-{hashlib.sha256(what.encode()).hexdigest()[:10]}.json"
                if found[what] == 1:
                    (asked.keep / name).write_text(harness.to_text(kind, value))
                    print(f"{name}\n{wrong}", flush=True)
            if number % 20_000 == 0 or number == asked.inputs:
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
                rate = number / (time.time() - began)
                print(
                    f"{number:,} inputs, {rate:,.0f}/s, {len(found)} findings, {peak} MB",
                    flush=True,
                )
    print(f"{asked.inputs:,} inputs {dict(kinds)}: {len(found)} findings")
    for what, count in found.most_common():
        print(f"  {count} x {what}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
