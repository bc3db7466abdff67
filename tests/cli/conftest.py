"""Tiny checkpoints and a way to call the command line in this process."""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from requant.cli import run
from tests.support.checkpoints import write_model
from tests.support.commands import Result
from tests.support.number_formats import BF16


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Four layers that fit group 64, one that fits 32 only, routers and norms."""
    random = np.random.default_rng(0)

    def matrix(*shape: int) -> np.ndarray:
        return random.standard_normal(shape, np.float32).astype(BF16)

    tensors = {"model.norm.weight": np.ones(64, BF16), "lm_head.weight": matrix(16, 64)}
    for n in range(2):
        tensors |= {
            f"model.layers.{n}.self_attn.q_proj.weight": matrix(64, 64),
            f"model.layers.{n}.mlp.down_proj.weight": matrix(64, 96),
            f"model.layers.{n}.mlp.gate.weight": matrix(8, 64),
            f"model.layers.{n}.input_layernorm.weight": np.ones(64, BF16),
        }
    return write_model(tmp_path / "model", tensors)


@pytest.fixture
def requant(capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Result]]:
    """Call the command line in this process."""
    handler = signal.getsignal(signal.SIGTERM)

    def call(*arguments: object) -> Result:
        with pytest.raises(SystemExit) as end:
            run([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return Result(end.value.code or 0, out, err)

    yield call
    signal.signal(signal.SIGTERM, handler)
