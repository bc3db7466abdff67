"""``config.json`` of architectures with recurrent blocks: Qwen 3.5, LFM 2, Mamba and others.

The facts are those of llama.cpp's converter and readers (ggml-org/llama.cpp conversion/,
src/models/), in the terms of transformers' config classes.
"""

from __future__ import annotations

from typing import Any

from requant.gguf.later_config import from_granite, rename
from requant.gguf.settings import ADVICE, Settings

_QWEN_INTERVAL = 4
_MIXER_EPSILON = 1e-6  # of Falcon Mamba; files do not say it
# Of a step of time: no number is beyond it, and JSON has no infinity.
_NO_LIMIT = [0.0, 3.4028234663852886e38]


def _kinds(config: dict[str, Any], settings: Settings, without: str, with_: str) -> list[str]:
    """The kind of each block, by whether it has heads of keys."""
    blocks = config["num_hidden_layers"]
    heads = settings.layer_ints("attention.head_count_kv", blocks) or [1] * blocks
    return [with_ if count else without for count in heads]


def configure_qwen_35(config: dict[str, Any], settings: Settings) -> None:
    """Three blocks of linear attention, then one of attention with a gate."""
    blocks = config["num_hidden_layers"]
    keys = settings.need_int("ssm.group_count")
    values = settings.need_int("ssm.time_step_rank")
    rotary = settings.find_int("rope.dimension_count") or config["head_dim"]
    interval = settings.find_int("full_attention_interval") or _QWEN_INTERVAL
    linear = [(block + 1) % interval != 0 for block in range(blocks)]
    key = f"{settings.prefix}attention.recurrent_layers"
    declared = settings.metadata.flags(key)
    if declared is not None and declared[:blocks] != linear:
        message = f"is not every block but each {interval}th, as mlx-lm's class has it; {ADVICE}"
        settings.metadata.report(key, message)
    sections = settings.metadata.numbers(f"{settings.prefix}rope.dimension_sections")
    rope: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": config.pop("rope_theta"),
        "partial_rotary_factor": rotary / config["head_dim"],
    }
    if sections is not None:
        rope |= {"mrope_section": [int(x) for x in sections[:3]], "mrope_interleaved": True}
    config |= {
        "hidden_act": "silu",
        "attention_bias": False,
        "attn_output_gate": True,
        "linear_num_key_heads": keys,
        "linear_num_value_heads": values,
        "linear_key_head_dim": settings.need_int("ssm.state_size"),
        "linear_value_head_dim": settings.need_int("ssm.inner_size") // values,
        "linear_conv_kernel_dim": settings.need_int("ssm.conv_kernel"),
        "full_attention_interval": interval,
        "layer_types": ["linear_attention" if yes else "full_attention" for yes in linear],
        "rope_parameters": rope,
    }


def configure_qwen_35_moe(config: dict[str, Any], settings: Settings) -> None:
    configure_qwen_35(config, settings)
    config |= {
        "num_experts": settings.need_int("expert_count"),
        "num_experts_per_tok": settings.need_int("expert_used_count"),
        "moe_intermediate_size": settings.expert_width(),
        "shared_expert_intermediate_size": settings.width("ffn_up_shexp.weight") or 0,
        "norm_topk_prob": True,
    }


def configure_lfm2(config: dict[str, Any], settings: Settings) -> None:
    """Short convolutions, and attention in the blocks that have heads of keys."""
    rename(config, norm_eps="rms_norm_eps")
    config |= {
        "layer_types": _kinds(config, settings, "conv", "full_attention"),
        "conv_L_cache": settings.need_int("shortconv.l_cache"),
        "conv_bias": settings.any_block_has("shortconv.conv.bias"),
        "block_dim": config["hidden_size"],
        "block_ff_dim": config["intermediate_size"],
        "block_auto_adjust_ff_dim": False,  # the file has the width itself
        "block_multiple_of": 256,
        "block_ffn_dim_multiplier": 1.0,
    }


