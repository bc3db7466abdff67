"""Rotated parts, scalings, windows and soft caps: config.json says what llama.cpp computes."""

import importlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import requant
from requant.errors import CheckpointError
from requant.gguf.families import _FAMILIES, family_of
from requant.gguf.metadata import Metadata
from requant.gguf.settings import ALL_SCALINGS
from tests.support.gguf_files import write_gguf
from tests.support.gguf_models import (
    ALL,
    OWN,
    TOKENS,
    output_of,
    read_with,
    sharp,
    tiny,
    values,
    weights_of,
)

pytestmark = pytest.mark.sweep(1)

SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "longrope": {
        "original_max_position_embeddings": 16,
        "short_factor": [1.0] * 16,
        "long_factor": [2.0] * 16,
    },
}


def support_of(model_type: str) -> Any:
    """What is said of mlx-lm's class for a model type."""
    values = {
        "mixtral": {"general.architecture": "llama", "llama.expert_count": 4},
        "olmo3": {"general.architecture": "olmo2", "olmo2.attention.sliding_window": 4},
        "ministral3": {
            "general.architecture": "mistral3",
            "mistral3.attention.temperature_scale": 0.1,
        },
    }
    names = {family.model_type: name for name, family in reversed(_FAMILIES.items())}
    metadata = values.get(model_type) or {"general.architecture": names[model_type]}
    family = family_of(Metadata("m.gguf", metadata))
    assert family is not None and family.model_type == model_type
    return family.support


def logits_with(model_type: str, changes: dict[str, Any]) -> np.ndarray:
    made, _ = sharp(model_type, **changes)
    return np.array(made(TOKENS))


@pytest.mark.parametrize("kind", sorted(ALL_SCALINGS))
@pytest.mark.parametrize("model_type", OWN)
def test_scalings_that_classes_of_mlx_lm_read(model_type: str, kind: str) -> None:
    """The table holds for the mlx-lm that is installed: a kind changes logits, or it does not."""
    scaling = {"type": kind, "rope_type": kind, **SCALINGS[kind]}
    key = "rope_parameters" if model_type == "ministral3" else "rope_scaling"
    plain: dict[str, Any] = {key: None}
    if model_type == "ministral3":
        rest: dict[str, Any] = {"llama_4_scaling_beta": 0.0, "rope_theta": 1e6}
        rest["original_max_position_embeddings"] = 16
        plain = {key: {"type": "default", **rest}}
        scaling |= rest
    changes = {key: scaling, "original_max_position_embeddings": 16}
    try:
        got = logits_with(model_type, changes)
    except (TypeError, ValueError):  # it says so itself, or does not begin
        got = None
    usual = logits_with(model_type, plain | {"original_max_position_embeddings": 16})
    reads = got is not None and not np.allclose(got, usual, rtol=1e-6)
    assert reads == (kind in support_of(model_type).scalings)


@pytest.mark.parametrize("model_type", OWN)
def test_classes_of_mlx_lm_that_read_head_dim(model_type: str) -> None:
    """Others compute it: a file whose heads are wider has no place."""
    made, config = tiny(model_type)
    module = importlib.import_module(f"mlx_lm.models.{model_type}")
    other = module.Model(module.ModelArgs.from_dict(config | {"head_dim": 64}))
    shapes = {k: v.shape for k, v in values(other).items()}
    reads = any(v.shape != shapes[k] for k, v in values(made).items())
    assert reads == support_of(model_type).head_dim


@pytest.mark.parametrize(
    "case", [c for c, (kind, _) in ALL.items() if not support_of(kind).head_dim]
)
def test_heads_of_a_width_that_the_class_does_not_read(case: str) -> None:
    _, _, named = read_with(case, {"attention.key_length": 64, "attention.value_length": 64})
    assert f"{ALL[case][1]}.attention.key_length" in named


def check_logits(folder: Path, made: Any, other: Any) -> None:
    """Those of the model that was written, and not those of one that is near it."""
    expected, near = np.array(made(TOKENS)), np.array(other(TOKENS))
    room = 1e-4 * np.abs(expected).max()
    assert np.abs(near - expected).max() > 100 * room
    np.testing.assert_allclose(output_of(folder), expected, atol=room)


# -- a part of a head ----------------------------------------------------------------------
@pytest.mark.parametrize("part", [0.25, 0.5, 0.75])
def test_phi_3_rotates_a_part(part: float, tmp_path: Path) -> None:
    whole, _ = sharp("phi3", tie_word_embeddings=False)
    made, config = sharp("phi3", partial_rotary_factor=part, tie_word_embeddings=False)
    more = {"rope.dimension_count": int(32 * part)}
    write_gguf(tmp_path / "m.gguf", weights_of(made), config, more=more)
    requant.convert(tmp_path / "m.gguf", tmp_path / "out", dequantize=True, dtype="float32")
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    assert found["partial_rotary_factor"] == part
    check_logits(tmp_path / "out", made, whole)


