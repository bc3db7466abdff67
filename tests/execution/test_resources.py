"""Memory does not grow with a tensor: whole processes, and the most that they held.

A small and a large tensor of the same kind are converted; the large one is sixteen times the
small one, and its process may hold but a few MB more. There is no folder for temporary files.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from tests.support.safetensors_files import write_file

MB = 1 << 20
BF16, E4M3 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn)
BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128]}
# The mark of the process itself: getrusage tells its parent's too.
CONVERT = """
import re, sys, requant
requant.convert(sys.argv[1], sys.argv[2], bits=4, layout="keep", threads=2)
print(1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]))
"""
pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
    pytest.mark.skipif(
        "asan" in os.environ.get("LD_PRELOAD", ""), reason="a sanitizer holds memory"
    ),
    pytest.mark.slow,
]


def fp8_blocks(rows: int, columns: int) -> dict[str, np.ndarray]:
    codes = np.arange(rows * columns, dtype=np.uint32).astype(np.uint8) & 0x77
    grid = (-(-rows // 128), -(-columns // 128))
    return {
        "up.weight": codes.reshape(rows, columns).view(E4M3),
        "up.weight_scale_inv": np.full(grid, 0.01, np.float32),
    }


def bfloat16(rows: int, columns: int) -> dict[str, np.ndarray]:
    values = np.linspace(-1, 1, rows * columns, dtype=np.float32)
    return {"up.weight": values.astype(BF16).reshape(rows, columns)}


def peak(folder: Path, tensors: dict[str, np.ndarray], block: dict[str, object]) -> int:
    """Bytes that the process of a conversion held at the most."""
    folder.mkdir()
    config = {"model_type": "llama"} | ({"quantization_config": block} if block else {})
    (folder / "config.json").write_text(json.dumps(config))
    write_file(folder / "model.safetensors", tensors)
    done = subprocess.run(
        [sys.executable, "-c", CONVERT, folder, folder.with_suffix(".out")],
        capture_output=True,
        text=True,
        env={**os.environ, "TMPDIR": str(folder / "none")},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.parametrize(
    ("make", "block"), [(fp8_blocks, BLOCKS), (bfloat16, {})], ids=["fp8 blocks", "bfloat16"]
)
def test_peak_does_not_grow_with_a_tensor(
    make: Callable[[int, int], dict[str, np.ndarray]], block: dict[str, object], tmp_path: Path
) -> None:
    """The last block of rows is ragged."""
    few, many = make(1027, 8192), make(16 * 1027, 8192)
    assert many["up.weight"].nbytes > 128 * MB
    small = peak(tmp_path / "small", few, block)
    large = peak(tmp_path / "large", many, block)
    assert large - small < 24 * MB, f"{small / MB:.0f} MB, then {large / MB:.0f} MB"
