"""Make the output's ``config.json``: the source's or a library's, with the quantization."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from requant.errors import RequantError
from requant.formats.quantization_block import text_sections, without_blocks
from requant.layouts.left_dense import is_of_a_tower
from requant.layouts.loader_names import module_names
from requant.planning.steps import with_global_scale
from requant.planning.target_selection import LayerDecision, TargetSelector, find_override
from requant.quantization.config import SKIP, PerLayerQuantization
from requant.quantization.options import DTYPES


def output_quantization(
    selector: TargetSelector, decisions: Collection[LayerDecision]
) -> PerLayerQuantization | None:
    """The quantization block: a default and the layers that differ from it; None if all is dense.

    Layers that were skipped explicitly, by the source's own block too, are listed as dense.
    """
    per_layer = {x.layer.path: x.target for x in decisions if x.target is not None}
    if not per_layer:
        return None
    source = selector.layout.quantization
    default = selector.options.quantization or (source.quantization if source else None)
    skipped = []
    for layer in selector.layout.layers:
        if layer.path in per_layer or not layer.is_weight:
            continue
        by_source = source is not None and source.per_layer.get(layer.path) is SKIP
        by_option = find_override(selector.options, layer.path) is SKIP
        choice = selector.recipe_targets.get(layer.path)
        by_recipe = choice is not None and choice.spec is SKIP
        if by_source or by_option or by_recipe:
            skipped.append(layer.path)
    return PerLayerQuantization.from_layers(per_layer, default, skipped)


def output_config(
    selector: TargetSelector,
    decisions: Collection[LayerDecision],
    quantization: PerLayerQuantization | None,
    *,
    rotated: bool,
) -> dict[str, Any]:
    """The source's config, or the library's, with the quantization and dtype of the output.

    ``rotated`` says whether inputs of layers are still to be rotated when the model runs.
    """
    options = selector.options
    config = _base_config(selector)
    config.pop("rotation", None)
    if rotated and selector.layout.rotation is not None:
        config["rotation"] = dict(selector.layout.rotation)
    is_changed = (
        options.overrides or options.only or options.nonfinite_layers or selector.format != "dense"
    )
    library, recipe = selector.library_layout, options.recipe
    by_recipe = library is not None and recipe and recipe.name not in library.library.recipes
    if library is not None and not (is_changed or by_recipe):
        return config  # the library's own: its block describes exactly what was decided
    # Blocks of the tools that quantized the source do not describe the output.
    config = without_blocks(config)
    if options.dtype is not None:
        name = next(word for word, header in DTYPES.items() if header == options.dtype)
        for part in text_sections(config):
            assert isinstance(part, dict)
            part.update({key: name for key in ("dtype", "torch_dtype") if key in part})
    if quantization is not None:
        block = _library_block(selector, decisions, quantization)
        block = block or _quantization_block(selector, decisions, quantization)
        config |= {"quantization": block, "quantization_config": block}
    is_sorted = library is not None and [*library.config] == sorted(library.config)
    return dict(sorted(config.items())) if is_sorted else config


def _base_config(selector: TargetSelector) -> dict[str, Any]:
    """The source's config, or the library's.

    mlx-lm's converter removes ``vision_config``, by which loaders decide what to expect: it is kept
    only where a tower is.
    """
    source = selector.checkpoint.config
    if selector.library_layout is None or selector.relayout is None:
        return dict(source)
    config, key = selector.library_layout.config, "vision_config"
    has_tower = any(map(is_of_a_tower, selector.relayout.extra_tensors))
    if key in config or key not in source or not has_tower:
        return dict(config)
    return dict(sorted({**config, key: source[key]}.items()))


def _library_block(
    selector: TargetSelector,
    decisions: Collection[LayerDecision],
    quantization: PerLayerQuantization,
) -> dict[str, Any]:
    """The block that the library writes, if it describes what was decided; else an empty one.

    It may name layers that equal its default.
    """
    library = selector.library_layout
    block = {} if library is None else library.config.get("quantization") or {}
    try:
        theirs = PerLayerQuantization.from_dict(block)
    except RequantError:  # it has none, or one that only its class reads
        return {}
    same = theirs.quantization == quantization.quantization and all(
        theirs.quantization_for(x.layer.path) == quantization.quantization_for(x.layer.path)
        for x in decisions
        if x.layer.is_weight
    )
    scaled = {key for key, x in block.items() if isinstance(x, dict) and x.get("global_scale")}
    return dict(block) if same and scaled == with_global_scale(decisions) else {}


def _quantization_block(
    selector: TargetSelector,
    decisions: Collection[LayerDecision],
    quantization: PerLayerQuantization,
) -> dict[str, Any]:
    block: dict[str, Any] = quantization.to_dict()
    for path in block.keys() & with_global_scale(decisions):
        # Loaders take a layer's own entry in place of the default, never next to it.
        block[path]["global_scale"] = True
    if selector.relayout is None:
        entries = {path: entry for path, entry in block.items() if isinstance(entry, dict)}
        block |= module_names(entries)
    return block
