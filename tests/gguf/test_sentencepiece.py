"""Tokenizers of SentencePiece files, against SentencePiece itself and transformers' reader."""

import importlib
import io
import itertools
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from requant.gguf.metadata import Metadata
from requant.gguf.tokenizer import tokenizer_files

sentencepiece = pytest.importorskip("sentencepiece")

DOCS = Path(__file__).resolve().parents[2] / "docs"
TEXT = st.text(
    st.one_of(
        st.sampled_from("the quant of a 12, .\n\t"), st.characters(exclude_categories=["Cs"])
    ),
    max_size=40,
)


@cache
def trained(prefix: bool, symbols: tuple[str, ...] = ()) -> Any:
    """A small BPE model with bytes for what it does not know, as Llama 2's and Gemma's have."""
    lines = itertools.chain.from_iterable(
        path.read_text().splitlines() for path in sorted(DOCS.glob("*.md"))
    )
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for line in lines if line.strip()),
        model_writer=model,
        model_type="bpe",
        vocab_size=900,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=prefix,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        user_defined_symbols=list(symbols),
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def fields(model: Any, prefix: bool) -> dict[str, Any]:
    """What llama.cpp's converter takes from it."""
    count = range(model.get_piece_size())
    kinds = [
        2 if model.is_unknown(n) else 3 if model.is_control(n) else 6 if model.is_byte(n) else 1
        for n in count
    ]
    return {
        "model": "llama",
        "tokens": tuple(model.id_to_piece(n) for n in count),
        "scores": np.array([model.get_score(n) for n in count], np.float32),
        "token_type": np.array(kinds, np.int32),
        **{"bos_token_id": model.bos_id(), "eos_token_id": model.eos_id()},
        **{"unknown_token_id": model.unk_id(), "add_space_prefix": prefix, "add_bos_token": True},
    }


RUNS = ("\u2581\u2581", "\u2581\u2581\u2581", "\n\n", "<td>")


@pytest.mark.slow
@settings(max_examples=150)
@given(text=st.text("ab <td>\n", max_size=30))
def test_runs_of_spaces_as_gemma_has_them(text: str) -> None:
    """Symbols of the user's: the converter writes them with the spaces that they represent."""
    model = trained(False, RUNS)
    stored = fields(model, False)
    kinds = [4 if piece in RUNS else kind for piece, kind in zip(*by_piece(stored), strict=True)]
    tokens = [p.replace("\u2581", " ") if p in RUNS else p for p in stored["tokens"]]
    stored |= {"token_type": np.array(kinds, np.int32), "tokens": tuple(tokens)}
    values = {f"tokenizer.ggml.{key}": value for key, value in stored.items()}
    files, _ = tokenizer_files(Metadata("m.gguf", values))
    tokenizer = Tokenizer.from_str(files["tokenizer.json"]().decode())
    found = tokenizer.encode(text, add_special_tokens=False).ids
    assert found == model.encode(text)
    assert tokenizer.decode(found) == text


def by_piece(stored: dict[str, Any]) -> tuple[tuple[str, ...], list[int]]:
    return stored["tokens"], stored["token_type"].tolist()


@cache
def ours(prefix: bool) -> tuple[Tokenizer, Any]:
    model = trained(prefix)
    values = {f"tokenizer.ggml.{key}": value for key, value in fields(model, prefix).items()}
    files, why = tokenizer_files(Metadata("m.gguf", values))
    assert not why
    return Tokenizer.from_str(files["tokenizer.json"]().decode()), model


@pytest.mark.parametrize("prefix", [True, False])
@settings(max_examples=150)
@given(text=TEXT)
def test_numbers_are_those_of_sentencepiece(prefix: bool, text: str) -> None:
    # SentencePiece ends a text at one character and takes another for a space; tokens of control
    # are text to it when they are spelled out, and the next test's.
    tokenizer, model = ours(prefix)
    text = re.sub("\0|\u2581|</?s>|<unk>", "", text)
    assert tokenizer.encode(text, add_special_tokens=False).ids == model.encode(text)


@pytest.mark.parametrize("prefix", [True, False])
def test_control_tokens_that_a_text_spells_out(prefix: bool) -> None:
    """As transformers reads them, and as chat templates write them; bytes spelled out are text."""
    tokenizer, model = ours(prefix)
    begin, end = model.bos_id(), model.eos_id()
    found = tokenizer.encode("<s>the quant</s>", add_special_tokens=False).ids
    assert found == [begin, *model.encode("the quant"), end]
    spelled = tokenizer.encode("a<0x41>b", add_special_tokens=False).ids
    assert spelled == model.encode("a<0x41>b")


@pytest.mark.parametrize("prefix", [True, False])
def test_texts_of_the_documents(prefix: bool) -> None:
    """Long ones too, and back."""
    tokenizer, model = ours(prefix)
    for path in sorted(DOCS.glob("*.md")):
        text = path.read_text()
        numbers = model.encode(text)
        assert tokenizer.encode(text).ids == [model.bos_id(), *numbers]
        assert tokenizer.decode(numbers) == text == model.decode(numbers)


@pytest.mark.parametrize("architecture", ["phi3", "gemma2", "llama"])
def test_transformers_makes_the_same(architecture: str) -> None:
    """Of words; it treats spaces before and after them in three ways, by the architecture."""
    mapping = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
    prefix = architecture != "gemma2"
    tokenizer, model = ours(prefix)
    stored = fields(model, prefix)
    names = {"model": "tokenizer_type", "unknown_token_id": "unk_token_id"}
    given = {names.get(key, key): value for key, value in stored.items()}
    given |= {key: stored[key].tolist() for key in ("scores", "token_type")}
    theirs, _ = mapping.convert_gguf_tokenizer(architecture, given)
    for line in (DOCS / "reliability.md").read_text().splitlines():
        text = " ".join(line.split())
        if not text:
            continue
        wanted = tokenizer.encode(text, add_special_tokens=False).ids
        assert theirs.encode(text, add_special_tokens=False).ids == wanted


@cache
def unigram() -> Any:
    """A small Unigram model, as T5's is: texts are normalized, and runs of spaces are one."""
    lines = itertools.chain.from_iterable(
        path.read_text().splitlines() for path in sorted(DOCS.glob("*.md"))
    )
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for line in lines if line.strip()),
        model_writer=model,
        model_type="unigram",
        vocab_size=700,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


@cache
def unigram_tokenizer() -> Tokenizer:
    """From what the converter takes from the model, with its table of characters."""
    model = unigram()
    proto = importlib.import_module("sentencepiece.sentencepiece_model_pb2").ModelProto()
    proto.ParseFromString(model.serialized_model_proto())
    table = np.frombuffer(proto.normalizer_spec.precompiled_charsmap, np.uint8)
    stored = fields(model, True) | {"model": "t5", "remove_extra_whitespaces": True}
    stored |= {"precompiled_charsmap": table}
    values = {f"tokenizer.ggml.{key}": value for key, value in stored.items()}
    files, why = tokenizer_files(Metadata("m.gguf", values))
    assert not why
    return Tokenizer.from_str(files["tokenizer.json"]().decode())


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(text=TEXT)
def test_unigram(text: str) -> None:
    assert unigram_tokenizer().encode(text, add_special_tokens=False).ids == unigram().encode(text)
