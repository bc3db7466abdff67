"""No key that llama.cpp's graphs use is lost: config.json says it, or it is named."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import requant
from requant.errors import CheckpointError
from tests.support.gguf_files import write_gguf
from tests.support.gguf_models import (
    ALL,
    TOKENS,
    header_of,
    model_of,
    output_of,
    read_with,
    tiny,
)
from tests.support.gguf_records import RECORDS

pytestmark = pytest.mark.sweep(2)

# What llama.cpp reads (src/llama-arch.cpp) and this version of the package does not list.
_NEWER = """
    activation.situ_beta adapters.lora_rank attention.compress_ratios attention.rope_pattern
    attention.value_scale attn_res.block_size block_size classifier.pooling_type
    deepstack_mapping expert_latent_length hidden_activation hrm.h_cycles
    hyper_connection.count norm_before_residual num_loops ple.layers rope.scale_linear
    skip_loop_final_norm target_layers
"""
# Sizes that tensors have too: another value is a damaged file, not another model.
SIZES = {
    *("block_count", "embedding_length", "feed_forward_length", "context_length"),
    *("attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon"),
    *("attention.key_length", "rope.freq_base", "expert_count", "expert_used_count"),
}
# Never off by a number that is not theirs.
VALUES: dict[str, list[Any]] = {
    "attention.causal": [False],
    "attention.rope_pattern": [[True, False]],
    "attention.sliding_window_pattern": [3, [False, True]],
    "classifier.output_labels": [["yes", "no"]],
    "deepstack_mapping": [[-1, 1]],
    "diffusion.shift_logits": [True],
    "expert_weights_norm": [True, False],
    "hidden_activation": ["gelu"],
    "n_deepstack_layers": [3],
    "rope.dimension_sections": [[8, 4, 4, 0], [8, 4, 2, 2]],
    "rope.scaling.finetuned": [True, False],
    "rope.scaling.type": ["yarn", "longrope", "dynamic"],
    "swin_norm": [True],
    "tensor_data_layout": ["Meta AI original pth", "other"],
    "use_parallel_residual": [True],
}
ENCODERS = ("bert", "xlm_roberta", "nomic_bert", "jina_bert")
NORMED = ("granitemoe", "granitemoehybrid", "granitemoehybrid_dense", "gemma4", "gemma4_moe")
TWICE = ("nemotron_h", "t5_encoder")
# Known to change nothing as it is, so that no note is needed.
SILENT = {
    ("qwen2vl", "rope.dimension_sections", "[8, 4, 4, 0]"),
    ("qwen2vl", "rope.dimension_sections", "[8, 4, 2, 2]"),
    ("qwen3vl", "rope.dimension_sections", "[8, 4, 4, 0]"),
    ("qwen3vl", "rope.dimension_sections", "[8, 4, 2, 2]"),
    ("qwen3vlmoe", "rope.dimension_sections", "[8, 4, 4, 0]"),
    ("qwen3vlmoe", "rope.dimension_sections", "[8, 4, 2, 2]"),
    ("qwen3vl", "n_deepstack_layers", "3"),
    ("qwen3vlmoe", "n_deepstack_layers", "3"),
    # What the architecture computes without the key.
    ("llama/mixtral", "expert_weights_norm", "True"),
    ("qwen2moe", "expert_weights_norm", "False"),
    ("qwen3moe", "expert_weights_norm", "True"),
    ("qwen3vlmoe", "expert_weights_norm", "True"),
    ("gpt-oss", "expert_weights_norm", "True"),
    ("gpt-oss", "expert_weights_norm", "False"),
    ("gpt-oss", "expert_gating_func", "3"),
    ("granite", "rope.scaling.finetuned", "True"),
    ("mistral3", "rope.scaling.type", "yarn"),
    *((case, "rope.scaling.type", "yarn") for case in ("deepseek_v2", "deepseek_v3")),
    ("deepseek_v2", "expert_weights_norm", "False"),
    *((case, "expert_weights_norm", "True") for case in NORMED),
    *((case, "expert_gating_func", "3") for case in NORMED),
    *((case, "expert_weights_norm", "True") for case in ("deepseek_v3", "glm4_moe", "nemotron_h")),
    *((case, "expert_weights_norm", "True") for case in ("lfm2_moe", "minimax", "qwen3_5_moe")),
    # Widths of keys and values as they are stored follow from the rank.
    *((case, "attention.value_length", "5") for case in ("deepseek_v2", "deepseek_v3")),
    *((case, "attention.causal", "False") for case in ENCODERS),
    ("gemma4", "attention.sliding_window_pattern", "3"),  # as the list there has it
    *((case, "rope.scaling.finetuned", "False") for case in ("granitemoehybrid", "nemotron_h")),
    ("granitemoehybrid_dense", "rope.scaling.finetuned", "False"),
    # Attention without positions.
    *(
        ("nemotron_h", "rope.scaling.finetuned", "True"),
        ("nemotron_h", "rope.dimension_count", "5"),
    ),
    ("nemotron_h", "expert_weights_scale", "2.5"),  # its own
    # The converter writes both: a note is there already.
    *((case, "attention.layer_norm_epsilon", str(x)) for case in TWICE for x in (5, 2.5)),
}
WITH = {"yarn": {"rope.scaling.factor": 4.0}}  # what a value is written with
NO_EXPERTS = ("expert_weights_norm", "False")


def keys_of_the_package() -> list[str]:
    """Every key below an architecture's prefix."""
    found = set(_NEWER.split())

    def walk(place: Any) -> None:
        for name, value in vars(place).items():
            if isinstance(value, type) and not name.startswith("_"):
                walk(value)
            elif isinstance(value, str) and value.startswith("{arch}."):
                found.add(value.removeprefix("{arch}."))

    walk(gguf.Keys)
    return sorted(key for key in found if "{" not in key)