@pytest.mark.parametrize("rotary", range(2, 32, 2))
def test_a_part_is_the_same_number_of_values_again(rotary: int) -> None:
    """Classes multiply and cut off: what comes out is what the file said."""
    config, _, named = read_with("phi3", {"rope.dimension_count": rotary})
    assert named == [] and int(32 * config["partial_rotary_factor"]) == rotary


@pytest.mark.parametrize("case", [case for case in ALL if case != "phi3"])
def test_a_part_of_a_head_where_the_class_knows_none(case: str) -> None:
    for rotary in (16, 64):
        _, _, named = read_with(case, {"rope.dimension_count": rotary})
        assert named == [f"{ALL[case][1]}.rope.dimension_count"]


# -- YaRN ----------------------------------------------------------------------------------
YARN = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 8.0,
    "rope.scaling.original_context_length": 64,
}
USUAL = 0.1 * math.log(8) + 1


FACTORS: list[tuple[dict[str, float], float]] = [
    ({}, USUAL),
    ({"rope.scaling.yarn_attn_factor": USUAL}, USUAL),
    ({"rope.scaling.yarn_attn_factor": 1.0}, 1.0),
    ({"rope.scaling.yarn_attn_factor": 1.5}, 1.5),
    ({"rope.scaling.attn_factor": 1.0}, USUAL),
    ({"rope.scaling.attn_factor": 0.5}, USUAL / 2),
    ({"rope.scaling.yarn_attn_factor": 1.5, "rope.scaling.attn_factor": 2.0}, 3.0),
    ({"rope.scaling.yarn_log_multiplier": 1.0}, 1.0),
    ({"rope.scaling.yarn_log_multiplier": 0.5}, USUAL / (0.05 * math.log(8) + 1)),
    ({"rope.scaling.yarn_log_multiplier": 1.0, "rope.scaling.attn_factor": 1.25}, 1.25),
]


@pytest.mark.parametrize(("keys", "factor"), FACTORS)
@pytest.mark.parametrize("case", ["llama", "qwen3", "gpt-oss", "olmo2"])
def test_attention_factor_of_yarn(case: str, keys: dict[str, float], factor: float) -> None:
    """mlx-lm and transformers multiply queries and keys by what llama.cpp does."""
    config, _, named = read_with(case, YARN | keys)
    assert named == []
    scaling = config["rope_scaling"]
    rope = importlib.import_module("mlx_lm.models.rope_utils").initialize_rope(
        32, 1e4, False, scaling, 512
    )
    assert rope.mscale == pytest.approx(factor, rel=1e-5)


@pytest.mark.parametrize(("keys", "factor"), FACTORS)
def test_attention_factor_of_yarn_in_transformers(keys: dict[str, float], factor: float) -> None:
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    compute = importlib.import_module("transformers.modeling_rope_utils").ROPE_INIT_FUNCTIONS
    config, _, _ = read_with("llama", YARN | keys)
    _, found = compute["yarn"](transformers.AutoConfig.for_model(**config), "cpu")
    assert found == pytest.approx(factor, rel=1e-5)


def test_betas_of_yarn() -> None:
    betas = {"rope.scaling.yarn_beta_fast": 24.0, "rope.scaling.yarn_beta_slow": 2.0}
    config, _, named = read_with("llama", YARN | betas)
    assert named == []
    assert config["rope_scaling"] == {
        "rope_type": "yarn",
        "type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 24.0,
        "beta_slow": 2.0,
    }


@pytest.mark.parametrize(
    ("case", "keys", "named"),
    [
        ("llama", YARN | {"rope.scaling.yarn_ext_factor": 0.5}, "rope.scaling.yarn_ext_factor"),
        ("llama", {"rope.scaling.attn_factor": 1.5}, "rope.scaling.attn_factor"),
        (
            "llama",
            YARN | {"rope.scaling.factor": 1.0, "rope.scaling.attn_factor": 1.5},
            "rope.scaling.attn_factor",
        ),
        ("llama", {"rope.scaling.type": "linear", "rope.scaling.alpha": 2.0}, "rope.scaling.alpha"),
        ("qwen3moe", YARN, "rope.scaling.type"),
        ("qwen3moe", {"rope.scaling.factor": 2.0}, "rope.scaling.factor"),
        ("llama/mixtral", {"rope.scale_linear": 2.0}, "rope.scale_linear"),
        ("gemma2", YARN, "rope.scaling.type"),
        ("phi3", YARN, "rope.scaling.type"),
        ("olmo2/olmo3", {"rope.freq_base_swa": 5e5}, "rope.freq_base_swa"),
        ("gpt-oss", {"rope.freq_base_swa": 5.0}, "rope.freq_base_swa"),
    ],
)
def test_positions_that_no_config_says(case: str, keys: dict[str, Any], named: str) -> None:
    assert f"{ALL[case][1]}.{named}" in read_with(case, keys)[2]


