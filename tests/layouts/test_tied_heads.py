"""Heads and embeddings: what the tensors say counts, whatever ``tie_word_embeddings`` says."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import requant
from requant.checkpoints.byte_ranges import FileRange
from requant.checkpoints.checkpoint import Checkpoint, OpenedSource
from requant.errors import CheckpointError, UsageError
from requant.formats import detect
from requant.formats.base import SourceLayer
from requant.layouts.head_names import find_pair
from requant.layouts.same_values import same_values
from requant.sources.open import read_checkpoint
from tests.support.families import small_config
from tests.support.layers import compressed_tensors as ct_layers
from tests.support.mlx_reference import load, same, to_mx
from tests.support.number_formats import bf16
from tests.support.plan_texts import note_texts

H, V, INNER = 64, 96, 128
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LLAMA = {
    **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": H},
    **{"intermediate_size": INNER, "vocab_size": V, "num_hidden_layers": 1},
    **{"num_attention_heads": 2, "num_key_value_heads": 2, "rms_norm_eps": 1e-6},
    "rope_theta": 1e4,
    "max_position_embeddings": 64,
    "torch_dtype": "bfloat16",
}
Tensors = dict[str, np.ndarray]
Build = Callable[..., Path]


def block(prefix: str = "model.") -> Tensors:
    layers = {"self_attn.q": (H, H), "self_attn.k": (H, H), "self_attn.v": (H, H)}
    layers |= {
        "self_attn.o": (H, H),
        "mlp.gate": (INNER, H),
        "mlp.up": (INNER, H),
        "mlp.down": (H, INNER),
    }
    at = f"{prefix}layers.0."
    made = {f"{at}{n}_proj.weight": bf16(*s, seed=i) for i, (n, s) in enumerate(layers.items())}
    norms = (f"{at}input_layernorm", f"{at}post_attention_layernorm", f"{prefix}norm")
    return made | {f"{name}.weight": bf16(H, seed=9) for name in norms}


def llama(head: np.ndarray | None, **config: Any) -> tuple[Tensors, dict[str, Any]]:
    tensors = {EMBEDDING: bf16(V, H, seed=20)} | block()
    if head is not None:
        tensors[HEAD] = head
    return tensors, LLAMA | config


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def logits(folder: Path) -> mx.array:
    """What mlx-lm's model gives for a few tokens; it loads nothing but a whole model."""
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    found: mx.array = model(mx.array([[1, 5, 7, 2]]))
    return found


OWN = bf16(V, H, seed=21)
COPY = bf16(V, H, seed=20)


# -- the three cases, in both layouts --------------------------------------------------------
@pytest.mark.parametrize("layout", ["keep", "mlx-lm"])
@pytest.mark.parametrize("options", [{"bits": 8}, {"dequantize": True}], ids=str)
def test_a_copy_of_the_embedding_is_left_out(
    layout: str, options: Mapping[str, Any], checkpoint: Build, tmp_path: Path
) -> None:
    source = checkpoint(*llama(COPY, tie_word_embeddings=True))
    report = requant.convert(source, tmp_path / "out", layout=layout, **options)
    assert not any(name.startswith("lm_head") for name in load(tmp_path / "out"))
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is True
    assert dict(report.plan.dropped)[HEAD].startswith(f"holds the values of {EMBEDDING}")
    assert any(HEAD in note and "left out" in note for note in note_texts(report.plan.notes))
    logits(tmp_path / "out")


@pytest.mark.parametrize("layout", ["keep", "mlx-lm"])
def test_a_head_of_its_own_is_kept_and_the_flag_set_false(
    layout: str, checkpoint: Build, tmp_path: Path
) -> None:
    source = checkpoint(*llama(OWN, tie_word_embeddings=True))
    report = requant.convert(source, tmp_path / "out", layout=layout, dequantize=True)
    assert same(load(tmp_path / "out")[HEAD], to_mx(OWN))
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is False
    assert any(
        "the head is kept" in note and "true in the" in note
        for note in note_texts(report.plan.notes)
    )
    honest = checkpoint(*llama(OWN, tie_word_embeddings=False), name="honest")
    assert mx.array_equal(logits(tmp_path / "out"), logits(honest))


