"""Types of the values of options: how they are given, checked, recorded and printed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from requant.core.limits import MAX_INT
from requant.errors import UnknownValueError, UsageError
from requant.quantization.config import SKIP, Quantization, QuantMode
from requant.quantization.modes import check_quantization
from requant.quantization.part import Part
from requant.quantization.recipe_files import load_recipe, recipe_from_dict, recipe_names
from requant.quantization.recipes import Recipe
from requant.quantization.size_budget import BUDGET_BITS, parse_budget, size_text
from requant.quantization.specs import Spec, check_regex, format_spec, parse_spec

# The words of --dtype and their names in safetensors headers.
DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}

Override = tuple[str, Spec]
Protection = tuple[str, int]
"""A pattern on layer paths, and the least bits that a budget gives the layers it matches."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ValueType:
    """How the values of an option are given, stored, recorded and printed."""

    annotation: str  # type of the keyword argument in signatures, without ``| None``
    expected: str  # the valid values in words, for messages
    # Return whether a field may hold a value; None is valid where it is the default.
    is_valid: Callable[[Any], bool]
    default: Any = None  # the default of an option that names none
    parse: Callable[[Any], Any] = lambda value: value  # return the field's value for an argument
    # Return the values as typed, one for each time that the flag is given.
    to_words: Callable[[Any], list[str]] = lambda value: [str(value)]
    to_json: Callable[[Any], Any] = lambda value: value  # return the field's value as JSON data
    # Read it back; raises ValueError, TypeError or KeyError.
    from_json: Callable[[Any], Any] = lambda data: data
    choices: tuple[str, ...] = ()  # the valid words, where these are all valid values
    # Returns the words that a shell offers; by default the choices.
    completions: Callable[[], Iterable[str]] | None = None
    # "flag", "int", "size", "text", "path" or "texts"; "" for values that only Python can give.
    on_command_line: str = "text"
    metavar: str = ""  # represents the value in a help text


# -- plain values ----------------------------------------------------------------------------


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= MAX_INT


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


FLAG = ValueType(
    annotation="bool",
    expected="true or false",
    is_valid=lambda value: isinstance(value, bool),
    default=False,
    to_words=lambda value: [""] if value else [],
    on_command_line="flag",
)
INTEGER = ValueType(
    annotation="int",
    expected="a whole number",
    is_valid=_is_int,
    on_command_line="int",
    metavar="N",
)
SIZE = ValueType(
    annotation="int",
    expected="a number of bytes from 1",
    is_valid=lambda value: _is_int(value) and value > 0,
    to_words=lambda value: [size_text(value)],
    on_command_line="size",
    metavar="SIZE",
)
TEXT = ValueType(annotation="str", expected="a text", is_valid=_is_text)
PATH = ValueType(
    annotation="str | os.PathLike[str]",
    expected="a path",
    is_valid=_is_text,
    parse=os.fspath,
    on_command_line="path",
    metavar="FILE",
)
CALLBACK = ValueType(
    annotation="Callable[[Progress], None]",
    expected="a function",
    is_valid=callable,
    on_command_line="",
)


def _parse_texts(value: Any) -> tuple[str, ...] | None:
    """True and no names are the bundled text, False is None."""
    if isinstance(value, bool):
        return () if value else None
    names = [value] if isinstance(value, str | os.PathLike) else list(value)
    return tuple(text for name in names if (text := os.fspath(name)))


TEXTS = ValueType(
    annotation="bool | str | os.PathLike[str] | Sequence[str | os.PathLike[str]]",
    expected="true, a path or a list of paths",
    is_valid=lambda value: isinstance(value, tuple) and all(map(_is_text, value)),
    parse=_parse_texts,
    to_json=lambda value: None if value is None else list(value),
    from_json=lambda data: None if data is None else _parse_texts(map(str, data)),
    on_command_line="optional_texts",
    metavar="[TEXT]",
)


def choice(*words: str, default: str | None = None) -> ValueType:
    """One of ``words``."""
    return ValueType(
        annotation="str",
        expected=f"one of {', '.join(words)}",
        is_valid=lambda value: value in words,
        default=default,
        choices=words,
    )


def _parse_patterns(texts: Iterable[str]) -> tuple[str, ...]:
    regexes = (texts,) if isinstance(texts, str) else tuple(texts)
    for pattern in regexes:
        check_regex(pattern, "--only")
    return regexes


PATTERNS = ValueType(
    annotation="Sequence[str]",
    expected="a list of texts",
    is_valid=lambda value: isinstance(value, tuple) and all(map(_is_text, value)),
    default=(),
    parse=_parse_patterns,
    to_words=list,
    to_json=list,
    from_json=lambda data: _parse_patterns(map(str, data)),
    on_command_line="texts",
    metavar="REGEX",
)

# -- values with a class of their own --------------------------------------------------------


def parse_override(
    text: str | tuple[str, Spec | str], base: Quantization | None = None
) -> Override:
    """Parse ``REGEX=SPEC``; the last ``=`` divides, so the regex may contain others."""
    if isinstance(text, tuple):
        pattern, spec = text
    else:
        pattern, equals, spec = text.rpartition("=")
        if not equals or not pattern:
            raise UsageError(f"--override {text!r} is not REGEX=SPEC, as in 'lm_head=8'")
    check_regex(pattern, "--override")
    return pattern, parse_spec(spec, base) if isinstance(spec, str) else spec


