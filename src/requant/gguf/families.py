"""The table of architectures: what GGUF files call tensors, in Hugging Face's terms."""

from __future__ import annotations

from dataclasses import replace

from requant.gguf.architectures import EACH_ROW, TOP, Architecture, Move
from requant.gguf.encoder_config import (
    configure_bert,
    configure_jina,
    configure_nomic,
    configure_t5_encoder,
)
from requant.gguf.hybrid_config import (
    configure_falcon_h1,
    configure_granite_hybrid,
    configure_lfm2,
    configure_lfm2_moe,
    configure_mamba,
    configure_mamba_2,
    configure_nemotron_h,
    configure_qwen_35,
    configure_qwen_35_moe,
)
from requant.gguf.later_config import (
    configure_deepseek_2,
    configure_deepseek_3,
    configure_falcon,
    configure_gemma_4,
    configure_glm_4,
    configure_glm_4_moe,
    configure_granite_moe,
    configure_minimax_2,
    configure_stablelm,
)
from requant.gguf.metadata import Metadata
from requant.gguf.model_config import (
    configure_gemma,
    configure_gemma_2,
    configure_gemma_3,
    configure_gpt_oss,
    configure_granite,
    configure_llama,
    configure_ministral_3,
    configure_mixtral,
    configure_olmo_3,
    configure_phi_3,
    configure_qwen,
    configure_qwen_moe,
    configure_seed_oss,
    configure_smollm_3,
)
from requant.gguf.settings import ALL_SCALINGS, Support

_ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
}
_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_LLAMA = {**_ATTENTION, **_MLP}
_MIXTRAL = {
    **_ATTENTION,
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.switch_mlp.gate_proj",
    "ffn_up_exps": "block_sparse_moe.switch_mlp.up_proj",
    "ffn_down_exps": "block_sparse_moe.switch_mlp.down_proj",
}
_QWEN_MOE = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.switch_mlp.gate_proj",
    "ffn_up_exps": "mlp.switch_mlp.up_proj",
    "ffn_down_exps": "mlp.switch_mlp.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
