"""What a plan tells its reader beside the table: in words, one function a subject.

Reads what was decided and changes nothing of it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from requant.blueprint import LayerPlan, Step, Treatment
from requant.choices import KEEPS_DTYPE, Chooser, Decided
from requant.dtypes import KERNEL_FLOATS
from requant.errors import Problem, count, count_are, few
from requant.formats import SourceLayer
from requant.formats.packing import DTYPE_WORD
from requant.loader_names import module_names
from requant.reasons import Note, NoteCode, ReasonCode
from requant.relayout import Relayout
from requant.steps import with_global_scale

_EXPERT = re.compile(r"(^|\.)experts\.")


def notes_on(
    chooser: Chooser, decided: Iterable[Decided], layers: Iterable[LayerPlan], steps: Iterable[Step]
) -> Iterator[Note]:
    """Everything that the user should know of a plan."""
    decided, layers, steps = tuple(decided), tuple(layers), tuple(steps)
    yield from _extra(chooser.moved)
    yield from _tied(chooser, decided)
    yield from _rotations(decided)
    yield from _global_scales(decided)
    yield from _values(chooser, layers)
    yield from _dense_in_source(chooser, layers)
    yield from _search(chooser, layers, steps)
    yield from _budget(chooser)
    yield from _form(chooser.moved)
    if chooser.from_codes:
        yield from _dtypes(steps)
    yield from _unloadable(layers)


def _extra(moved: Relayout | None) -> Iterator[Note]:
    """Say what becomes of the kept tensors that mlx-lm's class has no use for."""
    if moved is None or not moved.extra:
        return
    names = moved.extra
    loads = "it ignores such tensors when it loads the result."
    if moved.refusal:
        loads = f"mlx-lm does not load the result as it is: {moved.refusal}"
    held = count(len(names), "tensor")
    text = f"mlx-lm has no use for {held} that --keep-extra keeps ({few(names)}); {loads}"
    yield Note(NoteCode.EXTRA_TENSORS, text)


def rotated_layers(decided: Iterable[Decided]) -> list[SourceLayer]:
    """The layers that keep a rotation of their inputs beside their codes."""
    return [x for x, target, _ in decided if x.carried and x.keeps_codes(target)]


def _tied(chooser: Chooser, decided: Iterable[Decided]) -> Iterator[Note]:
    """Say that an embedding stays dense for a head that has no weight of its own."""
    for layer, target, reason in decided:
        if reason is not None and reason.code is ReasonCode.TIED_EMBEDDING and target is None:
            yield Note(
                NoteCode.TIED_EMBEDDING,
                f"{layer.path} stays dense: a head of masked words shares it (only the head's "
                "bias is stored), and loaders copy it there without scales. --override "
                f"{layer.path}={chooser.default.bits if chooser.default else 8} quantizes it.",
            )


def _rotations(decided: Iterable[Decided]) -> Iterator[Note]:
    """Say who can run layers whose inputs are rotated."""
    turned = rotated_layers(decided)
    if turned:
        yield Note(
            NoteCode.ROTATED_INPUTS,
            f"Inputs of {count(len(turned), 'layer')} are still to be rotated: requant.mlx_lm.load "
            "and requant generate do it, other loaders do not; --fold-rotation makes plain "
            "8-bit layers.",
        )


def _global_scales(decided: Iterable[Decided]) -> Iterator[Note]:
    """Say who can run experts with tensor scales of their own."""
    count = len(with_global_scale(decided))
    if count:
        yield Note(
            NoteCode.GLOBAL_SCALES,
            f"{count} stack{'s' * (count > 1)} of experts keep their tensor scales, as MLX's "
            "global_scale: mlx-lm runs that on the GPU only (MLX 0.32.4).",
        )


