"""Tokenizers of llama.cpp's own vocabularies give its own tokens for its own texts."""

import os
from pathlib import Path
from unicodedata import is_normalized, normalize

import pytest

from requant.gguf.metadata import Metadata
from tests.support.gguf_vocabularies import (
    COMPOSED,
    cut_vocabularies,
    encode,
    metadata_of,
    read_metadata,
    texts_of,
    tokenizer_of,
)

WHERE = "REQUANT_LLAMA_CPP_MODELS"
"""The folder with llama.cpp's vocabularies: the test of all of them runs where it is set."""
COUNT = 15  # vocabularies with texts in llama-cpp-python 0.3.36


def assert_same(metadata: Metadata, vectors: list[tuple[str, list[int]]], pre: str) -> None:
    """Every text; those that are not composed without that step, and composed as if they were."""
    tokenizer, plain = tokenizer_of(metadata), tokenizer_of(metadata, composed=False)
    for text, tokens in vectors:
        if pre in COMPOSED and not is_normalized("NFC", text):
            assert encode(plain, text) == tokens, text
            assert encode(tokenizer, text) == encode(tokenizer, normalize("NFC", text)), text
        else:
            assert encode(tokenizer, text) == tokens, text


@pytest.mark.parametrize("name", cut_vocabularies())
def test_texts_of_llama_cpp(name: str) -> None:
    """With the part of each vocabulary that its texts need."""
    metadata = metadata_of(name)
    vectors = [(text, tokens) for text, tokens in cut_vocabularies()[name]["vectors"]]
    assert len(vectors) >= 46
    assert_same(metadata, vectors, metadata.word("tokenizer.ggml.pre"))


def test_the_cut_has_every_vocabulary() -> None:
    assert len(cut_vocabularies()) == COUNT


@pytest.mark.slow
def test_whole_vocabularies() -> None:
    """Every vocabulary of the source archive of llama-cpp-python, whole."""
    place = os.environ.get(WHERE)
    if place is None:
        pytest.skip(f"{WHERE} names no folder with llama.cpp's vocabularies")
    paths = [p for p in Path(place).glob("ggml-vocab-*.gguf") if Path(f"{p}.inp").exists()]
    assert len(paths) >= COUNT
    for path in paths:
        metadata = read_metadata(path)
        assert_same(metadata, texts_of(path), metadata.word("tokenizer.ggml.pre"))
