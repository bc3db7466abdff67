"""The notes of a plan, which are printed below the table of layers; one function a subject."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from requant.core.dtypes import KERNEL_FLOATS
from requant.core.reasons import Note, NoteCode, ReasonCode
from requant.formats import SourceLayer
from requant.layouts.loader_names import module_names
from requant.layouts.relayout import Relayout
from requant.packings.base import DTYPE_NAME, Exactness
from requant.planning.plan import LayerPlan, Operation, Step, Treatment
from requant.planning.steps import with_global_scale
from requant.planning.target_selection import KEEPS_DTYPE, LayerDecision, TargetSelector
from requant.planning.unnamed_matrices import EXPERT
from requant.text import join_first, pluralize, pluralize_are


def plan_notes(
    selector: TargetSelector,
    decisions: Sequence[LayerDecision],
    layers: Sequence[LayerPlan],
    steps: Sequence[Step],
) -> Iterator[Note]:
    """Everything that the user should know of a plan, whatever its names are."""
    relayout, options = selector.relayout, selector.options
    yield from _extra_tensors(relayout)
    yield from _special_layers(selector, decisions)
    yield from _lost_codes(selector, layers)
    yield from _dense_in_source(selector, layers)
    yield from _scale_search(selector, layers, steps)
    if options.budget is not None and options.recipe is not None:
        yield Note(NoteCode.BUDGET, options.recipe.description)
    if relayout is not None and relayout.form:
        text = (
            f"Experts are brought into another form for {relayout.library.name}: {relayout.form}."
        )
        yield Note(NoteCode.EXPERTS_IN_OTHER_FORM, text)
    if selector.source_is_quantized:
        yield from _mixed_dtypes(steps)
        yield from _exact_dtype(steps)
    if dtypes := unloadable_dtypes(layers):
        casts = "; --dtype bfloat16 casts F64" if "F64" in dtypes else ""
        text = f"MLX cannot load tensors of dtype {', '.join(dtypes)}{casts}."
        yield Note(NoteCode.UNLOADABLE_DTYPES, text)


def _exact_dtype(steps: Iterable[Step]) -> Iterator[Note]:
    """The dtype in which the scales of all kept codes are exact, where they round."""
    kept = [x for x in steps if x.operation is Operation.REPACK and x.packing is not None]
    rounds = dict.fromkeys(x.layer for x in kept if _rounds(x, x.dtype))
    if not rounds:
        return
    for exact in ("F16", "F32"):
        if any(_rounds(step, exact) for step in kept):
            continue
        layers = f"{pluralize(len(rounds), 'layer')} ({join_first(tuple(rounds))})"
        text = f"Scales of {layers} are rounded; --dtype {DTYPE_NAME[exact]} keeps them exactly."
        yield Note(NoteCode.EXACT_DTYPE, text)
        return


def _rounds(step: Step, dtype: str) -> bool:
    assert step.packing is not None
    return step.packing.fidelity(dtype).exactness is Exactness.ROUNDED


def _extra_tensors(relayout: Relayout | None) -> Iterator[Note]:
    """Tensors that --keep-extra keeps and that the library's class does not use."""
    if relayout is None or not relayout.extra_tensors:
        return
    names, library = relayout.extra_tensors, relayout.library.name
    loads = "it ignores such tensors when it loads the result."
    if relayout.load_error:
        loads = f"{library} does not load the result as it is: {relayout.load_error}"
    held = pluralize(len(names), "tensor")
    text = f"{library} has no use for {held} that --keep-extra keeps ({join_first(names)}); {loads}"
    yield Note(NoteCode.EXTRA_TENSORS, text)


def rotated_layers(decisions: Iterable[LayerDecision]) -> list[SourceLayer]:
    """The layers that keep a rotation of their inputs next to their codes."""
    return [
        x.layer for x in decisions if x.layer.rotation_tensors and x.layer.keeps_codes(x.target)
    ]


def _special_layers(selector: TargetSelector, decisions: Sequence[LayerDecision]) -> Iterator[Note]:
    """Embeddings that stay dense for a head without a weight, and layers that few loaders run."""
    for decision in decisions:
        layer = decision.layer
        if decision.reason_code is ReasonCode.TIED_EMBEDDING and decision.target is None:
            yield Note(
                NoteCode.TIED_EMBEDDING,
                f"{layer.path} stays dense: a head of masked words shares it (only the head's "
                "bias is stored), and loaders copy it there without scales. --override "
                f"{layer.path}={selector.default.bits if selector.default else 8} quantizes it.",
            )
    if rotated := rotated_layers(decisions):
        yield Note(
            NoteCode.ROTATED_INPUTS,
            f"Inputs of {pluralize(len(rotated), 'layer')} are still to be rotated: "
            "requant.mlx_lm.load and requant generate do it, other loaders do not; --fold-rotation "
            "makes plain 8-bit layers.",
        )
    if number := len(with_global_scale(decisions)):
        yield Note(
            NoteCode.GLOBAL_SCALES,
            f"{pluralize(number, 'stack')} of experts keep their tensor scales, as MLX's "
            "global_scale: mlx-lm runs that on the GPU only (MLX 0.32.4).",
        )


