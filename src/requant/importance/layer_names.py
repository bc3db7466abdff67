"""Identify a layer by its name in Hugging Face's, an MLX library's or llama.cpp's convention.

Every name becomes a key, where possible in llama.cpp's terms (gguf-py's tensor map,
ggml-org/llama.cpp gguf-py/gguf/tensor_mapping.py): number of the block, name of the part, number
of the expert.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class LayerKey(NamedTuple):
    """A layer, in whichever convention it was named."""

    block: int  # number of its block; -1 outside of blocks
    part: str  # ``attn_q``, ``ffn_down_exps``, ``output``, ...; else its path in the block
    # Its number if each expert has a name; None for a stack, and without experts.
    expert: int | None = None


# Modules around a language model's blocks. Towers for images and sound, encoders and MTP heads
# number their blocks from 0 too, and must not match.
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
    **dict.fromkeys(("embed_tokens", "tok_embeddings", "word_embeddings", "wte"), "token_embd"),
    **dict.fromkeys(("lm_head", "embed_out", "output"), "output"),
    "token_embd": "token_embd",
}
_IN_ATTENTION = {
    **dict.fromkeys(("q_proj", "wq"), "attn_q"),
    **dict.fromkeys(("k_proj", "wk"), "attn_k"),
    **dict.fromkeys(("v_proj", "wv"), "attn_v"),
    **dict.fromkeys(("o_proj", "wo", "out_proj", "dense", "c_proj"), "attn_output"),
    **dict.fromkeys(("qkv_proj", "query_key_value", "c_attn"), "attn_qkv"),
    "q_a_proj": "attn_q_a",
    "q_b_proj": "attn_q_b",
    "kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "kv_b_proj": "attn_kv_b",
}
_IN_MLP = {
    **dict.fromkeys(("gate_proj", "w1"), "ffn_gate"),
    **dict.fromkeys(("up_proj", "w3", "fc1", "c_fc", "dense_h_to_4h"), "ffn_up"),
    **dict.fromkeys(("down_proj", "w2", "fc2", "dense_4h_to_h", "c_proj"), "ffn_down"),
    "gate_up_proj": "ffn_gate_up",
}
# Paths in a block whose last name alone does not say what they are.
_WHOLE = {
    "linear_attn.in_proj_qkv": "attn_qkv",
    "linear_attn.in_proj_z": "attn_gate",
    "shared_mlp.input_linear": "ffn_gate_up_shexp",
    "shared_mlp.output_linear": "ffn_down_shexp",
    **{f"mixer.{x}_proj": f"attn_{x}" for x in "qkv"},
    "mixer.o_proj": "attn_output",
    "mixer.fc1_latent_proj": "ffn_latent_down",
    "mixer.fc2_latent_proj": "ffn_latent_up",
    **{f"attention.self.{x}": f"attn_{x[0]}" for x in ("query", "key", "value")},
    "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down",
    "mlp.gated_layers": "ffn_up",
    "mlp.wo": "ffn_down",
    "attn.Wqkv": "attn_qkv",
    "mlp.fc11": "ffn_up",
    "mlp.fc12": "ffn_gate",
    **{f"layer.0.SelfAttention.{x}": f"attn_{x}" for x in "qkvo"},
    "layer.1.DenseReluDense.wi_0": "ffn_gate",
    "layer.1.DenseReluDense.wi_1": "ffn_up",
    "layer.1.DenseReluDense.wo": "ffn_down",
}
# Layers with the same input: the statistics of one hold for the others.
_SAME_INPUT = (
    ("attn_q", "attn_k", "attn_v", "attn_qkv"),
    ("attn_q_a", "attn_kv_a_mqa"),
    ("ffn_gate", "ffn_up", "ffn_gate_up"),
    ("ffn_gate_exps", "ffn_up_exps", "ffn_gate_up_exps"),
    ("ffn_gate_shexp", "ffn_up_shexp", "ffn_gate_up_shexp"),
)
_SIBLINGS: dict[str, tuple[str, ...]] = {part: family for family in _SAME_INPUT for part in family}
# A head that has been copied from the embedding: only a head has statistics under its name.
_SIBLINGS["output"] = ("token_embd",)


def layer_key(path: str) -> LayerKey | None:
    """The key of a layer path without ``.weight``; None outside of the language model.

    A layer of a block that llama.cpp does not have is known by its path in the block, whatever
    modules the library puts around the blocks.

    Paths are ``model.layers.0.self_attn.q_proj``, ``blk.0.attn_q``, ``lm_head``, ...
    """
    if match := _GGUF_BLOCK.fullmatch(path):
        block, part, expert = int(match[1]), match[2], match[3]
        return LayerKey(block, part) if expert is None else _expert(block, part, expert)
    match = _BLOCK.fullmatch(path)
    if match is None:
        outside = _OUTSIDE.fullmatch(path)
        top = None if outside is None else _TOP.get(outside[1])
        return None if top is None else LayerKey(-1, top)
    block, rest = int(match[1]), match[2]
    if rest in _WHOLE:
        return LayerKey(block, _WHOLE[rest])
    in_attention = _ATTENTION.search(rest) is not None
    part = (_IN_ATTENTION if in_attention else _IN_MLP).get(rest.rpartition(".")[2], "")
    if not part:
        return LayerKey(block, rest)
    if in_attention:
        return LayerKey(block, part)
    if _SHARED.search(rest):
        return LayerKey(block, f"{part}_shexp")
    if not _EXPERTS.search(rest):
        return LayerKey(block, part)
    one = _EXPERT.search(rest)
    return _expert(block, part, None if one is None else one[1])


def _expert(block: int, part: str, number: str | None) -> LayerKey:
    return LayerKey(block, f"{part}_exps", None if number is None else int(number))


def same_input(key: LayerKey) -> list[LayerKey]:
    """The keys of the layers with the same input, the layer's own first."""
    parts = [key.part, *(p for p in _SIBLINGS.get(key.part, ()) if p != key.part)]
    return [key._replace(part=part) for part in parts]