_GEMMA_2 = {
    **_LLAMA,
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_SEED_OSS = {**_LLAMA, "post_attention_norm": "post_attention_layernorm"}
_PHI_3 = {
    **_ATTENTION,
    "attn_qkv": "self_attn.qkv_proj",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}
_GPT_OSS = {  # experts as mlx-lm names them: Hugging Face interleaves gate and up
    **_ATTENTION,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_gate_inp": "mlp.router",
    "ffn_gate_exps": "mlp.experts.gate_proj",
    "ffn_up_exps": "mlp.experts.up_proj",
    "ffn_down_exps": "mlp.experts.down_proj",
}
_OLMO_2 = {  # norms behind the two halves of a block, none before
    **_LLAMA,
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_NEXT_NORM = {"post_attention_norm": "post_attention_layernorm"}  # before the second half
_SHARED = {
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
}
_EXPERTS = {role: path for role, path in _QWEN_MOE.items() if "shexp" not in role}
_CORRECTION = {"exp_probs_b.bias": "mlp.gate.e_score_correction_bias"}
_DEEPSEEK = {  # compressed keys and values
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
    "attn_output": "self_attn.o_proj",
    **_MLP,
    **_EXPERTS,
    **_SHARED,
}
# The two halves of kv_b_proj as mlx-lm's class has them.
_DEEPSEEK_3 = {
    **_DEEPSEEK,
    "attn_k_b": "self_attn.embed_q",
    "attn_v_b": "self_attn.unembed_out",
}
_DEEPSEEK_2 = {
    **_DEEPSEEK,
    "attn_k_b": "self_attn.k_b_proj",
    "attn_v_b": "self_attn.v_b_proj",
}
_GLM_4 = {
    **_ATTENTION,
    "post_attention_norm": "post_self_attn_layernorm",
    "post_ffw_norm": "post_mlp_layernorm",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}
_QWEN_35 = {
    **_LLAMA,
    **_NEXT_NORM,
    "attn_qkv": "linear_attn.in_proj_qkv",
    "attn_gate": "linear_attn.in_proj_z",
    "ssm_alpha": "linear_attn.in_proj_a",
    "ssm_beta": "linear_attn.in_proj_b",
    "ssm_conv1d": "linear_attn.conv1d",
    "ssm_norm": "linear_attn.norm",
    "ssm_out": "linear_attn.out_proj",
}
_QWEN_35_WHOLE = {"ssm_a": "linear_attn.A_log", "ssm_dt.bias": "linear_attn.dt_bias"}
_QWEN_35_MOVES = {
    **dict.fromkeys(
        ("attn_qkv", "attn_gate", "ssm_alpha", "ssm_beta", "ssm_dt"), (Move.VALUE_HEADS,)
    ),
    "ssm_a": (Move.VALUE_HEADS, Move.EXPONENTIAL),
    "ssm_conv1d": (Move.VALUE_HEADS, Move.CHANNELS),
    "ssm_out": (Move.VALUE_COLUMNS,),
    "ffn_gate_inp_shexp": (Move.ROW,),
}
_GEMMA_4 = {
    **_GEMMA_2,
    "pre_ffw_norm_2": "pre_feedforward_layernorm_2",
    "post_ffw_norm_1": "post_feedforward_layernorm_1",
    "post_ffw_norm_2": "post_feedforward_layernorm_2",
    "ffn_gate_inp": "router.proj",
    "ffn_gate_exps": "experts.switch_glu.gate_proj",
    "ffn_up_exps": "experts.switch_glu.up_proj",
    "ffn_down_exps": "experts.switch_glu.down_proj",
    "inp_gate": "per_layer_input_gate",
    "proj": "per_layer_projection",
    "post_norm": "post_per_layer_input_norm",
}
_GEMMA_4_WHOLE = {
    "ffn_gate_inp.scale": "router.scale",
    "ffn_down_exps.scale": "router.per_expert_scale",
    "layer_output_scale.weight": "layer_scalar",
}
_GEMMA_4_TOP = {
    **TOP,
    "per_layer_token_embd": "model.embed_tokens_per_layer",
    "per_layer_model_proj": "model.per_layer_model_projection",
    "per_layer_proj_norm": "model.per_layer_projection_norm",
}
_LFM_2 = {
    "attn_norm": "operator_norm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.out_proj",
    "attn_q_norm": "self_attn.q_layernorm",
    "attn_k_norm": "self_attn.k_layernorm",
    "shortconv.conv": "conv.conv",
    "shortconv.in_proj": "conv.in_proj",
    "shortconv.out_proj": "conv.out_proj",
    "ffn_norm": "ffn_norm",
}
_LFM_2_DENSE = {
    "ffn_gate": "feed_forward.w1",
    "ffn_down": "feed_forward.w2",
    "ffn_up": "feed_forward.w3",
}
_LFM_2_MOE = {
    "ffn_gate": "feed_forward.w1",
    "ffn_down": "feed_forward.w2",
    "ffn_up": "feed_forward.w3",
    "ffn_gate_inp": "feed_forward.gate",
    "ffn_gate_exps": "feed_forward.switch_mlp.gate_proj",
    "ffn_up_exps": "feed_forward.switch_mlp.up_proj",
    "ffn_down_exps": "feed_forward.switch_mlp.down_proj",
}
_LFM_2_TOP = {
    "token_embd": "model.embed_tokens",
    "token_embd_norm": "model.embedding_norm",
    "output_norm": "model.embedding_norm",
    "output": "lm_head",
}
_LFM_2_MOVES = {"shortconv.conv": (Move.CHANNELS,)}
_FALCON = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "self_attention.query_key_value",
    "attn_output": "self_attention.dense",
    "ffn_up": "mlp.dense_h_to_4h",
    "ffn_down": "mlp.dense_4h_to_h",
}
_FALCON_TOP = {
    "token_embd": "transformer.word_embeddings",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
}
_STABLELM = {
    **_LLAMA,
    "attn_q_norm": f"self_attn.q_layernorm.norms.{EACH_ROW}",
    "attn_k_norm": f"self_attn.k_layernorm.norms.{EACH_ROW}",
}
_MIXER = {
    "attn_norm": "norm",
    "ssm_in": "mixer.in_proj",
    "ssm_conv1d": "mixer.conv1d",
    "ssm_x": "mixer.x_proj",
    "ssm_norm": "mixer.norm",
    "ssm_out": "mixer.out_proj",
}
_MAMBA = {**_MIXER, "ssm_dt": "mixer.dt_proj"}
_MAMBA_WHOLE = {"ssm_a": "mixer.A_log", "ssm_d": "mixer.D"}
_MAMBA_2_WHOLE = {**_MAMBA_WHOLE, "ssm_dt.bias": "mixer.dt_bias"}
_MAMBA_MOVES = {"ssm_conv1d": (Move.CHANNELS,), "ssm_a": (Move.EXPONENTIAL,)}
_MAMBA_2_MOVES = {
    "ssm_conv1d": (Move.CHANNELS,),
    "ssm_a": (Move.FLAT, Move.EXPONENTIAL),
    "ssm_d": (Move.FLAT,),
    "ssm_norm": (Move.FLAT,),
}
_MAMBA_TOP = {
    "token_embd": "backbone.embeddings",
    "output_norm": "backbone.norm_f",
    "output": "lm_head",
}
_PARALLEL = {role: path.replace("mixer.", "mamba.") for role, path in _MIXER.items()}
_PARALLEL_WHOLE = {name: path.replace("mixer.", "mamba.") for name, path in _MAMBA_2_WHOLE.items()}
_FALCON_H1 = {
    **_ATTENTION,
    **{role: path for role, path in _PARALLEL.items() if role != "attn_norm"},
    "ffn_norm": "pre_ff_layernorm",
    "ffn_gate": "feed_forward.gate_proj",
    "ffn_up": "feed_forward.up_proj",
    "ffn_down": "feed_forward.down_proj",
}
_GRANITE_MOE = {
    **_ATTENTION,
    "ffn_gate_inp": "block_sparse_moe.router.layer",
    "ffn_gate_exps": "block_sparse_moe.switch_mlp.gate_proj",
    "ffn_up_exps": "block_sparse_moe.switch_mlp.up_proj",
    "ffn_down_exps": "block_sparse_moe.switch_mlp.down_proj",
}
_GRANITE_HYBRID = {
    **_GRANITE_MOE,
    **_MLP,
    **{role: path for role, path in _PARALLEL.items() if role != "attn_norm"},
    "ffn_gate_up_shexp": "shared_mlp.input_linear",
    "ffn_down_shexp": "shared_mlp.output_linear",
}
_GRANITE_JOINED = {"ffn_gate_up_shexp": ("ffn_gate_shexp", "ffn_up_shexp")}
_NEMOTRON_H = {
    **_MIXER,
    "attn_q": "mixer.q_proj",
    "attn_k": "mixer.k_proj",
    "attn_v": "mixer.v_proj",
    "attn_output": "mixer.o_proj",
    "ffn_up": "mixer.up_proj",
    "ffn_down": "mixer.down_proj",
    "ffn_gate_inp": "mixer.gate",
    "ffn_up_exps": "mixer.switch_mlp.fc1",
    "ffn_down_exps": "mixer.switch_mlp.fc2",
    "ffn_up_shexp": "mixer.shared_experts.up_proj",
    "ffn_down_shexp": "mixer.shared_experts.down_proj",
    "ffn_latent_down": "mixer.fc1_latent_proj",
    "ffn_latent_up": "mixer.fc2_latent_proj",
}
_NEMOTRON_WHOLE = {
    **_MAMBA_2_WHOLE,
    "exp_probs_b.bias": "mixer.gate.e_score_correction_bias",
}
_BERT = {
    "attn_q": "attention.self.query",
    "attn_k": "attention.self.key",
    "attn_v": "attention.self.value",
    "attn_output": "attention.output.dense",
    "attn_output_norm": "attention.output.LayerNorm",
    "ffn_up": "intermediate.dense",
    "ffn_down": "output.dense",
    "layer_output_norm": "output.LayerNorm",
}
_BERT_TOP = {
    "token_embd": "embeddings.word_embeddings",
    "position_embd": "embeddings.position_embeddings",
    "token_types": "embeddings.token_type_embeddings",
    "token_embd_norm": "embeddings.LayerNorm",
}
_JINA = {
    **_BERT,
    "ffn_up": "mlp.gated_layers",
    "ffn_down": "mlp.wo",
    "layer_output_norm": "mlp.layernorm",
}
_NOMIC = {
    "attn_qkv": "attn.Wqkv",
    "attn_output": "attn.out_proj",
    "attn_output_norm": "norm1",
    "ffn_up": "mlp.fc11",
    "ffn_gate": "mlp.fc12",
    "ffn_down": "mlp.fc2",
    "layer_output_norm": "norm2",
}
_NOMIC_TOP = {
    "token_embd": "embeddings.word_embeddings",
    "token_types": "embeddings.token_type_embeddings",
    "token_embd_norm": "emb_ln",
}
_T5 = {
    "attn_norm": "layer.0.layer_norm",
    "attn_q": "layer.0.SelfAttention.q",
    "attn_k": "layer.0.SelfAttention.k",
    "attn_v": "layer.0.SelfAttention.v",
    "attn_o": "layer.0.SelfAttention.o",
    "attn_rel_b": "layer.0.SelfAttention.relative_attention_bias",
    "ffn_norm": "layer.1.layer_norm",
    "ffn_gate": "layer.1.DenseReluDense.wi_0",
    "ffn_up": "layer.1.DenseReluDense.wi_1",
    "ffn_down": "layer.1.DenseReluDense.wo",
}
_T5_TOP = {"token_embd": "shared", "enc.output_norm": "encoder.final_layer_norm"}
_SINKS = {"attn_sinks.weight": "self_attn.sinks"}
_GATE_ROW = {"ffn_gate_inp_shexp": (Move.ROW,)}

_BY_HIDDEN = Support(head_dim=False)
_UNSCALED = Support(frozenset())
_UNSCALED_BY_HIDDEN = Support(frozenset(), head_dim=False)
_LONGROPE_BY_HIDDEN = Support(frozenset({"longrope"}), head_dim=False, partial_rotary=True)
_NO_LONGROPE = Support(ALL_SCALINGS - {"longrope"})
_FAMILIES = {
    "llama": Architecture("llama", "LlamaForCausalLM", _LLAMA, configure_llama, permuted=True),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", _LLAMA, configure_qwen, _BY_HIDDEN),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", _LLAMA, configure_qwen),
    "qwen2moe": Architecture(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        {**_ATTENTION, **_QWEN_MOE},
        configure_qwen_moe,
        _UNSCALED_BY_HIDDEN,
        moves=_GATE_ROW,
    ),
    "qwen3moe": Architecture(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        {**_LLAMA, **_QWEN_MOE},
        configure_qwen_moe,
        _UNSCALED,
        moves=_GATE_ROW,
    ),
    "gemma": Architecture(
        "gemma",
        "GemmaForCausalLM",
        _LLAMA,
        configure_gemma,
        _UNSCALED,
        shifted_norms=True,
        wide=True,
    ),
    "gemma2": Architecture(
        "gemma2",
        "Gemma2ForCausalLM",
        _GEMMA_2,
        configure_gemma_2,
        _UNSCALED,
        shifted_norms=True,
        wide=True,
    ),
    "gemma3": Architecture(
        "gemma3_text",
        "Gemma3ForCausalLM",
        _GEMMA_2,
        configure_gemma_3,
        shifted_norms=True,
        wide=True,
    ),
    "phi3": Architecture("phi3", "Phi3ForCausalLM", _PHI_3, configure_phi_3, _LONGROPE_BY_HIDDEN),
    "smollm3": Architecture(
        "smollm3", "SmolLM3ForCausalLM", _LLAMA, configure_smollm_3, permuted=True
    ),
    "granite": Architecture(
        "granite", "GraniteForCausalLM", _LLAMA, configure_granite, _BY_HIDDEN, permuted=True
    ),
    "seed_oss": Architecture("seed_oss", "SeedOssForCausalLM", _SEED_OSS, configure_seed_oss),
    "olmo2": Architecture("olmo2", "Olmo2ForCausalLM", _OLMO_2, configure_llama),
    "gpt-oss": Architecture(
        "gpt_oss",
        "GptOssForCausalLM",
        _GPT_OSS,
        configure_gpt_oss,
        _NO_LONGROPE,
        wide=True,
        whole=_SINKS,
    ),
}
_MINISTRAL_FAMILY = Architecture(
    "ministral3", "Ministral3ForCausalLM", _LLAMA, configure_ministral_3, permuted=True
)
_MIXTRAL_FAMILY = Architecture(
    "mixtral", "MixtralForCausalLM", _MIXTRAL, configure_mixtral, _UNSCALED_BY_HIDDEN, permuted=True
)
_OLMO_3_FAMILY = Architecture("olmo3", "Olmo3ForCausalLM", _OLMO_2, configure_olmo_3)
# The language parts of models that see: of text alone, their positions are those of the others.
_FAMILIES |= {
    "qwen2vl": _FAMILIES["qwen2"],
    "qwen3vl": _FAMILIES["qwen3"],
    "qwen3vlmoe": _FAMILIES["qwen3moe"],
}