def _values(chooser: Chooser, layers: Iterable[LayerPlan]) -> Iterator[Note]:
    """Name the layers whose codes mlx-lm's layout has no place for."""
    if chooser.mlx_lm is None or chooser.wishes.dequantize or chooser.default is not None:
        return
    codes = {x.path for x in chooser.layout.layers if x.kept is not None and not x.act_order}
    values = [
        x
        for x in layers
        if x.treatment is Treatment.REQUANTIZED
        and x.reason_code is ReasonCode.REENCODED_BY_SANITIZE
    ]
    members = [x for x in layers if x.reason_code is ReasonCode.MEMBERS_REENCODED]
    dense = [x for x in layers if x.treatment is Treatment.DEQUANTIZED and x.layer in codes]
    for code, found, what in (
        (
            NoteCode.REENCODED_BY_SANITIZE,
            values,
            "re-encoded with 8 bits: mlx-lm's rule for this model works on values",
        ),
        (
            NoteCode.MEMBERS_REENCODED,
            members,
            "made of members without common codes: what has none that fit gets 8 bits",
        ),
        (NoteCode.DENSE_IN_CLASS, dense, "dequantized: mlx-lm's class has no codes there"),
    ):
        if found:
            verb = "is" if len(found) == 1 else "are"
            yield Note(code, f"{few([x.layer for x in found])} {verb} {what}.")


def _dense_in_source(chooser: Chooser, layers: Iterable[LayerPlan]) -> Iterator[Note]:
    """Name the dense layers of a quantized source that a request covers, as in a dense source."""
    new = [x.layer for x in layers if x.treatment is Treatment.QUANTIZED]
    if not new or not chooser.from_codes or chooser.default is None or chooser.wishes.only:
        return
    yield Note(
        NoteCode.DENSE_IN_SOURCE,
        f"{count_are(len(new), 'layer')} dense in the source and quantized here, as in a dense "
        f"model: {few(new)}. --override 'REGEX=skip' leaves such layers dense.",
    )
    skips = chooser.checkpoint.config.get("quantization")
    skipped = [x for x in new if isinstance(skips, dict) and skips.get(x) is False]
    if skipped:
        yield Note(
            NoteCode.QUANTIZED_THOUGH_EXCLUDED,
            f"The source's quantization block says false for {few(skipped)}: what was asked for "
            "covers such layers too.",
        )


def _search(chooser: Chooser, layers: Iterable[LayerPlan], steps: Iterable[Step]) -> Iterator[Note]:
    """Say where the bits are not those of MLX's own rule, and where a search finds nothing."""
    searched = {step.layer: step.gptq for step in steps if step.search != "off"}
    if searched:
        held = count(len(searched), "layer")
        # What GPTQ hands on makes single groups worse and the layer better.
        promise = "" if any(searched.values()) else "no group is worse than by MLX's rule, and "
        yield Note(
            NoteCode.SEARCHED,
            f"Scales of {held} are searched for ({chooser.wishes.search}): {promise}the bits are "
            "not MLX's.",
        )
    moved = [x.layer for x in layers if x.treatment is Treatment.KEPT and x.layer not in searched]
    if chooser.wishes.search != "off" and chooser.default is not None and moved:
        yield Note(
            NoteCode.NOTHING_TO_SEARCH,
            f"Codes of {count(len(moved), 'layer')} are moved as they are ({few(moved)}): there "
            "is nothing to search for.",
        )


def _budget(chooser: Chooser) -> Iterator[Note]:
    """Say what a budget came to."""
    recipe = chooser.wishes.recipe
    if chooser.wishes.budget is not None and recipe is not None:
        yield Note(NoteCode.BUDGET, recipe.description)


def _form(moved: Relayout | None) -> Iterator[Note]:
    """Say that experts were brought into another form."""
    if moved is not None and moved.form:
        text = f"Experts are brought into another form for mlx-lm: {moved.form}."
        yield Note(NoteCode.EXPERTS_IN_OTHER_FORM, text)