@pytest.mark.parametrize("layout", ["keep", "mlx-lm"])
def test_a_model_without_a_head_is_tied(layout: str, checkpoint: Build, tmp_path: Path) -> None:
    source = checkpoint(*llama(None, tie_word_embeddings=False))
    report = requant.convert(source, tmp_path / "out", layout=layout, dequantize=True)
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is True
    assert any(
        "no head next to" in note and "false in the" in note
        for note in note_texts(report.plan.notes)
    )
    honest = checkpoint(*llama(None, tie_word_embeddings=True), name="honest")
    assert mx.array_equal(logits(tmp_path / "out"), logits(honest))


@pytest.mark.parametrize("layout", ["keep", "mlx-lm"])
@pytest.mark.parametrize(("head", "flag"), [(OWN, False), (COPY, False), (None, True)])
def test_what_agrees_is_left_alone(
    head: np.ndarray | None, flag: bool, layout: str, checkpoint: Build, tmp_path: Path
) -> None:
    source = checkpoint(*llama(head, tie_word_embeddings=flag))
    report = requant.convert(source, tmp_path / "out", layout=layout, bits=8)
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is flag
    assert (f"{HEAD[:-7]}.scales" in load(tmp_path / "out")) is (head is not None)
    assert not any("head" in note for note in note_texts(report.plan.notes))


def test_a_flag_that_is_absent_is_what_the_class_takes(checkpoint: Build, tmp_path: Path) -> None:
    """mlx-lm's llama ties unless the config says otherwise, and would drop a head.

    Mimo does not.
    """
    requant.convert(checkpoint(*llama(OWN)), tmp_path / "own", bits=8)
    assert config_of(tmp_path / "own")["tie_word_embeddings"] is False
    assert "lm_head.scales" in load(tmp_path / "own")
    logits(tmp_path / "own")
    tensors, config = llama(None, model_type="mimo", num_nextn_predict_layers=0)
    tensors |= {f"model.layers.0.self_attn.{n}_proj.bias": bf16(H) for n in "qkv"}
    source = checkpoint(tensors, config, name="headless")
    requant.convert(source, tmp_path / "none", bits=8, layout="mlx-lm")
    assert config_of(tmp_path / "none")["tie_word_embeddings"] is True
    logits(tmp_path / "none")


# -- what is compared ------------------------------------------------------------------------
def last_value_changed(array: np.ndarray) -> np.ndarray:
    changed = array.copy()
    changed[-1, -1] += 1
    return changed


LARGE = bf16(1400, H, seed=3)  # more values than the first piece that is compared


@pytest.mark.parametrize(
    ("head", "equal"),
    [
        (LARGE, True),
        (LARGE.astype(np.float32), True),
        (LARGE.astype(np.float64), True),
        (last_value_changed(LARGE), False),
        (last_value_changed(LARGE.astype(np.float32)), False),
        (LARGE[:-1], False),
        (np.where(LARGE == 0, -0.0, LARGE).astype(LARGE.dtype), True),
    ],
    ids=["same", "float32", "float64", "last", "last of float32", "shorter", "signs of zero"],
)
@pytest.mark.parametrize("shards", [1, 2])
def test_values_are_compared_to_the_last(
    head: np.ndarray, equal: bool, shards: int, checkpoint: Build
) -> None:
    tensors = {EMBEDDING: LARGE, "a.weight": bf16(8, 64), HEAD: head}
    source = checkpoint(tensors, {"tie_word_embeddings": True}, shards=shards)
    plan = requant.plan(source, bits=8, layout="keep")
    assert (HEAD in dict(plan.dropped)) is equal
    assert plan.config["tie_word_embeddings"] is equal


def test_what_is_not_a_number_is_equal_to_itself(checkpoint: Build) -> None:
    nonfinite = COPY.copy()
    nonfinite[3, 4] = np.nan
    source = checkpoint({EMBEDDING: nonfinite, HEAD: nonfinite}, {"tie_word_embeddings": True})
    assert HEAD in dict(requant.plan(source, bits=8, layout="keep").dropped)


def layers_of(folder: Path) -> tuple[Checkpoint, SourceLayer, SourceLayer]:
    checkpoint = read_checkpoint(folder)
    pair = find_pair(detect(checkpoint).read(checkpoint).layers)
    assert pair is not None
    assert pair.head is not None
    return checkpoint, pair.embedding, pair.head


