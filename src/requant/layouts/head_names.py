"""Find a model's embedding and head by names and shapes, and the keys that say they are tied.

``tied_heads`` decides whether they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Final

from requant.checkpoints.checkpoint import Key
from requant.formats import SourceLayer
from requant.quantization.roles import ROLES

FLAG: Final = "tie_word_embeddings"
FLAGS: Final = frozenset({FLAG, "weight_tying", "share_input_output_layers"})
"""The flag in configs of transformers, of the first OLMo and of OpenELM."""

HEAD_NAMES: Final = ("lm_head", "model.lm_head", "language_model.lm_head", "output", "embed_out")
"""Paths of heads in most models."""
_HEAD = re.compile(
    rf"{ROLES['head']}|(^|\.)(output_layer|language_model\.output)$|^head$|\.transformer\.ff_out$"
)
_EMBEDDING = re.compile(ROLES["embedding"])
# Layers with such names that are not embeddings of tokens, or belong to another model.
_OTHERS = re.compile(
    r"patch|pos(ition)?_|token_type|segment|rotary|(^|\.)(layers|h|blocks)\.\d+\."
    r"|(^|[._])(visual|vision|image|video|audio|speech|sound|talker|code_predictor|mtp|draft"
    r"|codec|token2wav)"
)
# Parts of a config that describe a tower or a second model, not the one with the head.
_OTHER_CONFIGS = re.compile(
    r"vision|visual|image|video|audio|speech|talker|mtp|draft|token2wav|dit_"
)
_TEXT_CONFIGS = re.compile(r"^(text|llm|language|thinker)(_model)?(_config)?$")
# Models whose output is not a distribution over tokens.
_HEADLESS = re.compile(
    r"(Classification|Answering|Embedding|Retrieval|Reward\w*|Regression|Score)$"
    r"|(?<!LMHead)(?<!Chat)(?<!VL)Model$"
)


@dataclass(frozen=True, slots=True)
class Pair:
    """The embedding of a model and its head.

    Attributes:
        embedding: The layer that tokens are looked up in.
        head: The layer that gives scores of tokens; None where none is stored.
    """

    embedding: SourceLayer
    head: SourceLayer | None


def find_pair(layers: Iterable[SourceLayer]) -> Pair | None:
    """The embedding of the language model and its head; None where there is no embedding."""
    matrices = [x for x in layers if x.is_weight and len(x.shape) == 2]
    matrices = [x for x in matrices if not _OTHERS.search(x.path)]
    embeddings = [x for x in matrices if _EMBEDDING.search(x.path)]
    pairs = [
        Pair(embedding, head)
        for head in matrices
        for embedding in embeddings
        if _HEAD.search(head.path) and head.shape[1] == embedding.shape[1]
    ]
    if pairs:
        return max(pairs, key=_nearness)
    largest = max(embeddings, key=lambda x: x.shape, default=None)
    return None if largest is None else Pair(largest, None)


def _nearness(pair: Pair) -> tuple[bool, int]:
    """How likely a head belongs to an embedding: by its shape, then by the common path."""
    assert pair.head is not None
    parts = zip(pair.embedding.path.split("."), pair.head.path.split("."), strict=False)
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], parts))
    return pair.head.shape == pair.embedding.shape, shared


def is_head(path: str) -> bool:
    """Whether a layer is named like an output head."""
    return _HEAD.search(path) is not None


def serves_as_head(layers: Iterable[SourceLayer], means: Callable[[str], bool]) -> str:
    """Return the path of the embedding that is also the head that is meant; "" if there is none.

    Args:
        layers: The layers of the output.
        means: Returns whether a path is meant.
    """
    pair = find_pair(layers)
    if pair is None or pair.head is not None:
        return ""
    return pair.embedding.path if any(map(means, HEAD_NAMES)) else ""


def flags(config: Mapping[str, Any], below: Key = ()) -> Iterator[tuple[Key, bool]]:
    """Every flag of the language model, in the config itself and in its sections."""
    for key, value in config.items():
        if key in FLAGS and isinstance(value, bool):
            yield (*below, key), value
        elif isinstance(value, Mapping) and not _OTHER_CONFIGS.search(key):
            yield from flags(value, (*below, key))


def flag_places(config: Mapping[str, Any], below: Key = ()) -> Iterator[Key]:
    """The keys where a class may read the flag: of the config, and of its text sections."""
    yield (*below, FLAG)
    for key, value in config.items():
        if not isinstance(value, Mapping) or _OTHER_CONFIGS.search(key):
            continue
        if "vocab_size" in value or _TEXT_CONFIGS.search(key):
            yield from flag_places(value, (*below, key))


def has_scores(config: Mapping[str, Any]) -> bool:
    """Whether the model computes scores of tokens; one for embeddings or classes has no head."""
    names = config.get("architectures")
    named = names if isinstance(names, list) else []
    return not any(isinstance(x, str) and _HEADLESS.search(x) for x in named)
