"""A tokenizer as the metadata of a GGUF file, the inverse of ``tokenizer``.

The facts are those of llama.cpp's converter (ggml-org/llama.cpp convert_hf_to_gguf.py,
gguf-py/gguf/vocab.py). The splitting of words is found among the rules of ``pretokenizers``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from requant.gguf.pretokenizers import SPLITTINGS, PreTokenizer
from requant.gguf.special_tokens import CONTROL, NORMAL, UNKNOWN, USER_DEFINED
from requant.gguf.tokenizer import merges_by_score
from requant.gguf.writer import Value
from requant.text import format_value

TOKENIZER: Final = "tokenizer.json"
SETTINGS: Final = "tokenizer_config.json"
TEMPLATE: Final = "chat_template.jinja"
_UNUSED, _BYTE = 5, 6
_PARTS: Final = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
_SPACE: Final = "\u2581"


class NotWritable(Exception):
    """Why a tokenizer cannot be written."""


@dataclass(frozen=True)
class _Described:
    """``tokenizer.json`` with the settings next to it."""

    tokenizer: Mapping[str, Any]
    settings: Mapping[str, Any]

    @property
    def model(self) -> Mapping[str, Any]:
        """The part ``model``."""
        found: Mapping[str, Any] = self.tokenizer.get("model") or {}
        return found


def tokenizer_metadata(
    files: Mapping[str, bytes], config: Mapping[str, Any], rows: int
) -> dict[str, Value]:
    """The keys of a tokenizer and its chat templates.

    Args:
        files: ``tokenizer.json``, ``tokenizer_config.json`` and ``chat_template.jinja``, those
            that there are.
        config: ``config.json``, which may name special tokens.
        rows: Of the embeddings: as many tokens are written.

    Raises:
        NotWritable: The tokenizer is of another kind, or splits words by an unknown rule.
    """
    if TOKENIZER not in files:
        return {"tokenizer.ggml.model": "none"}
    described = _Described(
        json.loads(files[TOKENIZER]), json.loads(files.get(SETTINGS, b"{}") or b"{}")
    )
    kind = described.model.get("type")
    if kind != "BPE":
        raise NotWritable(f"is of kind {format_value(kind)}, known is BPE")
    tokens, types = _tokens(described, rows)
    if described.model.get("byte_fallback"):
        found = _sentencepiece(described, tokens, types)
    else:
        found = _byte_level(described, tokens, types)
    found |= _special(described, config, tokens)
    return found | _templates(described, files.get(TEMPLATE))


def _tokens(described: _Described, rows: int) -> tuple[list[str], list[int]]:
    """Every token in its place, and its kind; rows without a token get unused ones."""
    numbers = dict(described.model.get("vocab") or {})
    added = described.tokenizer.get("added_tokens") or []
    numbers |= {token["content"]: token["id"] for token in added}
    if max(numbers.values(), default=0) >= rows:
        last = max(numbers.values())
        raise NotWritable(f"has token {last:,}, but the embeddings have {rows:,} rows")
    tokens = [f"[PAD{number}]" for number in range(rows)]
    types = [_UNUSED] * rows
    for token, number in numbers.items():
        tokens[number], types[number] = token, NORMAL
    for token in added:
        types[token["id"]] = CONTROL if token.get("special") else USER_DEFINED
    return tokens, types


def _common(model: str, pre: str, tokens: Sequence[str], types: Sequence[int]) -> dict[str, Value]:
    return {
        "tokenizer.ggml.model": model,
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tuple(tokens),
        "tokenizer.ggml.token_type": np.array(types, np.int32),
    }


def _merges(described: _Described) -> list[list[str]]:
    merges = described.model.get("merges") or []
    return [m.split(" ", 1) if isinstance(m, str) else list(m) for m in merges]


def _byte_level(described: _Described, tokens: list[str], types: list[int]) -> dict[str, Value]:
    pre = _splitting(described)
    merges = tuple(" ".join(pair) for pair in _merges(described))
    return {**_common("gpt2", pre, tokens, types), "tokenizer.ggml.merges": merges}


def _splitting(described: _Described) -> str:
    """The name of the rule by which words are split."""
    found = _rule(described)
    # Texts begin with a token where the file says so, whatever the rule.
    for name, rule in SPLITTINGS.items():
        known = (rule.patterns, rule.then_gpt_2, rule.whole_words_first, rule.composed)
        if known == (found.patterns, found.then_gpt_2, found.whole_words_first, found.composed):
            return name
    patterns = " then ".join(map(format_value, found.patterns)) or "no pattern"
    raise NotWritable(
        f"splits words by a rule that has no known name in tokenizer.ggml.pre: {patterns}"
    )


def _rule(described: _Described) -> PreTokenizer:
    """The rule that ``tokenizer.json`` has.

    Raises:
        NotWritable: It has other parts than patterns and bytes.
    """
    given = described.tokenizer.get("pre_tokenizer") or {}
    parts = given.get("pretokenizers", [given]) if given else []
    patterns: list[str] = []
    then_gpt_2 = has_bytes = False
    for part in parts:
        kind = part.get("type")
        if kind == "Split" and "Regex" in part.get("pattern", {}) and not part.get("invert"):
            patterns.append(part["pattern"]["Regex"])
        elif kind == "Digits" and part.get("individual_digits"):
            patterns.append(r"\p{N}")
        elif kind == "ByteLevel" and not part.get("add_prefix_space"):
            has_bytes, then_gpt_2 = True, bool(part.get("use_regex", True))
        else:
            raise NotWritable(f"splits words by {format_value(kind)}, which files cannot say")
    if not has_bytes:
        raise NotWritable("has neither bytes as letters (ByteLevel) nor byte_fallback")
    normalizer = described.tokenizer.get("normalizer") or {}
    if normalizer and normalizer.get("type") != "NFC":
        kind = format_value(normalizer.get("type"))
        raise NotWritable(f"normalizes texts by {kind}, known is NFC")
    whole = bool(described.model.get("ignore_merges"))
    return PreTokenizer(tuple(patterns), then_gpt_2, whole, composed=bool(normalizer))


def _sentencepiece(described: _Described, tokens: list[str], types: list[int]) -> dict[str, Value]:
    """Scores that give the merges: less one for every piece that is merged later.

    Raises:
        NotWritable: The merges are in an order that no scores give.
    """
    unknown = described.model.get("unk_token")
    for number, token in enumerate(tokens):
        if token == unknown:
            types[number] = UNKNOWN
        elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            types[number] = _BYTE
    ranks: dict[str, int] = {}
    merges = _merges(described)
    for left, right in merges:
        ranks.setdefault(left + right, len(ranks))
    scores = np.zeros(len(tokens), np.float32)
    for number, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        if kind == NORMAL:
            scores[number] = -float(ranks.get(token, len(ranks)))
    if merges_by_score(tokens, types, scores.tolist()) != merges:
        raise NotWritable("has merges in an order that no scores of its pieces give")
    return {
        **_common("llama", "default", tokens, types),
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.add_space_prefix": _adds_space(described),
    }


def _adds_space(described: _Described) -> bool:
    """Whether a text begins with a space.

    Raises:
        NotWritable: Texts are changed or split in another way than SentencePiece does it.
    """
    adds = False
    for key, inner in (("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers")):
        given = described.tokenizer.get(key) or {}
        for part in given.get(inner, [given]) if given else ():
            kind = part.get("type")
            pattern = (part.get("pattern") or {}).get("String")
            if kind == "Prepend" and part.get("prepend") == _SPACE:
                adds = True
            elif kind == "Metaspace":
                adds = part.get("prepend_scheme", "always") != "never"
            elif kind not in ("Replace", "Split") or pattern != " ":
                raise NotWritable(f"has the {key} {format_value(kind)}, which files cannot say")
    return adds


def _special(
    described: _Described, config: Mapping[str, Any], tokens: Sequence[str]
) -> dict[str, Value]:
    """Tokens with a part to play, and whether texts begin and end with them."""
    found: dict[str, Value] = {}
    places = {token: number for number, token in enumerate(tokens)}
    for name, part in _PARTS.items():
        token = described.settings.get(f"{name}_token")
        text = token.get("content") if isinstance(token, Mapping) else token
        number: Any = places.get(text) if isinstance(text, str) else None
        if number is None:
            number = config.get(f"{name}_token_id")
        if isinstance(number, list) and number:
            number = number[0]
        if isinstance(number, int) and 0 <= number < len(tokens):
            found[f"tokenizer.ggml.{part}_token_id"] = number
    first, last = _ends(described)
    return found | {
        "tokenizer.ggml.add_bos_token": first,
        "tokenizer.ggml.add_eos_token": last,
    }


def _ends(described: _Described) -> tuple[bool, bool]:
    """Whether a text begins, and ends, with a special token."""
    post = described.tokenizer.get("post_processor") or {}
    for part in post.get("processors", [post]):
        single = part.get("single")
        if part.get("type") == "TemplateProcessing" and single:
            return "SpecialToken" in single[0], "SpecialToken" in single[-1]
    settings = described.settings
    return bool(settings.get("add_bos_token")), bool(settings.get("add_eos_token"))


def _templates(described: _Described, file: bytes | None) -> dict[str, Value]:
    """Chat templates, each under its name."""
    given = described.settings.get("chat_template")
    if file is not None:
        given = file.decode("utf-8", "replace")
    if isinstance(given, str):
        return {"tokenizer.chat_template": given}
    found: dict[str, Value] = {}
    for entry in given or ():
        name = entry["name"]
        key = "" if name == "default" else f".{name}"
        found[f"tokenizer.chat_template{key}"] = entry["template"]
    names = tuple(entry["name"] for entry in given or () if entry["name"] != "default")
    return found | ({"tokenizer.chat_templates": names} if names else {})
