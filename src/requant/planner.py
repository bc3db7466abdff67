"""Step 3 of the road: a checkpoint, its format and the wishes become a Plan.

Pure: no tensor data is read and nothing is written. The same inputs give the same plan.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import lcm, prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from requant.blueprint import (
    LayerPlan,
    Operation,
    OutputTensor,
    Plan,
    Step,
    Treatment,
    place,
)
from requant.checkpoint import Checkpoint, ComputedTensor, SourceTensor, read_checkpoint
from requant.dtypes import FLOATS, KERNEL_FLOATS, TensorInfo
from requant.errors import CheckpointError, Problem, UsageError
from requant.formats import SourceLayer, SourceLayout, detect
from requant.formats.base import RowOrder, Rows, describe
from requant.formats.packing import DTYPE_WORD, Exactness, Fidelity, Packing
from requant.mlx_lm_classes import WITHOUT_A_CLASS
from requant.patterns import search
from requant.recipes import ROLES, Choice
from requant.relayout import ON_VALUES, Relayout, relayout
from requant.schema import SKIP, PerLayerQuantization, Quantization, QuantMode
from requant.specs import Spec, resolve_quantization
from requant.wishes import DTYPES, Wishes

# Layers that stay dense unless an override names them: (reason, pattern on the layer path).
# What they hold is small, or no matrix product ever reads it.
_NAMED_DENSE = tuple(
    (reason, re.compile(pattern))
    for reason, pattern in (
        ("convolution", r"conv"),
        ("norm", r"norm|(^|[._])ln(_|\d|$)"),
        ("router", ROLES["router"]),
        ("position table", r"(^|\.)wpe$|pos(ition)?_?emb|embed_positions|relative_.*bias|rotary"),
    )
)
# Float tensors that must keep their dtype whatever --dtype says: routers add this bias to
# scores that are compared with each other (mlx_lm/models/deepseek_v3.py, cast_predicate).
_KEEPS_DTYPE = re.compile(r"e_score_correction_bias$")

if TYPE_CHECKING:
    from requant.mlx_lm_layout import MlxLmLayout


def make_plan(source: str | Path | Checkpoint, wishes: Wishes, twins: Path | None = None) -> Plan:
    """Read the headers of ``source``, if they are not yet, and lay out what ``wishes`` make of it.

    Args:
        source: The folder, or what was read of it.
        wishes: What is to become of it.
        twins: Where the headers of weight files are that a stopped run has consumed.

    Raises:
        CheckpointError: With everything that is wrong with the source.
        UsageError: An override or ``only`` names nothing, or asks what cannot be.
    """
    if not isinstance(source, Checkpoint):
        checkpoint = read_checkpoint(source, wishes.config_from, twins)
    elif wishes.config_from is None:
        checkpoint = source
    else:
        raise UsageError(f"--config-from is for GGUF files; {source.source} is on the hub")
    found = detect(checkpoint)
    layout = found.read(checkpoint)
    if layout.problems:
        raise CheckpointError(str(checkpoint.source), layout.problems)
    if wishes.fold_rotation:
        layout = layout.without_rotations()
    notes: list[str] = []
    if wishes.layout != "keep":
        try:
            moved = _laid_out(checkpoint, _folded(layout, wishes), wishes)
            if not moved.keeps_row_orders:
                moved = _laid_out(checkpoint, layout, wishes)
            return Planner(checkpoint, found.name, moved.layers, wishes, moved).plan()
        except CheckpointError as error:
            if wishes.layout != "auto":
                raise
            notes.append(f"Tensors keep the source's names (--layout keep): {_why(error)}")
    layout = _folded(layout, wishes)
    return Planner(checkpoint, found.name, layout, wishes, notes=notes).plan()


def _folded(layout: SourceLayout, wishes: Wishes) -> SourceLayout:
    """Move act-order into other layers wherever the codes then stay."""

    def keeps(layer: SourceLayer) -> bool:
        wish = _override(wishes, layer.path) or wishes.quantization
        return not wishes.dequantize and (wish is SKIP or wish in (None, layer.encoding))

    return layout.folded(keeps)


def _override(wishes: Wishes, path: str) -> Spec | None:
    """The last override that matches: a target, SKIP, or None."""
    hits = [spec for pattern, spec in wishes.overrides if search(pattern, path)]
    return hits[-1] if hits else None


def _laid_out(checkpoint: Checkpoint, layout: SourceLayout, wishes: Wishes) -> Relayout:
    """The layers under mlx-lm's names.

    Raises:
        CheckpointError: mlx-lm is not there, or does not take this checkpoint.
    """
    target = wishes.quantization
    if target is None and not wishes.dequantize and not _is_quantized(layout):
        target = resolve_quantization()
    recipe = wishes.recipe
    mixed = recipe.name if recipe is not None and recipe.is_mixed else None
    return relayout(checkpoint, layout, target, wishes.dtype, mixed, wishes.keep_extra)


def _is_quantized(layout: SourceLayout) -> bool:
    return any(layer.is_quantized for layer in layout.layers)


_MOST_LETTERS = 240


def _why(error: CheckpointError) -> str:
    """The first problem of a layout that cannot be, in a line."""
    first, more = error.problems[0], len(error.problems) - 1
    words = str(first).removeprefix("--layout mlx-lm: ").split(WITHOUT_A_CLASS)[0]
    line = " ".join(words.split())
    if len(line) > _MOST_LETTERS:
        line = f"{line[:_MOST_LETTERS]} ..."
    return line.rstrip(".") + (f" (and {more:,} more problems)" if more else "")


_EXPERT = re.compile(r"\.experts\.\d+\.")


class Planner:
    """Takes one decision per layer, then lays out steps and shards."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        format_name: str,
        layout: SourceLayout,
        wishes: Wishes,
        moved: Relayout | None = None,
        notes: Iterable[str] = (),
    ) -> None:
        self.checkpoint, self.format, self.layout = checkpoint, format_name, layout
        self.wishes, self.moved = wishes, moved
        self.mlx_lm = None if moved is None else moved.layout
        self.from_codes = _is_quantized(layout)
        self.notes: list[str] = [*notes, *layout.notes]
        self.wrong_wishes: list[Problem] = []
        self.default = self._default()
        self.extra = frozenset(moved.shown[x].path for x in moved.extra) if moved else frozenset()
        self.chosen = self._choices()
        self.rotated = False

    def _choices(self) -> dict[str, Choice]:
        """What the recipe says about each layer that it names."""
        recipe = self.wishes.recipe
        if recipe is None:
            return {}
        paths = [layer.path for layer in self.layout.layers if layer.is_weight]
        if not recipe.is_shipped:
            self.notes += [
                f"Recipe {recipe.name}: match {pattern!r} fits no layer."
                for pattern in recipe.idle_patterns(paths)
            ]
        return recipe.choose(paths, self.default)

    def _default(self) -> Quantization | None:
        """The quantization of a chosen layer that no override names."""
        if self.wishes.quantization is not None or self.wishes.dequantize:
            return self.wishes.quantization
        if self.from_codes:
            return None
        self.notes.append(
            "No bits or mode were asked for: affine, 4 bits, group 64 (MLX's default); "
            "--dequantize keeps the model dense."
        )
        return resolve_quantization()

    def plan(self) -> Plan:
        """Decide every layer, then place every byte.

        Raises:
            UsageError: With all wishes that cannot be met.
        """
        self._check_patterns()
        decided = [(layer, *self._decide(layer)) for layer in self.layout.layers]
        self._check_needs(decided)
        if self.wrong_wishes:
            lines = "".join(f"\n  {problem}" for problem in self.wrong_wishes)
            raise UsageError(f"{self.checkpoint.source}: wishes that cannot be met:{lines}")
        layers: list[LayerPlan] = []
        steps: list[Step] = []
        per_layer: dict[str, Quantization] = {}
        for layer, target, reason in decided:
            made = list(self._steps(layer, target))
            steps += made
            layers.append(self._layer_plan(layer, target, reason, made))
            if target is not None:
                per_layer[layer.path] = target
        self._note_extra()
        self._note_rotations(decided)
        self._note_values(layers)
        shards, steps = place(steps, self.wishes.max_shard_bytes)
        quantization = self._quantization(per_layer)
        self._note_search(steps)
        self._note_loads(layers, steps)
        return Plan(
            source=str(self.checkpoint.source),
            format=self.format,
            files=self.checkpoint.files,
            layers=tuple(layers),
            steps=tuple(steps),
            shards=shards,
            config=self._config(quantization),
            quantization=quantization,
            side_files=(*self.checkpoint.side_files, *sorted(self.checkpoint.made_files)),
            left_out=self.checkpoint.left_out,
            notes=tuple(self.notes),
            dropped=self.layout.dropped,
            checkpoint=self.checkpoint,
            layout="keep" if self.moved is None else "mlx-lm",
            loads=self.moved is not None and not self.moved.refusal and not self.rotated,
            relayout=self.moved,
            materials=self._materials(),
        )

    # -- one layer's fate --------------------------------------------------------------

    def _check_patterns(self) -> None:
        """A pattern that matches no layer is a slip of the pen: suggest what was meant."""
        paths = [layer.path for layer in self.layout.layers if layer.is_weight]
        named = [("override", pattern) for pattern, _ in self.wishes.overrides]
        named += [("only", pattern) for pattern in self.wishes.only]
        for option, pattern in named:
            if any(search(pattern, path) for path in paths):
                continue
            near = ", ".join(_near(pattern, paths))
            hint = f"near it: {near}" if near else "requant inspect lists the names"
            if self.moved is not None:
                old = [x.path for x in self.moved.source.layers if re.search(pattern, x.path)]
                if old:
                    hint += f". It names {old[0]} in the source: --layout keep keeps such names"
            self.wrong_wishes.append(
                Problem(f"--{option} {pattern!r}", f"matches no layer; {hint}")
            )

    def _decide(self, layer: SourceLayer) -> tuple[Quantization | None, str]:
        """The layer's quantization in the output (None: dense) and the reason to tell."""
        target, reason = self._chosen(layer)
        if target is not None and self.mlx_lm is not None and not self._fits_class(layer):
            return None, "mlx-lm's class holds it dense"
        return target, reason

    def _fits_class(self, layer: SourceLayer) -> bool:
        """Whether mlx-lm can load the layer quantized; what it does not load is free."""
        assert self.mlx_lm is not None
        loaded = f"{layer.path}.weight" in self.mlx_lm.tensors
        return not loaded or layer.path in self.mlx_lm.quantizable

    def _chosen(self, layer: SourceLayer) -> tuple[Quantization | None, str]:
        wishes = self.wishes
        if layer.path in wishes.spoiled:
            return layer.encoding, "holds NaN or infinity"
        override = _override(self.wishes, layer.path) if layer.is_weight else None
        if isinstance(override, Quantization):
            return self._forced(layer, override), ""
        if override is SKIP:
            return layer.encoding, "skipped by an override"
        if layer.path in self.extra and not wishes.dequantize:
            return layer.kept, "mlx-lm has no use for it"
        if wishes.only and not any(search(p, layer.path) for p in wishes.only):
            return layer.kept, "not matched by --only"
        if wishes.dequantize:
            return None, ""
        choice = self.chosen.get(layer.path)
        if choice is not None and choice.spec is SKIP:
            return layer.encoding, "skipped by the recipe"
        wish = choice.spec if choice is not None else self.default
        if not isinstance(wish, Quantization):
            dense = layer.act_order and wishes.act_order == "dense"
            return None if dense else layer.kept, layer.reason
        points = choice is not None and choice.points
        dense = self.format == "dense" or self._is_dense_gguf
        if not (layer.is_quantized or dense or wishes.only or points):
            return None, "dense in the source"
        if self.mlx_lm is not None:
            return self._in_mlx_lm_s_layout(layer, self.mlx_lm, choice)
        if layer.is_quantized:
            target, reason = fit_group(layer.shape[-1], wish)
            return target or layer.kept, reason
        return _dense_target(layer, wish, wishes.dtype, any_name=points)

    def _in_mlx_lm_s_layout(
        self, layer: SourceLayer, mlx_lm: MlxLmLayout, choice: Choice | None
    ) -> tuple[Quantization | None, str]:
        """mlx-lm's choice for a layer, or the recipe's where mlx-lm can load that."""
        own, reason = mlx_lm.targets.get(layer.path), layer.reason
        if own is None:
            reason = mlx_lm.dense_reasons.get(layer.path, reason)
            own = layer.kept if layer.is_quantized else None
        mixed = self.wishes.recipe is not None and self.wishes.recipe.is_mixed
        if choice is None or not isinstance(choice.spec, Quantization) or mixed:
            return own, reason
        if own is None and not (choice.points and layer.path in mlx_lm.quantizable):
            return own, reason
        group_size, n_in = choice.spec.group_size, layer.shape[-1]
        if n_in % group_size:
            return own, f"last axis {n_in} is no multiple of group {group_size}"
        return choice.spec, ""

    def _check_needs(self, decided: Iterable[tuple[SourceLayer, Quantization | None, str]]) -> None:
        """Refuse layers whose fate the user must choose, once for each kind of them."""
        if self.wishes.act_order == "refuse" and self.default is None:
            for layer, target, _ in decided:
                if layer.act_order and target == layer.kept:
                    self.wrong_wishes.append(
                        Problem(layer.path, "has its inputs in act-order, which is to be refused")
                    )
        needs = Counter[str]()
        first: dict[str, str] = {}
        wished = self.wishes.dequantize or self.default is not None
        for layer, target, _ in decided:
            skipped = _override(self.wishes, layer.path) is SKIP
            if layer.needs_wish and target is None and not (wished or skipped):
                needs[layer.needs_wish] += 1
                first.setdefault(layer.needs_wish, layer.path)
        for message, count in needs.items():
            where = first[message] + (f" and {count - 1} more" if count > 1 else "")
            self.wrong_wishes.append(Problem(where, message))

    def _forced(self, layer: SourceLayer, target: Quantization) -> Quantization | None:
        """An override is met exactly or refused."""
        shape, dtype = layer.shape, self._value_dtype(layer)
        message = ""
        if self.mlx_lm is not None and not self._fits_class(layer):
            message = f"mlx-lm's class holds {layer.path} dense; --layout keep does not ask it"
        elif len(shape) < 2:
            message = f"{layer.path}.weight has shape {list(shape)}: a vector is not quantized"
        elif shape[-1] % target.group_size:
            message = (
                f"the last axis of {layer.path}.weight {list(shape)} is no multiple of group "
                f"size {target.group_size}"
            )
        elif dtype not in KERNEL_FLOATS:
            message = f"{layer.path}.weight is {dtype}; give a float dtype with --dtype"
        if message:
            spec = describe(target, "")
            self.wrong_wishes.append(Problem(f"--override to {spec}", message))
        return target

    @property
    def _is_dense_gguf(self) -> bool:
        """A GGUF file without codes is quantized like any dense source."""
        return self.checkpoint.gguf is not None and not self.from_codes

    def _value_dtype(self, layer: SourceLayer) -> str:
        """Dtype of the layer's values before they are quantized or stored dense."""
        wish = self.wishes.dtype
        castable = layer.dtype in FLOATS and not _KEEPS_DTYPE.search(layer.path)
        if self.mlx_lm is not None and not (layer.is_quantized or layer.path in self.extra):
            # A source that keeps its codes keeps its dtypes too.
            wish = wish if self.from_codes else self.mlx_lm.dtype
            castable = layer.dtype in FLOATS and (
                layer.parts["weight"].name not in self.mlx_lm.keeps_dtype
            )
        return wish if wish is not None and castable else layer.dtype

    # -- steps -------------------------------------------------------------------------

    def _steps(self, layer: SourceLayer, target: Quantization | None) -> Iterator[Step]:
        dtype = self._value_dtype(layer)
        if layer.packing is not None:
            yield from self._packed_steps(layer, layer.packing, target, dtype)
        elif layer.encoding is None and target is None:
            yield _flat_step(layer.path, layer.parts["weight"], dtype, layer.row_order)
        elif layer.encoding == target:
            for part in layer.parts.values():
                floats = part.info.dtype in FLOATS and not part.name.endswith(".global_scale")
                yield _flat_step(
                    layer.path, part, self.wishes.dtype or part.info.dtype if floats else None
                )
        else:
            yield self._coding_step(layer, target, dtype)

    def _coding_step(self, layer: SourceLayer, target: Quantization | None, dtype: str) -> Step:
        encoding = layer.encoding
        operation = Operation.ENCODE
        if encoding is not None:
            operation = Operation.DECODE if target is None else Operation.RECODE
        outputs = {"weight": TensorInfo(dtype, layer.shape)}
        if target is not None:
            outputs = triple_infos(layer.shape, dtype, target)
        units = [q.group_size for q in (encoding, target) if q is not None]
        unit = lcm(*units) if layer.row_order is None else layer.shape[-1]
        rows, columns = _row_view(layer.shape, unit)
        return Step(
            layer.path,
            operation,
            rows,
            columns,
            {role: part for role, part in layer.parts.items() if role != "global_scale"},
            {role: OutputTensor(f"{layer.path}.{role}", info) for role, info in outputs.items()},
            encoding,
            target,
            dtype,
            layer.parts.get("global_scale"),
            search=self._search(operation),
            row_order=layer.row_order,
        )

    def _search(self, operation: Operation) -> str:
        """How a step finds scales; "off" where it computes none."""
        coded = operation in (Operation.ENCODE, Operation.RECODE)
        return self.wishes.search if coded else "off"

    def _packed_steps(
        self, layer: SourceLayer, packing: Packing, target: Quantization | None, dtype: str
    ) -> Iterator[Step]:
        """Move the codes where they stay, else decode, and encode again where wished.

        A layer under another layout than the source's takes one step for each run of rows.
        """
        outputs = {"weight": TensorInfo(dtype, layer.shape)}
        operation = Operation.DECODE
        if target is not None:
            outputs = triple_infos(layer.shape, dtype, target)
            operation = Operation.REPACK if target == layer.encoding else Operation.RECODE
        names = {"weight": layer.dense_name}
        into_row = 0
        for run in layer.pieces or (Rows(layer, 0, packing.rows),):
            assert run.layer.packing is not None
            yield Step(
                layer.path,
                operation,
                run.count,
                packing.columns,
                run.layer.parts,
                {
                    role: OutputTensor(names.get(role, f"{layer.path}.{role}"), x)
                    for role, x in outputs.items()
                },
                None,
                target,
                dtype,
                packing=run.layer.packing,
                first_row=run.start,
                into_row=into_row,
                row_step=run.step,
                search=self._search(operation),
                row_order=run.layer.row_order,
            )
            into_row += run.count
        if operation is Operation.REPACK:
            for role, tensor in layer.carried.items():
                yield _flat_step(layer.path, tensor, None, name=f"{layer.path}.{role}")

    def _materials(self) -> dict[str, Step]:
        """The steps that make dense what computed tensors are made from."""
        if self.moved is None:
            return {}
        parts = (part for layer in self.layout.layers for part in layer.parts.values())
        names = (name for x in parts if isinstance(x, ComputedTensor) for name in x.inputs)
        return {name: self._material(self.moved.shown[name]) for name in dict.fromkeys(names)}

    def _material(self, layer: SourceLayer) -> Step:
        if layer.packing is not None:
            return next(self._packed_steps(layer, layer.packing, None, layer.dtype))
        if layer.encoding is not None:
            return self._coding_step(layer, None, layer.dtype)
        return _flat_step(layer.path, layer.parts["weight"], None)

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
        costs = [_fidelity(step) for step in steps]
        if layer.is_quantized and target is None:  # its values are rounded, wherever
            costs.append(Fidelity(Exactness.ROUNDED))
        worst = max(costs, key=lambda cost: list(Exactness).index(cost.exactness))
        return LayerPlan(
            layer.path,
            layer.shape,
            layer.stored_as,
            describe(target, self._value_dtype(layer)),
            treatment,
            worst.exactness,
            sum(
                t.info.nbytes for step in steps if not step.into_row for t in step.outputs.values()
            ),
            layer.is_weight,
            reason,
            worst.bound,
        )

    # -- the whole ---------------------------------------------------------------------

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
                choice = self.chosen.get(layer.path)
                by_recipe = choice is not None and choice.spec is SKIP
                if stays is SKIP or _override(self.wishes, layer.path) is SKIP or by_recipe:
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

    def _config(self, quantization: PerLayerQuantization | None) -> dict[str, Any]:
        """The source's config with the quantization and dtype that now hold."""
        wishes = self.wishes
        changed = wishes.overrides or wishes.only or wishes.spoiled or self.format != "dense"
        chosen = wishes.recipe is not None and not wishes.recipe.is_mixed
        base = self._base_config()
        base.pop("rotation", None)
        if self.rotated and self.layout.rotation is not None:
            base["rotation"] = dict(self.layout.rotation)
        if self.mlx_lm is not None and not (changed or chosen):
            return base
        config = {
            key: value
            for key, value in base.items()
            if key not in ("quantization", "quantization_config")
        }
        if self.wishes.dtype is not None:
            name = next(word for word, header in DTYPES.items() if header == self.wishes.dtype)
            for part in (config, config.get("text_config")):
                if isinstance(part, dict):
                    part.update({key: name for key in ("dtype", "torch_dtype") if key in part})
        if quantization is not None:
            block = quantization.to_dict()
            config |= {"quantization": block, "quantization_config": block}
        return config

    def _note_rotations(
        self, decided: Iterable[tuple[SourceLayer, Quantization | None, str]]
    ) -> None:
        """Say who can run layers whose inputs are rotated."""
        turned = [x for x, target, _ in decided if x.carried and target == x.encoding]
        self.rotated = bool(turned)
        if turned:
            self.notes.append(
                f"{len(turned)} layers keep the rotation of their inputs: requant.mlx_lm.load and "
                "requant generate run them, other loaders do not; --fold-rotation makes plain "
                "8-bit layers."
            )

    def _note_extra(self) -> None:
        """Say what becomes of the kept tensors that mlx-lm's class has no use for."""
        if self.moved is None or not self.moved.extra:
            return
        names = self.moved.extra
        listed = f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
        loads = "mlx-lm ignores them when it loads the result."
        if self.moved.refusal:
            loads = f"mlx-lm does not load the result as it is: {self.moved.refusal}"
        self.notes.append(
            f"{len(names):,} tensors that mlx-lm has no use for are kept ({listed}); {loads}"
        )

    def _note_values(self, layers: Iterable[LayerPlan]) -> None:
        """Name the layers whose codes mlx-lm's layout has no place for."""
        if self.mlx_lm is None or self.wishes.dequantize or self.default is not None:
            return
        codes = {x.path for x in self.layout.layers if x.kept is not None and not x.act_order}
        values = [x for x in layers if x.treatment == "requantized" and x.reason == ON_VALUES]
        dense = [x for x in layers if x.treatment == "dequantized" and x.layer in codes]
        for found, what in (
            (values, "re-encoded: mlx-lm's rule for this model works on values"),
            (dense, "dequantized: mlx-lm's class has no codes there"),
        ):
            if found:
                names = ", ".join(x.layer for x in found[:3])
                more = f" and {len(found) - 3} more" if len(found) > 3 else ""
                self.notes.append(f"{names}{more} are {what}.")

    def _note_dtypes(self, steps: Iterable[Step]) -> None:
        """Warn where 16-bit scales would meet values of another dtype."""
        scales, dense = Counter[str](), Counter[str]()
        for step in steps:
            found = dense if "scales" not in step.outputs else scales
            tensor = step.outputs.get("scales", step.outputs.get("weight"))
            if tensor is not None and not _KEEPS_DTYPE.search(tensor.name):
                found[tensor.info.dtype] += tensor.info.nbytes
        floats = {d: n for d, n in dense.items() if d in KERNEL_FLOATS}
        common = scales.most_common(1)
        if not common or common[0][0] not in ("F16", "BF16"):
            return
        others = sorted({*floats, *(d for d in scales if d in KERNEL_FLOATS)} - {common[0][0]})
        if others:
            word = DTYPE_WORD[common[0][0]]
            found_words = " and ".join(DTYPE_WORD[d] for d in others)
            self.notes.append(
                f"Scales are {word}, other tensors {found_words}: MLX then computes in float32, "
                f"which is slower. --dtype {word} makes all of them {word}."
            )

    def _note_search(self, steps: Iterable[Step]) -> None:
        """Say where the bits are not those of MLX's own rule."""
        searched = {step.layer for step in steps if step.search != "off"}
        if searched:
            layers = f"{len(searched)} layer{'s' * (len(searched) > 1)}"
            self.notes.append(
                f"Scales of {layers} are searched for ({self.wishes.search}): no group is worse "
                "than by MLX's rule, and the bits are not MLX's."
            )

    def _note_loads(self, layers: Iterable[LayerPlan], steps: Iterable[Step]) -> None:
        """Warn of dtypes that MLX cannot load (mlx-layouts: F64 and F8_E5M2 raise)."""
        if any(_EXPERT.search(x.layer) and x.target != x.source for x in layers):
            self.notes.append(
                "Experts keep their own names here, and mlx-lm does not load them quantized so: "
                "--layout mlx-lm stacks them as it does."
            )
        if self.from_codes:
            self._note_dtypes(steps)
        unloadable = sorted({x.target for x in layers} & {"F64", "F8_E5M2", "C64"})
        if unloadable:
            self.notes.append(
                f"MLX cannot load tensors of dtype {', '.join(unloadable)}; --dtype casts F64."
            )


