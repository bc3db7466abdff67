"""Recipes: which layers take how many bits, told by role, name and place in the stack.

A recipe is a TOML file, ours or the user's; or one of mlx-lm's four mixed recipes, whose choice
is fixed. docs/recipes.md describes the file. Nothing here reads a checkpoint.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import tomllib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from requant.arrays.native import SEARCH_LEVELS
from requant.errors import (
    OutOfRangeError,
    Problem,
    UnknownValueError,
    UsageError,
    format_value,
    join_or,
    utf8_error,
)
from requant.patterns import search
from requant.schema import Quantization
from requant.specs import Spec, check_regex, parse_spec, resolve_quantization

BUILTIN_RECIPES = Path(__file__).parent / "shipped_recipes"

# Role -> pattern on the layer path, in Hugging Face's names and in mlx-lm's.
ROLES = {
    "embedding": r"(^|[._])(embed_tokens|tok_embeddings|word_embeddings|embed_in|wte|embeddings?)$",
    "head": r"(^|\.)(lm_head|embed_out)$|^(model\.)?output$",
    "attention": r"(^|\.)(self_attn|self_attention|cross_attn|linear_attn|attention|attn)\.",
    "q_proj": r"(^|[._])(q_proj|q_a_proj|q_b_proj|wq)$",
    "k_proj": r"(^|[._])(k_proj|wk)$",
    "v_proj": r"(^|[._])(v_proj|v_a_proj|v_b_proj|wv)$",
    "o_proj": r"(^|[._])(o_proj|out_proj|wo)$",
    "gate_proj": r"(^|[._])(gate_proj|w1)$",
    "up_proj": r"(^|[._])(up_proj|w3)$",
    "down_proj": r"(^|[._])(down_proj|w2|fc2|dense_4h_to_h)$|(^|\.)mlp\.c_proj$",
    "experts": r"(^|\.)(experts|switch_mlp|switch_glu)(\.|$)",
    "shared_experts": r"(^|\.)shared_(experts?|mlp)(\.|$)",
    "router": r"(^|[._])(router|gate|shared_expert_gate)$|(^|\.)router\.",
}

# mlx-lm's recipes: bits of most layers, and of those that its rule finds worth more
# (mlx_lm/convert.py, mixed_quant_predicate_builder).
MIXED = {"mixed_2_6": (2, 6), "mixed_3_4": (3, 4), "mixed_3_6": (3, 6), "mixed_4_6": (4, 6)}


@dataclass(frozen=True, slots=True)
class Rule:
    """Conditions that must all hold, and what a layer then gets.

    Attributes:
        spec: As in an override: ``8``, ``8:32``, a mode, ``skip``.
        match: Regex on the layer path; "" for any.
        roles: Keys of ``ROLES``, one of which must fit; empty for any.
        first: Only the first so many blocks (of each stack), and
        last: the last so many; with both 0, any layer.
        layers: Layer paths, one of which it must be; empty for any.
    """

    spec: str
    match: str = ""
    roles: tuple[str, ...] = ()
    first: int = 0
    last: int = 0
    layers: tuple[str, ...] = ()

    @property
    def is_explicit(self) -> bool:
        """Whether it says what the layer is, and not only where it stands."""
        return bool(self.match or self.roles or self.layers)

    def matches(self, path: str, place: tuple[int, int] | None) -> bool:
        """Whether a layer fulfils every condition.

        Args:
            path: Its path.
            place: Index of its block, and how many its stack has; None outside of blocks.
        """
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
    """What a recipe says about one layer.

    Attributes:
        spec: The target, or SKIP.
        explicit: The rule means this kind of layer, so one that stays dense by its name too.
        rule: Which rule it was, from 1; 0 for mlx-lm's own.
        names: The rule names the layer by a pattern or its path, not by a role alone.
    """

    spec: Spec
    explicit: bool
    rule: int
    names: bool = False


@dataclass(frozen=True, slots=True)
class Recipe:
    """A recipe, read and checked.

    Attributes:
        name: As the user named it.
        description: One sentence.
        default: What layers get that no rule names; None leaves that to the wishes.
        rules: The last that fits wins.
        is_mixed: It is one of ``MIXED``; there are no rules then.
        is_builtin: It came with requant.
        search: Level of the search for scales, unless another is wished; "" says nothing of it.
    """

    name: str
    description: str = ""
    default: Quantization | None = None
    rules: tuple[Rule, ...] = ()
    is_mixed: bool = False
    is_builtin: bool = True
    search: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The recipe as JSON data."""
        return {
            "name": self.name,
            "description": self.description,
            "mixed_bits": list(MIXED[self.name]) if self.is_mixed else None,
            "default": self.default and self.default.to_dict(),
            "search": self.search or None,
            "rules": [asdict(rule) for rule in self.rules],
        }

    def choose(self, paths: Sequence[str], base: Quantization | None) -> dict[str, LayerTarget]:
        """Go through a model's layers.

        Args:
            paths: Every layer path.
            base: Default of the conversion: its group size goes with bare bits.

        Returns:
            The layers that a rule names.

        Raises:
            UsageError: A mixed recipe, and no layer has the name that its rule starts from.
        """
        if self.is_mixed:
            group_size = 64 if base is None else base.group_size
            return _mlx_lm_mixed_targets(self.name, paths, group_size)
        specs = [parse_spec(rule.spec, base) for rule in self.rules]
        remains = block_positions(paths)
        found: dict[str, LayerTarget] = {}
        named = [frozenset(rule.layers) for rule in self.rules]
        for path in paths:
            for number in range(len(self.rules), 0, -1):
                rule = self.rules[number - 1]
                if named[number - 1] and path not in named[number - 1]:
                    continue
                if rule.matches(path, remains.get(path)):
                    names = bool(rule.match or rule.layers)
                    found[path] = LayerTarget(specs[number - 1], rule.is_explicit, number, names)
                    break
        return found

    def unmatched_patterns(self, paths: Sequence[str]) -> list[str]:
        """Regexes of the rules that no layer path has."""
        patterns = dict.fromkeys(rule.match for rule in self.rules if rule.match)
        unused = [x for x in patterns if not any(search(x, path) for path in paths)]
        known = frozenset(paths)
        return unused + [x for rule in self.rules for x in rule.layers if x not in known]


