"""Conversions that several tests make in the same way."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import requant
from tests.support.safetensors_files import read_folder


def rejection(folder: Path, output: Path, **options: Any) -> str:
    """The error of a conversion that must fail, which may leave nothing behind."""
    before = sorted(output.parent.iterdir())
    with pytest.raises(requant.RequantError) as rejected:
        requant.convert(folder, output, **{"layout": "keep"} | options)
    assert sorted(output.parent.iterdir()) == before
    return str(rejected.value)


def convert(
    folder: Path, output: Path, **options: Any
) -> tuple[dict[str, np.ndarray], requant.Report]:
    """Convert under the source's own names; the output's tensors and the report."""
    report = requant.convert(folder, output, **{"layout": "keep"} | options)
    return read_folder(output), report


def dequantized(folder: Path, output: Path, **options: Any) -> dict[str, np.ndarray]:
    """The values in float32, under the source's own names."""
    return convert(folder, output, dequantize=True, dtype="float32", **options)[0]
