"""GGUF files on the command line: every command that reads a source takes one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import pytest

from tests.support.checkpoints import MICRO_LLAMA
from tests.support.gguf_files import write_gguf
from tests.support.safetensors_files import read_folder

pytest.importorskip("mlx_lm")
Requant = Callable[..., Any]


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    loaded = mx.load(str(MICRO_LLAMA / "model.safetensors"))
    return {name: np.array(x.astype(mx.float32)) for name, x in loaded.items()}


@pytest.fixture
def source(tmp_path: Path, weights: dict[str, np.ndarray]) -> Path:
    """micro-llama at Q8_0, but for two layers at Q4_0 and Q6_K, with its tokenizer."""
    config = json.loads((MICRO_LLAMA / "config.json").read_text())
    kinds = {"blk.0.ffn_up.weight": "Q4_0", "blk.1.ffn_up.weight": "Q5_1"}
    folder = tmp_path / "source"
    folder.mkdir()
    write_gguf(
        folder / "micro-Q8_0.gguf", weights, config, "Q8_0", kinds=kinds, tokenizer=MICRO_LLAMA
    )
    return folder / "micro-Q8_0.gguf"


@pytest.mark.slow
def test_generate_continues_as_the_converted_folder_does(
    requant: Requant, source: Path, tmp_path: Path
) -> None:
    options = ("--prompt", "The file", "--max-tokens", 6, "--raw", "--json")
    before = source.read_bytes()
    from_file = requant("generate", source, *options)
    assert (from_file.code, from_file.err) == (0, "")
    assert sorted(path.name for path in source.parent.iterdir()) == [source.name]
    assert source.read_bytes() == before
    assert requant("convert", source, tmp_path / "out").code == 0
    declared, wanted = (
        json.loads(from_file.out),
        json.loads(requant("generate", tmp_path / "out", *options).out),
    )
    assert declared["text"] == wanted["text"]
    assert declared["tokens"] == wanted["tokens"] == 6
    assert declared["source"] == str(source)


def test_inspect_and_plan_read_headers_alone(requant: Requant, source: Path) -> None:
    """Nothing is written, and the data is not looked at: a file cut to zeros gives the same."""
    reader = gguf.GGUFReader(source)
    start = int(reader.data_offset)
    shown = [requant(command, source, "--json") for command in ("inspect", "plan")]
    assert [one.code for one in shown] == [0, 0]
    found, plan = (json.loads(one.out) for one in shown)
    assert found["format"] == "gguf"
    assert "gguf Q5_1" in shown[0].out
    layers = {layer["layer"]: layer for layer in plan["layers"]}
    assert layers["model.layers.0.mlp.up_proj"]["target"] == "affine 4-bit g32"
    assert layers["model.layers.1.mlp.up_proj"]["target"] == "affine 5-bit g32"
    assert layers["model.layers.2.mlp.up_proj"]["target"] == "affine 8-bit g32"
    assert {x["exactness"] for x in layers.values() if len(x["shape"]) > 1} == {"exact"}
    del reader
    with source.open("r+b") as file:
        size = file.seek(0, 2)
        file.truncate(start)
        file.truncate(size)
    again = [requant(command, source, "--json") for command in ("inspect", "plan")]
    assert [one.out for one in again] == [one.out for one in shown]
    assert sorted(path.name for path in source.parent.iterdir()) == [source.name]


def test_convert_reports_each_tensor(requant: Requant, source: Path, tmp_path: Path) -> None:
    result = requant("convert", source, tmp_path / "out", "--json")
    assert (result.code, result.err) == (0, "")
    report = json.loads(result.out)
    layers = {layer["layer"]: layer for layer in report["layers"]}
    assert layers["model.layers.0.mlp.up_proj"]["source"] == "gguf Q4_0"
    assert {x["exactness"] for x in layers.values() if len(x["shape"]) > 1} == {"exact"}
    assert requant("verify", source, tmp_path / "out").code == 0
    assert requant("compare", source, tmp_path / "out").code == 0


def test_dequantize_gives_the_package_s_values(
    requant: Requant, source: Path, tmp_path: Path, weights: dict[str, np.ndarray]
) -> None:
    options = ("--dequantize", "--dtype", "float32")
    assert requant("convert", source, tmp_path / "out", *options).code == 0
    out = read_folder(tmp_path / "out")
    assert out.keys() == weights.keys()
    for name, array in weights.items():
        kind = {"layers.0.mlp.up": "Q4_0", "layers.1.mlp.up": "Q5_1"}.get(name[6:21], "Q8_0")
        number = gguf.GGMLQuantizationType[kind]
        values = gguf.dequantize(gguf.quantize(array, number), number) if array.ndim > 1 else array
        assert np.array_equal(out[name], values), name
    assert "quantization" not in json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.mark.parametrize("command", ["inspect", "plan", "convert", "generate"])
def test_mmproj_is_kept_apart(command: str, requant: Requant, source: Path, tmp_path: Path) -> None:
    """Where images are not asked for it is left out, alone it is rejected by name."""
    part = source.parent / "mmproj-micro-f16.gguf"
    writer = gguf.GGUFWriter(part, "clip")
    writer.add_tensor("v.patch_embd.weight", np.ones((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    rest = {
        "convert": (tmp_path / "out",),
        "generate": ("--prompt", "The file", "--max-tokens", 2),
    }.get(command, ())
    alone = () if command == "generate" else ("--mmproj", "none")
    assert requant(command, source.parent, *rest, *alone).code == 0
    rejected = requant(command, part, *({"convert": (tmp_path / "no",)}.get(command, rest)))
    assert rejected.code == 1
    assert f"{part.name}: is a vision or audio part for llama.cpp (mmproj)" in rejected.err
    assert "Traceback" not in rejected.err
    assert not (tmp_path / "no").exists()
