"""Tokenizers as metadata: what the reader makes of a file is described as the file did."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from requant.gguf.metadata import Metadata
from requant.gguf.pretokenizers import SPLITTINGS
from requant.gguf.tokenizer import tokenizer_files
from requant.gguf.tokenizer_metadata import NotWritable, tokenizer_metadata

RULES = {rule: name for name, rule in reversed(SPLITTINGS.items())}
BYTES = ["<s>", "</s>", "a", "b", "c", "ab", "abc", "<tool>"]
PIECES = ["<unk>", "<s>", "</s>", "<0x0A>", "\u2581a", "ab", "abc", "\u2581", "a", "b", "c"]


def described(values: Mapping[str, Any], rows: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The metadata of a tokenizer that was made from ``values``, and its tokenizer.json."""
    files, why = tokenizer_files(Metadata("m.gguf", values))
    assert not why
    made = {name: generate() for name, generate in files.items()}
    found = tokenizer_metadata(made, {}, rows)
    again, why = tokenizer_files(Metadata("m.gguf", found))
    assert not why
    assert {name: generate() for name, generate in again.items()} == made
    tokenizer: dict[str, Any] = json.loads(made["tokenizer.json"])
    return found, tokenizer


def keys(model: str, tokens: list[str], **more: Any) -> dict[str, Any]:
    """Metadata with begin and end of a text."""
    return {f"tokenizer.ggml.{key}": value for key, value in more.items()} | {
        "tokenizer.ggml.model": model,
        "tokenizer.ggml.tokens": tuple(tokens),
        "tokenizer.ggml.bos_token_id": tokens.index("<s>"),
        "tokenizer.ggml.eos_token_id": tokens.index("</s>"),
    }


@pytest.mark.parametrize("name", RULES.values())
def test_byte_level(name: str) -> None:
    """Every rule has its name again, or another name of the same rule; tokens are as they were."""
    values = keys(
        "gpt2",
        BYTES,
        pre=name,
        token_type=np.array([3, 3, 1, 1, 1, 1, 1, 4], np.int32),
        merges=("a b", "ab c"),
        add_bos_token=True,
        add_eos_token=False,
    )
    found, _ = described(values, rows=len(BYTES))
    rule, written = SPLITTINGS[name], SPLITTINGS[found.pop("tokenizer.ggml.pre")]
    assert written.patterns == rule.patterns and written.composed == rule.composed
    assert (written.then_gpt_2, written.whole_words_first) == (
        rule.then_gpt_2,
        rule.whole_words_first,
    )
    assert found.pop("tokenizer.ggml.token_type").tolist() == [3, 3, 1, 1, 1, 1, 1, 4]
    assert found.items() <= values.items()
    assert found.keys() == values.keys() - {"tokenizer.ggml.pre", "tokenizer.ggml.token_type"}


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece(prefix: bool) -> None:
    """Scores give the same merges; rows of the embeddings without a token get unused ones."""
    kinds = np.array([2, 3, 3, 6, 1, 1, 1, 1, 1, 1, 1], np.int32)
    scores = np.array([0, 0, 0, 0, -3, -1, -2, -9, -9, -9, -9], np.float32)
    values = keys(
        "llama",
        PIECES,
        scores=scores,
        token_type=kinds,
        add_space_prefix=prefix,
        unknown_token_id=0,
        add_bos_token=True,
        add_eos_token=False,
    )
    found, tokenizer = described(values, rows=len(PIECES))
    assert tokenizer["model"]["merges"] == [["a", "b"], ["ab", "c"], ["\u2581", "a"]]
    assert found["tokenizer.ggml.token_type"].tolist() == kinds.tolist()
    ranked = found["tokenizer.ggml.scores"][[5, 6, 4]]
    assert (np.diff(ranked) < 0).all()
    assert found["tokenizer.ggml.add_space_prefix"] is prefix
    assert found["tokenizer.ggml.unknown_token_id"] == 0


def test_unused_rows() -> None:
    """Embeddings may have more rows than there are tokens."""
    files = {
        "tokenizer.json": json.dumps(
            {
                "model": {"type": "BPE", "vocab": {"a": 0, "b": 2}, "merges": []},
                "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
            }
        ).encode()
    }
    found = tokenizer_metadata(files, {"eos_token_id": [2, 0]}, rows=4)
    assert found["tokenizer.ggml.tokens"] == ("a", "[PAD1]", "b", "[PAD3]")
    kinds = found["tokenizer.ggml.token_type"]
    assert isinstance(kinds, np.ndarray) and kinds.tolist() == [1, 5, 1, 5]
    assert found["tokenizer.ggml.eos_token_id"] == 2
    with pytest.raises(NotWritable, match="has token 2, but the embeddings have 2 rows"):
        tokenizer_metadata(files, {}, rows=2)


@pytest.mark.parametrize(
    ("settings", "file", "expected"),
    [
        ({"chat_template": "one"}, None, {"": "one"}),
        ({"chat_template": "one"}, b"two", {"": "two"}),
        ({}, None, {}),
        (
            {
                "chat_template": [
                    {"name": "default", "template": "one"},
                    {"name": "tool_use", "template": "two"},
                ]
            },
            None,
            {"": "one", ".tool_use": "two", "s": ("tool_use",)},
        ),
    ],
)
def test_chat_templates(settings: Any, file: bytes | None, expected: dict[str, Any]) -> None:
    """Of several each has a key, and a file of its own comes first."""
    tokenizer = {
        "model": {"type": "BPE", "vocab": {"a": 0}},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
    }
    files = {
        "tokenizer.json": json.dumps(tokenizer).encode(),
        "tokenizer_config.json": json.dumps(settings).encode(),
    }
    if file is not None:
        files["chat_template.jinja"] = file
    found = tokenizer_metadata(files, {}, rows=1)
    key = "tokenizer.chat_template"
    templates = {name: value for name, value in found.items() if name.startswith(key)}
    assert templates == {f"{key}{name}": value for name, value in expected.items()}
