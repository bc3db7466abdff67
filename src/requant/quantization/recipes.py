"""Recipes: which layers take how many bits, chosen by role, name and block position.

A recipe is a TOML file, built-in or the user's; or one of the MLX libraries' mixed recipes, whose
choice is fixed. docs/recipes.md describes the file. Nothing here reads a checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from requant.core.regex import search
from requant.errors import UsageError
from requant.quantization.config import Quantization
from requant.quantization.roles import ROLES, block_positions
from requant.quantization.specs import Spec, parse_spec

# The libraries' recipes: bits of most layers, and of those that their rule prefers
# (mlx_lm/convert.py and mlx_vlm/convert.py, mixed_quant_predicate_builder).
OF_MLX_LM = ((2, 6), (3, 4), (3, 6), (4, 6))
_OF_MLX_VLM = ((3, 5), (3, 8), (4, 8))  # next to those
MIXED = {f"mixed_{low}_{high}": (low, high) for low, high in (*OF_MLX_LM, *_OF_MLX_VLM)}


@dataclass(frozen=True, slots=True)
class Rule:
    """Conditions, and the target of the layers that fulfil all of them."""

    spec: str  # as in an override: ``8``, ``8:32``, a mode, ``skip``
    match: str = ""  # regex on the layer path; "" for any
    roles: tuple[str, ...] = ()  # keys of ``ROLES``, one of which must match; empty for any
    first: int = 0  # number of blocks at the start of each stack that match
    last: int = 0  # the same at its end; if both are 0, every layer matches
    layers: tuple[str, ...] = ()  # layer paths, one of which must be equal; empty for any

    @property
    def is_explicit(self) -> bool:
        """Whether a condition is about the name, and not only about the position."""
        return bool(self.match or self.roles or self.layers)

    def matches(self, path: str, place: tuple[int, int] | None) -> bool:
        """Whether a layer fulfils every condition; ``place`` is one of ``block_positions``."""
        if self.layers and path not in self.layers:
            return False
        if self.match and not search(self.match, path):
            return False
        if self.roles and not any(re.search(ROLES[role], path) for role in self.roles):
            return False
        if not (self.first or self.last):
            return True
        return place is not None and (place[0] < self.first or place[0] >= place[1] - self.last)


@dataclass(frozen=True, slots=True)
class LayerTarget:
    """The target of one layer in a recipe."""

    spec: Spec  # the target, or SKIP
    # The rule is about the name, so it also holds for layers that are dense by default.
    explicit: bool
    rule: int  # number of the rule, from 1; 0 for mlx-lm's own
    names: bool = False  # the rule names the layer by a pattern or its path, not only by a role


@dataclass(frozen=True, slots=True)
class Recipe:
    """A recipe, read and checked."""

    name: str  # as the user named it
    description: str = ""  # one sentence
    # Target of layers that no rule matches; None leaves it to the options.
    default: Quantization | None = None
    rules: tuple[Rule, ...] = ()  # the rules, of which the last that matches wins
    is_mixed: bool = False  # it is one of ``MIXED``; there are no rules then
    is_builtin: bool = True  # it came with requant
    search: str = ""  # level of the scale search, unless the options name one; "" for none
    quality: str = ""  # the quality, unless the options name one; "" for none

    def to_dict(self) -> dict[str, Any]:
        """The recipe as JSON data."""
        return {
            "name": self.name,
            "description": self.description,
            "mixed_bits": list(MIXED[self.name]) if self.is_mixed else None,
            "default": self.default and self.default.to_dict(),
            "search": self.search or None,
            "quality": self.quality or None,
            "rules": [asdict(rule) for rule in self.rules],
        }

    def choose(self, paths: Sequence[str], base: Quantization | None) -> dict[str, LayerTarget]:
        """Return the target of each layer that a rule matches.

        The group size of ``base``, the conversion's default, completes a spec of bits alone.

        Raises:
            UsageError: A mixed recipe, and no layer has the name that its rule starts from.
        """
        if self.is_mixed:
            group_size = 64 if base is None else base.group_size
            return _mlx_lm_mixed_targets(self.name, paths, group_size)
        positions = block_positions(paths)
        targets: dict[str, LayerTarget] = {}
        for number, rule in enumerate(self.rules, 1):  # the last that matches wins
            names = bool(rule.match or rule.layers)
            target = LayerTarget(parse_spec(rule.spec, base), rule.is_explicit, number, names)
            layers = frozenset(rule.layers or paths)
            for path in paths:
                if path in layers and rule.matches(path, positions.get(path)):
                    targets[path] = target
        return targets

    def unmatched_patterns(self, paths: Sequence[str]) -> list[str]:
        """The regexes and layer paths of the rules that match no layer."""
        patterns = dict.fromkeys(rule.match for rule in self.rules if rule.match)
        unused = [x for x in patterns if not any(search(x, path) for path in paths)]
        known = frozenset(paths)
        return unused + [x for rule in self.rules for x in rule.layers if x not in known]


# -- mlx-lm's mixed recipes ------------------------------------------------------------------


def _mlx_lm_mixed_targets(
    name: str, paths: Sequence[str], group_size: int
) -> dict[str, LayerTarget]:
    """What ``mlx_lm.convert --quant-predicate`` chooses, by names alone; of any of the bits."""
    low, high = (Quantization.affine(group_size, bits) for bits in MIXED[name])
    down = next((path for path in paths if "down_proj" in path), None)
    if down is None:
        raise UsageError(
            f"recipe {name} starts from layers named down_proj, and there are none; "
            "requant inspect lists the names"
        )
    parts = down.split(".")
    # Position of the block number in a path; the last part if there is none, as in mlx-lm.
    at = next((n for n, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
    numbers = [int(x[at]) for path in paths if len(x := path.split(".")) > at and x[at].isdigit()]
    blocks = max(numbers, default=0) + 1
    targets = {}
    for path in paths:
        parts = path.split(".")
        index = int(parts[at]) if len(parts) > at and parts[at].isdigit() else 0
        eighth = blocks // 8
        favoured = index < eighth or index >= 7 * blocks // 8 or (index - eighth) % 3 == 2
        costly = any(x in path for x in ("v_proj", "v_a_proj", "v_b_proj", "down_proj"))
        more = "lm_head" in path or (costly and favoured)
        targets[path] = LayerTarget(high if more else low, False, 0)
    return targets