KEYS = keys_of_the_package()


def values_of(key: str) -> Iterator[Any]:
    yield from VALUES.get(key, [5, 2.5])


@pytest.mark.parametrize("case", [*ALL, *RECORDS])
def test_no_key_is_lost(case: str) -> None:
    """Another value gives another config, a note that names the key, or an error that does."""
    usual, notes, problems = read_with(case, {})
    assert problems == []
    missing = []
    for key in KEYS:
        if key in SIZES:
            continue
        full = f"{header_of(case).metadata['general.architecture']}.{key}"
        for value in values_of(key):
            silent = (case, key, str(value)) in SILENT
            without = case not in NORMED and "expert" not in str(usual)
            silent |= without and (key, str(value)) == NO_EXPERTS
            config, declared, named = read_with(case, WITH.get(str(value), {}) | {key: value})
            is_reported = full in named or full in declared.replace(notes, "") or config != usual
            if is_reported == silent:
                missing.append(f"{key} = {value}: {named}")
    assert missing == []


@pytest.mark.parametrize("case", ALL)
def test_neutral_values_are_taken(case: str) -> None:
    """What llama.cpp writes for what a model has not."""
    _, config = model_of(ALL[case][0])
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    neutral: dict[str, Any] = {
        "attention.causal": True,
        "attention.clamp_kqv": 0.0,
        "attention.max_alibi_bias": 0.0,
        **{"attention.value_length": width, "embedding_length_out": 0, "expert_group_count": 0},
        **{"expert_shared_count": 0, "expert_weights_scale": 1.0},
        "leading_dense_block_count": 0,
        "nextn_predict_layers": 0,
        "pooling_type": 0,
        "rope.dimension_count": width,
        "rope.scaling.attn_factor": 1.0,
        "rope.scaling.type": "none",
        "rope.scaling.yarn_ext_factor": -1.0,
        "swiglu_clamp_exp": [0.0, 0.0],
        "use_parallel_residual": False,
        "vocab_size": 256,
    }
    if ALL[case][0] in ("olmo3", "ministral3"):  # theirs is YaRN
        del neutral["rope.scaling.type"]
    assert read_with(case, neutral) == read_with(case, {})


@pytest.mark.parametrize("key", ["rope.freq_base", "attention.scale", "llama.attention.new_thing"])
def test_keys_that_nobody_knows(key: str, tmp_path: Path) -> None:
    weights, config = model_of("llama")
    write_gguf(tmp_path / "m.gguf", weights, config, more={f"!{key}": 2.5})
    with pytest.raises(
        CheckpointError, match=f"m.gguf: {key}: is 2.5: that (changes|is not known)"
    ):
        requant.plan(tmp_path / "m.gguf")


def test_every_key_is_named_at_once_and_a_config_of_ones_own_helps(tmp_path: Path) -> None:
    weights, config = model_of("llama")
    more = {"attention.clamp_kqv": 2.5, "residual_scale": 0.5, "expert_weights_scale": 1.5}
    write_gguf(tmp_path / "m.gguf", weights, config, more=more)
    with pytest.raises(CheckpointError) as caught:
        requant.plan(tmp_path / "m.gguf")
    named = [problem.where for problem in caught.value.problems]
    assert named == [f"m.gguf: llama.{key}" for key in more]
    assert all("--config-from" in problem.message for problem in caught.value.problems)
    (tmp_path / "original").mkdir()
    (tmp_path / "original" / "config.json").write_text(json.dumps(config))
    out = tmp_path / "out"
    requant.convert(
        tmp_path / "m.gguf",
        out,
        config_from=tmp_path / "original",
        dequantize=True,
        dtype="float32",
    )
    made, _ = tiny("llama")
    np.testing.assert_allclose(output_of(out), np.array(made(TOKENS)), atol=2e-5)
