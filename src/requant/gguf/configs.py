"""``config.json`` from a GGUF file's metadata, architecture by architecture.

The facts are those of llama.cpp's converter (ggml-org/llama.cpp conversion/, convert_hf_to_gguf.py)
and of its readers of hyperparameters (src/models/), where files leave out what these know.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from requant.errors import shown
from requant.gguf.metadata import Metadata
from requant.gguf.special import special_ids

Shapes = Mapping[str, tuple[int, ...]]
"""Name in the file -> shape, outermost axis first."""
Peek = Callable[[str], np.ndarray]
"""Values of a small float32 tensor of the file."""


class Settings:
    """What configs are made of: metadata under the architecture's prefix, shapes, values."""

    def __init__(self, metadata: Metadata, shapes: Shapes, peek: Peek) -> None:
        self.metadata, self.shapes, self.peek = metadata, shapes, peek
        self.prefix = f"{metadata.architecture}."

    def need_int(self, key: str) -> int:
        return self.metadata.need_int(self.prefix + key)

    def find_int(self, key: str) -> int | None:
        return self.metadata.find_int(self.prefix + key)

    def find_float(self, key: str) -> float | None:
        return self.metadata.find_float(self.prefix + key)

    def word(self, key: str) -> str:
        return self.metadata.word(self.prefix + key)

    def has(self, name: str) -> bool:
        return name in self.shapes

    def width(self, name: str) -> int | None:
        """Rows of a block's tensor, from the first block that has it."""
        found = (s for n, s in self.shapes.items() if n.startswith("blk.") and n.endswith(name))
        shape = next(found, None)
        return shape[-2] if shape is not None and len(shape) > 1 else None


Configure = Callable[[dict[str, Any], Settings], None]
"""Adds what only one architecture has to a config."""


def make_config(
    settings: Settings, model_type: str, cls: str, configure: Configure
) -> dict[str, Any]:
    """``config.json`` of a known architecture; what is missing becomes a problem.

    Args:
        settings: Of the file.
        model_type: As config.json says it.
        cls: The class in transformers.
        configure: Adds what only this architecture has.
    """
    heads = settings.need_int("attention.head_count")
    hidden = settings.need_int("embedding_length")
    blocks = settings.need_int("block_count")
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
        "num_key_value_heads": settings.find_int("attention.head_count_kv") or heads,
        "head_dim": settings.find_int("attention.key_length") or max(hidden // heads, 1),
        "intermediate_size": settings.find_int("feed_forward_length") or 0,
        "rms_norm_eps": settings.metadata.need_float(
            f"{settings.prefix}attention.layer_norm_rms_epsilon"
        ),
        "vocab_size": embeddings[0] if embeddings else 0,
        "max_position_embeddings": settings.need_int("context_length"),
        "rope_theta": settings.find_float("rope.freq_base") or 10000.0,
        "tie_word_embeddings": not settings.has("output.weight"),
    }
    scaling = _rope_scaling(settings)
    if scaling is not None:
        config["rope_scaling"] = scaling
    configure(config, settings)
    config |= special_ids(settings.metadata)
    return config


def _rope_scaling(settings: Settings) -> dict[str, Any] | None:
    if settings.has("rope_freqs.weight"):
        return _llama3_scaling(settings)
    kind = settings.word("rope.scaling.type")
    factor = settings.find_float("rope.scaling.factor") or settings.find_float("rope.scale_linear")
    if kind in ("", "none", "linear"):
        if kind == "none" or factor in (None, 1.0):
            return None
        return {"rope_type": "linear", "type": "linear", "factor": factor}
    original = settings.find_int("rope.scaling.original_context_length")
    if kind == "yarn":
        betas = {
            key: value
            for key in ("beta_fast", "beta_slow")
            if (value := settings.find_float(f"rope.scaling.yarn_{key}")) is not None
        }
        return {
            "rope_type": "yarn",
            "type": "yarn",
            "factor": factor or 1.0,
            "original_max_position_embeddings": original or settings.need_int("context_length"),
            **betas,
        }
    if kind != "longrope":
        key = f"{settings.prefix}rope.scaling.type"
        settings.metadata.report(key, f"is {shown(kind)}, known are none, linear, yarn, longrope")
    return None


_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3_CONTEXT = 8192


def _llama3_scaling(settings: Settings) -> dict[str, Any] | None:
    """The setting that ``rope_freqs`` was computed from; it holds the factor of each frequency."""
    stored = settings.peek("rope_freqs.weight").reshape(-1).astype(np.float64)
    base = settings.find_float("rope.freq_base") or 10000.0
    if (stored == 1).all():
        return None
    factor = float(stored.max(initial=1.0))
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    waves = 2 * np.pi * base ** (np.arange(stored.size) / max(stored.size, 1))
    smooth = np.clip((_LLAMA3_CONTEXT / waves - low) / (high - low), 0, 1)
    if not np.allclose(stored, 1 / ((1 - smooth) / factor + smooth), rtol=1e-4):
        settings.metadata.report(
            "rope_freqs.weight",
            "holds factors that no setting of Llama 3 gives; --config-from takes the config "
            "of the original model",
        )
        return None
    return {
        "rope_type": "llama3",
        "type": "llama3",
        "factor": factor,
        **_LLAMA3,
        "original_max_position_embeddings": _LLAMA3_CONTEXT,
    }


