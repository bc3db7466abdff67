"""Print ``execution/option_keywords.py``, made from the table of options."""

import textwrap

from requant.quantization.option_table import COMMAND_OF, Option, options_of
from requant.quantization.options import ConvertOptions, RunOptions

LINE_LENGTH = 100
HEAD = '''\
"""Keyword arguments of the functions that take options, for type checkers and editors.

Generated from the table of options by ``scripts/generate-keywords``; do not edit.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import TypedDict

from requant.execution.executor import Progress
from requant.quantization.specs import Spec
'''


def class_of(functions: tuple[str, ...]) -> str:
    return f"_Of{''.join(map(str.title, functions))}"


def class_text(functions: tuple[str, ...], entries: list[Option]) -> str:
    """The class of the options that exactly these functions take."""
    *names, last = [f"``{function}``" for function in functions]
    taken = f"{', '.join(names)} and {last}" if names else last
    fields = "".join(
        f"    {entry.name}: {entry.annotation}\n{docstring(entry.doc)}" for entry in entries
    )
    return (
        f"\n\nclass {class_of(functions)}(TypedDict, total=False):\n"
        f'    """Options of {taken}."""\n\n{fields}'
    )


def docstring(text: str) -> str:
    """A docstring of an attribute, indented by four."""
    lines = textwrap.wrap(
        f'r"""{text}' if "\\" in text else f'"""{text}',
        LINE_LENGTH - 3,
        initial_indent="    ",
        subsequent_indent="    ",
        break_long_words=False,
        break_on_hyphens=False,
    )
    is_short = len(lines) == 1 and not text.endswith('"')
    return "\n".join(lines) + ('"""\n' if is_short else '\n    """\n')


def main() -> None:
    groups: dict[tuple[str, ...], list[Option]] = {}
    for entry in options_of(ConvertOptions, RunOptions).values():
        if entry.functions and entry.name != "quantization":
            groups.setdefault(entry.functions, []).append(entry)
    text = HEAD + "".join(class_text(*group) for group in groups.items())
    for function in COMMAND_OF:
        bases = ", ".join(class_of(x) for x in groups if function in x)
        text += f"\n\nclass {function.title()}Keywords({bases}, total=False):\n"
        text += f'    """Keyword arguments of ``{function}``."""\n'
    print(text, end="")


if __name__ == "__main__":
    main()
