"""MLX is an extra: every public name can be used, and a folder converted, where it is not."""

import subprocess
import sys
from pathlib import Path

from tests.support.checkpoints import MICRO_LLAMA

PROGRAM = """
import sys
from importlib.machinery import PathFinder

MISSING = ("mlx", "mlx_lm", "mlx_vlm", "transformers")
find_spec = PathFinder.find_spec

def find_others(name, path=None, target=None):
    return None if name.split(".")[0] in MISSING else find_spec(name, path, target)

PathFinder.find_spec = find_others
import requant

for name in requant.__all__:
    getattr(requant, name)
source, output = sys.argv[1:]
requant.convert(source, output, bits=4)
assert requant.verify(source, output).ok
requant.compare(source, output)
"""


def test_every_public_name_and_a_conversion(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(MICRO_LLAMA), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
