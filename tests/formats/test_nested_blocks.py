"""Quantization blocks and dtypes in sections of config.json, and two blocks that disagree."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import requant
from tests.support.conversions import convert, dequantized, rejection
from tests.support.format_folders import SOURCES, Source
from tests.support.number_formats import BF16
from tests.support.plan_texts import note_texts
from tests.support.safetensors_files import read_folder

pytestmark = pytest.mark.sweep(4)

Config = dict[str, Any]
NESTS: dict[str, Callable[[Config], Config]] = {
    "text_config": lambda c: {"text_config": c},
    "llm_config": lambda c: {"llm_config": c},
    "thinker_config.text_config": lambda c: {"thinker_config": {"text_config": c}},
    "language_config": lambda c: {"language_config": c},
    "language_model": lambda c: {"language_model": c},
    "llm": lambda c: {"llm": c},
    "decoder": lambda c: {"decoder": c},
    "model.decoder.config": lambda c: {"model": {"decoder": {"config": c}}},
    "some_new_name": lambda c: {"some_new_name": c},
}
# Sections that describe a language model by their names.
OF_TEXT = ("text", "llm", "thinker", "language", "decoder")


def write(source: Source, folder: Path, config: Config) -> Path:
    source.write(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "some_vlm"} | config))
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in read_folder(folder).items()}


@pytest.mark.parametrize("nest", NESTS)
@pytest.mark.parametrize("name", sorted(SOURCES))
def test_a_block_is_found_where_it_is_nested(name: str, nest: str, tmp_path: Path) -> None:
    """The layers and values of the outermost block, and no block stays in the output."""
    source = SOURCES[name]()
    made = []
    config = {"hidden_size": 128, "dtype": "bfloat16"} | source.config
    for number, whole in enumerate((config, NESTS[nest](config))):
        folder = write(source, tmp_path / f"source{number}", whole)
        output = tmp_path / f"out{number}"
        requant.convert(folder, output, layout="keep", dequantize=True)
        made.append(files_of(output))
    assert made[0] == made[1]
    written = json.loads((output / "config.json").read_text())
    left = NESTS[nest]({"hidden_size": 128, "dtype": "bfloat16"})
    assert written == {"model_type": "some_vlm"} | left


@pytest.mark.parametrize("nest", NESTS)
def test_codes_that_stay_leave_one_block(nest: str, tmp_path: Path) -> None:
    source = SOURCES["gptq"]()
    folder = write(source, tmp_path / "source", NESTS[nest]({"hidden_size": 128} | source.config))
    requant.convert(folder, tmp_path / "out", layout="keep")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written.pop("quantization") == written.pop("quantization_config")
    assert written == {"model_type": "some_vlm"} | NESTS[nest]({"hidden_size": 128})
    assert requant.verify(tmp_path / "out").ok


@pytest.mark.parametrize("nest", [nest for nest in NESTS if nest.startswith(OF_TEXT)])
def test_the_dtype_is_that_of_the_nested_config(nest: str, tmp_path: Path) -> None:
    """Float32 scales of integers become the model's dtype; other sections do not count."""
    source = SOURCES["bnb-int8"]()
    config = NESTS[nest]({"torch_dtype": "float16"} | source.config)
    config["vision_config"] = {"torch_dtype": "float32"}
    folder = write(source, tmp_path / "source", config)
    requant.convert(folder, tmp_path / "out", layout="keep")
    assert read_folder(tmp_path / "out")["up.scales"].dtype == np.float16
    requant.convert(folder, tmp_path / "b", layout="keep", dtype="bfloat16")
    assert read_folder(tmp_path / "b")["up.scales"].dtype == BF16
    written = json.loads((tmp_path / "b" / "config.json").read_text())
    assert written["vision_config"] == {"torch_dtype": "float32"}
    assert '"torch_dtype": "bfloat16"' in json.dumps(written)


def test_a_word_that_is_not_a_block_stays(tmp_path: Path) -> None:
    """Codecs call their residual vectors "quantization" too."""
    source = SOURCES["gptq"]()
    codec = {"codec_config": {"quantization": {"levels": 8}, "hidden_size": 4}}
    folder = write(source, tmp_path / "source", source.config | codec)
    requant.convert(folder, tmp_path / "out", layout="keep")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["codec_config"] == codec["codec_config"]


