"""Layers that stay dense under the source's names because every MLX library leaves them so.

Towers for images and sound with their projectors, and the embedding that a head of masked words
shares: the libraries build these layers dense, or copy them without their scales.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from typing import Any

from requant.core.reasons import Reason, ReasonCode
from requant.formats import SourceLayer

TOWER = Reason(ReasonCode.TOWER, "tower for images or sound")
TIED = Reason(ReasonCode.TIED_EMBEDDING, "shared with a head of masked words")

# What towers and projectors are called, as a part of a layer path between dots.
_MODULES = (
    r"vision\w*",
    r"visual\w*",
    r"vit(_\w+)?",
    r"(image|img)_\w+",
    r"audio(_(tower|encoder|model|backbone|module|project\w*|proj|adapter|connector|resampler"
    r"|embed\w*))?",
    r"(speech|sound|acoustic|semantic)_(tower|encoder|model|project\w*|proj|adapter|connector"
    r"|tokenizer|embed\w*)",
    r"video_\w+",
    r"vpm|apm|mlp1",
    r"embed_(vision|audio|images?)",
    r"\w*projector\w*",
    r"(language|modality)_projection",
    r"(\w+_)?(connector|aligner|resampler|perceiver|q_?former)",
    r"perceiver_\w+",
    r"(patch_|vit_)?merger|patch_merge_mlp",
    r"sam2?_\w+",
    r"(siglip|clip|dino|eva_clip|conformer)(v?\d+)?(_\w+)?",
)
_TOWER = re.compile(rf"(^|\.)({'|'.join(_MODULES)})(\.|$)")
# Next to a module that is called the language model, an encoder is for what is not language.
_TEXT, _ENCODER = re.compile(r"(model\.)?language_model\."), re.compile(r"(model\.)?encoder\.")
# Keys of a config that has such a part next to a text model.
_KEYS = re.compile(
    r"(vision|visual|vit|audio|speech|sound|image|img|perceiver|projector|mm|acoustic)"
    r"(_\w+)?_(config|cfg|tower|processor)"
)
_NESTED = ("thinker_config", "talker_config", "text_config", "llm_config")

_HEAD = re.compile(
    r"(^|\.)(decoder|predictions|lm_head|vocab_projector|generator_lm_head|mlm_head)$"
)
_EMBEDDING = re.compile(r"(^|[._])(embed_tokens|tok_embeddings|word_embeddings|wte|embeddings?)$")


def left_dense(layers: Iterable[SourceLayer], config: Mapping[str, Any]) -> dict[str, Reason]:
    """The layers of a checkpoint that stay dense unless they are named, each with the reason.

    Args:
        layers: All of them, under the source's names.
        config: ``config.json``.
    """
    layers = tuple(layers)
    return dict(_towers(layers, config)) | dict(_tied_embeddings(layers))


def is_of_a_tower(name: str) -> bool:
    """Whether a tensor or layer is named like a part of a tower or projector."""
    return _TOWER.search(name) is not None


def _towers(
    layers: Iterable[SourceLayer], config: Mapping[str, Any]
) -> Iterator[tuple[str, Reason]]:
    """Towers, where they are next to a model of another kind.

    A vision model alone is not a tower of anything: its config has no part for images, and most
    of its weights would be the tower.
    """
    inside, outside, paths = 0, 0, []
    layers = tuple(layers)
    siblings = any(_TEXT.match(layer.path) for layer in layers)
    for layer in layers:
        if len(layer.shape) < 2 or not layer.is_weight:
            continue
        if is_of_a_tower(layer.path) or (siblings and _ENCODER.match(layer.path)):
            inside += prod(layer.shape)
            paths.append(layer.path)
        else:
            outside += prod(layer.shape)
    if outside and (outside >= inside or _has_part(config)):
        yield from ((path, TOWER) for path in paths)


def _has_part(config: Mapping[str, Any]) -> bool:
    nested = (config.get(key) for key in _NESTED)
    parts = [config, *(part for part in nested if isinstance(part, Mapping))]
    return any(_KEYS.fullmatch(key) for part in parts for key in part)


def _tied_embeddings(layers: Iterable[SourceLayer]) -> Iterator[tuple[str, Reason]]:
    """Embeddings whose rows a stored bias counts: the weight of that head is the embedding.

    Such a head has its bias alone in the file. Loaders copy the embedding's weight to it, and
    know no scales of it.
    """
    layers = tuple(layers)
    paths = {layer.path for layer in layers if layer.is_weight}
    heads = {
        layer.shape[0]
        for layer in layers
        if len(layer.shape) == 1
        and layer.path.endswith(".bias")
        and _HEAD.search(layer.path.removesuffix(".bias"))
        and paths.isdisjoint({(head := layer.path.removesuffix(".bias")), f"{head}.decoder"})
    }
    for layer in layers:
        is_table = layer.is_weight and len(layer.shape) == 2 and _EMBEDDING.search(layer.path)
        if is_table and layer.shape[0] in heads:
            yield layer.path, TIED
