"""Model cards: metadata as the libraries keep them, the task, and how to run the model."""

from __future__ import annotations

import ast
import importlib
import re
import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("huggingface_hub")

import yaml

import requant
from requant.api.convert import plan
from requant.reports.front_matter import FrontMatter, read_front_matter
from requant.reports.library_usage import LIBRARIES, command_of, task_of, usage
from requant.reports.model_card import model_card
from requant.reports.record_summary import Figures
from tests.support.library_models import write_model

MICRO = Path(__file__).parents[2] / "examples" / "micro-llama"
GATED = """---
license: other
license_name: llama3.2
license_link: LICENSE
language: [en, "no"]
datasets:
- org/data
tags: [facebook, llama, mlx, llama]
pipeline_tag: text-generation
library_name: transformers
base_model: org/base
base_model_relation: finetune
extra_gated_prompt: |
  ### LICENSE AGREEMENT
  "Agreement" means the terms.
extra_gated_fields:
  First Name: text
  Country: country
  I agree: checkbox
extra_gated_button_content: Submit
widget:
- text: Hello
  example_title: A greeting
---
# Of the source
"""
OWN = ("tags", "library_name", "base_model", "base_model_relation", "pipeline_tag")


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> Figures:
    output = tmp_path_factory.mktemp("cards") / "out"
    requant.convert(MICRO, output, bits=4, layout="keep")
    return requant.read_figures(output)


def metadata(card: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return found


def test_a_gated_card_survives(figures: Figures) -> None:
    source = metadata(GATED)
    card = model_card(figures, "me/m-4bit", "org/m", read_front_matter(GATED))
    found = metadata(card)
    assert {k: v for k, v in found.items() if k not in OWN} == {
        k: v for k, v in source.items() if k not in OWN
    }
    assert {key: found[key] for key in OWN} == {
        "tags": ["facebook", "llama", "mlx", "requant"],
        "library_name": "mlx",
        "base_model": "org/m",
        "base_model_relation": "quantized",
        "pipeline_tag": "text-generation",
    }
    assert "\n# me/m-4bit\n" in card and "# Of the source" not in card


def test_what_the_source_was_made_of_stays_if_the_source_is_not_known(figures: Figures) -> None:
    found = metadata(model_card(figures, "me/m", None, read_front_matter(GATED)))
    assert found["base_model"] == "org/base" and found["base_model_relation"] == "finetune"


def test_a_dense_output_is_not_called_quantized(tmp_path: Path) -> None:
    requant.convert(MICRO, tmp_path / "out", dequantize=True, layout="keep")
    card = model_card(
        requant.read_figures(tmp_path / "out"), "me/m-bf16", "org/m", read_front_matter(GATED)
    )
    assert metadata(card)["base_model"] == "org/m" and "base_model_relation" not in metadata(card)


@pytest.mark.parametrize("library", ["mlx_lm", "mlx_vlm"])
@pytest.mark.parametrize("front", [GATED, "---\nlicense: mit\n---\n", "---\ntags: [x]\n---\n"])
def test_metadata_are_those_that_the_library_keeps(
    library: str, front: str, figures: Figures, tmp_path: Path
) -> None:
    """``create_model_card`` of the library, which does not know ``requant`` and the relation."""
    pytest.importorskip(library)
    utils = importlib.import_module(f"{library}.utils")
    source = tmp_path / "source.md"
    source.write_text(front)
    utils.create_model_card(tmp_path, source)
    theirs = metadata((tmp_path / "README.md").read_text())
    figures = (
        replace(figures, options=replace(figures.options, layout=library.replace("_", "-")))
        if library == "mlx_lm"
        else figures
    )
    ours = metadata(model_card(figures, "me/m", str(source), read_front_matter(front)))
    assert ours.pop("base_model_relation") == "quantized"
    theirs.pop("base_model_relation", None)
    assert ours["tags"].pop() == "requant"
    assert ours["tags"] == list(dict.fromkeys(theirs.pop("tags")))
    del ours["tags"]
    if library == "mlx_vlm":  # the layout is another here: of a model of text, with its own task
        theirs.pop("pipeline_tag"), ours.pop("pipeline_tag")
    assert ours == theirs


CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"]},
    "llava": {"architectures": ["LlavaForConditionalGeneration"], "vision_config": {"a": 1}},
    "omni": {
        "architectures": ["OmniForConditionalGeneration"],
        "thinker_config": {"vision_config": {"a": 1}, "audio_config": {"a": 1}},
    },
    "voxtral": {"architectures": ["VoxtralForConditionalGeneration"], "audio_config": {"a": 1}},
    "whisper": {"architectures": ["WhisperForConditionalGeneration"], "model_type": "whisper"},
    "wav2vec2": {"architectures": ["Wav2Vec2ForCTC"], "model_type": "wav2vec2"},
    "bert": {"architectures": ["BertModel"], "model_type": "bert"},
    "bert_mlm": {"architectures": ["BertForMaskedLM"]},
    "ranker": {"architectures": ["BertForSequenceClassification"]},
    "gpt2": {"architectures": ["GPT2LMHeadModel"]},
    "clip": {"architectures": ["CLIPModel"], "vision_config": {"a": 1}},
    "t5": {"architectures": ["T5ForConditionalGeneration"]},
    "text_in_vlm": {"architectures": ["LlamaForCausalLM"], "vision_config": {}},
    "phi3_v": {"architectures": ["Phi3VForCausalLM"], "img_processor": {"a": 1}},
    "tts": {"model_type": "kokoro"},
    "unnamed": {},
}