def test_a_difference_is_found_without_reading_on(checkpoint: Build) -> None:
    """A source on the hub is read by ranges: two small ones distinguish two matrices."""
    large = bf16(60_000, H, seed=5)
    source = checkpoint({EMBEDDING: large, HEAD: bf16(60_000, H, seed=6)})
    found, embedding, head = layers_of(source)
    asked: list[FileRange] = []

    def fetch(parts: Sequence[FileRange]) -> Sequence[bytes]:
        asked.extend(parts)
        return found.opened.read_ranges(parts)

    remote = replace(found, opened=OpenedSource(found.path, fetch=fetch))
    assert not same_values(remote, head, embedding)
    assert sum(part.nbytes for part in asked) <= 2 << 16 < large.nbytes
    asked.clear()
    assert not same_values(remote, head, embedding)  # as was found before
    assert asked == []


def test_memory_is_bounded_where_all_is_equal(checkpoint: Build) -> None:
    large = bf16(150_000, H, seed=5)
    found, embedding, head = layers_of(checkpoint({EMBEDDING: large, HEAD: large}))
    asked: list[int] = []

    def fetch(parts: Sequence[FileRange]) -> Sequence[bytes]:
        asked.extend(part.nbytes for part in parts)
        return found.opened.read_ranges(parts)

    remote = replace(found, opened=OpenedSource(found.path, fetch=fetch))
    assert same_values(remote, head, embedding)
    assert sum(asked) == 2 * large.nbytes
    assert max(asked) <= 8 << 20


def test_a_head_with_a_bias_is_more_than_the_embedding(checkpoint: Build) -> None:
    tensors = {EMBEDDING: COPY, HEAD: COPY, "lm_head.bias": bf16(V)}
    plan = requant.plan(checkpoint(tensors, {"tie_word_embeddings": True}), bits=8, layout="keep")
    assert plan.dropped == ()
    assert plan.config["tie_word_embeddings"] is False


@pytest.mark.parametrize("flag", ["weight_tying", "share_input_output_layers"])
def test_other_names_of_the_flag(flag: str, checkpoint: Build) -> None:
    plan = requant.plan(
        checkpoint({EMBEDDING: COPY, HEAD: OWN}, {flag: True}), bits=8, layout="keep"
    )
    assert plan.config[flag] is False


# -- quantized heads ------------------------------------------------------------------------
@pytest.mark.parametrize("layout", ["keep", "mlx-lm"])
@pytest.mark.parametrize("head", ["equal", "own", "dense"])
def test_heads_of_an_mlx_source(head: str, layout: str, checkpoint: Build, tmp_path: Path) -> None:
    """Codes, scales and biases are compared; a dense head is not a quantized embedding."""
    values = {"equal": COPY, "own": OWN, "dense": COPY}[head]
    tensors, config = llama(values, tie_word_embeddings=False)
    skip = ["lm_head=skip"] if head == "dense" else []
    first = tmp_path / "first"
    requant.convert(checkpoint(tensors, config), first, bits=4, overrides=skip, layout="keep")
    (first / "config.json").write_text(json.dumps(config_of(first) | {"tie_word_embeddings": True}))
    requant.convert(first, tmp_path / "out", layout=layout)
    kept = any(name.startswith("lm_head") for name in load(tmp_path / "out"))
    assert kept is (head != "equal")
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is (head == "equal")
    logits(tmp_path / "out")


@pytest.mark.parametrize("layout", ["keep", "mlx-lm"])
def test_a_quantized_head_next_to_a_dense_embedding(layout: str, checkpoint: Build, tmp_path: Path):
    tensors, config = llama(None, tie_word_embeddings=True)
    codes = np.random.default_rng(0).integers(0, 16, (V, H))
    tensors |= {
        "lm_head.weight_packed": ct_layers.pack(codes, 4),
        "lm_head.weight_scale": np.full((V, 2), 0.01, tensors[EMBEDDING].dtype),
        "lm_head.weight_shape": np.array([V, H], np.int64),
    }
    quantization = ct_layers.block(num_bits=4, group_size=32, strategy="group")
    config["quantization_config"] = quantization | {"ignore": []}
    report = requant.convert(checkpoint(tensors, config), tmp_path / "out", layout=layout)
    assert "lm_head.scales" in load(tmp_path / "out")
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is False
    assert any(
        "compressed-tensors" in note and "BF16" in note for note in note_texts(report.plan.notes)
    )
    logits(tmp_path / "out")


