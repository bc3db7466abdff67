"""Vision parts beside GGUF models: names, values, config and what is said of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import requant
from requant.errors import CheckpointError, UsageError
from requant.gguf.mmproj import choose_mmproj
from requant.gguf.mmproj_families import PROJECTORS
from tests.support.gguf_files import ARCHITECTURES, write_gguf
from tests.support.mmproj_files import (
    FAMILIES,
    as_published,
    is_text,
    recorded_weights,
    records,
    stored_kind,
    tensors_of,
    values,
    write_mmproj,
)
from tests.support.plan_texts import note_texts
from tests.support.safetensors_files import read_folder

# model_type of the text alone, and llama.cpp's name of its architecture.
TEXTS = {
    "gemma3": ("gemma3_text", "gemma3"),
    "idefics3": ("llama", "llama"),
    "internvl": ("qwen3", "qwen3"),
    "internvl_chat": ("qwen2", "qwen2"),
    "llava": ("llama", "llama"),
    "llava_next": ("llama", "llama"),
    "mistral3": ("llama", "llama"),
    "pixtral": ("llama", "llama"),
    "qwen2_vl": ("qwen2", "qwen2vl"),
    "qwen2_5_vl": ("qwen2", "qwen2vl"),
    "qwen3_vl": ("qwen3", "qwen3vl"),
    "qwen3_vl_moe": ("qwen3_moe", "qwen3vlmoe"),
}
# Keys of config.json that say something else there, with the reason.
OTHER_CONFIG = {
    "gemma3": {"vocab_size"},
    "internvl": {"image_seq_length"},  # the class's own number, whatever the sizes
    "internvl_chat": {"model_type", "image_token_id"},  # the fixture has the names of the other
    "pixtral": {"model_type"},  # llava in transformers; mlx-vlm's class is pixtral
    "qwen2_5_vl": {"vision_config.tokens_per_second"},  # 2 in published models
}


def text_of(family: str, weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The language model by mlx-lm's names."""
    made = {}
    for name, array in weights.items():
        if not is_text(name):
            continue
        name = name.removeprefix("language_model.")
        for middle in ("language_model.", "text_model."):
            name = name.replace(f"model.{middle}", "model.")
        if name.endswith("experts.gate_up_proj"):  # [experts, in, out] by the authors
            gate, up = np.split(array.swapaxes(1, 2), 2, axis=1)
            path = name.replace("experts.gate_up_proj", "switch_mlp")
            made |= {f"{path}.gate_proj.weight": gate, f"{path}.up_proj.weight": up}
        elif name.endswith("experts.down_proj"):
            path = name.replace("experts.down_proj", "switch_mlp.down_proj.weight")
            made[path] = array.swapaxes(1, 2)
        else:
            made[name] = array
    return made


