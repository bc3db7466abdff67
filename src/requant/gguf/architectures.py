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
_OLMO_2 = {  # norms behind the two halves of a block, none before
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
    # Whether rows of q and k are in the order of llama.cpp's rotary embedding.
    permuted: bool = False
    shifted_norms: bool = False  # whether one was added to the weights of norms
    wide: bool = False  # whether activations leave the range of float16
    support: Support = PLAIN  # the settings that mlx-lm's class reads

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


_LLAMA_NAMES = {**_ATTENTION, **_MLP}
_BY_HIDDEN = Support(head_dim=False)
_NO_SCALING = frozenset[str]()
_FAMILIES = {
    "llama": Architecture(
        "llama", "LlamaForCausalLM", _LLAMA_NAMES, configure_llama, permuted=True
    ),
    "qwen2": Architecture(
        "qwen2", "Qwen2ForCausalLM", _LLAMA_NAMES, configure_qwen, support=_BY_HIDDEN
    ),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", _LLAMA_NAMES, configure_qwen),
    "qwen2moe": Architecture(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        {**_ATTENTION, **_QWEN_MOE},
        configure_qwen_moe,
        support=Support(_NO_SCALING, head_dim=False),
    ),
    "qwen3moe": Architecture(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        {**_LLAMA_NAMES, **_QWEN_MOE},
        configure_qwen_moe,
        support=Support(_NO_SCALING),
    ),
    "gemma": Architecture(
        "gemma",
        "GemmaForCausalLM",
        _LLAMA_NAMES,
        configure_gemma,
        shifted_norms=True,
        wide=True,
        support=Support(_NO_SCALING),
    ),
    "gemma2": Architecture(
        "gemma2",
        "Gemma2ForCausalLM",
        {**_LLAMA_NAMES, **_GEMMA_2},
        configure_gemma_2,
        shifted_norms=True,
        wide=True,
        support=Support(_NO_SCALING),
    ),
    "gemma3": Architecture(
        "gemma3_text",
        "Gemma3ForCausalLM",
        {**_LLAMA_NAMES, **_GEMMA_2},
        configure_gemma_3,
        shifted_norms=True,
        wide=True,
    ),
    "phi3": Architecture(
        "phi3",
        "Phi3ForCausalLM",
        {**_ATTENTION, **_PHI_3},
        configure_phi_3,
        support=Support(frozenset({"longrope"}), head_dim=False, partial_rotary=True),
    ),
    "smollm3": Architecture(
        "smollm3", "SmolLM3ForCausalLM", _LLAMA_NAMES, configure_smollm_3, permuted=True
    ),
    "granite": Architecture(
        "granite",
        "GraniteForCausalLM",
        _LLAMA_NAMES,
        configure_granite,
        permuted=True,
        support=_BY_HIDDEN,
    ),
    "seed_oss": Architecture(
        "seed_oss",
        "SeedOssForCausalLM",
        {**_LLAMA_NAMES, "post_attention_norm": "post_attention_layernorm"},
        configure_seed_oss,
    ),
    "olmo2": Architecture(
        "olmo2", "Olmo2ForCausalLM", {**_LLAMA_NAMES, **_OLMO_2}, configure_llama
    ),
    "gpt-oss": Architecture(
        "gpt_oss",
        "GptOssForCausalLM",
        {**_ATTENTION, **_GPT_OSS},
        configure_gpt_oss,
        wide=True,
        support=Support(ALL_SCALINGS - {"longrope"}),
    ),
}
_MINISTRAL_FAMILY = Architecture(
    "ministral3", "Ministral3ForCausalLM", _LLAMA_NAMES, configure_ministral_3, permuted=True
)
_MIXTRAL_FAMILY = Architecture(
    "mixtral",
    "MixtralForCausalLM",
    {**_ATTENTION, **_MIXTRAL},
    configure_mixtral,
    permuted=True,
    support=Support(_NO_SCALING, head_dim=False),
)
_OLMO_3_FAMILY = Architecture(
    "olmo3", "Olmo3ForCausalLM", {**_LLAMA_NAMES, **_OLMO_2}, configure_olmo_3
)
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
