"""Layers of another kind than the format that claims a folder: each is read by its own tensors.

A folder may hold integer layers, FP8 and NVFP4 side by side, and its config often describes one
of them. What the format has left over is offered to the readers of other kinds. A layer is taken
where its tensors are complete and leave one reading; one whose bits or group the config gives
wrongly is read again without them. What remains is rejected by the format.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Final

from requant.checkpoints.checkpoint import Checkpoint, SourceTensor
from requant.core.dtypes import FLOATS
from requant.core.reasons import Note, NoteCode
from requant.errors import Problem
from requant.formats.base import Format, NoReading, SourceLayer, SourceLayout
from requant.formats.exclusions import excluded_paths
from requant.formats.gptq_act_order import find_folds
from requant.formats.gptq_awq_config import METHODS
from requant.formats.one_reading import (
    OWN_NAMES,
    declares_float8,
    demands_more,
    in_other_blocks,
    is_certain,
    is_float8_of_bytes,
    without_shape_derived,
)
from requant.formats.quantization_block import (
    QuantizationBlock,
    as_table,
    find_quantization_block,
    with_block,
    without_blocks,
)
from requant.formats.scale_names import CODE_ENDINGS, ScaleNames
from requant.formats.unread_qweights import read_qweights
from requant.packings.base import IntegerPacking
from requant.text import join_first, pluralize_are

# The readers that are asked, each with the block that it is given.
_READERS: Final[tuple[tuple[str, Mapping[str, Any] | None], ...]] = (
    *((name, None) for name in ("fp8", "modelopt", "compressed-tensors", "mxfp4")),
    *((name, None) for name in ("hqq", "bitsandbytes", "torchao")),
    ("fp-quant", {"quant_method": "fp_quant", "forward_dtype": "mxfp4"}),
    ("fp-quant", {"quant_method": "fp_quant", "forward_dtype": "nvfp4"}),
)
_PLACE: Final = QuantizationBlock("", {}, ("quantization_config",))
_TELLING: Final = ("g_idx", "weight_g_idx", "weight_shape")  # read, and in order
_NAMED: Final = 3  # of many layers, how many a note names


@dataclass
class _Taken:
    """The layers that other readers have taken so far."""

    layers: list[SourceLayer] = field(default_factory=list)  # in no order
    names: set[str] = field(default_factory=set)  # of their tensors, those without use included
    # tensors without use, each with the reason
    dropped: dict[str, str] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)  # of the readers, and of the step itself
    problems: list[Problem] = field(default_factory=list)  # layers with more than one reading
    disputed: set[str] = field(default_factory=set)  # names of the tensors of those
    against: int = 0  # how many layers the config describes wrongly


def read_each_layer(
    known: Format, formats: Sequence[Format], checkpoint: Checkpoint
) -> tuple[SourceLayout, int]:
    """Every layer of a checkpoint: by ``known``, which claims it, or by what its tensors are.

    Returns the layout, and how many layers the config describes wrongly.
    """
    step = _Step(known, formats, checkpoint)
    layout = step.layout
    if any(_holds_codes(tensor) for tensor in step.left.values()):
        step.read_without_shape_derived()
        step.read_as_others()
        if step.taken.layers or step.taken.problems:
            layout = step.joined()
    odd = in_other_blocks(step.found, layout.layers)
    if odd and step.found is not None:
        text = (
            f"{step.found.where}.weight_block_size is not the blocks of {join_first(odd, _NAMED)}: "
            "the grid of their scales is believed."
        )
        note = Note(NoteCode.CONFIG_CONTRADICTED, text)
        layout = replace(layout, notes=(*layout.notes, note))
    return layout, step.taken.against + len(odd)


def _holds_codes(tensor: SourceTensor) -> bool:
    return tensor.info.dtype not in (*FLOATS, "BOOL") and len(tensor.info.shape) > 1


class _Step:
    """One checkpoint: what is left of it, and what was taken."""

    def __init__(self, known: Format, formats: Sequence[Format], checkpoint: Checkpoint) -> None:
        self.known, self.formats, self.checkpoint = known, formats, checkpoint
        dtypes = {tensor.info.dtype for tensor in checkpoint.tensors.values()}
        self.names_float8 = not dtypes.isdisjoint(("F8_E4M3", "F8_E4M3FNUZ"))
        self.found = find_quantization_block(checkpoint)
        self.layout = layout = self._by_format(checkpoint)
        self.taken = _Taken()
        gone: set[str] = set()
        rejected = {place for problem in layout.problems for place in _places(problem.where)}
        for layer in layout.layers:
            if layer.is_quantized and layer.path not in rejected:
                gone |= _used(layer)
        self.left = {n: t for n, t in checkpoint.tensors.items() if n not in gone}

    @cached_property
    def _scales(self) -> ScaleNames:
        return ScaleNames(self.checkpoint.tensors)

    @cached_property
    def _inside(self) -> dict[str, set[str]]:
        """Path -> the tensors whose names have one part more, or "weight" and one part more."""
        inside: dict[str, set[str]] = {}
        for name in self.checkpoint.tensors:
            path = name.rpartition(".")[0]
            for each in {path, path.removesuffix(".weight")}:
                inside.setdefault(each, set()).add(name)
        return inside

    def _by_format(self, checkpoint: Checkpoint) -> SourceLayout:
        """Read by the format; plain bytes are FP8 only where the config calls them so."""
        layout = self.known.read(checkpoint)
        declared = self.found is not None and declares_float8(self.found.block)
        if declared and not self.names_float8:  # as mx.load gives them
            return layout
        stored = "this folder stores that as F8_E4M3"
        why = stored if self.names_float8 else "the config does not mention FP8"
        false = [layer for layer in layout.layers if is_float8_of_bytes(layer)]
        problems = []
        for weight, scale in ((x.parts["weight"], x.parts["scale"]) for x in false):
            message = f"{weight.info} next to {scale.name} may be anything but FP8: {why}"
            problems.append(Problem(weight.name, message))
        layers = tuple(layer for layer in layout.layers if layer not in false)
        return replace(layout, layers=layers, problems=(*layout.problems, *problems))

    def read_without_shape_derived(self) -> None:
        """By the same format, without the bits and groups that the config gives."""
        block = self.found
        if block is None or self.known.name == "mlx":
            return
        bare = without_shape_derived(block.block)
        if bare == block.block:
            return
        view = with_block(self.checkpoint, block, bare)
        self._note_contradicted(self._take(self.known, view, own=True))

    def read_as_others(self) -> None:
        """By the readers of other kinds, that see nothing of the config's block."""
        bare = replace(
            self.checkpoint, config=without_blocks(self.checkpoint.config), quantization_files={}
        )
        found: list[SourceLayer] = []
        for name, block in _READERS:
            reader = next(known for known in self.formats if known.name == name)
            if name != self.known.name:
                view = bare if block is None else with_block(bare, _PLACE, block)
                found += self._take(reader, view)
        layers, problems = read_qweights(replace(bare, tensors=self.left), self.found)
        accepted = self._accept([x for x in layers if not self._is_barred(x.path)], {}, ())
        if self.known.name in METHODS:
            self._note_contradicted(accepted)
        else:
            found += accepted
        for problem in problems:
            if self._is_barred(problem.where):
                continue
            self.taken.problems.append(problem)
            self.taken.disputed |= self._names_of(problem.where) | {problem.where}
        self._note_undeclared(found)

    def _take(self, reader: Format, view: Checkpoint, own: bool = False) -> list[SourceLayer]:
        """The layers that a reader makes of what is left, if each is complete."""
        made = self._made(reader.read(replace(view, tensors=self.left)), own)
        names = {name for layer in made for name in self._names_of(layer.path) | _used(layer)}
        alone = {n: t for n, t in self.left.items() if n in names}
        if not alone:
            return []
        layout = reader.read(replace(view, tensors=alone))
        wrong = {problem.where for problem in layout.problems}
        sound = [
            layer
            for layer in self._made(layout, own)
            if not wrong & (self._names_of(layer.path) | _used(layer) | {layer.path})
        ]
        dropped = dict(self.layout.dropped) | dict(layout.dropped)
        return self._accept(sound, dropped, layout.notes)

    def _made(self, layout: SourceLayout, own: bool) -> Iterator[SourceLayer]:
        for layer in layout.layers:
            if not layer.is_quantized or self._is_barred(layer.path):
                continue
            if not (own or self._is_free(layer)):
                continue
            if is_certain(layer, self.known.name, self.left, self.names_float8):
                yield layer

    def _accept(
        self, layers: Iterable[SourceLayer], dropped: Mapping[str, str], notes: Iterable[Note]
    ) -> list[SourceLayer]:
        accepted = []
        for layer in layers:
            names, used = self._names_of(layer.path), _used(layer)
            unused = {n for n in names - used if n in dropped or n.rpartition(".")[2] in _TELLING}
            if names <= used | unused:
                accepted.append(layer)
                self.taken.names |= names | used
                self.taken.dropped |= {name: dropped[name] for name in unused if name in dropped}
        if accepted:
            self.taken.layers += accepted
            self.taken.notes += notes
            self.left = {n: t for n, t in self.left.items() if n not in self.taken.names}
        return accepted

    def _names_of(self, path: str) -> set[str]:
        """Every tensor of a layer, but its bias."""
        names = set(self._inside.get(path, ()))
        names |= {found.name for found in self._scales.of_path(path)}
        names |= {f"{path}{end}" for end in CODE_ENDINGS} & self.checkpoint.tensors.keys()
        return {name for name in names if not name.endswith((".bias", "_bias"))}

    def _is_barred(self, path: str) -> bool:
        """Whether the format that claims the folder says that no reader may take a layer."""
        names = self._names_of(path) | {path}
        return any(isinstance(x, NoReading) and x.where in names for x in self.layout.problems)

    def _is_free(self, layer: SourceLayer) -> bool:
        """Whether the format that claims the folder has no own reason to reject a layer."""
        names = self._names_of(layer.path) | {layer.path}
        if not isinstance(layer.packing, IntegerPacking):
            return True
        if self.found is None or not demands_more(self.found.block):
            return True
        own = OWN_NAMES.get(self.known.name, ())
        return not any(f"{layer.path}{ending}" in names for ending in own)

    def _why(self, layer: SourceLayer) -> str:
        """Return what the format said of a layer that it rejected."""
        names = self._names_of(layer.path) | {layer.path}
        where, problems = "" if self.found is None else self.found.where, self.layout.problems
        own = [problem for problem in problems if problem.where in names]
        own += [problem for problem in problems if problem.where.startswith(where)]
        return own[0].message if own else f"{where or 'config.json'} says otherwise"

    def _note_contradicted(self, layers: Sequence[SourceLayer]) -> None:
        """Note of layers of the format's own kind what the config says, and what they are."""
        self.taken.against += len(layers)
        together: dict[tuple[str, str], list[str]] = {}
        for layer in layers:
            together.setdefault((self._why(layer), layer.stored_as), []).append(layer.path)
        for (why, stored), paths in together.items():
            text = (
                f"{join_first(paths, _NAMED)}: {why}. The tensors leave one reading, {stored}, and "
                "are believed."
            )
            self.taken.notes.append(Note(NoteCode.CONFIG_CONTRADICTED, text))

    def _note_undeclared(self, layers: Sequence[SourceLayer]) -> None:
        """One note for each way in which layers are stored that the config does not describe."""
        paths = [layer.path for layer in layers]
        excluded = set() if self.found is None else excluded_paths(self.found, paths)
        together: dict[str, list[str]] = {}
        for layer in layers:
            if layer.path not in excluded and not self._is_declared(layer):
                together.setdefault(layer.stored_as, []).append(layer.path)
        where = "config.json" if self.found is None else self.found.where
        for stored, names in together.items():
            text = (
                f"{pluralize_are(len(names), 'layer')} stored as {stored}, of which {where} says "
                f"nothing ({join_first(names, _NAMED)}): read by what the tensors are."
            )
            self.taken.notes.append(Note(NoteCode.UNDECLARED_LAYERS, text))

    def _is_declared(self, layer: SourceLayer) -> bool:
        """Whether AutoRound's config gives a layer, or all of them, the kind of its codes."""
        if self.found is None:
            return False
        declared = as_table(self.found.table("extra_config").get(layer.path)).get("data_type")
        if declared is None:
            declared = self.found.get("data_type")
        return isinstance(declared, str) and (
            declared.lower().startswith("int") is isinstance(layer.packing, IntegerPacking)
        )

    def joined(self) -> SourceLayout:
        """The layers that the format reads of the rest, and those taken, in the order of bytes."""
        checkpoint, taken = self.checkpoint, self.taken
        rest = {n: t for n, t in checkpoint.tensors.items() if n not in taken.names}
        layout = self._by_format(replace(checkpoint, tensors=rest))
        place = {name: at for at, name in enumerate(checkpoint.tensors)}

        def first(layer: SourceLayer) -> int:
            return min(place[part.name] for part in layer.parts.values())

        own = [x for x in layout.layers if taken.disputed.isdisjoint(_used(x))]
        layers = tuple(sorted((*own, *taken.layers), key=first))
        problems = [x for x in layout.problems if x.where not in taken.disputed]
        # A layer between may be one of those that were taken.
        folds = tuple(find_folds(checkpoint, layers)) if layout.folds else ()
        return replace(
            layout,
            layers=layers,
            problems=(*problems, *taken.problems),
            dropped=(*layout.dropped, *taken.dropped.items()),
            notes=(*layout.notes, *dict.fromkeys(taken.notes)),
            folds=folds,
            unfulfilled=None if taken.layers else layout.unfulfilled,
        )


def _places(where: str) -> Iterator[str]:
    """A path, and the paths that it lies below."""
    while where:
        yield where
        where = where.rpartition(".")[0]


def _used(layer: SourceLayer) -> set[str]:
    return {part.name for part in (*layer.parts.values(), *layer.rotation_tensors.values())}
