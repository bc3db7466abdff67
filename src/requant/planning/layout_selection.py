"""Choose the names and shapes of the output's layers: those of an MLX library, or the source's.

``--layout NAME`` takes one library's layout or fails, ``keep`` the source's names. Under ``auto``
the libraries that suit the model are tried in turn (``candidates``); a checkpoint that none takes
keeps its names, and the result says why.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from requant.checkpoints.checkpoint import Checkpoint
from requant.core.reasons import Note, NoteCode, Reason, ReasonCode
from requant.errors import CheckpointError
from requant.formats import SourceLayer, SourceLayout
from requant.layouts.head_names import find_pair
from requant.layouts.idle_tensors import without_unused_tensors
from requant.layouts.left_dense import modalities_of
from requant.layouts.load_check import one_sentence
from requant.layouts.relayout import LibraryLayoutError, Relayout, build_relayout
from requant.layouts.tied_heads import agreed, laid_out
from requant.libraries import LIBRARIES, MLX_LM, Library, Request
from requant.planning.target_fitting import fit_codes, fit_group_size
from requant.planning.target_selection import find_override, is_quantized
from requant.quantization.config import Quantization
from requant.quantization.modes import resolve_quantization
from requant.quantization.options import ConvertOptions

_MAX_REASON_CHARS = 240


@dataclass(frozen=True, slots=True)
class LayoutResult:
    """The layers of the output, before their targets are selected.

    Attributes:
        checkpoint: The source, with the config that belongs to these layers.
        layout: The layers.
        relayout: The library's layout; None where tensors keep the source's names.
        notes: What was changed for this layout.
        rejection: Why a library's layout was tried and failed; else "".
    """

    checkpoint: Checkpoint
    layout: SourceLayout
    relayout: Relayout | None = None
    notes: tuple[Note, ...] = ()
    rejection: str = ""


def choose_layout(
    checkpoint: Checkpoint, layout: SourceLayout, options: ConvertOptions
) -> LayoutResult:
    """Choose between the libraries' layouts and the source's names.

    Args:
        checkpoint: The source.
        layout: Its layers as they are stored.
        options: For ``layout``, and what a library's choice of layers depends on.

    Raises:
        CheckpointError: ``--layout`` names a library, and it does not take this checkpoint.
    """
    if options.layout == "keep":
        return _source_layout(checkpoint, layout, options)
    if options.layout != "auto":
        return _library_layout(checkpoint, layout, LIBRARIES[options.layout], options)
    rejection = ""
    rejected: list[Note] = []
    sees, hears = modalities_of(layout.layers, checkpoint.config)
    for library in candidates(checkpoint.config, layout, sees, hears):
        try:
            result = _library_layout(checkpoint, layout, library, options)
        except CheckpointError as error:
            if library is MLX_LM:
                rejection = _first_problem(error)
            else:
                text = f"{library.name} does not take this model: {_first_problem(error)}."
                rejected.append(Note(NoteCode.LIBRARY_REJECTED, text))
            continue
        notes = (*_without_towers(library, sees, hears), *rejected, *result.notes)
        return replace(result, notes=notes)
    chosen = _source_layout(checkpoint, layout, options, rejection)
    for library in _for_towers(sees, hears):
        if library.folder is None:
            why = library.missing_class_reason(checkpoint.config)
            rejected.append(Note(NoteCode.LIBRARY_REJECTED, f"{why}."))
    return replace(chosen, notes=(*rejected, *chosen.notes))


def vision_part(options: ConvertOptions) -> str | None:
    """``mmproj`` for the reader: "none" where nothing that is written would hold images.

    Which library is installed decides under ``auto``, before the source is read.
    """
    text_only = options.layout == MLX_LM.name or (
        options.layout == "auto" and LIBRARIES["mlx-vlm"].folder is None
    )
    return "none" if options.mmproj is None and text_only else options.mmproj


def candidates(
    config: Mapping[str, Any], layout: SourceLayout, sees: bool, hears: bool
) -> Iterator[Library]:
    """The libraries that ``--layout auto`` tries, in this order; each is looked for in its turn.

    A model that sees is mlx-vlm's and one that only hears is mlx-audio's, where they are installed
    and have a class; mlx-lm is for text, and mlx-embeddings for encoders that it does not take.
    """
    others = [MLX_LM, LIBRARIES["mlx-audio"], LIBRARIES["mlx-embeddings"]]
    libraries = [*dict.fromkeys([*_for_towers(sees, hears), *others])]
    if _predicts_text(config, layout):
        libraries = [x for x in libraries if x.has_heads]
    return (x for x in libraries if x is MLX_LM or not x.missing_class_reason(config))


def _for_towers(sees: bool, hears: bool) -> list[Library]:
    """The libraries that keep towers for images and sound, the likelier first."""
    libraries = [LIBRARIES["mlx-vlm"], LIBRARIES["mlx-audio"]]
    if sees or hears:
        return libraries if sees else libraries[::-1]
    return []


def _predicts_text(config: Mapping[str, Any], layout: SourceLayout) -> bool:
    """Whether a checkpoint has the output head of a language model, or shares the embedding's.

    transformers saves a model that has a head under ``model.``, and an encoder without.
    """
    pair, named = find_pair(layout.layers), config.get("architectures")
    if pair is None or pair.head is not None:
        return pair is not None
    names = named if isinstance(named, list) else []
    causal = any(isinstance(x, str) and x.endswith("ForCausalLM") for x in names)
    return causal and pair.embedding.path.startswith("model.")


def _without_towers(library: Library, sees: bool, hears: bool) -> tuple[Note, ...]:
    """Say that a result is text only, and which extra keeps the towers."""
    if library is not MLX_LM or not (sees or hears):
        return ()
    missing = [x for x in _for_towers(sees, hears) if x.folder is None]
    what = " and ".join(["images"] * sees + ["sound"] * hears)
    text = f"Text only: mlx-lm's class drops the towers for {what}"
    if missing:
        text += f"; {missing[0].name} keeps them (pip install 'requant[{missing[0].extra}]')"
    return (Note(NoteCode.TEXT_ONLY, f"{text}."),)


@dataclass(frozen=True, slots=True)
class OtherLayout:
    """The library's layout that tensors could have which keep the source's names.

    Attributes:
        library: The value of ``--layout``; "" if no library takes the checkpoint.
        rejection: Why none does.
    """

    library: str
    rejection: str = ""


def other_layout(chosen: LayoutResult, options: ConvertOptions) -> OtherLayout:
    """The layout that ``auto`` would take; libraries are tried if they were not.

    Args:
        chosen: The layers, under the source's names.
        options: What a library's choice of layers depends on.
    """
    if chosen.rejection:
        return OtherLayout("", chosen.rejection)
    config, layout = chosen.checkpoint.config, chosen.layout
    rejection = ""
    for library in candidates(config, layout, *modalities_of(layout.layers, config)):
        try:
            _relayout(chosen.checkpoint, layout, library, options)
        except CheckpointError as error:
            if library is MLX_LM or not rejection:
                rejection = _first_problem(error)
            continue
        return OtherLayout(library.name)
    return OtherLayout("", rejection)


def with_target(
    chosen: LayoutResult, before: Quantization, target: Quantization
) -> LayoutResult | None:
    """A layout that was made for the target ``before`` as it is for another one, of the same mode.

    The names and shapes are the same. A library's layers that took ``before`` take ``target``, or
    stay dense where its group size does not divide their inputs.

    Returns:
        The layout; None where it has to be made again, because layers were left dense whose inputs
        only the other group size divides.
    """
    if chosen.relayout is None or before == target:
        return chosen
    library = chosen.relayout.layout
    inputs = {layer.path: layer.shape[-1] for layer in chosen.layout.layers if layer.shape}
    fitting = {path for path, n_in in inputs.items() if n_in % target.group_size == 0}
    left = {x for x, why in library.dense_reasons.items() if why.code is ReasonCode.NO_GROUP_SIZE}
    if left & fitting:
        return None
    targets, reasons = dict(library.targets), dict(library.dense_reasons)
    for path in [x for x, own in targets.items() if own == before and x in inputs]:
        if path in fitting:
            targets[path] = target
        else:
            del targets[path]
            text = f"last axis {inputs[path]} is not a multiple of group {target.group_size}"
            reasons[path] = Reason(ReasonCode.NO_GROUP_SIZE, text)
    library = replace(library, targets=targets, dense_reasons=reasons)
    return replace(chosen, relayout=replace(chosen.relayout, layout=library))


def _source_layout(
    checkpoint: Checkpoint, layout: SourceLayout, options: ConvertOptions, rejection: str = ""
) -> LayoutResult:
    """The layers under the source's names, with a head that is the embedding left out."""
    agreement = agreed(checkpoint, layout)
    folded = _fold_act_order(agreement.layout, options)
    return LayoutResult(agreement.checkpoint, folded, None, agreement.notes, rejection)