def text_config(family: str, config: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(config.get("text_config") or config)
    found.setdefault("rope_theta", 10000.0)
    rope = found.pop("rope_scaling", None) or {}
    assert rope.keys() <= {"mrope_section", "rope_type", "type"}
    if family != "gemma3":
        found["sliding_window"] = None
    return {**found, "model_type": TEXTS[family][0]}


def write_pair(
    folder: Path,
    family: str,
    monkeypatch: pytest.MonkeyPatch,
    kind: str = "F32",
    tokens: Mapping[str, int] | None = None,
    **options: Any,
) -> dict[str, np.ndarray]:
    """A language model and its vision part; returns the checkpoint that they are made of."""
    is_llava = "llava" in family
    record = records()["pixtral" if is_llava else family]
    weights = llava(family) if is_llava else recorded_weights(family)
    metadata = llava_metadata(family) if is_llava else record["metadata"]
    config = text_config(family, record["config"])
    if family == "internvl":  # Qwen 3, which has norms of queries and keys, and no biases
        weights = {k: v for k, v in weights.items() if not (is_text(k) and k.endswith(".bias"))}
        for block in range(config["num_hidden_layers"]):
            for part in "qk":
                name = f"language_model.model.layers.{block}.self_attn.{part}_norm.weight"
                weights[name] = values(name, [32])
    numbers = dict(record["tokens"] if tokens is None else tokens)
    if is_llava and tokens is None:
        numbers = {"<image>": 7}
    words = [f"t{number}" for number in range(config["vocab_size"])]
    for token, number in numbers.items():
        words[number] = token
    more: dict[str, Any] = {"!tokenizer.ggml.tokens": words, "!tokenizer.ggml.model": "gpt2"}
    more |= {"!tokenizer.ggml.pre": "qwen2", "!tokenizer.ggml.eos_token_id": 3}
    if "qwen" in family:
        more["rope.dimension_sections"] = [4, 6, 6, 0]
    monkeypatch.setitem(ARCHITECTURES, TEXTS[family][0], TEXTS[family][1])
    folder.mkdir(exist_ok=True)
    text = text_of(family, weights)
    config["tie_word_embeddings"] = "lm_head.weight" not in text
    write_gguf(folder / "model.gguf", text, config, "F32", more=more)
    write_mmproj(folder / "mmproj-model.gguf", family, weights, metadata, kind, **options)
    return as_published(family, weights)


def llava(family: str) -> dict[str, np.ndarray]:
    """LLaVA: the text of Pixtral's fixture, and the tower of CLIP."""
    text = {name: array for name, array in recorded_weights("pixtral").items() if is_text(name)}
    tower = "vision_tower.vision_model"
    shapes: dict[str, list[int]] = {
        f"{tower}.embeddings.class_embedding": [128],
        f"{tower}.embeddings.patch_embedding.weight": [128, 3, 14, 14],
        f"{tower}.embeddings.position_embedding.weight": [17, 128],
        "multi_modal_projector.linear_1.weight": [128, 128],
        "multi_modal_projector.linear_1.bias": [128],
        "multi_modal_projector.linear_2.weight": [128, 128],
        "multi_modal_projector.linear_2.bias": [128],
    }
    norms = [f"{tower}.pre_layrnorm"]
    for block in range(2):
        path = f"{tower}.encoder.layers.{block}"
        norms += [f"{path}.layer_norm1", f"{path}.layer_norm2"]
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes[f"{path}.self_attn.{part}.weight"] = [128, 128]
            shapes[f"{path}.self_attn.{part}.bias"] = [128]
        shapes |= {f"{path}.mlp.fc1.weight": [256, 128], f"{path}.mlp.fc1.bias": [256]}
        shapes |= {f"{path}.mlp.fc2.weight": [128, 256], f"{path}.mlp.fc2.bias": [128]}
    shapes |= {f"{norm}.{suffix}": [128] for norm in norms for suffix in ("weight", "bias")}
    if family == "llava_next":
        shapes["image_newline"] = [128]
    return text | {name: values(name, shape) for name, shape in shapes.items()}


def llava_metadata(family: str) -> dict[str, Any]:
    """As tools/mtmd/legacy-models writes it."""
    vision = {
        "image_size": 56,
        "patch_size": 14,
        "embedding_length": 128,
        "feed_forward_length": 256,
        "projection_dim": 768,
        "attention.head_count": 4,
        "attention.layer_norm_epsilon": 1e-5,
        "block_count": 2,
        "image_mean": [0.48145467042922974, 0.45782750844955444, 0.40821072459220886],
        "image_std": [0.2686295509338379, 0.2613025903701782, 0.27577710151672363],
    }
    if family == "llava_next":
        vision |= {
            "image_grid_pinpoints": [336, 672, 672, 336],
            "mm_patch_merge_type": "spatial_unpad",
        }
        vision["feature_layer"] = [2]
    return {
        "clip.has_text_encoder": False,
        "clip.has_vision_encoder": True,
        "clip.has_llava_projector": True,
        "clip.projector_type": "mlp",
        "clip.use_gelu": False,
        **{f"clip.vision.{key}": value for key, value in vision.items()},
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_writer_is_the_converter(family: str) -> None:
    """The files of these tests have the tensors that llama.cpp's converter writes, bit for bit."""
    record = records()[family]
    made = {}
    for name, array in tensors_of(family, recorded_weights(family), record["metadata"]).items():
        kind = stored_kind(family, name, array, "F16")
        data = gguf.quantize(array, kind)
        shape = "x".join(map(str, array.shape))
        made[name] = f"{kind.name} {shape} {hashlib.sha256(data.tobytes()).hexdigest()[:16]}"
    assert made == record["tensors"]


@pytest.mark.parametrize("kind", ["F32", "F16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(
    family: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both files give the checkpoint that they were made of, bit for bit, and its config."""
    weights = write_pair(tmp_path / "in", family, monkeypatch, kind)
    requant.convert(
        tmp_path / "in", tmp_path / "out", layout="keep", dequantize=True, dtype="float32"
    )
    out = read_folder(tmp_path / "out")
    if family == "qwen3_vl_moe":  # files hold experts as mlx-lm does, gate and up apart
        weights = {k: v for k, v in weights.items() if ".experts." not in k}
        out = {k: v for k, v in out.items() if ".switch_mlp." not in k}
    assert out.keys() == weights.keys()
    for name, array in weights.items():
        assert np.array_equal(out[name], array), name
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    _compare_config(found, records()[family]["config"], OTHER_CONFIG.get(family, set()))


def _compare_config(
    found: Mapping[str, Any], wanted: Mapping[str, Any], other: set[str], path: str = ""
) -> None:
    """Each setting that both have is the same, and the vision's are there."""
    for key, value in wanted.items():
        if isinstance(value, dict) and key in ("vision_config", "text_config"):
            _compare_config(found[key], value, other, f"{path}{key}.")
        elif key in found and f"{path}{key}" not in other | _NOT_OF_VISION:
            assert found[key] == value, f"{path}{key}"


# What is of the text, and has tests of its own (test_models.py), or of the fixture.
_NOT_OF_VISION = {
    *(f"text_config.{key}" for key in ("model_type", "query_pre_attn_scalar", "sliding_window")),
    *("text_config.tie_word_embeddings", "tie_word_embeddings", "text_config.rope_scaling"),
    *("rope_scaling", "rope_theta", "vision_config.model_type", "text_config.rope_theta"),
}


@pytest.mark.parametrize("family", [*FAMILIES, "llava", "llava_next"])
def test_mlx_vlm_loads(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its class takes every tensor, and lacks none; the text runs."""
    utils = pytest.importorskip("mlx_vlm.utils")
    import mlx.core as mx

    write_pair(tmp_path / "in", family, monkeypatch)
    requant.convert(tmp_path / "in", tmp_path / "out", layout="keep", dequantize=True)
    made = utils.load_model(tmp_path / "out", strict=True)
    if family != "gemma3":  # the cache of its class wants six blocks
        logits = made.language_model(mx.array([[5, 6, 9]])).logits
        assert bool(mx.all(mx.isfinite(logits)))


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_llava(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of the older converter: what goes up is called down, the last norm is left out."""
    weights = write_pair(tmp_path / "in", family, monkeypatch)
    report = requant.convert(tmp_path / "in", tmp_path / "out", layout="keep", dequantize=True)
    out = read_folder(tmp_path / "out")
    unused = {f"vision_tower.vision_model.post_layernorm.{x}" for x in ("weight", "bias")}
    assert out.keys() == weights.keys() | unused
    for name, array in weights.items():
        assert np.array_equal(out[name], array), name
    assert "post_layernorm.weight" in "\n".join(note_texts(report.plan.notes))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == family
    assert config["vision_feature_layer"] == -1
    assert config["vision_config"]["hidden_act"] == "quick_gelu"
    assert config["image_token_index"] == 7
    pinpoints = [[336, 672], [672, 336]] if family == "llava_next" else None
    assert config.get("image_grid_pinpoints") == pinpoints


def test_codes_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Q8_0 in the vision part: queries, keys and values are joined row after row."""
    weights = write_pair(tmp_path / "in", "qwen2_vl", monkeypatch, "Q8_0")
    report = requant.convert(tmp_path / "in", tmp_path / "out", layout="keep", dtype="float32")
    layers = {layer.layer: layer for layer in report.plan.layers}
    joined = layers["visual.blocks.1.attn.qkv"]
    assert (joined.treatment, joined.exactness) == ("kept", "exact")
    requant.convert(tmp_path / "out", tmp_path / "dense", layout="keep", dequantize=True)
    out = read_folder(tmp_path / "dense")
    name = "visual.blocks.1.attn.qkv.weight"
    kind = gguf.GGMLQuantizationType.Q8_0
    assert np.array_equal(out[name], gguf.dequantize(gguf.quantize(weights[name], kind), kind))


@pytest.mark.parametrize("family", FAMILIES)
def test_processor(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the metadata say of images is in the processor's file."""
    write_pair(tmp_path / "in", family, monkeypatch)
    requant.convert(tmp_path / "in", tmp_path / "out", layout="keep")
    found = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    wanted = records()[family]["processor"]
    assert found["image_mean"] == pytest.approx(wanted["image_mean"])
    assert found["image_std"] == pytest.approx(wanted["image_std"])
    processor = json.loads((tmp_path / "out" / "processor_config.json").read_text())
    assert processor["processor_class"] == found["processor_class"]


def test_which_file_is_read() -> None:
    files = ["m.gguf", "mmproj-a.gguf", "mmproj-b.gguf", "notes.txt"]
    assert choose_mmproj(files[:2], None, "m") == "mmproj-a.gguf"
    assert choose_mmproj(files[:1], None, "m") is None
    assert choose_mmproj(files, "none", "m") is None
    assert choose_mmproj(files, "mmproj-b.gguf", "m") == "mmproj-b.gguf"
    words = r"2 vision parts beside it \(mmproj-a.gguf, mmproj-b.gguf\): .*--mmproj mmproj-a.gguf"
    with pytest.raises(CheckpointError, match=words):
        choose_mmproj(files, None, "m")
    with pytest.raises(CheckpointError, match="not a GGUF file beside m"):
        choose_mmproj(files, "mmproj-c.gguf", "m")


def test_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Automatic but for mlx-lm's layout, by name, by path, or not at all; verified the same way."""
    folder = tmp_path / "in"
    write_pair(folder, "gemma3", monkeypatch)
    alone = requant.plan(folder, mmproj="none", layout="mlx-lm")
    assert requant.plan(folder, layout="mlx-lm").hash == alone.hash
    assert {step.layer.split(".")[0] for step in alone.steps} == {"model"}
    assert [name for name, _ in alone.left_out] == ["mmproj-model.gguf"]
    pair = requant.plan(folder / "model.gguf", layout="keep")
    assert [file.name for file in pair.files] == ["model.gguf", "mmproj-model.gguf"]
    assert "is read as the vision part of gemma3" in "\n".join(note_texts(pair.notes))
    for given in ("mmproj-model.gguf", str(folder / "mmproj-model.gguf")):
        assert requant.plan(folder, mmproj=given, layout="keep").steps == pair.steps
    requant.convert(folder, tmp_path / "out", layout="keep")
    assert requant.verify(folder, tmp_path / "out").ok
    requant.convert(folder, tmp_path / "text", layout="keep", mmproj="none")
    assert requant.verify(folder, tmp_path / "text").ok
    assert "vision_config" not in json.loads((tmp_path / "text" / "config.json").read_text())
    inspected = requant.inspect(folder)
    assert any("vision_tower" in layer.layer for layer in inspected.layers)
    with pytest.raises(UsageError, match="--mmproj is for GGUF sources"):
        requant.plan(tmp_path / "out", mmproj="mmproj-model.gguf")


def test_config_of_the_original(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole config is taken, not that of the text, and tensors are named the same."""
    write_pair(tmp_path / "in", "gemma3", monkeypatch, more={"clip.vision.of_tomorrow": 7})
    (tmp_path / "original").mkdir()
    original = {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "a": 1}}
    (tmp_path / "original" / "config.json").write_text(json.dumps(original))
    taken = requant.plan(tmp_path / "in", config_from=tmp_path / "original", layout="keep")
    assert taken.config["text_config"]["a"] == 1
    assert any("vision_tower" in step.layer for step in taken.steps)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"more": {"clip.projector_type": "ultravox"}}, rf"'ultravox', known are {PROJECTORS[0]}"),
        (
            {"more": {"clip.projector_type": "qwen2vl_merger"}},
            r"architecture qwen2vl, not 'gemma3'",
        ),
        ({"more": {"clip.vision.of_tomorrow": 7}}, r"of_tomorrow: is 7: that may change what"),
        ({"more": {"clip.vision.projection_dim": 64}}, r"64 values, but .* not of one model"),
        ({"more": {"clip.vision.block_count": 3}}, r"is 3, but block 2 has no v\.blk\.2\.ln1"),
        ({"more": {"clip.vision.image_size": None}}, r"clip\.vision\.image_size: is missing"),
        ({"extra": {"v.blk.0.new.weight": np.ones(4, np.float32)}}, r"has no name in .*gemma3"),
        ({"tokens": {}}, r"tokenizer\.ggml\.tokens: has no <image_soft_token>"),
    ],
)
def test_what_is_rejected(
    options: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pair(tmp_path / "in", "gemma3", monkeypatch, **options)
    with pytest.raises(CheckpointError, match=words):
        requant.plan(tmp_path / "in", layout="keep")
    requant.plan(tmp_path / "in", layout="keep", mmproj="none")


def test_parts_that_do_not_fit_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pair(
        tmp_path / "in",
        "qwen2_vl",
        monkeypatch,
        without=("v.blk.0.attn_v.weight", "v.patch_embd.weight.1"),
        extra={"v.patch_embd.weight.1": np.ones((128, 3, 14, 7), np.float32)},
    )
    with pytest.raises(CheckpointError) as error:
        requant.plan(tmp_path / "in", layout="keep")
    assert "v.blk.0.attn_k.weight" in str(error.value)
    assert "F32 [128, 3, 14, 7], expected F32 [128, 3, 14, 14]" in str(error.value)