def configure_lfm2_moe(config: dict[str, Any], settings: Settings) -> None:
    rename(config, norm_eps="rms_norm_eps")
    config |= {
        "layer_types": _kinds(config, settings, "conv", "full_attention"),
        "conv_L_cache": settings.need_int("shortconv.l_cache"),
        "conv_bias": settings.any_block_has("shortconv.conv.bias"),
        "moe_intermediate_size": settings.expert_width(),
        "num_experts": settings.need_int("expert_count"),
        "num_experts_per_tok": settings.need_int("expert_used_count"),
        "num_dense_layers": settings.find_int("leading_dense_block_count") or 0,
        "norm_topk_prob": True,
        "use_expert_bias": settings.any_block_has("exp_probs_b.bias"),
        "routed_scaling_factor": settings.find_float("expert_weights_scale") or 1.0,
    }


def _only_recurrent(config: dict[str, Any], settings: Settings) -> None:
    """A model without attention: nothing of heads and positions."""
    for key in ("num_attention_heads", "num_key_value_heads", "head_dim", "rope_theta"):
        del config[key]
    for key in ("attention.head_count", "feed_forward_length"):
        settings.find_int(key)  # 0, because llama.cpp wants one
    rename(config, layer_norm_epsilon="rms_norm_eps")
    config |= {
        "intermediate_size": settings.need_int("ssm.inner_size"),
        "state_size": settings.need_int("ssm.state_size"),
        "conv_kernel": settings.need_int("ssm.conv_kernel"),
        "use_bias": settings.has("blk.0.ssm_in.bias"),
        "use_conv_bias": settings.has("blk.0.ssm_conv1d.bias"),
        "expand": settings.need_int("ssm.inner_size") // config["hidden_size"],
        "hidden_act": "silu",
    }


def configure_mamba(config: dict[str, Any], settings: Settings) -> None:
    _only_recurrent(config, settings)
    config["time_step_rank"] = settings.need_int("ssm.time_step_rank")
    if settings.flag("ssm.dt_b_c_rms"):
        config |= {"mixer_rms_eps": _MIXER_EPSILON, "use_bcdt_rms": True}


def configure_mamba_2(config: dict[str, Any], settings: Settings) -> None:
    _only_recurrent(config, settings)
    heads = settings.need_int("ssm.time_step_rank")
    config |= {
        "num_heads": heads,
        "head_dim": config["intermediate_size"] // heads,
        "n_groups": settings.need_int("ssm.group_count"),
        "time_step_rank": "auto",
        "time_step_limit": _NO_LIMIT,
    }


