"""Whole models: logits of a GGUF file are those of the model that it was written from."""

import json
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm.utils import load_model

import requant
import requant.mlx_lm
from requant.errors import CheckpointError, UsageError
from requant.gguf.families import ARCHITECTURES as KNOWN
from requant.gguf.metadata import Metadata
from requant.gguf.special_tokens import special_ids, token_kinds
from tests.support.checkpoints import model
from tests.support.gguf_files import ARCHITECTURES, write_gguf
from tests.support.gguf_models import (
    OWN,
    SEEING,
    TOKENS,
    header_of,
    output_of,
    tiny,
    trained,
    values,
)
from tests.support.gguf_records import RECORDS
from tests.support.plan_texts import note_texts
from tests.support.safetensors_files import read_folder

pytestmark = pytest.mark.sweep(2)


@pytest.mark.parametrize("name", OWN)
def test_every_family(name: str, tmp_path: Path) -> None:
    """Names, config, order of rows, norms: float32 through GGUF changes nothing."""
    made, config = tiny(name)
    config.setdefault("tie_word_embeddings", False)
    weights = {k: v for k, v in values(made).items() if "rotary" not in k}
    path = tmp_path / "model.gguf"
    write_gguf(path, weights, config)
    requant.convert(path, tmp_path / "out", dequantize=True, layout="mlx-lm", dtype="float32")
    out = read_folder(tmp_path / "out")
    assert out.keys() == weights.keys()
    for key, array in weights.items():
        # One was added to these, and rounded.
        room = 2.0**-24 if "gemma" in name and "norm" in key else 0.0
        assert np.abs(out[key] - array).max() <= room, key
    expected = np.array(made(TOKENS))
    np.testing.assert_allclose(output_of(tmp_path / "out"), expected, atol=2e-5)


def as_q8(values: np.ndarray) -> np.ndarray:
    kind = gguf.GGMLQuantizationType.Q8_0
    return gguf.dequantize(gguf.quantize(values, kind), kind)


def logits_of(made: Any, weights: dict[str, np.ndarray]) -> np.ndarray:
    """In float32, whatever dtype the model had."""
    made.load_weights([(k, mx.array(v)) for k, v in weights.items()])
    return np.array(made(TOKENS))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["micro-llama", "qwen3-16m"])
def test_trained_models_at_q8(name: str, tmp_path: Path) -> None:
    """Codes are kept; logits are those of the dense model but for Q8_0's own error."""
    weights, config = trained(name)
    path = tmp_path / "model.gguf"
    write_gguf(path, weights, config, "Q8_0", tokenizer=model(name))
    report = requant.convert(path, tmp_path / "out")
    treatments = {layer.treatment for layer in report.plan.layers if len(layer.shape) > 1}
    assert treatments == {"kept"}
    assert report.plan.layout == "mlx-lm"
    found, tokenizer = mlx_lm.load(str(tmp_path / "out"))
    requant.convert(path, tmp_path / "wide", dtype="float32")
    original, _ = load_model(model(name))
    expected = logits_of(original, weights)
    rounded = {k: as_q8(v) if v.ndim > 1 else v for k, v in weights.items()}
    counterpart = logits_of(original, rounded)  # the values that the codes represent
    largest = np.abs(expected).max()
    assert np.abs(output_of(tmp_path / "wide") - counterpart).max() <= 1e-4 * largest
    assert np.square(counterpart - expected).mean() <= 0.02**2 * np.square(expected).mean()
    # MLX's CPU backend sums products of float16 in float16.
    got = np.array(found(TOKENS).astype(mx.float32))
    assert np.square(got - expected).mean() <= 0.04**2 * np.square(expected).mean()
    text = "The quick brown fox: it's 12 345 times faster.\n\tEnd"
    _, wanted = mlx_lm.load(str(model(name)))
    assert tokenizer.encode(text) == wanted.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert requant.verify(path, tmp_path / "out").ok
    (tmp_path / "out" / "tokenizer.json").write_text("{}")
    assert not requant.verify(path, tmp_path / "out").ok
    loaded, in_memory = requant.mlx_lm.load(path)
    assert mx.array_equal(loaded(TOKENS), found(TOKENS))
    assert in_memory.encode(text) == wanted.encode(text)
    assert in_memory.has_chat_template


