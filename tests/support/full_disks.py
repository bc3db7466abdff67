"""Writes to an output that fail because the disk is full."""

import os
from pathlib import Path

import pytest

from requant.output.shard_files import ShardFiles

_FULL = "/dev/full"  # every write fails: No space left on device


def fill_disk(monkeypatch: pytest.MonkeyPatch, after: int = 0) -> None:
    """Let the disk be full once shards were written to so many times.

    A write is of one output tensor of a unit of rows.
    """
    if not Path(_FULL).exists():
        pytest.skip(f"there is no {_FULL}")
    real, calls = ShardFiles.fd, 0

    def counted(self: ShardFiles, file: str) -> int:
        nonlocal calls
        calls += 1
        if calls <= after:
            return real(self, file)
        full = os.open(_FULL, os.O_RDWR | os.O_CLOEXEC)
        self._fds[f"{_FULL} {calls}"] = full  # closed with the others
        return full

    monkeypatch.setattr(ShardFiles, "fd", counted)
