"""Weights below a source: copied where a copied file names them, else left out."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import requant
from requant.sources.open import read_checkpoint
from tests.support.checkpoints import INDEX, tree, write_folder
from tests.support.hub_commands import Call
from tests.support.hub_server import Hub, serving
from tests.support.number_formats import bf16
from tests.support.plan_texts import note_texts
from tests.support.safetensors_files import header, weights, write_file

DENSE = weights({"linear.weight": ("F32", [4, 2])})
MODEL = weights({"embed_tokens.weight": ("BF16", [4, 2])})


def modules(*paths: str, kind: str = "Dense") -> bytes:
    found = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}
    ]
    for number, path in enumerate(paths, 1):
        name = f"sentence_transformers.models.{'Pooling' if 'Pooling' in path else kind}"
        found.append({"idx": number, "name": str(number), "path": path, "type": name})
    return json.dumps(found).encode()


def text(**values: Any) -> bytes:
    return json.dumps(values).encode()


# Files next to model.safetensors -> those of them that are weights and are copied.
COPIED: dict[str, tuple[dict[str, bytes], set[str]]] = {
    "modules.json": (
        {
            "modules.json": modules("1_Pooling", "2_Dense"),
            "1_Pooling/config.json": text(word_embedding_dimension=4),
            "2_Dense/config.json": text(in_features=4, out_features=2),
            "2_Dense/model.safetensors": DENSE,
        },
        {"2_Dense/model.safetensors"},
    ),
    "modules.json, a pickle": (
        {"modules.json": modules("2_Dense"), "2_Dense/pytorch_model.bin": bytes(3 << 20)},
        {"2_Dense/pytorch_model.bin"},
    ),
    "modules.json, a slash at the end": (
        {"modules.json": modules("./2_Dense/"), "2_Dense/model.safetensors": DENSE},
        {"2_Dense/model.safetensors"},
    ),
    "shards with an index of their own": (
        {
            "modules.json": modules("2_Dense"),
            "2_Dense/model-00001-of-00001.safetensors": DENSE,
            f"2_Dense/{INDEX}": text(weight_map={"a": "model-00001-of-00001.safetensors"}),
        },
        {"2_Dense/model-00001-of-00001.safetensors", f"2_Dense/{INDEX}"},
    ),
    "a router": (
        {
            "modules.json": modules("1_Router", kind="Router"),
            "1_Router/router_config.json": text(
                types={"query_0_Static": "sentence_transformers.models.StaticEmbedding"},
                structure={"query": ["query_0_Static"]},
            ),
            "1_Router/query_0_Static/model.safetensors": DENSE,
        },
        {"1_Router/query_0_Static/model.safetensors"},
    ),
    "a router in the source itself": (
        {
            "router_config.json": text(structure={"document": ["document_1_Dense"]}),
            "document_1_Dense/model.safetensors": DENSE,
        },
        {"document_1_Dense/model.safetensors"},
    ),
    "a pipeline": (
        {
            "model_index.json": text(vae=["diffusers", "AutoencoderKL"]),
            "vae/diffusion_pytorch_model.safetensors": DENSE,
            "vae/config.json": text(latent_channels=4),
        },
        {"vae/diffusion_pytorch_model.safetensors"},
    ),
    "a part with a config of its own": (
        {
            "speech_tokenizer/config.json": text(model_type="speech_codec"),
            "speech_tokenizer/model.safetensors": DENSE,
            "speech_tokenizer/preprocessor_config.json": b"{}",
        },
        {"speech_tokenizer/model.safetensors"},
    ),
    "its quantization is its own": (
        {
            "speech_tokenizer/config.json": text(model_type="speech_codec"),
            "speech_tokenizer/model.safetensors": DENSE,
            "speech_tokenizer/quantize_config.json": b"{}",
        },
        {"speech_tokenizer/model.safetensors", "speech_tokenizer/quantize_config.json"},
    ),
    "a processor's config": (
        {
            "preprocessor_config.json": text(feature_extractor={"path": "audio/encoder"}),
            "audio/encoder/weights.safetensors": DENSE,
        },
        {"audio/encoder/weights.safetensors"},
    ),
    "a single file": (
        {"config_of_voices.json": text(speaker="voices/anna.pt"), "voices/anna.pt": b"x"},
        {"voices/anna.pt"},
    ),
    "a single file next to the model": (
        {"generation_config.json": text(speaker_file="spk.pt"), "spk.pt": b"x", "other.pt": b"x"},
        {"spk.pt"},
    ),
}


@pytest.mark.parametrize("case", COPIED)
def test_weights_that_a_copied_file_names_are_copied(tmp_path: Path, case: str) -> None:
    files, named = COPIED[case]
    folder = write_folder(tmp_path / "source", {"model.safetensors": MODEL, **files})
    checkpoint = read_checkpoint(folder)
    expected = {name for name in files if name != "other.pt"}
    assert set(checkpoint.side_files) == expected
    assert named <= expected
    assert [name for name, _ in checkpoint.left_out] == ["other.pt"] * ("other.pt" in files)
    (note,) = note_texts(checkpoint.notes)
    assert note.startswith("Weights copied unchanged, named by ")
    assert list(checkpoint.tensors) == ["embed_tokens.weight"]


@pytest.mark.parametrize("case", ["modules.json", "a router", "a part with a config of its own"])
def test_they_are_in_the_output_byte_for_byte(tmp_path: Path, case: str) -> None:
    files, _ = COPIED[case]
    model = {"up.weight": bf16(64, 64)}
    folder = write_folder(tmp_path / "source", files)
    write_file(folder / "model.safetensors", model)
    requant.convert(folder, tmp_path / "out", bits=4, layout="keep")
    out = tree(tmp_path / "out")
    assert {name: out.get(name) for name in files} == files
    assert requant.verify(tmp_path / "out").problems == ()
    assert requant.verify(folder, tmp_path / "out").problems == ()


# Files next to model.safetensors -> what is left out, and the word that says why.
SEPARATE: dict[str, tuple[dict[str, bytes], str, str]] = {
    "no config names it": ({"more/m.safetensors": DENSE}, "more/m.safetensors", "no config names"),
    "another copy": (
        {"bf16/config.json": text(model_type="llama"), "bf16/model.safetensors": DENSE},
        "bf16/",
        "another copy of the model",
    ),
    "another copy in ONNX": (
        {"onnx/config.json": text(model_type="llama"), "onnx/model.onnx": b"x"},
        "onnx/",
        "another copy of the model",
    ),
    "a checkpoint of training": (
        {
            "checkpoint-500/config.json": text(model_type="other"),
            "checkpoint-500/model.safetensors": DENSE,
            "checkpoint-500/optimizer.pt": b"x",
        },
        "checkpoint-500/",
        "a checkpoint of its training",
    ),
    "an adapter": (
        {
            "lora/adapter_config.json": text(peft_type="LORA"),
            "lora/adapter_model.safetensors": DENSE,
        },
        "lora/",
        "an adapter",
    ),
    "the same weights in a pickle": (
        {
            "modules.json": modules("2_Dense"),
            "2_Dense/model.safetensors": DENSE,
            "2_Dense/pytorch_model.bin": bytes(2 << 20),
        },
        "2_Dense/pytorch_model.bin",
        "the same weights in another format",
    ),
}


@pytest.mark.parametrize("case", SEPARATE)
def test_what_is_left_out_is_left_out_with_what_describes_it(tmp_path: Path, case: str) -> None:
    files, left, why = SEPARATE[case]
    checkpoint = read_checkpoint(write_folder(tmp_path, {"model.safetensors": MODEL, **files}))
    ((name, reason),) = checkpoint.left_out
    assert name == left
    assert why in reason
    assert not any(x.startswith(left) for x in checkpoint.side_files)


def test_a_path_out_of_the_source_names_nothing(tmp_path: Path) -> None:
    write_folder(tmp_path / "secret", {"m.safetensors": DENSE}, config=None)
    files = {
        "model.safetensors": MODEL,
        "modules.json": modules("../secret", str(tmp_path / "secret"), "../source/2_Dense"),
        "2_Dense/m.safetensors": DENSE,
    }
    assert read_checkpoint(write_folder(tmp_path / "source", files)).side_files == ("modules.json",)


@pytest.mark.parametrize("raw", [b"", b"[", b"7", b"[7]", b'[{"path": 7}]', b"[" * 5000, b"\xff"])
def test_a_damaged_list_of_modules_names_nothing(tmp_path: Path, raw: bytes) -> None:
    files = {"model.safetensors": MODEL, "modules.json": raw, "2_Dense/m.safetensors": DENSE}
    checkpoint = read_checkpoint(write_folder(tmp_path, files))
    assert [name for name, _ in checkpoint.left_out] == ["2_Dense/m.safetensors"]


def test_a_module_without_its_weights_is_noted(tmp_path: Path) -> None:
    files = {"modules.json": modules("2_Dense"), "2_Dense/config.json": b"{}"}
    checkpoint = read_checkpoint(write_folder(tmp_path, {"model.safetensors": MODEL, **files}))
    assert note_texts(checkpoint.notes)[0].startswith(
        "modules.json names 2_Dense, and no weights of it are there"
    )


def test_a_model_in_a_subfolder_is_named_and_can_be_given(tmp_path: Path) -> None:
    """The layout of sentence-transformers before version 2: the source has no config."""
    listed = json.loads(modules("1_Pooling", "2_Dense"))
    listed[0]["path"] = "0_Transformer"
    files = {
        "modules.json": json.dumps(listed).encode(),
        "0_Transformer/config.json": text(model_type="llama"),
        "0_Transformer/model.safetensors": MODEL,
        "2_Dense/model.safetensors": DENSE,
    }
    folder = write_folder(tmp_path, files, config=None)
    with pytest.raises(requant.CheckpointError) as caught:
        read_checkpoint(folder)
    (problem,) = caught.value.problems
    place = problem.message.rpartition(": ")[2]
    assert place == str(folder / "0_Transformer")
    assert read_checkpoint(place).tensors


# -- on the hub --------------------------------------------------------------------------


NAME = "someone/embed"


@pytest.fixture
def hub() -> Iterator[Hub]:
    pytest.importorskip("huggingface_hub")
    values = np.zeros((64, 64), np.float32)
    head = {"up.weight": {"dtype": "F32", "shape": [64, 64], "data_offsets": [0, values.nbytes]}}
    files = {
        "config.json": text(model_type="none"),
        "model.safetensors": header(head) + values.tobytes(),
        "modules.json": modules("2_Dense"),
        "2_Dense/config.json": b"{}",
        "2_Dense/model.safetensors": DENSE,
        "more/m.safetensors": DENSE,
        "checkpoint-5/model.safetensors": DENSE,
        "checkpoint-5/config.json": b"{}",
    }
    with serving(Hub({NAME: files})) as running:
        yield running


@pytest.mark.slow
def test_a_repository_is_sorted_as_a_folder(hub: Hub, tmp_path: Path) -> None:
    call = Call(hub, tmp_path)
    done: subprocess.CompletedProcess[str] = call("convert", NAME, "out", "--layout", "keep")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "named by modules.json: 2_Dense/model.safetensors" in done.stdout
    out = tree(tmp_path / "out")
    assert out["2_Dense/model.safetensors"] == DENSE
    assert not any(name.startswith(("more", "checkpoint-5")) for name in out)
    asked = {path for _, path, _ in hub.log}
    assert not any("more/m.safetensors" in path or "checkpoint-5/model" in path for path in asked)