def test_split_files_equal_the_whole_one(tmp_path: Path) -> None:
    weights, config = trained("micro-llama")
    write_gguf(tmp_path / "whole.gguf", weights, config, "Q4_0")
    (tmp_path / "split").mkdir()
    write_gguf(tmp_path / "split" / "m.gguf", weights, config, "Q4_0", split_tensors=7)
    parts = sorted((tmp_path / "split").iterdir())
    assert len(parts) > 3
    requant.convert(tmp_path / "whole.gguf", tmp_path / "a")
    for number, source in enumerate((tmp_path / "split", parts[2])):
        requant.convert(source, tmp_path / f"b{number}", threads=2, chunk_bytes=4096)
        for name in ("model.safetensors", "config.json"):
            assert (tmp_path / f"b{number}" / name).read_bytes() == (
                tmp_path / "a" / name
            ).read_bytes()
    parts[1].unlink()
    with pytest.raises(CheckpointError, match=r"m-00002-of-\d+\.gguf: does not exist"):
        requant.convert(parts[0], tmp_path / "c")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"!split.count": 4}, r"split\.count: says that the model has 4 parts, found 1; the parts"),
        (
            {"!general.quantization_version": 3},
            r"general\.quantization_version: is 3, known is 2: blocks may be laid out otherwise",
        ),
    ],
)
def test_files_that_say_they_are_other_than_they_are(
    more: dict[str, Any], words: str, tmp_path: Path
) -> None:
    weights, config = trained("micro-llama")
    write_gguf(tmp_path / "m.gguf", weights, config, "Q8_0", more=more)
    with pytest.raises(CheckpointError, match=words):
        requant.plan(tmp_path / "m.gguf")


def test_parts_that_do_not_say_how_many(tmp_path: Path) -> None:
    weights, config = trained("micro-llama")
    for number in (1, 2):
        name = f"m-0000{number}-of-00002.gguf"
        more = {"!split.no": "x"}
        write_gguf(tmp_path / name, weights, config, "Q8_0", more=more)
    with pytest.raises(CheckpointError, match=r"split\.count: is missing, found 2; the parts of"):
        requant.plan(tmp_path / "m-00001-of-00002.gguf")


def test_a_dense_file_is_quantized_like_a_dense_folder(tmp_path: Path) -> None:
    weights, config = trained("micro-llama")
    write_gguf(tmp_path / "m.gguf", weights, config, "BF16")
    requant.convert(tmp_path / "m.gguf", tmp_path / "a", bits=4)
    requant.convert(model("micro-llama"), tmp_path / "b", bits=4)
    ours, theirs = read_folder(tmp_path / "a"), read_folder(tmp_path / "b")
    assert ours.keys() == theirs.keys()
    assert [k for k in ours if ours[k].tobytes() != theirs[k].tobytes()] == []


@pytest.mark.slow
def test_config_from_the_original_folder(tmp_path: Path) -> None:
    weights, config = trained("qwen3-16m")
    write_gguf(tmp_path / "m.gguf", weights, config, "Q8_0")
    requant.convert(tmp_path / "m.gguf", tmp_path / "out", config_from=model("qwen3-16m"))
    made = json.loads((tmp_path / "out" / "config.json").read_text())
    assert made["transformers_version"] == config["transformers_version"]
    tokenizer = (tmp_path / "out" / "tokenizer.json").read_bytes()
    assert tokenizer == (model("qwen3-16m") / "tokenizer.json").read_bytes()
    with pytest.raises(UsageError, match="is for GGUF sources"):
        requant.convert(model("qwen3-16m"), tmp_path / "no", config_from=tmp_path)
    with pytest.raises(CheckpointError, match="there is no such folder"):
        requant.convert(tmp_path / "m.gguf", tmp_path / "no", config_from=tmp_path / "none")


