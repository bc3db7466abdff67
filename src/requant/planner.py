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

from requant.blueprint import LayerPlan, Plan, Step, Treatment, place
from requant.checkpoint import Checkpoint
from requant.choices import Chooser, is_quantized, override_of
from requant.errors import CheckpointError, UsageError
from requant.formats import SourceLayer, SourceLayout, detect
from requant.formats.base import describe
from requant.formats.packing import Exactness, Fidelity
from requant.formats.stale import QUANTIZATION_KEYS, read_source
from requant.mlx_lm_classes import WITHOUT_A_CLASS
from requant.patterns import time_counted
from requant.plan_notes import notes_on, rotated_layers
from requant.relayout import Relayout, relayout
from requant.requests import nothing_quantized, unfulfilled
from requant.schema import SKIP, PerLayerQuantization, Quantization
from requant.sources import read_checkpoint
from requant.specs import resolve_quantization
from requant.statistics import read_statistics
from requant.steps import fidelity, layer_steps, material_steps, with_global_scale
from requant.tied_heads import agreed, laid_out
from requant.weighting import weighted
from requant.wishes import DTYPES, Wishes


@time_counted()
def make_plan(
    source: str | Path | Checkpoint,
    wishes: Wishes,
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
    read = read_source(checkpoint, detect(checkpoint))
    checkpoint, layout = read.checkpoint, read.layout
    if layout.problems:
        raise CheckpointError(str(checkpoint.source), layout.problems)
    if wishes.fold_rotation:
        layout = layout.without_rotations()
    notes: list[str] = []
    if wishes.layout != "keep":
        try:
            laid = laid_out(checkpoint, layout, lambda x, y: _laid_out(x, y, wishes))
            chooser = Chooser(laid[0], read.format, laid[1].layers, wishes, laid[1])
            return Planner(chooser, laid[2]).plan(is_trial)
        except CheckpointError as error:
            if wishes.layout != "auto":
                raise
            notes.append(f"Tensors keep the source's names (--layout keep): {_why(error)}")
    kept = agreed(checkpoint, layout)
    layout = _folded(kept.layout, wishes)
    notes += kept.notes
    return Planner(Chooser(kept.checkpoint, read.format, layout, wishes), notes).plan(is_trial)


def _folded(layout: SourceLayout, wishes: Wishes) -> SourceLayout:
    """Move act-order into other layers wherever the codes then stay."""

    def keeps(layer: SourceLayer) -> bool:
        wish = override_of(wishes, layer.path) or wishes.quantization
        return not wishes.dequantize and (wish is SKIP or wish in (None, layer.encoding))

    return layout.folded(keeps)


def _laid_out(checkpoint: Checkpoint, layout: SourceLayout, wishes: Wishes) -> Relayout:
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


_MOST_LETTERS = 240


def _why(error: CheckpointError) -> str:
    """The first problem of a layout that cannot be, in a line."""
    first, more = error.problems[0], len(error.problems) - 1
    words = str(first).removeprefix("--layout mlx-lm: ").split(WITHOUT_A_CLASS)[0]
    line = " ".join(words.split())
    if len(line) > _MOST_LETTERS:
        line = f"{line[:_MOST_LETTERS]} ..."
    return line.rstrip(".") + (f" (and {more:,} more problems)" if more else "")


class Planner:
    """Asks what becomes of each layer, then lays out steps and shards."""

    def __init__(self, chooser: Chooser, notes: Iterable[str] = ()) -> None:
        self.chooser = chooser
        self.checkpoint, self.format, self.layout = (
            chooser.checkpoint,
            chooser.format,
            chooser.layout,
        )
        self.wishes, self.moved, self.mlx_lm = chooser.wishes, chooser.moved, chooser.mlx_lm
        self.notes = (*notes, *self.layout.notes)

    def plan(self, is_trial: bool = False) -> Plan:
        """Decide every layer, then place every byte.

        Args:
            is_trial: Whether a request that no layer fulfils is no error.

        Raises:
            UsageError: With all wishes that cannot be met.
        """
        self.chooser.check_patterns()
        decided = [(layer, *self.chooser.decide(layer)) for layer in self.layout.layers]
        self.chooser.check_needs(decided)
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
        shards, steps = place(steps, self.wishes.max_shard_bytes)
        quantization = self._quantization(per_layer)
        return Plan(
            source=str(self.checkpoint.source),
            format=self.format,
            files=self.checkpoint.files,
            layers=tuple(layers),
            steps=tuple(steps),
            shards=shards,
            config=self._config(quantization, rotated, with_global_scale(decided)),
            quantization=quantization,
            side_files=(*self.checkpoint.side_files, *sorted(self.checkpoint.made_files)),
            left_out=self.checkpoint.left_out,
            notes=(
                *self.notes,
                *self.chooser.notes,
                *notes_on(self.chooser, decided, layers, steps),
                *nothing_quantized(self.chooser, decided),
                *weighing,
            ),
            dropped=self.layout.dropped,
            checkpoint=self.checkpoint,
            layout="keep" if self.moved is None else "mlx-lm",
            loads=self.moved is not None and not self.moved.refusal and not rotated,
            relayout=self.moved,
            materials=material_steps(self.layout, self.moved, self.wishes),
        )

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
        elif layer.encoding == target and target is not None:
            treatment = Treatment.KEPT
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
        """The source's config, or mlx-lm's with the ``vision_config`` that mlx-lm takes away."""
        if self.mlx_lm is None:
            return dict(self.checkpoint.config)
        config, key = self.mlx_lm.config, "vision_config"
        if key in config or key not in self.checkpoint.config:
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
        changed = wishes.overrides or wishes.only or wishes.spoiled or self.format != "dense"
        chosen = wishes.recipe is not None and not wishes.recipe.is_mixed
        base = self._base_config()
        base.pop("rotation", None)
        if rotated and self.layout.rotation is not None:
            base["rotation"] = dict(self.layout.rotation)
        if self.mlx_lm is not None and not (changed or chosen):
            return base
        config = {key: value for key, value in base.items() if key not in QUANTIZATION_KEYS}
        text = config.get("text_config")
        if isinstance(text, dict) and self.format not in ("dense", "mlx"):
            config["text_config"] = {k: v for k, v in text.items() if k not in QUANTIZATION_KEYS}
        if self.wishes.dtype is not None:
            name = next(word for word, header in DTYPES.items() if header == self.wishes.dtype)
            for part in (config, config.get("text_config")):
                if isinstance(part, dict):
                    part.update({key: name for key in ("dtype", "torch_dtype") if key in part})
        if quantization is not None:
            block = quantization.to_dict()
            for path in block.keys() & with_global_scale:
                # A layer with an entry of its own has what that says, and no more.
                block[path]["global_scale"] = True
            config |= {"quantization": block, "quantization_config": block}
        return config