@pytest.mark.parametrize(
    ("layout", "model", "task"),
    [
        ("mlx-lm", "llama", "text-generation"),
        ("mlx-lm", "gpt2", "text-generation"),
        ("mlx-lm", "unnamed", "text-generation"),
        ("mlx-lm", "llava", "image-text-to-text"),
        ("mlx-lm", "bert", "feature-extraction"),
        ("mlx-vlm", "llava", "image-text-to-text"),
        ("mlx-vlm", "omni", "any-to-any"),
        ("mlx-vlm", "voxtral", "audio-text-to-text"),
        ("mlx-vlm", "text_in_vlm", "text-generation"),
        ("mlx-vlm", "phi3_v", "image-text-to-text"),
        ("mlx-audio", "whisper", "automatic-speech-recognition"),
        ("mlx-audio", "wav2vec2", "automatic-speech-recognition"),
        ("mlx-audio", "voxtral", "audio-text-to-text"),
        ("mlx-audio", "tts", None),
        ("mlx-embeddings", "bert", "feature-extraction"),
        ("mlx-embeddings", "bert_mlm", "feature-extraction"),
        ("mlx-embeddings", "llama", "feature-extraction"),
        ("keep", "llama", "text-generation"),
        ("keep", "llava", "image-text-to-text"),
        ("keep", "omni", "any-to-any"),
        ("keep", "whisper", "automatic-speech-recognition"),
        ("keep", "bert_mlm", "fill-mask"),
        ("keep", "ranker", "text-classification"),
        ("keep", "clip", None),
        ("keep", "t5", None),
        ("keep", "unnamed", None),
    ],
)
def test_the_task_of_a_model_whose_card_has_none(layout: str, model: str, task: str | None) -> None:
    assert task_of(layout, CONFIGS[model], ["tokenizer.json"]) == task


def test_the_task_of_the_source_counts() -> None:
    files = ["tokenizer.json"]
    llama, llava, bert = CONFIGS["llama"], CONFIGS["llava"], CONFIGS["bert"]
    assert task_of("keep", llama, files, "image-to-text") == "image-to-text"
    assert task_of("mlx-lm", llama, files, "feature-extraction") == "feature-extraction"
    assert task_of("mlx-lm", llava, files, "image-text-to-text") == "image-text-to-text"
    # Without its tower it generates text only.
    assert task_of("mlx-lm", llama, files, "image-text-to-text") == "text-generation"
    assert task_of("mlx-embeddings", bert, ["modules.json"]) == "sentence-similarity"


