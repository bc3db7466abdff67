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
_HAN_HANGUL = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_DEEPSEEK_CODER = (
    r"[\r\n]",
    r"\s?\p{L}+",
    r"\s?\p{P}+",
    _HAN_HANGUL,
    _DIGIT,
)

_CASED = (  # letters of either case, but those of Armenian and Georgian: as the model lists them
    "A-Za-z\xb5\xc0-\xd6\xd8-\xf6\xf8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af"
    "\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1"
    "\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5"
    "\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a"
    "\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d"
    "\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3"
    "\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115"
    "\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f"
    "\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3"
    "\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf"
    "\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f"
    "\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2"
    "\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_DEEPSEEK_LLM = (
    r"[\r\n]",
    rf"\s?[{_CASED}]+",
    "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
    r"\s+$",
    _HAN_HANGUL,
    r"\p{N}+",
)
_GPT_2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_FALCON = (r"[\p{P}$+<=>^~|`]+", _GPT_2_WORDS, r"[0-9][0-9][0-9]")


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
    (
        _GPT_2,
        "gpt-2 phi-2 mpt olmo jais trillion granite-docling gigachat exaone4 a.x-4.0 mellum "
        "jina-es jina-de jina-v2-es jina-v2-de jina-v1-en jina-v2-code modern-bert roberta-bpe",
    ),
    (
        PreTokenizer((_DIGIT,), then_gpt_2=True),
        "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2",
    ),
    (
        PreTokenizer((_LLAMA_3,), whole_words_first=True, adds_bos=True),
        "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
    ),
    (PreTokenizer((_LLAMA_3,)), "dbrx smaug-bpe chatglm-bpe"),
    (PreTokenizer((_LLAMA_3,), whole_words_first=True), "glm4 glm5"),
    (PreTokenizer((_QWEN_2,), composed=True), "qwen2 deepseek-r1-qwen f2llmv2"),
    (PreTokenizer((_QWEN_2,)), "stablelm2 megrez hunyuan kormo solar-open grok-2"),
    (PreTokenizer((_QWEN_35,), composed=True), "qwen35"),
    (PreTokenizer((_GPT_4O,)), "gpt-4o llama4 kanana2 minimax-m2 talkie"),
    (PreTokenizer((_TEKKEN,), whole_words_first=True, adds_bos=True), "tekken"),
    (PreTokenizer(_DEEPSEEK_3), "deepseek-v3 hunyuan-dense joyai-llm"),
    (PreTokenizer(_DEEPSEEK_CODER), "deepseek-coder"),
    (PreTokenizer(_DEEPSEEK_LLM), "deepseek-llm"),
    (PreTokenizer(_FALCON), "falcon"),
)
SPLITTINGS = {name: rule for rule, names in _RULES for name in names.split()}
"""``tokenizer.ggml.pre`` -> the rule."""
UNSAID = ("", "default")
"""Values that name no rule; GPT-2's is the likeliest."""


def splitting_of(pre: str) -> PreTokenizer | None:
    """The rule of a name, or None if it is not known."""
    return _GPT_2 if pre in UNSAID else SPLITTINGS.get(pre)
