"""``calibrate`` and ``compare`` with images: held against mlx-vlm's own model, run by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from PIL import Image
from pytest import MonkeyPatch

import requant
from requant.errors import BackendError, CheckpointError, ParseError, UsageError
from requant.importance.reader import read_statistics
from requant.importance.statistics_file import Importance
from requant.mlx_vlm.image_prompts import image_prompts
from tests.support.library_models import write_model, write_processor
from tests.support.processors import FAMILIES, write_seeing_model

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers, about settings of configs
TEXT = "A file holds bytes, and a tensor is a run of them with a shape. " * 30
RUN: dict[str, Any] = {"tokens": 96, "window": 48}
LAYER = "language_model.model.layers.1.mlp.down_proj"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A small Qwen2-VL with its processor, a text, two images and a file of rows."""
    write_model("mlx-vlm", tmp_path / "source")
    write_processor(tmp_path / "source")
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "images").mkdir()
    for name, size in (("b.png", (56, 84)), ("a.png", (84, 56))):
        pixels = np.arange(size[0] * size[1] * 3).reshape(size[1], size[0], 3) * 7 % 251
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "images" / name)
    rows: list[Any] = [
        "A line of text alone.",
        {"image": "images/a.png", "text": "A pattern of stripes."},
        {"images": ["images/a.png", "images/b.png"], "question": "Which?", "answer": "Both."},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "source"


class Inputs:
    """The inputs of each linear layer of a model, ``(tokens, in)`` a call."""

    def __init__(self, model: nn.Module) -> None:
        self.paths = {id(module): path for path, module in model.named_modules()}
        self.rows: dict[str, list[np.ndarray]] = {}

    @contextmanager
    def collected(self) -> Iterator[None]:
        original = nn.Linear.__call__

        def call(layer: nn.Linear, x: mx.array) -> mx.array:
            rows = np.array(x.astype(mx.float32)).reshape(-1, x.shape[-1])
            self.rows.setdefault(self.paths[id(layer)], []).append(rows)
            return original(layer, x)

        with MonkeyPatch.context() as patch:
            patch.setattr(nn.Linear, "__call__", call)
            yield


def by_hand(source: Path, prompts: list[tuple[str, list[Path]]]) -> dict[str, list[np.ndarray]]:
    """The inputs of each linear layer, ``(tokens, in)``: mlx-vlm's own model and processor."""
    from mlx_vlm import utils

    model = utils.load_model(source)
    model.set_dtype(mx.float32)
    processor = utils.load_processor(source)
    taken = Inputs(model)
    with taken.collected():
        for text, images in prompts:
            if not images:
                mx.eval(model(mx.array([processor.tokenizer.encode(text)])).logits)
                continue
            given = processor(images=[Image.open(x) for x in images], text=[text])
            grid = mx.array(given["image_grid_thw"])
            pixels = mx.array(given["pixel_values"])
            ids = mx.array(given["input_ids"])
            mx.eval(model(ids, pixels, image_grid_thw=grid).logits)
    return taken.rows


ONE = "<|vision_start|><|image_pad|><|vision_end|>"


def test_statistics_of_text_and_images(source: Path, tmp_path: Path) -> None:
    """Mean squares and Hessians of the inputs, over the tokens of a text and of two images."""
    out, images = tmp_path / "s.safetensors", tmp_path / "images"
    run = RUN | {"hessian": True, "images": [images]}
    found = requant.calibrate(source, out, tmp_path / "text.txt", **run)
    assert (found.windows, found.images, found.blockwise) == (4, 2, False)
    pieces = [TEXT[: 2 * 48].replace(" ", "Ġ")]
    tokens = list(TEXT)
    count = len(tokens) // 48
    chosen = np.sort(np.random.default_rng(0).permutation(count)[:2])
    pieces = ["".join(tokens[48 * n : 48 * (n + 1)]) for n in chosen]
    question = "Describe this image."
    prompts = [(piece, []) for piece in pieces]
    prompts += [(question + ONE, [images / name]) for name in ("a.png", "b.png")]
    taken = by_hand(source, prompts)
    statistics = read_statistics(out)
    for layer in (
        LAYER,
        "language_model.lm_head",
        "language_model.model.layers.0.self_attn.q_proj",
    ):
        x = np.concatenate(taken[layer]).astype(np.float64)
        importance = statistics.find(layer, (1, x.shape[1]))
        assert isinstance(importance, Importance), layer
        assert found.tokens == len(x)
        np.testing.assert_allclose(importance.weights(0), (x * x).mean(0), rtol=2e-3)
        hessian = np.triu(x.T @ x / len(x))
        room = 1e-4 * np.abs(hessian).max()
        np.testing.assert_allclose(importance.hessian(0), hessian, rtol=2e-3, atol=room)
    assert all(name.startswith("language_model.") for name in mx.load(str(out)))


@pytest.mark.slow
def test_the_same_file_on_each_run(source: Path, tmp_path: Path) -> None:
    """Rows with images and their answers too; another image gives another file."""
    texts = [tmp_path / "rows.jsonl", tmp_path / "text.txt"]
    outs = [tmp_path / f"{name}.safetensors" for name in "abc"]
    for out in outs[:2]:
        found = requant.calibrate(source, out, texts, images=[tmp_path / "images/b.png"], **RUN)
    assert (found.images, found.windows) == (3, 5)
    assert outs[0].read_bytes() == outs[1].read_bytes()
    Image.new("RGB", (56, 84), (250, 10, 10)).save(tmp_path / "images/b.png")
    requant.calibrate(source, outs[2], texts, images=[tmp_path / "images/b.png"], **RUN)
    assert outs[0].read_bytes() != outs[2].read_bytes()


# mlx-vlm 0.7.10's processor of LLaVA passes ``padding`` to an image processor that rejects it.
WITH_PROCESSORS = [family for family in FAMILIES if family != "llava"]


@pytest.mark.slow
@pytest.mark.parametrize("family", WITH_PROCESSORS)
def test_statistics_of_a_family(family: str, source: Path, tmp_path: Path) -> None:
    """Against the class's own call, without a cache; and the bytes of a second run."""
    from mlx_vlm import utils

    files = write_seeing_model(family, tmp_path / family)
    images, rows = tmp_path / "images", tmp_path / "only.jsonl"
    rows.write_text(json.dumps({"image": "images/b.png", "text": "A pattern."}))
    run = RUN | {"images": [images / "a.png"]}
    outs = [tmp_path / f"{name}.safetensors" for name in "ab"]
    for out in outs:
        found = requant.calibrate(tmp_path / family, out, rows, **run)
    assert (found.images, found.windows) == (2, 2) and found.not_observed == ()
    assert outs[0].read_bytes() == outs[1].read_bytes()

    model = utils.load_model(tmp_path / family)
    model.set_dtype(mx.float32)
    processor = utils.load_processor(tmp_path / family)
    question = "Describe this image."
    is_last = family in ("qwen2_vl", "gemma3")  # mlx-vlm puts the image after the text
    asked = question + files.image if is_last else files.image + question
    taken = Inputs(model)
    with taken.collected():
        for text, image in ((asked, "a.png"), (f"{asked}A pattern.", "b.png")):
            given = utils.prepare_inputs(
                processor, images=[str(images / image)], prompts=text, add_special_tokens=True
            )
            ids, pixels, mask = (
                given.pop(name) for name in ("input_ids", "pixel_values", "attention_mask")
            )
            if family == "gemma3":  # its own call lets text see what follows; generation does not
                embedded = model.get_input_embeddings(ids, pixels, mask).inputs_embeds
                mx.eval(model.language_model(ids, inputs_embeds=embedded).logits)
                continue
            mx.eval(model(ids, pixels, mask=mask, **given).logits)
    statistics = read_statistics(outs[0])
    layers = [path for path in taken.rows if path.startswith("language_model.")]
    assert len(layers) >= 2 * 7
    for layer in layers:
        x = np.concatenate(taken.rows[layer]).astype(np.float64)
        importance = statistics.find(layer, (1, x.shape[1]))
        assert isinstance(importance, Importance) and found.tokens == len(x), layer
        expected = (x * x).mean(0)
        room = 1e-3 * expected.max()
        np.testing.assert_allclose(importance.weights(0), expected, rtol=5e-3, atol=room)


def test_a_processor_that_fails(source: Path, tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    from mlx_vlm import utils

    def prepare_inputs(*_: Any, **__: Any) -> None:
        raise ValueError("height:1 or width:9 must be larger than 28")

    monkeypatch.setattr(utils, "prepare_inputs", prepare_inputs)
    run = RUN | {"images": [tmp_path / "images/a.png"]}
    with pytest.raises(BackendError, match=r"a\.png: the processor Qwen2VLProcessor rejects it: h"):
        requant.calibrate(source, tmp_path / "s.safetensors", **run)


def test_rows_become_conversations(source: Path) -> None:
    work = source.parent
    one, both = image_prompts([], [work / "rows.jsonl"])
    assert [turn["content"] for turn in one.messages] == [
        "Describe this image.",
        "A pattern of stripes.",
    ]
    assert one.images == (work / "images/a.png",)
    assert [turn["role"] for turn in both.messages] == ["user", "assistant"]
    assert len(both.images) == 2
    named = [prompt.images[0].name for prompt in image_prompts([work / "images"], [])]
    assert named == ["a.png", "b.png"]


@pytest.mark.parametrize(
    ("row", "error", "message"),
    [
        ({"image": 3, "text": "a"}, ParseError, r"line 1 has \"image\": 3, expected the path"),
        ({"image": "images/a.png"}, ParseError, r'line 1 is .*expected "image" with a string'),
        ({"image": "images/a.png", "messages": [3]}, ParseError, r'"messages": \[3\], expected'),
        ({"image": "no.png", "text": "a"}, UsageError, "no.png cannot be read as an image"),
    ],
)
def test_bad_rows_are_named(row: Any, error: type, message: str, source: Path) -> None:
    (source.parent / "rows.jsonl").write_text(json.dumps(row))
    with pytest.raises(error, match=message):
        image_prompts([], [source.parent / "rows.jsonl"])


def test_a_folder_without_images(source: Path) -> None:
    with pytest.raises(UsageError, match=r"holds no image \(\.bmp"):
        requant.calibrate(source, source.with_name("s.safetensors"), images=[source])


@pytest.mark.slow
def test_a_model_that_takes_no_images(source: Path, tmp_path: Path) -> None:
    """mlx-vlm's class for text would leave the image out without a word."""
    write_model("mlx-lm", tmp_path / "llama")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "llama" / name).write_bytes((source / name).read_bytes())
    run = RUN | {"images": [tmp_path / "images"]}
    with pytest.raises(CheckpointError, match="describes no part for images") as caught:
        requant.calibrate(tmp_path / "llama", tmp_path / "s.safetensors", **run)
    assert caught.value.action == "calibrated"


def test_a_processor_that_needs_torch(
    source: Path, tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    from mlx_vlm import utils

    def load_processor(*_: Any, **__: Any) -> None:
        raise ImportError("\nOwnProcessor requires the Torchvision library but it was not found")

    monkeypatch.setattr(utils, "load_processor", load_processor)
    run = RUN | {"images": [tmp_path / "images"]}
    expected = r"model_type 'qwen2_vl': OwnProcessor requires .*pip install torch torchvision"
    with pytest.raises(CheckpointError, match=expected):
        requant.calibrate(source, tmp_path / "s.safetensors", **run)


@pytest.mark.slow
def test_a_template_without_a_place_for_images(source: Path, tmp_path: Path) -> None:
    (source / "chat_template.jinja").write_text("{{ messages[0]['role'] }}")
    run = RUN | {"images": [tmp_path / "images/a.png"]}
    with pytest.raises(BackendError, match=r"a\.png: "):
        requant.calibrate(source, tmp_path / "s.safetensors", **run)


@pytest.mark.slow
def test_losses_over_prompts_about_images(source: Path, tmp_path: Path) -> None:
    """Against mlx-vlm's logits of both folders, over the tokens that are not places of images."""
    from mlx_vlm import utils

    requant.convert(source, tmp_path / "out", bits=4, layout="mlx-vlm")
    images = [tmp_path / "images" / name for name in ("a.png", "b.png")]
    found = requant.compare(source, tmp_path / "out", images=images).evaluation
    assert found is not None and found.windows == 2
    losses, tokens = [], 0
    for folder in (source, tmp_path / "out"):
        model = utils.load_model(folder)
        model.set_dtype(mx.float32)
        processor = utils.load_processor(folder)
        of_folder, tokens = [], 0
        for image in images:
            given = processor(images=[Image.open(image)], text=["Describe this image." + ONE])
            ids, grid, pixels = (
                mx.array(given[name]) for name in ("input_ids", "image_grid_thw", "pixel_values")
            )
            logits = np.array(model(ids, pixels, image_grid_thw=grid).logits[0], np.float64)
            row = np.array(ids[0])
            kept = np.flatnonzero(row[1:] != 300)
            odds = logits[kept] - np.log(np.exp(logits[kept]).sum(-1, keepdims=True))
            of_folder.append(-odds[np.arange(len(kept)), row[1:][kept]].mean())
            tokens += len(kept)
        losses.append(np.mean(of_folder))
    assert found.tokens == tokens
    assert found.loss_a.value == pytest.approx(losses[0], rel=3e-6)
    assert found.loss_b.value == pytest.approx(losses[1], rel=1e-3)
    assert found.divergence.value > 0
    with pytest.raises(UsageError, match="needs two windows"):
        requant.compare(source, tmp_path / "out", images=images[:1])
