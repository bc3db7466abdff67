"""What a plan tells its reader beside the table: in words, one function a subject.

Reads what was decided and changes nothing of it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator

from requant.blueprint import LayerPlan, Step
from requant.choices import KEEPS_DTYPE, Chooser, Decided
from requant.dtypes import KERNEL_FLOATS
from requant.errors import count, few
from requant.formats import SourceLayer
from requant.formats.packing import DTYPE_WORD
from requant.relayout import ON_VALUES, Relayout
from requant.steps import with_global_scale

_EXPERT = re.compile(r"\.experts\.\d+\.")


def notes_on(
    chooser: Chooser, decided: Iterable[Decided], layers: Iterable[LayerPlan], steps: Iterable[Step]
) -> Iterator[str]:
    """Everything that the user should know of a plan."""
    decided, layers, steps = tuple(decided), tuple(layers), tuple(steps)
    yield from _extra(chooser.moved)
    yield from _rotations(decided)
    yield from _global_scales(decided)
    yield from _values(chooser, layers)
    yield from _search(chooser, steps)
    yield from _budget(chooser)
    yield from _experts(layers)
    if chooser.from_codes:
        yield from _dtypes(steps)
    yield from _unloadable(layers)


def _extra(moved: Relayout | None) -> Iterator[str]:
    """Say what becomes of the kept tensors that mlx-lm's class has no use for."""
    if moved is None or not moved.extra:
        return
    names = moved.extra
    loads = "it ignores such tensors when it loads the result."
    if moved.refusal:
        loads = f"mlx-lm does not load the result as it is: {moved.refusal}"
    held = count(len(names), "tensor")
    yield f"mlx-lm has no use for {held} that --keep-extra keeps ({few(names)}); {loads}"


def rotated_layers(decided: Iterable[Decided]) -> list[SourceLayer]:
    """The layers that keep a rotation of their inputs beside their codes."""
    return [x for x, target, _ in decided if x.carried and target == x.encoding]


def _rotations(decided: Iterable[Decided]) -> Iterator[str]:
    """Say who can run layers whose inputs are rotated."""
    turned = rotated_layers(decided)
    if turned:
        yield (
            f"Inputs of {count(len(turned), 'layer')} are still to be rotated: requant.mlx_lm.load "
            "and requant generate do it, other loaders do not; --fold-rotation makes plain "
            "8-bit layers."
        )


def _global_scales(decided: Iterable[Decided]) -> Iterator[str]:
    """Say who can run experts with tensor scales of their own."""
    count = len(with_global_scale(decided))
    if count:
        yield (
            f"{count} stack{'s' * (count > 1)} of experts keep their tensor scales, as MLX's "
            "global_scale: mlx-lm runs that on the GPU only (MLX 0.32.4)."
        )


def _values(chooser: Chooser, layers: Iterable[LayerPlan]) -> Iterator[str]:
    """Name the layers whose codes mlx-lm's layout has no place for."""
    if chooser.mlx_lm is None or chooser.wishes.dequantize or chooser.default is not None:
        return
    codes = {x.path for x in chooser.layout.layers if x.kept is not None and not x.act_order}
    values = [x for x in layers if x.treatment == "requantized" and x.reason == ON_VALUES]
    dense = [x for x in layers if x.treatment == "dequantized" and x.layer in codes]
    for found, what in (
        (values, "re-encoded: mlx-lm's rule for this model works on values"),
        (dense, "dequantized: mlx-lm's class has no codes there"),
    ):
        if found:
            yield f"{few([x.layer for x in found])} are {what}."


def _search(chooser: Chooser, steps: Iterable[Step]) -> Iterator[str]:
    """Say where the bits are not those of MLX's own rule."""
    searched = {step.layer: step.gptq for step in steps if step.search != "off"}
    if searched:
        layers = count(len(searched), "layer")
        # What GPTQ hands on makes single groups worse and the layer better.
        promise = "" if any(searched.values()) else "no group is worse than by MLX's rule, and "
        yield (
            f"Scales of {layers} are searched for ({chooser.wishes.search}): {promise}the bits are "
            "not MLX's."
        )


def _budget(chooser: Chooser) -> Iterator[str]:
    """Say what a budget came to."""
    recipe = chooser.wishes.recipe
    if chooser.wishes.budget is not None and recipe is not None:
        yield recipe.description


def _experts(layers: Iterable[LayerPlan]) -> Iterator[str]:
    """Warn of experts that mlx-lm does not find under their own names."""
    if any(_EXPERT.search(x.layer) and x.target != x.source for x in layers):
        yield (
            "Experts keep their own names here, and mlx-lm does not load them quantized so: "
            "--layout mlx-lm stacks them as it does."
        )


def _dtypes(steps: Iterable[Step]) -> Iterator[str]:
    """Warn where 16-bit scales would meet values of another dtype."""
    scales, dense = Counter[str](), Counter[str]()
    for step in steps:
        found = dense if "scales" not in step.outputs else scales
        tensor = step.outputs.get("scales", step.outputs.get("weight"))
        if tensor is not None and not KEEPS_DTYPE.search(tensor.name):
            found[tensor.info.dtype] += tensor.info.nbytes
    floats = {d: n for d, n in dense.items() if d in KERNEL_FLOATS}
    common = scales.most_common(1)
    if not common or common[0][0] not in ("F16", "BF16"):
        return
    others = sorted({*floats, *(d for d in scales if d in KERNEL_FLOATS)} - {common[0][0]})
    if others:
        word = DTYPE_WORD[common[0][0]]
        found_words = " and ".join(DTYPE_WORD[d] for d in others)
        yield (
            f"Scales are {word}, other tensors {found_words}: MLX then computes in float32, "
            f"which is slower. --dtype {word} makes all of them {word}."
        )


def unloadable_dtypes(layers: Iterable[LayerPlan]) -> list[str]:
    """Dtypes of an output that MLX cannot load (mlx-layouts: F64 and F8_E5M2 raise)."""
    return sorted({x.target for x in layers} & {"F64", "F8_E5M2", "C64"})


def _unloadable(layers: Iterable[LayerPlan]) -> Iterator[str]:
    dtypes = unloadable_dtypes(layers)
    if dtypes:
        casts = "; --dtype bfloat16 casts F64" if "F64" in dtypes else ""
        yield f"MLX cannot load tensors of dtype {', '.join(dtypes)}{casts}."
