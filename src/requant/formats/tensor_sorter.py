"""Sorting a checkpoint's tensors into layers: what most formats need while they read."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import fields
from functools import cached_property
from typing import Any, NamedTuple

from requant.checkpoints.checkpoint import Checkpoint, SourceTensor
from requant.core.dtypes import FLOATS
from requant.core.reasons import Note, NoteCode
from requant.errors import Problem
from requant.formats.base import NoReading, SourceLayer, SourceLayout, Tensors, dense_layer
from requant.formats.expert_shapes import Orientation
from requant.formats.layer_names import LayerNames, layer_names
from requant.formats.quantization_block import model_dtype
from requant.text import format_value, join_first, pluralize_are

_ACTIVATIONS = "a scale of activations, which MLX does not quantize"
_CACHE = "a scale of the key and value cache, which MLX keeps in floats"
_CACHE_BIAS = "an offset of the key and value cache, which MLX keeps in floats"
# Suffixes of tensors that belong to a runtime's arithmetic, not to the weights.
_RUNTIME = {
    **dict.fromkeys((".input_scale", ".input_zero_point", ".input_global_scale"), _ACTIVATIONS),
    **dict.fromkeys((".input_scale_ub", ".activation_scale", ".qscale_act"), _ACTIVATIONS),
    "_proj.output_scale": _CACHE,  # before the next line: the first ending that fits counts
    **dict.fromkeys((".output_scale", ".output_zero_point"), _ACTIVATIONS),
    **dict.fromkeys((".q_scale", ".prob_scale"), _ACTIVATIONS),
    **dict.fromkeys((".k_scale", ".v_scale", ".k_zero_point", ".v_zero_point"), _CACHE),
    **dict.fromkeys((".k_bias_scale", ".v_bias_scale"), _CACHE),
    **dict.fromkeys(("k_proj.k_bias", "v_proj.v_bias"), _CACHE_BIAS),
}
# With "." before, or joined to the path of a stack by "_".
_RUNTIME_NAMES = tuple({*_RUNTIME, *(f"_{end[1:]}" for end in _RUNTIME if end.startswith("."))})

_NAMED = 3  # of many tensors, how many a note names


class LayerError(Exception):
    """A layer that cannot be read; raised and caught while a format reads.

    Where it is ``unknown``, no other reader may take the layer: the config names a kind of codes
    that none knows, or the layer is known to lack a part.
    """

    def __init__(self, where: str, message: str, *, unknown: bool = False) -> None:
        super().__init__(message)
        self.problem = (NoReading if unknown else Problem)(where, message)


def unexpected(part: SourceTensor, expected: str) -> LayerError:
    """The error for a tensor of another dtype or shape than ``expected`` says."""
    return LayerError(part.name, f"{part.info}, expected {expected}")


def runtime_scales(
    names: Iterable[str], stacks: Collection[str] = ()
) -> tuple[dict[str, str], list[Note]]:
    """Of tensors that no layer took, those that scale activations and caches, and notes of them.

    ``stacks`` are paths of stacks of experts, to which such a name may be joined by "_".
    """
    dropped = {name: why for name in names if (why := _runtime(name, stacks))}
    notes = []
    for reason in dict.fromkeys(dropped.values()):
        found = [name for name, why in dropped.items() if why == reason]
        each = "each " if len(found) > 1 else ""
        text = f"Left out: {join_first(found, _NAMED)}, {each}{reason}."
        notes.append(Note(NoteCode.RUNTIME_SCALES, text))
    return dropped, notes


class _Example(NamedTuple):
    """A layer by which others are described that differ in path and tensors alone."""

    fields: Mapping[str, Any]  # of the layer, without path and parts
    roles: Mapping[str, str]  # role of each of its parts -> the role under which it was found

    @staticmethod
    def of(layer: SourceLayer, parts: Tensors) -> _Example | None:
        """A layer made of ``parts`` as an example; None if other fields name tensors or paths."""
        if layer.row_ranges or layer.rotation_tensors or layer.global_scale or layer.as_named:
            return None
        found = {id(part): role for role, part in parts.items()}
        if layer.name or any(id(part) not in found for part in layer.parts.values()):
            return None
        values = {x.name: getattr(layer, x.name) for x in fields(layer)}
        del values["path"], values["parts"]
        return _Example(values, {role: found[id(part)] for role, part in layer.parts.items()})

    def like(self, path: str, parts: Tensors) -> SourceLayer:
        """The layer of ``path``, which is made of ``parts``."""
        own = {role: parts[found] for role, found in self.roles.items()}
        return SourceLayer(path=path, parts=own, **self.fields)


class TensorSorter:
    """Collects layers, problems and tensors without use, and puts them in order."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint, self.tensors = checkpoint, checkpoint.tensors
        self.names = LayerNames(checkpoint.tensors, {})
        self.problems: list[Problem] = []
        self.notes: list[Note] = []
        self.dropped: dict[str, str] = {}
        self.unfulfilled: Problem | None = None
        self.dtype = model_dtype(checkpoint, "BF16")
        self._owner: dict[str, str] = {}  # tensor name -> layer path
        self._layers: dict[str, SourceLayer] = {}
        self._examples: dict[Hashable, _Example | None] = {}

    @staticmethod
    def by_role(checkpoint: Checkpoint) -> TensorSorter:
        """A sorter whose ``parts`` have the names of ``layer_names``, however tools spell them."""
        sorter = TensorSorter(checkpoint)
        sorter.names = layer_names(checkpoint.tensors)
        for one, other in sorter.names.twice:
            sorter.problem(other, f"represents the same part of a layer as {one}; remove one")
        return sorter

    @property
    def parts(self) -> Tensors:
        """Every tensor under the name that a part of a layer has."""
        return self.names.tensors

    def layers_with(self, roles: Collection[str]) -> dict[str, dict[str, SourceTensor]]:
        """Layer path -> role -> tensor, for the parts that have one of ``roles``."""
        found: dict[str, dict[str, SourceTensor]] = {}
        for name, tensor in self.parts.items():
            path, _, role = name.rpartition(".")
            if role in roles:
                found.setdefault(path, {})[role] = tensor
        return found

    def read_ahead(self, layers: Iterable[Tensors], roles: Sequence[str]) -> None:
        """Say that of each layer the tensors of ``roles`` may be read, in this order."""
        names = (parts[role].name for parts in layers for role in roles if role in parts)
        self.checkpoint.read_ahead(names)

    @cached_property
    def orientation(self) -> Orientation:
        """The orientation of the stacks of unpacked codes."""
        stacks = {
            name.removesuffix(".weight"): tensor.info.shape
            for name, tensor in self.parts.items()
            if name.endswith(".weight")
        }
        return Orientation(self.checkpoint.config, stacks)

    def problem(self, where: str, message: str) -> None:
        """Note what is wrong in one place."""
        self.problems.append(Problem(where, message))

    def no_layer(
        self, where: str, message: str, advice: str = "if the weights are dense, remove the block"
    ) -> None:
        """Note what the config promises and no layer is; said only where no tensor holds codes."""
        self.unfulfilled = Problem(where, f"{message}: {advice}")

    def add(self, layer: SourceLayer | None) -> None:
        """Keep a layer."""
        if layer is None:
            return
        layer = self.names.called(layer)
        before = self._layers.get(layer.path)
        if before is not None and before.parts != layer.parts:
            codes, others = (next(iter(x.parts.values())) for x in (layer, before))
            self.problem(
                codes.name,
                f"{codes.info} holds the codes of {layer.path}, and so does {others.name}; remove "
                "the tensors that are stale",
            )
        self._layers[layer.path] = layer
        for part in layer.parts.values():
            self._owner[part.name] = layer.path

    def make(
        self,
        path: str,
        parts: Tensors,
        make: Callable[[str, Tensors], SourceLayer | None],
        kind: Hashable = None,
    ) -> SourceLayer | None:
        """Make a layer of its tensors and keep it.

        ``kind`` is everything besides the dtypes and shapes of ``parts`` that decides what ``make``
        returns, path and tensors aside: of layers that are alike in all of these, one is made, and
        the others are described as that one is. None where each is made.

        None, with the problem recorded, where ``make`` reports one or raises a LayerError.
        """
        if kind is None:
            return self._make(path, parts, make)
        # By identity: tensors of one dtype and shape share their description.
        key = (kind, *parts, *[id(part.info) for part in parts.values()])
        example = self._examples.get(key)
        if example is not None:
            layer = example.like(path, parts)
            self.add(layer)
            return layer
        made = self._make(path, parts, make)
        if made is not None and key not in self._examples:
            self._examples[key] = _Example.of(made, parts)
        return made

    def _make(
        self, path: str, parts: Tensors, make: Callable[[str, Tensors], SourceLayer | None]
    ) -> SourceLayer | None:
        before, layer = len(self.problems), None
        try:
            layer = make(path, parts)
        except LayerError as rejected:
            self.problems.append(rejected.problem)
        if layer is None or len(self.problems) > before:
            self.claim([part.name for part in parts.values()], path)
            return None
        self.add(layer)
        return layer

    def positive_number(self, part: SourceTensor) -> float:
        """The one number that a tensor holds.

        Raises:
            LayerError: It is not finite and above 0.
        """
        number = float(self.checkpoint.read_small_tensor(part.name).reshape(-1)[0])
        if 0 < number < float("inf"):
            return number
        message = f"holds {format_value(number)}, expected a finite number above 0"
        raise LayerError(part.name, message)

    def claim(self, names: Iterable[str], path: str) -> None:
        """Assign tensors to a layer that could not be made; its problem is recorded already."""
        for name in names:
            self._owner[name] = path

    def drop(self, name: str, reason: str) -> None:
        """Leave out a tensor that has no use in MLX."""
        self.dropped[name] = reason

    @property
    def quantized(self) -> list[SourceLayer]:
        """The layers found so far."""
        return list(self._layers.values())

    @property
    def left(self) -> list[SourceTensor]:
        """Tensors that are in no layer and not dropped, in the checkpoint's order."""
        gone = self._owner.keys() | self.dropped.keys()
        return [tensor for tensor in self.tensors.values() if tensor.name not in gone]

    def drop_runtime_scales(self) -> None:
        """Drop what scales activations and caches, and say so."""
        stacks = {*self.names.own, *self.names.own.values()}
        dropped, notes = runtime_scales((tensor.name for tensor in self.left), stacks)
        self.dropped |= dropped
        self.notes += notes

    def note_dense(self, where: str, paths: Iterable[str]) -> None:
        """Note the layers of ``paths``, which the config quantizes, that hold plain values."""
        weights = {f"{path}.weight" for path in paths}
        dense = [x for x in self.left if x.name in weights and x.info.dtype in FLOATS]
        if dense:
            names = join_first([tensor.name for tensor in dense], _NAMED)
            kinds = join_first(list(dict.fromkeys(tensor.info.dtype for tensor in dense)))
            each = "is" if len(dense) == 1 else "are"
            text = (
                f"By {where}, {names} {each} quantized, but {pluralize_are(len(dense), 'tensor')} "
                f"stored as {kinds} without a scale: read as plain values."
            )
            self.notes.append(Note(NoteCode.DENSE_THOUGH_NAMED, text))

    def layout(self) -> SourceLayout:
        """Everything, in the order of the checkpoint; what no layer took is dense."""
        layers: dict[str, SourceLayer] = {}
        for tensor in self.tensors.values():
            if tensor.name in self.dropped:
                continue
            path = self._owner.get(tensor.name)
            if path is None:
                layers[tensor.name] = dense_layer(tensor)
            elif path in self._layers:
                layers[f"layer {path}"] = self._layers[path]
        return SourceLayout(
            tuple(layers.values()),
            None,
            tuple(self.problems),
            tuple(self.dropped.items()),
            tuple(self.notes),
            unfulfilled=self.unfulfilled,
        )


def _runtime(name: str, stacks: Collection[str]) -> str:
    """The reason why a tensor has no use outside of its runtime; "" for any other."""
    if not name.endswith(_RUNTIME_NAMES):
        return ""
    for end, why in _RUNTIME.items():
        joined = end.startswith(".") and name.endswith(f"_{end[1:]}")
        if name.endswith(end) or (joined and name[: -len(end)] in stacks):
            return why
    return ""
