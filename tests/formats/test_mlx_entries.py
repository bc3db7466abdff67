"""Entries of MLX's block that say less than all, or what the tensors contradict."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import requant
from tests.support.conversions import rejection
from tests.support.plan_texts import note_texts
from tests.support.safetensors_files import read_folder

DEFAULT = {"group_size": 64, "bits": 4}
UP = {"affine-6": (64, 6, "affine"), "affine-32": (32, 4, "affine")}
UP |= {"mxfp4": (32, 4, "mxfp4"), "mxfp8": (32, 8, "mxfp8"), "nvfp4": (16, 4, "nvfp4")}


def folder(
    place: Path, block: Any, up: tuple[int, int, str] = (64, 4, "affine"), **config: Any
) -> Path:
    """``down`` is 4-bit g64, ``up`` as said; written by MLX."""
    place.mkdir()
    random = mx.random.key(0)
    tensors = {}
    layers = {"down": (64, 4, "affine"), "up": up}
    for path, (group, bits, mode) in layers.items():
        weight = mx.random.normal((64, 128), key=random).astype(mx.bfloat16)
        made = mx.quantize(weight, group_size=group, bits=bits, mode=mode)
        roles = ("weight", "scales", "biases")
        tensors |= {f"{path}.{role}": x for role, x in zip(roles, made, strict=False)}
    mx.save_safetensors(str(place / "model.safetensors"), tensors)
    whole = {"model_type": "some_model", "quantization": block} | config
    (place / "config.json").write_text(json.dumps(whole))
    return place


def notes_of(source: Path, output: Path, up: tuple[int, int, str]) -> list[str]:
    """The notes, once the output is the source's tensors with the encodings that they have."""
    report = requant.convert(source, output, layout="keep")
    before, after = read_folder(source), read_folder(output)
    assert before.keys() == after.keys()
    assert all(after[name].tobytes() == before[name].tobytes() for name in before)
    text = (output / "config.json").read_text()
    block = requant.parse_quantization(text)
    assert block is not None
    assert block.quantization_for("up") == requant.Quantization(*up)
    assert block.quantization_for("down") == requant.Quantization.affine(64, 4)
    return list(note_texts(report.plan.notes))


@pytest.mark.parametrize(
    ("up", "entry"),
    [
        ("affine-6", {"bits": 6}),
        ("affine-6", {"bits": 6, "group_size": None}),
        ("affine-6", {"bits": 6, "mode": None}),
        ("affine-6", {"bits": 6, "mode": "affine", "remark": "x"}),
        ("affine-32", {"group_size": 32}),
        ("affine-32", {"group_size": 32, "bits": None}),
        ("affine-32", {"bits": 4}),  # the default of 64 does not fit, 32 alone does
        ("mxfp4", {"mode": "mxfp4"}),
        ("mxfp4", {"mode": "mxfp4", "bits": 4}),
        ("mxfp8", {"mode": "mxfp8", "group_size": 32}),
        ("nvfp4", {"mode": "nvfp4", "group_size": None, "bits": None}),
    ],
)
def test_an_entry_that_says_less(up: str, entry: dict[str, Any], tmp_path: Path) -> None:
    source = folder(tmp_path / "source", DEFAULT | {"up": entry}, UP[up])
    notes = notes_of(source, tmp_path / "out", UP[up])
    assert not any("believed" in note for note in notes)


@pytest.mark.parametrize(
    "block", [{"bits": 4}, {"group_size": 64}, {"mode": "affine"}, {"bits": 4, "group_size": None}]
)
def test_a_block_that_says_less(block: dict[str, Any], tmp_path: Path) -> None:
    notes_of(folder(tmp_path / "source", block), tmp_path / "out", (64, 4, "affine"))


@pytest.mark.parametrize("up", ["mxfp4", "mxfp8", "nvfp4"])
@pytest.mark.parametrize("entry", [False, None, {"group_size": 64, "bits": 4}, {"mode": "affine"}])
def test_scales_that_are_bytes_leave_one_mode(up: str, entry: Any, tmp_path: Path) -> None:
    source = folder(tmp_path / "source", DEFAULT | {"up": entry}, UP[up])
    notes = notes_of(source, tmp_path / "out", UP[up])
    found = [note for note in notes if "its tensors leave one reading" in note]
    assert len(found) == 1
    assert "config.json: quantization.up" in found[0]
    assert up in found[0]