# -- what only one architecture has --------------------------------------------------------------


def configure_llama(config: dict[str, Any], settings: Settings) -> None:
    config["attention_bias"] = settings.has("blk.0.attn_q.bias")
    config["mlp_bias"] = settings.has("blk.0.ffn_up.bias")
    config["hidden_act"] = "silu"


def configure_mixtral(config: dict[str, Any], settings: Settings) -> None:
    config["num_local_experts"] = settings.need_int("expert_count")
    config["num_experts_per_tok"] = settings.need_int("expert_used_count")
    config["hidden_act"] = "silu"


def configure_qwen(config: dict[str, Any], settings: Settings) -> None:
    config["hidden_act"] = "silu"


def configure_qwen_moe(config: dict[str, Any], settings: Settings) -> None:
    width = settings.find_int("expert_feed_forward_length")
    config |= {
        "hidden_act": "silu",
        "num_experts": settings.need_int("expert_count"),
        "num_experts_per_tok": settings.need_int("expert_used_count"),
        "moe_intermediate_size": width or settings.width("ffn_up_exps.weight") or 0,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": config["model_type"] == "qwen3_moe",
    }
    shared = settings.width("ffn_up_shexp.weight")
    if shared is not None:
        config["shared_expert_intermediate_size"] = shared
    config["intermediate_size"] = config["intermediate_size"] or config["moe_intermediate_size"]


def configure_gemma(config: dict[str, Any], settings: Settings) -> None:
    config["hidden_activation"] = config["hidden_act"] = "gelu_pytorch_tanh"


_LARGEST_GEMMA = {
    "gemma2": 46,
    "gemma3_text": 62,
}  # blocks of the two whose queries scale otherwise


def configure_gemma_2(config: dict[str, Any], settings: Settings) -> None:
    configure_gemma(config, settings)
    largest = config["num_hidden_layers"] == _LARGEST_GEMMA[config["model_type"]]
    by_width = config["hidden_size"] // config["num_attention_heads"]
    config["query_pre_attn_scalar"] = by_width if largest else config["head_dim"]
    window = settings.find_int("attention.sliding_window")
    if window:
        config["sliding_window"] = window
    if config["model_type"] == "gemma2":
        attention = settings.find_float("attn_logit_softcapping")
        final = settings.find_float("final_logit_softcapping")
        config["attn_logit_softcapping"] = 50.0 if attention is None else attention
        config["final_logit_softcapping"] = 30.0 if final is None else final


def configure_gemma_3(config: dict[str, Any], settings: Settings) -> None:
    configure_gemma_2(config, settings)
    config["sliding_window_pattern"] = 6
    config["rope_local_base_freq"] = settings.find_float("rope.freq_base_swa") or 10000.0
    if settings.find_float("rope.freq_base") is None:
        config["rope_theta"] = 1_000_000.0


def configure_phi_3(config: dict[str, Any], settings: Settings) -> None:
    config["hidden_act"] = "silu"
    original = settings.find_int("rope.scaling.original_context_length")
    config["original_max_position_embeddings"] = original or config["max_position_embeddings"]
    window = settings.find_int("attention.sliding_window")
    if window:
        config["sliding_window"] = window
    rotary = settings.find_int("rope.dimension_count")
    if rotary and rotary != config["head_dim"]:
        config["partial_rotary_factor"] = rotary / config["head_dim"]
    factors = {
        f"{end}_factor": settings.peek(f"rope_factors_{end}.weight").reshape(-1)
        for end in ("long", "short")
        if settings.has(f"rope_factors_{end}.weight")
    }
    if factors:
        config["rope_scaling"] = {
            "type": "longrope",
            "rope_type": "longrope",
            **{key: [float(str(x)) for x in values] for key, values in factors.items()},
        }


def configure_gpt_oss(config: dict[str, Any], settings: Settings) -> None:
    width = settings.find_int("expert_feed_forward_length")
    width = width or settings.width("ffn_up_exps.weight") or config["intermediate_size"]
    config |= {
        "intermediate_size": width,
        "num_local_experts": settings.need_int("expert_count"),
        "num_experts_per_tok": settings.need_int("expert_used_count"),
        "sliding_window": settings.find_int("attention.sliding_window") or 128,
        "layer_types": [
            "full_attention" if number % 2 else "sliding_attention"
            for number in range(config["num_hidden_layers"])
        ],
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
    original = config["max_position_embeddings"]
    config["rope_parameters"] = {
        "rope_theta": config["rope_theta"],
        "original_max_position_embeddings": original,
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
