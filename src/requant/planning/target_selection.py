"""Select the target of each layer from the options, the recipe and the library's own choice.

Pure: shapes, dtypes and names decide, never values. ``RULES`` lists the precedence.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from requant.checkpoints.checkpoint import Checkpoint
from requant.core.dtypes import FLOATS, KERNEL_FLOATS
from requant.core.reasons import Note, NoteCode, Reason, ReasonCode
from requant.core.regex import search
from requant.errors import Problem
from requant.formats import SourceLayer, SourceLayout
from requant.formats.base import describe_encoding
from requant.layouts.left_dense import is_of_a_tower, left_dense
from requant.layouts.relayout import Relayout
from requant.planning.target_fitting import fit_codes, fit_dense_layer
from requant.quantization.config import SKIP, Quantization
from requant.quantization.modes import resolve_quantization
from requant.quantization.options import ConvertOptions
from requant.quantization.recipes import LayerTarget
from requant.quantization.specs import Spec

# Float tensors that must keep their dtype whatever --dtype says: routers add this bias to
# scores that are compared with each other (mlx_lm/models/deepseek_v3.py, cast_predicate).
KEEPS_DTYPE = re.compile(r"e_score_correction_bias$")

_DENSE_IN_CLASS = Reason(ReasonCode.DENSE_IN_CLASS, "the model's class holds it dense")
_NONFINITE = Reason(ReasonCode.NONFINITE, "holds NaN or infinity")
_NOT_IN_ONLY = Reason(ReasonCode.NOT_IN_ONLY, "not matched by --only")
_SKIPPED_BY_OVERRIDE = Reason(ReasonCode.SKIPPED_BY_OVERRIDE, "skipped by an override")
_SKIPPED_BY_RECIPE = Reason(ReasonCode.SKIPPED_BY_RECIPE, "skipped by the recipe")
_UNUSED_BY_CLASS = Reason(ReasonCode.UNUSED_BY_CLASS, "the model's class has no use for it")


@dataclass(frozen=True, slots=True)
class LayerDecision:
    """The target of one layer."""

    layer: SourceLayer  # the layer as the source stores it
    target: Quantization | None  # its quantization in the output; None for dense
    reason: Reason | None = None  # why the target is not simply what was requested
    problem: Problem | None = None  # why the target of an override is impossible

    @property
    def reason_code(self) -> ReasonCode | None:
        """The code of the reason; None where there is none."""
        return self.reason.code if self.reason else None


@dataclass(eq=False)
class TargetSelector:
    """Selects the target of every layer."""

    checkpoint: Checkpoint
    format: str
    layout: SourceLayout  # under the names of the output
    options: ConvertOptions
    relayout: Relayout | None = None  # None where tensors keep the source's names

    def __post_init__(self) -> None:
        relayout = self.relayout
        # What the library itself decides.
        self.library_layout = None if relayout is None else relayout.layout
        self.source_is_quantized = is_quantized(self.layout)
        self.notes: list[Note] = []  # what the user should know of the options
        # The quantization of a layer that nothing else names; None keeps codes.
        self.default = self._default_target()
        self.dense_by_libraries = self._dense_by_libraries()
        # Paths of layers that are kept though the library's class has no use for them.
        self.extra: frozenset[str] = frozenset()
        if relayout is not None:
            self.extra = frozenset(relayout.source_layers[x].path for x in relayout.extra_tensors)
        self.recipe_targets = self._recipe_targets()

    def select(self) -> tuple[LayerDecision, ...]:
        """Decide about every layer, in their order."""
        return tuple(map(self.decide, self.layout.layers))

    def decide(self, layer: SourceLayer) -> LayerDecision:
        """The decision of the first rule that applies; dense where the library cannot load that.

        A layer that stays dense keeps the name and the shape that the source gives it.
        """
        decision = next(found for rule in RULES if (found := rule(self, layer)) is not None)
        if decision.target is not None and not self.is_quantizable(layer):
            decision = LayerDecision(layer, None, _DENSE_IN_CLASS, decision.problem)
        if decision.target is None and layer.as_named is not None:
            return LayerDecision(layer.as_named, None, decision.reason, decision.problem)
        return decision

    def value_dtype(self, layer: SourceLayer) -> str:
        """Dtype of the layer's values before they are quantized or stored dense."""
        requested = self.options.dtype
        castable = layer.dtype in FLOATS and not KEEPS_DTYPE.search(layer.path)
        if self.library_layout is not None and not (layer.is_quantized or layer.path in self.extra):
            if self.source_is_quantized and requested is None:
                return layer.dtype  # a source that keeps its codes keeps its dtypes too
            return self.library_layout.dtypes.get(layer.parts["weight"].name, layer.dtype)
        return requested if requested is not None and castable else layer.dtype

    # -- properties of the whole source -------------------------------------------------------

    def _recipe_targets(self) -> dict[str, LayerTarget]:
        """The recipe's target of each layer that it names."""
        recipe, library = self.options.recipe, self.library_layout
        if recipe is None:
            return {}
        if library is not None and recipe.name in library.library.recipes:  # it has applied it
            return {path: LayerTarget(x, False, 0) for path, x in library.targets.items()}
        paths = [layer.path for layer in self.layout.layers if layer.is_weight]
        if not recipe.is_builtin:
            for pattern in recipe.unmatched_patterns(paths):
                text = f"Recipe {recipe.name}: match {pattern!r} fits no layer."
                self.notes.append(Note(NoteCode.UNMATCHED_PATTERN, text))
        return recipe.choose(paths, self.default)

    def _dense_by_libraries(self) -> dict[str, Reason]:
        """Layers that MLX's libraries leave dense, under the source's names; path -> reason.

        A pattern of ``--only`` that matches no other layer selects them all the same.
        """
        if self.relayout is not None:
            return {}
        dense = left_dense(self.layout.layers, self.checkpoint.config)
        others = [x.path for x in self.layout.layers if x.is_weight and x.path not in dense]
        named = [p for p in self.options.only if not any(search(p, path) for path in others)]
        return {k: why for k, why in dense.items() if not any(search(p, k) for p in named)}

    def _default_target(self) -> Quantization | None:
        """The quantization of a layer that neither an override nor a recipe names."""
        if self.options.quantization is not None or self.options.dequantize:
            return self.options.quantization
        if self.source_is_quantized or (self.format != "dense" and self.checkpoint.gguf is None):
            return None
        text = (
            "No bits or mode were asked for: affine, 4 bits, group 64 (MLX's default); "
            "--dequantize keeps the model dense."
        )
        self.notes.append(Note(NoteCode.DEFAULT_TARGET, text))
        return resolve_quantization()

    def has_codes(self, layer: SourceLayer) -> bool:
        """Whether codes of a layer have a place: it is a matrix, and not dense in its class."""
        return len(layer.shape) > 1 and self.is_quantizable(layer)

    def is_left_out(self, layer: SourceLayer) -> bool:
        """Whether the last override that matches a layer is for others that can have codes."""
        matching = [x for x, _ in self.options.overrides if search(x, layer.path)]
        return matching[-1] in self._patterns_of_matrices

    @cached_property
    def _patterns_of_matrices(self) -> frozenset[str]:
        """The patterns of overrides that match a layer that can have codes."""
        paths = [x.path for x in self.layout.layers if x.is_weight and self.has_codes(x)]
        patterns = {pattern for pattern, _ in self.options.overrides}
        return frozenset(x for x in patterns if any(search(x, path) for path in paths))

    def is_quantizable(self, layer: SourceLayer) -> bool:
        """Whether the library can load the layer quantized; layers that it does not load can be."""
        if self.library_layout is None:
            return True
        is_loaded = f"{layer.path}.weight" in self.library_layout.tensors
        return not is_loaded or layer.path in self.library_layout.quantizable


