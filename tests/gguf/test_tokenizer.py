"""Tokenizers from metadata, run by the tokenizers package."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from requant.gguf.metadata import Metadata
from requant.gguf.tokenizer import missing_templates, tokenizer_files

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
        ({"model": "rwkv", "tokens": ("a",)}, "is of kind 'rwkv'"),
        ({"model": "gpt2", "pre": "new", "tokens": ("a",)}, "splits words ('new') is not known"),
    ],
)
def test_what_is_not_known_is_said(values: dict[str, Any], why: str) -> None:
    files, found = tokenizer_files(metadata(**values))
    assert not files
    assert why in found


# -- chat templates --------------------------------------------------------------------------
def templates_of(**values: Any) -> Any:
    found = metadata(model="gpt2", pre="gpt-2", tokens=("a", "b"))
    for key, value in values.items():
        found.values[f"tokenizer.{key}".replace("__", ".")] = value  # type: ignore[index]
    files, _ = tokenizer_files(found)
    made = json.loads(files["tokenizer_config.json"]())
    return made.get("chat_template"), missing_templates(found)


@pytest.mark.parametrize(
    ("values", "kept", "missing"),
    [
        ({}, None, []),
        ({"chat_template": "D"}, "D", []),
        ({"chat_template": "D", "chat_templates": ()}, "D", []),
        (
            {
                "chat_template": "D",
                "chat_templates": ("tool_use", "rag"),
                "chat_template__rag": "R",
                "chat_template__tool_use": "T",
            },
            {"default": "D", "tool_use": "T", "rag": "R"},
            [],
        ),
        (
            {"chat_template": "D", "chat_template__rag": "R"},  # not listed, and there
            {"default": "D", "rag": "R"},
            [],
        ),
        (
            {"chat_templates": ("rerank",), "chat_template__rerank": "R"},  # no default
            {"rerank": "R"},
            [],
        ),
        ({"chat_template": "D", "chat_templates": ("default", "gone")}, "D", ["gone"]),
    ],
)
def test_every_chat_template_is_kept(values: Any, kept: Any, missing: list[str]) -> None:
    found, gone = templates_of(**values)
    if isinstance(kept, dict):
        kept = [{"name": name, "template": text} for name, text in kept.items()]
    assert found == kept and gone == missing


def test_named_templates_in_transformers(tmp_path: Path) -> None:
    """The default is used without tools, tool_use with them, any other by its name."""
    transformers = pytest.importorskip("transformers")
    found = metadata(model="gpt2", pre="gpt-2", tokens=("a", "b"))
    named = {"tool_use": "tools {{ tools | length }}", "rag": "rag"}
    found.values["tokenizer.chat_template"] = "plain"  # type: ignore[index]
    found.values["tokenizer.chat_templates"] = tuple(named)  # type: ignore[index]
    for name, text in named.items():
        found.values[f"tokenizer.chat_template.{name}"] = text  # type: ignore[index]
    for name, make in tokenizer_files(found)[0].items():
        (tmp_path / name).write_bytes(make())
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    talk = [{"role": "user", "content": "a"}]
    tool = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}

    def asked(**options: Any) -> str:
        return str(tokenizer.apply_chat_template(talk, tokenize=False, **options))

    assert asked() == "plain"
    assert asked(tools=[tool]) == "tools 1"
    assert asked(chat_template="rag") == "rag"


@pytest.mark.parametrize(
    ("values", "made"),
    [
        ({}, None),
        ({"tokenizer.ggml.eos_token_id": 1}, {"eos_token_id": 1}),
        (
            {
                "general.sampling.temp": 0.7,
                "general.sampling.top_k": 20,
                "general.sampling.top_p": 0.8,
                "general.sampling.min_p": 0.05,
                "general.sampling.penalty_repeat": 1.05,
                "tokenizer.ggml.suppress_tokens": np.array([1], np.int32),
            },
            {
                "do_sample": True,
                "temperature": 0.7,
                "top_k": 20,
                "top_p": 0.8,
                "min_p": 0.05,
                "repetition_penalty": 1.05,
                "suppress_tokens": [1],
            },
        ),
        ({"general.sampling.temp": 0.0}, {"do_sample": False, "temperature": 0.0}),
    ],
)
def test_generation_config(values: dict[str, Any], made: dict[str, Any] | None) -> None:
    found = metadata(model="gpt2", pre="gpt-2", tokens=("a", "b"))
    files, _ = tokenizer_files(Metadata("m.gguf", {**found.values, **values}))
    make = files.get("generation_config.json")
    assert (None if make is None else json.loads(make())) == made


@pytest.mark.parametrize(
    ("templates", "text"),
    [
        ({"chat_template": "{{ messages }}"}, b"{{ messages }}"),
        ({}, None),
        # transformers reads no list next to the file: several stay where it finds all of them.
        ({"chat_template": "D", "chat_template.rag": "R"}, None),
    ],
)
def test_chat_template_file(templates: dict[str, str], text: bytes | None) -> None:
    found = metadata(model="gpt2", pre="gpt-2", tokens=("a", "b"))
    more = {f"tokenizer.{key}": value for key, value in templates.items()}
    files, _ = tokenizer_files(Metadata("m.gguf", {**found.values, **more}))
    make = files.get("chat_template.jinja")
    assert (None if make is None else make()) == text
