"""``tokenizer.json``, its settings and the chat template from a GGUF file's metadata.

llama.cpp stores tokens, their kinds, and merges (byte-level BPE, "gpt2"; "gemma4") or scores
(SentencePiece BPE, "llama"; Unigram, "t5"), or neither (WordPiece, "bert"). How byte-level BPE
splits a text before that is a name: ``tokenizer.ggml.pre``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from requant.gguf.generation import generation_config
from requant.gguf.metadata import Metadata
from requant.gguf.pretokenizers import SPLITTINGS, UNSAID, PreTokenizer, splitting_of
from requant.gguf.special_tokens import (
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    special_id,
    token_kinds,
)
from requant.gguf.token_models import SPACE, gemma, unigram, word_piece, word_pieces
from requant.text import format_value, join_or

_TEMPLATE = "tokenizer.chat_template"
_PARTS = {  # name in tokenizer_config.json -> llama.cpp's
    **{"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"},
    **{"cls": "cls", "sep": "seperator", "mask": "mask"},
}
_KINDS = ("bert", "gemma4", "gpt2", "llama", "t5")

Files = Mapping[str, Callable[[], bytes]]


def tokenizer_files(metadata: Metadata) -> tuple[Files, str]:
    """The files of a tokenizer by name, each made when it is needed.

    Returns:
        The files, and why there are none (or ``""``).
    """
    model = metadata.word("tokenizer.ggml.model")
    tokens = metadata.words("tokenizer.ggml.tokens")
    if model in ("", "no_vocab", "none") or not tokens:
        return {}, "the file holds no tokenizer"
    if model not in _KINDS:
        return {}, f"its tokenizer is of kind {format_value(model)}, known are {join_or(_KINDS)}"
    pre = metadata.word("tokenizer.ggml.pre")
    splitting = splitting_of(pre) if model == "gpt2" else PreTokenizer()
    if splitting is None:
        rule, known = format_value(pre), ", ".join(sorted(SPLITTINGS))
        return {}, f"how its tokenizer splits words ({rule}) is not known; known are {known}"
    maker = _Tokenizer(metadata, model, splitting, tokens)
    files = {
        "tokenizer.json": lambda: _dump(maker.tokenizer()),
        "tokenizer_config.json": lambda: _dump(maker.config()),
    }
    templates = chat_templates(metadata)
    if templates and isinstance(templates, str):  # of several transformers would see this alone
        files["chat_template.jinja"] = templates.encode
    if settings := generation_config(metadata):
        files["generation_config.json"] = lambda: _dump(settings)
    return files, ""


def guessed_splitting(metadata: Metadata) -> bool:
    """Whether a file does not name its pre-tokenizer, so that GPT-2's is used."""
    pre = metadata.word("tokenizer.ggml.pre")
    return metadata.word("tokenizer.ggml.model") == "gpt2" and pre in UNSAID


def chat_templates(metadata: Metadata) -> str | list[dict[str, str]]:
    """The chat template, or each with its name, as transformers reads them; "" where none is.

    ``tokenizer.chat_template`` is the one called default; the others have a key each, and
    ``tokenizer.chat_templates`` lists their names.
    """
    default = metadata.word(_TEMPLATE)
    found = {"default": default} if default else {}
    listed = metadata.words(f"{_TEMPLATE}s")
    keys = (key for key in metadata.values if key.startswith(f"{_TEMPLATE}."))
    for name in dict.fromkeys([*listed, *(key.removeprefix(f"{_TEMPLATE}.") for key in keys)]):
        if template := metadata.word(f"{_TEMPLATE}.{name}"):
            found.setdefault(name, template)
    if found.keys() <= {"default"}:
        return found.get("default", "")
    return [{"name": name, "template": template} for name, template in found.items()]


def missing_templates(metadata: Metadata) -> list[str]:
    """Names of chat templates that a file lists and does not hold."""
    listed = metadata.words(f"{_TEMPLATE}s")
    default = {"default"} if metadata.word(_TEMPLATE) else set()
    return [
        name for name in listed if name not in default and not metadata.word(f"{_TEMPLATE}.{name}")
    ]


