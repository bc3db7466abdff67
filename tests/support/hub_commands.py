"""The command line in processes of their own whose hub is on loopback."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.hub_server import Hub


class Call:
    """The command line in a process of its own, whose hub is the test's."""

    def __init__(self, hub: Hub, folder: Path) -> None:
        self.hub, self.folder = hub, folder

    def command(self, *arguments: object, **env: str) -> tuple[list[str], dict[str, Any]]:
        """What ``subprocess`` takes."""
        settings = {
            "HF_ENDPOINT": self.hub.url,
            "HF_HOME": str(self.folder / "hf"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_OFFLINE": "0",
        }
        known = {k: v for k, v in os.environ.items() if k not in ("HF_TOKEN", "HF_HUB_CACHE")}
        command = [sys.executable, "-m", "requant", *map(str, arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return command, {"cwd": self.folder, "env": known | settings | env, **pipes}

    def __call__(self, *arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
        command, options = self.command(*arguments, **env)
        done: subprocess.CompletedProcess[str] = subprocess.run(command, **options)
        return done


@pytest.fixture
def call(hub: Hub, tmp_path: Path) -> Call:
    """Of the test module's own ``hub``."""
    return Call(hub, tmp_path)


def ok(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
