"""Commands that load a model with its MLX library: verify --load, convert, generate --image."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from tests.support.commands import Result
from tests.support.library_models import write_model, write_processor

Requant = Callable[..., Result]
PROMPT = "What is this?"
RUN = "text, 8 tokens; image 168 x 168 and text, 44 tokens: all 19,968 logits finite"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_model("mlx-vlm", tmp_path / "source")
    write_processor(tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def damaged(source: Path) -> Path:
    """The source without the last norm."""
    weights = dict(mx.load(str(source / "model.safetensors")))
    del weights["language_model.model.norm.weight"]
    mx.save_safetensors(str(source / "model.safetensors"), weights)
    return source


@pytest.mark.slow
def test_an_output_that_loads(requant: Requant, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = requant("convert", source, out, "--bits", "4", "--layout", "keep", "--verify-load")
    assert made.code == 0 and RUN in made.out
    found = requant("verify", out, "--load")
    assert found.code == 0 and "as requant.json says" in found.out and RUN in found.out
    assert "loads in" not in requant("verify", out).out
    alone = requant("verify", source, "--load")
    assert alone.code == 0 and "nothing was compared" in alone.out and RUN in alone.out


def test_an_output_that_does_not_load(requant: Requant, damaged: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = requant("convert", damaged, out, "--bits", "4", "--layout", "keep", "--verify-load")
    assert made.code == 1
    assert "out cannot be loaded:" in made.err and "norm.weight: mlx-vlm finds no" in made.err
    assert f"{out} is complete and stays; requant verify {out} --load" in made.err
    assert requant("verify", out).code == 0
    found = requant("verify", out, "--load", "--json")
    assert found.code == 1
    document = json.loads(found.out)
    assert not document["ok"] and document["problems"] == []
    (problem,) = document["load"]["problems"]
    assert problem["where"] == "language_model.model.norm.weight"


@pytest.mark.slow
def test_text_about_an_image(requant: Requant, source: Path, tmp_path: Path) -> None:
    """The text is that of mlx-vlm's own generation with the converted folder."""
    import mlx_vlm
    from PIL import Image

    image, out = tmp_path / "image.png", tmp_path / "out"
    levels = np.arange(84 * 112 * 3, dtype=np.uint32).reshape(84, 112, 3) * 37 % 256
    Image.fromarray(levels.astype(np.uint8)).save(image)
    assert requant("convert", source, out, "--bits", "4", "--layout", "keep").code == 0
    model, processor = mlx_vlm.load(str(out))
    config = json.loads((out / "config.json").read_text())
    text = mlx_vlm.apply_chat_template(processor, config, PROMPT, num_images=1)
    expected = mlx_vlm.generate(
        model, processor, text, image=[str(image)], max_tokens=6, temperature=0.0
    )
    options = ("--bits", "4", "--max-tokens", "6", "-p", PROMPT)
    found = requant("generate", source, *options, "--image", image, "--json")
    assert found.code == 0, found.err
    answer = json.loads(found.out)
    assert (answer["text"], answer["prompt_tokens"]) == (expected.text, expected.prompt_tokens)
    assert answer["prompt_tokens"] == 27  # with 3 x 4 merged patches of the image


def test_an_image_that_cannot_be_read(requant: Requant, source: Path, tmp_path: Path) -> None:
    (tmp_path / "image.png").write_text("text")
    found = requant("generate", source, "--image", tmp_path / "image.png", "-p", "a")
    assert found.code == 2 and "image.png cannot be read as an image" in found.err


@pytest.mark.slow
def test_statistics_and_losses_about_an_image(
    requant: Requant, source: Path, tmp_path: Path
) -> None:
    from PIL import Image

    levels = np.arange(84 * 112 * 3, dtype=np.uint32).reshape(84, 112, 3) * 37 % 256
    for name in ("a.png", "b.png"):
        Image.fromarray(levels.astype(np.uint8)).save(tmp_path / name)
    (tmp_path / "text.txt").write_text("A file holds bytes. " * 20)
    images = ("--image", tmp_path / "a.png", "--image", tmp_path / "b.png")
    texts = ("--text", tmp_path / "text.txt", "--tokens", "64", "--window", "32")
    out, statistics = tmp_path / "out", tmp_path / "s.safetensors"
    made = requant("calibrate", source, "-o", statistics, *texts, *images)
    assert made.code == 0, made.err
    assert "2 with images" in made.out and "images are run through all of it" in made.out
    options = ("--bits", "4", "--layout", "mlx-vlm", "--imatrix", statistics)
    assert requant("convert", source, out, *options).code == 0
    found = requant("compare", source, out, *images, "--json")
    assert found.code == 0, found.err
    assert json.loads(found.out)["evaluation"]["windows"] == 2