# -- the rules, in the order of RULES --------------------------------------------------------------


def _nonfinite(selector: TargetSelector, layer: SourceLayer) -> LayerDecision | None:
    """A layer with NaN or infinity (``--allow-nonfinite``) stays as it is."""
    if layer.path not in selector.options.nonfinite_layers:
        return None
    return LayerDecision(layer, layer.encoding, _NONFINITE)


def _override(selector: TargetSelector, layer: SourceLayer) -> LayerDecision | None:
    """The last ``--override`` that matches, exactly or with a problem; ``skip`` changes nothing.

    A pattern for a part of a model (``vision``) leaves out norms and what the class holds dense.
    """
    override = find_override(selector.options, layer.path) if layer.is_weight else None
    if isinstance(override, Quantization):
        if not selector.has_codes(layer) and selector.is_left_out(layer):
            return None
        return LayerDecision(layer, override, problem=_why_not_exactly(selector, layer, override))
    if override is SKIP:
        return LayerDecision(layer, layer.encoding, _SKIPPED_BY_OVERRIDE)
    return None


def _unused(selector: TargetSelector, layer: SourceLayer) -> LayerDecision | None:
    """With ``--keep-extra``, layers that the library's class does not have stay as they are."""
    if layer.path not in selector.extra or selector.options.dequantize:
        return None
    return LayerDecision(layer, layer.default_target, _UNUSED_BY_CLASS)


def _only(selector: TargetSelector, layer: SourceLayer) -> LayerDecision | None:
    """Layers that no ``--only`` matches stay as they are."""
    only = selector.options.only
    if not only or any(search(pattern, layer.path) for pattern in only):
        return None
    return LayerDecision(layer, layer.default_target, _NOT_IN_ONLY)


def _dequantize(selector: TargetSelector, layer: SourceLayer) -> LayerDecision | None:
    """Every layer becomes dense."""
    return LayerDecision(layer, None) if selector.options.dequantize else None


def _recipe_skip(selector: TargetSelector, layer: SourceLayer) -> LayerDecision | None:
    """The recipe leaves the layer as the source stores it."""
    choice = selector.recipe_targets.get(layer.path)
    if choice is None or choice.spec is not SKIP:
        return None
    return LayerDecision(layer, layer.encoding, _SKIPPED_BY_RECIPE)