def test_the_card_of_a_text_only_output_has_another_task(figures: Figures) -> None:
    source = read_front_matter("---\npipeline_tag: image-text-to-text\n---\n")
    figures = replace(figures, options=replace(figures.options, layout="mlx-lm"))
    assert metadata(model_card(figures, "me/m", None, source))["pipeline_tag"] == "text-generation"


# -- how to run it -----------------------------------------------------------------------------

RUNS = [
    (layout, task)
    for layout, library in LIBRARIES.items()
    for task in {**library.commands, **library.python}
]


def section(layout: str, task: str, model: str = "me/m-4bit") -> str:
    config = {"vision_config": {"a": 1}} if task in ("image-text-to-text", "any-to-any") else {}
    if task in ("audio-text-to-text", "any-to-any"):
        config["audio_config"] = {"a": 1}
    return usage(layout, task, config, model)


@pytest.mark.parametrize(("layout", "task"), RUNS)
def test_commands_and_imports_of_a_section_exist(layout: str, task: str) -> None:
    text = section(layout, task)
    assert "me/m-4bit" in text and "{" not in re.sub(r"\{\"role\".*\}", "", text)
    for module, options in re.findall(r"^(?:or `)?(mlx_\S+)( .*)", text, re.MULTILINE):
        package = pytest.importorskip(module.partition(".")[0]).__name__
        place = Path(find_spec(package).origin).parent.joinpath(*module.split(".")[1:])
        files = [place.with_suffix(".py"), *place.rglob("*.py")]
        source = "".join(x.read_text() for x in files if x.exists())
        for option in re.findall(r"--[a-z-]+", options):
            assert f'"{option}"' in source, f"{module} has no {option}"
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom):
                module = pytest.importorskip(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names)


@pytest.mark.parametrize(
    ("library", "command"),
    [
        ("mlx-vlm", "mlx_vlm.generate --model 'a b' --prompt \"Describe this image.\" --image"),
        ("mlx-audio", "mlx_audio.stt.generate --model 'a b' --audio audio.wav"),
        ("mlx-embeddings", ""),
    ],
)
def test_the_line_after_a_conversion(library: str, command: str, tmp_path: Path) -> None:
    write_model(library, tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    made = plan(tmp_path, bits=4)
    assert made.layout == library
    assert command_of(made, "a b").startswith(command)
    assert bool(command_of(made, "a b")) == bool(command)
    assert command_of(replace(made, loads=False), "a b") == ""


def test_the_python_of_mlx_lm_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a chat template and without, in mlx-lm itself."""
    pytest.importorskip("mlx_lm")
    requant.convert(MICRO, tmp_path / "out", bits=4)
    code = re.search(r"```python\n(.*?)```", section("mlx-lm", ""), re.DOTALL)[1]
    code = code.replace("me/m-4bit", str(tmp_path / "out")).replace("256", "3")
    seen: dict[str, Any] = {}
    exec(code, seen)
    assert seen["tokenizer"].chat_template is None and seen["prompt"] == "What is a file?"
    template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    (tmp_path / "out" / "chat_template.jinja").write_text(template)
    exec(code, seen)
    ids = seen["prompt"]
    text = ids if isinstance(ids, str) else seen["tokenizer"].decode(list(ids))
    assert "user" in text and "What is a file?" in text


def test_a_kept_layout_says_only_what_is_known(figures: Figures, tmp_path: Path) -> None:
    card = model_card(figures, "me/m", None, FrontMatter())
    assert "Tensors have the source's names" in card and "mlx_lm.generate" not in card
    text = section("keep", "image-text-to-text")
    assert "Whether it loads this one was not checked" in text and "--image" in text
    output = shutil.copytree(figures.output, tmp_path / "out")
    (output / "tokenizer.json").unlink()
    (output / "tokenizer_config.json").unlink()
    figures = replace(
        figures, output=str(output), options=replace(figures.options, layout="mlx-lm")
    )
    assert "it is not a model that generates text" in model_card(
        figures, "me/m", None, FrontMatter()
    )
