"""The output's config.json: block, dtype and what of the source's goes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from requant.checkpoints.checkpoint import Checkpoint, StoredTensor
from requant.core.dtypes import TensorInfo
from requant.formats import SourceLayer, SourceLayout
from requant.formats.base import dense_layer
from requant.planning.output_config import output_config, output_quantization
from requant.planning.target_selection import TargetSelector
from requant.quantization.config import SKIP, PerLayerQuantization, Quantization
from requant.quantization.options import ConvertOptions
from requant.sources.open import read_checkpoint
from tests.support.checkpoints import write_folder

FOUR, EIGHT = Quantization.affine(64, 4), Quantization.affine(64, 8)
CONFIG = {
    "model_type": "llama",
    "torch_dtype": "float32",
    "text_config": {"dtype": "float32"},
    "quantization_config": {"quant_method": "awq"},
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    tensors = {"a.weight": ("BF16", [64, 128])}
    folder = write_folder(tmp_path / "source", {"model.safetensors": tensors}, config=CONFIG)
    return read_checkpoint(folder)


def layer(path: str) -> SourceLayer:
    return dense_layer(StoredTensor(f"{path}.weight", TensorInfo("BF16", (64, 128)), "f", 0))


def made(
    checkpoint: Checkpoint, options: ConvertOptions, **layout: Any
) -> tuple[PerLayerQuantization | None, dict[str, Any]]:
    source = SourceLayout((layer("a"), layer("b"), layer("c")), **layout)
    selector = TargetSelector(checkpoint, "dense", source, options)
    decisions = selector.select()
    quantization = output_quantization(selector, decisions)
    return quantization, output_config(selector, decisions, quantization, rotated=False)


def test_a_block_has_the_default_and_what_differs(checkpoint: Checkpoint) -> None:
    options = ConvertOptions(quantization=FOUR, overrides=(("b", EIGHT), ("c", SKIP)))
    _, config = made(checkpoint, options)
    block = config["quantization"]
    assert block == config["quantization_config"]
    assert (block["group_size"], block["bits"]) == (64, 4)
    assert block["b"] == {"group_size": 64, "bits": 8, "mode": "affine"}
    assert block["c"] is False
    assert "a" not in block


def test_what_the_source_s_block_skips_is_skipped(checkpoint: Checkpoint) -> None:
    source = PerLayerQuantization(FOUR, {"c": SKIP})
    options = ConvertOptions(quantization=FOUR, only=("a",))
    quantization, config = made(checkpoint, options, quantization=source)
    assert quantization is not None
    assert config["quantization"]["c"] is False
    assert "b" not in config["quantization"]


def test_a_dense_output_has_no_block_and_the_dtype_of_its_tensors(checkpoint: Checkpoint) -> None:
    quantization, config = made(checkpoint, ConvertOptions(dequantize=True, dtype="BF16"))
    assert quantization is None
    assert config == {
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "text_config": {"dtype": "bfloat16"},
    }
    assert checkpoint.config == CONFIG


def test_a_rotation_stays_only_where_layers_have_one(checkpoint: Checkpoint) -> None:
    changed = replace(checkpoint, config={**CONFIG, "rotation": {"group_size": 128}})
    _, config = made(changed, ConvertOptions(quantization=FOUR), rotation={"group_size": 64})
    assert "rotation" not in config
