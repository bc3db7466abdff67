"""Parts of ``tokenizer.json`` for vocabularies of kinds "bert", "t5" and "gemma4".

How each kind treats a text is llama.cpp's description (ggml-org/llama.cpp src/llama-vocab.cpp,
conversion/bert.py, conversion/t5.py), in the terms of the tokenizers package.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from typing import Any

import numpy as np

from requant.gguf.metadata import Metadata
from requant.gguf.special_tokens import CONTROL, UNKNOWN

SPACE = "\u2581"
"""SentencePiece's mark of a space."""
_LONGEST_WORD = 100  # characters of a word that BERT's tokenizers still look up
_MISSING_SCORE = -10000.0


def word_pieces(tokens: Sequence[str], kinds: Sequence[int]) -> list[str]:
    """Tokens as WordPiece has them: ``##`` before those that continue a word.

    The converter marks the others, with the space before a word.
    """
    return [
        token
        if kind == CONTROL
        else token.removeprefix(SPACE)
        if token.startswith(SPACE)
        else f"##{token}"
        for token, kind in zip(tokens, kinds, strict=True)
    ]


def word_piece(
    metadata: Metadata, vocabulary: dict[str, int], unknown: str | None
) -> dict[str, Any]:
    """BERT's: words, and the longest pieces that begin what is left of a word."""
    lower = metadata.flag("tokenizer.ggml.normalizer.lowercase")
    lower = True if lower is None else lower
    accents = metadata.flag("tokenizer.ggml.normalizer.strip_accents")
    return {
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": lower if accents is None else accents,
            "lowercase": lower,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": unknown or "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": _LONGEST_WORD,
            "vocab": vocabulary,
        },
    }


def unigram(metadata: Metadata, tokens: Sequence[str], kinds: Sequence[int]) -> dict[str, Any]:
    """T5's: the pieces of a text whose scores have the largest sum."""
    stored = metadata.numbers("tokenizer.ggml.scores")
    scores = [] if stored is None else [float(x) for x in stored[: len(tokens)]]
    scores += [_MISSING_SCORE] * (len(tokens) - len(scores))
    prefix = metadata.flag("tokenizer.ggml.add_space_prefix") is not False
    merged = metadata.flag("tokenizer.ggml.remove_extra_whitespaces") is not False
    charsmap = metadata.numbers("tokenizer.ggml.precompiled_charsmap")
    steps: list[dict[str, Any]] = []
    if charsmap is not None:
        packed = b64encode(charsmap.astype(np.uint8).tobytes()).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": packed})
    if merged:
        steps.append({"type": "Strip", "strip_left": True, "strip_right": True})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    spaces = {
        "type": "Metaspace",
        "replacement": SPACE,
        "prepend_scheme": "always" if prefix else "never",
        "split": True,
    }
    unknown = next((n for n, kind in enumerate(kinds) if kind == UNKNOWN), None)
    return {
        "normalizer": {"type": "Sequence", "normalizers": steps} if steps else None,
        "pre_tokenizer": spaces,
        "decoder": spaces,
        "model": {
            "type": "Unigram",
            "unk_id": unknown,
            "vocab": [list(pair) for pair in zip(tokens, scores, strict=True)],
            "byte_fallback": False,
        },
    }


def gemma(
    vocabulary: dict[str, int], merges: list[list[str]], unknown: str | None
) -> dict[str, Any]:
    """Gemma 4's: letters of a whole text, merged in the order of the merges; bytes otherwise."""
    return {
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": merges,
        },
    }