_BLOCK = re.compile(r"^(?:(.*?)\.)?(\d+)(?=\.|$)")


def block_positions(paths: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Path -> index of its block, and how many blocks stand under the same name."""
    found = {path: match for path in paths if (match := _BLOCK.match(path))}
    blocks: dict[str | None, int] = defaultdict(int)
    for match in found.values():
        blocks[match[1]] = max(blocks[match[1]], int(match[2]) + 1)
    return {path: (int(match[2]), blocks[match[1]]) for path, match in found.items()}


# -- mlx-lm's mixed recipes ------------------------------------------------------------------


def _mlx_lm_mixed_targets(
    name: str, paths: Sequence[str], group_size: int
) -> dict[str, LayerTarget]:
    """What ``mlx_lm.convert --quant-predicate`` chooses, by names alone."""
    low, high = (Quantization.affine(group_size, bits) for bits in MIXED[name])
    down = next((path for path in paths if "down_proj" in path), None)
    if down is None:
        raise UsageError(
            f"recipe {name} starts from layers named down_proj, and there are none; "
            "requant inspect lists the names"
        )
    parts = down.split(".")
    # Where the block's number stands in every path; the last part if there is none, as there.
    at = next((n for n, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
    numbers = [int(x[at]) for path in paths if len(x := path.split(".")) > at and x[at].isdigit()]
    blocks = max(numbers, default=0) + 1
    found = {}
    for path in paths:
        parts = path.split(".")
        index = int(parts[at]) if len(parts) > at and parts[at].isdigit() else 0
        eighth = blocks // 8
        favoured = index < eighth or index >= 7 * blocks // 8 or (index - eighth) % 3 == 2
        costly = any(x in path for x in ("v_proj", "v_a_proj", "v_b_proj", "down_proj"))
        more = "lm_head" in path or (costly and favoured)
        found[path] = LayerTarget(high if more else low, False, 0)
    return found


# -- reading -----------------------------------------------------------------------------


def recipe_names() -> list[str]:
    """Every recipe that comes with requant, mlx-lm's first."""
    return [*MIXED, *sorted(path.stem for path in BUILTIN_RECIPES.glob("*.toml"))]


def load_recipe(name: str | os.PathLike[str]) -> Recipe:
    """Read a recipe by its name, or from a TOML file.

    Args:
        name: A name of ``recipe_names``, or the path of a file: anything that ends in
            ``.toml`` or has a folder in it.

    Raises:
        UsageError: No such recipe or file, or everything that is wrong with the file.
    """
    text = os.fspath(name)
    if text in MIXED:
        low, high = MIXED[text]
        words = f"mlx-lm's own: {high} bits where its rule finds errors cost most, else {low}"
        return Recipe(text, words, is_mixed=True)
    is_file = text.endswith(".toml") or Path(text).name != text
    if not is_file and text not in recipe_names():
        near = difflib.get_close_matches(text, recipe_names(), 1)
        hint = f"near it: {near[0]}; " if near else ""
        raise UsageError(
            f"there is no recipe {text!r}; {hint}known: {', '.join(recipe_names())}, or a TOML file"
        )
    path = Path(text) if is_file else BUILTIN_RECIPES / f"{text}.toml"
    return parse_recipe(_read(path), text, is_shipped=not is_file)


def recipe_text(recipe: Recipe) -> str:
    """What there is to read: the file, or what mlx-lm's rule does."""
    if not recipe.is_mixed:
        return _read(
            BUILTIN_RECIPES / f"{recipe.name}.toml" if recipe.is_builtin else Path(recipe.name)
        )
    low, high = MIXED[recipe.name]
    return (
        f"# {recipe.name} is mlx-lm's (mlx_lm.convert --quant-predicate) and no file:\n"
        f"# {high} bits: lm_head; v_proj, v_a_proj, v_b_proj and down_proj in the first and the\n"
        "#   last eighth of the blocks, and in every third block between\n"
        f"# {low} bits: every other layer\n"
    )


def to_toml(recipe: Recipe) -> str:
    """A recipe as the text that ``parse_recipe`` reads; not one of mlx-lm's."""
    lines = [f"description = {json.dumps(recipe.description)}"]
    lines += [f"search = {json.dumps(recipe.search)}"] * bool(recipe.search)
    if recipe.default is not None:
        lines += ["", "[default]"]
        lines += [f"{key} = {json.dumps(x)}" for key, x in recipe.default.to_dict().items()]
    for rule in recipe.rules:
        lines += ["", "[[rules]]", f"spec = {json.dumps(rule.spec)}"]
        lines += [f"match = {json.dumps(rule.match)}"] * bool(rule.match)
        lines += [f"role = {json.dumps(list(rule.roles))}"] * bool(rule.roles)
        lines += [f"{x} = {n}" for x in ("first", "last") if (n := getattr(rule, x))]
        if rule.layers:
            lines += ["layers = [", *(f"  {json.dumps(x)}," for x in rule.layers), "]"]
    return "\n".join(lines) + "\n"


def _read(path: Path) -> str:
    """The text of a recipe file; UsageError where it cannot be read."""
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise UsageError(f"recipe {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"recipe {path}: {utf8_error(error)}") from error


def parse_recipe(text: str, name: str, *, is_shipped: bool = False) -> Recipe:
    """Read the text of a recipe file.

    Raises:
        UsageError: Everything that is wrong with it, key by key.
    """
    try:
        table = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UsageError(f"recipe {name} is no TOML: {error}") from error
    reader = _Reader()
    reader.keys("", table, ("description", "search", "default", "rules"))
    description = reader.typed("description", table.get("description", ""), str, "a text")
    level = reader.typed("search", table.get("search", ""), str, "fast or best") or ""
    if level not in ("", *SEARCH_LEVELS):
        reader.report("search", f"is {format_value(level)}, expected {join_or(SEARCH_LEVELS)}")
    default = reader.default(table["default"]) if "default" in table else None
    tables = reader.typed("rules", table.get("rules", []), list, "[[rules]] tables")
    rules = [reader.rule(f"rules[{n}]", value) for n, value in enumerate(tables or [], 1)]
    if not reader.problems and default is None and not rules:
        reader.report("rules", "there are none, and no [default]: this recipe says nothing")
    if reader.problems:
        lines = "".join(f"\n  {problem}" for problem in reader.problems)
        raise UsageError(f"recipe {name} cannot be used:{lines}")
    return Recipe(
        name,
        description or "",
        default,
        tuple(x for x in rules if x),
        is_builtin=is_shipped,
        search=level,
    )


def recipe_from_dict(data: Mapping[str, Any]) -> Recipe:
    """Read what ``dataclasses.asdict`` gave, ``default`` as it was; a record may be a stranger's.

    Raises:
        UsageError: A rule says what no rule can.
        TypeError: A field is missing, of another type, or unknown.
    """
    reader, rules = _Reader(), []
    for number, reported in enumerate(data["rules"], 1):
        table = dict(reported)
        table["role"] = table.pop("roles")
        rules.append(reader.rule(f"rules[{number}]", table))
    if data.get("search", "") not in ("", *SEARCH_LEVELS):
        reader.report(
            "search", f"is {format_value(data['search'])}, expected {join_or(SEARCH_LEVELS)}"
        )
    for key in ("name", "description"):
        reader.typed(key, data[key], str, "a text")
    for key in ("is_mixed", "is_builtin"):
        reader.typed(key, data[key], bool, "true or false")
    if data["is_mixed"] and data["name"] not in MIXED:
        reader.report("name", f"is {format_value(data['name'])}; mlx-lm's are {', '.join(MIXED)}")
    if reader.problems:
        raise UsageError("; ".join(map(str, reader.problems)))
    return Recipe(**{**data, "rules": tuple(rule for rule in rules if rule)})


_T = TypeVar("_T")


class _Reader:
    """Reads tables and keeps every problem with the key it is about."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []

    def report(self, where: str, message: str) -> None:
        self.problems.append(Problem(where, message))

    def keys(self, where: str, table: Mapping[str, Any], known: Sequence[str]) -> None:
        """Report the keys that mean nothing."""
        for key in table:
            if key not in known:
                near = difflib.get_close_matches(key, known, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
                self.report(f"{where}.{key}" if where else key, f"is no key here; {hint}")

    def typed(self, where: str, value: object, kind: type[_T], words: str) -> _T | None:
        """The value, or None and a problem where it is of another type."""
        if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
            return value
        self.report(where, f"is {format_value(value)}, expected {words}")
        return None

    def default(self, value: object) -> Quantization | None:
        """``[default]``: bits, group_size and mode, each with MLX's default."""
        table = self.typed("default", value, dict, "a table with bits, group_size, mode")
        if table is None:
            return None
        before = len(self.problems)
        self.keys("default", table, ("bits", "group_size", "mode"))
        for key, kind, words in (
            ("bits", int, "a number"),
            ("group_size", int, "a number"),
            ("mode", str, "a text"),
        ):
            if key in table:
                self.typed(f"default.{key}", table[key], kind, words)
        if len(self.problems) > before:
            return None
        try:
            return resolve_quantization(**table)
        except (OutOfRangeError, UnknownValueError) as error:
            self.report("default", str(error))
        return None

    def rule(self, where: str, value: object) -> Rule | None:
        """One of ``[[rules]]``: conditions and a spec."""
        table = self.typed(where, value, dict, "a table")
        if table is None:
            return None
        before = len(self.problems)
        self.keys(where, table, ("match", "role", "first", "last", "layers", "spec"))
        spec = self.spec(f"{where}.spec", table)
        match = self.typed(f"{where}.match", table.get("match", ""), str, "a regex as text")
        if match:
            try:
                check_regex(match, "")
            except UsageError as error:
                self.report(f"{where}.match", str(error).strip())
        roles = self.roles(f"{where}.role", table.get("role", []))
        first, last = (self.number(f"{where}.{x}", table.get(x, 0)) for x in ("first", "last"))
        layers = self.layers(f"{where}.layers", table.get("layers", ()))
        if not any(key in table for key in ("match", "role", "first", "last", "layers")):
            self.report(
                where, "has no condition; write match, role, first, last or layers, or [default]"
            )
        if len(self.problems) > before:
            return None
        return Rule(
            spec=spec, match=match or "", roles=roles, first=first, last=last, layers=layers
        )

    def spec(self, where: str, table: Mapping[str, Any]) -> str:
        if "spec" not in table:
            self.report(where, "is missing; write bits (8), '8:32', a mode or 'skip'")
            return ""
        value = table["spec"]
        if isinstance(value, bool) or not isinstance(value, int | str):
            self.report(
                where, f"is {format_value(value)}, expected bits (8), '8:32', a mode or 'skip'"
            )
            return ""
        try:
            parse_spec(str(value))
        except UsageError as error:
            self.report(where, str(error))
        return str(value)

    def roles(self, where: str, value: object) -> tuple[str, ...]:
        words = [value] if isinstance(value, str) else value
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            self.report(where, f"is {format_value(value)}, expected a role or a list of roles")
            return ()
        for word in words:
            if word not in ROLES:
                near = difflib.get_close_matches(word, ROLES, 1)
                hint = f"near it: {near[0]}; " if near else ""
                self.report(where, f"{word!r} is no role; {hint}known: {', '.join(ROLES)}")
        return tuple(words)

    def layers(self, where: str, value: object) -> tuple[str, ...]:
        if isinstance(value, list | tuple) and all(isinstance(x, str) and x for x in value):
            return tuple(value)
        self.report(where, f"is {value!r:.80}, expected a list of layer paths")
        return ()

    def number(self, where: str, value: object) -> int:
        found = self.typed(where, value, int, "a number of blocks")
        if found is not None and found < 0:
            self.report(where, f"is {found}, expected 0 or more")
        return found or 0
