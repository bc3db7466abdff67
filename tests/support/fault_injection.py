"""Fails, or kills, a conversion at each of its system calls; run by test_faults as a script.

Reads a job as ``{"place", "source", "options", "trace"}`` and modes with a stride from the command
line; the library made from ``fault_injection.c`` is preloaded. Prints how many calls were tried
in each mode. A job may have ``"old": true``: OUTPUT holds an older conversion, which --force
replaces.
"""

import ctypes
import json
import os
import shutil
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import requant
from requant.errors import RequantError
from tests.support.checkpoints import tree

OFF, COUNT, ONCE, FULL, KILL = range(5)
MODES = {"once": ONCE, "full": FULL, "kill": KILL}
_LIBRARY = ctypes.CDLL(None)
_DEFECT = 3


class Job:
    """One conversion, with everything that a run of it may change below one folder."""

    def __init__(self, place: Path, source: str, options: dict[str, Any], old: bool) -> None:
        self.place, self.kept, self.options, self.old = place, Path(source), options, old
        self.output = place / "out"
        self.consumes = "consume_source" in options
        self.source = place / "source" if self.consumes else self.kept
        self.older: dict[str, bytes] = {}

    def lay_out(self) -> None:
        """What there is before the command."""
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir(parents=True)
        if self.consumes:
            shutil.copytree(self.kept, self.source)
        if self.old:
            requant.convert(self.kept, self.output, bits=8, layout="keep")
            self.older = tree(self.output)

    def import_all(self) -> None:
        """Convert once in this process.

        So that no child imports MLX and mlx-lm again (a second).
        """
        options = {k: v for k, v in self.options.items() if k not in ("consume_source", "yes")}
        requant.convert(self.kept, self.place.with_name("warm"), **options)

    def convert(self) -> None:
        """The command."""
        requant.convert(
            self.source, self.output, **self.options, chunk_bytes=4000, threads=1, force=self.old
        )

    def child(self, mode: int, at: int, trace: int = -1) -> tuple[int, int, str]:
        """The command in a child: its exit status, the calls it made, what it said."""
        reads, writes = os.pipe()
        child = os.fork()
        if not child:
            code, declared = 0, ""
            _LIBRARY.faults_arm(mode, ctypes.c_long(at), str(self.place).encode(), trace)
            try:
                self.convert()
            except RequantError as error:
                code, declared = 1, str(error)
            except BaseException:
                code, declared = _DEFECT, traceback.format_exc()
            finally:
                calls = _LIBRARY.faults_calls()
                _LIBRARY.faults_arm(OFF, ctypes.c_long(0), b"", -1)
            os.write(writes, json.dumps([calls, declared[:3000]]).encode())
            os._exit(code)
        os.close(writes)
        with open(reads, "rb") as pipe:
            reported = pipe.read()
        _, status = os.waitpid(child, 0)
        calls, declared = json.loads(reported) if reported else (0, "")
        return status, calls, declared

    def check(self, expected: dict[str, bytes], where: str) -> bool:
        """Whether OUTPUT is whole; ends the script where it is neither that nor what it was."""
        if not self.output.exists():
            return False
        found = tree(self.output)
        if found == expected:
            return True
        if self.old and found == self.older:
            return False
        raise SystemExit(f"{where}: OUTPUT exists and is another than the whole one")


def strike(job: Job, mode: str, at: int, expected: dict[str, bytes]) -> bool:
    """One run with a fault, and one after it; false where it ended before the fault."""
    where = f"{mode} at call {at}"
    job.lay_out()
    status, calls, declared = job.child(MODES[mode], at)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) == _DEFECT:
        raise SystemExit(f"{where}: {declared}")
    if mode == "kill" and os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        calls = at
    whole = job.check(expected, where)
    failed = not os.WIFEXITED(status) or os.WEXITSTATUS(status) != 0
    if not failed and not whole:
        raise SystemExit(f"{where}: nothing was said, and OUTPUT is not whole")
    if failed and not whole:
        status, _, declared = job.child(OFF, 0)
        if not os.WIFEXITED(status) or os.WEXITSTATUS(status):
            raise SystemExit(f"{where}: the same command again: {declared}")
        if not job.check(expected, where):
            raise SystemExit(f"{where}: the same command again left no OUTPUT")
    return calls >= at


def main() -> None:
    """Strike each mode at every ``stride``-th call, until the runs are through before it."""
    reported, modes = json.loads(sys.argv[1]), json.loads(sys.argv[2])
    job = Job(
        Path(reported["place"]), reported["source"], reported["options"], reported.get("old", False)
    )
    job.import_all()
    job.lay_out()
    trace = os.open(reported["trace"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    status, calls, declared = job.child(COUNT, 0, trace)
    os.close(trace)
    if status:
        raise SystemExit(f"without a fault: {declared}")
    expected = tree(job.output)
    tried = {}
    for mode, stride in modes.items():
        at = 1
        tried[mode] = 0
        while strike(job, mode, at, expected):
            at, tried[mode] = at + stride, tried[mode] + 1
    print(json.dumps({"calls": calls, "tried": tried}))


if __name__ == "__main__":
    main()
