"""A small source and its plan."""

from collections.abc import Callable
from pathlib import Path

import pytest

from requant.planning.planner import Planned, plan_with_source
from requant.quantization.config import Quantization
from requant.quantization.options import ConvertOptions
from requant.sources.open import as_checkpoint
from tests.support.number_formats import bf16


@pytest.fixture
def source(checkpoint: Callable[..., Path]) -> Path:
    """Two shards of two layers each, and a file that is copied."""
    path = checkpoint({f"l{n}.weight": bf16(64, 128, seed=n) for n in range(4)}, shards=2)
    (path / "tokenizer.json").write_text("{}")
    return path


@pytest.fixture
def planned(source: Path) -> Planned:
    """The source in 4 bits."""
    options = ConvertOptions(quantization=Quantization.affine(64, 4))
    return plan_with_source(as_checkpoint(source, None), options)
