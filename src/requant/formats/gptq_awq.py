"""Folders of AutoAWQ, llm-awq, AutoGPTQ, GPTQModel and AutoRound: layers with a ``qweight``.

The shapes of a layer's tensors determine its layout and width; the config says what no shape can
(how zeros are stored, the group of a padded layer). Where the two contradict each other the layer
is rejected here; ``other_layers`` reads it if shapes leave one reading.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from requant.checkpoints.checkpoint import Checkpoint, SourceTensor
from requant.core.reasons import Note, NoteCode, Reason, ReasonCode
from requant.formats.base import (
    DefaultPolicy,
    SourceLayer,
    SourceLayout,
    Tensors,
    fallback_for,
    named_parts,
    scale_dtype,
)
from requant.formats.gptq_act_order import find_folds
from requant.formats.gptq_awq_config import METHODS, is_elsewhere, method_of, read_convention
from requant.formats.gptq_awq_layouts import WORDS, Layouts
from requant.formats.gptq_awq_rules import LayerRules
from requant.formats.quantization_block import (
    QuantizationBlock,
    find_quantization_block,
    model_dtype,
)
from requant.formats.stacks import Experts
from requant.formats.tensor_sorter import LayerError, TensorSorter
from requant.packings.awq import AwqFast, AwqGemm, AwqGemv, Marlin
from requant.packings.base import IntegerPacking
from requant.packings.gptq import Gptq
from requant.packings.rotated import ROLES as ROTATION
from requant.packings.rotated import (
    RotatedGemm,
    is_shared_rotation,
    read_rotation,
    rotation_entry,
    shared_rotation,
)

_ROLES = (*ROTATION, "qweight", "qzeros", "scales", "scaled_zeros", "g_idx", "B", "s")
_DISPUTED = (
    "{} layers hold zeros stored as all ones, which readers of GPTQ version 1 take for 0 or for "
    "2^bits: taken for 0, as exllama does. The writer may have lost them; compare the outputs."
)
_VARIANTS: dict[type[IntegerPacking], str] = {
    **{AwqGemm: "gemm", RotatedGemm: "rotated", AwqGemv: "gemv"},
    **{AwqFast: "gemv_fast", Marlin: "marlin"},
}


class GptqAwqFormat:
    """A folder whose config names one of the methods of ``name``."""

    layer_parts = "PATH.qweight with PATH.scales and PATH.qzeros"

    def __init__(self, name: str) -> None:
        self.name = name

    def claims(self, checkpoint: Checkpoint) -> str | None:
        """By ``quant_method``, or by keys that only one of the tools writes."""
        block = find_quantization_block(checkpoint)
        if block is None or method_of(block) not in METHODS[self.name]:
            return None
        if is_elsewhere(self.name, block):
            return None
        return f"{block.where}: {block.method or 'the keys of ' + self.name}"

    def read(self, checkpoint: Checkpoint) -> SourceLayout:
        block = find_quantization_block(checkpoint)
        assert block is not None
        return _Reader(self.name, checkpoint, block).read()


class _Reader:
    def __init__(self, name: str, checkpoint: Checkpoint, block: QuantizationBlock) -> None:
        self.name, self.checkpoint, self.found = name, checkpoint, block
        self.sorter = TensorSorter.by_role(checkpoint)
        self.problems = self.sorter.problems
        self.rotations: dict[tuple[str, ...], int | None] = {}
        self.rules = LayerRules(block, self.problems)
        self.model_dtype = model_dtype(checkpoint)
        self.layouts = Layouts(
            name, checkpoint, block, read_convention(name, block, self.problems), self.problems
        )

    def read(self) -> SourceLayout:
        sorter, parts_of = self.sorter, self._parts()
        taken = {part.name: path for path, parts in parts_of.items() for part in parts.values()}
        # Zeros are looked at where the config does not call them symmetric.
        read = ("g_idx",) if self.found.get("sym") else ("qzeros", "g_idx")
        sorter.read_ahead(parts_of.values(), read)
        waiting = dict(parts_of)
        for name, tensor in sorter.tensors.items():
            path = taken.get(name)
            if path is None:
                self._check_loose(tensor, parts_of)
            elif path in waiting:
                sorter.make(path, waiting.pop(path), self._layer)
        for path, parts in parts_of.items():  # those that no layer needs too
            sorter.claim((part.name for part in parts.values()), path)
        if disputed := self.layouts.disputed:
            sorter.notes.append(Note(NoteCode.CONFIG_CONTRADICTED, _DISPUTED.format(disputed)))
        if not parts_of:
            sorter.no_layer(self.found.where, f"says {self.name}, but no layer has a .qweight")
        layout = sorter.layout()
        folds = [] if self.problems else find_folds(self.checkpoint, layout.layers)
        packings = (layer.packing for layer in layout.layers)
        rotated = next((x for x in packings if isinstance(x, RotatedGemm)), None)
        rotation = None if rotated is None else rotation_entry(rotated.group, rotated.krot)
        return replace(layout, folds=tuple(folds), rotation=rotation)

    def _parts(self) -> dict[str, dict[str, SourceTensor]]:
        """Layer path -> role -> tensor, for each layer with packed words."""
        tensors = self.sorter.parts
        paths = dict.fromkeys(
            name.rpartition(".")[0]
            for name, tensor in tensors.items()
            if name.endswith(".qweight") or (name.endswith(".B") and tensor.info.dtype in WORDS)
        )
        found: dict[str, dict[str, SourceTensor]] = {}
        for path in paths:
            found[path] = named_parts(tensors, path, _ROLES)
            if found[path].keys().isdisjoint(ROTATION):
                shared = shared_rotation(path)
                found[path] |= {r: tensors[n] for r, n in shared.items() if n in tensors}
        return found

    def _check_loose(self, tensor: SourceTensor, layers: Mapping[str, object]) -> None:
        """A tensor that belongs to no packed layer must make sense without one."""
        name, info, report = tensor.name, tensor.info, self.sorter.problem
        path, _, role = name.rpartition(".")
        if is_shared_rotation(name):
            report(name, f"is a rotation that experts share, but {path} has none to rotate")
        elif role in ROTATION:
            report(name, f"{info} has no {path}.qweight next to it")
        elif role == "scales" and len(info.shape) == 1:
            report(
                name,
                f"{info} divides an activation at run time (AutoAWQ's ScaledActivation); no layer "
                "of MLX does that, so the weights alone are not the model",
            )
        elif role in ("lora_A", "lora_B") or "lora_A." in name or "lora_B." in name:
            report(name, "is an adapter next to the weights; merge it into the model first")

    def _layer(self, path: str, parts: Tensors) -> SourceLayer | None:
        before = len(self.problems)
        # One that was never filled: some loaders leave it so.
        parts = {role: part for role, part in parts.items() if role != "g_idx" or part.info.size}
        for part in parts.values():
            if not part.info.size:
                raise LayerError(part.name, f"{part.info} holds nothing")
        words = parts.get("qweight")
        if words is not None and len(words.info.shape) == 3:
            return self._stack(path, parts, words.info.shape[0])
        rule = self.rules.of(path)
        packing = self.layouts.packing(path, parts, rule)
        if packing is None or len(self.problems) > before:
            return None
        rotation_tensors = {role: parts[role] for role in ROTATION if role in parts}
        if rotation_tensors:
            rotated = self._rotated(path, packing, rotation_tensors)
            if rotated is None:
                return None
            packing = rotated
        decodes = bool(rotation_tensors) or packing.encoding is None
        return SourceLayer(
            path=path,
            parts={role: parts[role] for role in packing.required_rects(0, min(packing.rows, 64))},
            encoding=packing.encoding,
            shape=(packing.rows, packing.columns),
            dtype=scale_dtype(packing.scale_dtype, self.model_dtype),
            packing=packing,
            stored_description=self._stored(packing),
            policy=DefaultPolicy(
                fallback=fallback_for(packing.columns) if decodes else None,
                reason=_reason(packing),
                act_order=isinstance(packing, Gptq) and packing.act_order,
            ),
            rotation_tensors=rotation_tensors,
        )

    def _stack(self, path: str, parts: Tensors, count: int) -> SourceLayer | None:
        rotation = next((parts[role] for role in ROTATION if role in parts), None)
        if rotation is not None:
            message = "rotates the inputs of a stack of experts, which is not read"
            raise LayerError(rotation.name, message)
        experts = Experts.of(count, parts)
        layer = self._layer(path, experts.one())
        return None if layer is None else experts.stack(layer)

    def _rotated(
        self, path: str, packing: IntegerPacking, rotation_tensors: Tensors
    ) -> RotatedGemm | None:
        if self.name != "paroquant" or not isinstance(packing, AwqGemm):
            message = f"has a rotation of its inputs, which {self.name} layers have not"
            raise LayerError(path, message)
        whose = tuple(tensor.name for tensor in rotation_tensors.values())
        if whose not in self.rotations:  # experts share one
            n_in, group = packing.columns, packing.group
            self.rotations[whose] = read_rotation(
                self.checkpoint, path, rotation_tensors, n_in, group, problems=self.problems
            )
        krot = self.rotations[whose]
        return None if krot is None else RotatedGemm(**vars(packing), krot=krot)

    def _stored(self, packing: IntegerPacking) -> str:
        variant = _VARIANTS.get(type(packing), "")
        if isinstance(packing, Gptq):
            variant = "planar" if packing.planar else ""
        group = f"g{packing.group}" if packing.groups > 1 else "a scale a row"
        words = [self.name, variant, f"{packing.bits}-bit", group]
        if isinstance(packing, Gptq) and packing.act_order:
            words.append("act-order")
        return " ".join(word for word in words if word)


def _reason(packing: IntegerPacking) -> Reason | None:
    """The reason why a layer gets no encoding, or another group or width than it has."""
    encoding = packing.encoding
    if encoding is None:
        if packing.columns % 32:
            text = f"{packing.columns} inputs are not a multiple of MLX's smallest group, 32"
            return Reason(ReasonCode.NO_MLX_GROUP, text)
        if isinstance(packing, Gptq) and packing.act_order:
            return Reason(ReasonCode.ACT_ORDER, "act-order: its groups are not consecutive inputs")
        text = f"no group of MLX's lies within groups of {packing.group}"
        return Reason(ReasonCode.NO_MLX_GROUP, text)
    words = []
    if encoding.bits != packing.bits:
        words.append(f"{packing.bits}-bit codes in {encoding.bits}-bit words")
    if encoding.group_size != packing.group:
        words.append(f"scales repeated for groups of {encoding.group_size}")
    return Reason(ReasonCode.CODES_WIDENED, "; ".join(words)) if words else None
