"""Architectures of llama.cpp: what GGUF files call tensors and settings, in Hugging Face's terms.

The facts are those of llama.cpp's converter (convert_hf_to_gguf.py, gguf-py's tensor map):
which names it gives, which rows it reorders, and where it adds one to a norm.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from requant.gguf.metadata import Metadata
from requant.gguf.special import special_ids

Shapes = Mapping[str, tuple[int, ...]]
"""Name in the file -> shape, outermost axis first."""
Peek = Callable[[str], np.ndarray]
"""Values of a small float32 tensor of the file."""

_TOP = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
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
_MLP = {
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_MIXTRAL = {
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
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_PHI_3 = {
    "attn_qkv": "self_attn.qkv_proj",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}
_GPT_OSS = {  # experts as mlx-lm names them: Hugging Face interleaves gate and up
    "post_attention_norm": "post_attention_layernorm",
    "attn_sinks": "self_attn.sinks",
    "ffn_gate_inp": "mlp.router",
    "ffn_gate_exps": "mlp.experts.gate_proj",
    "ffn_up_exps": "mlp.experts.up_proj",
    "ffn_down_exps": "mlp.experts.down_proj",
}
_OLD_EXPERTS = {"ffn_gate": "w1", "ffn_down": "w2", "ffn_up": "w3"}  # one tensor an expert
_BLOCK = re.compile(r"blk\.(\d{1,6})\.([a-z_]+)(?:\.(\d{1,6}))?\.(weight|bias)")
_TOP_NAME = re.compile(r"([a-z_]+)\.(weight|bias)")
# What is computed from settings that the config has: name -> where it goes.
_SETTINGS = {
    "rope_freqs": "rope_scaling in config.json stands for it",
    "rope_factors_long": "it is long_factor of rope_scaling in config.json",
    "rope_factors_short": "it is short_factor of rope_scaling in config.json",
}


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        model_type: As config.json says it.
        cls: The class in transformers.
        blocks: Name of a tensor of a block -> its path below ``model.layers.N``.
        permuted: Whether rows of q and k are in the order of llama.cpp's rotary embedding.
        shifted_norms: Whether one was added to the weights of norms.
        wide: Whether activations leave the range of float16.
        configure: Adds what only this architecture has to a config.
    """

    model_type: str
    cls: str
    blocks: Mapping[str, str]
    configure: Callable[[dict[str, Any], Settings], None]
    permuted: bool = False
    shifted_norms: bool = False
    wide: bool = False

    def name_of(self, name: str) -> str | None:
        """Hugging Face's name of a tensor; None if this architecture has none of that name."""
        if found := _BLOCK.fullmatch(name):
            number, role, expert, suffix = found.groups()
            if expert is not None:
                known = self.model_type == "mixtral" and role in _OLD_EXPERTS
                path = f"block_sparse_moe.experts.{expert}.{_OLD_EXPERTS[role]}" if known else None
            else:
                path = self.blocks.get(role)
            if path is None:
                return None
            suffix = "" if role == "attn_sinks" else f".{suffix}"
            return f"model.layers.{int(number)}.{path}{suffix}"
        found = _TOP_NAME.fullmatch(name)
        if found and found[1] in _TOP:
            return f"{_TOP[found[1]]}.{found[2]}"
        return None

    def heads_of(self, name: str, metadata: Metadata) -> int:
        """Heads whose rows are reordered in a tensor; 0 where none are."""
        found = _BLOCK.fullmatch(name)
        if not self.permuted or found is None or found[2] not in ("attn_q", "attn_k"):
            return 0
        prefix = f"{metadata.architecture}.attention.head_count"
        heads = metadata.find_int(prefix) or 0
        return heads if found[2] == "attn_q" else metadata.find_int(f"{prefix}_kv") or heads

    def is_shifted(self, name: str) -> bool:
        """Whether one was added to a tensor's values."""
        return self.shifted_norms and name.endswith("norm.weight")


def setting_of(name: str) -> str | None:
    """Why a tensor is no weight but a setting, or None."""
    found = re.fullmatch(r"(?:blk\.\d{1,6}\.)?([a-z_]+)\.weight", name)
    return _SETTINGS.get(found[1]) if found else None


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


