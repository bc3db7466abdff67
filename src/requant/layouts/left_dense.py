"""Layers that stay dense under the source's names because every MLX library keeps them dense.

These are towers for images and sound with their projectors, which the libraries build dense, and
the embedding that a head of masked words shares, which they copy without its scales.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from math import prod
from typing import Any

from requant.core.reasons import Reason, ReasonCode
from requant.formats import SourceLayer
from requant.libraries.modalities import Modalities

TOWER = Reason(ReasonCode.TOWER, "tower for images or sound")
TIED = Reason(ReasonCode.TIED_EMBEDDING, "shared with a head of masked words")

# Names of towers and projectors: the part of a layer path between two dots.
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
_TOWER = re.compile("|".join(_MODULES))
# Next to a module that is named language_model, an encoder is for images or sound.
_TEXT, _ENCODER = re.compile(r"(model\.)?language_model\."), re.compile(r"(model\.)?encoder\.")
# Keys of a config that describe such a part next to a text model.
_KEYS = re.compile(
    r"(vision|visual|vit|audio|speech|sound|image|img|perceiver|projector|mm|acoustic)"
    r"(_\w+)?_(config|cfg|tower|processor)"
)
_SOUND = re.compile(r"audio|speech|sound|acoustic|whisper|conformer|apm")
_IMAGE = re.compile(r"vision|visual|vit|image|img|vpm|sam|siglip|clip|dino")
_NESTED = ("thinker_config", "talker_config", "text_config", "llm_config")

_HEAD = re.compile(
    r"(^|\.)(decoder|predictions|lm_head|vocab_projector|generator_lm_head|mlm_head)$"
)
_EMBEDDING = re.compile(r"(^|[._])(embed_tokens|tok_embeddings|word_embeddings|wte|embeddings?)$")


def left_dense(layers: Iterable[SourceLayer], config: Mapping[str, Any]) -> dict[str, Reason]:
    """Return the layers that stay dense unless an option names them, each with the reason.

    Args:
        layers: All layers of the checkpoint, under the source's names.
        config: ``config.json``.
    """
    layers = tuple(layers)
    return dict(_towers(layers, config)) | dict(_tied_embeddings(layers))


def is_of_a_tower(name: str) -> bool:
    """Whether a tensor or layer is named like a part of a tower or projector."""
    return any(map(_is_tower, name.split(".")))


@lru_cache(maxsize=1 << 14)
def _is_tower(word: str) -> bool:
    return _TOWER.fullmatch(word) is not None


def modalities_of(layers: Iterable[SourceLayer], config: Mapping[str, Any]) -> Modalities:
    """What a checkpoint takes next to text, by the towers that it holds.

    The name of a tower says what it is for or, where it does not, a part of the config. A config
    may describe towers that a checkpoint lacks: of a config alone, ``libraries.modalities`` tells.
    """
    paths = [x.path for x in layers if len(x.shape) > 1 and is_of_a_tower(x.path)]
    keys = [key for part in _parts(config) for key in part if _KEYS.fullmatch(key)]
    sees, hears = (any(map(kind.search, paths)) for kind in (_IMAGE, _SOUND))
    if paths and not (sees or hears):
        sees, hears = (any(map(kind.search, keys)) for kind in (_IMAGE, _SOUND))
    return Modalities(sees, hears)


def _towers(
    layers: Iterable[SourceLayer], config: Mapping[str, Any]
) -> Iterator[tuple[str, Reason]]:
    """Towers that are next to a text model.

    A vision model alone is not a tower: its config has no part for images, and most of its weights
    would belong to the tower.
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
    return any(_KEYS.fullmatch(key) for part in _parts(config) for key in part)


def _parts(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A config and its nested ones."""
    nested = (config.get(key) for key in _NESTED)
    return [config, *(part for part in nested if isinstance(part, Mapping))]


def _tied_embeddings(layers: Iterable[SourceLayer]) -> Iterator[tuple[str, Reason]]:
    """Embeddings that are the weight of a head of which the file has the bias only.

    Loaders copy the embedding's weight to the head, but not its scales. The bias has one element
    for each row of the embedding.
    """
    layers = tuple(layers)
    paths = {layer.path for layer in layers if layer.is_weight}
    rows = set()
    for layer in layers:
        head = layer.path.removesuffix(".bias")
        is_bias = len(layer.shape) == 1 and head != layer.path
        if is_bias and _HEAD.search(head) and paths.isdisjoint({head, f"{head}.decoder"}):
            rows.add(layer.shape[0])
    for layer in layers:
        is_table = layer.is_weight and len(layer.shape) == 2 and _EMBEDDING.search(layer.path)
        if is_table and layer.shape[0] in rows:
            yield layer.path, TIED
