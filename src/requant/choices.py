"""What becomes of each layer: the wishes, the recipe and mlx-lm's choice met with what is there.

Pure, as the planner that asks: only shapes, dtypes and names decide, never the values.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from requant.dtypes import FLOATS, KERNEL_FLOATS
from requant.errors import Problem
from requant.formats import SourceLayer, SourceLayout
from requant.formats.base import describe
from requant.head_names import serves_as_head
from requant.left_dense import left_dense
from requant.patterns import search
from requant.recipes import ROLES, Choice
from requant.relayout import Relayout
from requant.schema import SKIP, Quantization, QuantMode
from requant.specs import Spec, resolve_quantization
from requant.wishes import ConvertOptions

if TYPE_CHECKING:
    from requant.checkpoint import Checkpoint
    from requant.mlx_lm_layout import MlxLmLayout

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
NOT_A_WEIGHT = "not named .weight"
# Float tensors that must keep their dtype whatever --dtype says: routers add this bias to
# scores that are compared with each other (mlx_lm/models/deepseek_v3.py, cast_predicate).
KEEPS_DTYPE = re.compile(r"e_score_correction_bias$")

Decided = tuple[SourceLayer, Quantization | None, str]


class Chooser:
    """Takes one decision per layer.

    Attributes:
        default: The quantization of a chosen layer that nothing else names; None keeps codes.
        notes: What the user should know of the wishes.
        problems: Wishes that cannot be met.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        format_name: str,
        layout: SourceLayout,
        wishes: ConvertOptions,
        moved: Relayout | None = None,
    ) -> None:
        self.checkpoint, self.format, self.layout = checkpoint, format_name, layout
        self.wishes, self.moved = wishes, moved
        self.mlx_lm = None if moved is None else moved.layout
        self.from_codes = is_quantized(layout)
        self.notes: list[str] = []
        self.problems: list[Problem] = []
        self.default = self._default()
        self.left_dense = self._left_dense()
        self.extra = frozenset(moved.shown[x].path for x in moved.extra) if moved else frozenset()
        self.by_recipe = self._choices()

    def check_patterns(self) -> None:
        """A pattern that matches no layer is a slip of the pen: suggest what was meant."""
        paths = [layer.path for layer in self.layout.layers if layer.is_weight]
        named = [("override", pattern) for pattern, _ in self.wishes.overrides]
        named += [("only", pattern) for pattern in self.wishes.only]
        for option, pattern in named:
            if any(search(pattern, path) for path in paths):
                continue
            near = ", ".join(_near(pattern, paths))
            hint = f"near it: {near}" if near else "requant inspect lists the names"
            tied = serves_as_head(self.layout.layers, partial(search, pattern))
            if tied:
                hint = f"the head is tied to {tied}, which serves as both: name that"
            if self.moved is not None:
                old = [x.path for x in self.moved.source.layers if search(pattern, x.path)]
                if old:
                    hint += f". It names {old[0]} in the source: --layout keep keeps such names"
            self.problems.append(Problem(f"--{option} {pattern!r}", f"matches no layer; {hint}"))

    def decide(self, layer: SourceLayer) -> tuple[Quantization | None, str]:
        """The layer's quantization in the output (None: dense) and the reason to tell."""
        target, reason = self._chosen(layer)
        if target is not None and self.mlx_lm is not None and not self._fits_class(layer):
            return None, "mlx-lm's class holds it dense"
        return target, reason

    def value_dtype(self, layer: SourceLayer) -> str:
        """Dtype of the layer's values before they are quantized or stored dense."""
        wish = self.wishes.dtype
        castable = layer.dtype in FLOATS and not KEEPS_DTYPE.search(layer.path)
        if self.mlx_lm is not None and not (layer.is_quantized or layer.path in self.extra):
            # A source that keeps its codes keeps its dtypes too.
            wish = wish if self.from_codes else self.mlx_lm.dtype
            castable = layer.dtype in FLOATS and (
                layer.parts["weight"].name not in self.mlx_lm.keeps_dtype
            )
        return wish if wish is not None and castable else layer.dtype

    def check_needs(self, decided: Iterable[Decided]) -> None:
        """Refuse layers whose fate the user must choose, once for each kind of them."""
        if self.wishes.act_order == "refuse" and self.default is None:
            for layer, target, _ in decided:
                if layer.act_order and target == layer.kept:
                    message = (
                        "has its inputs in act-order, and --act-order refuse takes none; "
                        "--act-order requantize or dense says what such layers become"
                    )
                    self.problems.append(Problem(layer.path, message))
        needs = Counter[str]()
        first: dict[str, str] = {}
        wished = self.wishes.dequantize or self.default is not None
        for layer, target, _ in decided:
            skipped = override_of(self.wishes, layer.path) is SKIP
            if layer.needs_wish and target is None and not (wished or skipped):
                needs[layer.needs_wish] += 1
                first.setdefault(layer.needs_wish, layer.path)
        for message, count in needs.items():
            where = first[message] + (f" and {count - 1} more" if count > 1 else "")
            self.problems.append(Problem(where, message))

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

    def _left_dense(self) -> dict[str, str]:
        """Layers that MLX's libraries leave dense, under the source's names; path -> reason.

        ``only`` names one where it matches nothing else.
        """
        if self.moved is not None:
            return {}
        dense = left_dense(self.layout.layers, self.checkpoint.config)
        others = [x.path for x in self.layout.layers if x.is_weight and x.path not in dense]
        named = [p for p in self.wishes.only if not any(search(p, path) for path in others)]
        return {k: why for k, why in dense.items() if not any(search(p, k) for p in named)}

    def _default(self) -> Quantization | None:
        """The quantization of a chosen layer that no override names."""
        if self.wishes.quantization is not None or self.wishes.dequantize:
            return self.wishes.quantization
        if self.from_codes or not self._is_dense:
            return None
        self.notes.append(
            "No bits or mode were asked for: affine, 4 bits, group 64 (MLX's default); "
            "--dequantize keeps the model dense."
        )
        return resolve_quantization()

    def _chosen(self, layer: SourceLayer) -> tuple[Quantization | None, str]:
        wishes = self.wishes
        if layer.path in wishes.nonfinite_layers:
            return layer.encoding, "holds NaN or infinity"
        override = override_of(self.wishes, layer.path) if layer.is_weight else None
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
        choice = self.by_recipe.get(layer.path)
        if choice is not None and choice.spec is SKIP:
            return layer.encoding, "skipped by the recipe"
        wish = choice.spec if choice is not None else self.default
        if not isinstance(wish, Quantization):
            dense = layer.act_order and wishes.act_order == "dense"
            return None if dense else layer.kept, layer.reason
        points = choice is not None and choice.points
        if self.mlx_lm is not None:
            return self._in_mlx_lm_s_layout(layer, self.mlx_lm, choice)
        if layer.is_quantized:
            target, reason = fit_codes(layer, wish, wishes)
            return target or layer.kept, reason
        if layer.path in self.left_dense and not (choice is not None and choice.names):
            return None, self.left_dense[layer.path]
        return _dense_target(layer, wish, wishes.dtype, any_name=points)

    def _in_mlx_lm_s_layout(
        self, layer: SourceLayer, mlx_lm: MlxLmLayout, choice: Choice | None
    ) -> tuple[Quantization | None, str]:
        """mlx-lm's choice for a layer, or the recipe's where mlx-lm can load that."""
        own, reason = mlx_lm.targets.get(layer.path), layer.reason
        if own is not None and layer.is_quantized:
            own, grouped = fit_codes(layer, own, self.wishes)
            reason = grouped or reason
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

    def _forced(self, layer: SourceLayer, target: Quantization) -> Quantization | None:
        """An override is met exactly or refused."""
        shape, dtype = layer.shape, self.value_dtype(layer)
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
            self.problems.append(Problem(f"--override to {spec}", message))
        return target

    def _fits_class(self, layer: SourceLayer) -> bool:
        """Whether mlx-lm can load the layer quantized; what it does not load is free."""
        assert self.mlx_lm is not None
        loaded = f"{layer.path}.weight" in self.mlx_lm.tensors
        return not loaded or layer.path in self.mlx_lm.quantizable

    @property
    def _is_dense(self) -> bool:
        """Whether no tool has quantized the source, nor says that it has."""
        return self.format == "dense" or (self.checkpoint.gguf is not None and not self.from_codes)


