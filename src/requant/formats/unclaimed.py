"""The last step of reading, whatever the format: nothing coded leaves as a dense tensor.

A format takes the layers that it knows; what no layer took goes out as it is. Here each such
tensor must be one that may: floats without a scale next to them, or a table of the model's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Final

from requant.checkpoints.checkpoint import Checkpoint, SourceTensor
from requant.core.dtypes import FLOATS, NUMPY_DTYPE, TensorInfo
from requant.core.reasons import Note, NoteCode
from requant.errors import Problem
from requant.formats.base import Format, SourceLayer, SourceLayout
from requant.formats.quantization_block import float_form
from requant.formats.scale_names import Role, ScaleName, ScaleNames, code_paths
from requant.formats.tensor_sorter import runtime_scales
from requant.text import join_first

# What models store next to floats: positions and counts, masks, rotary tables.
_TABLES: Final = frozenset({"I64", "BOOL", "C64"})
_CODES: Final = NUMPY_DTYPE.keys() - FLOATS - _TABLES
# Tables that some models store in narrow integers: endings of their names.
_TABLE_NAMES: Final = (
    *("position_ids", "token_type_ids", "position_index", "position_bucket"),
    *("mask", "masked_bias", "offsets"),
    *("tid2eid", "tid2eid.weight"),  # DeepSeek V4: a token's experts
)
_MASK_NAMES: Final = ("attn.bias", "attention.bias")  # GPT-2, GPT-J: [1, 1, n, n]
_UNREADABLE: Final = ("F8_E5M2", "F8_E5M2FNUZ")


def check_unclaimed(checkpoint: Checkpoint, layout: SourceLayout, format: Format) -> SourceLayout:
    """Check the tensors that no layer took for codes and for scales.

    Scales of floats are dropped where the config says that the floats are the values.
    """
    read = any(layer.is_quantized for layer in layout.layers)
    if read and checkpoint.gguf is None:
        layout = _without_runtime_scales(layout)
    if layout.problems and format.name == "dense":
        return layout  # the block in the config is of no format that is read
    step = _Unclaimed(checkpoint, layout, format)
    layout = step.checked()
    if layout.unfulfilled is None or read or step.float_form or layout.problems:
        return layout
    return replace(layout, problems=(layout.unfulfilled,))


def _without_runtime_scales(layout: SourceLayout) -> SourceLayout:
    """The layout without scales of activations and caches that no layer took."""
    loose = [layer for layer in layout.layers if not layer.is_quantized and len(layer.parts) == 1]
    dropped, notes = runtime_scales(part.name for x in loose for part in x.parts.values())
    if not dropped:
        return layout
    return replace(
        layout,
        layers=tuple(x for x in layout.layers if not dropped.keys() & _names(x.parts.values())),
        dropped=(*layout.dropped, *dropped.items()),
        notes=(*layout.notes, *notes),
    )


class _Unclaimed:
    """The tensors that no layer took, and what is wrong with them."""

    def __init__(self, checkpoint: Checkpoint, layout: SourceLayout, format: Format) -> None:
        self.layout, self.found = layout, format
        self.names = ScaleNames(checkpoint.tensors)
        self.is_dense = format.name == "dense"
        self.tensors: dict[str, SourceTensor] = {}  # that no quantized layer has
        self.layers: dict[str, SourceLayer] = {}  # quantized, by path
        self.owner: dict[str, str] = {}  # part of a quantized layer -> its path
        self.stacks: dict[str, SourceLayer] = {}  # of them, those whose codes are not "path.x"
        self.decoded: set[str] = set()  # blocks of a GGUF vector, say: other bytes go out
        for layer in layout.layers:
            parts = (*layer.parts.values(), *layer.rotation_tensors.values())
            names = {part.name: part for part in parts}
            takes_scales = layer.packing is not None and len(names) > 1  # floats times a scale
            if layer.is_quantized or takes_scales:
                self.layers[layer.path] = layer
                self.owner |= dict.fromkeys(names, layer.path)
                if not any(name.startswith(f"{layer.path}.") for name in names):
                    self.stacks[layer.path] = layer
            else:
                self.tensors |= names
                if layer.packing is not None:
                    self.decoded |= names.keys()
        self.float_form = float_form(checkpoint)
        self.seen: set[str] = set()  # tensors that a problem or a note names
        self.final: dict[str, str] = {}  # scale of a float weight whose values are final -> why

    def checked(self) -> SourceLayout:
        problems = [*self._of_scales(), *self._of_codes(), *self._of_layers(), *self._of_bytes()]
        layout = self.layout
        if self.final:
            layout = replace(
                layout,
                layers=tuple(
                    layer
                    for layer in layout.layers
                    if layer.is_quantized or not self.final.keys() & _names(layer.parts.values())
                ),
                dropped=(*layout.dropped, *self.final.items()),
                notes=(*layout.notes, self._final_note()),
            )
        return replace(layout, problems=(*layout.problems, *problems))

    def _final_note(self) -> Note:
        scale = "scales" if len(self.final) == 1 else "scale"
        text = (
            f"Left out: {join_first(list(self.final))}, which {scale} weights that are stored as "
            f"floats: {self.float_form}, so that their values are used as they are."
        )
        return Note(NoteCode.FINAL_SCALES, text)

    def _of_codes(self) -> Iterator[Problem]:
        scales = []
        for name, tensor in self.tensors.items():
            if name in self.seen:
                continue
            if self.names.get(name) is not None:
                scales.append(tensor)
            elif self._is_float(tensor):
                yield from self._floats(tensor)
            else:
                yield from self._coded(tensor)
        for tensor in scales:  # those that no weight has named
            if tensor.name not in self.seen and not self._is_float(tensor):
                yield from self._coded(tensor)

    def _is_float(self, tensor: SourceTensor) -> bool:
        return tensor.info.dtype in FLOATS or tensor.name in self.decoded

    def _coded(self, tensor: SourceTensor) -> Iterator[Problem]:
        """A tensor of integers or FP8 must be a table of the model's own."""
        name, info = tensor.name, tensor.info
        siblings = [found.name for found in self.names.siblings(name)]
        if not siblings and _is_table(name, info):
            return
        self.seen |= {name, *siblings}
        owner = next((self.owner[each] for each in siblings if each in self.owner), None)
        if owner is not None:
            yield Problem(name, self._stale(info, owner))
        elif info.dtype in _UNREADABLE:
            what = "this dtype has no published use for weights"
            yield Problem(name, f"{info}: {what} and is not read; expected F8_E4M3")
        elif siblings:
            message = (
                f"{info} holds codes, with {join_first(siblings)} next to it, but no layer takes it"
            )
            yield Problem(name, message + self._due(name))
        elif info.dtype.startswith("F8_"):
            what = "has no scale next to it that says what its values are multiplied by"
            yield Problem(name, f"{info} {what}{self._due(name)}")
        else:
            due = self._due(name)
            if code_paths(name) == (name,) and info.dtype in ("I32", "U8", "I8"):
                due += "; a table of the model's own (indices, a mask) is known by I64 or BOOL"
            yield Problem(name, f"{info} holds codes, but has no scale next to it{due}")

    def _due(self, name: str) -> str:
        """The parts of a layer that a tensor of codes lacks."""
        if self.is_dense:
            return ", and config.json has no quantization_config that says how it is read"
        path = next(iter(code_paths(name)), name)
        parts = str(getattr(self.found, "layer_parts", "")).replace("PATH", path)
        return f"; a layer of {self.found.name} is {parts}" if parts else ""

    def _stale(self, info: TensorInfo, path: str) -> str:
        codes = next(iter(self.layers[path].parts.values())).name
        return f"{info} is next to {codes}; remove the one that is stale"

    def _floats(self, tensor: SourceTensor) -> Iterator[Problem]:
        """A float weight with a scale is codes in floats, or the config says that it is not."""
        name, info = tensor.name, tensor.info
        matrix = len(info.shape) > 1
        siblings = [
            found
            for found in self.names.siblings(name)
            if found.is_certain or (matrix and found.role not in (Role.OFFSET, Role.TENSOR_SCALE))
        ]
        if not siblings:
            return
        owner = next((self.owner[x.name] for x in siblings if x.name in self.owner), None)
        loose = [found.name for found in siblings if found.name in self.tensors]
        self.seen |= {name, *loose}
        if owner is not None:
            yield Problem(name, self._stale(info, owner))
        elif self.float_form:
            self.final |= dict.fromkeys(loose, "scales a weight that is stored as floats")
        elif loose:
            yield Problem(name, self._floats_message(info, loose))

    def _floats_message(self, info: TensorInfo, siblings: list[str]) -> str:
        message = (
            f"{info} is next to {join_first(siblings)}: its numbers are the weight, or codes that "
            "are still to be multiplied, and nothing says which; if they are the weight, remove "
            f"{'the scale' if len(siblings) == 1 else 'those'} from the weight files"
        )
        if self.owner:  # another block would no longer describe the layers that are read
            return message
        block = '{"quant_method": "compressed-tensors", "quantization_status": "frozen"}'
        return f"{message}, or say so in config.json: quantization_config: {block}"

    def _of_scales(self) -> Iterator[Problem]:
        """A scale whose codes are missing, or are read without it."""
        alone: dict[str, list[ScaleName]] = {}
        for name in self.tensors:
            found = self.names.get(name)
            if found is None:
                continue
            codes = self.names.codes_of(found)
            if codes is None:
                alone.setdefault(found.path, []).append(found)
            elif codes in self.owner:
                self.seen.add(name)
                yield Problem(
                    name,
                    f"{self.tensors[name].info} scales {codes}, which is read as "
                    f"{self.found.name} without it; remove it if it is stale",
                )
        for path, each in alone.items():
            if self._is_of_layer(each):
                name, *others = [found.name for found in each]
                self.seen |= {name, *others}
                also = f", nor has {join_first(others)}" if others else ""
                message = f"{self.tensors[name].info} has no codes next to it{also}"
                yield Problem(name, message + self._due(f"{path}.weight"))

    def _of_layers(self) -> Iterator[Problem]:
        """Reject other tensors in a quantized layer: each may be a part of its arithmetic."""
        for name, tensor in self.tensors.items():
            layer = None if name in self.seen else self._layer_of(name)
            if layer is not None:
                yield Problem(
                    name,
                    f"{tensor.info} lies in {layer.path}, which is read as {layer.stored_as} "
                    f"without it; remove it if it is stale{self._due(f'{layer.path}.weight')}",
                )

    def _layer_of(self, name: str) -> SourceLayer | None:
        """The quantized layer that a tensor lies in: ``up.x`` in ``up``, a stack's ``up_x`` too."""
        path, _, role = name.rpartition(".")
        if role == "weight" or role.endswith(("bias", *_TABLE_NAMES)):
            return None
        if path in self.layers:
            return self.layers[path]
        ends = (len(name) - len(role) + at for at, letter in enumerate(role) if letter == "_")
        return next((self.stacks[name[:end]] for end in ends if name[:end] in self.stacks), None)

    def _of_bytes(self) -> Iterator[Problem]:
        """Plain bytes are FP8 in arrays that came without dtypes, and not next to others."""
        packed = [layer for layer in self.layout.layers if layer.packing is not None]
        if not packed:
            return
        from requant.formats.one_reading import holds_float8  # imports packings

        codes = [
            layer.parts["weight"]
            for layer in packed
            if holds_float8(layer.packing) and "weight" in layer.parts
        ]
        others = [part for part in codes if part.info.dtype.startswith("F8_")]
        for part in codes if others else ():
            if part.info.dtype == "U8":
                yield Problem(
                    part.name,
                    f"{part.info} is read as FP8, but FP8 here is stored as {others[0].info.dtype} "
                    f"({others[0].name}): it holds other codes",
                )

    def _is_of_layer(self, each: list[ScaleName]) -> bool:
        """Whether names that dense models have too are those of a quantized layer."""
        if any(found.is_certain for found in each):
            return True
        infos = [self.tensors[found.name].info for found in each]
        if len({found.role for found in each}) > 1 or any(x.dtype not in FLOATS for x in infos):
            return True
        matrix = any(
            sum(n > 1 for n in info.shape) > 1 or (len(info.shape) == 2 and info.shape[0] > 1)
            for info in infos
        )
        words = {x.word for x in each if x.name == f"{x.path}.{x.word}"}
        return matrix and ("scales" in words if self.is_dense else bool(words))


def _names(parts: Iterable[SourceTensor]) -> set[str]:
    return {part.name for part in parts}


def _is_table(name: str, info: TensorInfo) -> bool:
    """Whether integers are a table of the model's own, and no codes of a layer."""
    axes = len(info.shape)
    if info.dtype.startswith("F8_"):
        return False
    if info.dtype not in _CODES:  # I64 and the like: a weight is none of them
        return axes < 2 or not name.endswith((".weight", ".qweight", "_packed", ".W_q"))
    if axes < 2 or name.endswith(_TABLE_NAMES):
        return True
    return name.endswith(_MASK_NAMES) and axes == 4 and info.shape[:2] == (1, 1)
