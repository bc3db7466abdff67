"""Signatures and docstrings of the functions that take options, made from the table.

``@takes_options("convert")`` lists the options in the signature and in the ``Args`` section of a
function whose own source says ``**arguments: Unpack[ConvertKeywords]``. Type checkers and editors
read ``option_keywords``, which ``scripts/generate-keywords`` writes from the same table.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any, TypeVar

from requant.quantization.config import Quantization
from requant.quantization.option_table import COMMAND_OF, Option, options_of
from requant.quantization.options import ConvertOptions, RunOptions

_LINE_LENGTH = 100

F = TypeVar("F", bound=Callable[..., Any])


def keywords_of(function: str) -> dict[str, Option]:
    """The options that a function takes as keywords, ``quantization`` aside."""
    table = options_of(ConvertOptions, RunOptions)
    return {
        name: entry
        for name, entry in table.items()
        if function in entry.functions and name != "quantization"
    }


def read_arguments(
    function: str, quantization: Quantization | None, arguments: Mapping[str, Any], **fixed: Any
) -> tuple[ConvertOptions, RunOptions]:
    """Check the arguments of a function and make options of them.

    Args:
        function: Its name in the table.
        quantization: Its positional argument.
        arguments: Its keyword arguments.
        **fixed: Options that the function sets itself.

    Raises:
        TypeError: It takes no such keyword.
        UsageError: Options contradict each other or cannot be parsed.
        OutOfRangeError: MLX has no such bits or group size in the mode.
        UnknownValueError: A word is none of the choices.
    """
    known = keywords_of(function)
    for name in arguments:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}{hint}")
    of_run = options_of(RunOptions)
    options = {name: value for name, value in arguments.items() if name not in of_run}
    run = {name: value for name, value in arguments.items() if name in of_run}
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


def keywords_module() -> str:
    """The source of ``option_keywords``, which declares the keywords for type checkers."""
    return "\n".join(_keyword_lines()) + "\n"


def _keyword_lines() -> Iterator[str]:
    yield '"""Keyword arguments of the functions that take options, for type checkers and editors.'
    yield ""
    yield "Generated from the table of options by ``scripts/generate-keywords``; do not edit."
    yield '"""'
    yield ""
    yield "from __future__ import annotations"
    yield ""
    yield "import os"
    yield "from collections.abc import Callable, Iterable, Sequence"
    yield "from typing import TypedDict"
    yield ""
    yield "from requant.execution.executor import Progress"
    yield "from requant.quantization.specs import Spec"
    groups: dict[tuple[str, ...], list[Option]] = {}
    for name, entry in options_of(ConvertOptions, RunOptions).items():
        if entry.functions and name != "quantization":
            groups.setdefault(entry.functions, []).append(entry)
    for functions, entries in groups.items():
        yield from ("", "", f"class {_group_name(functions)}(TypedDict, total=False):")
        yield f'    """Options of {_and(functions)}."""'
        yield ""
        for entry in entries:
            yield f"    {entry.name}: {entry.annotation}"
            yield from _docstring(entry.doc)
    for function in COMMAND_OF:
        bases = ", ".join(_group_name(x) for x in groups if function in x)
        yield from ("", "", f"class {function.title()}Keywords({bases}, total=False):")
        yield f'    """Keyword arguments of ``{function}``."""'


def _group_name(functions: tuple[str, ...]) -> str:
    return f"_Of{''.join(map(str.title, functions))}"


def _and(functions: tuple[str, ...]) -> str:
    names = [f"``{function}``" for function in functions]
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _docstring(text: str) -> Iterator[str]:
    """A docstring of an attribute, indented by four."""
    quoted = f'r"""{text}' if "\\" in text else f'"""{text}'
    lines = textwrap.wrap(
        quoted,
        _LINE_LENGTH - 3,
        initial_indent="    ",
        subsequent_indent="    ",
        break_long_words=False,
        break_on_hyphens=False,
    )
    if len(lines) == 1 and not text.endswith('"'):
        yield f'{lines[0]}"""'
    else:
        yield from (*lines, '    """')
