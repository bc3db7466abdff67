"""Tokens with a part to play: their kinds, and those that begin and end texts.

The facts are llama.cpp's (ggml-org/llama.cpp src/llama-vocab.cpp, gguf-py/gguf/constants.py): it
finds tokens that end an answer by their text too, since many files do not name them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from requant.gguf.metadata import Metadata

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
"""``tokenizer.ggml.token_type``."""

_ENDS = {
    *("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|endoftext|>", "<|im_end|>", "<|end|>"),
    *("<|return|>", "<|call|>", "<|calls|>", "<|flush|>", "<end_of_turn>", "<end_of_utterance>"),
    *("<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<eos>", "<turn|>", "<|tool_response>", "[e~["),
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
}
# Only where the file has it as a control token: it is a tag of HTML to some vocabularies.
_END_OF_TEXT = "</s>"
# <|end|> ends one message of several where these are there too (gpt-oss, Solar Open).
_MESSAGES = ({"<|return|>", "<|call|>"}, {"<|flush|>", "<|call|>"}, {"<|flush|>", "<|calls|>"})
_UNNAMED = {  # kind of vocabulary -> tokens where a file names none
    "llama": {"bos": 1, "eos": 2, "unknown": 0},
    "bert": {"cls": 101, "seperator": 102, "unknown": 100, "padding": 0, "mask": 103},
    "t5": {"eos": 1, "unknown": 2, "padding": 0},
}


def token_kinds(metadata: Metadata) -> list[int]:
    """The kind of each token; what ends an answer is a control token whatever the file says."""
    tokens = metadata.words("tokenizer.ggml.tokens")
    found = metadata.numbers("tokenizer.ggml.token_type")
    kinds = [] if found is None else _whole(found[: len(tokens)])
    kinds += [NORMAL] * (len(tokens) - len(kinds))
    return [CONTROL if token in _ENDS else kind for token, kind in zip(tokens, kinds, strict=True)]


def _whole(found: np.ndarray) -> list[int]:
    """Kinds as whole numbers, whatever numbers a file has for them."""
    wide = np.nan_to_num(found.astype(np.float64), nan=NORMAL)
    kinds: list[int] = wide.clip(0, 255).astype(np.int64).tolist()
    return kinds


def special_id(metadata: Metadata, part: str) -> int | None:
    """The number of the token that plays a part: "bos", "eos", "eot", "unknown", "padding", ...

    The part of a separator is "seperator": llama.cpp spells it so.
    """
    number = metadata.find_int(f"tokenizer.ggml.{part}_token_id")
    if number is None:
        number = _UNNAMED.get(metadata.word("tokenizer.ggml.model"), {}).get(part)
    tokens = metadata.words("tokenizer.ggml.tokens")
    return None if number is None or (tokens and number >= len(tokens)) else number


def special_ids(metadata: Metadata) -> dict[str, Any]:
    """Tokens that begin and end texts, as config.json names them."""
    ids: dict[str, Any] = {}
    for name, part in (("bos", "bos"), ("pad", "padding")):
        if (number := special_id(metadata, part)) is not None:
            ids[f"{name}_token_id"] = number
    named = [special_id(metadata, part) for part in ("eos", "eot", "eom")]
    ends = list(dict.fromkeys([*(n for n in named if n is not None), *_ends_by_text(metadata)]))
    if ends:
        ids["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    return ids


def _ends_by_text(metadata: Metadata) -> list[int]:
    """Numbers of the tokens that end an answer by their text."""
    kinds = token_kinds(metadata)
    found = {
        token: number
        for number, token in enumerate(metadata.words("tokenizer.ggml.tokens"))
        if token in _ENDS or (token == _END_OF_TEXT and kinds[number] == CONTROL)
    }
    if any(found.keys() >= several for several in _MESSAGES):
        found.pop("<|end|>", None)
    if "<|tool_response>" in found:
        found.pop(_END_OF_TEXT, None)
    return sorted(found.values())
