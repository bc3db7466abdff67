"""``requant calibrate`` as it is typed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from requant.conversion import convert
from requant.verification import verify

from .conftest import Result

pytest.importorskip("mlx_lm")

Requant = Callable[..., Result]
LLAMA = Path(__file__).parents[2] / "examples" / "micro-llama"


def test_from_the_command_line(tmp_path: Path, requant: Requant) -> None:
    """The text that comes with requant; the file weighs a conversion."""
    stats = tmp_path / "s.safetensors"
    done = requant("calibrate", LLAMA, "-o", stats, "--tokens", "256", "--window", "64", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["windows"] == 4
    report = convert(LLAMA, tmp_path / "out", bits=3, statistics=stats)
    assert not any("found no statistics" in note for note in report.plan.notes)
    assert all(not layer.reason for layer in report.plan.layers if layer.target.startswith("aff"))
    assert verify(LLAMA, tmp_path / "out", statistics=stats).ok
