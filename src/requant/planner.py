"""Step 3 of the road: a checkpoint, its format and the wishes become a Plan.

Pure: no tensor data is read and nothing is written. The same inputs give the same plan.
``choices`` says what becomes of a layer, ``steps`` what is to be done for it, ``plan_notes``
what the reader should know; here they become one plan.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from requant.blueprint import LayerPlan, OutputShard, Plan, Step, Treatment, place
from requant.checkpoint import Checkpoint
from requant.choices import Chooser, fit_codes, fit_group, is_quantized, override_of
from requant.errors import CheckpointError, UsageError
from requant.formats import SourceLayer, SourceLayout
from requant.formats.base import describe
from requant.formats.declared import text_sections, without_blocks
from requant.formats.packing import Exactness, Fidelity
from requant.formats.stale import read_source
from requant.idle_tensors import without_idle_tensors
from requant.left_dense import is_of_a_tower
from requant.loader_names import module_names
from requant.mlx_lm_classes import WITHOUT_A_CLASS, why_no_class
from requant.patterns import time_counted
from requant.plan_notes import (
    left_behind,
    notes_on,
    on_names,
    rotated_layers,
    unloadable_dtypes,
)
from requant.relayout import Relayout, relayout, why_unloadable
from requant.requests import nothing_quantized, unfulfilled
from requant.schema import SKIP, PerLayerQuantization, Quantization
from requant.sources import read_checkpoint
from requant.specs import resolve_quantization
from requant.statistics import read_statistics
from requant.steps import fidelity, layer_steps, material_steps, with_global_scale
from requant.tied_heads import agreed, laid_out
from requant.weighting import weighted
from requant.wishes import DTYPES, ConvertOptions

_CODES_MOVED = "the same codes, scales and biases in more bits or smaller groups"


@time_counted()
def make_plan(
    source: str | Path | Checkpoint,
    wishes: ConvertOptions,
    twins: Path | None = None,
    *,
    is_trial: bool = False,
) -> Plan:
    """Read the headers of ``source``, if they are not yet, and lay out what ``wishes`` make of it.

    Args:
        source: The folder, or what was read of it.
        wishes: What is to become of it.
        twins: Where the headers of weight files are that a stopped run has consumed.
        is_trial: Whether the options are one candidate of several, and may reach no layer.

    Raises:
        CheckpointError: With everything that is wrong with the source.
        UsageError: An override or ``only`` names nothing, or asks what cannot be.
    """
    if not isinstance(source, Checkpoint):
        checkpoint = read_checkpoint(source, wishes.config_from, twins)
    elif wishes.config_from is None or source.gguf is not None:
        checkpoint = source  # with what --config-from names
    else:
        raise UsageError(f"--config-from is for GGUF files; {source.source} is on the hub")
    read = read_source(checkpoint)
    checkpoint, layout = read.checkpoint, read.layout
    if layout.problems:
        raise CheckpointError(str(checkpoint.source), layout.problems)
    if wishes.fold_rotation:
        layout = layout.without_rotations()
    refused = ""
    if wishes.layout != "keep":
        try:
            made, moved, notes = _in_mlx_lm(checkpoint, layout, wishes)
            chooser = Chooser(made, read.format, moved.layers, wishes, moved)
            return Planner(chooser, notes).plan(is_trial)
        except CheckpointError as error:
            if wishes.layout != "auto":
                raise
            refused = _why(error)
    agreement = agreed(checkpoint, layout)
    layout = _folded(agreement.layout, wishes)
    chooser = Chooser(agreement.checkpoint, read.format, layout, wishes)
    return Planner(chooser, agreement.notes, refused).plan(is_trial)


def _in_mlx_lm(
    checkpoint: Checkpoint, layout: SourceLayout, wishes: ConvertOptions
) -> tuple[Checkpoint, Relayout, tuple[str, ...]]:
    """mlx-lm's layout: of all tensors, or of all that the model computes with.

    Returns:
        The checkpoint with the config that the layout is of, the layout, and notes.

    Raises:
        CheckpointError: mlx-lm is not there, or does not take this checkpoint.
    """
    attempt = partial(_laid_out, wishes=wishes)
    try:
        return laid_out(checkpoint, layout, attempt)
    except CheckpointError:
        if wishes.keep_extra or why_no_class(checkpoint.config):
            raise
        reduced = without_idle_tensors(checkpoint, layout)
        if reduced is None:
            raise
        try:
            made, moved, notes = laid_out(checkpoint, reduced.layout, attempt)
        except CheckpointError:
            made = None
        if made is None:
            raise
        return made, moved, (*notes, *reduced.notes)


def _as_named(
    layer: SourceLayer, target: Quantization | None, reason: str
) -> tuple[SourceLayer, Quantization | None, str]:
    """A layer and its decision; under the name that it has in the source it keeps its shape too."""
    keeps_name = target is None and layer.as_named is not None
    return (layer.as_named or layer if keeps_name else layer), target, reason


def _folded(layout: SourceLayout, wishes: ConvertOptions) -> SourceLayout:
    """Move act-order into other layers wherever the codes then stay."""

    def keeps(layer: SourceLayer) -> bool:
        override = override_of(wishes, layer.path)
        wish = wishes.quantization if override is None else override
        target = None
        if isinstance(wish, Quantization):
            fit = (
                fit_codes(layer, wish, wishes)
                if override is None
                else fit_group(layer.shape[-1], wish)
            )
            target = fit[0]
        return not wishes.dequantize and (target is None or layer.keeps_codes(target))

    return layout.folded(keeps)


def _laid_out(checkpoint: Checkpoint, layout: SourceLayout, wishes: ConvertOptions) -> Relayout:
    """The layers under mlx-lm's names.

    Raises:
        CheckpointError: mlx-lm is not there, or does not take this checkpoint.
    """
    target = wishes.quantization
    if target is None and not wishes.dequantize and not is_quantized(layout):
        target = resolve_quantization()
    recipe = wishes.recipe
    mixed = recipe.name if recipe is not None and recipe.is_mixed else None
    take = partial(
        relayout,
        quantization=target,
        dtype=wishes.dtype,
        recipe=mixed,
        keep_extra=wishes.keep_extra,
    )
    moved = take(checkpoint, _folded(layout, wishes))
    return moved if moved.keeps_row_orders else take(checkpoint, layout)


def _entries(block: Mapping[str, Any]) -> dict[str, Any]:
    """The layers of a quantization block that have a quantization of their own."""
    return {path: entry for path, entry in block.items() if isinstance(entry, dict)}


_MOST_LETTERS = 240


def _why(error: CheckpointError) -> str:
    """The first problem of a layout that cannot be, in a line."""
    first, more = error.problems[0], len(error.problems) - 1
    words = str(first).removeprefix("--layout mlx-lm: ").split(WITHOUT_A_CLASS)[0]
    line = " ".join(words.split())
    line = line.rstrip(".")
    if len(line) > _MOST_LETTERS:
        line = f"{line[:_MOST_LETTERS].rstrip(', ')} …"
    return line + (f" (and {more:,} more problems)" if more else "")


class Planner:
    """Asks what becomes of each layer, then lays out steps and shards.

    Args:
        chooser: Decides about layers.
        refused: Why mlx-lm's layout was tried and cannot be; "" where it was not tried.
    """

    def __init__(self, chooser: Chooser, notes: Iterable[str] = (), refused: str = "") -> None:
        self.chooser, self.refused = chooser, refused
        self.checkpoint, self.format, self.layout = (
            chooser.checkpoint,
            chooser.format,
            chooser.layout,
        )
        self.wishes, self.moved, self.mlx_lm = chooser.wishes, chooser.moved, chooser.mlx_lm
        kept = f"Tensors keep the source's names (--layout keep): {refused}"
        self.notes = (
            *([kept] if refused else []),
            *notes,
            *self.checkpoint.notes,
            *self.layout.notes,
        )

    def plan(self, is_trial: bool = False) -> Plan:
        """Decide every layer, then place every byte.

        Args:
            is_trial: Whether a request that no layer fulfils is no error.

        Raises:
            UsageError: With all wishes that cannot be met.
        """
        self.chooser.check_patterns()
        decided = [_as_named(layer, *self.chooser.decide(layer)) for layer in self.layout.layers]
        self.chooser.check_needs(decided)
        most = left_behind(self.chooser, decided)
        if most is not None and most.is_most and self.refused:
            raise CheckpointError(str(self.checkpoint.source), [most.problem(self.refused)])
        if self.chooser.problems:
            lines = "".join(f"\n  {problem}" for problem in self.chooser.problems)
            raise UsageError(f"{self.checkpoint.source}: wishes that cannot be met:{lines}")
        if not is_trial and (why := unfulfilled(self.chooser, decided)):
            raise UsageError(f"{self.checkpoint.source}: {why}")
        layers: list[LayerPlan] = []
        steps: list[Step] = []
        per_layer: dict[str, Quantization] = {}
        for layer, target, reason in decided:
            dtype = self.chooser.value_dtype(layer)
            made = list(layer_steps(layer, target, dtype, self.wishes))
            steps += made
            layers.append(self._layer_plan(layer, target, reason, made))
            if target is not None:
                per_layer[layer.path] = target
        rotated = bool(rotated_layers(decided))
        layers, steps, weighing = self._weighted(layers, steps)
        shards, steps = place(steps, self.wishes.shard_size, self._names_of())
        quantization = self._quantization(per_layer)
        config = self._config(quantization, rotated, with_global_scale(decided))
        return Plan(
            source=str(self.checkpoint.source),
            format=self.format,
            files=self.checkpoint.files,
            layers=tuple(layers),
            steps=tuple(steps),
            shards=shards,
            config=config,
            quantization=quantization,
            side_files=(*self.checkpoint.side_files, *sorted(self.checkpoint.made_files)),
            left_out=self.checkpoint.left_out,
            notes=(
                *([most.note(self._mlx_lm_refuses())] if most is not None else []),
                *self.notes,
                *self.chooser.notes,
                *notes_on(self.chooser, decided, layers, steps),
                *self._on_names(layers, shards, config),
                *nothing_quantized(self.chooser, decided),
                *weighing,
            ),
            dropped=self.layout.dropped,
            checkpoint=self.checkpoint,
            layout="keep" if self.moved is None else "mlx-lm",
            loads=self.moved is not None
            and not (self.moved.refusal or rotated or unloadable_dtypes(layers)),
            rotated=rotated,
            relayout=self.moved,
            materials=material_steps(self.layout, self.moved, self.wishes),
        )

    def _names_of(self) -> str:
        """Whose names the tensors have: an MLX class's, or what the source's files say."""
        if self.moved is not None:
            return "mlx"
        return "mlx" if self.checkpoint.metadata.get("format") == "mlx" else "pt"

    def _mlx_lm_refuses(self) -> str:
        """Why mlx-lm's layout cannot be, or "" where it can; tried where it was not yet."""
        if self.moved is not None or self.refused:
            return self.refused
        try:
            _laid_out(self.checkpoint, self.layout, self.wishes)
        except CheckpointError as error:
            return _why(error)
        return ""

    def _on_names(
        self, layers: Sequence[LayerPlan], shards: Sequence[OutputShard], config: Mapping[str, Any]
    ) -> Iterable[str]:
        """What loaders have against the source's names."""
        if self.moved is not None:
            return ()
        infos = {tensor.name: tensor.info for shard in shards for tensor in shard.tensors}
        return on_names(layers, config, lambda: why_unloadable(config, infos), self._mlx_lm_refuses)

    def _weighted(
        self, layers: list[LayerPlan], steps: list[Step]
    ) -> tuple[list[LayerPlan], list[Step], list[str]]:
        """Layers and steps with the statistics that were given, and what to say of them."""
        if self.wishes.statistics is None:
            return layers, steps, []
        statistics = read_statistics(self.wishes.statistics)
        shapes = {x.layer: x.shape for x in layers}
        made = weighted(steps, shapes, statistics, self.wishes.gptq)
        layers = [replace(x, reason=x.reason or made.reasons.get(x.layer, "")) for x in layers]
        return layers, list(made.steps), list(made.notes(statistics))

    def _layer_plan(
        self,
        layer: SourceLayer,
        target: Quantization | None,
        reason: str,
        steps: Sequence[Step],
    ) -> LayerPlan:
        if not layer.is_quantized:
            treatment = Treatment.DENSE if target is None else Treatment.QUANTIZED
        elif layer.keeps_codes(target):
            treatment = Treatment.KEPT
            if target != layer.encoding:
                reason = reason or _CODES_MOVED
        else:
            treatment = Treatment.DEQUANTIZED if target is None else Treatment.REQUANTIZED
        costs = [fidelity(step) for step in steps]
        if layer.is_quantized and target is None:  # its values are rounded, wherever
            costs.append(Fidelity(Exactness.ROUNDED))
        worst = max(costs, key=lambda cost: list(Exactness).index(cost.exactness))
        return LayerPlan(
            layer.path,
            layer.shape,
            layer.stored_as,
            describe(target, self.chooser.value_dtype(layer)),
            treatment,
            worst.exactness,
            sum(
                t.info.nbytes for step in steps if not step.into_row for t in step.outputs.values()
            ),
            layer.is_weight,
            reason,
            worst.bound,
        )

    def _quantization(self, per_layer: Mapping[str, Quantization]) -> PerLayerQuantization | None:
        """The output's block: a default, and the layers that differ from it."""
        if not per_layer:
            return None
        source = self.layout.quantization
        default = self.wishes.quantization or (source.quantization if source else None)
        skipped = []
        for layer in self.layout.layers:
            if layer.path not in per_layer and layer.is_weight:
                stays = source.per_layer.get(layer.path) if source else None
                choice = self.chooser.by_recipe.get(layer.path)
                by_recipe = choice is not None and choice.spec is SKIP
                if stays is SKIP or override_of(self.wishes, layer.path) is SKIP or by_recipe:
                    skipped.append(layer.path)
        return PerLayerQuantization.from_layers(per_layer, default, skipped)

    def _base_config(self) -> dict[str, Any]:
        """The source's config, or mlx-lm's.

        mlx-lm takes ``vision_config`` away, and loaders choose by it what they expect: it stays
        only where a tower does.
        """
        if self.mlx_lm is None or self.moved is None:
            return dict(self.checkpoint.config)
        config, key = self.mlx_lm.config, "vision_config"
        has_tower = any(map(is_of_a_tower, self.moved.extra))
        if key in config or key not in self.checkpoint.config or not has_tower:
            return dict(config)
        return dict(sorted({**config, key: self.checkpoint.config[key]}.items()))

    def _config(
        self,
        quantization: PerLayerQuantization | None,
        rotated: bool,
        with_global_scale: Collection[str],
    ) -> dict[str, Any]:
        """The source's config with the quantization and dtype that now hold."""
        wishes = self.wishes
        changed = (
            wishes.overrides or wishes.only or wishes.nonfinite_layers or self.format != "dense"
        )
        chosen = wishes.recipe is not None and not wishes.recipe.is_mixed
        base = self._base_config()
        base.pop("rotation", None)
        if rotated and self.layout.rotation is not None:
            base["rotation"] = dict(self.layout.rotation)
        if self.mlx_lm is not None and not (changed or chosen):
            return base
        # Where the tools of sources say how they quantized; no longer true of an output.
        config = without_blocks(base)
        if self.wishes.dtype is not None:
            name = next(word for word, header in DTYPES.items() if header == self.wishes.dtype)
            for part in text_sections(config):
                assert isinstance(part, dict)
                part.update({key: name for key in ("dtype", "torch_dtype") if key in part})
        if quantization is not None:
            block = quantization.to_dict()
            for path in block.keys() & with_global_scale:
                # A layer with an entry of its own has what that says, and no more.
                block[path]["global_scale"] = True
            if self.moved is None:
                block |= module_names(_entries(block))
            config |= {"quantization": block, "quantization_config": block}
        return config
