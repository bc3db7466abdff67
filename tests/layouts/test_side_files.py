"""Files next to the weights: copied from the source, where a library's convert saves some again.

``save_pretrained`` of a processor needs PyTorch for many, and what it writes depends on the version
of transformers that is installed. What each library's own convert leaves in a folder is compared
with requant's output, and everything that the library's loader takes from either must be the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import requant
from requant.libraries import LIBRARIES, Request
from requant.quantization.config import Quantization
from tests.support.class_models import quiet
from tests.support.library_models import write_model, write_tokenizer
from tests.support.processors import FAMILIES, write_seeing_model

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries, while they are imported

MADE = {"config.json", "model.safetensors", "model.safetensors.index.json"}
# Files that only a library's convert leaves, and why an output does without.
THEIRS_ONLY: dict[str, dict[str, str]] = {
    "mlx-lm": {},
    "mlx-vlm": {
        "README.md": "the model card, which requant upload writes",
        "processor_config.json": "settings of preprocessor_config.json, which transformers 5 "
        "writes once more under a section, and reads from either file",
    },
    "mlx-audio": {},
    "mlx-embeddings": {},
}
# Files that only requant leaves.
OURS_ONLY: dict[str, dict[str, str]] = {
    "mlx-lm": {"special_tokens_map.json": "transformers 5 writes it into tokenizer_config.json"},
    "mlx-vlm": {},
    "mlx-audio": {},
    "mlx-embeddings": {},
}
RECORD = "requant.json"
GENERATION = {"eos_token_id": [304, 299], "temperature": 0.5}


def write_source(library: str, folder: Path) -> None:
    """A small model of a library with the files that a published one has next to it."""
    write_model(library, folder)
    write_tokenizer(folder, {300: "<s>", 304: "</s>"}, {"bos_token": "<s>", "eos_token": "</s>"})
    documents: dict[str, Any] = {
        "generation_config.json": GENERATION,
        "special_tokens_map.json": {"bos_token": "<s>", "eos_token": "</s>"},
    }
    if library == "mlx-audio":
        documents["preprocessor_config.json"] = {
            "feature_extractor_type": "WhisperFeatureExtractor",
            "feature_size": 32,
            "processor_class": "Qwen2AudioProcessor",
        }
    for name, document in documents.items():
        (folder / name).write_text(json.dumps(document))
    (folder / "chat_template.jinja").write_text("<s>{{ messages[0]['content'] }}</s>")


def convert_both_ways(library: str, source: Path, work: Path) -> tuple[Path, Path]:
    """The output of requant, and of the library's convert with its tokenizers and processors."""
    adapter = LIBRARIES[library]
    kept = tuple(stub for stub in adapter.stubs if stub[1] == "create_model_card")
    ours, theirs = work / "ours" / source.name, work / "theirs" / source.name
    with quiet():
        request = Request(Quantization.affine(64, 4))
        replace(adapter, stubs=kept).convert(source, theirs, request)
    requant.convert(source, ours, bits=4, layout=library)
    return ours, theirs


def names(folder: Path) -> set[str]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix() for path in found}


def check_files(library: str, source: Path, ours: Path, theirs: Path) -> None:
    """The lists, and the bytes of what is copied."""
    unknown = names(theirs) - names(ours) - THEIRS_ONLY[library].keys()
    assert not unknown, f"{library}'s convert also leaves {unknown}"
    assert names(ours) - names(theirs) - OURS_ONLY[library].keys() == {RECORD}
    for name in names(source) - MADE:
        assert (ours / name).read_bytes() == (source / name).read_bytes(), name


def check_tokenizers(ours: Any, theirs: Any) -> None:
    text = "<s>A file holds bytes.</s>"
    assert ours.encode(text) == theirs.encode(text)
    assert ours.decode([64, 65, 300]) == theirs.decode([64, 65, 300])
    assert ours.eos_token_id == theirs.eos_token_id == 304
    said = [{"role": "user", "content": "Hello"}]
    chats = [x.apply_chat_template(said, tokenize=False) for x in (ours, theirs)]
    assert chats[0] == chats[1] == "<s>Hello</s>"