def override_of(wishes: ConvertOptions, path: str) -> Spec | None:
    """The last override that matches: a target, SKIP, or None."""
    hits = [spec for pattern, spec in wishes.overrides if search(pattern, path)]
    return hits[-1] if hits else None


def is_quantized(layout: SourceLayout) -> bool:
    """Whether any layer of the source holds codes."""
    return any(layer.is_quantized for layer in layout.layers)


def _dense_target(
    layer: SourceLayer, wish: Quantization, dtype: str | None, any_name: bool = False
) -> tuple[Quantization | None, str]:
    """Whether a dense layer is quantized, with which group, and why not."""
    shape = layer.shape
    if len(shape) < 2:
        return None, ""
    if not layer.is_weight:
        return None, NOT_A_WEIGHT
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


def fit_codes(
    layer: SourceLayer, wish: Quantization, wishes: ConvertOptions
) -> tuple[Quantization | None, str]:
    """As ``fit_group``, or in the source's group if none was asked for and its codes then stay."""
    target, reason = fit_group(layer.shape[-1], wish)
    if target is None or layer.encoding is None or not wishes.own_groups or layer.carried:
        return target, reason
    own = replace(target, group_size=layer.encoding.group_size)
    if layer.keeps_codes(target) or not layer.keeps_codes(own):
        return target, reason
    return own, f"no group size was asked for: keeps its codes in groups of {own.group_size}"


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


def _near(pattern: str, paths: Sequence[str]) -> list[str]:
    """Layer names that the writer of ``pattern`` may have meant."""
    plain = re.sub(r"\\([.\[\]()])", r"\1", pattern).strip("^$").replace(".*", "")
    last = plain.rsplit(".", 1)[-1]
    names = dict.fromkeys(path.rsplit(".", 1)[-1] for path in paths)
    close = difflib.get_close_matches(last, list(names), 3, 0.6)
    whole = difflib.get_close_matches(plain, list(paths), 3, 0.6)
    return close or whole
