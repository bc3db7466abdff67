"""Record what llama.cpp's own converter makes of small models, a file each: NAME.json.xz.

Needs torch, transformers, sentencepiece, and llama.cpp's folder (``convert_hf_to_gguf.py``,
``conversion``, ``gguf-py``), which lies in the source archive of llama-cpp-python on PyPI:

    python make.py vendor/llama.cpp [NAME ...]

A record has config.json and the shapes of the weights as transformers writes them, and the GGUF
file of the converter (float32), whole. Weights depend on their names alone: ``values``.
"""

from __future__ import annotations

import base64
import json
import lzma
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

_PERIOD = 1021  # a prime: no two rows of a small matrix are equal

COMMON: dict[str, Any] = {
    **{"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256},
    **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
}
_MLA = {
    **{"num_key_value_heads": 4, "kv_lora_rank": 32, "q_lora_rank": 48, "qk_rope_head_dim": 8},
    **{"qk_nope_head_dim": 16, "v_head_dim": 24, "num_hidden_layers": 3},
    **{"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    **{"moe_intermediate_size": 32, "first_k_dense_replace": 1, "routed_scaling_factor": 1.5},
}
_QWEN = {
    **{"num_hidden_layers": 4, "head_dim": 32, "linear_num_key_heads": 2},
    **{"linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 32},
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
}
_PUBLISHED = {"linear_attention": "mamba", "full_attention": "attention"}
_MAMBA = {"intermediate_size": 128, "state_size": 16, "conv_kernel": 4, "tie_word_embeddings": True}
CASES: dict[str, tuple[str, dict[str, Any]]] = {  # name -> class in transformers, settings
    "deepseek_v2": (
        "DeepseekV2ForCausalLM",
        {
            **{**_MLA, "q_lora_rank": None, "topk_method": "greedy", "n_group": 1, "topk_group": 1},
            **{"scoring_func": "softmax", "norm_topk_prob": False},
            "rope_parameters": {
                **{"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "beta_fast": 32},
                **{"beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707},
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        {
            **_MLA,
            **{"n_group": 2, "topk_group": 1, "norm_topk_prob": True, "scoring_func": "sigmoid"},
            "rope_parameters": {
                **{"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "beta_fast": 32},
                **{"beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0},
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "glm4_moe": (
        "Glm4MoeForCausalLM",
        {
            **{
                "num_hidden_layers": 3,
                "head_dim": 32,
                "n_routed_experts": 4,
                "n_shared_experts": 1,
            },
            **{"num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1},
            **{"n_group": 1, "topk_group": 1, "use_qk_norm": True, "attention_bias": True},
            **{"routed_scaling_factor": 1.5, "norm_topk_prob": True},
            "rope_parameters": {
                **{"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5}
            },
        },
    ),
    "glm4": ("Glm4ForCausalLM", {"head_dim": 32, "attention_bias": True}),
    "qwen3_5": ("Qwen3_5ForCausalLM", _QWEN),
    "qwen3_5_moe": (
        "Qwen3_5MoeForCausalLM",
        {
            **_QWEN,
            **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
            "shared_expert_intermediate_size": 48,
        },
    ),
    "gemma4": (
        "Gemma4ForCausalLM",
        {
            **{"num_hidden_layers": 6, "head_dim": 16, "global_head_dim": 32},
            **{"sliding_window": 8, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 16},
            **{"vocab_size_per_layer_input": 64, "use_double_wide_mlp": True},
            "layer_types": (["sliding_attention"] * 2 + ["full_attention"]) * 2,
            "final_logit_softcapping": 30.0,
        },
    ),
    "gemma4_moe": (
        "Gemma4ForCausalLM",
        {
            **{"num_hidden_layers": 4, "head_dim": 16, "global_head_dim": 32},
            **{"sliding_window": 8, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0},
            **{"use_double_wide_mlp": False, "attention_k_eq_v": True},
            "num_global_key_value_heads": 1,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            **{"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2},
            **{"moe_intermediate_size": 32, "final_logit_softcapping": 30.0},
        },
    ),
    "lfm2": (
        "Lfm2ForCausalLM",
        {
            **{"num_hidden_layers": 3, "conv_L_cache": 3, "block_auto_adjust_ff_dim": False},
            **{"layer_types": ["conv", "full_attention", "conv"], "block_dim": 64},
            **{"block_ff_dim": 96, "tie_word_embeddings": True},
        },
    ),
    "lfm2_moe": (
        "Lfm2MoeForCausalLM",
        {
            **{"num_hidden_layers": 3, "conv_L_cache": 3, "num_dense_layers": 1},
            **{"layer_types": ["conv", "full_attention", "conv"], "num_experts": 4},
            **{"num_experts_per_tok": 2, "moe_intermediate_size": 32},
        },
    ),
    "falcon": (
        "FalconForCausalLM",
        {
            **{"new_decoder_architecture": True, "num_kv_heads": 2, "bias": False},
            **{"alibi": False, "parallel_attn": True},
        },
    ),
    "falcon_7b": (
        "FalconForCausalLM",
        {
            **{"multi_query": True, "bias": False, "alibi": False, "parallel_attn": True},
            "num_kv_heads": 1,
        },
    ),
    "stablelm": (
        "StableLmForCausalLM",
        {"use_qkv_bias": True, "use_parallel_residual": False},
    ),
    "minimax": (
        "MiniMaxM2ForCausalLM",
        {
            **{"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 32, "rotary_dim": 16},
            **{"intermediate_size": 32, "use_qk_norm": True, "shared_intermediate_size": 0},
        },
    ),
    "mamba": ("MambaForCausalLM", {**_MAMBA, "time_step_rank": 4}),
    "falcon_mamba": ("FalconMambaForCausalLM", {**_MAMBA, "time_step_rank": 4}),
    "mamba2": (
        "Mamba2ForCausalLM",
        {**_MAMBA, "num_heads": 8, "head_dim": 16, "n_groups": 2, "chunk_size": 16},
    ),
    "falcon_h1": (
        "FalconH1ForCausalLM",
        {
            **{"head_dim": 16, "mamba_d_ssm": 96, "mamba_n_heads": 6, "mamba_d_head": 16},
            **{"mamba_d_state": 8, "mamba_n_groups": 2, "mamba_rms_norm": True},
            **{"mlp_multipliers": [0.75, 0.5], "key_multiplier": 0.5, "ssm_in_multiplier": 1.25},
            **{"ssm_multipliers": [0.5, 0.25, 0.75, 0.5, 0.375], "ssm_out_multiplier": 0.25},
            **{"attention_in_multiplier": 1.0, "attention_out_multiplier": 0.9375},
            **{"embedding_multiplier": 5.5, "lm_head_multiplier": 0.0390625},
        },
    ),
    "granitemoehybrid": (
        "GraniteMoeHybridForCausalLM",
        {
            **{"num_hidden_layers": 3, "layer_types": ["mamba", "attention", "mamba"]},
            **{"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 48},
            **{"intermediate_size": 32, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8},
            **{"mamba_n_groups": 2, "position_embedding_type": "nope"},
            **{"embedding_multiplier": 12.0, "attention_multiplier": 0.0625},
            **{"logits_scaling": 6.0, "residual_multiplier": 0.25, "tie_word_embeddings": True},
        },
    ),
    "granitemoehybrid_dense": (
        "GraniteMoeHybridForCausalLM",
        {
            **{"num_hidden_layers": 3, "layer_types": ["mamba", "attention", "mamba"]},
            **{"num_local_experts": 0, "num_experts_per_tok": 0, "shared_intermediate_size": 96},
            **{"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8},
            **{"mamba_n_groups": 1, "position_embedding_type": "nope"},
            **{"embedding_multiplier": 12.0, "attention_multiplier": 0.0625},
            **{"logits_scaling": 6.0, "residual_multiplier": 0.25, "tie_word_embeddings": True},
        },
    ),
    "granitemoe": (
        "GraniteMoeForCausalLM",
        {
            **{"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32},
            **{"embedding_multiplier": 12.0, "attention_multiplier": 0.0625},
            **{"logits_scaling": 6.0, "residual_multiplier": 0.25, "tie_word_embeddings": True},
        },
    ),
    "nemotron_h": (
        "NemotronHForCausalLM",
        {
            **{"num_hidden_layers": 4, "head_dim": 16, "mamba_num_heads": 8, "mamba_head_dim": 16},
            **{"ssm_state_size": 8, "n_groups": 2, "conv_kernel": 4},
            **{"layers_block_type": ["mamba", "moe", "attention", "mamba"]},
            **{"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
            **{"moe_shared_expert_intermediate_size": 48, "n_shared_experts": 1},
            **{"n_group": 1, "topk_group": 1, "norm_topk_prob": True},
            **{"routed_scaling_factor": 2.5, "moe_latent_size": None, "norm_eps": 1e-5},
        },
    ),
    "bert": ("BertModel", {"type_vocab_size": 2, "position_embedding_type": "absolute"}),
    "xlm_roberta": ("XLMRobertaModel", {"type_vocab_size": 1, "pad_token_id": 1}),
    "t5_encoder": (
        "T5EncoderModel",
        {
            **{"d_model": 64, "d_ff": 96, "d_kv": 16, "num_layers": 2, "num_heads": 4},
            **{"feed_forward_proj": "gated-gelu", "relative_attention_num_buckets": 8},
        },
    ),
}


def _nomic() -> tuple[dict[str, Any], dict[str, list[int]]]:
    """nomic-embed-text, whose class transformers names otherwise: config.json and shapes."""
    config = {
        **{"architectures": ["NomicBertModel"], "model_type": "nomic_bert", "n_embd": 64},
        **{"n_layer": 2, "n_head": 4, "n_inner": 96, "n_positions": 8192, "vocab_size": 64},
        **{"type_vocab_size": 2, "layer_norm_epsilon": 1e-12, "activation_function": "swiglu"},
        **{"causal": False, "qkv_proj_bias": False, "mlp_fc1_bias": False, "mlp_fc2_bias": False},
        **{"prenorm": False, "rotary_emb_fraction": 1.0, "rotary_emb_interleaved": False},
        **{"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16},
        **{"intermediate_size": 96, "max_position_embeddings": 8192, "rotary_emb_base": 1000},
        **{"rotary_emb_scale_base": None, "max_trained_positions": 2048},
    }
    shapes = {
        "embeddings.word_embeddings.weight": [64, 64],
        "embeddings.token_type_embeddings.weight": [2, 64],
        **{f"emb_ln.{part}": [64] for part in ("weight", "bias")},
    }
    for block in range(2):
        path = f"encoder.layers.{block}."
        shapes |= {
            f"{path}attn.Wqkv.weight": [192, 64],
            f"{path}attn.out_proj.weight": [64, 64],
            f"{path}mlp.fc11.weight": [96, 64],
            f"{path}mlp.fc12.weight": [96, 64],
            f"{path}mlp.fc2.weight": [64, 96],
            **{f"{path}norm{n}.{part}": [64] for n in (1, 2) for part in ("weight", "bias")},
        }
    return config, shapes


def _jina() -> tuple[dict[str, Any], dict[str, list[int]]]:
    """jina-embeddings-v2-base-en: config.json and shapes."""
    config = {
        **{"architectures": ["JinaBertModel"], "model_type": "bert", "hidden_size": 64},
        **{"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96},
        **{"max_position_embeddings": 256, "vocab_size": 64, "type_vocab_size": 2},
        **{"layer_norm_eps": 1e-12, "position_embedding_type": "alibi", "pad_token_id": 0},
        **{"feed_forward_type": "geglu", "hidden_act": "gelu"},
    }
    both = ("weight", "bias")
    shapes = {
        "embeddings.word_embeddings.weight": [64, 64],
        "embeddings.token_type_embeddings.weight": [2, 64],
        **{f"embeddings.LayerNorm.{part}": [64] for part in both},
    }
    for block in range(2):
        path = f"encoder.layer.{block}."
        dense = [f"attention.self.{x}" for x in ("query", "key", "value")]
        for name in (*dense, "attention.output.dense"):
            shapes |= {f"{path}{name}.weight": [64, 64], f"{path}{name}.bias": [64]}
        for name in ("attention.output.LayerNorm", "mlp.layernorm"):
            shapes |= {f"{path}{name}.{part}": [64] for part in both}
        shapes |= {
            f"{path}mlp.gated_layers.weight": [192, 64],
            f"{path}mlp.wo.weight": [64, 96],
            f"{path}mlp.wo.bias": [64],
        }
    return config, shapes


# Models whose classes are not in transformers: config.json, and shapes of weights.
BY_HAND = {"nomic_bert": _nomic, "jina_bert": _jina}


def values(name: str, shape: list[int]) -> np.ndarray:
    """Multiples of 2**-12 in no order, of a short period, beginning where the name says."""
    start = zlib.crc32(name.encode()) % _PERIOD
    at = (np.arange(int(np.prod(shape)), dtype=np.int64) + start) % _PERIOD
    mixed = (at * at * 31 + at * 7) % _PERIOD
    return (mixed.astype(np.float32) / 2**12 - 0.125).reshape(shape)


def record(name: str) -> dict[str, Any]:
    import gguf
    import torch
    from conversion import get_model_class
    from conversion.base import ModelBase, ModelType, get_model_architecture
    from safetensors.numpy import save_file

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        if name in CASES:
            config, shapes = by_transformers(name, folder)
        else:
            config, shapes = BY_HAND[name]()
        (folder / "config.json").write_text(json.dumps(config))
        kind = "Unigram" if name == "xlm_roberta" else "WordPiece"
        vocabulary = {str(n): n for n in range(config.get("vocab_size", 0))}
        tokenizer = {"model": {"type": kind, "vocab": vocabulary}, "added_tokens": []}
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
        weights = {key: values(key, shape) for key, shape in shapes.items()}
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        hparams = ModelBase.load_hparams(folder, False)
        cls = get_model_class(get_model_architecture(hparams, ModelType.TEXT))
        cls.set_vocab = lambda self: None
        cls.no_mtp = True
        out = folder / "m.gguf"
        with torch.inference_mode():
            cls(folder, gguf.LlamaFileType.ALL_F32, out, eager=True).write()
        return {
            "config": config,
            "weights": shapes,
            "gguf": base64.b64encode(out.read_bytes()).decode(),
        }


def by_transformers(name: str, folder: Path) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """config.json and shapes of weights as ``save_pretrained`` writes them."""
    import transformers
    from safetensors import safe_open

    cls_name, own = CASES[name]
    cls = getattr(transformers, cls_name)
    settings = {**COMMON, **own}
    config = cls.config_class(**{k: v for k, v in settings.items() if v is not None})
    for key, value in settings.items():
        if value is None:
            setattr(config, key, None)
    config.architectures = [cls_name]
    cls(config).save_pretrained(folder)
    shapes: dict[str, list[int]] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "np") as file:
            shapes |= {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
        path.unlink()
    made = json.loads((folder / "config.json").read_text())
    for key in ("layer_types", "layers_block_type"):  # as published files have them
        if cls_name.startswith(("Granite", "Nemotron")) and key in made:
            made[key] = [_PUBLISHED.get(kind, kind) for kind in made[key]]
    return made, dict(sorted(shapes.items()))


def main() -> None:
    vendor = Path(sys.argv[1]).resolve()
    sys.path[:0] = [str(vendor), str(vendor / "gguf-py")]
    for name in sys.argv[2:] or [*CASES, *BY_HAND]:
        found = json.dumps(record(name)).encode()
        packed = lzma.compress(found, preset=9)
        (Path(__file__).parent / f"{name}.json.xz").write_bytes(packed)
        print(name, len(found), len(packed))


if __name__ == "__main__":
    main()
