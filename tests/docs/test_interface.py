"""What the last release had is still there (docs/reference/stability.md)."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_nothing_public_is_gone() -> None:
    script = ROOT / "scripts" / "interface.py"
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    released = (ROOT / "docs" / "reference" / "interface.txt").read_text().splitlines()
    gone = sorted(set(released) - set(run.stdout.splitlines()))
    assert len(released) > 1000
    assert not gone, (
        "\n".join(gone)
        + "\nKeep these, deprecated, or list them in the changelog of a major version "
        "and write the list again: python scripts/interface.py > docs/reference/interface.txt"
    )