def triple_infos(
    shape: tuple[int, ...], dtype: str, quantization: Quantization
) -> dict[str, TensorInfo]:
    """Shapes and dtypes of a quantized layer's tensors, by role.

    Args:
        shape: ``(..., out_features, in_features)``.
        dtype: Header name of the dense values; affine scales and biases take it.
        quantization: The target; its group size divides ``in_features``.
    """
    *leading, n_in = shape
    groups = (*leading, n_in // quantization.group_size)
    infos = {"weight": TensorInfo("U32", (*leading, n_in * quantization.bits // 32))}
    if quantization.mode is QuantMode.AFFINE:
        return infos | {"scales": TensorInfo(dtype, groups), "biases": TensorInfo(dtype, groups)}
    return infos | {"scales": TensorInfo("U8", groups)}


def _dense_target(
    layer: SourceLayer, wish: Quantization, dtype: str | None, any_name: bool = False
) -> tuple[Quantization | None, str]:
    """Whether a dense layer is quantized, with which group, and why not."""
    shape = layer.shape
    if len(shape) < 2:
        return None, ""
    if not layer.is_weight:
        return None, "not named .weight"
    for reason, pattern in _NAMED_DENSE:
        if pattern.search(layer.path) and not any_name:
            return None, reason
    if len(shape) > 3:
        return None, f"rank {len(shape)}, taken for a convolution"
    if layer.dtype not in FLOATS or (layer.dtype not in KERNEL_FLOATS and dtype is None):
        return None, f"dtype {layer.dtype} cannot be quantized"
    if 0 in shape:
        return None, "empty"
    return fit_group(shape[-1], wish)


def fit_group(n_in: int, wish: Quantization) -> tuple[Quantization | None, str]:
    """The wished quantization with the largest group that divides the last axis."""
    if n_in % wish.group_size == 0:
        return wish, ""
    if wish.mode is QuantMode.AFFINE:
        for group_size in (64, 32):
            if group_size < wish.group_size and n_in % group_size == 0:
                reason = f"last axis {n_in} takes group {group_size}, not {wish.group_size}"
                return Quantization(group_size, wish.bits, wish.mode), reason
    return None, f"last axis {n_in} is no multiple of group {wish.group_size} or a smaller one"


def _flat_step(
    layer: str,
    part: SourceTensor,
    dtype: str | None,
    order: RowOrder | None = None,
    name: str = "",
) -> Step:
    """Copy or cast one tensor, value by value, or row by row into another order."""
    dtype = dtype or part.info.dtype
    output = OutputTensor(name or part.name, TensorInfo(dtype, part.info.shape))
    operation = Operation.COPY if dtype == part.info.dtype else Operation.CAST
    rows = part.info.size if order is None else order.rows.size
    columns = 1 if order is None else part.info.size // rows
    parts, outputs = {"weight": part}, {"weight": output}
    return Step(layer, operation, rows, columns, parts, outputs, dtype=dtype, row_order=order)


# A row longer than this is cut at group borders: memory must not grow with a tensor's width.
_LONGEST_ROW = 1 << 20


def _row_view(shape: tuple[int, ...], unit: int) -> tuple[int, int]:
    """Rows and columns that chunks are cut by; groups never span two rows."""
    columns = shape[-1]
    if columns > _LONGEST_ROW and columns % unit == 0:
        columns = unit
    return prod(shape) // columns if columns else 0, columns


_WIDENS = {("F16", "F32"), ("BF16", "F32"), ("F16", "F64"), ("BF16", "F64"), ("F32", "F64")}


def _fidelity(step: Step) -> Fidelity:
    if step.operation in (Operation.ENCODE, Operation.RECODE):
        return Fidelity(Exactness.REENCODED)
    if step.operation is Operation.COPY:
        return Fidelity(Exactness.EXACT)
    if step.operation is Operation.REPACK and step.packing is not None:
        return step.packing.fidelity(step.dtype)
    if step.operation is Operation.CAST:
        pair = (step.inputs["weight"].info.dtype, step.dtype)
        return Fidelity(Exactness.EXACT if pair in _WIDENS else Exactness.ROUNDED)
    return Fidelity(Exactness.ROUNDED)


def _near(pattern: str, paths: Sequence[str]) -> list[str]:
    """Layer names that the writer of ``pattern`` may have meant."""
    plain = re.sub(r"\\([.\[\]()])", r"\1", pattern).strip("^$").replace(".*", "")
    last = plain.rsplit(".", 1)[-1]
    names = dict.fromkeys(path.rsplit(".", 1)[-1] for path in paths)
    close = difflib.get_close_matches(last, list(names), 3, 0.6)
    whole = difflib.get_close_matches(plain, list(paths), 3, 0.6)
    return close or whole