@pytest.mark.parametrize("model_type", ["llama", "phi3"])
def test_factors_of_longrope(model_type: str, tmp_path: Path) -> None:
    """Read from their tensors; the attention factor must be the one that classes compute."""
    long, short = np.linspace(1, 4, 16), np.linspace(1, 2, 16)
    scaling = {"type": "longrope", "original_max_position_embeddings": 64}
    scaling |= {"long_factor": long.tolist(), "short_factor": short.tolist()}
    whole = {"partial_rotary_factor": 1.0, "max_position_embeddings": 512}
    if model_type == "phi3":
        whole["tie_word_embeddings"] = False
    near, _ = sharp(model_type, **whole)
    made, config = sharp(
        model_type, rope_scaling=scaling, original_max_position_embeddings=64, **whole
    )
    extra = {"rope_factors_long.weight": long.astype(np.float32)}
    extra["rope_factors_short.weight"] = short.astype(np.float32)
    usual = math.sqrt(1 + math.log(512 / 64) / math.log(64))
    more = {
        "rope.scaling.type": "longrope",
        "rope.scaling.original_context_length": 64,
        "rope.scaling.attn_factor": usual,
        "rope.dimension_count": 32,
    }
    weights = weights_of(made)
    write_gguf(tmp_path / "m.gguf", weights, config, extra=extra, more=more)
    found = requant.plan(tmp_path / "m.gguf").config["rope_scaling"]
    assert found["type"] == "longrope"
    assert np.array_equal(np.float32(found["long_factor"]), long.astype(np.float32))
    assert np.array_equal(np.float32(found["short_factor"]), short.astype(np.float32))
    requant.convert(tmp_path / "m.gguf", tmp_path / "out", dequantize=True, dtype="float32")
    check_logits(tmp_path / "out", made, near)
    for wrong in ({"rope.scaling.attn_factor": 1.9}, {"rope.scaling.factor": 8.0}):
        write_gguf(tmp_path / "m.gguf", weights, config, extra=extra, more=more | wrong)
        with pytest.raises(CheckpointError, match=next(iter(wrong))):
            requant.plan(tmp_path / "m.gguf")
    del more["rope.scaling.attn_factor"]
    write_gguf(tmp_path / "m.gguf", weights, config, extra=extra, more=more)
    with pytest.raises(CheckpointError, match="attn_factor: is missing, which means 1, but"):
        requant.plan(tmp_path / "m.gguf")


def test_factors_of_llama_3_next_to_yarn(tmp_path: Path) -> None:
    made, config = tiny("llama")
    extra = {"rope_freqs.weight": np.linspace(1, 8, 16, dtype=np.float32)}
    write_gguf(tmp_path / "m.gguf", values(made), config, extra=extra, more=YARN)
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight: holds factors next to"):
        requant.plan(tmp_path / "m.gguf")


# -- windows and soft caps -----------------------------------------------------------------
def test_olmo_3_is_olmo_2_with_a_window() -> None:
    config, _, named = read_with("olmo2", {"attention.sliding_window": 8})
    assert named == [] and config["model_type"] == "olmo3"
    assert config["architectures"] == ["Olmo3ForCausalLM"]
    assert config["sliding_window"] == 8 and config["layer_types"] == ["sliding_attention"] * 2
    config, _, named = read_with("olmo2", {"attention.sliding_window": 0})
    assert named == [] and config["model_type"] == "olmo2" and "sliding_window" not in config


@pytest.mark.parametrize(
    ("pattern", "kinds"),
    [
        ({}, "sssfsssf"),
        ({"attention.sliding_window_pattern": 2}, "sfsfsfsf"),
        ({"attention.sliding_window_pattern": 1}, "ffffffff"),
        ({"attention.sliding_window_pattern": 0}, "ssssssss"),
        ({"attention.sliding_window_pattern": [True, False, False, True] * 2}, "sffssffs"),
        ({"attention.sliding_window_pattern": [1, 0, 1, 1] * 2}, "sfsssfss"),
    ],
)
def test_patterns_of_windows(pattern: dict[str, Any], kinds: str) -> None:
    words = {"s": "sliding_attention", "f": "full_attention"}
    more = {"block_count": 8, "attention.sliding_window": 8, **pattern}
    config, _, named = read_with("olmo2", more)
    assert named == [] and config["layer_types"] == [words[kind] for kind in kinds]


