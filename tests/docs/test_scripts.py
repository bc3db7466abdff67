"""--help of every script prints its description and does nothing else."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
COMMANDS = sorted(path.name for path in SCRIPTS.iterdir() if path.stat().st_mode & 0o111)


@pytest.mark.parametrize("option", ["--help", "-h"])
@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_all_that_happens(name: str, option: str, tmp_path: Path) -> None:
    """Run in a copy, where an install or a build would leave files."""
    shutil.copytree(SCRIPTS, tmp_path / "scripts")
    first = (SCRIPTS / name).read_text().splitlines()[1].strip('#" ')
    command = [str(tmp_path / "scripts" / name), option]
    if (SCRIPTS / name).read_text().startswith("#!/usr/bin/env python3"):
        command.insert(0, sys.executable)
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert first in done.stdout and "#!" not in done.stdout and "source" not in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["scripts"]