def on_names(
    layers: Iterable[LayerPlan],
    config: Mapping[str, Any],
    why_unloadable: Callable[[], str],
    mlx_lm_refuses: Callable[[], str],
) -> Iterator[Note]:
    """What loaders have against the source's names.

    Args:
        layers: What becomes of them.
        config: Of the output.
        why_unloadable: Why mlx-lm does not load the output; "" where it does.
        mlx_lm_refuses: Why mlx-lm's layout cannot be; "" where it can.
    """
    without_codes = (Treatment.DENSE, Treatment.DEQUANTIZED)
    coded = {x.layer for x in layers if x.treatment not in without_codes}
    if any(_EXPERT.search(path) for path in coded) and (why := why_unloadable()):
        said = (
            f"Experts keep their own names here, and mlx-lm does not load them quantized so ({why})"
        )
        advice = "." if mlx_lm_refuses() else ": --layout mlx-lm stacks them as it does."
        yield Note(NoteCode.UNLOADABLE_EXPERTS, said + advice)
    block = config.get("quantization") or {}
    entries = {path: block[path] for path in sorted(coded) if isinstance(block.get(path), dict)}
    names = module_names(entries)
    if names:
        yield Note(
            NoteCode.MODULE_NAMES,
            "Loaders look for a layer's own quantization by module path, so config.json has those "
            f"of {count(len(entries), 'layer')} under other names too ({few(list(names))}); a "
            "loader with still other names does not find them.",
        )


@dataclass(frozen=True)
class LeftBehind:
    """Matrices that no name makes a layer of: they cannot be quantized under the source's names.

    Attributes:
        names: Their names.
        share: Their part of all weights.
        dtype: What they stay.
    """

    names: tuple[str, ...]
    share: float
    dtype: str

    @property
    def is_most(self) -> bool:
        """Whether the request comes to nothing for most of the weights."""
        return self.share > 0.5

    def note(self, refused: str) -> Note:
        """What the user should know; ``refused`` says why mlx-lm's layout cannot be."""
        way = "--layout mlx-lm gives them such names and quantizes them"
        if refused:
            way = f"mlx-lm does not take them: {refused}"
        return Note(NoteCode.UNNAMED_MATRICES, f"{self._said('stay')}; {way}.")

    def problem(self, refused: str) -> Problem:
        """The same where it stops the conversion."""
        return Problem(
            self.names[0],
            f"{self._said('would stay')}; mlx-lm's layout would name them, but {refused}. "
            "--layout keep quantizes the other layers all the same, --dequantize none",
        )

    def _said(self, stay: str) -> str:
        held = count(len(self.names), "tensor")
        return (
            f"{self.share:.0%} of the weights {stay} {self.dtype}: {held} not named .weight "
            f"({few(self.names)}), and no loader looks for codes under such names"
        )


def left_behind(chooser: Chooser, decided: Iterable[Decided]) -> LeftBehind | None:
    """The matrices that were asked to be quantized, and have no name that can be."""
    if chooser.moved is not None or chooser.default is None or chooser.wishes.only:
        return None
    sizes, behind = Counter[str](), []
    for layer, _, reason in decided:
        if len(layer.shape) < 2:
            continue
        size = prod(layer.shape)
        sizes["all"] += size
        is_unnamed = reason is not None and reason.code is ReasonCode.NOT_A_WEIGHT
        if is_unnamed and layer.dtype in KERNEL_FLOATS:
            sizes["behind"] += size
            behind.append(layer)
    share = sizes["behind"] / max(sizes["all"], 1)
    experts = any(_EXPERT.search(layer.path) for layer in behind)
    if not behind or not (experts or share > 0.1):
        return None
    return LeftBehind(tuple(x.dense_name for x in behind), share, behind[0].dtype)


def _dtypes(steps: Iterable[Step]) -> Iterator[Note]:
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
        yield Note(
            NoteCode.MIXED_DTYPES,
            f"Scales are {word}, other tensors {found_words}: MLX then computes in float32, "
            f"which is slower. --dtype {word} makes all of them {word}.",
        )


def unloadable_dtypes(layers: Iterable[LayerPlan]) -> list[str]:
    """Dtypes of an output that MLX cannot load (mlx-layouts: F64 and F8_E5M2 raise)."""
    return sorted({x.target for x in layers} & {"F64", "F8_E5M2", "C64"})


def _unloadable(layers: Iterable[LayerPlan]) -> Iterator[Note]:
    dtypes = unloadable_dtypes(layers)
    if dtypes:
        casts = "; --dtype bfloat16 casts F64" if "F64" in dtypes else ""
        text = f"MLX cannot load tensors of dtype {', '.join(dtypes)}{casts}."
        yield Note(NoteCode.UNLOADABLE_DTYPES, text)
