"""Logits of text and an image: requant's model in memory, and the library's own converted folder.

The library converts and loads the folder by itself; both models are given the same arrays, and
every value of their outputs is the same, bit for bit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from PIL import Image
from pytest import MonkeyPatch

from requant.libraries import MLX_VLM, Request
from requant.libraries.forward_pass import ForwardPass, forward
from requant.libraries.generation_step import read_prompt
from requant.libraries.loading import Module, load, load_from_memory
from requant.mlx_lm.loading import convert_in_memory
from requant.mlx_vlm.image_prompts import ImagePrompt, prepare
from requant.quantization.config import Quantization
from tests.support.class_models import class_checkpoint, quiet
from tests.support.mlx_reference import as_bytes
from tests.support.processors import FAMILIES, write_seeing_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # of the libraries, while they are imported
]

Outputs = dict[str, dict[str, mx.array]]
MODES: list[tuple[str, Quantization | None]] = [
    ("dense", None),
    ("4 bits", Quantization.affine(64, 4)),
]
# Families of which an image of the sizes in the config runs through the whole model with text.
WHOLE = ["aya_vision", "colidefics3", "dots_ocr", "embedding_gemma2", "gemma3", "gemma4"]
WHOLE += ["glm_ocr", "granite4_vision", "granite_vision", "idefics3", "internvl"]
WHOLE += ["internvl_chat", "jina_vlm", "llava", "llmjpvl", "mimo_v2", "minimax_m3_vl"]
WHOLE += ["paligemma", "qwen3_5", "qwen3_5_moe", "smolvlm", "zaya1_vl"]
# Families of which it runs through the tower alone, next to text alone.
TOWERS = ["cohere_compass", "colqwen2_5", "deepseek_vl_v2", "deepseekocr", "glm4v", "glm4v_moe"]
TOWERS += ["got", "hunyuan_vl", "idefics2", "indic_ocr", "llava_bunny", "llava_next"]
TOWERS += ["llava_onevision", "minicpmo", "minicpmv4_6", "minicpmv4_7", "mistral_large3"]
TOWERS += ["muse_glimmer", "pixtral", "plamo2vl", "qwen3_vl_moe", "qwen4_exp"]
# mlx-vlm 0.7.10's class gives other logits of the same weights when it runs again on a CPU.
UNREPEATABLE = {"gemma4"}


def outputs_of(model: Module, config: dict[str, Any]) -> Outputs:
    """The outputs of a forward pass for each input that the class takes, by its label."""
    found: Outputs = {}
    with MonkeyPatch.context() as patch:
        patch.setattr(ForwardPass, "check", lambda _, label, x: found.update({label: dict(x)}))
        forward(model, config)
    return found


def both(source: Path, work: Path, quantization: Quantization | None) -> list[Module]:
    """Requant's model and the library's."""
    with quiet():
        MLX_VLM.convert(source, work / source.name, Request(quantization))
    options: dict[str, Any] = {"dequantize": True} if quantization is None else {}
    weights, report, _ = convert_in_memory(source, quantization, "mlx-vlm", **options)
    mine, _ = load_from_memory(source, "mlx-vlm", report.plan.config, weights)
    theirs, _ = load(work / source.name, "mlx-vlm")
    return [mine, theirs]


def assert_same(mine: Outputs, theirs: Outputs) -> None:
    assert mine.keys() == theirs.keys()
    for label, outputs in mine.items():
        assert outputs.keys() == theirs[label].keys(), label
        for name, x in outputs.items():
            assert as_bytes(x) == as_bytes(theirs[label][name]), (label, name)


@pytest.mark.parametrize("family", [*WHOLE, *TOWERS])
def test_made_up_images(family: str, tmp_path: Path) -> None:
    """Patterns of the sizes in the config, in 4 bits; where the whole model runs, dense too."""
    config = class_checkpoint(MLX_VLM, f"mlx_vlm.models.{family}", tmp_path / family)
    for name, quantization in MODES[-1:] if family in TOWERS else MODES:
        mine, theirs = both(tmp_path / family, tmp_path / name, quantization)
        found = outputs_of(mine, config)
        assert "text, 8 tokens" in found
        is_whole = any(label.startswith("image") and "and text" in label for label in found)
        assert is_whole == (family in WHOLE), [*found]
        assert len(found) > 1
        a, b = (dict(tree_flatten(model.parameters())) for model in (mine, theirs))
        assert a.keys() == b.keys() and all(as_bytes(x) == as_bytes(b[at]) for at, x in a.items())
        if family not in UNREPEATABLE:
            assert_same(found, outputs_of(theirs, config))


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "llava"])
def test_an_image_that_the_processor_prepares(family: str, tmp_path: Path) -> None:
    """Logits of a prompt about an image, as mlx-vlm's generation computes them."""
    from mlx_vlm import utils

    write_seeing_model(family, tmp_path / family)
    pixels = np.arange(84 * 56 * 3).reshape(56, 84, 3) * 7 % 251
    Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "a.png")
    config = utils.load_config(tmp_path / family)
    prompt = ImagePrompt.of([tmp_path / "a.png"], "a.png", answer="A pattern.")
    for name, quantization in MODES:
        mine, theirs = both(tmp_path / family, tmp_path / name, quantization)
        processor = utils.load_processor(tmp_path / name / family)
        given = prepare(processor, theirs.config, config, prompt)
        ids = mx.array(given.ids[None])
        found = [read_prompt(model, ids, given.inputs).logits for model in (mine, theirs)]
        assert found[0].shape == (1, len(given.ids), 384)
        assert as_bytes(found[0]) == as_bytes(found[1])
        red = Image.new("RGB", (84, 56), (250, 10, 10))
        red.save(tmp_path / "b.png")
        other = prepare(
            processor, theirs.config, config, ImagePrompt.of([tmp_path / "b.png"], "b.png")
        )
        length = min(len(given.ids), len(other.ids))
        assert not mx.array_equal(
            found[0][:, :length],
            read_prompt(mine, mx.array(other.ids[None]), other.inputs).logits[:, :length],
        )


def test_the_comparison_sees_one_weight(tmp_path: Path) -> None:
    config = class_checkpoint(MLX_VLM, "mlx_vlm.models.idefics3", tmp_path / "idefics3")
    mine, theirs = both(tmp_path / "idefics3", tmp_path / "work", None)
    bias = mine.vision_model.encoder.layers[0].mlp.fc1.bias
    mine.vision_model.encoder.layers[0].mlp.fc1.bias = bias + 1
    with pytest.raises(AssertionError, match="image"):
        assert_same(outputs_of(mine, config), outputs_of(theirs, config))
