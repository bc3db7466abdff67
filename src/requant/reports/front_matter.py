"""The metadata at the start of a model card: YAML between two lines of three dashes.

Values are kept as nodes of the YAML tree and written as they were read: the language ``no``
remains a text, a block of text a block, and an alias is never expanded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from requant.errors import ParseError
from requant.text import one_line

_FRONT = re.compile(r"\A\ufeff?\s*---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)
_MAX_CHARS = 1 << 20


@dataclass(frozen=True, slots=True)
class FrontMatter:
    """Metadata of a card as pairs of YAML nodes, keys and values, in their order."""

    pairs: tuple[tuple[Any, Any], ...] = ()

    def texts(self, key: str) -> list[str]:
        """The text of an entry, or those of the list that it is; empty if there is none."""
        for name, value in self.pairs:
            if name.value == key:
                parts = value.value if isinstance(value.value, list) else [value]
                return [x.value for x in parts if isinstance(getattr(x, "value", None), str)]
        return []

    def replaced(self, entries: Mapping[str, str | Sequence[str]]) -> FrontMatter:
        """The metadata with other values for some keys; new keys come last."""
        changed = {key: (_scalar(key), _node(value)) for key, value in entries.items()}
        known = [changed.pop(name.value, (name, value)) for name, value in self.pairs]
        return FrontMatter((*known, *changed.values()))

    def without(self, *keys: str) -> FrontMatter:
        """The metadata without some entries."""
        return FrontMatter(tuple(pair for pair in self.pairs if pair[0].value not in keys))

    def to_yaml(self) -> str:
        """The metadata in YAML, without the lines of dashes."""
        import yaml

        tree = yaml.MappingNode("tag:yaml.org,2002:map", list(self.pairs), flow_style=False)
        text: str = yaml.serialize(
            tree, Dumper=yaml.SafeDumper, allow_unicode=True, width=float("inf")
        )
        return text


def read_front_matter(card: str) -> FrontMatter:
    """Read the metadata of a card; empty if it has none.

    Raises:
        ParseError: They are not a YAML mapping.
    """
    import yaml

    found = _FRONT.match(card)
    if found is None or not found[1].strip():
        return FrontMatter()
    if len(found[1]) > _MAX_CHARS:
        raise ParseError(f"metadata of {len(found[1]):,} characters, at most {_MAX_CHARS:,}")
    try:
        tree = yaml.compose(found[1], Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ParseError(f"metadata are not valid YAML: {one_line(error)}") from error
    if tree is None:
        return FrontMatter()
    if not isinstance(tree, yaml.MappingNode) or not all(
        isinstance(key, yaml.ScalarNode) for key, _ in tree.value
    ):
        raise ParseError("metadata are not a YAML mapping of names to values")
    return FrontMatter(tuple({key.value: (key, value) for key, value in tree.value}.values()))


def _scalar(text: str) -> Any:
    import yaml

    return yaml.ScalarNode("tag:yaml.org,2002:str", text)


def _node(value: str | Sequence[str]) -> Any:
    import yaml

    if isinstance(value, str):
        return _scalar(value)
    return yaml.SequenceNode("tag:yaml.org,2002:seq", [_scalar(x) for x in value], flow_style=False)
