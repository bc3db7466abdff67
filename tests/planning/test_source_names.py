"""Outputs under the source's names: what other MLX libraries leave dense, and where they look."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from requant.api.convert import convert, plan
from tests.support.number_formats import bf16
from tests.support.plan_texts import note_texts, reason_text

Build = Callable[..., Path]
EIGHT = {"group_size": 64, "bits": 8, "mode": "affine"}
TEXT = {"model_type": "unknown", "text_config": {"hidden_size": 128}}
TOWERS = [
    "model.vision_tower.layers.0.fc1",
    "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj",
    "vision_model.encoder.layers.0.mlp.fc1",
    "model.vision_embed_tokens.img_projection.0",
    "model.vision_backbone.image_vit.transformer.resblocks.0.attention.wq",
    "model.visual.blocks.0.attn.qkv",
    "visual.merger.mlp.0",
    "vit.layers.0.attn.q_proj",
    "vpm.encoder.layers.0.fc1",
    "resampler.kv_proj",
    "model.image_encoder.layers.0.fc1",
    "audio_tower.layers.0.fc1",
    "model.audio_encoder.layers.0.fc1",
    "speech_encoder.layers.0.fc1",
    "apm.layers.0.fc1",
    "model.multi_modal_projector.linear_1",
    "mm_projector.0",
    "model.mm_projector.readout.0",
    "audio_projector.linear",
    "embed_vision.embedding_projection",
    "model.embed_audio.embedding_projection",
    "model.connector.modality_projection.proj",
    "aligner.layers.0",
    "model.sam_model.blocks.0.attn.qkv",
    "model.perceiver.layers.0.fc1",
    "qformer.encoder.layer.0.fc1",
    "mlp1.1",
    "encoder.layers.0.ff1.up_proj",
]


def language_model() -> dict[str, np.ndarray]:
    return {
        "language_model.model.embed_tokens.weight": bf16(96, 128),
        "language_model.model.layers.0.self_attn.q_proj.weight": bf16(128, 128),
        "language_model.model.layers.0.mlp.gate_up_proj.weight": bf16(256, 128),
    }


def treatments(source: Path, **options: Any) -> dict[str, str]:
    made = plan(source, layout="keep", **{"bits": 4, **options})
    return {layer.layer: layer.treatment for layer in made.layers}


@pytest.mark.parametrize("path", TOWERS)
def test_a_tower_next_to_a_language_model_stays_dense(path: str, checkpoint: Build) -> None:
    source = checkpoint(language_model() | {f"{path}.weight": bf16(64, 128)}, TEXT)
    found = treatments(source)
    assert found.pop(path) == "dense"
    assert set(found.values()) == {"quantized"}
    made = plan(source, layout="keep", bits=4)
    reason = next(reason_text(layer) for layer in made.layers if layer.layer == path)
    assert reason == "tower for images or sound"


@pytest.mark.parametrize("path", TOWERS)
def test_what_names_a_tower_quantizes_it(path: str, checkpoint: Build, tmp_path: Path) -> None:
    source = checkpoint(language_model() | {f"{path}.weight": bf16(64, 128)}, TEXT)
    literal = path.replace(".", r"\.")
    assert treatments(source, overrides=[f"{literal}=8"])[path] == "quantized"
    assert treatments(source, only=[literal])[path] == "quantized"
    recipe = tmp_path / "named.toml"
    recipe.write_text(f"[[rules]]\nmatch = '{literal}'\nspec = 8\n")
    assert treatments(source, recipe=str(recipe))[path] == "quantized"


@pytest.mark.parametrize("path", [x for x in TOWERS if "q_proj" in x])
def test_a_role_or_a_place_names_no_tower(path: str, checkpoint: Build, tmp_path: Path) -> None:
    """A rule for attention, or for the first block, is about the language model."""
    source = checkpoint(language_model() | {f"{path}.weight": bf16(64, 128)}, TEXT)
    for rule in ('role = "q_proj"', "first = 1", 'role = "q_proj"\nfirst = 1'):
        (tmp_path / "role.toml").write_text(f"[[rules]]\n{rule}\nspec = 8\n")
        assert treatments(source, recipe=str(tmp_path / "role.toml"))[path] == "dense"
    assert treatments(source, only=["q_proj"])[path] == "dense"


@pytest.mark.parametrize("model_type", ["vit", "siglip_vision_model"])
def test_a_model_that_is_all_tower_is_quantized(model_type: str, checkpoint: Build) -> None:
    """There is nothing next to it but a small head, and its config has no part for images."""
    tensors = {f"vit.encoder.layer.{i}.output.dense.weight": bf16(128, 128) for i in range(4)}
    tensors |= {"classifier.weight": bf16(16, 128)}
    found = treatments(checkpoint(tensors, {"model_type": model_type}))
    assert set(found.values()) == {"quantized"}


def test_clip_keeps_its_tower_and_quantizes_its_text(checkpoint: Build) -> None:
    """The tower is larger than the text model; the config names both."""
    tensors = {f"vision_model.encoder.layers.{i}.mlp.fc1.weight": bf16(128, 128) for i in range(4)}
    tensors |= {"text_model.encoder.layers.0.mlp.fc1.weight": bf16(128, 128)}
    config = {"model_type": "clip", "text_config": {}, "vision_config": {}}
    found = treatments(checkpoint(tensors, config))
    assert found.pop("text_model.encoder.layers.0.mlp.fc1") == "quantized"
    assert set(found.values()) == {"dense"}


@pytest.mark.parametrize(
    "path", ["model.layers.0.mlp.connect", "model.division.0", "model.encoder.layers.0.fc1"]
)
def test_other_names_are_not_towers(path: str, checkpoint: Build) -> None:
    tensors = {f"{path}.weight": bf16(64, 128), "model.layers.0.up_proj.weight": bf16(256, 128)}
    assert treatments(checkpoint(tensors))[path] == "quantized"


# -- embeddings that a head of masked words shares ---------------------------------------------

# Family -> (its embedding, the bias of its head, the weight that an untied head would have).
MASKED = {
    "bert": ("bert.embeddings.word_embeddings", "cls.predictions.decoder", "weight"),
    "bert, old": ("bert.embeddings.word_embeddings", "cls.predictions", "decoder.weight"),
    "roberta": ("roberta.embeddings.word_embeddings", "lm_head", "decoder.weight"),
    "xlm-roberta": ("roberta.embeddings.word_embeddings", "lm_head.decoder", "weight"),
    "modernbert": ("model.embeddings.tok_embeddings", "decoder", "weight"),
    "distilbert": ("distilbert.embeddings.word_embeddings", "vocab_projector", "weight"),
    "electra": ("electra.embeddings.word_embeddings", "generator_lm_head", "weight"),
    "albert": ("albert.embeddings.word_embeddings", "predictions", "decoder.weight"),
}


def masked(family: str, tied: bool) -> dict[str, np.ndarray]:
    embedding, head, weight = MASKED[family]
    tensors = {
        f"{embedding}.weight": bf16(96, 128),
        f"{embedding.rpartition('.')[0]}.token_type_embeddings.weight": bf16(2, 128),
        "encoder.layer.0.output.dense.weight": bf16(128, 128),
        f"{head}.bias": bf16(96),
    }
    return tensors if tied else tensors | {f"{head}.{weight}": bf16(96, 128)}


@pytest.mark.sweep(4)
@pytest.mark.parametrize("family", MASKED)
def test_a_shared_embedding_stays_dense(family: str, checkpoint: Build) -> None:
    source = checkpoint(masked(family, tied=True), {"model_type": family})
    embedding = MASKED[family][0]
    assert treatments(source, group_size=64)[embedding] == "dense"
    (note,) = [x for x in note_texts(plan(source, bits=8).notes) if "head of masked words" in x]
    assert f"--override {embedding}=8" in note
    assert treatments(source, overrides=[f"{embedding}=8"])[embedding] == "quantized"


@pytest.mark.parametrize("family", MASKED)
def test_an_embedding_next_to_a_head_of_its_own_is_quantized(family: str, checkpoint: Build):
    source = checkpoint(masked(family, tied=False), {"model_type": family})
    assert treatments(source)[MASKED[family][0]] == "quantized"


# -- bits of their own -------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("path", "module"),
    [
        ("model.language_model.layers.0.mlp.up_proj", "language_model.model.layers.0.mlp.up_proj"),
        ("model.text_model.layers.0.mlp.up_proj", "language_model.layers.0.mlp.up_proj"),
        ("llm.model.layers.0.mlp.up_proj", "language_model.model.layers.0.mlp.up_proj"),
        ("visual.blocks.0.attn.qkv", "vision_tower.blocks.0.attn.qkv"),
        ("model.layers.0.mlp.experts.0.w2", "model.layers.0.mlp.switch_mlp.down_proj"),
    ],
)
def test_entries_have_the_names_of_modules_too(
    path: str, module: str, checkpoint: Build, tmp_path: Path
) -> None:
    tensors = {f"{path}.weight": bf16(64, 128), "model.layers.1.up_proj.weight": bf16(512, 128)}
    source = checkpoint(tensors, TEXT)
    override = [f"{path}=8".replace(".", r"\.")]
    report = convert(source, tmp_path / "out", bits=4, overrides=override, layout="keep")
    block = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    assert block[module] == block[path] == EIGHT
    assert [note for note in note_texts(report.plan.notes) if "under other names too" in note]
    # The output is a source as before, with the same codes.
    again = convert(tmp_path / "out", tmp_path / "again", layout="keep")
    assert {x.exactness for x in again.plan.layers} == {"exact"}
    assert json.loads((tmp_path / "again/config.json").read_text())["quantization"] == block


def test_experts_with_unlike_bits_have_no_entry_in_common(checkpoint: Build, tmp_path: Path):
    tensors = {f"model.layers.0.mlp.experts.{e}.w1.weight": bf16(64, 128) for e in range(3)}
    source = checkpoint(tensors | {"model.layers.0.up_proj.weight": bf16(512, 128)}, TEXT)
    overrides = [r"experts\.0=8", r"experts\.1=6"]
    convert(source, tmp_path / "out", bits=4, overrides=overrides, layout="keep")
    block = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    assert "model.layers.0.mlp.switch_mlp.gate_proj" not in block


def test_a_plain_text_model_has_each_entry_once(checkpoint: Build, tmp_path: Path) -> None:
    tensors = {f"model.layers.{i}.mlp.up_proj.weight": bf16(64, 128) for i in range(3)}
    overrides = [r"layers\.0=8"]
    out = tmp_path / "out"
    convert(checkpoint(tensors), out, bits=4, overrides=overrides, layout="keep")
    block = json.loads((out / "config.json").read_text())["quantization"]
    assert [key for key in block if "." in key] == ["model.layers.0.mlp.up_proj"]
