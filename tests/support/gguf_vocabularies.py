"""Vocabularies of llama.cpp with its own texts and tokens (``models/ggml-vocab-*.gguf``).

They lie in the source archive of llama-cpp-python on PyPI, in vendor/llama.cpp/models. A cut of
them is in the repository: of each vocabulary what its texts need. To make it again:

    python -m tests.support.gguf_vocabularies vendor/llama.cpp/models [NAME ...]
"""

import json
import lzma
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from unicodedata import normalize

import numpy as np
from tokenizers import Tokenizer

from requant.gguf.header import read_header
from requant.gguf.metadata import Metadata
from requant.gguf.tokenizer import tokenizer_files

CUT = Path(__file__).parent / "gguf_vocabularies.json.xz"
_BETWEEN = "\n__ggml_vocab_test__\n"
# Qwen's own tokenizers compose letters and accents before (NFC), llama.cpp does not: the numbers
# of a text that is not composed are those of llama.cpp without that step.
COMPOSED = ("qwen2", "qwen35")


def read_metadata(path: Path) -> Metadata:
    header, problems = read_header(path.parent, path.name, path.stat().st_size)
    assert header is not None and not problems
    return Metadata(path.name, header.metadata)


def texts_of(path: Path) -> list[tuple[str, list[int]]]:
    """Texts, each with its tokens; the last separator ends the file."""
    texts = Path(f"{path}.inp").read_text(encoding="utf-8").split(_BETWEEN)
    lines = Path(f"{path}.out").read_text().splitlines()
    tokens = [[int(x) for x in line.split()] for line in lines]
    return list(zip(texts[: len(tokens)], tokens, strict=True))


def tokenizer_of(metadata: Metadata, *, composed: bool = True) -> Tokenizer:
    files, why = tokenizer_files(metadata)
    assert not why, why
    made = json.loads(files["tokenizer.json"]())
    if not composed:
        made["normalizer"] = None
    return Tokenizer.from_str(json.dumps(made))


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    found: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return found


@cache
def cut_vocabularies() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(lzma.decompress(CUT.read_bytes()))
    return found


def _cut(path: Path) -> dict[str, Any]:
    """The tokens that the texts of a vocabulary can meet, in their order, and its settings."""
    metadata = read_metadata(path)
    tokens = metadata.words("tokenizer.ggml.tokens")
    kinds = metadata.numbers("tokenizer.ggml.token_type")
    scores = metadata.numbers("tokenizer.ggml.scores")
    vectors = texts_of(path)
    merges = [merge.partition(" ")[::2] for merge in metadata.words("tokenizer.ggml.merges")]
    made = tokenizer_of(metadata, composed=metadata.word("tokenizer.ggml.pre") not in COMPOSED)
    texts = {form for text, _ in vectors for form in (text, normalize("NFC", text))}
    pieces = {
        piece
        for text in texts
        for word, _ in _words(made, text)
        for start in range(len(word))
        for piece in (word[start : start + length] for length in range(1, 24))
    }
    if metadata.word("tokenizer.ggml.model") == "bert":
        pieces |= {f"\u2581{piece}" for piece in pieces}
    wanted = {number for _, found in vectors for number in found}
    kept = [
        number
        for number, token in enumerate(tokens)
        if number in wanted or token in pieces or (kinds is not None and kinds[number] != 1)
    ]
    names = {tokens[number] for number in kept}
    place = {number: n for n, number in enumerate(kept)}
    cut: dict[str, Any] = {
        key: metadata.values[key]
        for key in ("tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.ggml.add_space_prefix")
        if key in metadata.values
    }
    for key in ("bos", "eos", "unknown", "padding", "cls", "seperator", "mask"):
        number = metadata.values.get(f"tokenizer.ggml.{key}_token_id")
        if number in place:
            cut[f"tokenizer.ggml.{key}_token_id"] = place[number]
    cut["tokenizer.ggml.tokens"] = [tokens[number] for number in kept]
    cut["tokenizer.ggml.token_type"] = [] if kinds is None else [int(kinds[n]) for n in kept]
    if scores is not None and not merges:
        cut["tokenizer.ggml.scores"] = [float(scores[n]) for n in kept]
    cut["tokenizer.ggml.merges"] = [
        f"{left} {right}" for left, right in merges if {left, right, left + right} <= names
    ]
    return {
        "metadata": cut,
        "vectors": [[text, [place[n] for n in found]] for text, found in vectors],
    }


def _words(made: Tokenizer, text: str) -> Iterator[tuple[str, Any]]:
    text = made.normalizer.normalize_str(text) if made.normalizer else text
    if made.pre_tokenizer is None:
        return iter([(text, None)])
    return iter(made.pre_tokenizer.pre_tokenize_str(text))


def metadata_of(name: str) -> Metadata:
    """Metadata of a vocabulary of the cut."""
    values = {
        key: np.array(value) if key.endswith(("token_type", "scores")) else value
        for key, value in cut_vocabularies()[name]["metadata"].items()
    }
    for key in ("tokens", "merges"):
        values[f"tokenizer.ggml.{key}"] = tuple(values[f"tokenizer.ggml.{key}"])
    return Metadata(f"{name}.gguf", values)


if __name__ == "__main__":
    place = Path(sys.argv[1])
    found = cut_vocabularies() if CUT.exists() else {}
    for path in sorted(place.glob("ggml-vocab-*.gguf")):
        name = path.stem.removeprefix("ggml-vocab-")
        if Path(f"{path}.inp").exists() and name in (sys.argv[2:] or [name]):
            found[name] = _cut(path)
            print(name, len(found[name]["metadata"]["tokenizer.ggml.tokens"]), flush=True)
            CUT.write_bytes(lzma.compress(json.dumps(found).encode()))
