"""Print what is public, a line each: docs/reference/interface.txt is what the last release had.

python scripts/interface.py > docs/reference/interface.txt    at a release
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import typer.main

import requant
import requant.mlx_lm
import requant.mlx_vlm
from requant.cli.application import app
from requant.formats import plugins
from requant.formats.base import Format
from requant.output.record import FORMAT_VERSION
from requant.reports.record_summary import SCHEMA_VERSION


def interface() -> set[str]:
    """Every public name with what callers rely on: parameters and defaults, options, JSON keys."""
    return {*_python(), *_commands(), *_documents()}


def _python() -> Iterator[str]:
    for name in requant.__all__:
        yield from _named(f"requant.{name}", getattr(requant, name))
    for module in (requant.mlx_lm, requant.mlx_vlm):
        yield from _parameters(f"{module.__name__}.load", module.load)
    yield f"entry points {plugins.GROUP}"
    for method in ("claims", "read"):
        yield from _parameters(f"entry points {plugins.GROUP}: {method}", getattr(Format, method))


def _named(path: str, value: Any) -> Iterator[str]:
    if not isinstance(value, type):
        yield from _parameters(path, value) if callable(value) else [path]
        return
    bases = [base.__name__ for base in value.__mro__[1:] if base is not object]
    yield f"{path}: class"
    if issubclass(value, BaseException):
        yield from (f"{path}: a {base}" for base in bases)
    fields = dataclasses.fields(value) if dataclasses.is_dataclass(value) else ()
    names = {*(f.name for f in fields), *(name for base in value.__mro__ for name in vars(base))}
    builtin = {*dir(OSError), *dir(str), *dir(tuple), *dir(dict)}
    for name in sorted(n for n in names - builtin if not n.startswith("_")):
        member = inspect.getattr_static(value, name, None)
        if inspect.isfunction(member):
            yield from _parameters(f"{path}.{name}", member)
        else:
            yield f"{path}.{name}"


def _parameters(path: str, function: Any) -> Iterator[str]:
    yield f"{path}()"
    for number, parameter in enumerate(inspect.signature(function).parameters.values()):
        if parameter.name == "self":
            continue
        place = f" at {number}" if parameter.kind is parameter.POSITIONAL_OR_KEYWORD else ""
        default = getattr(parameter.default, "__name__", repr(parameter.default))
        default = "" if parameter.default is parameter.empty else f" = {default}"
        yield f"{path}({parameter.name}{default}){place}"


def _commands() -> Iterator[str]:
    group: Any = typer.main.get_command(app)
    for name, command in group.commands.items():
        yield f"$ requant {name}"
        for parameter in command.params:
            if parameter.param_type_name == "argument":
                yield f"$ requant {name} {parameter.name.upper()}"
                continue
            for option in (*parameter.opts, *parameter.secondary_opts):
                yield f"$ requant {name} {option}" + ("" if _is_flag(parameter) else " VALUE")


def _is_flag(parameter: Any) -> bool:
    return bool(getattr(parameter, "is_flag", False) or getattr(parameter, "count", False))


def _documents() -> Iterator[str]:
    yield f"requant.json: record {FORMAT_VERSION}"
    yield f"--json: schema {SCHEMA_VERSION}"
    for file in files("requant").joinpath("schemas").iterdir():
        schema = json.loads(file.read_text("utf-8"))
        yield from _keys(f"--json of {file.name.removesuffix('.json')}: ", schema)


def _keys(path: str, schema: Any) -> Iterator[str]:
    if not isinstance(schema, dict):
        return
    for key in ("properties", "$defs"):
        for name, inner in schema.get(key, {}).items():
            kind = inner.get("type", inner.get("$ref", "")) if isinstance(inner, dict) else ""
            yield f"{path}{name} {json.dumps(kind)}"
            yield from _keys(f"{path}{name}.", inner)
    for key in ("items", "additionalProperties"):
        yield from _keys(f"{path}*.", schema.get(key))
    for key in ("anyOf", "oneOf", "allOf"):
        for inner in schema.get(key, []):
            yield from _keys(path, inner)


if __name__ == "__main__":
    print("\n".join(sorted(interface())))
