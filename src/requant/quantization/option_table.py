"""An entry of the table of options: signatures, command line, record and reports come from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import Any

from requant.errors import UnknownValueError, UsageError
from requant.quantization.option_types import ValueType
from requant.text import format_value

# Functions that take options, and the command of each.
COMMAND_OF: Mapping[str, str] = {"convert": "convert", "plan": "plan", "load": "generate"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """One entry of the table."""

    name: str = ""  # the field's, which is the name of the keyword argument
    default: Any = None  # the value if the option is not given
    type: ValueType  # how its values are given, stored and printed
    doc: str  # its effect, for the Python reference
    help: str = ""  # the same for the command line; "" where ``doc`` serves both
    # Its spellings; by default ``--name``, or ``--no-name`` if ``is_negated``.
    flags: tuple[str, ...] = ()
    metavar: str = ""  # represents the value in a help text; by default the type's
    minimum: int | None = None  # the smallest number that the command line accepts
    is_negated: bool = False  # the flag sets the value to False
    # Those of ``COMMAND_OF`` that take it as a keyword.
    functions: tuple[str, ...] = tuple(COMMAND_OF)
    # The commands that take it; by default those of ``functions``.
    commands: tuple[str, ...] | None = None
    # Returns the command-line words for all options, where these depend on more than this value.
    words: Callable[[Any], list[str]] | None = None

    @property
    def flag(self) -> str:
        """The first spelling on the command line."""
        name = self.name.replace("_", "-")
        return self.flags[0] if self.flags else f"--no-{name}" if self.is_negated else f"--{name}"

    @property
    def annotation(self) -> str:
        """Type of the keyword argument, as signatures show it."""
        return f"{self.type.annotation} | None" if self.default is None else self.type.annotation

    def is_in_command(self, command: str) -> bool:
        """Return whether a command takes the option."""
        commands = self.commands
        if commands is None:
            commands = tuple(COMMAND_OF[function] for function in self.functions)
        return bool(self.type.on_command_line) and command in commands

    def check(self, value: Any) -> None:
        """Raise UnknownValueError or UsageError where a field may not hold ``value``."""
        if self.default is None if value is None else self.type.is_valid(value):
            return
        if self.type.choices and isinstance(value, str):
            noun = self.name.replace("_", "-")
            raise UnknownValueError(f"no such {noun}", value, self.type.choices)
        raise UsageError(f"{self.name} is {format_value(value)}, expected {self.type.expected}")

    def command_words(self, options: Any) -> list[str]:
        """Return the command-line words for the value in ``options``; none for the default."""
        if self.words is not None:
            return self.words(options)
        value = getattr(options, self.name)
        if value == self.default or not self.type.on_command_line:
            return []
        return [x for word in self.type.to_words(value) for x in (self.flag, word) if x]


def option(type: ValueType, **entry: Any) -> Any:
    """Return a dataclass field with an ``Option`` made from the keywords as its metadata."""
    made = Option(**{"default": type.default, "metavar": type.metavar, "type": type} | entry)
    return field(default=made.default, metadata={"option": made})


@cache
def options_of(*tables: Any) -> Mapping[str, Option]:
    """The entries of classes of options by name, in their order."""
    found = [x for table in tables for x in fields(table)]
    return {x.name: replace(x.metadata["option"], name=x.name) for x in found}