def test_mmproj_stays_apart(tmp_path: Path) -> None:
    weights, config = trained("micro-llama")
    write_gguf(tmp_path / "m-Q8_0.gguf", weights, config, "Q8_0")
    writer = gguf.GGUFWriter(tmp_path / "mmproj-m.gguf", "clip")
    writer.add_tensor("v.patch_embd.weight", np.ones((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    report = requant.convert(tmp_path, tmp_path.parent / f"{tmp_path.name}-out", mmproj="none")
    assert [name for name, _ in report.plan.left_out] == ["mmproj-m.gguf"]
    with pytest.raises(CheckpointError, match="mmproj"):
        requant.convert(tmp_path / "mmproj-m.gguf", tmp_path / "no")


def test_two_models_in_a_folder(tmp_path: Path) -> None:
    weights, config = trained("micro-llama")
    write_gguf(tmp_path / "a.gguf", weights, config, "Q8_0")
    write_gguf(tmp_path / "b.gguf", weights, config, "Q4_0")
    with pytest.raises(CheckpointError, match=r"holds 2 GGUF models \(a.gguf, b.gguf\); give"):
        requant.plan(tmp_path)


def settings_only(path: Path, **values: Any) -> None:
    """A file without tensors."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in values.items():
        add = writer.add_string if isinstance(value, str) else writer.add_array
        add(key.replace("__", "."), value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"general__type": "adapter"}, "m.gguf: is a LoRA adapter; merge it"),
        ({"general__type": "imatrix"}, "m.gguf: is an importance matrix, which is not a model"),
        (
            {"tokenizer__ggml__tokens": ["a", "b"]},
            "m.gguf: holds no tensors, only a vocabulary of 2 tokens",
        ),
        ({}, "m.gguf: holds no tensors$"),
    ],
)
def test_files_that_are_not_models(values: dict[str, Any], words: str, tmp_path: Path) -> None:
    settings_only(tmp_path / "m.gguf", **values)
    with pytest.raises(CheckpointError, match=words):
        requant.plan(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("tokens", "ends"),
    [
        (["<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|start|>"], [0, 1, 2]),
        (["<|im_end|>", "<|endoftext|>", "<|im_start|>"], [0, 1]),
        (["<|return|>", "<|end|>", "<|call|>", "<|endoftext|>"], [0, 2, 3]),  # gpt-oss
        (["<eos>", "<end_of_turn>", "<start_of_turn>"], [0, 1]),
        (["<|endoftext|>", "<|end|>"], [0, 1]),  # Phi 3
        (["<|endoftext|>", "<|flush|>", "<|calls|>", "<|end|>"], [0, 1, 2]),  # Solar Open
        (["<eos>", "</s>"], [0, 1]),
        (["<turn|>", "</s>", "<|tool_response>"], [0, 2]),
        (["</s>", "a"], 0),
    ],
)
def test_every_token_that_ends_an_answer(tokens: list[str], ends: list[int] | int) -> None:
    """Many files name one of them alone; the others are known by their text."""
    values = {
        "tokenizer.ggml.tokens": tuple(tokens),
        "tokenizer.ggml.token_type": np.full(len(tokens), 3, np.int32),
        "tokenizer.ggml.eos_token_id": 0,
    }
    assert special_ids(Metadata("m.gguf", values)) == {"eos_token_id": ends}
    # Files that have them as plain text are wrong, except with </s>: a tag of HTML.
    values["tokenizer.ggml.token_type"] = np.ones(len(tokens), np.int32)
    plain = [n for n in (ends if isinstance(ends, list) else []) if n == 0 or tokens[n] != "</s>"]
    wanted = plain if len(plain) > 1 else 0
    assert special_ids(Metadata("m.gguf", values)) == {"eos_token_id": wanted}
    assert token_kinds(Metadata("m.gguf", values)) == [
        1 if token in ("</s>", "a", "<|start|>", "<|im_start|>", "<start_of_turn>") else 3
        for token in tokens
    ]


def test_kinds_that_are_not_whole_numbers() -> None:
    kinds = np.array([np.nan, np.inf, -np.inf, 1e300, 3.0])
    values = {"tokenizer.ggml.tokens": tuple("abcdef"), "tokenizer.ggml.token_type": kinds}
    assert token_kinds(Metadata("m.gguf", values)) == [1, 255, 0, 255, 3, 1]


def test_numbers_that_sentencepiece_files_leave_out() -> None:
    """llama.cpp takes 1, 2 and 0; a number beyond the vocabulary is none."""
    values: dict[str, Any] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ("<unk>", "<s>", "</s>"),
    }
    assert special_ids(Metadata("m.gguf", values)) == {"bos_token_id": 1, "eos_token_id": 2}
    values["tokenizer.ggml.eos_token_id"] = 7
    assert special_ids(Metadata("m.gguf", values)) == {"bos_token_id": 1}
    values["tokenizer.ggml.model"] = "gpt2"
    assert special_ids(Metadata("m.gguf", values)) == {}


def test_old_files_of_mixtral_have_a_tensor_an_expert(tmp_path: Path) -> None:
    made, config = tiny("mixtral")
    config.setdefault("tie_word_embeddings", False)
    weights, extra = values(made), {}
    for name in [name for name in weights if "switch_mlp" in name]:
        block, role = int(name.split(".")[2]), name.split(".")[-2].removesuffix("_proj")
        for number, expert in enumerate(weights.pop(name)):
            extra[f"blk.{block}.ffn_{role}.{number}.weight"] = expert
    write_gguf(tmp_path / "m.gguf", weights, config, extra=extra)
    requant.convert(tmp_path / "m.gguf", tmp_path / "out", dequantize=True, dtype="float32")
    expected = np.array(made(TOKENS))
    np.testing.assert_allclose(output_of(tmp_path / "out"), expected, atol=2e-5)


def test_an_unknown_architecture_keeps_its_names(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "mamba3")
    values = np.random.default_rng(0).standard_normal((8, 64), np.float32)
    q8 = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor("blk.0.odd.weight", gguf.quantize(values, q8), raw_dtype=q8)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    report = requant.convert(tmp_path / "m.gguf", tmp_path / "out")
    assert any("'mamba3' is not known" in note for note in note_texts(report.plan.notes))
    out = read_folder(tmp_path / "out")
    assert sorted(out) == [f"blk.0.odd.{role}" for role in ("biases", "scales", "weight")]


def test_llama_3_scaling_is_found_in_its_factors(tmp_path: Path) -> None:
    weights, config = trained("micro-llama")
    config["rope_theta"] = 500000.0
    base, dim, factor = 500000.0, 32, 8.0
    waves = 2 * np.pi * base ** (np.arange(0, dim, 2) / dim)
    smooth = (8192 / waves - 1) / 3
    factors = np.where(waves < 8192 / 4, 1, np.where(waves > 8192, factor, 0))
    factors = np.where(factors == 0, 1 / ((1 - smooth) / factor + smooth), factors)
    extra = {"rope_freqs.weight": factors.astype(np.float32)}
    write_gguf(tmp_path / "m.gguf", weights, config, "Q8_0", extra=extra)
    plan = requant.plan(tmp_path / "m.gguf")
    assert plan.config["rope_scaling"] == {
        **{"rope_type": "llama3", "type": "llama3", "factor": 8.0, "low_freq_factor": 1.0},
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert plan.dropped[0][0] == "rope_freqs.weight"
    extra = {"rope_freqs.weight": np.linspace(1, 3, 16, dtype=np.float32)}
    write_gguf(tmp_path / "odd.gguf", weights, config, "Q8_0", extra=extra)
    with pytest.raises(CheckpointError, match="no setting of Llama 3 gives"):
        requant.plan(tmp_path / "odd.gguf")


def test_architectures_are_all_here() -> None:
    assert set(OWN) == set(ARCHITECTURES)
    # Files without experts are read by the row of nemotron_h_moe.
    recorded = {header_of(name).metadata["general.architecture"] for name in RECORDS}
    assert set(KNOWN) == set(ARCHITECTURES.values()) | set(SEEING) | recorded | {"nemotron_h"}


@pytest.mark.parametrize("architecture", SEEING)
def test_language_parts_of_models_that_see(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files of Qwen's VL models hold the language model, which runs as the plain one."""
    name = SEEING[architecture]
    made, config = tiny(name)
    config.setdefault("tie_word_embeddings", False)
    monkeypatch.setitem(ARCHITECTURES, name, architecture)
    write_gguf(tmp_path / "m.gguf", values(made), config)
    assert requant.plan(tmp_path / "m.gguf").config["model_type"] == name
    requant.convert(tmp_path / "m.gguf", tmp_path / "out", dequantize=True, dtype="float32")
    expected = np.array(made(TOKENS))
    np.testing.assert_allclose(output_of(tmp_path / "out"), expected, atol=2e-5)


def test_mistral3_without_scaled_attention_is_llama(tmp_path: Path) -> None:
    """Mistral Small 3.1 carries the name of its vision model, and is Mistral's old text model."""
    weights, config = trained("micro-llama")
    architectures = {**ARCHITECTURES, "llama": "mistral3"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.support.gguf_files.ARCHITECTURES", architectures)
        write_gguf(tmp_path / "m.gguf", weights, config)
    assert requant.plan(tmp_path / "m.gguf").config["model_type"] == "llama"
    requant.convert(tmp_path / "m.gguf", tmp_path / "out", dequantize=True, dtype="float32")
    out = read_folder(tmp_path / "out")
    for name, array in weights.items():
        assert np.array_equal(out[name], array), name


def test_loading_without_a_tokenizer_says_why(tmp_path: Path) -> None:
    weights, config = trained("micro-llama")
    write_gguf(tmp_path / "m.gguf", weights, config, "Q8_0")
    with pytest.raises(CheckpointError, match="tokenizer: No tokenizer is written: the file holds"):
        requant.mlx_lm.load(tmp_path / "m.gguf")
    model_made, _ = requant.mlx_lm.load(tmp_path / "m.gguf", config_from=model("micro-llama"))
    assert model_made is not None
