"""Vision parts next to GGUF models: names, values, config and what is said of them."""

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
from tests.support.mmproj_files import (
    FAMILIES,
    recorded_weights,
    records,
    stored_kind,
    tensors_of,
)
from tests.support.mmproj_pairs import write_pair
from tests.support.plan_texts import note_texts
from tests.support.safetensors_files import read_folder

pytestmark = pytest.mark.sweep(
    1, tests=("test_every_family", "test_mlx_vlm_loads", "test_mlx_vlm_s_layout", "test_processor")
)

# Keys of config.json that say something else there, with the reason.
OTHER_CONFIG = {
    "gemma3": {"vocab_size"},
    "internvl": {"image_seq_length"},  # the class's own number, whatever the sizes
    "internvl_chat": {"model_type", "image_token_id"},  # the fixture has the names of the other
    "pixtral": {"model_type"},  # llava in transformers; mlx-vlm's class is pixtral
    "qwen2_5_vl": {"vision_config.tokens_per_second"},  # 2 in published models
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


@pytest.mark.parametrize("family", [*FAMILIES, "llava", "llava_next"])
def test_mlx_vlm_s_layout(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``auto`` gives the pair mlx-vlm's names: the text quantized, the vision dense; it loads."""
    pytest.importorskip("mlx_vlm.utils")
    write_pair(tmp_path / "in", family, monkeypatch)
    report = requant.convert(tmp_path / "in", tmp_path / "out", bits=4, group_size=32)
    assert report.plan.layout == "mlx-vlm", note_texts(report.plan.notes)
    targets = {x.layer: x.target for x in report.plan.layers if x.is_weight and len(x.shape) > 1}
    quantized = {layer for layer, target in targets.items() if "4-bit" in target}
    assert any("language_model" in layer for layer in quantized)
    assert not any("vision" in layer for layer in quantized), quantized
    check = requant.verify(tmp_path / "out", load=True).load
    assert check is not None
    assert (check.library, check.ok or check.problems) == ("mlx-vlm", True)


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
    words = r"2 vision parts next to it \(mmproj-a.gguf, mmproj-b.gguf\): .*--mmproj mmproj-a.gguf"
    with pytest.raises(CheckpointError, match=words):
        choose_mmproj(files, None, "m")
    with pytest.raises(CheckpointError, match="not a GGUF file next to m"):
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
        ({"extra": {"v.pre_ln.weight": np.array(1, np.float32)}}, r"F32 \[\], expected at least"),
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


def test_invalid_arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = {"clip.vision.image_grid_pinpoints": [336, 672, 672]}
    write_pair(tmp_path / "in", "llava_next", monkeypatch, more=more)
    with pytest.raises(CheckpointError, match=r"image_grid_pinpoints: is an array of 3, expected"):
        requant.plan(tmp_path / "in", layout="keep")


def test_older_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen 2.5 as its first converter wrote it."""
    more = {
        "clip.has_qwen2vl_merger": True,
        "clip.use_rms_norm": True,
        "clip.use_glu_mlp": True,
        "clip.vision.n_wa_pattern": None,
        "clip.vision.fullatt_block_indexes": [1],
        "clip.vision.window_size": 56,
    }
    write_pair(tmp_path / "in", "qwen2_5_vl", monkeypatch, more=more)
    vision = requant.plan(tmp_path / "in", layout="keep").config["vision_config"]
    assert (vision["fullatt_block_indexes"], vision["window_size"]) == ([1], 56)


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