def test_float_codes_that_the_block_does_not_name(tmp_path: Path) -> None:
    source = folder(tmp_path / "source", DEFAULT, UP["nvfp4"])
    notes = notes_of(source, tmp_path / "out", UP["nvfp4"])
    assert any("says affine 4-bit g64 of up, but" in note for note in notes)


@pytest.mark.parametrize(
    ("up", "entry", "words"),
    [
        ("affine-6", {"group_size": 64, "bits": 4}, "fit affine 3-bit g128 or affine 6-bit g64"),
        ("affine-6", False, "is false, yet up.scales is in the checkpoint"),
        ("affine-6", None, "is false, yet up.scales is in the checkpoint"),
        ("affine-6", {"bits": "6"}, "'bits' must be an integer, got '6'"),
        ("affine-6", {"bits": 6.0}, "'bits' must be an integer, got 6.0"),
        ("affine-6", {"bits": 6, "mode": "int"}, "'mode' must be one of affine"),
        ("affine-6", {"bits": 6, "mode": 1}, "'mode' must be one of affine"),
        ("affine-6", "6 bits", "must be false or a quantization object, got '6 bits'"),
        ("affine-6", 6, "must be false or a quantization object, got 6"),
        ("affine-6", [6], "must be false or a quantization object, got [6]"),
        ("affine-6", {"bits": 7}, "7"),
    ],
)
def test_what_is_wrong_is_named_by_its_entry(up: str, entry: Any, words: str, tmp_path: Path):
    text = rejection(folder(tmp_path / "source", DEFAULT | {"up": entry}, UP[up]), tmp_path / "out")
    assert "config.json: quantization.up" in text
    assert words in text, text


def test_every_entry_is_named_in_one_run(tmp_path: Path) -> None:
    block = DEFAULT | {"up": {"bits": "6"}, "down": {"group_size": []}}
    text = rejection(folder(tmp_path / "source", block), tmp_path / "out")
    assert "config.json: quantization.up: 'bits'" in text
    assert "config.json: quantization.down: 'group_size'" in text


def test_remarks_of_other_tools_name_no_layer(tmp_path: Path) -> None:
    block = DEFAULT | {"dataset": "wikitext", "version": 2, "tuned": None, "gone": {"bits": "x"}}
    text = rejection(folder(tmp_path / "source", block), tmp_path / "out")
    assert "config.json: quantization.gone: 'bits'" in text
    del block["gone"]
    notes_of(folder(tmp_path / "b", block), tmp_path / "out", (64, 4, "affine"))


def test_the_default_is_named_as_the_block(tmp_path: Path) -> None:
    text = rejection(folder(tmp_path / "source", {"group_size": "64", "bits": 4}), tmp_path / "out")
    assert "config.json: quantization: 'group_size' must be an integer, got '64'" in text


@pytest.mark.parametrize("key", ["quantization", "quantization_config"])
def test_in_a_section(key: str, tmp_path: Path) -> None:
    source = folder(tmp_path / "source", None, text_config={key: DEFAULT, "hidden_size": 128})
    notes_of(source, tmp_path / "out", (64, 4, "affine"))
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["text_config"] == {"hidden_size": 128}


def test_values_are_mlx_s(tmp_path: Path) -> None:
    """In the dtype of the scales, and in float32 with the scales in float32."""
    source = folder(tmp_path / "source", DEFAULT | {"up": {"bits": 6}}, UP["affine-6"])
    stored = mx.load(str(source / "model.safetensors"))
    words, *pair = (stored[f"up.{role}"] for role in ("weight", "scales", "biases"))
    for dtype, name in ((pair[0].dtype, None), (mx.float32, "float32")):
        out = tmp_path / f"out-{name}"
        requant.convert(source, out, layout="keep", dequantize=True, dtype=name)
        parts = [x.astype(dtype) for x in pair]
        wanted = mx.dequantize(words, *parts, group_size=64, bits=6)
        found = mx.load(str(out / "model.safetensors"))["up.weight"]
        assert found.dtype == wanted.dtype and bool(mx.array_equal(found, wanted))