def test_a_nested_block_of_no_format_that_is_read_is_named(tmp_path: Path) -> None:
    source = SOURCES["bitnet"]()
    folder = write(
        source,
        tmp_path / "source",
        {"llm_config": {"quantization_config": {"quant_method": "other"}}},
    )
    text = rejection(folder, tmp_path / "out", bits=8)
    assert "config.json: llm_config.quantization_config: quant_method 'other' is none" in text


# -- two blocks -----------------------------------------------------------------------------------
def two(first: Config, second: Config) -> Config:
    return {"quantization_config": first, "text_config": {"quantization_config": second}}


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("key", ["bits", "group_size", "quant_method"])
def test_the_block_counts_that_fits_the_tensors(key: str, order: int, tmp_path: Path) -> None:
    source = SOURCES["gptq"]()
    right = source.config["quantization_config"]
    wrong = right | {key: {"bits": 8, "group_size": 64, "quant_method": "awq"}[key]}
    pair = (right, wrong)[::order]
    folder = write(source, tmp_path / "source", two(*pair))
    made, report = convert(folder, tmp_path / "out", dequantize=True, dtype="float32")
    assert np.array_equal(made["up.weight"], source.values["up"])
    notes = [note for note in note_texts(report.plan.notes) if "contradict each other" in note]
    assert bool(notes) is (order == -1)
    if notes:
        assert key in notes[0]
        assert "fit config.json: text_config.quantization_config, which counts" in notes[0]


def test_a_file_that_fits_counts_before_a_config_that_does_not(tmp_path: Path) -> None:
    source = SOURCES["awq"]()
    right = source.config["quantization_config"]
    folder = write(source, tmp_path / "source", {"quantization_config": {**right, "bits": 8}})
    (folder / "quant_config.json").write_text(json.dumps(right))
    report = requant.convert(folder, tmp_path / "out", layout="keep")
    assert any(
        "fit quant_config.json, which counts" in note for note in note_texts(report.plan.notes)
    )


@pytest.mark.parametrize("place", ["text_config", "quantize_config.json"])
def test_two_that_fit_and_mean_other_values_are_rejected_by_name(place: str, tmp_path: Path):
    """How zeros are stored no tensor of an asymmetric layer tells."""
    source = SOURCES["gptq"]()
    first = source.config["quantization_config"] | {"checkpoint_format": "gptq"}
    second = first | {"checkpoint_format": "gptq_v2"}
    nested = place == "text_config"
    config = two(first, second) if nested else {"quantization_config": first}
    folder = write(source, tmp_path / "source", config)
    if not nested:
        (folder / place).write_text(json.dumps(second))
    text = rejection(folder, tmp_path / "out")
    where = "config.json: text_config.quantization_config" if nested else place
    assert "config.json: quantization_config: and" in text
    assert f"and {where} contradict each other (checkpoint_format), and the tensors fit" in text
    (folder / "config.json").write_text(json.dumps({"quantization_config": first}))
    if not nested:
        (folder / place).unlink()
    requant.convert(folder, tmp_path / "out", layout="keep")


def test_blocks_of_two_parts_of_a_model_are_both_right(tmp_path: Path) -> None:
    """The text's integers and the tower's FP8: neither block is wrong."""
    source, tower = SOURCES["awq"](), SOURCES["fp8"]()
    source.tensors |= {f"vision.{part}": tower.tensors[part] for part in tower.parts}
    config = {"text_config": source.config, "vision_config": tower.config}
    folder = write(source, tmp_path / "source", config)
    made = dequantized(folder, tmp_path / "out")
    assert np.array_equal(made["up.weight"], source.values["up"])
    assert np.array_equal(made["vision.up.weight"], tower.values["up"])
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == {"model_type": "some_vlm", "text_config": {}, "vision_config": {}}


def test_two_that_say_the_same_in_other_words_are_not_a_contradiction(tmp_path: Path) -> None:
    source = SOURCES["modelopt-nvfp4"]()
    folder = write(source, tmp_path / "source", source.config)
    side = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4"}}
    (folder / "hf_quant_config.json").write_text(json.dumps(side))
    notes = note_texts(requant.plan(folder, layout="keep").notes)
    assert not any("contradict" in note for note in notes)
