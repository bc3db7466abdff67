"""Lists that call a layer dense, or quantized, against what its tensors are."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import requant
from tests.support.conversions import rejection
from tests.support.format_folders import SOURCES, Source
from tests.support.number_formats import BF16
from tests.support.plan_texts import note_texts
from tests.support.safetensors_files import read_folder

pytestmark = pytest.mark.sweep(3)

LISTS = (
    "ignore",
    "ignored_layers",
    "modules_to_not_convert",
    "exclude_modules",
    "exclude",
    "llm_int8_skip_modules",
    "skip_modules",
)
CALLS = "dense, but 1 layer is stored as"


def path_of(source: Source) -> str:
    return next(path for path in source.values if path not in ("head", "norm"))


def block_of(source: Source) -> dict[str, Any]:
    found: dict[str, Any] = source.config.setdefault("quantization_config", {})
    return found


def converted(source: Source, folder: Path) -> list[str]:
    """Values are checked; the notes of the plan."""
    source.write(folder / "source")
    report = requant.convert(
        folder / "source", folder / "out", layout="keep", dequantize=True, dtype="float32"
    )
    made, path = read_folder(folder / "out"), path_of(source)
    got = made.get(f"{path}.weight", made.get(path))
    assert got is not None
    assert np.array_equal(got, source.values[path])
    return list(note_texts(report.plan.notes))


ENTRIES = ("{}", "{}*", "re:.*{}", "*{}", "{last}")


@pytest.mark.parametrize("key", LISTS)
@pytest.mark.parametrize("name", [name for name in sorted(SOURCES) if name != "mlx"])
def test_a_layer_that_a_list_calls_dense_is_read_with_a_note(name: str, key: str, tmp_path: Path):
    """Two spellings each: a format meets all five under some key, and a key in some format."""
    first = sorted(SOURCES).index(name) + LISTS.index(key)
    for number in (first, first + 2):
        entry = ENTRIES[number % len(ENTRIES)]
        source = SOURCES[name]()
        path = path_of(source)
        entry = entry.format(path, last=path.rpartition(".")[2])
        block_of(source)[key] = ["head", entry]
        notes = converted(source, tmp_path / str(number))
        found = [note for note in notes if CALLS in note]
        assert len(found) == 1, notes
        assert f"quantization_config.{key} calls {entry!r} {CALLS}" in found[0]
        assert f"({path}): read as stored" in found[0]


@pytest.mark.parametrize("name", [name for name in sorted(SOURCES) if name != "mlx"])
def test_a_list_of_other_layers_is_not_a_matter(name: str, tmp_path: Path) -> None:
    source = SOURCES[name]()
    block_of(source)["modules_to_not_convert"] = [
        "head",
        "lm_head*",
        "re:.*gate$",
        "u",
        "experts.up",
    ]
    assert not any(CALLS in note for note in converted(source, tmp_path))


@pytest.mark.parametrize("name", ["gptq", "awq", "auto-round"])
@pytest.mark.parametrize(
    ("key", "rules", "entry"),
    [
        ("dynamic", {r"-:^up$": {}}, r"re:^up$"),
        ("dynamic", {r"-:u.": None}, r"re:u."),
        ("dynamic", {r"+:up": False}, r"re:up"),
        ("extra_config", {"up": {"bits": 16}}, "up"),
        ("extra_config", {"up": {"bits": 16, "data_type": "float"}}, "up"),
        ("extra_config", {r"u\w": {"bits": 32}}, r"re:.*(?:u\\w)"),
    ],
)
def test_rules_of_gptq_and_auto_round(
    name: str, key: str, rules: dict[str, Any], entry: str, tmp_path: Path
) -> None:
    source = SOURCES[name]()
    block_of(source)[key] = rules
    notes = converted(source, tmp_path)
    assert any(f"{key} calls '{entry}' {CALLS}" in note for note in notes), notes


def test_blocks_that_a_list_does_not_hold(tmp_path: Path) -> None:
    """modules_in_block_to_quantize: what is in a block and not in the list is left out."""
    for number, names in enumerate((["self_attn.q_proj"], ["self_attn.q_proj", "mlp.up"])):
        source = SOURCES["gptq"]()
        path = "model.layers.0.mlp.up"
        source.tensors = {n.replace("up.", f"{path}."): a for n, a in source.tensors.items()}
        source.values[path] = source.values.pop("up")
        source.values = {path: source.values[path]}
        block_of(source)["modules_in_block_to_quantize"] = [[name] for name in names]
        notes = converted(source, tmp_path / str(number))
        words = "modules_in_block_to_quantize leaves layers out, but 1 layer is stored as gptq"
        assert any(words in note for note in notes) is (number == 0)


@pytest.mark.parametrize("key", LISTS)
def test_a_list_that_is_none(key: str, tmp_path: Path) -> None:
    source = SOURCES["fp8"]()
    block_of(source)[key] = "up"
    text = rejection(source.write(tmp_path / "source"), tmp_path / "out", bits=8)
    assert f"quantization_config.{key}: is 'up', expected a list of names" in text


def test_a_list_names_a_layer_that_is_not_whole(tmp_path: Path) -> None:
    """Then nobody knows: rejected, by the name of what is missing."""
    source = SOURCES["modelopt-nvfp4"]()
    block_of(source)["exclude_modules"] = ["up"]
    del source.tensors["up.weight_scale"]
    assert "up." in rejection(source.write(tmp_path / "source"), tmp_path / "out", bits=8)


def test_in_memory(tmp_path: Path) -> None:
    source = SOURCES["modelopt-nvfp4"]()
    plain, _ = requant.transform_weights(source.tensors, block_of(source))
    block = block_of(source) | {"exclude_modules": ["up*"]}
    made, _ = requant.transform_weights(source.tensors, block)
    assert made.keys() == plain.keys()
    assert all(made[name].tobytes() == plain[name].tobytes() for name in made)


# -- the other way round --------------------------------------------------------------------------
SCHEME = {"weight": {"dtype": "int8", "qscheme": "per_channel"}}


@pytest.mark.parametrize(
    ("name", "declared", "where"),
    [
        (
            "modelopt-nvfp4",
            {"quantized_layers": {"up": {"quant_algo": "NVFP4"}, "head": {"quant_algo": "FP8"}}},
            "quantized_layers",
        ),
        ("quark", {"layer_quant_config": {"head": SCHEME}}, "layer_quant_config"),
        ("gptq", {"dynamic": {"+:head": {"bits": 8}}}, ""),
        ("auto-round", {"extra_config": {"head": {"bits": 8}}}, ""),
    ],
)
def test_a_layer_that_is_called_quantized_and_is_not_stays_dense(
    name: str, declared: dict[str, Any], where: str, tmp_path: Path
) -> None:
    source = SOURCES[name]()
    block_of(source).update(declared)
    notes = converted(source, tmp_path)
    assert np.array_equal(read_folder(tmp_path / "out")["head.weight"], source.values["head"])
    if where:
        words = f"By config.json: quantization_config.{where}, head.weight is quantized, but"
        assert any(words in note for note in notes), notes


def test_a_target_of_compressed_tensors_that_is_dense(tmp_path: Path) -> None:
    source = SOURCES["ct-int4"]()
    groups = block_of(source)["config_groups"]
    groups["more"] = {"targets": ["a.head"], "weights": {"num_bits": 4, "type": "int"}}
    source.tensors["a.head.weight"] = np.ones((4, 64), BF16)
    notes = converted(source, tmp_path)
    assert any("config_groups, a.head.weight is quantized, but" in note for note in notes)
    assert read_folder(tmp_path / "out")["a.head.weight"].tolist() == np.ones((4, 64)).tolist()