def _nothing_requested(selector: TargetSelector, layer: SourceLayer) -> LayerDecision | None:
    """Without a target by an option or the recipe, codes stay where MLX can hold them.

    Else the format's default is taken (``--act-order dense`` makes such layers dense).
    """
    if _requested(selector, layer) is not None:
        return None
    is_dense = layer.policy.act_order and selector.options.act_order == "dense"
    return LayerDecision(layer, None if is_dense else layer.default_target, layer.policy.reason)


def _library_target(selector: TargetSelector, layer: SourceLayer) -> LayerDecision | None:
    """In a library's layout, its own choice, or the recipe's where it can load that."""
    library, choice = selector.library_layout, selector.recipe_targets.get(layer.path)
    if library is None:
        return None
    own, reason = library.targets.get(layer.path), layer.policy.reason
    if own is not None and layer.is_quantized:
        own, grouped = fit_codes(layer, own, own_groups=selector.options.own_groups)
        reason = grouped or reason
    if own is None:
        reason = library.dense_reasons.get(layer.path, reason)
        own = layer.default_target if layer.is_quantized else None
    if choice is None or not isinstance(choice.spec, Quantization) or choice.spec == own:
        return LayerDecision(layer, own, reason)
    # A rule for a role is for language models: in a tower, only one that names the layer holds.
    is_asked = choice.names or (choice.explicit and not is_of_a_tower(layer.path))
    if own is None and not (is_asked and layer.path in library.quantizable):
        return LayerDecision(layer, own, reason)
    group_size, n_in = choice.spec.group_size, layer.shape[-1]
    if n_in % group_size:
        text = f"last axis {n_in} is not a multiple of group {group_size}"
        return LayerDecision(layer, own, Reason(ReasonCode.NO_GROUP_SIZE, text))
    return LayerDecision(layer, choice.spec)


def _quantized_layer(selector: TargetSelector, layer: SourceLayer) -> LayerDecision | None:
    """Codes of the source take the target with a group size that fits."""
    requested = _requested(selector, layer)
    if not layer.is_quantized or requested is None:
        return None
    target, reason = fit_codes(layer, requested, own_groups=selector.options.own_groups)
    return LayerDecision(layer, target or layer.default_target, reason)


def _dense_in_libraries(selector: TargetSelector, layer: SourceLayer) -> LayerDecision | None:
    """Towers and shared embeddings that MLX's libraries leave dense, unless a recipe names them."""
    choice = selector.recipe_targets.get(layer.path)
    is_named = choice is not None and choice.names
    if layer.path not in selector.dense_by_libraries or is_named:
        return None
    return LayerDecision(layer, None, selector.dense_by_libraries[layer.path])


def _dense_layer(selector: TargetSelector, layer: SourceLayer) -> LayerDecision | None:
    """The target, where name, shape and dtype allow it."""
    requested, choice = _requested(selector, layer), selector.recipe_targets.get(layer.path)
    if requested is None:
        return None
    any_name = choice is not None and choice.explicit
    fit = fit_dense_layer(layer, requested, selector.options.dtype, any_name=any_name)
    return LayerDecision(layer, *fit)


def _requested(selector: TargetSelector, layer: SourceLayer) -> Quantization | None:
    """The recipe's quantization of a layer, else the default."""
    choice = selector.recipe_targets.get(layer.path)
    requested = choice.spec if choice is not None else selector.default
    return requested if isinstance(requested, Quantization) else None


def _why_not_exactly(
    selector: TargetSelector, layer: SourceLayer, target: Quantization
) -> Problem | None:
    """Return why a layer cannot have exactly the target of an override."""
    shape, dtype = layer.shape, selector.value_dtype(layer)
    if not selector.is_quantizable(layer):
        message = f"the model's class holds {layer.path} dense; --layout keep does not ask it"
    elif len(shape) < 2:
        message = f"{layer.path}.weight has shape {list(shape)}: a vector is not quantized"
    elif shape[-1] % target.group_size:
        message = (
            f"the last axis of {layer.path}.weight {list(shape)} is not a multiple of group "
            f"size {target.group_size}"
        )
    elif dtype not in KERNEL_FLOATS:
        message = f"{layer.path}.weight is {dtype}; give a float dtype with --dtype"
    else:
        return None
    return Problem(f"--override to {describe_encoding(target, '')}", message)


Rule = Callable[[TargetSelector, SourceLayer], LayerDecision | None]

RULES: tuple[Rule, ...] = (
    _nonfinite,
    _override,
    _unused,
    _only,
    _dequantize,
    _recipe_skip,
    _nothing_requested,
    _library_target,
    _quantized_layer,
    _dense_in_libraries,
    _dense_layer,
)
"""The rules that select a target, in their order of precedence; the first that applies wins.

A layer that a library's class holds dense becomes dense in its layout, whatever the rule says.
"""


def find_override(options: ConvertOptions, path: str) -> Spec | None:
    """The last override that matches: a target, SKIP, or None."""
    hits = [spec for pattern, spec in options.overrides if search(pattern, path)]
    return hits[-1] if hits else None


def is_quantized(layout: SourceLayout) -> bool:
    """Whether any layer of the source holds codes."""
    return any(layer.is_quantized for layer in layout.layers)
