"""mlx-audio: ``mlx_audio/{tts,stt,...}/models/{family}/``, found by config and folder name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import ExitStack
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

from requant.libraries.base import Library, read_table
from requant.libraries.surroundings import replaced
from requant.text import format_value

_DOMAINS = ("tts", "stt", "sts", "lid", "music")  # in the order in which mlx_audio.convert looks
_HINTS = "DETECTION_HINTS"  # of a family: {"model_type_aliases": {...}, "architectures": {...}}
# The type by which a family's config calls itself where its folder has another name.
_OWN_TYPE = re.compile(
    r'^class ModelConfig\b[^\n]*\n(?:[ #\n][^\n]*\n)*?    model_type: str = "(\w+)"', re.M
)
# Text models that are parts of audio models too: their type alone says nothing of sound.
_TEXT_FAMILIES = frozenset({"llama", "qwen2", "qwen3", "dense", "mimo", "base"})


def _domain(folder: Path, config: Mapping[str, Any]) -> str:
    """The domain that has a class for the model; "" where none does by name."""
    words = (config.get(key) for key in ("model_type", "name", "_class_name"))
    names = {word.lower() for word in words if isinstance(word, str)} - _TEXT_FAMILIES
    named = config.get("architectures")
    heads = {x for x in named if isinstance(x, str)} if isinstance(named, list) else set()
    if not names:
        return ""
    by_name = (x for x in _families(folder) if not names.isdisjoint(_names(x, heads)))
    by_config = (x for x in _families(folder) if not names.isdisjoint(_own_types(x)))
    family = next(chain(by_name, by_config), None)
    return "" if family is None else family.parts[-4]


def _names(family: Path, heads: set[str]) -> set[str]:
    """The types that a family takes by its folder and hints; none where it asks for other heads."""
    hints = _hints(family)
    own_heads = {*hints.get("architectures", ())}
    if own_heads and heads and own_heads.isdisjoint(heads):
        return set()
    return {family.parent.name, *hints.get("model_type_aliases", ())}


# The package does not change while it is used, and a plan looks for a class several times.


@cache
def _families(folder: Path) -> tuple[Path, ...]:
    """The module of each family, in the order in which mlx_audio.convert looks."""
    found = (sorted((folder / d / "models").glob("*/__init__.py")) for d in _DOMAINS)
    return tuple(chain.from_iterable(found))


@cache
def _hints(family: Path) -> Mapping[str, Any]:
    """What a family says of the models that it takes."""
    try:
        hints: Mapping[str, Any] = read_table(family, _HINTS).get(_HINTS, {})
    except ValueError:
        return {}
    return hints


@cache
def _own_types(family: Path) -> frozenset[str]:
    """The types by which a family's config calls itself."""
    texts = (file.read_text(errors="replace") for file in family.parent.glob("*.py"))
    return frozenset(name for text in texts for name in _OWN_TYPE.findall(text))


def _import_class(utils: Any, config: dict[str, Any], folder: Path) -> None:
    """Find the class as mlx-audio does: from the config's keys, then from the folder's name."""
    model_type = config.get("model_type") or config.get("architecture")
    if model_type is None:
        model_type = utils._get_sts_utils().infer_model_type_from_config(config)
    if utils.get_model_category(model_type, utils.get_model_name_parts(folder)) is None:
        raise ValueError(f"model type {format_value(model_type)} not supported")


def _load(utils: Any, folder: Path) -> Any:
    """Load with mlx-audio, but for what it does after the weights.

    Its classes load tokenizers there with ``trust_remote_code``.
    """
    find = utils.get_model_class

    def without_hook(**arguments: Any) -> Any:
        package, model_type = find(**arguments)
        hooks.enter_context(
            replaced(package.Model, "post_load_hook", staticmethod(lambda model, _: model))
        )
        return package, model_type

    with ExitStack() as hooks, replaced(utils, "get_model_class", without_hook):
        return utils.load_model(folder)


MLX_AUDIO = Library(
    name="mlx-audio",
    package="mlx_audio",
    extra="audio",
    find_class=lambda *of: bool(_domain(*of)),
    import_class=_import_class,
    load=_load,
    recipes=frozenset({"mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6"}),
    copied=("*.pt",),
    # Looking for the domain itself, the library imports all models, and one of them downloads.
    arguments=lambda *of: {"model_domain": _domain(*of) or None},
)