WRAPPED = {
    "model.layers.0.up": ("layers.0.up", "language_model.model.layers.0.up"),
    "language_model.model.layers.0.up": ("model.layers.0.up", "language_model.layers.0.up"),
    "model.language_model.layers.0.up": ("language_model.model.layers.0.up", "layers.0.up"),
}
MIXED = [(path, name) for path, names in WRAPPED.items() for name in names]


def wrapped(place: Path, path: str, up: tuple[int, int, str], block: Any) -> Path:
    source = folder(place, block, up)
    tensors = mx.load(str(source / "model.safetensors"))
    assert isinstance(tensors, dict)
    tensors = {name.replace("up.", f"{path}."): array for name, array in tensors.items()}
    mx.save_safetensors(str(source / "model.safetensors"), tensors)
    return source


@pytest.mark.parametrize(("path", "name"), MIXED)
@pytest.mark.parametrize("up", [(64, 8, "affine"), (32, 8, "affine"), (64, 3, "affine")])
def test_an_entry_under_another_prefix(
    path: str, name: str, up: tuple[int, int, str], tmp_path: Path
) -> None:
    """The shapes of 8 bits and g32 are those of the default too, 4 bits and g64."""
    entry = dict(zip(("group_size", "bits", "mode"), up, strict=True))
    source = wrapped(tmp_path / "source", path, up, DEFAULT | {name: entry})
    report = requant.convert(source, tmp_path / "out", layout="keep")
    before, after = read_folder(source), read_folder(tmp_path / "out")
    assert {k: v.tobytes() for k, v in after.items()} == {k: v.tobytes() for k, v in before.items()}
    block = requant.parse_quantization((tmp_path / "out" / "config.json").read_text())
    assert block is not None
    assert block.quantization_for(path) == requant.Quantization(*up)
    assert block.quantization_for("down") == requant.Quantization.affine(64, 4)
    assert any("another prefix" in note and path in note for note in note_texts(report.plan.notes))


def test_entries_of_other_layers_do_not_count(tmp_path: Path) -> None:
    """A tower's layer, one that a tensor has the name of, one that the shapes do not allow."""
    path, other = "model.layers.0.up", {"group_size": 32, "bits": 8}
    entries = {"vision_tower.layers.0.up": other, "layers.0.up": {"group_size": 64, "bits": 6}}
    source = wrapped(tmp_path / "source", path, (64, 4, "affine"), DEFAULT | entries)
    report = requant.convert(source, tmp_path / "out", layout="keep")
    block = requant.parse_quantization((tmp_path / "out" / "config.json").read_text())
    assert block is not None
    assert block.quantization_for(path) == requant.Quantization.affine(64, 4)
    assert not any("prefix" in note for note in note_texts(report.plan.notes))


def test_two_entries_under_other_prefixes_that_differ(tmp_path: Path) -> None:
    """Neither is believed; the default does not fit, and the shapes allow two readings."""
    path = "model.language_model.layers.0.up"
    entries = {
        "language_model.model.layers.0.up": {"group_size": 64, "bits": 8},
        "layers.0.up": {"group_size": 128, "bits": 4},
    }
    source = wrapped(tmp_path / "source", path, (64, 8, "affine"), DEFAULT | entries)
    message = rejection(source, tmp_path / "out")
    assert f"{path}.scales" in message
    assert "affine 4-bit g128 or affine 8-bit g64" in message


@pytest.mark.parametrize("method", [None, "mlx"])
def test_a_block_in_quantization_config_alone(method: str | None, tmp_path: Path) -> None:
    block = DEFAULT | {"quant_method": method} if method else DEFAULT
    source = folder(tmp_path / "source", None, quantization_config=block)
    notes_of(source, tmp_path / "out", (64, 4, "affine"))