def parse_protection(text: str | tuple[str, int]) -> Protection:
    """Parse ``REGEX=BITS``; the last ``=`` divides, so the regex may contain others.

    Raises:
        UsageError: It has another form, or no quantization has as many or as few bits.
    """
    pattern, bits = text if isinstance(text, tuple) else text.rpartition("=")[::2]
    if not pattern:
        raise UsageError(f"--protect {text!r} is not REGEX=BITS, as in 'lm_head=6'")
    check_regex(pattern, "--protect")
    least, most = min(BUDGET_BITS), max(BUDGET_BITS)
    if not str(bits).strip().isdecimal() or not least <= int(bits) <= most:
        raise UsageError(
            f"--protect {pattern}={bits}: {str(bits)!r} is not a number of bits from {least} to "
            f"{most}, as in '{pattern}=6'"
        )
    return pattern, int(bits)


def _checked(quantization: Quantization) -> Quantization:
    """Return ``quantization`` if MLX supports it; else raise OutOfRangeError."""
    check_quantization(quantization.bits, quantization.group_size, quantization.mode.value)
    return quantization


def _quantization_from_json(data: Any) -> Quantization | None:
    """Read ``Quantization.to_dict`` back and check it; None stays None."""
    return None if data is None else _checked(Quantization.from_dict(data))


def _override_from_json(data: Any) -> Override:
    pattern, spec = data
    check_regex(str(pattern), "--override")
    return str(pattern), SKIP if spec == "skip" else _checked(Quantization.from_dict(spec))


def _override_to_json(override: Override) -> list[Any]:
    pattern, spec = override
    return [pattern, spec.to_dict() if isinstance(spec, Quantization) else "skip"]


def _recipe_from_json(data: Any) -> Recipe | None:
    default = data and _quantization_from_json(data.get("default"))
    return data and recipe_from_dict({**data, "default": default})


def _parse_dtype(word: Any) -> str:
    if word not in DTYPES:
        raise UnknownValueError("no such dtype", str(word), list(DTYPES))
    return DTYPES[word]


def _budget_from_json(data: Any) -> str | None:
    if data is None:
        return None
    if not isinstance(data, str):
        raise TypeError(f"budget is {data!r}, expected a text")
    return parse_budget(data).text


QUANTIZATION = ValueType(
    annotation="Quantization",
    expected="a Quantization",
    is_valid=lambda value: isinstance(value, Quantization),
    parse=lambda value: _checked(value) if isinstance(value, Quantization) else value,
    to_json=lambda value: value and value.to_dict(),
    from_json=_quantization_from_json,
    on_command_line="",
)
MODE = replace(
    choice(*(mode.value for mode in QuantMode)),
    parse=lambda value: value.lower() if isinstance(value, str) else value,
    metavar="MODE",
)
DTYPE = ValueType(
    annotation="str",
    expected=f"one of {', '.join(DTYPES.values())}",
    is_valid=lambda value: value in DTYPES.values(),
    parse=_parse_dtype,
    to_words=lambda value: [word for word, name in DTYPES.items() if name == value],
    choices=tuple(DTYPES),
    metavar="DTYPE",
)
OVERRIDES = ValueType(
    annotation="Iterable[str | tuple[str, Spec | str]]",
    expected="a list of REGEX=SPEC",
    is_valid=lambda value: isinstance(value, tuple),
    default=(),
    parse=lambda value: (value,) if isinstance(value, str) else tuple(value),
    to_words=lambda value: [f"{pattern}={format_spec(spec)}" for pattern, spec in value],
    to_json=lambda value: [*map(_override_to_json, value)],
    from_json=lambda data: tuple(map(_override_from_json, data)),
    on_command_line="texts",
    metavar="REGEX=SPEC",
)
RECIPE = ValueType(
    annotation="str | os.PathLike[str]",
    expected="a recipe",
    is_valid=lambda value: isinstance(value, Recipe),
    parse=load_recipe,
    # A recipe of the user's own is written as NAME.toml: the path of its file is not recorded.
    to_words=lambda recipe: [recipe.name + ".toml" * (recipe.name not in recipe_names())],
    to_json=lambda value: value and asdict(value),
    from_json=_recipe_from_json,
    completions=recipe_names,
    metavar="NAME|FILE",
)
BUDGET = ValueType(
    annotation="str | float",
    expected="bits per weight or a size",
    is_valid=_is_text,
    parse=lambda value: parse_budget(value).text,
    from_json=_budget_from_json,
    metavar="SIZE",
)
PROTECTIONS = ValueType(
    annotation="Iterable[str | tuple[str, int]]",
    expected="a list of REGEX=BITS",
    is_valid=lambda value: isinstance(value, tuple),
    default=(),
    parse=lambda value: tuple(map(parse_protection, [value] if isinstance(value, str) else value)),
    to_words=lambda value: [f"{pattern}={bits}" for pattern, bits in value],
    to_json=lambda value: [*map(list, value)],
    from_json=lambda data: tuple(parse_protection((str(regex), bits)) for regex, bits in data),
    on_command_line="texts",
    metavar="REGEX=BITS",
)
PART = ValueType(
    annotation="str",
    expected="a part, as 1/8",
    is_valid=lambda value: isinstance(value, Part),
    parse=Part.parse,
    metavar="NUMBER/COUNT",
)
LAYERS = ValueType(
    annotation="Iterable[str]",
    expected="a list of layers",
    is_valid=lambda value: isinstance(value, frozenset) and all(map(_is_text, value)),
    default=frozenset(),
    to_json=sorted,
    from_json=frozenset,
    on_command_line="",
)
