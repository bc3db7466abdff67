"""Signatures and docstrings of the functions that take options, made from the table.

``@takes_options("convert")`` lists the options in the signature and in the ``Args`` section of a
function whose own source says ``**arguments: Unpack[ConvertKeywords]``. Type checkers and editors
read ``execution.option_keywords``, which ``scripts/generate-keywords`` writes from the table.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any, TypeVar

from requant.quantization.config import Quantization
from requant.quantization.option_table import Option, options_of
from requant.quantization.options import ConvertOptions, RunOptions

_LINE_LENGTH = 100

F = TypeVar("F", bound=Callable[..., Any])


def keywords_of(function: str) -> dict[str, Option]:
    """The options that a function takes as keywords, ``quantization`` aside."""
    entries = options_of(ConvertOptions, RunOptions).values()
    named = (x for x in entries if x.name != "quantization" and function in x.functions)
    return {entry.name: entry for entry in named}


def read_arguments(
    function: str, quantization: Quantization | None, arguments: Mapping[str, Any], **fixed: Any
) -> tuple[ConvertOptions, RunOptions]:
    """Make options of the arguments of a function; ``fixed`` are those that it sets itself.

    Raises:
        TypeError: It takes no such keyword.
        UsageError, OutOfRangeError, UnknownValueError: As ``ConvertOptions.from_arguments``.
    """
    known = keywords_of(function)
    for name in arguments:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}{hint}")
    of_run = options_of(RunOptions).keys()
    run = {name: value for name, value in arguments.items() if name in of_run}
    options = {name: value for name, value in arguments.items() if name not in of_run}
    return (
        ConvertOptions.from_arguments(quantization, **options, **fixed),
        RunOptions.from_arguments(**run),
    )


def takes_options(name: str) -> Callable[[F], F]:
    """Decorate a function whose ``**arguments`` are the options of ``name`` in the table."""

    def decorated(function: F) -> F:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        options = [
            inspect.Parameter(
                x.name, inspect.Parameter.KEYWORD_ONLY, default=x.default, annotation=x.annotation
            )
            for x in keywords_of(name).values()
        ]
        signature = signature.replace(parameters=[*own, *options])
        function.__signature__ = signature  # type: ignore[attr-defined]
        if function.__doc__:
            function.__doc__ = _documented(function.__doc__, name)
        return function

    return decorated


def _documented(doc: str, name: str) -> str:
    """Replace the entry ``**arguments`` of a docstring by one for each option."""
    entry = re.search(r"^( +)\*\*arguments:.*\n(?:\1 +.*\n)*", doc, re.M)
    if entry is None:
        return doc
    lines = [
        line
        for entry_name, option in keywords_of(name).items()
        for line in textwrap.wrap(
            f"{entry_name}: {option.doc}",
            _LINE_LENGTH,
            initial_indent=entry[1],
            subsequent_indent=entry[1] + "    ",
            break_long_words=False,
            break_on_hyphens=False,
        )
    ]
    return doc[: entry.start()] + "\n".join(lines) + "\n" + doc[entry.end() :]
