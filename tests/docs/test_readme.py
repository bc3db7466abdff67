"""Every example of the README and the docs runs in an empty folder."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.commands import check_usage

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Blocks marked ``sh`` and ``python`` are run. In ``console`` blocks, whose models are missing here,
# the arguments of requant commands are parsed. Other blocks are not checked.
_FENCE = re.compile(r"^```(sh|python)\n(.*?)^```$", re.M | re.S)
_CONSOLE = re.compile(r"^```console\n(.*?)^```$", re.M | re.S)
_LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(?:#[^)]*)?\)")


def examples() -> list:
    found = []
    for page in PAGES:
        for number, match in enumerate(_FENCE.finditer(page.read_text()), 1):
            found.append(pytest.param(*match.groups(), id=f"{page.stem}-{number}"))
    return found


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("language, text", examples())
def test_example_runs(language: str, text: str, place: Path) -> None:
    if "scripts/" in text:
        for script in re.findall(r"scripts/[\w-]+", text):
            assert os.access(ROOT / script, os.X_OK), f"{script} is not a command"
        return
    env = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
    }
    command = ["bash", "-euc", text] if language == "sh" else [sys.executable, "-c", text]
    run = subprocess.run(command, cwd=place, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_that_are_shown_parse(page: Path) -> None:
    for block in _CONSOLE.findall(page.read_text()):
        lines = block.replace("\\\n", " ").splitlines()
        for line in lines:
            if line.startswith("$ requant "):
                check_usage(line[2:])
        assert any(line.startswith("$ ") for line in lines), f"no command in\n{block}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in _LINK.findall(page.read_text()):
        if not target.startswith(("http:", "https:")):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_nothing_is_left_to_fill_in(page: Path) -> None:
    assert not re.search(r"@@|TODO|TBD", page.read_text())