_NEXT = Support(frozenset(), partial_rotary=True, next_tokens=True)
_MLA = Support(frozenset({"yarn"}), next_tokens=True)
_HYBRID_BY_HIDDEN = Support(frozenset(), head_dim=False, hybrid=True)
_BARE = Support(frozenset(), positions=False, attention=False)
_LATER = {
    "glm4": Architecture(
        "glm4",
        "Glm4ForCausalLM",
        _GLM_4,
        configure_glm_4,
        Support(frozenset(), partial_rotary=True),
    ),
    "glm4moe": Architecture(
        "glm4_moe",
        "Glm4MoeForCausalLM",
        {**_LLAMA, **_NEXT_NORM, **_EXPERTS, **_SHARED},
        configure_glm_4_moe,
        _NEXT,
        whole=_CORRECTION,
    ),
    "qwen35": Architecture(
        "qwen3_5",
        "Qwen3_5ForCausalLM",
        _QWEN_35,
        configure_qwen_35,
        Support(frozenset(), positions=False, next_tokens=True),
        shifted_norms=True,
        whole=_QWEN_35_WHOLE,
        moves=_QWEN_35_MOVES,
        unshifted=("ssm_norm",),
    ),
    "qwen35moe": Architecture(
        "qwen3_5_moe",
        "Qwen3_5MoeForCausalLM",
        {**_QWEN_35, **_QWEN_MOE},
        configure_qwen_35_moe,
        Support(frozenset(), positions=False, next_tokens=True),
        shifted_norms=True,
        whole=_QWEN_35_WHOLE,
        moves=_QWEN_35_MOVES,
        unshifted=("ssm_norm",),
    ),
    "gemma4": Architecture(
        "gemma4_text",
        "Gemma4ForCausalLM",
        _GEMMA_4,
        configure_gemma_4,
        Support(frozenset(), positions=False, hybrid=True),
        wide=True,
        whole=_GEMMA_4_WHOLE,
        top=_GEMMA_4_TOP,
    ),
    "lfm2": Architecture(
        "lfm2",
        "Lfm2ForCausalLM",
        {**_LFM_2, **_LFM_2_DENSE},
        configure_lfm2,
        _HYBRID_BY_HIDDEN,
        top=_LFM_2_TOP,
        moves=_LFM_2_MOVES,
    ),
    "lfm2moe": Architecture(
        "lfm2_moe",
        "Lfm2MoeForCausalLM",
        {**_LFM_2, **_LFM_2_MOE},
        configure_lfm2_moe,
        _HYBRID_BY_HIDDEN,
        top=_LFM_2_TOP,
        moves=_LFM_2_MOVES,
        whole={"exp_probs_b.bias": "feed_forward.expert_bias"},
    ),
    "falcon": Architecture(
        "falcon",
        "FalconForCausalLM",
        _FALCON,
        configure_falcon,
        Support(frozenset(), head_dim=False, layer_norm=True),
        top=_FALCON_TOP,
        layers="transformer.h",
        moves={"attn_qkv": (Move.HEAD_GROUPS,)},
    ),
    "stablelm": Architecture(
        "stablelm",
        "StableLmForCausalLM",
        _STABLELM,
        configure_stablelm,
        Support(frozenset(), head_dim=False, partial_rotary=True, layer_norm=True),
    ),
    "minimax-m2": Architecture(
        "minimax_m2",
        "MiniMaxM2ForCausalLM",
        _MIXTRAL,
        configure_minimax_2,
        _UNSCALED,
        whole={"exp_probs_b.bias": "block_sparse_moe.e_score_correction_bias"},
    ),
    "mamba": Architecture(
        "mamba",
        "MambaForCausalLM",
        _MAMBA,
        configure_mamba,
        _BARE,
        whole=_MAMBA_WHOLE,
        top=_MAMBA_TOP,
        layers="backbone.layers",
        moves=_MAMBA_MOVES,
    ),
    "mamba2": Architecture(
        "mamba2",
        "Mamba2ForCausalLM",
        _MIXER,
        configure_mamba_2,
        _BARE,
        whole=_MAMBA_2_WHOLE,
        top=_MAMBA_TOP,
        layers="backbone.layers",
        moves=_MAMBA_2_MOVES,
    ),
    "falcon-h1": Architecture(
        "falcon_h1",
        "FalconH1ForCausalLM",
        _FALCON_H1,
        configure_falcon_h1,
        _UNSCALED,
        whole={**_PARALLEL_WHOLE, "ffn_norm": "pre_ff_layernorm.weight"},
        top={**TOP, "output_norm": "model.final_layernorm"},
        moves=_MAMBA_2_MOVES,
    ),
    "granitemoe": Architecture(
        "granitemoe",
        "GraniteMoeForCausalLM",
        _GRANITE_MOE,
        configure_granite_moe,
        _UNSCALED_BY_HIDDEN,
        permuted=True,
    ),
    "granitehybrid": Architecture(
        "granitemoehybrid",
        "GraniteMoeHybridForCausalLM",
        _GRANITE_HYBRID,
        configure_granite_hybrid,
        _HYBRID_BY_HIDDEN,
        permuted=True,
        whole=_PARALLEL_WHOLE,
        moves=_MAMBA_2_MOVES,
        joined=_GRANITE_JOINED,
    ),
    "nemotron_h": Architecture(
        "nemotron_h",
        "NemotronHForCausalLM",
        _NEMOTRON_H,
        configure_nemotron_h,
        Support(frozenset(), positions=False, next_tokens=True, hybrid=True),
        permuted=True,
        whole=_NEMOTRON_WHOLE,
        top=_MAMBA_TOP,
        layers="backbone.layers",
        moves=_MAMBA_2_MOVES,
    ),
    "bert": Architecture(
        "bert",
        "BertModel",
        _BERT,
        configure_bert,
        Support(frozenset(), head_dim=False, positions=False, layer_norm=True),
        top=_BERT_TOP,
        layers="encoder.layer",
    ),
    "jina-bert-v2": Architecture(
        "bert",
        "JinaBertModel",
        _JINA,
        configure_jina,
        Support(frozenset(), head_dim=False, positions=False, layer_norm=True),
        top=_BERT_TOP,
        layers="encoder.layer",
    ),
    "nomic-bert": Architecture(
        "nomic_bert",
        "NomicBertModel",
        _NOMIC,
        configure_nomic,
        Support(frozenset(), head_dim=False, layer_norm=True),
        top=_NOMIC_TOP,
        layers="encoder.layers",
    ),
    "t5encoder": Architecture(
        "t5",
        "T5EncoderModel",
        _T5,
        configure_t5_encoder,
        Support(frozenset(), positions=False),
        top=_T5_TOP,
        layers="encoder.block",
    ),
}
_LATER |= {"nemotron_h_moe": _LATER["nemotron_h"]}
_FAMILIES |= _LATER
_DEEPSEEK_2_FAMILY = Architecture(
    "deepseek_v2", "DeepseekV2ForCausalLM", _DEEPSEEK_2, configure_deepseek_2, _MLA
)
_DEEPSEEK_3_FAMILY = Architecture(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    _DEEPSEEK_3,
    configure_deepseek_3,
    _MLA,
    whole=_CORRECTION,
)
_GLM_4_LITE_FAMILY = replace(
    _DEEPSEEK_3_FAMILY, model_type="glm4_moe_lite", cls="Glm4MoeLiteForCausalLM"
)
_FALCON_40B_FAMILY = replace(
    _FAMILIES["falcon"],
    blocks={**_FALCON, "attn_norm": "ln_mlp", "attn_norm_2": "ln_attn"},
)
_FALCON_MAMBA_FAMILY = replace(
    _FAMILIES["mamba"], model_type="falcon_mamba", cls="FalconMambaForCausalLM"
)
ARCHITECTURES = (*_FAMILIES, "mistral3", "deepseek2")
"""The values of ``general.architecture`` whose names and config are known."""
_SIGMOID = 2
_GLM_4_LITE_TOKENS = 154_880


