"""Roles of layers by their names, and positions of blocks."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

# Role -> pattern on the layer path, in Hugging Face's names and in mlx-lm's.
ROLES = {
    "embedding": r"(^|[._])(embed_tokens|tok_embeddings|word_embeddings|embed_in|wte|embeddings?)$",
    "head": r"(^|\.)(lm_head|embed_out)$|^(model\.)?output$",
    "attention": r"(^|\.)(self_attn|self_attention|cross_attn|linear_attn|attention|attn)\.",
    "q_proj": r"(^|[._])(q_proj|q_a_proj|q_b_proj|wq)$",
    "k_proj": r"(^|[._])(k_proj|wk)$",
    "v_proj": r"(^|[._])(v_proj|v_a_proj|v_b_proj|wv)$",
    "o_proj": r"(^|[._])(o_proj|out_proj|wo)$",
    "gate_proj": r"(^|[._])(gate_proj|w1)$",
    "up_proj": r"(^|[._])(up_proj|w3)$",
    "down_proj": r"(^|[._])(down_proj|w2|fc2|dense_4h_to_h)$|(^|\.)mlp\.c_proj$",
    "experts": r"(^|\.)(experts|switch_mlp|switch_glu)(\.|$)",
    "shared_experts": r"(^|\.)shared_(experts?|mlp)(\.|$)",
    "router": r"(^|[._])(router|gate|shared_expert_gate)$|(^|\.)router\.",
}


_OF_TOKENS = re.compile(f"{ROLES['embedding']}|{ROLES['head']}")


def rows_are_tokens(path: str) -> bool:
    """Whether the rows of a layer's weight belong to tokens: an embedding or a head."""
    return _OF_TOKENS.search(path) is not None


_BLOCK = re.compile(r"^(?:(.*?)\.)?(\d+)(?=\.|$)")


def block_positions(paths: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Path -> index of its block, and how many blocks have the same name."""
    found = {path: match for path in paths if (match := _BLOCK.match(path))}
    blocks: dict[str | None, int] = defaultdict(int)
    for match in found.values():
        blocks[match[1]] = max(blocks[match[1]], int(match[2]) + 1)
    return {path: (int(match[2]), blocks[match[1]]) for path, match in found.items()}