@pytest.mark.parametrize("pattern", [[True], [2, 3], ["a", "b"]])
def test_patterns_that_are_none(pattern: list[Any]) -> None:
    more = {"attention.sliding_window": 8, "attention.sliding_window_pattern": pattern}
    _, _, named = read_with("olmo2", more)
    assert named == ["olmo2.attention.sliding_window_pattern"]


def test_gemma_3_without_a_window_has_none(tmp_path: Path) -> None:
    """llama.cpp takes no window where the file says none; Gemma's usual one is not put in."""
    near, _ = sharp("gemma3_text")
    made, config = sharp("gemma3_text", sliding_window_pattern=1)
    config = {key: value for key, value in config.items() if key != "sliding_window"}
    write_gguf(tmp_path / "m.gguf", weights_of(made), config)
    requant.convert(tmp_path / "m.gguf", tmp_path / "out", dequantize=True, dtype="float32")
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    assert found["sliding_window_pattern"] == 1
    assert set(found["layer_types"]) == {"full_attention"}
    check_logits(tmp_path / "out", made, near)


def test_olmo_3_as_a_whole(tmp_path: Path) -> None:
    """A window in some blocks, YaRN in the others."""
    near, _ = sharp("olmo3", sliding_window=512)
    flat, _ = sharp("olmo3", rope_scaling=None)
    made, config = sharp("olmo3")
    write_gguf(tmp_path / "m.gguf", weights_of(made), config)
    requant.convert(tmp_path / "m.gguf", tmp_path / "out", dequantize=True, dtype="float32")
    check_logits(tmp_path / "out", made, near)
    check_logits(tmp_path / "out", made, flat)


@pytest.mark.parametrize(
    ("pattern", "period"),
    [(6, 6), (3, 3), ([True, True, False] * 2, 3), ([True] * 5 + [False], 6), ([True] * 6, 7)],
)
def test_periods_of_gemma_3(pattern: Any, period: int) -> None:
    more = {"attention.sliding_window": 8, "attention.sliding_window_pattern": pattern}
    config, _, named = read_with("gemma3", more)
    assert named == [] and config["sliding_window_pattern"] == period


@pytest.mark.parametrize(
    ("case", "keys"),
    [
        ("gemma3", {"attention.sliding_window_pattern": [False, True] * 3}),
        ("gemma3", {"final_logit_softcapping": 30.0}),
        ("gemma3", {"attn_logit_softcapping": 50.0}),
        ("gemma2", {"attn_logit_softcapping": 0.0}),
        ("gemma2", {"final_logit_softcapping": 0.0}),
        ("gemma2", {"attention.sliding_window": 0}),
        ("gpt-oss", {"attention.sliding_window": 0}),
        ("llama", {"attention.sliding_window": 8}),
        ("granite", {"rope.scaling.finetuned": False}),
        ("qwen3moe", {"expert_feed_forward_length": 32}),
        ("llama/mixtral", {"expert_feed_forward_length": 32}),
        ("qwen2moe", {"expert_shared_feed_forward_length": 32}),
    ],
)
def test_what_no_class_computes(case: str, keys: dict[str, Any]) -> None:
    _, _, named = read_with(case, keys)
    assert named == [f"{ALL[case][1]}.{key}" for key in keys]


def test_soft_caps_of_gemma_2() -> None:
    caps = {"attn_logit_softcapping": 20.0, "final_logit_softcapping": 10.0}
    config, _, named = read_with("gemma2", caps)
    assert named == [] and {key: config[key] for key in caps} == caps


@pytest.mark.parametrize("norm", [True, False])
def test_experts_whose_weights_are_normed_or_not(norm: bool) -> None:
    config, _, named = read_with("qwen3moe", {"expert_weights_norm": norm})
    assert named == [] and config["norm_topk_prob"] is norm


def test_a_window_that_mlx_lm_does_not_keep_to_is_reported() -> None:
    _, notes, _ = read_with("gemma2", {"attention.sliding_window": 64})
    assert "mlx-lm's class for gemma2 lets every block see the whole text" in notes
    _, notes, _ = read_with("gemma3", {"attention.sliding_window": 64})
    assert notes == ""
