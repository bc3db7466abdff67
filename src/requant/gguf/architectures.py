"""Architectures of llama.cpp: what GGUF files call tensors and settings, in Hugging Face's terms.

The facts are those of llama.cpp's converter (convert_hf_to_gguf.py, gguf-py's tensor map):
which names it gives, which rows it reorders, and where it adds one to a norm.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from requant.gguf.metadata import Metadata
from requant.gguf.model_config import (
    Configure,
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
from requant.gguf.settings import ALL_SCALINGS, PLAIN, Support

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
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
    "attn_sinks": "self_attn.sinks",
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
_OLD_EXPERTS = {"ffn_gate": "w1", "ffn_down": "w2", "ffn_up": "w3"}  # one tensor an expert
_FUSED = {  # one tensor of several, row after row: its name -> theirs
    "attn_qkv": ("attn_q", "attn_k", "attn_v"),
    "ffn_gate_up_exps": ("ffn_gate_exps", "ffn_up_exps"),
}
SCALES = (".scale", ".input_scale")
"""Endings of the factors of a tensor's values, or of its input."""
_SUFFIX = r"(weight|bias|scale|input_scale)"
_BLOCK = re.compile(rf"blk\.(\d{{1,6}})\.([a-z_]+)(?:\.(\d{{1,6}}))?\.{_SUFFIX}")
_HF_BLOCK = re.compile(r"model\.layers\.(\d{1,6})\.(.+)")
_NO_SUFFIX = (".sinks",)  # ends of Hugging Face's names that no ``.weight`` follows
_TOP_NAME = re.compile(rf"([a-z_]+)\.{_SUFFIX}")
# What is computed from settings that the config has: name -> where it goes.
_SETTINGS = {
    "rope_freqs": "rope_scaling in config.json represents it",
    "rope_factors_long": "it is long_factor of rope_scaling in config.json",
    "rope_factors_short": "it is short_factor of rope_scaling in config.json",
}


@dataclass(frozen=True)
class Architecture:
    """One architecture."""

    model_type: str  # as config.json says it
    cls: str  # the class in transformers
    blocks: Mapping[str, str]  # name of a tensor of a block -> its path below ``model.layers.N``
    configure: Configure  # adds what only this architecture has to a config
    support: Support = PLAIN  # the settings that mlx-lm's class reads
    # Whether rows of q and k are in the order of llama.cpp's rotary embedding.
    permuted: bool = False
    shifted_norms: bool = False  # whether one was added to the weights of norms
    wide: bool = False  # whether activations leave the range of float16

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

    def gguf_name_of(self, name: str) -> str | None:
        """The name in files of a tensor by Hugging Face's name; the inverse of ``name_of``."""
        path, _, suffix = name.rpartition(".")
        if f".{suffix}" in _NO_SUFFIX:
            path, suffix = name, "weight"
        top = next((role for role, known in _TOP.items() if known == path), None)
        if top is not None:
            return f"{top}.{suffix}"
        found = _HF_BLOCK.fullmatch(path)
        if found is None or suffix not in ("weight", "bias"):
            return None
        # Of two roles with one path the later is this architecture's own.
        roles = [role for role, known in self.blocks.items() if known == found[2]]
        return f"blk.{int(found[1])}.{roles[-1]}.{suffix}" if roles else None

    def fused_of(self, name: str) -> tuple[str, ...]:
        """The names that the parts of a fused tensor would have; none of any other."""
        found = _BLOCK.fullmatch(name)
        if found is None or found[3] or found[2] in self.blocks:
            return ()
        roles = _FUSED.get(found[2], ())
        if not all(role in self.blocks for role in roles):
            return ()
        return tuple(f"blk.{found[1]}.{role}.{found[4]}" for role in roles)

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
    """The reason why a tensor is not a weight but a setting, or None."""
    found = re.fullmatch(r"(?:blk\.\d{1,6}\.)?([a-z_]+)\.weight", name)
    return _SETTINGS.get(found[1]) if found else None


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
    ),
    "qwen3moe": Architecture(
        "qwen3_moe", "Qwen3MoeForCausalLM", {**_LLAMA, **_QWEN_MOE}, configure_qwen_moe, _UNSCALED
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
        "gpt_oss", "GptOssForCausalLM", _GPT_OSS, configure_gpt_oss, _NO_LONGROPE, wide=True
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
ARCHITECTURES = (*_FAMILIES, "mistral3")
"""The values of ``general.architecture`` whose names and config are known."""


def family_of(metadata: Metadata) -> Architecture | None:
    """The architecture of a file, or None if it is not known.

    Mixtral calls itself llama, OLMo 3 olmo2, and Mistral's models of 2025 mistral3, whether or
    not their attention is Ministral's.
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
    return _FAMILIES.get(name)


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