def test_mlx_lm(tmp_path: Path) -> None:
    from mlx_lm.utils import load

    write_source("mlx-lm", tmp_path / "source")
    ours, theirs = convert_both_ways("mlx-lm", tmp_path / "source", tmp_path)
    check_files("mlx-lm", tmp_path / "source", ours, theirs)
    loaded = [load(str(folder))[1] for folder in (ours, theirs)]
    check_tokenizers(*loaded)
    assert loaded[0].eos_token_ids == loaded[1].eos_token_ids == {304, 299}


@pytest.mark.slow
def test_mlx_embeddings(tmp_path: Path) -> None:
    from mlx_embeddings.utils import load_tokenizer

    write_source("mlx-embeddings", tmp_path / "source")
    ours, theirs = convert_both_ways("mlx-embeddings", tmp_path / "source", tmp_path)
    check_files("mlx-embeddings", tmp_path / "source", ours, theirs)
    check_tokenizers(*(load_tokenizer(folder) for folder in (ours, theirs)))


@pytest.mark.slow
def test_mlx_audio(tmp_path: Path) -> None:
    """Its classes load tokenizer and feature extractor with transformers."""
    from transformers import AutoFeatureExtractor, AutoTokenizer

    write_source("mlx-audio", tmp_path / "source")
    ours, theirs = convert_both_ways("mlx-audio", tmp_path / "source", tmp_path)
    check_files("mlx-audio", tmp_path / "source", ours, theirs)
    check_tokenizers(*(AutoTokenizer.from_pretrained(folder) for folder in (ours, theirs)))
    extractors = [AutoFeatureExtractor.from_pretrained(folder) for folder in (ours, theirs)]
    assert extractors[0].to_dict() == extractors[1].to_dict()


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_mlx_vlm(family: str, tmp_path: Path) -> None:
    """Its loader finds processor, template, generation settings: the arrays of an image."""
    from mlx_vlm import apply_chat_template, utils

    files = write_seeing_model(family, tmp_path / family)
    ours, theirs = convert_both_ways("mlx-vlm", tmp_path / family, tmp_path)
    check_files("mlx-vlm", tmp_path / family, ours, theirs)
    pixels = np.arange(84 * 56 * 3).reshape(56, 84, 3) * 7 % 251
    image = Image.fromarray(pixels.astype(np.uint8))
    given: list[Mapping[str, Any]] = []
    for folder in (ours, theirs):
        config = utils.load_config(folder)
        assert config["eos_token_id"] == GENERATION["eos_token_id"]
        processor = utils.load_processor(folder, True, eos_token_ids=config["eos_token_id"])
        text = apply_chat_template(processor, config, "What is this?", num_images=1)
        assert text.replace(files.image, "") == "What is this?"
        if family == "llava":  # its processor fails in both (tests/calibration/test_images.py)
            image_processor = processor.image_processor
            given.append({**image_processor(images=[image]), "ids": processor.tokenizer(text)})
            continue
        given.append(utils.prepare_inputs(processor, images=[image], prompts=text))
    assert given[0].keys() == given[1].keys() >= {"pixel_values"}
    for name, value in given[0].items():
        assert np.array_equal(np.array(value), np.array(given[1][name])), name


# -- kinds of files that converters copy --------------------------------------------------------
# By the patterns in the sources of mlx-lm 0.32.2, mlx-vlm 0.7.10, mlx-audio 0.6.2, mlx-embeddings
# 0.1.0, and the names under which transformers saves tokenizers and processors.
COPIED = [
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
    "additional_chat_templates/tool_use.jinja",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "spiece.model",
    "tekken.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "tiktoken.tiktoken",
    "video_preprocessor_config.json",
    "vocab.json",
    "vocab.txt",
    "modeling_own.py",
    "encoder_config/config.json",
    "1_Pooling/config.json",
    "modules.json",
    "sentence_bert_config.json",
    "voice.wav",
    "settings.yaml",
]


def test_every_kind_of_file_is_copied(tmp_path: Path) -> None:
    write_model("mlx-lm", tmp_path / "source")
    for name in COPIED:
        (tmp_path / "source" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "source" / name).write_text(json.dumps({"of": name}))
    requant.convert(tmp_path / "source", tmp_path / "out", bits=4, layout="mlx-lm")
    assert not {*COPIED} - names(tmp_path / "out")
    for name in COPIED:
        copy = tmp_path / "out" / name
        assert copy.read_bytes() == (tmp_path / "source" / name).read_bytes(), name