# -- names and nested configs ---------------------------------------------------------------
@pytest.mark.parametrize(
    ("embedding", "head"),
    [
        ("model.embed_tokens", "lm_head"),
        ("transformer.wte", "lm_head"),
        ("transformer.wte", "transformer.lm_head"),
        ("model.tok_embeddings", "output"),
        ("tok_embeddings", "output"),
        ("gpt_neox.embed_in", "embed_out"),
        ("model.word_embeddings", "lm_head"),
        ("transformer.word_embeddings", "lm_head"),
        ("transformer.embedding.word_embeddings", "transformer.output_layer"),
        ("language_model.model.embed_tokens", "language_model.lm_head"),
        ("model.language_model.embed_tokens", "lm_head"),
        ("language_model.model.tok_embeddings", "language_model.output"),
        ("thinker.model.embed_tokens", "thinker.lm_head"),
        ("backbone.embeddings", "lm_head"),
        ("rwkv.embeddings", "head"),
        ("model.transformer.wte", "model.transformer.ff_out"),
    ],
)
def test_heads_are_found_by_any_name(embedding: str, head: str, checkpoint: Build) -> None:
    others = {
        "model.layers.0.mtp.embed_tokens.weight": bf16(V, H, seed=8),
        "model.vision.embeddings.weight": bf16(V, H, seed=8),
        "talker.model.embed_tokens.weight": bf16(V, H, seed=8),
    }
    tensors = others | {f"{embedding}.weight": COPY, f"{head}.weight": COPY}
    plan = requant.plan(checkpoint(tensors, {"tie_word_embeddings": True}), bits=8, layout="keep")
    assert set(dict(plan.dropped)) == {f"{head}.weight"}
    tensors[f"{head}.weight"] = OWN
    source = checkpoint(tensors, {"tie_word_embeddings": True}, name="own")
    assert requant.plan(source, bits=8, layout="keep").config["tie_word_embeddings"] is False


NESTED: dict[str, tuple[str, ...]] = {
    "text_config": ("text_config",),
    "llm_config": ("llm_config",),
    "language_config": ("language_config",),
    "thinker_config.text_config": ("thinker_config", "text_config"),
    "language_model": ("language_model",),
}


@pytest.mark.parametrize("where", NESTED)
@pytest.mark.parametrize("top", [None, False, True])
@pytest.mark.parametrize(("head", "flag"), [(OWN, True), (None, False)])
def test_the_flag_of_a_nested_config_counts(
    head: np.ndarray | None, flag: bool, top: bool | None, where: str, checkpoint: Build
) -> None:
    """Of several flags each is right in the output, those of towers are left as they are."""
    vision = {"tie_word_embeddings": True, "hidden_size": 8}
    config: dict[str, Any] = {"vision_config": vision, "talker_config": dict(vision)}
    if top is not None:
        config["tie_word_embeddings"] = top
    part = config
    for key in NESTED[where]:
        part = part.setdefault(key, {})
    part["tie_word_embeddings"] = flag
    tensors, _ = llama(head)
    made = requant.plan(checkpoint(tensors, config), bits=8, layout="keep").config
    found: Any = made
    for key in NESTED[where]:
        found = found[key]
    assert found["tie_word_embeddings"] is (head is None)
    assert made.get("tie_word_embeddings", head is None) is (head is None)
    assert made["vision_config"] == made["talker_config"] == vision


