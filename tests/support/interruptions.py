"""Conversions that end early: in this process, and in children that are killed.

Run as a script (by test_resume) it kills at random moments: it reads
``[[source, output, options], ...]``, a seed and a number of kills from the command line, and prints
how many runs were killed, how many resumed another, and how often lines of a journal were merged.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import requant
from requant.execution import executor
from requant.output import folder, journal
from tests.support.checkpoints import tree


class Stop(BaseException):
    """Represents a process that ends here."""


def stop_after(monkeypatch: pytest.MonkeyPatch, units: int) -> None:
    """Let a run end after so many units, as by Ctrl-C."""
    real, count = executor._Run._run_unit, 0

    def counted(self, *args):
        nonlocal count
        count += 1
        if count > units:
            raise Stop
        return real(self, *args)

    monkeypatch.setattr(executor._Run, "_run_unit", counted)


def convert(source: str, output: str, options: dict[str, Any]) -> None:
    """One conversion, in many small chunks."""
    requant.convert(source, output, **options, chunk_bytes=500, threads=2)


def fresh(job: list[Any]) -> str:
    """The source of a job; a copy where the conversion deletes it."""
    source, output, options = job
    if "consume_source" not in options:
        return str(source)
    shutil.rmtree(f"{output}-source", ignore_errors=True)
    return str(shutil.copytree(source, f"{output}-source"))


def forked(job: list[Any], after_s: float) -> tuple[bool, bool, int]:
    """Convert in a child, killed after a while: whether it was killed, had resumed, and merges."""
    marks, mark = os.pipe()
    child = os.fork()
    if not child:
        entered, replaced = folder.OutputFolder.__enter__, journal.Journal._replace

        def telling(self: folder.OutputFolder) -> folder.OutputFolder:
            folder = entered(self)
            os.write(mark, b"r" if folder.resumed else b"n")
            return folder

        def merging(self: journal.Journal, lines: list[bytes]) -> None:
            replaced(self, lines)
            os.write(mark, b"m")

        folder.OutputFolder.__enter__ = telling  # type: ignore[method-assign]
        journal.Journal._replace = merging  # type: ignore[method-assign]
        try:
            convert(*job)
            os._exit(0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
    deadline = time.monotonic() + after_s
    status = None
    while time.monotonic() < deadline and status is None:
        done, code = os.waitpid(child, os.WNOHANG)
        status = code if done else None
        time.sleep(0.0005)
    if status is None:
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    os.close(mark)
    reported = os.read(marks, 1 << 16)
    os.close(marks)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit(f"{job}: failed")
    _, _, later = reported.rpartition(b"r" if b"r" in reported else b"n")  # "m": at the start
    return os.WIFSIGNALED(status), b"r" in reported, len(later)


def main() -> None:
    """Kill, look, resume; until every output is whole and as many were killed as asked."""
    jobs, seed, kills = json.loads(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    rng = random.Random(seed)
    journal.SYNC_EVERY_S, journal.MERGED_ABOVE_BYTES = 0.002, 0
    expected, lasts = [], []
    for number, (_, output, options) in enumerate(jobs):
        began = time.monotonic()
        convert(fresh(jobs[number]), f"{output}-reference-{number}", options)
        lasts.append(time.monotonic() - began)
        expected.append(tree(Path(f"{output}-reference-{number}")))
    killed = resumed = merged = finished = number = 0
    while killed < kills or finished < len(jobs) or resumed < kills // 3:
        at = number % len(jobs)
        job, number = jobs[at], number + 1
        output = Path(job[1])
        job = [fresh(job), *job[1:]]
        while not output.exists():
            was_killed, had_resumed, merges = forked(job, rng.uniform(0, 1.5 * lasts[at]))
            killed, resumed, merged = killed + was_killed, resumed + had_resumed, merged + merges
            if output.exists() and tree(output) != expected[at]:
                raise SystemExit(f"{output} exists and is another than the whole one")
        finished += 1
        shutil.rmtree(output)
    counts = {"killed": killed, "resumed": resumed, "merged": merged, "finished": finished}
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
