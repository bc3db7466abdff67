"""Metadata of cards survive as they are; compared with PyYAML's own reading."""

from __future__ import annotations

import pytest

pytest.importorskip("yaml")

import yaml

from requant.errors import ParseError
from requant.reports.front_matter import FrontMatter, read_front_matter

# Norwegian's code, a date, numbers as texts, an alias, blocks of text, non-ASCII, null.
CARD = """---
language: [no, "en"]
license: llama3.2
extra_gated_prompt: >-
  ### TERMS

  You agree to a line that is longer than the width at which a serializer would wrap what it writes.
extra_gated_fields:
  Name: text
  I agree: checkbox
  Country: {type: country, required: true}
released: 2024-10-01
version: "1.0"
shared: &x [a, b]
again: *x
empty:
text: |
  --- not the end
  größe
tags:
- llama
- "7"
---
# Title
---
"""


def parsed(metadata: FrontMatter, loader: type = yaml.BaseLoader) -> dict[str, object]:
    found: dict[str, object] = yaml.load(metadata.to_yaml(), loader)
    return found


@pytest.mark.parametrize("loader", [yaml.BaseLoader, yaml.SafeLoader])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_everything_survives(loader: type, newline: str) -> None:
    text = CARD.split("---\n")[1]
    metadata = read_front_matter(CARD.replace("\n", newline))
    expected = yaml.load(text, loader)
    assert parsed(metadata, loader) == expected
    again = read_front_matter(f"---\n{metadata.to_yaml()}---\n# Another\n")
    assert parsed(again, loader) == expected
    assert parsed(metadata)["language"] == ["no", "en"]


def test_entries_are_replaced_in_place_and_added_at_the_end() -> None:
    metadata = read_front_matter("---\na: 1\nb: 2\nc: [3]\n---\n")
    changed = metadata.without("b").replaced({"a": "yes", "d": ["x", "y: z"]})
    assert list(parsed(changed)) == ["a", "c", "d"]
    assert yaml.safe_load(changed.to_yaml()) == {"a": "yes", "c": [3], "d": ["x", "y: z"]}
    assert list(parsed(metadata)) == ["a", "b", "c"]


def test_texts_of_an_entry() -> None:
    metadata = read_front_matter("---\na: x\nb: [p, {q: r}, 7]\nc:\n---\n")
    assert metadata.texts("a") == ["x"] and metadata.texts("b") == ["p", "7"]
    assert metadata.texts("c") == [""] and metadata.texts("d") == []


@pytest.mark.parametrize(
    "card", ["", "# Title\n", "---\n---\n# T\n", "---\n# comment\n---\n", "--"]
)
def test_a_card_without_metadata(card: str) -> None:
    assert read_front_matter(card) == FrontMatter()


@pytest.mark.parametrize(
    "front",
    ["a: [1", "- a\n- b", "text", "a: b: c", "[x]: 1", "a: *unknown", "a: \x07", "[" * 1000],
)
def test_invalid_metadata_are_named(front: str) -> None:
    with pytest.raises(ParseError, match="metadata"):
        read_front_matter(f"---\n{front}\n---\n")


def test_aliases_are_not_expanded() -> None:
    """Ten levels of nine aliases each: 9**10 values if they were."""
    lines = ["a0: &a0 x"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 11)]
    front = "\n".join(lines)
    assert len(read_front_matter(f"---\n{front}\n---\n").to_yaml()) < 2 * len(front)