def _mamba_settings(config: dict[str, Any], settings: Settings) -> None:
    """Settings of Mamba 2 in a model that has attention too."""
    heads = settings.need_int("ssm.time_step_rank")
    config |= {
        "mamba_n_heads": heads,
        "mamba_d_head": settings.need_int("ssm.inner_size") // heads,
        "mamba_d_state": settings.need_int("ssm.state_size"),
        "mamba_d_conv": settings.need_int("ssm.conv_kernel"),
        "mamba_n_groups": settings.need_int("ssm.group_count"),
        "mamba_conv_bias": settings.any_block_has("ssm_conv1d.bias"),
        "mamba_proj_bias": settings.any_block_has("ssm_in.bias"),
        "mamba_expand": max(settings.need_int("ssm.inner_size") // config["hidden_size"], 1),
    }


_FACTORS = (
    *("attention_in_multiplier", "attention_out_multiplier", "embedding_multiplier"),
    *("key_multiplier", "lm_head_multiplier", "ssm_in_multiplier", "ssm_out_multiplier"),
)


def configure_falcon_h1(config: dict[str, Any], settings: Settings) -> None:
    """Mamba and attention side by side; the converter multiplies the weights with all factors."""
    _mamba_settings(config, settings)
    config |= {
        "hidden_act": "silu",
        "mamba_d_ssm": settings.need_int("ssm.inner_size"),
        "mamba_rms_norm": settings.has("blk.0.ssm_norm.weight"),
        "mamba_norm_before_gate": False,
        "attention_bias": settings.has("blk.0.attn_q.bias"),
        "mlp_bias": settings.has("blk.0.ffn_up.bias"),
        "projectors_bias": settings.has("blk.0.ssm_out.bias"),
        **dict.fromkeys(_FACTORS, 1.0),
        "mlp_multipliers": [1.0] * 2,
        "ssm_multipliers": [1.0] * 5,
    }


def configure_granite_hybrid(config: dict[str, Any], settings: Settings) -> None:
    """Mamba or attention, each with a dense half or with experts and a shared one."""
    from_granite(config, settings)
    _mamba_settings(config, settings)
    positions = settings.flag("rope.scaling.finetuned")
    config |= {
        "layer_types": _kinds(config, settings, "mamba", "attention"),
        "position_embedding_type": "rope" if positions else "nope",
        "shared_intermediate_size": config["intermediate_size"],
        "time_step_limit": _NO_LIMIT,
    }
    experts = settings.find_int("expert_count") or 0
    config |= {
        "num_local_experts": experts,
        "num_experts_per_tok": settings.find_int("expert_used_count") or 0,
    }
    shared = settings.find_int("expert_shared_feed_forward_length")
    if experts:
        stored = settings.width("ffn_up_shexp.weight")
        config["shared_intermediate_size"] = shared or stored or 0
        config["intermediate_size"] = settings.expert_width() or config["intermediate_size"]
    elif shared:  # without experts the shared one is the dense half
        config |= {"intermediate_size": shared, "shared_intermediate_size": shared}


def configure_nemotron_h(config: dict[str, Any], settings: Settings) -> None:
    """A block is Mamba, attention, a dense layer or experts, and nothing else."""
    blocks = config["num_hidden_layers"]
    rename(config, layer_norm_epsilon="rms_norm_eps")
    heads = settings.need_int("ssm.time_step_rank")
    kv_heads = settings.layer_ints("attention.head_count_kv", blocks) or [0] * blocks
    widths = settings.layer_ints("feed_forward_length", blocks) or [0] * blocks
    experts = settings.find_int("expert_count")
    second = "moe" if experts else "mlp"
    config |= {
        "layers_block_type": [
            "attention" if kv else second if width else "mamba"
            for kv, width in zip(kv_heads, widths, strict=True)
        ],
        "mamba_num_heads": heads,
        "mamba_head_dim": settings.need_int("ssm.inner_size") // heads,
        "mamba_proj_bias": settings.any_block_has("ssm_in.bias"),
        "ssm_state_size": settings.need_int("ssm.state_size"),
        "conv_kernel": settings.need_int("ssm.conv_kernel"),
        "n_groups": settings.need_int("ssm.group_count"),
        "attention_bias": settings.any_block_has("attn_q.bias"),
        "mlp_bias": settings.any_block_has("ffn_up.bias"),
        "use_bias": settings.any_block_has("ssm_in.bias"),
        "use_conv_bias": settings.any_block_has("ssm_conv1d.bias"),
        "mlp_hidden_act": "relu2",
        "time_step_limit": _NO_LIMIT,
    }
    del config["rope_theta"]
    settings.find_float("rope.freq_base")
    settings.find_int("rope.dimension_count")
    settings.flag("rope.scaling.finetuned")  # attention knows no positions
    if experts:
        config |= {
            "moe_intermediate_size": settings.expert_width(),
            "n_routed_experts": experts,
            "num_experts_per_tok": settings.need_int("expert_used_count"),
            "n_shared_experts": settings.find_int("expert_shared_count") or 0,
            "moe_shared_expert_intermediate_size": settings.find_int(
                "expert_shared_feed_forward_length"
            ),
            "n_group": settings.find_int("expert_group_count") or 1,
            "topk_group": settings.find_int("expert_group_used_count") or 1,
            "norm_topk_prob": bool(settings.flag("expert_weights_norm")),
            "routed_scaling_factor": settings.find_float("expert_weights_scale") or 1.0,
            "moe_latent_size": settings.find_int("moe_latent_size") or None,
        }
