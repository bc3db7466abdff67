"""``config.json`` from a GGUF file's metadata, architecture by architecture.

The facts are those of llama.cpp's converter (ggml-org/llama.cpp conversion/, convert_hf_to_gguf.py)
and of its readers of hyperparameters (src/models/), where files leave out what these know.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from requant.core.reasons import Note, NoteCode
from requant.gguf.known_keys import report_unread
from requant.gguf.rope import rope_scaling
from requant.gguf.settings import ADVICE, Settings
from requant.gguf.special_tokens import special_ids

Configure = Callable[[dict[str, Any], Settings], None]
"""Adds what only one architecture has to a config."""


def make_config(
    settings: Settings, model_type: str, cls: str, configure: Configure
) -> dict[str, Any]:
    """``config.json`` of a known architecture; what is missing or has no place is a problem.

    The arguments are those of ``architectures.Architecture``.
    """
    support = settings.support
    heads = settings.need_int("attention.head_count") if support.attention else 1
    hidden = settings.need_int("embedding_length")
    blocks = settings.blocks
    if blocks > len(settings.shapes):
        message = f"is {blocks:,}, but the file has {len(settings.shapes):,} tensors in all"
        settings.metadata.report(f"{settings.prefix}block_count", message)
        blocks = 1
    embeddings = settings.shapes.get("token_embd.weight", ())
    if not embeddings:
        settings.metadata.report("token_embd.weight", "is missing: no model goes without it")
    config: dict[str, Any] = {
        "architectures": [cls],
        "model_type": model_type,
        "hidden_size": hidden,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": _first_or_common("attention.head_count_kv", settings) or heads,
        "head_dim": settings.find_int("attention.key_length") or max(hidden // heads, 1),
        "intermediate_size": _first_or_common("feed_forward_length", settings),
        "layer_norm_eps" if support.layer_norm else "rms_norm_eps": settings.need_float(
            f"attention.layer_norm{'' if support.layer_norm else '_rms'}_epsilon"
        ),
        "vocab_size": embeddings[0] if embeddings else 0,
        "max_position_embeddings": settings.need_int("context_length"),
        "rope_theta": settings.find_float("rope.freq_base") or 10000.0,
        "tie_word_embeddings": not settings.has("output.weight"),
    }
    _check_head_dim(config, settings)
    rotary = _rotary(config, settings)
    scaling = rope_scaling(settings, model_type, rotary) if support.positions else None
    if scaling is not None:
        config["rope_scaling"] = scaling
    configure(config, settings)
    config |= special_ids(settings.metadata)
    report_unread(settings, config)
    return config


def _first_or_common(key: str, settings: Settings) -> int:
    """The number of all blocks; of the first that has one where blocks are of several kinds."""
    if not settings.support.hybrid:
        return settings.find_int(key) or 0
    return next((x for x in settings.layer_ints(key, settings.blocks) or [] if x), 0)


def _check_head_dim(config: dict[str, Any], settings: Settings) -> None:
    """Some classes compute the width of a head, whatever config.json says."""
    by_hidden = config["hidden_size"] // config["num_attention_heads"]
    if not settings.support.head_dim and config["head_dim"] != by_hidden:
        message = (
            f"is {config['head_dim']:,}, but mlx-lm's class for {config['model_type']} takes "
            f"embedding_length / attention.head_count = {by_hidden:,}; {ADVICE}"
        )
        settings.report("attention.key_length", message)


def _rotary(config: dict[str, Any], settings: Settings) -> int:
    """The number of values of a head that are rotated: all, unless config.json can say a part."""
    width: int = config["head_dim"]
    if not settings.support.partial_rotary:
        return width
    rotary = settings.find_int("rope.dimension_count") or width
    if rotary > width:
        settings.report("rope.dimension_count", f"is {rotary:,}, but a head has {width:,} values")
    elif rotary != width:
        part = rotary / width
        config["partial_rotary_factor"] = part if int(width * part) == rotary else part + 1e-9
    return rotary


# -- what only one architecture has --------------------------------------------------------------


def configure_llama(config: dict[str, Any], settings: Settings) -> None:
    names = ("blk.0.attn_q.bias", "blk.0.attn_qkv.bias")
    config["attention_bias"] = any(settings.has(name) for name in names)
    config["mlp_bias"] = settings.has("blk.0.ffn_up.bias")
    config["hidden_act"] = "silu"


def configure_mixtral(config: dict[str, Any], settings: Settings) -> None:
    config["num_local_experts"] = settings.need_int("expert_count")
    config["num_experts_per_tok"] = settings.need_int("expert_used_count")
    config["hidden_act"] = "silu"


def configure_qwen(config: dict[str, Any], settings: Settings) -> None:
    config["hidden_act"] = "silu"


def configure_qwen_moe(config: dict[str, Any], settings: Settings) -> None:
    is_3 = config["model_type"] == "qwen3_moe"
    norm = settings.flag("expert_weights_norm") if is_3 else False
    config |= {
        "hidden_act": "silu",
        "num_experts": settings.need_int("expert_count"),
        "num_experts_per_tok": settings.need_int("expert_used_count"),
        "moe_intermediate_size": settings.expert_width(),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": is_3 if norm is None else norm,
    }
    shared = settings.width("ffn_up_shexp.weight")
    if shared is not None:
        config["shared_expert_intermediate_size"] = shared
    config["intermediate_size"] = config["intermediate_size"] or config["moe_intermediate_size"]


def configure_gemma(config: dict[str, Any], settings: Settings) -> None:
    config["hidden_activation"] = config["hidden_act"] = "gelu_pytorch_tanh"


# Blocks of the two models whose queries scale otherwise.
_LARGEST_GEMMA = {"gemma2": 46, "gemma3_text": 62}


def _window(settings: Settings, usual: int) -> int:
    """Tokens that a block with a window sees."""
    window = settings.find_int("attention.sliding_window")
    if window == 0:
        message = f"is 0, and config.json of this model can only say a window; {ADVICE}"
        settings.report("attention.sliding_window", message)
    return window or usual


def _kinds_of(sliding: list[bool]) -> list[str]:
    return ["sliding_attention" if yes else "full_attention" for yes in sliding]


def _note_window(config: dict[str, Any], settings: Settings) -> None:
    text = (
        f"mlx-lm's class for {config['model_type']} lets every block see the whole text, not a "
        f"window of {config['sliding_window']:,} tokens as config.json says: longer texts differ."
    )
    settings.notes.append(Note(NoteCode.IGNORED_WINDOW, text))


def _soft_cap(settings: Settings, key: str, usual: float) -> float:
    """A bound of logits, which the class divides by."""
    value = settings.find_float(key)
    if value == 0:
        settings.report(key, f"is 0, and mlx-lm's class for gemma2 divides by it; {ADVICE}")
    return usual if value is None else value


def _query_scale(config: dict[str, Any]) -> int:
    largest = config["num_hidden_layers"] == _LARGEST_GEMMA[config["model_type"]]
    by_width: int = config["hidden_size"] // config["num_attention_heads"]
    return by_width if largest else config["head_dim"]


def configure_gemma_2(config: dict[str, Any], settings: Settings) -> None:
    configure_gemma(config, settings)
    sliding = settings.sliding_layers(config["num_hidden_layers"], 2)
    config |= {
        "query_pre_attn_scalar": _query_scale(config),
        "sliding_window": _window(settings, 4096),
        "attn_logit_softcapping": _soft_cap(settings, "attn_logit_softcapping", 50.0),
        "final_logit_softcapping": _soft_cap(settings, "final_logit_softcapping", 30.0),
    }
    if sliding != settings.alternating(config["num_hidden_layers"], 2):
        config["layer_types"] = _kinds_of(sliding)
    _note_window(config, settings)


def configure_gemma_3(config: dict[str, Any], settings: Settings) -> None:
    """Five blocks with a window and positions of their own, then one without."""
    configure_gemma(config, settings)
    blocks = config["num_hidden_layers"]
    config["query_pre_attn_scalar"] = _query_scale(config)
    if settings.find_float("rope.freq_base") is None:
        config["rope_theta"] = 1_000_000.0
    window = settings.find_int("attention.sliding_window")
    if not window:
        config |= {"sliding_window_pattern": 1, "layer_types": ["full_attention"] * blocks}
        return
    sliding = settings.sliding_layers(blocks, 6)
    usual = sliding == settings.alternating(blocks, 6)
    period = 6 if usual else (sliding.index(False) if False in sliding else blocks) + 1
    if sliding != settings.alternating(blocks, period):
        message = f"has no period, and mlx-lm's class for gemma3_text wants one; {ADVICE}"
        settings.report("attention.sliding_window_pattern", message)
    config |= {
        "sliding_window": window,
        "sliding_window_pattern": period,
        "rope_local_base_freq": settings.find_float("rope.freq_base_swa") or 10000.0,
    }


def configure_olmo_3(config: dict[str, Any], settings: Settings) -> None:
    """Three blocks with a window, then one without; only those without are scaled by YaRN."""
    configure_llama(config, settings)
    config["sliding_window"] = settings.need_int("attention.sliding_window")
    config["layer_types"] = _kinds_of(settings.sliding_layers(config["num_hidden_layers"], 4))


def configure_phi_3(config: dict[str, Any], settings: Settings) -> None:
    config["hidden_act"] = "silu"
    original = settings.find_int("rope.scaling.original_context_length")
    config["original_max_position_embeddings"] = original or config["max_position_embeddings"]
    window = settings.find_int("attention.sliding_window")
    if window:
        config["sliding_window"] = window
        if window < config["max_position_embeddings"]:
            _note_window(config, settings)


def configure_gpt_oss(config: dict[str, Any], settings: Settings) -> None:
    config |= {
        "intermediate_size": settings.expert_width() or config["intermediate_size"],
        "num_local_experts": settings.need_int("expert_count"),
        "num_experts_per_tok": settings.need_int("expert_used_count"),
        "sliding_window": _window(settings, 128),
        "layer_types": _kinds_of(settings.sliding_layers(config["num_hidden_layers"], 2)),
        "hidden_act": "silu",
        "attention_bias": True,
    }
    if config.get("rope_scaling", {}).get("type") == "yarn":
        usual = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
        config["rope_scaling"] = usual | config["rope_scaling"]


def configure_ministral_3(config: dict[str, Any], settings: Settings) -> None:
    """Yarn, and attention that cools with the length of the text."""
    config["hidden_act"] = "silu"
    scaling = config.pop("rope_scaling", None) or {"rope_type": "default", "type": "default"}
    original = settings.find_int("rope.scaling.original_context_length")
    config["rope_parameters"] = {
        "rope_theta": config["rope_theta"],
        "original_max_position_embeddings": original or config["max_position_embeddings"],
        "mscale": 1.0,
        "mscale_all_dim": settings.find_float("rope.scaling.yarn_log_multiplier") or 0.0,
        "llama_4_scaling_beta": settings.find_float("attention.temperature_scale"),
        **scaling,
    }


def configure_smollm_3(config: dict[str, Any], settings: Settings) -> None:
    """Every fourth layer knows no positions; files do not say so, llama.cpp knows it."""
    configure_llama(config, settings)
    config["no_rope_layer_interval"] = 4


def configure_granite(config: dict[str, Any], settings: Settings) -> None:
    """Four factors that other models have not."""
    configure_llama(config, settings)
    usual = 1 / float(np.sqrt(config["head_dim"]))
    config |= {
        "attention_multiplier": settings.find_float("attention.scale") or usual,
        "embedding_multiplier": settings.find_float("embedding_scale") or 1.0,
        "residual_multiplier": settings.find_float("residual_scale") or 1.0,
        "logits_scaling": settings.find_float("logit_scale") or 1.0,
    }


def configure_seed_oss(config: dict[str, Any], settings: Settings) -> None:
    """Biases where the file has them."""
    configure_llama(config, settings)
    config["attention_out_bias"] = settings.has("blk.0.attn_output.bias")
