"""Which layout a checkpoint gets, and what is said where that is not mlx-lm's."""

from pathlib import Path

import pytest

from requant.checkpoints.checkpoint import Checkpoint
from requant.errors import CheckpointError
from requant.formats import read_layout
from requant.planning.layout_selection import LayoutResult, choose_layout, why_not_mlx_lm
from requant.quantization.options import ConvertOptions
from requant.sources.open import read_checkpoint
from tests.support.checkpoints import write_folder

TENSORS = {"model.up.weight": ("BF16", [64, 128]), "model.norm.weight": ("BF16", [128])}
NO_CLASS = "mlx-lm has no class for model_type 'no_such_model'"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    config = {"model_type": "no_such_model"}
    return read_checkpoint(
        write_folder(tmp_path / "source", {"model.safetensors": TENSORS}, config=config)
    )


def choose(checkpoint: Checkpoint, layout: str) -> LayoutResult:
    return choose_layout(checkpoint, read_layout(checkpoint)[1], ConvertOptions(layout=layout))


def test_without_a_class_names_stay_and_the_reason_is_there(checkpoint: Checkpoint) -> None:
    chosen = choose(checkpoint, "auto")
    assert chosen.relayout is None
    assert [layer.path for layer in chosen.layout.layers] == ["model.up", "model.norm"]
    assert chosen.rejection == NO_CLASS
    assert why_not_mlx_lm(chosen, ConvertOptions()) == NO_CLASS


def test_names_that_were_asked_for_need_no_reason(checkpoint: Checkpoint) -> None:
    chosen = choose(checkpoint, "keep")
    assert (chosen.relayout, chosen.rejection) == (None, "")
    assert why_not_mlx_lm(chosen, ConvertOptions()) == NO_CLASS


def test_mlx_lm_s_layout_or_none(checkpoint: Checkpoint) -> None:
    with pytest.raises(CheckpointError, match="Without mlx-lm's class") as caught:
        choose(checkpoint, "mlx-lm")
    assert [problem.where for problem in caught.value.problems] == ["--layout mlx-lm"]