def _lost_codes(selector: TargetSelector, layers: Sequence[LayerPlan]) -> Iterator[Note]:
    """Layers that cannot keep their codes in a library's layout."""
    layout = selector.library_layout
    if layout is None or selector.options.dequantize or selector.default is not None:
        return
    library = layout.library.name
    codes = {
        x.path
        for x in selector.layout.layers
        if x.default_target is not None and not x.policy.act_order
    }
    recomputed = [
        x.layer
        for x in layers
        if x.treatment is Treatment.REQUANTIZED and x.reason_code is ReasonCode.REENCODED_BY_RULE
    ]
    members = [x.layer for x in layers if x.reason_code is ReasonCode.MEMBERS_REENCODED]
    dense = [x.layer for x in layers if x.treatment is Treatment.DEQUANTIZED and x.layer in codes]
    by_value = f"re-encoded with 8 bits: {library}'s rule for this model works on values"
    unlike = "made of members without common codes: what has none that fit gets 8 bits"
    no_codes = f"dequantized: {library}'s class has no codes there"
    for code, names, what in (
        (NoteCode.REENCODED_BY_RULE, recomputed, by_value),
        (NoteCode.MEMBERS_REENCODED, members, unlike),
        (NoteCode.DENSE_IN_CLASS, dense, no_codes),
    ):
        if names:
            yield Note(code, f"{join_first(names)} {'is' if len(names) == 1 else 'are'} {what}.")


def _dense_in_source(selector: TargetSelector, layers: Iterable[LayerPlan]) -> Iterator[Note]:
    """Dense layers of a quantized source that the request covers, as in a dense source."""
    new = [x.layer for x in layers if x.treatment is Treatment.QUANTIZED]
    is_requested = selector.default is not None and not selector.options.only
    if not (new and selector.source_is_quantized and is_requested):
        return
    yield Note(
        NoteCode.DENSE_IN_SOURCE,
        f"{pluralize_are(len(new), 'layer')} dense in the source and quantized here, as in a dense "
        f"model: {join_first(new)}. --override 'REGEX=skip' leaves such layers dense.",
    )
    skips = selector.checkpoint.config.get("quantization")
    skipped = [x for x in new if isinstance(skips, dict) and skips.get(x) is False]
    if skipped:
        yield Note(
            NoteCode.QUANTIZED_THOUGH_EXCLUDED,
            f"The source's quantization block says false for {join_first(skipped)}: what was asked "
            "for covers such layers too.",
        )


def _scale_search(
    selector: TargetSelector, layers: Iterable[LayerPlan], steps: Iterable[Step]
) -> Iterator[Note]:
    """Layers whose bits differ from mx.quantize's, and those in which there is no search."""
    searched = {step.layer: step.gptq for step in steps if step.search != "off"}
    if searched:
        held = pluralize(len(searched), "layer")
        # The error that GPTQ propagates makes single groups worse and the layer better.
        promise = ""
        if not any(searched.values()):
            promise = "no group has a larger weighted error than by MLX's rule, and "
        yield Note(
            NoteCode.SEARCHED,
            f"Scales of {held} are searched for ({selector.options.search}): {promise}the bits are "
            "not MLX's.",
        )
    moved = [x.layer for x in layers if x.treatment is Treatment.KEPT and x.layer not in searched]
    if selector.options.search != "off" and selector.default is not None and moved:
        yield Note(
            NoteCode.NOTHING_TO_SEARCH,
            f"Codes of {pluralize(len(moved), 'layer')} are moved as they are "
            f"({join_first(moved)}): there is nothing to search for.",
        )


def _mixed_dtypes(steps: Iterable[Step]) -> Iterator[Note]:
    """16-bit scales that meet values of another dtype."""
    scales, dense = Counter[str](), Counter[str]()
    for step in steps:
        sizes = scales if "scales" in step.outputs else dense
        tensor = step.outputs.get("scales", step.outputs.get("weight"))
        if tensor is not None and not KEEPS_DTYPE.search(tensor.name):
            sizes[tensor.info.dtype] += tensor.info.nbytes
    common = scales.most_common(1)[0][0] if scales else ""
    others = sorted({x for x in (*scales, *dense) if x in KERNEL_FLOATS} - {common})
    if common in ("F16", "BF16") and others:
        word = DTYPE_NAME[common]
        yield Note(
            NoteCode.MIXED_DTYPES,
            f"Scales are {word}, other tensors {' and '.join(DTYPE_NAME[x] for x in others)}: MLX "
            f"then computes in float32, which is slower. --dtype {word} makes all of them {word}.",
        )


def unloadable_dtypes(layers: Iterable[LayerPlan]) -> list[str]:
    """Dtypes of an output that MLX cannot load (mlx-layouts: F64 and F8_E5M2 raise)."""
    return sorted({x.target for x in layers} & {"F64", "F8_E5M2", "C64"})


def loader_notes(
    layers: Iterable[LayerPlan],
    config: Mapping[str, Any],
    why_unloadable: Callable[[], str],
    other_layout: Callable[[], str],
) -> Iterator[Note]:
    """Problems that loaders have with the source's names.

    ``why_unloadable`` returns why mlx-lm does not load the output, "" where it does; and
    ``other_layout`` the library whose layout can be made, "" if there is none.
    """
    without_codes = (Treatment.DENSE, Treatment.DEQUANTIZED)
    coded = {x.layer for x in layers if x.treatment not in without_codes}
    if any(EXPERT.search(path) for path in coded) and (why := why_unloadable()):
        text = (
            f"Experts keep their own names here, and mlx-lm does not load them quantized so ({why})"
        )
        library = other_layout()
        text += f": --layout {library} stacks them as its class does." if library else "."
        yield Note(NoteCode.UNLOADABLE_EXPERTS, text)
    block = config.get("quantization") or {}
    entries = {path: block[path] for path in sorted(coded) if isinstance(block.get(path), dict)}
    names = module_names(entries)
    if names:
        yield Note(
            NoteCode.MODULE_NAMES,
            "Loaders look for a layer's own quantization by module path, so config.json has those "
            f"of {pluralize(len(entries), 'layer')} under other names too "
            f"({join_first(list(names))}); a loader with still other names does not find them.",
        )