def family_of(metadata: Metadata) -> Architecture | None:
    """The architecture of a file, or None if it is not known.

    Mixtral calls itself llama, OLMo 3 olmo2, and Mistral's models of 2025 mistral3, whether or
    not their attention is Ministral's; deepseek2 is everything with DeepSeek's attention.
    """
    name = metadata.architecture
    if name == "mistral3":
        if metadata.find_float("mistral3.attention.temperature_scale") is not None:
            return _MINISTRAL_FAMILY
        name = "llama"
    if name == "llama" and metadata.find_int(f"{metadata.architecture}.expert_count"):
        return _MIXTRAL_FAMILY
    if name == "olmo2" and metadata.find_int("olmo2.attention.sliding_window"):
        return _OLMO_3_FAMILY
    if name == "deepseek2":
        return _deepseek(metadata)
    if name == "falcon" and (metadata.find_int("falcon.attention.head_count_kv") or 1) > 1:
        return _FALCON_40B_FAMILY
    if name == "mamba" and metadata.flag("mamba.ssm.dt_b_c_rms"):
        return _FALCON_MAMBA_FAMILY
    return _FAMILIES.get(name)


def _deepseek(metadata: Metadata) -> Architecture:
    """By how experts are chosen: version 2 by softmax, version 3 and GLM 4.7 Flash by sigmoid."""
    values = metadata.values
    if values.get("deepseek2.vocab_size") == _GLM_4_LITE_TOKENS:
        return _GLM_4_LITE_FAMILY
    is_sigmoid = values.get("deepseek2.expert_gating_func") == _SIGMOID
    return _DEEPSEEK_3_FAMILY if is_sigmoid else _DEEPSEEK_2_FAMILY


def written_family_of(model_type: str) -> tuple[str, Architecture] | None:
    """``general.architecture`` and the family of a ``model_type``; None if it is not known."""
    special = {
        "mistral": ("llama", _FAMILIES["llama"]),
        "mixtral": ("llama", _MIXTRAL_FAMILY),
        "olmo3": ("olmo2", _OLMO_3_FAMILY),
    }
    if model_type in special:
        return special[model_type]
    found = (pair for pair in _FAMILIES.items() if pair[1].model_type == model_type)
    return next(found, None)
