"""When two names mean one layer: Hugging Face's, mlx-lm's and llama.cpp's.

Every name becomes a key in llama.cpp's words (gguf-py's tensor map, ggml-org/llama.cpp
gguf-py/gguf/tensor_mapping.py): the number of the block, what the layer is, and which expert.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class LayerKey(NamedTuple):
    """A layer, whoever named it.

    Attributes:
        block: Number of its block; -1 outside of blocks.
        part: What it is: ``attn_q``, ``ffn_down_exps``, ``output``.
        expert: Its number where experts have a name each; None for a stack, or no expert.
    """

    block: int
    part: str
    expert: int | None = None


# What a language model's blocks are in. Towers for images and sound, encoders and MTP heads
# number their blocks from 0 too, and must not be taken for it.
_TEXT = (
    r"(?:(?:model|language_model|text_model|transformer|gpt_neox|backbone|decoder|layers|llm"
    r"|base_model|thinker|transformer\.encoder)\.)*"
)
_BLOCK = re.compile(_TEXT + r"(?:layers|blocks|block|h)\.(\d{1,6})\.(.+)")
_OUTSIDE = re.compile(_TEXT + r"(?:embeddings\.)?([a-z_]+)")
_GGUF_BLOCK = re.compile(r"blk\.(\d{1,6})\.([a-z_0-9]+)(?:\.(\d{1,6}))?")
_EXPERT = re.compile(r"(?:^|\.)experts\.(\d{1,6})\.")
_EXPERTS = re.compile(r"(?:^|\.)(?:experts|switch_mlp|switch_glu)(?:\.|$)")
_SHARED = re.compile(r"(?:^|\.)shared_(?:experts?|mlp)\.")
_ATTENTION = re.compile(r"(?:^|\.)(?:self_attn|self_attention|attention|attn)\.(?!indexer\.)")
_TOP = {
    "embed_tokens": "token_embd",
    "tok_embeddings": "token_embd",
    "word_embeddings": "token_embd",
    "wte": "token_embd",
    "token_embd": "token_embd",
    "lm_head": "output",
    "embed_out": "output",
    "output": "output",
}
_IN_ATTENTION = {
    "q_proj": "attn_q",
    "wq": "attn_q",
    "k_proj": "attn_k",
    "wk": "attn_k",
    "v_proj": "attn_v",
    "wv": "attn_v",
    "o_proj": "attn_output",
    "wo": "attn_output",
    "out_proj": "attn_output",
    "dense": "attn_output",
    "c_proj": "attn_output",
    "qkv_proj": "attn_qkv",
    "query_key_value": "attn_qkv",
    "c_attn": "attn_qkv",
    "q_a_proj": "attn_q_a",
    "q_b_proj": "attn_q_b",
    "kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "kv_b_proj": "attn_kv_b",
}
_IN_MLP = {
    "gate_proj": "ffn_gate",
    "w1": "ffn_gate",
    "up_proj": "ffn_up",
    "w3": "ffn_up",
    "fc1": "ffn_up",
    "c_fc": "ffn_up",
    "dense_h_to_4h": "ffn_up",
    "down_proj": "ffn_down",
    "w2": "ffn_down",
    "fc2": "ffn_down",
    "dense_4h_to_h": "ffn_down",
    "c_proj": "ffn_down",
    "gate_up_proj": "ffn_gate_up",
}
# Layers that read one input: what is known of one holds for the others.
_SAME_INPUT = (
    ("attn_q", "attn_k", "attn_v", "attn_qkv"),
    ("attn_q_a", "attn_kv_a_mqa"),
    ("ffn_gate", "ffn_up", "ffn_gate_up"),
    ("ffn_gate_exps", "ffn_up_exps", "ffn_gate_up_exps"),
    ("ffn_gate_shexp", "ffn_up_shexp", "ffn_gate_up_shexp"),
)
_SIBLINGS = {part: family for family in _SAME_INPUT for part in family}


def layer_key(path: str) -> LayerKey | None:
    """The key of a layer path, without ``.weight``; None for a layer that llama.cpp has not.

    Args:
        path: ``model.layers.0.self_attn.q_proj``, ``blk.0.attn_q``, ``lm_head``, ...
    """
    found = _GGUF_BLOCK.fullmatch(path)
    if found is not None:
        part, expert = found[2], found[3]
        number = None if expert is None else int(expert)
        return LayerKey(int(found[1]), part if number is None else f"{part}_exps", number)
    found = _BLOCK.fullmatch(path)
    if found is None:
        outside = _OUTSIDE.fullmatch(path)
        top = None if outside is None else _TOP.get(outside[1])
        return None if top is None else LayerKey(-1, top)
    rest = found[2]
    last = rest.rpartition(".")[2]
    if _ATTENTION.search(rest):
        part = _IN_ATTENTION.get(last, "")
        return LayerKey(int(found[1]), part) if part else None
    part = _IN_MLP.get(last, "")
    if not part:
        return None
    if _SHARED.search(rest):
        return LayerKey(int(found[1]), f"{part}_shexp")
    if not _EXPERTS.search(rest):
        return LayerKey(int(found[1]), part)
    one = _EXPERT.search(rest)
    return LayerKey(int(found[1]), f"{part}_exps", None if one is None else int(one[1]))


def same_input(key: LayerKey) -> list[LayerKey]:
    """The keys under which the same input may be found, the layer's own first."""
    parts = [key.part, *(p for p in _SIBLINGS.get(key.part, ()) if p != key.part)]
    return [key._replace(part=part) for part in parts]
