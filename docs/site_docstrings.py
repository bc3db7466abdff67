"""An extension of griffe that adapts docstrings for the site's reference."""

from __future__ import annotations

import inspect
import re
from importlib import import_module
from typing import Any

import griffe


class Examples(griffe.Extension):
    """Treat ``Example:`` as the section of code that griffe calls ``Examples:``."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called once for each module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"(?m)^Example:$", "Examples:", obj.docstring.value)

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        """Show the options of a function that takes them from the table, as ``help`` does."""
        if not any("takes_options" in str(x.value) for x in func.decorators):
            return
        function = getattr(import_module(func.module.path), func.name)
        if func.docstring is not None:
            func.docstring.value = inspect.getdoc(function) or ""
        kinds = griffe.ParameterKind
        func.parameters = griffe.Parameters(
            *(x for x in func.parameters if x.kind is not kinds.var_keyword),
            *(
                griffe.Parameter(
                    x.name,
                    annotation=griffe.parse_docstring_annotation(
                        str(x.annotation), griffe.Docstring("", parent=func)
                    ),
                    kind=kinds.keyword_only,
                    default=repr(x.default),
                )
                for x in inspect.signature(function).parameters.values()
                if x.name not in {own.name for own in func.parameters}
            ),
        )
