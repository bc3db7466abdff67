"""Choose the names and shapes of the output's layers: mlx-lm's, or the source's.

``choose_layout`` tries mlx-lm's layout unless ``--layout keep`` asks for the source's names. Under
``--layout auto`` a checkpoint that mlx-lm does not take keeps its names, and the result says why.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from requant.checkpoints.checkpoint import Checkpoint
from requant.core.reasons import Note
from requant.errors import CheckpointError
from requant.formats import SourceLayer, SourceLayout
from requant.layouts.availability import missing_class_reason
from requant.layouts.idle_tensors import without_unused_tensors
from requant.layouts.load_check import one_sentence
from requant.layouts.relayout import MlxLmLayoutError, Relayout, build_relayout
from requant.layouts.tied_heads import agreed, laid_out
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
        relayout: mlx-lm's layout; None where tensors keep the source's names.
        notes: What was changed for this layout.
        rejection: Why mlx-lm's layout was tried and failed; else "".
    """

    checkpoint: Checkpoint
    layout: SourceLayout
    relayout: Relayout | None = None
    notes: tuple[Note, ...] = ()
    rejection: str = ""


def choose_layout(
    checkpoint: Checkpoint, layout: SourceLayout, options: ConvertOptions
) -> LayoutResult:
    """Choose between mlx-lm's layout and the source's names.

    Args:
        checkpoint: The source.
        layout: Its layers as they are stored.
        options: For ``layout``, and what mlx-lm's choice of layers depends on.

    Raises:
        CheckpointError: ``--layout mlx-lm``, and mlx-lm does not take this checkpoint.
    """
    if options.layout == "keep":
        return _source_layout(checkpoint, layout, options)
    try:
        return _mlx_lm_layout(checkpoint, layout, options)
    except CheckpointError as error:
        if options.layout != "auto":
            raise
        return _source_layout(checkpoint, layout, options, rejection=_first_problem(error))


def why_not_mlx_lm(chosen: LayoutResult, options: ConvertOptions) -> str:
    """Return why mlx-lm's layout cannot be made, which is tried if it was not; "" if it can."""
    if chosen.relayout is not None or chosen.rejection:
        return chosen.rejection
    try:
        _mlx_lm_relayout(chosen.checkpoint, chosen.layout, options)
    except CheckpointError as error:
        return _first_problem(error)
    return ""


def _source_layout(
    checkpoint: Checkpoint, layout: SourceLayout, options: ConvertOptions, rejection: str = ""
) -> LayoutResult:
    """The layers under the source's names, with a head that is the embedding left out."""
    agreement = agreed(checkpoint, layout)
    folded = _fold_act_order(agreement.layout, options)
    return LayoutResult(agreement.checkpoint, folded, None, agreement.notes, rejection)


def _mlx_lm_layout(
    checkpoint: Checkpoint, layout: SourceLayout, options: ConvertOptions
) -> LayoutResult:
    """mlx-lm's layout of all tensors, or of those that the model computes with.

    Raises:
        CheckpointError: mlx-lm is not installed, or does not take this checkpoint either way.
    """
    attempt = partial(_mlx_lm_relayout, options=options)
    try:
        corrected, relayout, notes = laid_out(checkpoint, layout, attempt)
    except CheckpointError as error:
        if options.keep_extra or missing_class_reason(checkpoint.config):
            raise
        reduced = without_unused_tensors(checkpoint, layout)
        if reduced is None:
            raise
        try:
            corrected, relayout, notes = laid_out(checkpoint, reduced.layout, attempt)
        except CheckpointError:
            raise error from None  # the error about all tensors says more
        notes = (*notes, *reduced.notes)
    return LayoutResult(corrected, relayout.layers, relayout, notes)


def _mlx_lm_relayout(
    checkpoint: Checkpoint, layout: SourceLayout, options: ConvertOptions
) -> Relayout:
    """The layers under mlx-lm's names.

    Raises:
        CheckpointError: mlx-lm is not installed, or does not take this checkpoint.
    """
    target = options.quantization
    if target is None and not options.dequantize and not is_quantized(layout):
        target = resolve_quantization()
    recipe = options.recipe
    build = partial(
        build_relayout,
        quantization=target,
        dtype=options.dtype,
        recipe=recipe.name if recipe is not None and recipe.is_mixed else None,
        keep_extra=options.keep_extra,
    )
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
    line = one_sentence(error.why if isinstance(error, MlxLmLayoutError) else str(first))
    if len(line) > _MAX_REASON_CHARS:
        line = f"{line[:_MAX_REASON_CHARS].rstrip(', ')} …"
    return line + (f" (and {more:,} more problems)" if more else "")
