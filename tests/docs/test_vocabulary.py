"""One word for one thing in code, help, errors and docs; the words are those of the field."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# What is not written -> what is. Format names and other tools' keys are spelt as they spell them.
WORDS = {
    r"\w*(?:quant|initial|normal|optim|serial|recogn|organ|summar)is(?:e[drs]?|ing|ations?)": "-iz",
    r"bits a weight|bits/weight|bpw": "bits per weight",
    r"director(?:y|ies)": "folder",
    r"state[- ]dicts?": "weights",
    r"w_bits?|q_bits": "bits",
    r"(?:the )?(?:HF|Hugging ?Face) hub": "the hub",
    r"safe tensors|weights files?|shard files?": "safetensors, weight file, shard",
    r"e\.g\.|i\.e\.": "such as, that is",
}
# Where another's word is meant: a key that other tools write, a message of the system.
OTHERS = {
    "w_bit": ("declared.py", "qweight_layouts.py", "qweight_config.py", "awq.md"),
}
FILES = [
    path
    for folder in ("src/requant", "docs", "examples")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".md", ".toml", ".json") and "assets" not in path.parts
] + [ROOT / "README.md", ROOT / "CHANGELOG.md"]


def strays(text: str, name: str = "") -> list[str]:
    found = []
    for pattern, word in WORDS.items():
        for match in re.finditer(rf"\b(?:{pattern})(?!\w)", text, re.I):
            if name not in OTHERS.get(match[0].lower(), ()):
                line = text.count("\n", 0, match.start()) + 1
                found.append(f"{name}:{line}: {match[0]!r}, here {word!r}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_word_is_a_stray(path: Path) -> None:
    assert strays(path.read_text("utf-8"), path.name) == []


@pytest.mark.parametrize(
    "text",
    ["we quantise it", "Dequantisation", "4.5 bits a weight", "a directory", "HF Hub", "e.g. 4"],
)
def test_a_stray_is_found(text: str) -> None:
    assert len(strays(text)) == 1


def test_words_of_the_field_are_none() -> None:
    assert strays("quantize the weights of a folder from the hub: 4.5 bits per weight") == []
