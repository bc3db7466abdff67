"""``config.json`` of encoders: BERT and its heirs, and the encoder of T5.

The facts are those of llama.cpp's converter (ggml-org/llama.cpp conversion/bert.py, t5.py).
"""

from __future__ import annotations

from typing import Any

from requant.gguf.later_config import rename
from requant.gguf.settings import ADVICE, Settings

_ALIBI_BIAS = 8.0  # what the converter writes


def _check_causal(settings: Settings) -> None:
    """Every token sees every other."""
    if settings.flag("attention.causal") is not False:
        message = f"is not false, and this class looks at a whole text; {ADVICE}"
        settings.report("attention.causal", message)


def _take_heads(config: dict[str, Any], settings: Settings) -> None:
    """Heads are as wide as their number gives: these classes have no setting for it."""
    width = config.pop("head_dim")
    values = settings.find_int("attention.value_length")
    if values not in (None, width):
        settings.report("attention.value_length", f"is {values:,}, expected {width:,}; {ADVICE}")
    for key in ("num_key_value_heads", "tie_word_embeddings"):
        del config[key]


def _token_types(settings: Settings) -> int:
    """How many kinds of tokens have an embedding; a file with one kind may hold it as a vector."""
    shape = settings.shapes.get("token_types.weight", (1,))
    return shape[0] if len(shape) > 1 else 1


def configure_bert(config: dict[str, Any], settings: Settings) -> None:
    _check_causal(settings)
    _take_heads(config, settings)
    del config["rope_theta"]
    config |= {
        "hidden_act": "gelu",
        "type_vocab_size": _token_types(settings),
        "position_embedding_type": "absolute",
        "max_position_embeddings": settings.shapes.get("position_embd.weight", (0,))[0],
    }


def configure_jina(config: dict[str, Any], settings: Settings) -> None:
    """BERT with gates, and a penalty for distance instead of positions."""
    length = config["max_position_embeddings"]
    configure_bert(config, settings)
    bias = settings.find_float("attention.max_alibi_bias")
    if bias not in (None, _ALIBI_BIAS):
        message = f"is {bias:g}, and this class has {_ALIBI_BIAS:g}; {ADVICE}"
        settings.report("attention.max_alibi_bias", message)
    config |= {
        "max_position_embeddings": length,
        "position_embedding_type": "alibi",
        "feed_forward_type": "geglu",
    }


def configure_nomic(config: dict[str, Any], settings: Settings) -> None:
    _check_causal(settings)
    _take_heads(config, settings)
    rename(
        config,
        n_embd="hidden_size",
        n_layer="num_hidden_layers",
        n_head="num_attention_heads",
        n_inner="intermediate_size",
        layer_norm_epsilon="layer_norm_eps",
        n_positions="max_position_embeddings",
        rotary_emb_base="rope_theta",
    )
    config |= {
        "activation_function": "swiglu",
        "type_vocab_size": _token_types(settings),
        "causal": False,
        "prenorm": False,
        "qkv_proj_bias": settings.has("blk.0.attn_qkv.bias"),
        "mlp_fc1_bias": settings.has("blk.0.ffn_up.bias"),
        "mlp_fc2_bias": settings.has("blk.0.ffn_down.bias"),
        "rotary_emb_fraction": 1.0,
        "rotary_emb_interleaved": False,
    }


def configure_t5_encoder(config: dict[str, Any], settings: Settings) -> None:
    values = settings.find_int("attention.value_length")
    if values not in (None, config["head_dim"]):
        message = f"is {values:,}, expected {config['head_dim']:,} as attention.key_length"
        settings.report("attention.value_length", f"{message}; {ADVICE}")
    for key in ("num_key_value_heads", "rope_theta"):
        del config[key]
    rename(
        config,
        d_model="hidden_size",
        num_layers="num_hidden_layers",
        num_heads="num_attention_heads",
        d_kv="head_dim",
        d_ff="intermediate_size",
        layer_norm_epsilon="rms_norm_eps",
        n_positions="max_position_embeddings",
    )
    gated = settings.has("enc.blk.0.ffn_gate.weight")
    config |= {
        "relative_attention_num_buckets": settings.need_int("attention.relative_buckets_count"),
        "feed_forward_proj": "gated-gelu" if gated else "relu",
        "is_encoder_decoder": False,
    }
