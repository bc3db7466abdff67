"""The rules by which byte-level tokenizers split a text: what ``tokenizer.ggml.pre`` names.

The names and their rules are those of llama.cpp (ggml-org/llama.cpp src/llama-vocab.cpp); where it
spells a model's own regex otherwise, because its engine is smaller, the model's own is here.
"""

from __future__ import annotations

from dataclasses import dataclass

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_REST = rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*{_SPACES}"
_REST_SLASH = rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*{_SPACES}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LEAD = r"[^\r\n\p{L}\p{N}]?"
_LLAMA_3 = rf"{_WORDS}|{_LEAD}\p{{L}}+|\p{{N}}{{1,3}}{_REST}"
_QWEN_2 = rf"{_WORDS}|{_LEAD}\p{{L}}+|\p{{N}}{_REST}"
_QWEN_35 = (
    rf"{_WORDS}|{_LEAD}[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*{_SPACES}"
)
_GPT_4O = (
    rf"{_LEAD}{_UPPER}*{_LOWER}+{_WORDS}?|{_LEAD}{_UPPER}+{_LOWER}*{_WORDS}?"
    rf"|\p{{N}}{{1,3}}{_REST_SLASH}"
)
_TEKKEN = rf"{_LEAD}{_UPPER}*{_LOWER}+|{_LEAD}{_UPPER}+{_LOWER}*|\p{{N}}{_REST_SLASH}"
_DIGIT = r"\p{N}"
_DEEPSEEK_3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!-/:-@\[-`{-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    + _SPACES,
)
_DEEPSEEK_CODER = (
    r"[\r\n]",
    r"\s?\p{L}+",
    r"\s?\p{P}+",
    "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
    _DIGIT,
)


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """One rule."""

    # Regexes; what one matches, and what lies between, is split by the next.
    patterns: tuple[str, ...] = ()
    then_gpt_2: bool = False  # whether GPT-2's own rule splits what they leave
    whole_words_first: bool = False  # whether a word that is a token is not merged from parts
    adds_bos: bool = False  # whether texts begin with a token for that, where the file says nothing
    composed: bool = False  # whether letters and their accents are composed before (NFC)


_GPT_2 = PreTokenizer(then_gpt_2=True)
_RULES = (
    (_GPT_2, "gpt-2 phi-2 mpt olmo jais trillion granite-docling gigachat exaone4 a.x-4.0 mellum"),
    (
        PreTokenizer((_DIGIT,), then_gpt_2=True),
        "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2",
    ),
    (
        PreTokenizer((_LLAMA_3,), whole_words_first=True, adds_bos=True),
        "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2",
    ),
    (PreTokenizer((_LLAMA_3,)), "dbrx smaug-bpe glm4 chatglm-bpe"),
    (PreTokenizer((_QWEN_2,), composed=True), "qwen2 deepseek-r1-qwen"),
    (PreTokenizer((_QWEN_2,)), "stablelm2 megrez hunyuan kormo solar-open grok-2"),
    (PreTokenizer((_QWEN_35,), composed=True), "qwen35"),
    (PreTokenizer((_GPT_4O,)), "gpt-4o llama4 kanana2 minimax-m2"),
    (PreTokenizer((_TEKKEN,), whole_words_first=True, adds_bos=True), "tekken"),
    (PreTokenizer(_DEEPSEEK_3), "deepseek-v3 hunyuan-dense joyai-llm"),
    (PreTokenizer(_DEEPSEEK_CODER), "deepseek-coder"),
)
SPLITTINGS = {name: rule for rule, names in _RULES for name in names.split()}
"""``tokenizer.ggml.pre`` -> the rule."""
UNSAID = ("", "default")
"""Values that name no rule; GPT-2's is the likeliest."""


def splitting_of(pre: str) -> PreTokenizer | None:
    """The rule of a name, or None if it is not known."""
    return _GPT_2 if pre in UNSAID else SPLITTINGS.get(pre)
