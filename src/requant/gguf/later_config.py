"""``config.json`` of architectures of attention alone: DeepSeek, GLM, Gemma 4 and others.

The facts are those of llama.cpp's converter and readers (ggml-org/llama.cpp conversion/,
src/models/), in the terms of transformers' config classes.
"""

from __future__ import annotations

from typing import Any

from requant.gguf.settings import ADVICE, Settings
from requant.text import format_value

_LOG_MULTIPLIER = 0.1  # by which the converter multiplies DeepSeek's mscale_all_dim
_FALCON_ROWS = "jploski"  # the order of rows that all converters of Falcon's models give


def rename(config: dict[str, Any], **names: str) -> None:
    """Give settings of a config the names of another class: ``new="old"``."""
    for new, old in names.items():
        config[new] = config.pop(old)


def take_rotary(config: dict[str, Any], settings: Settings) -> int:
    """The number of values of a head that are rotated."""
    width: int = config["head_dim"]
    return settings.find_int("rope.dimension_count") or width


def _experts(config: dict[str, Any], settings: Settings) -> None:
    """Experts with shared ones, as DeepSeek's and GLM's configs name them."""
    config |= {
        "moe_intermediate_size": settings.expert_width(),
        "n_routed_experts": settings.find_int("expert_count"),
        "num_experts_per_tok": settings.find_int("expert_used_count"),
        "n_shared_experts": settings.find_int("expert_shared_count") or None,
        "routed_scaling_factor": settings.find_float("expert_weights_scale") or 1.0,
        "first_k_dense_replace": settings.find_int("leading_dense_block_count") or 0,
        "n_group": settings.find_int("expert_group_count") or 1,
        "topk_group": settings.find_int("expert_group_used_count") or 1,
    }


def _configure_deepseek(config: dict[str, Any], settings: Settings) -> None:
    """Keys and values are stored compressed; a part of each key has positions."""
    rotary = settings.need_int("rope.dimension_count")
    keys = settings.find_int("attention.key_length_mla") or settings.need_int(
        "attention.key_length"
    )
    values = settings.find_int("attention.value_length_mla") or settings.need_int(
        "attention.value_length"
    )
    for key in ("attention.key_length", "attention.value_length"):
        settings.find_int(key)  # with the keys above they follow from the rank
    config |= {
        "num_key_value_heads": config["num_attention_heads"],
        "head_dim": rotary,
        "kv_lora_rank": settings.need_int("attention.kv_lora_rank"),
        "q_lora_rank": settings.find_int("attention.q_lora_rank") or None,
        "qk_rope_head_dim": rotary,
        "qk_nope_head_dim": keys - rotary,
        "v_head_dim": values,
        "moe_layer_freq": 1,
        "hidden_act": "silu",
        "attention_bias": settings.has("blk.0.attn_q_a.bias"),
    }
    _experts(config, settings)
    scaling = config.get("rope_scaling")
    if scaling is not None:
        all_dim = settings.find_float("rope.scaling.yarn_log_multiplier") or 0.0
        all_dim = float(f"{all_dim / _LOG_MULTIPLIER:.6g}")
        scaling |= {"mscale": all_dim, "mscale_all_dim": all_dim}
        scaling.setdefault("beta_fast", 32.0)
        scaling.setdefault("beta_slow", 1.0)


def configure_deepseek_2(config: dict[str, Any], settings: Settings) -> None:
    _configure_deepseek(config, settings)
    grouped = config["n_group"] > 1
    config |= {
        "topk_method": "group_limited_greedy" if grouped else "greedy",
        "scoring_func": "softmax",
        "norm_topk_prob": False,
    }


def configure_deepseek_3(config: dict[str, Any], settings: Settings) -> None:
    _configure_deepseek(config, settings)
    norm = settings.flag("expert_weights_norm")
    config |= {
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": False if norm is None else norm,
    }
    if config["model_type"] == "glm4_moe_lite":
        config["partial_rotary_factor"] = 1.0


def configure_glm_4(config: dict[str, Any], settings: Settings) -> None:
    config["hidden_act"] = "silu"
    config["attention_bias"] = settings.has("blk.0.attn_q.bias")
    config.setdefault("partial_rotary_factor", 1.0)


def configure_glm_4_moe(config: dict[str, Any], settings: Settings) -> None:
    configure_glm_4(config, settings)
    _experts(config, settings)
    norm = settings.flag("expert_weights_norm")
    config |= {
        "norm_topk_prob": False if norm is None else norm,
        "use_qk_norm": settings.has("blk.0.attn_q_norm.weight"),
        "rope_scaling": None,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
    }


