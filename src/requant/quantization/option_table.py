"""The vocabulary of the table of options: what one entry says about itself.

An option is a field of ``ConvertOptions`` or ``RunOptions`` (``options``) whose metadata is an
``Option``. Everything that knows the options reads these entries: the signatures and docstrings
of ``convert``, ``plan`` and ``mlx_lm.load``, the command line, ``requant.json``, and the command
that a report prints. A new option is one more field.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import Any

from requant.core.limits import MAX_INT
from requant.errors import UnknownValueError, UsageError
from requant.quantization.size_budget import size_text
from requant.quantization.specs import check_regex
from requant.text import format_value

# The functions that take options, and the command of each.
COMMAND_OF: Mapping[str, str] = {"convert": "convert", "plan": "plan", "load": "generate"}


def _same(value: Any) -> Any:
    return value


def _one_word(value: Any) -> list[str]:
    return [str(value)]


@dataclass(frozen=True, kw_only=True, slots=True)
class ValueType:
    """How the values of an option are given, kept, recorded and printed.

    Attributes:
        annotation: Type of the keyword argument, as signatures show it (without ``| None``).
        expected: The legal values in words, for messages.
        is_valid: Tells whether a field may hold this; None is legal where it is the default.
        parse: Makes the field's value of an argument.
        to_words: The values as they are typed, one for each time that the flag is given.
        to_json: Makes JSON data of the field's value.
        from_json: Reads it back; raises ValueError, TypeError or KeyError.
        choices: The words that can be given, where these are all there is.
        on_command_line: "flag", "int", "size", "text", "path" or "texts"; "" for values that
            only Python can give.
    """

    annotation: str
    expected: str
    is_valid: Callable[[Any], bool]
    parse: Callable[[Any], Any] = _same
    to_words: Callable[[Any], list[str]] = _one_word
    to_json: Callable[[Any], Any] = _same
    from_json: Callable[[Any], Any] = _same
    choices: tuple[str, ...] = ()
    on_command_line: str = "text"


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= MAX_INT


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _check_patterns(flag: str, patterns: Iterable[str]) -> tuple[str, ...]:
    found = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    for pattern in found:
        check_regex(pattern, flag)
    return found


FLAG = ValueType(
    annotation="bool",
    expected="true or false",
    is_valid=lambda value: isinstance(value, bool),
    to_words=lambda value: [""] if value else [],
    on_command_line="flag",
)
INTEGER = ValueType(
    annotation="int", expected="a whole number", is_valid=_is_int, on_command_line="int"
)
SIZE = ValueType(
    annotation="int",
    expected="a number of bytes from 1",
    is_valid=lambda value: _is_int(value) and value > 0,
    to_words=lambda value: [size_text(value)],
    on_command_line="size",
)
TEXT = ValueType(annotation="str", expected="a text", is_valid=_is_text)
PATH = ValueType(
    annotation="str | os.PathLike[str]",
    expected="a path",
    is_valid=_is_text,
    parse=os.fspath,
    on_command_line="path",
)
CALLBACK = ValueType(
    annotation="Callable[[Progress], None]",
    expected="a function",
    is_valid=callable,
    on_command_line="",
)


def choice(*words: str) -> ValueType:
    """One of some words."""
    return ValueType(
        annotation="str",
        expected=f"one of {', '.join(words)}",
        is_valid=lambda value: value in words,
        choices=words,
    )


def patterns(flag: str) -> ValueType:
    """Regular expressions on layer paths."""
    return ValueType(
        annotation="Sequence[str]",
        expected="a list of texts",
        is_valid=lambda value: isinstance(value, tuple) and all(map(_is_text, value)),
        parse=lambda value: _check_patterns(flag, value),
        to_words=list,
        to_json=list,
        from_json=lambda data: _check_patterns(flag, map(str, data)),
        on_command_line="texts",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """One entry of the table.

    Attributes:
        name: The field's, which is the name of the keyword argument.
        default: What holds if the option is not given.
        type: How its values are given, kept and printed.
        doc: What it does, for readers of the Python reference.
        help: The same for the command line; "" where ``doc`` serves both.
        flags: How it is typed; by default ``--name``, or ``--no-name`` if ``is_negated``.
        metavar: Represents the value in a help text.
        completions: What a shell offers for the value, next to the type's choices.
        minimum: Least number that the command line takes.
        is_negated: The flag says False.
        functions: Which of ``COMMAND_OF`` take it as a keyword.
        commands: Which commands take it; by default those of ``functions``.
        words: The command-line words that ask for what the options hold, where they depend on
            more than this value.
    """

    name: str = ""
    default: Any = None
    type: ValueType
    doc: str
    help: str = ""
    flags: tuple[str, ...] = ()
    metavar: str = ""
    completions: Callable[[], Iterable[str]] | None = None
    minimum: int | None = None
    is_negated: bool = False
    functions: tuple[str, ...] = tuple(COMMAND_OF)
    commands: tuple[str, ...] | None = None
    words: Callable[[Any], list[str]] | None = None

    @property
    def flag(self) -> str:
        """Its first spelling on the command line."""
        name = self.name.replace("_", "-")
        return self.flags[0] if self.flags else f"--no-{name}" if self.is_negated else f"--{name}"

    @property
    def annotation(self) -> str:
        """Type of the keyword argument, as signatures show it."""
        return f"{self.type.annotation} | None" if self.default is None else self.type.annotation

    def is_in_command(self, command: str) -> bool:
        """Whether a command takes it."""
        if not self.type.on_command_line:
            return False
        if self.commands is not None:
            return command in self.commands
        return command in {COMMAND_OF[function] for function in self.functions}

    def check(self, value: Any) -> None:
        """Check a field's value by itself.

        Raises:
            UnknownValueError: It is none of the choices.
            UsageError: It is of another type.
        """
        if (value is None and self.default is None) or (
            value is not None and self.type.is_valid(value)
        ):
            return
        if self.type.choices and isinstance(value, str):
            raise UnknownValueError(f"no such {self.noun}", value, self.type.choices)
        raise UsageError(f"{self.name} is {format_value(value)}, expected {self.type.expected}")

    @property
    def noun(self) -> str:
        """The option in a sentence."""
        return self.name.replace("_", "-")

    def command_words(self, options: Any) -> list[str]:
        """What is typed to ask for the value that ``options`` hold; nothing for the default."""
        if self.words is not None:
            return self.words(options)
        value = getattr(options, self.name)
        if value == self.default or not self.type.on_command_line:
            return []
        return [x for word in self.type.to_words(value) for x in (self.flag, word) if x]


def option(default: Any, **entry: Any) -> Any:
    """A field of a class of options; ``entry`` is what ``Option`` takes."""
    return field(default=default, metadata={"option": Option(default=default, **entry)})


@cache
def options_of(*tables: Any) -> Mapping[str, Option]:
    """The entries of classes of options by name, in their order."""
    return {
        f.name: replace(f.metadata["option"], name=f.name)
        for table in tables
        for f in fields(table)
    }
