"""Tokenizers from metadata, run by the tokenizers package."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from requant.gguf.metadata import Metadata
from requant.gguf.tokenizer import tokenizer_files

SPACE = "\u2581"
PIECES = ["a", "b", "c", SPACE, "ab", "bc", "abc", SPACE + "a", SPACE + "ab", "cc", "ca", "bca"]


def metadata(**values: Any) -> Metadata:
    found = {f"tokenizer.ggml.{key}": value for key, value in values.items()}
    return Metadata("m.gguf", {"general.architecture": "llama"} | found)


def sentencepiece(scores: list[float], **more: Any) -> tuple[Tokenizer, dict[str, Any]]:
    """Three special tokens, 256 bytes, then the pieces."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), *PIECES]
    types = [2, 3, 3] + [6] * 256 + [1] * len(PIECES)
    files, why = tokenizer_files(
        metadata(
            model="llama",
            tokens=tuple(tokens),
            token_type=np.array(types, np.int32),
            scores=np.array([0.0] * 259 + scores, np.float32),
            bos_token_id=1,
            eos_token_id=2,
            unknown_token_id=0,
            **more,
        )
    )
    assert not why
    made = {name: json.loads(make()) for name, make in files.items()}
    return Tokenizer.from_str(json.dumps(made["tokenizer.json"])), made["tokenizer_config.json"]


def merged(text: str, scores: list[float]) -> list[str]:
    """SentencePiece's rule: join the neighbours that make the best piece, the left pair first."""
    best = dict(zip(PIECES, scores, strict=True))
    parts = list(text)
    while True:
        pairs = [
            (best[a + b], -n) for n, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in best
        ]
        if not pairs:
            return parts
        at = -max(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


@settings(max_examples=80)
@given(text=st.text("abc ", min_size=1, max_size=20), order=st.permutations(range(len(PIECES))))
def test_sentencepiece_merges_by_score(text: str, order: list[int]) -> None:
    scores = [-float(rank) for rank in order]
    tokenizer, _ = sentencepiece(scores)
    wanted = merged(SPACE + text.replace(" ", SPACE), scores)
    assert tokenizer.encode(text).tokens == ["<s>", *wanted]


def test_sentencepiece_details() -> None:
    scores = [-float(n) for n in range(len(PIECES))]
    tokenizer, config = sentencepiece(scores)
    assert tokenizer.encode("d\u00e9").tokens[2:] == ["<0x64>", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokenizer.encode("abc d\u00e9 </s>").ids) == "abc d\u00e9 "
    assert (config["bos_token"], config["eos_token"], config["unk_token"]) == (
        "<s>",
        "</s>",
        "<unk>",
    )
    bare, _ = sentencepiece(scores, add_space_prefix=False, add_bos_token=False)
    assert bare.encode("ab").tokens == ["ab"]
    assert bare.decode(bare.encode(" ab").ids) == " ab"


@pytest.mark.parametrize("begins", [True, False])
def test_texts_end_where_the_file_says_so(begins: bool) -> None:
    scores = [-float(n) for n in range(len(PIECES))]
    tokenizer, config = sentencepiece(scores, add_eos_token=True, add_bos_token=begins)
    assert config["add_eos_token"] is True
    first = ["<s>"] * begins
    one, two = SPACE + "ab", SPACE + "a"
    assert tokenizer.encode("ab").tokens == [*first, one, "</s>"]
    assert tokenizer.encode("ab", "a").tokens == [*first, one, "</s>", *first, two, "</s>"]
    _, config = sentencepiece(scores)
    assert config["add_eos_token"] is False


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("gpt-2", ["It", "'s", " 1234", "x"]),
        ("smollm", ["It", "'s", " ", "1", "2", "3", "4", "x"]),
        ("dbrx", ["It", "'s", " ", "123", "4", "x"]),
        ("llama-bpe", ["It", "'s", " ", "123", "4", "x"]),
        ("qwen2", ["It", "'s", " ", "1", "2", "3", "4", "x"]),
        ("gpt-4o", ["It's", " ", "123", "4", "x"]),
        ("tekken", ["It", "'s", " ", "1", "2", "3", "4", "x"]),
        ("deepseek-v3", ["It", "'s", " ", "123", "4", "x"]),
        ("deepseek-coder", ["It", "'", "s", " ", "1", "2", "3", "4", "x"]),
        ("", ["It", "'s", " 1234", "x"]),
    ],
)
def test_words_are_split_as_the_name_says(pre: str, words: list[str]) -> None:
    letters = sorted({*"It's1234x", "\u0120"})
    files, why = tokenizer_files(
        metadata(
            model="gpt2",
            pre=pre,
            tokens=(*letters, "<|end|>"),
            token_type=np.array([1] * len(letters) + [3], np.int32),
            merges=("I t",),
        )
    )
    assert not why
    tokenizer = Tokenizer.from_str(files["tokenizer.json"]().decode())
    assert tokenizer.pre_tokenizer is not None
    found = tokenizer.pre_tokenizer.pre_tokenize_str("It's 1234x")
    assert [word.replace("\u0120", " ") for word, _ in found] == words
    assert tokenizer.encode("It<|end|>").tokens == ["I", "t", "<|end|>"]


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({}, "the file holds no tokenizer"),
        ({"model": "t5", "tokens": ("a",)}, "is of kind 't5'"),
        ({"model": "gpt2", "pre": "new", "tokens": ("a",)}, "splits words ('new') is not known"),
    ],
)
def test_what_is_not_known_is_said(values: dict[str, Any], why: str) -> None:
    files, found = tokenizer_files(metadata(**values))
    assert not files
    assert why in found