def _library_layout(
    checkpoint: Checkpoint, layout: SourceLayout, library: Library, options: ConvertOptions
) -> LayoutResult:
    """A library's layout of all tensors, or of those that the model computes with.

    Raises:
        CheckpointError: It is not installed, or does not take this checkpoint either way.
    """

    def attempt(checkpoint: Checkpoint, layout: SourceLayout) -> Relayout:
        return _relayout(checkpoint, layout, library, options)

    if not library.has_heads:
        relayout = attempt(checkpoint, layout)
        return LayoutResult(checkpoint, relayout.layers, relayout)
    try:
        corrected, relayout, notes = laid_out(checkpoint, layout, library, attempt)
    except CheckpointError as error:
        if options.keep_extra or library.missing_class_reason(checkpoint.config):
            raise
        reduced = without_unused_tensors(checkpoint, layout)
        if reduced is None:
            raise
        try:
            corrected, relayout, notes = laid_out(checkpoint, reduced.layout, library, attempt)
        except CheckpointError:
            raise error from None  # the error about all tensors says more
        notes = (*notes, *reduced.notes)
    return LayoutResult(corrected, relayout.layers, relayout, notes)


def _relayout(
    checkpoint: Checkpoint, layout: SourceLayout, library: Library, options: ConvertOptions
) -> Relayout:
    """The layers under a library's names.

    Raises:
        CheckpointError: It is not installed, or does not take this checkpoint.
    """
    target = options.quantization
    if target is None and not options.dequantize and not is_quantized(layout):
        target = resolve_quantization()
    recipe = options.recipe
    name = recipe.name if recipe is not None and recipe.name in library.recipes else None
    request = Request(target, name, options.dtype)
    build = partial(build_relayout, library=library, request=request, keep_extra=options.keep_extra)
    folded = build(checkpoint, _fold_act_order(layout, options))
    return folded if folded.keeps_row_orders else build(checkpoint, layout)


def _fold_act_order(layout: SourceLayout, options: ConvertOptions) -> SourceLayout:
    """Move act-order into the layers before it, wherever the codes then stay as they are."""

    def keeps(layer: SourceLayer) -> bool:
        override, target = find_override(options, layer.path), None
        if isinstance(override, Quantization):
            target, _ = fit_group_size(layer.shape[-1], override)
        elif override is None and options.quantization is not None:
            target, _ = fit_codes(layer, options.quantization, own_groups=options.own_groups)
        return not options.dequantize and (target is None or layer.keeps_codes(target))

    return layout.with_act_order_folded(keeps)


def _first_problem(error: CheckpointError) -> str:
    """The first problem of a layout that cannot be made, on one line."""
    first, more = error.problems[0], len(error.problems) - 1
    line = one_sentence(error.why if isinstance(error, LibraryLayoutError) else str(first))
    if len(line) > _MAX_REASON_CHARS:
        line = f"{line[:_MAX_REASON_CHARS].rstrip(', ')} …"
    return line + (f" (and {more:,} more problems)" if more else "")