@pytest.mark.parametrize(("head", "flag"), [(OWN, True), (COPY, True), (None, False)])
def test_a_model_with_a_text_config_loads(
    head: np.ndarray | None, flag: bool, checkpoint: Build, tmp_path: Path
) -> None:
    """mlx-lm's qwen3_5 reads the flag of text_config."""
    config = small_config("mistral3")
    text = config["text_config"] = LLAMA | {"tie_word_embeddings": flag, "model_type": "llama"}
    del text["torch_dtype"]
    tensors = {f"language_model.{k}": v for k, v in llama(head)[0].items()}
    source = checkpoint(tensors, config | {"tie_word_embeddings": flag})
    requant.convert(source, tmp_path / "out", bits=8, layout="mlx-lm")
    made = config_of(tmp_path / "out")
    tied = head is not OWN
    assert made["text_config"]["tie_word_embeddings"] is made["tie_word_embeddings"] is tied
    assert ("language_model.lm_head.scales" in load(tmp_path / "out")) is not tied
    logits(tmp_path / "out")


@pytest.mark.parametrize(
    "architecture",
    ["LlamaForSequenceClassification", "LlamaModel", "LlamaForTokenClassification", "MistralModel"],
)
def test_a_model_without_scores_of_tokens_has_no_head(architecture: str, checkpoint: Build) -> None:
    tensors, config = llama(None, tie_word_embeddings=False, architectures=[architecture])
    plan = requant.plan(checkpoint(tensors, config), bits=8, layout="keep")
    assert plan.config["tie_word_embeddings"] is False
    assert not any("head" in note for note in note_texts(plan.notes))


# -- classes --------------------------------------------------------------------------------
def gemma(head: np.ndarray | None, flag: bool) -> tuple[Tensors, dict[str, Any]]:
    tensors, config = llama(head, tie_word_embeddings=flag, model_type="gemma", head_dim=32)
    return tensors, config | {"architectures": ["GemmaForCausalLM"]}


@pytest.mark.parametrize("flag", [True, False])
def test_a_class_that_always_ties(flag: bool, checkpoint: Build, tmp_path: Path) -> None:
    """Its copy is left out even where the flag denies it; another head is rejected, both named."""
    requant.convert(checkpoint(*gemma(COPY, flag)), tmp_path / "copy", bits=8, layout="mlx-lm")
    assert not any("lm_head" in name for name in load(tmp_path / "copy"))
    logits(tmp_path / "copy")
    source = checkpoint(*gemma(OWN, flag), name="own")
    with pytest.raises(CheckpointError) as raised:
        requant.convert(source, tmp_path / "out", bits=8, layout="mlx-lm")
    assert HEAD in str(raised.value)
    assert f"differs from {EMBEDDING}" in str(raised.value)
    plan = requant.plan(source, bits=8)
    assert plan.layout == "keep"
    assert plan.config["tie_word_embeddings"] is False
    assert any("differs from" in note for note in note_texts(plan.notes))


def test_a_class_that_never_ties_gets_the_embedding_once_more(checkpoint: Build, tmp_path: Path):
    config = small_config("stablelm") | {"tie_word_embeddings": True}
    from tests.support.mlx_lm_conversion import class_checkpoint

    folder = tmp_path / "source"
    class_checkpoint(folder, config)
    weights = mx.load(str(folder / "model.safetensors"))
    del weights[HEAD]
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "pt"})
    report = requant.convert(folder, tmp_path / "out", dequantize=True, layout="mlx-lm")
    out = load(tmp_path / "out")
    assert same(out[HEAD], out[EMBEDDING])
    assert any("copy of the embedding" in note for note in note_texts(report.plan.notes))
    logits(tmp_path / "out")


# -- names in options -----------------------------------------------------------------------
@pytest.mark.parametrize("head", [None, COPY], ids=["none", "a copy"])
@pytest.mark.parametrize(
    "options", [{"overrides": ["lm_head=6"]}, {"only": [r"^lm_head$"]}], ids=str
)
@pytest.mark.parametrize("layout", ["keep", "mlx-lm"])
def test_an_option_that_names_a_tied_head_is_pointed_to_the_embedding(
    head: np.ndarray | None, options: Mapping[str, Any], layout: str, checkpoint: Build
) -> None:
    source = checkpoint(*llama(head, tie_word_embeddings=True))
    with pytest.raises(UsageError, match=r"tied to model\.embed_tokens, which serves as both"):
        requant.plan(source, bits=4, layout=layout, **options)
    plan = requant.plan(source, bits=4, layout=layout, overrides=["embed_tokens=6"])
    found = {layer.layer: layer.target for layer in plan.layers}
    assert found["model.embed_tokens"] == "affine 6-bit g64"
