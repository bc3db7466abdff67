"""Recipes as TOML files and JSON: reading, with a list of all problems, and writing."""

from __future__ import annotations

import difflib
import json
import os
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from requant.errors import OutOfRangeError, Problem, UnknownValueError, UsageError
from requant.quantization.config import Quantization
from requant.quantization.modes import SEARCH_LEVELS, resolve_quantization
from requant.quantization.qualities import QUALITIES
from requant.quantization.recipes import MIXED, OF_MLX_LM, Recipe, Rule
from requant.quantization.roles import ROLES
from requant.quantization.specs import check_regex, parse_spec
from requant.text import format_value, join_or, os_error_text, utf8_error

BUILTIN_RECIPES = Path(__file__).parent / "builtin_recipes"


def recipe_names() -> list[str]:
    """Names of the built-in recipes, the MLX libraries' first."""
    return [*MIXED, *sorted(path.stem for path in BUILTIN_RECIPES.glob("*.toml"))]


def load_recipe(name: str | os.PathLike[str]) -> Recipe:
    """Read a recipe by its name, or from a TOML file.

    Args:
        name: A name of ``recipe_names``, or the path of a file: anything that ends in
            ``.toml`` or has a folder in it.

    Raises:
        UsageError: No such recipe or file, or all problems of the file.
    """
    text = os.fspath(name)
    if text in MIXED:
        low, high = MIXED[text]
        words = f"{high} bits where its rule finds errors cost most, else {low}"
        return Recipe(text, f"{_library_of(text)}'s own: {words}", is_mixed=True)
    is_file = text.endswith(".toml") or Path(text).name != text
    if not is_file and text not in recipe_names():
        known = _known(text, recipe_names())
        raise UsageError(f"there is no recipe {text!r}; {known}, or a TOML file")
    path = Path(text) if is_file else BUILTIN_RECIPES / f"{text}.toml"
    return parse_recipe(_read(path), text, is_shipped=not is_file)


def _known(word: str, known: Sequence[str]) -> str:
    """``close matches: head; known: embedding, head``."""
    near = difflib.get_close_matches(word, known, 1)
    return f"{f'close matches: {near[0]}; ' if near else ''}known: {', '.join(known)}"


def _library_of(mixed: str) -> str:
    """The library that a mixed recipe comes from; mlx-vlm has all of them."""
    return "mlx-lm" if MIXED[mixed] in OF_MLX_LM else "mlx-vlm"


def recipe_text(recipe: Recipe) -> str:
    """The text of the recipe's file, or a description of a library's rule."""
    if not recipe.is_mixed:
        return _read(
            BUILTIN_RECIPES / f"{recipe.name}.toml" if recipe.is_builtin else Path(recipe.name)
        )
    low, high = MIXED[recipe.name]
    library = _library_of(recipe.name)
    return (
        f"# {recipe.name} is {library}'s ({library.replace('-', '_')}.convert --quant-predicate) "
        "and no file:\n"
        f"# {high} bits: lm_head; v_proj, v_a_proj, v_b_proj and down_proj in the first and the\n"
        "#   last eighth of the blocks, and in every third block between\n"
        f"# {low} bits: every other layer\n"
    )


def to_toml(recipe: Recipe) -> str:
    """Write a recipe, but none of the mixed ones, as the text that ``parse_recipe`` reads."""
    lines = [f"description = {json.dumps(recipe.description)}"]
    for key, word in (("search", recipe.search), ("quality", recipe.quality)):
        lines += [f"{key} = {json.dumps(word)}"] * bool(word)
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
    """The text of a recipe file; raises UsageError if it cannot be read."""
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise UsageError(f"recipe {path}: {os_error_text(error)}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"recipe {path}: {utf8_error(error)}") from error


def parse_recipe(text: str, name: str, *, is_shipped: bool = False) -> Recipe:
    """Read the text of a recipe file.

    Raises:
        UsageError: All problems of the file, key by key.
    """
    try:
        table = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UsageError(f"recipe {name} is not valid TOML: {error}") from error
    reader = _Reader()
    reader.keys("", table, ("description", "search", "quality", "default", "rules"))
    description = reader.typed("description", table.get("description", ""), str, "a text")
    level = reader.choice("search", table, SEARCH_LEVELS)
    quality = reader.choice("quality", table, QUALITIES)
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
        quality=quality,
    )


def recipe_from_dict(data: Mapping[str, Any]) -> Recipe:
    """Read a dict of ``dataclasses.asdict`` with a ``Quantization`` as ``default``, strictly.

    Raises:
        UsageError, TypeError: It is not such a dict.
    """
    reader, rules = _Reader(), []
    for number, rule in enumerate(data["rules"], 1):
        table = dict(rule)
        table["role"] = table.pop("roles")
        rules.append(reader.rule(f"rules[{number}]", table))
    reader.choice("search", data, SEARCH_LEVELS)
    reader.choice("quality", data, QUALITIES)
    for key in ("name", "description"):
        reader.typed(key, data[key], str, "a text")
    for key in ("is_mixed", "is_builtin"):
        reader.typed(key, data[key], bool, "true or false")
    if data["is_mixed"] and data["name"] not in MIXED:
        reader.report(
            "name", f"is {format_value(data['name'])}; the mixed ones are {', '.join(MIXED)}"
        )
    if reader.problems:
        raise UsageError("; ".join(map(str, reader.problems)))
    return Recipe(**{**data, "rules": tuple(x for x in rules if x)})


_T = TypeVar("_T")


class _Reader:
    """Reads the tables of a recipe and collects problems with their keys."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []

    def report(self, where: str, message: str) -> None:
        self.problems.append(Problem(where, message))

    def keys(self, where: str, table: Mapping[str, Any], known: Sequence[str]) -> None:
        """Report unknown keys."""
        for key in table:
            if key not in known:
                near = difflib.get_close_matches(key, known, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
                self.report(f"{where}.{key}" if where else key, f"is not a known key; {hint}")

    def typed(self, where: str, value: object, kind: type[_T], words: str) -> _T | None:
        """Return the value; None with a problem if it has another type."""
        if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
            return value
        self.report(where, f"is {format_value(value)}, expected {words}")
        return None

    def choice(self, key: str, table: Mapping[str, Any], choices: Iterable[str]) -> str:
        """One of the choices; "" without the key."""
        words = join_or(tuple(choices))
        word = self.typed(key, table.get(key, ""), str, words)
        if word is not None and word not in ("", *choices):
            self.report(key, f"is {format_value(word)}, expected {words}")
        return word or ""

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
        try:
            return None if len(self.problems) > before else resolve_quantization(**table)
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
            message = "has no condition; write match, role, first, last or layers, or [default]"
            self.report(where, message)
        rule = Rule(spec, match or "", roles, first=first, last=last, layers=layers)
        return rule if len(self.problems) == before else None

    def spec(self, where: str, table: Mapping[str, Any]) -> str:
        value, words = table.get("spec"), "bits (8), '8:32', a mode or 'skip'"
        if "spec" not in table:
            self.report(where, f"is missing; write {words}")
        elif isinstance(value, bool) or not isinstance(value, int | str):
            self.report(where, f"is {format_value(value)}, expected {words}")
        else:
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
                self.report(where, f"{word!r} is not a role; {_known(word, [*ROLES])}")
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
