"""Small configurations, one a model type of mlx-lm: sizes that fit 2 layers into a megabyte or so.

``COMMON`` holds settings that mean the same in most families; a family takes those that its
argument class has, and then its own. Nested text models name the family of their text part.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from typing import Any

COMMON: dict[str, Any] = {
    "attention_bias": False,
    "attention_multiplier": 1.0,
    "conv_kernel": 4,
    "decoder_sparse_step": 1,
    "embedding_multiplier": 1.0,
    "first_k_dense_replace": 1,
    "full_attention_interval": 2,
    "head_dim": 32,
    "hidden_size": 128,
    "index_head_dim": 32,
    "index_n_heads": 4,
    "index_topk": 32,
    "intermediate_size": 128,
    "kv_lora_rank": 32,
    "layer_norm_eps": 1e-5,
    "layer_norm_epsilon": 1e-5,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_value_head_dim": 32,
    "logits_scaling": 1.0,
    "max_position_embeddings": 512,
    "mlp_bias": False,
    "mlp_only_layers": [],
    "moe_intermediate_size": 64,
    "n_embd": 128,
    "n_group": 1,
    "n_head": 4,
    "n_inner": 256,
    "n_layer": 2,
    "n_positions": 512,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "norm_eps": 1e-5,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "num_layers": 2,
    "num_local_experts": 4,
    "num_shared_experts": 1,
    "partial_rotary_factor": 0.5,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "residual_multiplier": 1.0,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 1000.0,
    "routed_scaling_factor": 1.0,
    "shared_expert_intermediate_size": 64,
    "sliding_window": 32,
    "state_size": 16,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "use_bias": False,
    "use_qk_norm": True,
    "v_head_dim": 32,
    "vocab_size": 256,
}

_YARN = {
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 40,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096,
    "type": "yarn",
}
_BOTH = ["sliding_attention", "full_attention"]
_ROPE = {"rope_theta": 1000.0, "rope_type": "default"}
_LINEAR_ATTENTION = {"num_heads": 4, "head_dim": 32, "kda_layers": [1], "short_conv_kernel_size": 4}

OWN: dict[str, dict[str, Any]] = {
    "afm7": {"hidden_dim": 128, "num_kv_reuse_layers": 2, "num_heads": 4, "num_kv_heads": 2}
    | {"num_layers": 4},
    "afmoe": {"layer_types": _BOTH},
    "apertus": {"post_norm": True, "qk_norm": True},
    "baichuan_m1": {"sliding_window_layers": [0], "conv_window": 2},
    "bailing_hybrid": {"layer_group_size": 2, "group_norm_size": 1},
    "bailing_moe": {},
    "bailing_moe_linear": {"layer_group_size": 2, "group_norm_size": 1},
    "bailing_moe_v3": {"layer_group_size": 2},
    "dbrx": {
        "d_model": 128,
        "ffn_config": {"ffn_hidden_size": 128, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": True, "rope_theta": 10000},
        "n_layers": 2,
        "n_heads": 4,
    },
    "deepseek_v2": {"rope_scaling": _YARN, "topk_method": "greedy"},
    "deepseek_v41": {"o_groups": 2, "o_lora_rank": 32, "compress_ratios": [0, 0]},
    "ernie4_5_moe": {"moe_num_experts": 4},
    "exaone4": {"sliding_window_pattern": "LG"},
    "exaone_moe": {"layer_types": _BOTH, "is_moe_layer": [False, True]},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16},
    "gear": {"layer_types": _BOTH},
    "gemma3": {"text_config": {"of": "gemma3_text"}},
    "gemma3n": {
        "text_config": {
            "of": "",
            "model_type": "gemma3n",
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": 256,
            "rope_local_base_freq": 1.0,
            "final_logit_softcapping": 1.0,
            "layer_types": _BOTH * 2,
            "activation_sparsity_pattern": [0.5] * 4,
            "hidden_size_per_layer_input": 64,
            "altup_num_inputs": 4,
            "altup_coef_clip": 1.0,
            "altup_correct_scale": True,
            "altup_active_idx": 0,
            "laurel_rank": 8,
        }
    },
    "gemma4": {"text_config": {"of": "gemma4_text"}},
    "gemma4_text": {
        "global_head_dim": 64,
        "vocab_size_per_layer_input": 256,
        "num_kv_shared_layers": 2,
        "num_hidden_layers": 4,
        "hidden_size_per_layer_input": 32,
        "layer_types": _BOTH * 2,
        "enable_moe_block": True,
        "top_k_experts": 2,
    },
    "glm_moe_dsa": {
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "moe_layer_freq": 1,
        "rope_parameters": _ROPE,
    },
    "gpt2": {"n_ctx": 512},
    "gpt_neox": {"rotary_emb_base": 10000, "rotary_pct": 0.25},
    "gpt_oss": {"layer_types": _BOTH},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"],
        "shared_intermediate_size": 128,
        "mamba_n_heads": 4,
        "mamba_d_head": 64,
        "mamba_d_state": 16,
        "mamba_d_conv": 4,
        "mamba_n_groups": 1,
        "mamba_proj_bias": False,
        "mamba_conv_bias": True,
        "position_embedding_type": "rope",
    },
    "hunyuan": {
        "moe_topk": 2,
        "num_experts": 4,
        "num_shared_expert": 1,
        "use_mixed_mlp_moe": True,
        "use_cla": True,
        "cla_share_factor": 2,
        "rope_scaling": {"alpha": 1000.0, "factor": 1.0, "type": "dynamic"},
    },
    "hunyuan_v1_dense": {
        "rope_scaling": {
            "alpha": 1000.0,
            "factor": 1.0,
            "type": "dynamic",
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 0.0,
            "original_max_position_embeddings": 8192,
        }
    },
    "iquestloopcoder": {"loop_num": 2, "loop_window_size": 32},
    "jamba": {
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
        "mamba_d_conv": 4,
        "mamba_d_state": 16,
        "mamba_expand": 2,
    },
    "kimi_k25": {"text_config": {"of": "deepseek_v3"}},
    "kimi_k3": {
        "text_config": {
            "of": "",
            "linear_attn_config": _LINEAR_ATTENTION | {"full_attn_layers": [2]},
            "attn_res_block_size": 2,
            "num_experts_per_token": 2,
            "routed_expert_hidden_size": 64,
        }
    },
    "kimi_linear": {"linear_attn_config": _LINEAR_ATTENTION, "model_max_length": 512},
    "kimi_vl": {"text_config": {"of": "deepseek_v3"}},
    "laguna": {
        "layer_types": _BOTH,
        "mlp_layer_types": ["dense", "sparse"],
        "rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE},
    },
    "lfm2": {
        "conv_bias": True,
        "conv_L_cache": 3,
        "block_dim": 128,
        "block_ff_dim": 192,
        "block_multiple_of": 64,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": True,
        "full_attn_idxs": [0],
    },
    "lfm2-vl": {"text_config": {"of": "lfm2"}},
    "lfm2_moe": {
        "use_expert_bias": True,
        "num_dense_layers": 1,
        "conv_bias": True,
        "conv_L_cache": 3,
        "full_attn_idxs": [0],
    },
    "lille-130m": {"block_size": 128, "n_kv_heads": 4},
    "llama4": {
        "text_config": {
            "of": "",
            "model_type": "llama4",
            "attention_chunk_size": 8,
            "interleave_moe_layer_step": 2,
            "intermediate_size_mlp": 128,
            "use_qk_norm": True,
            "num_experts_per_tok": 1,
            "rope_scaling": None,
        }
    },
    "llama4_text": {"intermediate_size_mlp": 128, "no_rope_layers": [0, 1], "use_qk_norm": True},
    "longcat_flash": {
        "attention_method": "MLA",
        "zero_expert_type": "identity",
        "ffn_hidden_size": 128,
        "moe_topk": 2,
        "expert_ffn_hidden_size": 64,
        "zero_expert_num": 2,
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
    },
    "longcat_flash_ngram": {
        "ffn_hidden_size": 128,
        "moe_topk": 2,
        "expert_ffn_hidden_size": 64,
        "zero_expert_num": 2,
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
        "ngram_vocab_size_ratio": 2,
        "emb_neighbor_num": 2,
        "emb_split_num": 2,
    },
    "mamba": {"use_conv_bias": True, "time_step_rank": 16},
    "mamba2": {
        "num_heads": 8,
        "head_dim": 32,
        "n_groups": 1,
        "use_conv_bias": True,
        "chunk_size": 32,
        "time_step_limit": [0.01, 10.0],
        "time_step_rank": "auto",
    },
    "mellum": {
        "layer_types": _BOTH,
        "rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE},
    },
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [0, 1],
        "moe_layer_freq": [0, 1],
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "sliding_window_size": 32,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "layernorm_epsilon": 1e-5,
        "swa_rope_theta": 1000.0,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 32,
        "swa_v_head_dim": 32,
    },
    "minicpm": {"dim_model_base": 128, "scale_depth": 1.0, "scale_emb": 1.0},
    "minicpm3": {"dim_model_base": 128, "scale_depth": 1.0, "scale_emb": 1.0}
    | {"rope_scaling": {"type": "longrope", "original_max_position_embeddings": 512}}
    | {
        "rope_scaling": {"short_factor": [1.0] * 8, "long_factor": [1.0] * 8}
        | {"original_max_position_embeddings": 512, "type": "longrope"}
    },
    "minimax": {"shared_intermediate_size": 128, "rotary_dim": 16},
    "minimax_m3_vl": {
        "text_config": {
            "of": "",
            "dense_intermediate_size": 128,
            "shared_intermediate_size": 64,
            "moe_layer_freq": [0, 1],
            "sparse_attention_config": None,
        }
    },
    "ministral3": {
        "rope_parameters": _ROPE
        | {"original_max_position_embeddings": 512}
        | {"llama_4_scaling_beta": 0.1},
        "layer_types": _BOTH,
    },
    "mistral3": {"text_config": {"of": "llama"}},
    "muse_glimmer": {"layer_types": _BOTH},
    "muse_spark": {
        "text_config": {
            "of": "",
            "post_norm_eps": 1e-5,
            "rope_parameters": _ROPE,
            "layer_rope_theta": [1000.0, 0],
            "layer_types": _BOTH,
            "final_logit_softcapping": 20.0,
            "output_multiplier": 1.0,
            "moe_hidden_size": 64,
            "num_shared_experts": 0,
            "mlp_layer_types": ["sparse", "sparse"],
        }
    },
    "nemotron": {"hidden_act": "relu2"},
    "nemotron-nas": {
        "block_configs": [
            {
                "attention": {"n_heads_in_group": 2, "no_op": False, "replace_with_linear": False},
                "ffn": {"ffn_mult": 1.3125, "no_op": False, "replace_with_linear": False},
            }
        ]
        * 2
    },
    "nemotron_h": {
        "mamba_num_heads": 4,
        "mamba_head_dim": 32,
        "mamba_proj_bias": False,
        "ssm_state_size": 16,
        "n_groups": 2,
        "use_conv_bias": True,
        "time_step_limit": [1.0, 2.0],
        "num_hidden_layers": 4,
        "hybrid_override_pattern": ["*", "M", "-", "E"],
        "moe_shared_expert_intermediate_size": 64,
    },
    "olmo3": {"num_heads": 4, "layer_types": _BOTH},
    "olmo_hybrid": {
        "linear_allow_neg_eigval": True,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "openelm": {
        "num_transformer_layers": 2,
        "model_dim": 128,
        "ffn_dim_divisor": 64,
        "num_query_heads": [4, 4],
        "num_kv_heads": [2, 2],
        "ffn_multipliers": [1.0, 2.0],
    },
    "phi3small": {
        "dense_attention_every_n_layers": 2,
        "ff_intermediate_size": 256,
        "gegelu_limit": 1.0,
    },
    "phimoe": {
        "rope_scaling": {
            "long_factor": [1.0] * 16,
            "long_mscale": 1.2,
            "original_max_position_embeddings": 4096,
            "short_factor": [1.0] * 16,
            "short_mscale": 1.2,
            "type": "longrope",
        }
    },
    "phixtral": {"num_vocab": 256, "model_dim": 128, "num_heads": 4, "rotary_dim": 16},
    "pixtral": {"text_config": {"of": "llama"}},
    "plamo": {"n_shared_head": 2},
    "plamo2": {"hidden_size_per_head": 32, "mamba_d_state": 16, "mamba_num_heads": 4},
    "prism_hadamard_qwen35": {"text_config": {"of": "qwen3_5"}},
    "qwen": {"kv_channels": 32},
    "qwen2_vl": {"text_config": {"of": "qwen2"}},
    "qwen3_5": {"text_config": {"of": "", "model_type": "qwen3_5_text", "num_experts": 0}},
    "qwen3_5_moe": {"text_config": {"of": "", "model_type": "qwen3_5_moe_text"}},
    "qwen3_vl": {"text_config": {"of": "qwen3"}},
    "qwen3_vl_moe": {"text_config": {"of": "qwen3_moe"}},
    "recurrent_gemma": {
        "conv1d_width": 3,
        "logits_soft_cap": 1.0,
        "attention_window_size": 64,
        "block_types": ["recurrent", "attention"],
    },
    "rwkv7": {
        "a_low_rank_dim": 16,
        "v_low_rank_dim": 16,
        "gate_low_rank_dim": 16,
        "decay_low_rank_dim": 64,
    },
    "spark2_5": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}}
    | {"layer_types": _BOTH},
    "stablelm": {"use_qkv_bias": True},
    "step3p5": {
        "num_attention_groups": 2,
        "moe_num_experts": 4,
        "moe_top_k": 2,
        "share_expert_dim": 64,
        "layer_types": _BOTH,
        "moe_layers_enum": "1",
    },
    "mistral4": {
        "rope_parameters": _ROPE
        | {"original_max_position_embeddings": 512}
        | {"llama_4_scaling_beta": 0.1}
    },
}

# Modules of mlx_lm.models that hold parts of models.
_PARTS = {
    "activations",
    "base",
    "bitlinear_layers",
    "cache",
    "gated_delta",
    "mla",
    "pipeline",
    "rope_utils",
    "ssm",
    "switch_layers",
}


def model_types() -> list[str]:
    """Every model type that the installed mlx-lm has a module for."""
    import mlx_lm.models

    found = (module.name for module in pkgutil.iter_modules(mlx_lm.models.__path__))
    return [name for name in found if name not in _PARTS]


def small_config(model_type: str) -> dict[str, Any]:
    """A ``config.json`` for a small model of ``model_type``."""
    arguments = importlib.import_module(f"mlx_lm.models.{model_type}").ModelArgs
    fields = inspect.signature(arguments).parameters
    config = {name: value for name, value in COMMON.items() if name in fields}
    config |= OWN.get(model_type, {})
    if "text_config" in config:
        text = dict(config["text_config"])
        of = text.pop("of")
        config["text_config"] = (small_config(of) if of else dict(COMMON)) | text
    return config | {"model_type": model_type}
