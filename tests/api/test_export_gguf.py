"""``export`` to GGUF: values, codes and metadata, read by the ``gguf`` package and by requant."""

import json
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import pytest

import requant
from requant.gguf.config_metadata import WRITTEN
from tests.support.checkpoints import model
from tests.support.fixture_folders import fixture
from tests.support.gguf_files import llama_cpp_name, permuted, write_gguf
from tests.support.gguf_models import ALL, model_of
from tests.support.safetensors_files import read_folder

FAMILIES = [case for case, (kind, _) in ALL.items() if kind in WRITTEN and "vl" not in case]
OWN_KEYS = ("general.", "GGUF.")


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metadata, and tensors by name."""
    reader = gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    return fields, {tensor.name: tensor for tensor in reader.tensors}


def decoded(tensor: Any) -> np.ndarray:
    values: np.ndarray = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    return values


def values_of(folder: Path, into: Path) -> dict[str, np.ndarray]:
    """What the reader of the ``gguf`` package should find, in float32."""
    requant.convert(folder, into, dequantize=True, dtype="float32", layout="keep")
    config = json.loads((folder / "config.json").read_text())
    found = {}
    for name, values in read_folder(into).items():
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
        role = name.split(".")[-2]
        if config["model_type"] == "llama" and role in heads:
            values = permuted(values, config[heads[role]])
        found[llama_cpp_name(name, config)] = values
    return found


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.size == b.size and np.array_equal(a.view(np.uint32).ravel(), b.view(np.uint32).ravel())


@pytest.mark.parametrize(
    ("name", "options", "types"),
    [
        ("micro-llama", {"bits": 4}, {"Q4_1"}),
        ("micro-llama", {"bits": 2, "group_size": 128}, {"Q4_0", "Q4_1"}),
        ("micro-llama", {"bits": 3, "group_size": 32}, {"Q4_0", "Q4_1"}),
        ("micro-llama", {"bits": 5}, {"Q5_1"}),
        ("micro-llama", {"mode": "mxfp4"}, {"MXFP4"}),
        ("micro-moe", {"bits": 4}, {"Q4_1"}),
    ],
)
def test_values(name: str, options: dict[str, Any], types: set[str], tmp_path: Path) -> None:
    """Every tensor of an MLX folder has the same float32 values, and layers keep their codes."""
    requant.convert(model(name), tmp_path / "mlx", **options)
    report = requant.export(tmp_path / "mlx", tmp_path / "m.gguf", to="gguf")
    kept = [layer for layer in report.plan.layers if layer.treatment == "kept"]
    assert {layer.exactness for layer in kept} == {"exact"} and len(kept) >= 29
    assert {layer.target for layer in kept} <= types
    expected = values_of(tmp_path / "mlx", tmp_path / "dense")
    _, tensors = read(tmp_path / "m.gguf")
    assert tensors.keys() == expected.keys()
    for key, values in expected.items():
        assert same(decoded(tensors[key]), values), key
        assert tensors[key].shape.tolist()[::-1] == list(values.shape), key
    assert sorted(tmp_path.iterdir()) == sorted(tmp_path / x for x in ("dense", "m.gguf", "mlx"))


@pytest.mark.parametrize("max_memory", [None, 84_200_000])
def test_round_trip(max_memory: int | None, tmp_path: Path) -> None:
    """``convert`` of the file gives the same codes, in groups of 32, whatever the chunks."""
    requant.convert(model("micro-llama"), tmp_path / "mlx", bits=4, dtype="float16")
    requant.export(tmp_path / "mlx", tmp_path / "m.gguf", to="gguf", max_memory=max_memory)
    requant.convert(tmp_path / "m.gguf", tmp_path / "back")
    original, found = read_folder(tmp_path / "mlx"), read_folder(tmp_path / "back")
    assert original.keys() == found.keys()
    for name, expected in original.items():
        if name.endswith((".scales", ".biases")):
            expected = np.repeat(expected, 2, axis=-1)
        assert np.array_equal(found[name], expected), name


@pytest.mark.parametrize("case", FAMILIES)
def test_families_come_back(case: str, tmp_path: Path) -> None:
    """A file of each family, as llama.cpp's converter writes it, has the same tensors and keys."""
    model_type, _ = ALL[case]
    weights, config = model_of(model_type)
    source, output = tmp_path / "in.gguf", tmp_path / "out.gguf"
    write_gguf(source, weights, config)
    requant.export(source, output, to="gguf")
    (before, tensors), (after, found) = read(source), read(output)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        wide = found[name].tensor_type.name != "BF16"
        expected = decoded(tensor)
        if not wide:
            rounded = mx.array(expected).astype(mx.bfloat16).astype(mx.float32)
            expected = np.array(rounded)
        assert same(decoded(found[name]), expected), name
        assert found[name].shape.tolist() == tensor.shape.tolist()
    for key, value in before.items():
        if not key.startswith(OWN_KEYS):
            assert after[key] == value, key
    assert after["general.architecture"] == before["general.architecture"]


BLOCKS = ("gguf-mxfp4", "gguf-q4_0", "gguf-q4_1", "gguf-q5_0", "gguf-q5_1", "gguf-q8_0")


@pytest.mark.parametrize("through_mlx", [False, True])
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_come_back(name: str, through_mlx: bool, tmp_path: Path) -> None:
    """Blocks that another program wrote are the same bytes, directly and through an MLX folder."""
    source = next((fixture(name) / "checkpoint").glob("*.gguf"))
    given: Path = source
    if through_mlx:
        given = tmp_path / "mlx"
        requant.convert(source, given)
    requant.export(given, tmp_path / "out.gguf", to="gguf")
    (_, original), (_, found) = read(source), read(tmp_path / "out.gguf")
    assert original.keys() == found.keys()
    blocks = [x for x in original.values() if x.tensor_type.name not in ("F32", "F16", "BF16")]
    assert len(blocks) >= 7
    for tensor in blocks:
        if tensor.tensor_type.name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4"):
            assert found[tensor.name].tensor_type == tensor.tensor_type, tensor.name
            assert np.array_equal(found[tensor.name].data, tensor.data), tensor.name