def _dump(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode()


class _Tokenizer:
    """One tokenizer, put together from its metadata."""

    def __init__(
        self, metadata: Metadata, model: str, splitting: PreTokenizer, tokens: tuple[str, ...]
    ) -> None:
        self.metadata, self.model, self.tokens = metadata, model, tokens
        self.splitting = splitting
        self.types = token_kinds(metadata)
        if model == "bert":
            self.tokens = tuple(word_pieces(tokens, self.types))

    def _special(self, part: str) -> str | None:
        """The token that plays a part, as ``special_id`` calls it."""
        number = special_id(self.metadata, part)
        return None if number is None else self.tokens[number]

    def _begins(self) -> str | None:
        first = self._special("cls") if self.model == "bert" else None
        return first or self._special("bos")

    def _ends(self) -> str | None:
        last = self._special("seperator") if self.model == "bert" else None
        return last or self._special("eos")

    @property
    def adds_bos(self) -> bool:
        """Whether every text begins with the token for that."""
        declared = self.metadata.flag("tokenizer.ggml.add_bos_token")
        if declared is None:
            return self.model in ("llama", "bert") or self.splitting.adds_bos
        return declared

    @property
    def adds_eos(self) -> bool:
        """Whether every text ends with the token for that."""
        declared = self.metadata.flag("tokenizer.ggml.add_eos_token")
        return self.model in ("bert", "t5") if declared is None else declared

    def config(self) -> dict[str, Any]:
        """``tokenizer_config.json``."""
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "add_bos_token": self.adds_bos,
            "add_eos_token": self.adds_eos,
        }
        for name, part in _PARTS.items():
            if (token := self._special(part)) is not None:
                config[f"{name}_token"] = token
        length = self.metadata.find_int(f"{self.metadata.architecture}.context_length")
        if length:
            config["model_max_length"] = length
        if templates := chat_templates(self.metadata):
            config["chat_template"] = templates
        return config

    def tokenizer(self) -> dict[str, Any]:
        """``tokenizer.json``."""
        makers: dict[str, Callable[[], dict[str, Any]]] = {
            **{"bert": self._word_piece, "gemma4": self._gemma, "gpt2": self._byte_level},
            **{"llama": self._sentencepiece, "t5": self._unigram},
        }
        parts = makers[self.model]()
        limits = {"truncation": None, "padding": None}
        return {"version": "1.0", **limits, "added_tokens": self._added(), **parts}

    def _added(self) -> list[dict[str, Any]]:
        return [
            {
                "id": number,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": kind != USER_DEFINED,
            }
            for number, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True))
            if kind in (CONTROL, USER_DEFINED, UNKNOWN)
        ]

    def _post_processor(self, otherwise: dict[str, Any] | None) -> dict[str, Any] | None:
        begin = self._begins() if self.adds_bos else None
        end = self._ends() if self.adds_eos else None
        if begin is None and end is None:
            return otherwise

        def text(number: int) -> list[dict[str, Any]]:
            part = {"Sequence": {"id": "AB"[number], "type_id": number}}
            first, last = (
                [] if token is None else [{"SpecialToken": {"id": token, "type_id": number}}]
                for token in (begin, end)
            )
            return [*first, part, *last]

        template = {
            "type": "TemplateProcessing",
            "single": text(0),
            "pair": text(0) + text(1),
            "special_tokens": {
                token: {"id": token, "ids": [self.tokens.index(token)], "tokens": [token]}
                for token in (begin, end)
                if token is not None
            },
        }
        if otherwise is None:
            return template
        return {"type": "Sequence", "processors": [otherwise, template]}

    def _word_piece(self) -> dict[str, Any]:
        made = word_piece(self.metadata, self._vocabulary(), self._special("unknown"))
        return {"post_processor": self._post_processor(None), **made}

    def _unigram(self) -> dict[str, Any]:
        made = unigram(self.metadata, self.tokens, self.types)
        return {"post_processor": self._post_processor(None), **made}

    def _gemma(self) -> dict[str, Any]:
        vocabulary = self._vocabulary()
        made = gemma(vocabulary, self._merges(vocabulary), self._special("unknown"))
        return {"post_processor": self._post_processor(None), **made}

    def _byte_level(self) -> dict[str, Any]:
        """Bytes as letters, merged in the order of the merges (GPT-2 and its heirs)."""
        options = {"add_prefix_space": False, "trim_offsets": False, "use_regex": False}
        level: dict[str, Any] = {"type": "ByteLevel", **options}
        how = {"behavior": "Isolated", "invert": False}
        pieces: list[dict[str, Any]] = [
            {"type": "Split", "pattern": {"Regex": pattern}, **how}
            for pattern in self.splitting.patterns
        ]
        pieces.append({**level, "use_regex": self.splitting.then_gpt_2})
        vocabulary = self._vocabulary()
        return {
            "normalizer": {"type": "NFC"} if self.splitting.composed else None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": pieces},
            "post_processor": self._post_processor(level),
            "decoder": level,
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": "",
                "end_of_word_suffix": "",
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": self.splitting.whole_words_first,
                "vocab": vocabulary,
                "merges": self._merges(vocabulary),
            },
        }

    def _sentencepiece(self) -> dict[str, Any]:
        """Letters, merged into the piece of the highest score; bytes for what is not a piece."""
        prefix = self.metadata.flag("tokenizer.ggml.add_space_prefix")
        spaces: dict[str, Any] = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
        normalizer = spaces
        decoders: list[dict[str, Any]] = [
            {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
        ]
        if prefix is not False:
            prepend = {"type": "Prepend", "prepend": SPACE}
            normalizer = {"type": "Sequence", "normalizers": [prepend, spaces]}
            decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
        return {
            "normalizer": normalizer,
            "pre_tokenizer": None,
            "post_processor": self._post_processor(None),
            "decoder": {"type": "Sequence", "decoders": decoders},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": self._special("unknown") or self._first(UNKNOWN),
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": True,
                "byte_fallback": True,
                "ignore_merges": False,
                "vocab": self._vocabulary(),
                "merges": self._merges_by_score(),
            },
        }

    def _first(self, kind: int) -> str | None:
        return next((t for t, k in zip(self.tokens, self.types, strict=True) if k == kind), None)

    def _vocabulary(self) -> dict[str, int]:
        return first_places(self.tokens)

    def _merges(self, vocabulary: dict[str, int]) -> list[list[str]]:
        """The merges of tokens; others would stop the tokenizer from loading."""
        found = (merge.partition(" ") for merge in self.metadata.words("tokenizer.ggml.merges"))
        return [
            [left, right]
            for left, space, right in found
            if space and {left, right, left + right} <= vocabulary.keys()
        ]

    def _merges_by_score(self) -> list[list[str]]:
        found = self.metadata.numbers("tokenizer.ggml.scores")
        if found is None:
            return []
        return merges_by_score(self.tokens, self.types, [float(x) for x in found])


def merges_by_score(
    tokens: Sequence[str], types: Sequence[int], scores: Sequence[float]
) -> list[list[str]]:
    """Every way in which two pieces make a third, the best third first."""
    vocabulary, merges = first_places(tokens), []
    for number, (piece, kind) in enumerate(zip(tokens, types, strict=True)):
        if kind != NORMAL or number >= len(scores):
            continue
        ways = []
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocabulary and right in vocabulary:
                ways.append((vocabulary[left], vocabulary[right], left, right))
        merges += [(-scores[number], number, *way) for way in sorted(ways)]
    merges.sort(key=lambda merge: merge[:4])
    return [[left, right] for *_, left, right in merges]


def first_places(tokens: Sequence[str]) -> dict[str, int]:
    """Token -> number; of two that are the same the first."""
    vocabulary: dict[str, int] = {}
    for number, token in enumerate(tokens):
        vocabulary.setdefault(token, number)
    return vocabulary