def configure_gemma_4(config: dict[str, Any], settings: Settings) -> None:
    """Blocks with a window have heads and positions of their own."""
    blocks = config["num_hidden_layers"]
    wide = config["head_dim"]
    narrow = settings.find_int("attention.key_length_swa") or wide
    sliding = settings.sliding_layers(blocks, 6)
    full = [block for block in range(blocks) if not sliding[block]]
    kinds = ["sliding_attention" if yes else "full_attention" for yes in sliding]
    heads = settings.layer_ints("attention.head_count_kv", blocks) or [0] * blocks
    widths = settings.layer_ints("feed_forward_length", blocks) or [0] * blocks
    shared = settings.find_int("attention.shared_kv_layers") or 0
    per_layer = settings.find_int("embedding_length_per_layer_input") or 0
    tokens = settings.shapes.get("per_layer_token_embd.weight", (config["vocab_size"],))[0]
    config |= {
        "head_dim": narrow,
        "global_head_dim": wide,
        "num_key_value_heads": next((heads[n] for n in range(blocks) if sliding[n]), heads[0]),
        "num_global_key_value_heads": heads[full[0]] if full else None,
        "attention_k_eq_v": any(
            settings.has(f"blk.{n}.attn_k.weight") and not settings.has(f"blk.{n}.attn_v.weight")
            for n in full
        ),
        "layer_types": kinds,
        "sliding_window": settings.need_int("attention.sliding_window"),
        "num_kv_shared_layers": shared,
        "hidden_size_per_layer_input": per_layer,
        "vocab_size_per_layer_input": tokens,
        "intermediate_size": widths[0],
        "use_double_wide_mlp": bool(shared) and widths[-1] == 2 * widths[0],
        "final_logit_softcapping": settings.find_float("final_logit_softcapping"),
        "hidden_activation": "gelu_pytorch_tanh",
        "rope_parameters": {
            "full_attention": {
                "rope_type": "proportional",
                "rope_theta": config.pop("rope_theta"),
                "partial_rotary_factor": _proportion(settings),
            },
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": settings.find_float("rope.freq_base_swa") or 10000.0,
            },
        },
    }
    odd = {*widths} - {widths[0], *([2 * widths[0]] if config["use_double_wide_mlp"] else [])}
    if odd:
        message = f"has {sorted(odd)[0]:,} next to {widths[0]:,}, which config.json cannot say"
        settings.report("feed_forward_length", f"{message}; {ADVICE}")
    _check_rotary(settings, wide, narrow)
    experts = settings.find_int("expert_count")
    config["enable_moe_block"] = bool(experts)
    if experts:
        config |= {
            "num_experts": experts,
            "top_k_experts": settings.need_int("expert_used_count"),
            "moe_intermediate_size": settings.expert_width(),
        }


def _check_rotary(settings: Settings, wide: int, narrow: int) -> None:
    """Heads are rotated whole, but for what the factors of frequencies leave out."""
    for key, width in (("", wide), ("_swa", narrow)):
        for part in ("rope.dimension_count", "attention.value_length"):
            found = settings.find_int(part + key)
            if found not in (None, width):
                settings.report(part + key, f"is {found:,}, expected {width:,}; {ADVICE}")


def _proportion(settings: Settings) -> float:
    """The part of a head that is rotated: where factors of frequencies are 1, not immense."""
    name = "rope_freqs.weight"
    if not settings.has(name):
        return 1.0
    factors = settings.read_small(name).reshape(-1)
    return float((factors == 1).mean())


def configure_falcon(config: dict[str, Any], settings: Settings) -> None:
    is_new = settings.has("blk.0.attn_norm_2.weight")
    heads = config["num_key_value_heads"]
    key = f"{settings.prefix}tensor_data_layout"
    rows = settings.metadata.word(key, _FALCON_ROWS)
    if rows != _FALCON_ROWS:
        settings.metadata.report(key, f"is {format_value(rows)}, known is {_FALCON_ROWS}")
    rename(
        config,
        layer_norm_epsilon="layer_norm_eps",
        num_kv_heads="num_key_value_heads",
        ffn_hidden_size="intermediate_size",
    )
    config |= {
        "new_decoder_architecture": is_new,
        "multi_query": not is_new and heads == 1,
        "parallel_attn": True,
        "alibi": False,
        "bias": settings.has("blk.0.attn_qkv.bias"),
    }


def configure_stablelm(config: dict[str, Any], settings: Settings) -> None:
    parallel = settings.flag("use_parallel_residual")
    config |= {
        "hidden_act": "silu",
        "use_qkv_bias": settings.has("blk.0.attn_q.bias"),
        "use_parallel_residual": not settings.has("blk.0.ffn_norm.weight"),
        "qk_layernorm": settings.has("blk.0.attn_q_norm.weight"),
    }
    config.setdefault("partial_rotary_factor", 1.0)
    if parallel is not None and parallel != config["use_parallel_residual"]:
        without = "no ffn_norm" if config["use_parallel_residual"] else "an ffn_norm"
        message = f"is {str(parallel).lower()}, but blocks have {without}; {ADVICE}"
        settings.report("use_parallel_residual", message)


def configure_minimax_2(config: dict[str, Any], settings: Settings) -> None:
    config |= {
        "hidden_act": "silu",
        "intermediate_size": settings.expert_width() or config["intermediate_size"],
        "num_local_experts": settings.need_int("expert_count"),
        "num_experts_per_tok": settings.need_int("expert_used_count"),
        "shared_intermediate_size": 0,
        "rotary_dim": take_rotary(config, settings),
        "use_qk_norm": settings.has("blk.0.attn_q_norm.weight"),
        "use_routing_bias": settings.has("blk.0.exp_probs_b.bias"),
        "scoring_func": "sigmoid",
    }


def configure_granite_moe(config: dict[str, Any], settings: Settings) -> None:
    from_granite(config, settings)
    config |= {
        "num_local_experts": settings.need_int("expert_count"),
        "num_experts_per_tok": settings.need_int("expert_used_count"),
        "intermediate_size": settings.expert_width() or config["intermediate_size"],
    }


def from_granite(config: dict[str, Any], settings: Settings) -> None:
    """The four factors of Granite's models."""
    config |= {
        "hidden_act": "silu",
        "attention_bias": settings.has("blk.0.attn_q.bias"),
        "attention_multiplier": settings.find_float("attention.scale")
        or float(config["head_dim"] ** -0.5),
        "embedding_multiplier": settings.find_float("embedding_scale") or 1.0,
        "residual_multiplier": settings.find_float("residual_scale") or 1.0,
        "logits_scaling": settings.find_float("logit_scale") or 1.0,
    }
