"""Parts and joins that are killed at random moments, several at a time.

Run as a script (by test_join): it reads source, output, options, a seed and a number of kills from
the command line, and prints how many parts and joins were killed and how many outputs were made.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import requant
from requant.errors import OutputError
from requant.output import journal
from tests.support.checkpoints import tree

COUNT = 3


def forked(work: Callable[[], object]) -> int:
    """Run in a child; its exit code is 2 where it had to leave the output as it was."""
    child = os.fork()
    if child:
        return child
    try:
        work()
        os._exit(0)
    except OutputError as error:
        # Killed parts may have left nothing to join.
        is_normal = "another process" in str(error) or "no parts to join" in str(error)
        os._exit(2 if is_normal else _failed(error))
    except BaseException as error:
        os._exit(_failed(error))


def _failed(error: BaseException) -> int:
    print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    return 1


def wait_and_kill(child: int, after_s: float) -> bool:
    """Kill a child unless it ends before; whether it was killed."""
    deadline = time.monotonic() + after_s
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return _is_killed(status)
        time.sleep(0.0005)
    os.kill(child, signal.SIGKILL)
    return _is_killed(os.waitpid(child, 0)[1])


def _is_killed(status: int) -> bool:
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) not in (0, 2):
        raise SystemExit("a process failed")
    return os.WIFSIGNALED(status)


def main() -> None:
    """Start all parts at once, kill some, join, kill the join; until the output is there."""
    source, output, options = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    rng, kills = random.Random(int(sys.argv[4])), int(sys.argv[5])
    journal.SYNC_EVERY_S, journal.MERGED_ABOVE_BYTES = 0.002, 0
    small: dict[str, Any] = {**options, "chunk_bytes": 500, "threads": 2}
    reference = output.with_name("reference")
    began = time.monotonic()
    deletes = options.get("consume_source", False)
    requant.convert(source, reference, **{**small, "consume_source": False})
    length, expected = time.monotonic() - began, tree(reference)
    parts = joins = finished = 0
    while parts + joins < kills or not finished or not joins:
        target = output.with_name(f"out{finished}")
        if deletes:
            source = output.with_name(f"source{finished}")
            if not source.exists():
                shutil.copytree(sys.argv[1], source)
        children = [
            forked(partial(requant.convert, source, target, part=f"{n}/{COUNT}", **small))
            for n in range(1, COUNT + 1)
        ]
        for child in children:
            parts += wait_and_kill(child, rng.uniform(0, length / 3))
        two = [forked(partial(requant.join, target, threads=2)) for _ in range(2)]
        for child in two:
            joins += wait_and_kill(child, rng.uniform(0, length))
        if target.exists():
            if tree(target) != expected:
                raise SystemExit(f"{target} differs")
            finished += 1
    print(json.dumps({"parts": parts, "joins": joins, "outputs": finished}))


if __name__ == "__main__":
    main()
