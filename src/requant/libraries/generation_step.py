"""The first step of mlx-vlm's generation: a whole prompt, with images, through a model.

Text and images are embedded, then the language model runs with an empty cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from requant.libraries.loading import Module

if TYPE_CHECKING:
    import mlx.core as mx

# Of a processor's inputs, those that are not passed to the language model as they are.
_OF_EMBEDDING = ("pixel_values", "attention_mask")


def read_prompt(model: Module, ids: mx.array, inputs: Mapping[str, Any]) -> Any:
    """Run a model of mlx-vlm over a prompt.

    Args:
        model: The whole model.
        ids: Token ids, int32 ``(1, tokens)``, with placeholders for the images.
        inputs: What the processor gives next to the ids; empty for text alone.

    Returns:
        What the language model returns: an object with ``logits``.
    """
    cache = import_module("mlx_vlm.models.cache").make_prompt_cache(model.language_model)
    others = {name: x for name, x in inputs.items() if name not in _OF_EMBEDDING}
    pixels, mask = (inputs.get(name) for name in _OF_EMBEDDING)
    embedded = model.get_input_embeddings(ids, pixels, mask=mask, **others)
    values = {name: x for name, x in vars(embedded).items() if x is not None}
    return model.language_model(ids, cache=cache, **{**others, **values})