def make_config(family: Family, settings: Settings) -> dict[str, Any]:
    """``config.json`` of a known architecture; what is missing becomes a problem."""
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
        "architectures": [family.cls],
        "model_type": family.model_type,
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
    family.configure(config, settings)
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
        return {
            "rope_type": "yarn",
            "type": "yarn",
            "factor": factor or 1.0,
            "original_max_position_embeddings": original or settings.need_int("context_length"),
        }
    if kind != "longrope":
        key = f"{settings.prefix}rope.scaling.type"
        settings.metadata.report(key, f"is {kind!r}, known are none, linear, yarn, longrope")
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


def _llama(config: dict[str, Any], settings: Settings) -> None:
    config["attention_bias"] = settings.has("blk.0.attn_q.bias")
    config["mlp_bias"] = settings.has("blk.0.ffn_up.bias")
    config["hidden_act"] = "silu"


def _mixtral(config: dict[str, Any], settings: Settings) -> None:
    config["num_local_experts"] = settings.need_int("expert_count")
    config["num_experts_per_tok"] = settings.need_int("expert_used_count")
    config["hidden_act"] = "silu"


def _qwen(config: dict[str, Any], settings: Settings) -> None:
    config["hidden_act"] = "silu"


def _qwen_moe(config: dict[str, Any], settings: Settings) -> None:
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


def _gemma(config: dict[str, Any], settings: Settings) -> None:
    config["hidden_activation"] = config["hidden_act"] = "gelu_pytorch_tanh"


_LARGEST_GEMMA = {
    "gemma2": 46,
    "gemma3_text": 62,
}  # blocks of the two whose queries scale otherwise


def _gemma_2(config: dict[str, Any], settings: Settings) -> None:
    _gemma(config, settings)
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


def _gemma_3(config: dict[str, Any], settings: Settings) -> None:
    _gemma_2(config, settings)
    config["sliding_window_pattern"] = 6
    config["rope_local_base_freq"] = settings.find_float("rope.freq_base_swa") or 10000.0
    if settings.find_float("rope.freq_base") is None:
        config["rope_theta"] = 1_000_000.0


def _phi_3(config: dict[str, Any], settings: Settings) -> None:
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


def _gpt_oss(config: dict[str, Any], settings: Settings) -> None:
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
        more = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
        config["rope_scaling"] |= more


_LLAMA_NAMES = {**_ATTENTION, **_MLP}
_FAMILIES = {
    "llama": Family("llama", "LlamaForCausalLM", _LLAMA_NAMES, _llama, permuted=True),
    "qwen2": Family("qwen2", "Qwen2ForCausalLM", _LLAMA_NAMES, _qwen),
    "qwen3": Family("qwen3", "Qwen3ForCausalLM", _LLAMA_NAMES, _qwen),
    "qwen2moe": Family("qwen2_moe", "Qwen2MoeForCausalLM", {**_ATTENTION, **_QWEN_MOE}, _qwen_moe),
    "qwen3moe": Family(
        "qwen3_moe", "Qwen3MoeForCausalLM", {**_LLAMA_NAMES, **_QWEN_MOE}, _qwen_moe
    ),
    "gemma": Family(
        "gemma", "GemmaForCausalLM", _LLAMA_NAMES, _gemma, shifted_norms=True, wide=True
    ),
    "gemma2": Family(
        "gemma2",
        "Gemma2ForCausalLM",
        {**_LLAMA_NAMES, **_GEMMA_2},
        _gemma_2,
        shifted_norms=True,
        wide=True,
    ),
    "gemma3": Family(
        "gemma3_text",
        "Gemma3ForCausalLM",
        {**_LLAMA_NAMES, **_GEMMA_2},
        _gemma_3,
        shifted_norms=True,
        wide=True,
    ),
    "phi3": Family("phi3", "Phi3ForCausalLM", {**_ATTENTION, **_PHI_3}, _phi_3),
    "gpt-oss": Family(
        "gpt_oss", "GptOssForCausalLM", {**_ATTENTION, **_GPT_OSS}, _gpt_oss, wide=True
    ),
}
_MIXTRAL_FAMILY = Family(
    "mixtral", "MixtralForCausalLM", {**_ATTENTION, **_MIXTRAL}, _mixtral, permuted=True
)
ARCHITECTURES = tuple(_FAMILIES)
"""What ``general.architecture`` may say for names and config to be known."""


def family_of(metadata: Metadata) -> Family | None:
    """The architecture of a file, or None if it is not known; Mixtral calls itself llama."""
    if metadata.architecture == "llama" and metadata.find_int("llama.expert_count"):
        return _MIXTRAL_FAMILY
    return _FAMILIES.get(metadata.architecture)
