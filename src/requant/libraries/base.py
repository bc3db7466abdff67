"""What an adapter says of one MLX library: whether it has a class for a model, and its convert.

Looking for a class imports nothing: importing a library takes one to three seconds, looking for a
file of its package takes a millisecond.
"""

from __future__ import annotations

import ast
import importlib
import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from requant.errors import RequantError
from requant.libraries.stand_ins import StandIns
from requant.libraries.surroundings import replaced
from requant.quantization.config import Quantization
from requant.quantization.options import DTYPES
from requant.text import format_value

# The consequence of a missing class, after the reason.
NO_CLASS_HINT = (
    "Without {library}'s class, the names, the stacking of experts and the choice of layers that "
    "it expects are not known. --layout keep needs no class: it keeps the source's tensor "
    "names and chooses layers by names and shapes"
)


class UnknownModelError(RequantError, LookupError):
    """A library is not installed, or has no class for a model.

    Attributes:
        why: The reason, without the advice that the message adds.
    """

    def __init__(self, why: str, library: str) -> None:
        self.why = why
        super().__init__(f"{why}. {NO_CLASS_HINT.format(library=library)}")


class LayoutError(RequantError, ValueError):
    """A library has a class for the model, but its conversion would fail, or cannot be followed.

    Attributes:
        class_names: The parameters of the class, where it could be built.
        unmatched: Parameters without a tensor and tensors without a parameter, if these are what
            is wrong.
    """

    class_names: tuple[str, ...] = ()
    unmatched: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Request:
    """What a library's convert is asked for.

    Attributes:
        quantization: The target; None for a dense output.
        recipe: One of the library's own mixed recipes; affine only.
        dtype: Header name ("BF16") to cast floating tensors to; None takes the library's default.
    """

    quantization: Quantization | None = None
    recipe: str | None = None
    dtype: str | None = None


class _Nothing:
    """In place of a tokenizer or processor, which a layout does not need."""

    def save_pretrained(self, *_: Any, **__: Any) -> None:
        """Write nothing."""


@dataclass(frozen=True, slots=True)
class Library:
    """One MLX library.

    Attributes:
        name: As ``--layout`` names it ("mlx-vlm").
        package: Its Python package ("mlx_vlm").
        extra: The extra of requant that installs it ("vlm").
        find_class: Takes the folder of its package and ``config.json``; whether it may have a
            class for the model. Imports nothing.
        import_class: Takes its ``utils``, ``config.json`` and the model's folder; imports the
            class, and raises an exception if there is none.
        load: Takes its ``utils`` and a folder; loads the model of the folder.
        recipes: Its mixed recipes.
        stubs: Functions of the library that load or write what is not weights, as
            (module, name): they do nothing while its convert runs.
        arguments: Takes the same as ``find_class``; further arguments of its ``convert``.
        copied: Patterns of files that it copies though they look like weights (voices).
        has_heads: Whether its classes predict tokens, and need the output head.
        stand_ins: Its modules with stand-ins for packages that its convert imports and a layout
            does not need.
    """

    name: str
    package: str
    extra: str
    find_class: Callable[[Path, Mapping[str, Any]], bool]
    import_class: Callable[[Any, dict[str, Any], Path], object]
    load: Callable[[Any, Path], Any]
    recipes: frozenset[str] = frozenset()
    stubs: tuple[tuple[str, str], ...] = ()
    arguments: Callable[[Path, Mapping[str, Any]], dict[str, Any]] = lambda *_: {}
    copied: tuple[str, ...] = ()
    has_heads: bool = True
    stand_ins: StandIns | None = None

    @property
    def folder(self) -> Path | None:
        """The folder of its package, found without importing it; None where it is missing."""
        spec = find_spec(self.package) if find_spec("mlx") else None
        folders = spec.submodule_search_locations if spec else None
        return Path(folders[0]) if folders else None

    @property
    def not_installed(self) -> str:
        """Which extra installs it, after "is not installed"; "" if it is installed."""
        if self.folder is None:
            return f"is not installed (pip install 'requant[{self.extra}]')"
        return ""

    def missing_class_reason(self, config: Mapping[str, Any]) -> str:
        """Return why the library has no class for ``config``; "" where it may have one.

        Args:
            config: The source's ``config.json``.
        """
        folder = self.folder
        if folder is None:
            return f"{self.name} {self.not_installed}"
        if "model_file" in config:  # it would be imported and run
            return "config.json names code of its own (model_file), which is not run"
        if self.find_class(folder, config):
            return ""
        model_type = config.get("model_type")
        if not isinstance(model_type, str):
            return "config.json has no model_type"
        return f"{self.name} has no class for model_type {format_value(model_type)}"

    def convert(self, source: Path, output: Path, request: Request) -> None:
        """Run the library's own convert on a folder, without its tokenizers and model cards.

        Raises:
            StandInUsedError: It needs a package that was left out; called again, it has it.
        """
        words = {header: word for word, header in DTYPES.items()}
        config = json.loads((source / "config.json").read_text())
        assert self.folder is not None
        arguments = self.arguments(self.folder, config)
        target = request.quantization
        if target is not None:
            arguments |= {
                "quantize": True,
                "q_group_size": target.group_size,
                "q_bits": target.bits,
                "q_mode": target.mode.value,
            }
        if request.recipe is not None:
            arguments["quant_predicate"] = request.recipe
        if request.dtype is not None:
            arguments["dtype"] = words[request.dtype]
        with ExitStack() as stack:
            if self.stand_ins is not None:
                stack.enter_context(self.stand_ins.in_place())
            try:
                convert = importlib.import_module(f"{self.package}.convert").convert
                for module, name in self.stubs:
                    owner = importlib.import_module(module)
                    stack.enter_context(replaced(owner, name, lambda *_, **__: _Nothing()))
            except Exception as error:  # mlx-lm raises limits of the process while it is imported
                raise LayoutError(f"{self.name} cannot be imported ({error})") from error
            convert(str(source), str(output), **arguments)


def module_exists(folder: Path, name: str) -> bool:
    """Whether a folder of modules has one of this name."""
    if not name.replace("-", "_").isidentifier():
        return False
    return (folder / f"{name}.py").is_file() or (folder / name).is_dir()


def read_table(file: Path, *names: str) -> dict[str, Any]:
    """Literal values that a module assigns to names, read without importing it.

    Raises:
        ValueError: It cannot be read, or one of the names is not a literal.
    """
    tables: dict[str, Any] = {}
    try:
        for node in ast.parse(file.read_bytes()).body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                name = node.targets[0].id
                if name in names:
                    tables[name] = ast.literal_eval(node.value)
    except (OSError, SyntaxError, TypeError) as error:
        raise ValueError(f"{file}: {error}") from error
    return tables
