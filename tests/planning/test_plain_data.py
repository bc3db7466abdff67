"""Frozen means frozen: a plan is plain data, and no frozen dataclass hides state that changes."""

import ast
import dataclasses
import importlib
import inspect
import pickle
import pkgutil
from collections.abc import Iterator, Mapping
from enum import Enum
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

import requant
from requant.checkpoints.checkpoint import ComputedTensor
from requant.importance.reader import LayerStatistics, write_statistics
from requant.planning.plan import Plan
from requant.planning.planner import make_plan, plan_with_source
from requant.quantization.config import Quantization
from requant.quantization.options import ConvertOptions
from requant.sources.open import read_checkpoint
from tests.support.fixture_folders import NAMES, cut_fixture
from tests.support.published_models import published

PACKAGE = Path(requant.__file__).parent


def not_plain(value: object, path: str) -> Iterator[str]:
    """Where a value is, or holds, anything but plain data."""
    if value is None or isinstance(value, str | bytes | int | float | Enum | Path):
        return
    if isinstance(value, np.generic):
        return
    if isinstance(value, np.ndarray):
        if value.dtype == object:
            yield f"{path}: an array of objects"
    elif isinstance(value, Mapping):
        if not isinstance(value, dict | MappingProxyType):
            yield f"{path}: {type(value).__name__}"
        for key, entry in value.items():
            yield from not_plain(key, f"{path} key")
            yield from not_plain(entry, f"{path}[{key!r}]")
    elif isinstance(value, tuple | list | frozenset):
        for number, entry in enumerate(value):
            yield from not_plain(entry, f"{path}[{number}]")
    elif dataclasses.is_dataclass(value):
        if not value.__dataclass_params__.frozen:  # type: ignore[attr-defined]
            yield f"{path}: {type(value).__name__} is not frozen"
        fields = {field.name for field in dataclasses.fields(value)}
        hidden = set(getattr(value, "__dict__", {})) - fields
        if hidden:
            yield f"{path}: {type(value).__name__} holds {sorted(hidden)} next to its fields"
        for name in fields:
            yield from not_plain(getattr(value, name), f"{path}.{name}")
    else:
        yield f"{path}: {type(value).__name__}"


def check(plan: Plan) -> None:
    assert (len(plan.hash), plan.bytes_in >= 0, plan.bytes_out >= 0) == (64, True, True)
    assert list(not_plain(plan, "plan"))[:5] == []
    again = pickle.loads(pickle.dumps(plan))
    assert again == plan
    assert again.hash == plan.hash


@pytest.mark.sweep(12)
@pytest.mark.parametrize("name", NAMES)
def test_a_plan_of_any_format_is_plain_data(name: str) -> None:
    folder = cut_fixture(name) / "checkpoint"
    gguf = sorted(folder.glob("*.gguf"))
    source = gguf[0] if gguf else folder
    for options in (
        ConvertOptions(),
        ConvertOptions(quantization=Quantization.affine(32, 4)),
        ConvertOptions(layout="keep"),
    ):
        try:
            plan = make_plan(read_checkpoint(source), options)
        except requant.errors.RequantError:
            continue
        check(plan)


def test_a_plan_with_statistics_is_plain_data(dense: Path, tmp_path: Path) -> None:
    shapes = {
        x.layer: x.shape
        for x in make_plan(read_checkpoint(dense), ConvertOptions()).layers
        if len(x.shape) == 2
    }
    layers = {
        name: LayerStatistics(np.ones(shape[-1], np.float32), np.ones(1))
        for name, shape in shapes.items()
    }
    file = tmp_path / "statistics.safetensors"
    write_statistics(file, layers)
    options = ConvertOptions(layout="keep", search="fast", statistics=str(file))
    plan = make_plan(read_checkpoint(dense), options)
    assert any(step.importance for step in plan.steps)
    check(plan)


def test_a_plan_that_computes_tensors_is_plain_data_and_its_source_is_not(tmp_path: Path) -> None:
    """What mlx-lm's ``sanitize`` computes is named in the plan; the function is the source's."""
    published(tmp_path / "m", "deepseek_v3")
    plan, source = plan_with_source(
        read_checkpoint(tmp_path / "m"), ConvertOptions(layout="mlx-lm")
    )
    tensors = [t for step in plan.steps for t in step.inputs.values()]
    assert any(isinstance(tensor, ComputedTensor) for tensor in tensors)
    assert plan.intermediates
    check(plan)
    assert list(not_plain(source, "source")) != []


# -- every frozen dataclass of the package ---------------------------------------------------
def modules() -> list[str]:
    found = pkgutil.walk_packages([str(PACKAGE)], "requant.")
    return [x.name for x in found if not x.name.endswith(("__main__", "_native"))]


def frozen_dataclasses() -> list[type]:
    found = {
        value
        for name in modules()
        for value in vars(importlib.import_module(name)).values()
        if inspect.isclass(value)
        and value.__module__.startswith("requant")
        and dataclasses.is_dataclass(value)
        and value.__dataclass_params__.frozen  # type: ignore[attr-defined]
    }
    return sorted(found, key=lambda x: (x.__module__, x.__qualname__))


ALIVE = ("Thread", "Lock", "Event", "Condition", "Executor", "OrderedDict", "Counter", "Iterator")
"""Parts of the names of types whose objects change, or are used up."""


@pytest.mark.parametrize("kind", frozen_dataclasses(), ids=lambda x: f"{x.__module__}.{x.__name__}")
def test_a_frozen_dataclass_holds_nothing_that_changes(kind: Any) -> None:
    caches = [name for name, x in vars(kind).items() if isinstance(x, cached_property)]
    assert caches == []
    types = {field.name: str(field.type) for field in dataclasses.fields(kind)}
    assert {name: x for name, x in types.items() if any(word in x for word in ALIVE)} == {}
    assert {name: x for name, x in types.items() if x.startswith(("list[", "set[", "deque["))} == {}


CHANGING = frozenset(
    {"append", "extend", "insert", "pop", "popitem", "remove", "clear", "update", "setdefault"}
    | {"add", "discard", "sort"}
)


def changes_of_itself(kind: ast.ClassDef) -> Iterator[str]:
    """Statements of a class that change what ``self`` holds."""
    for node in ast.walk(kind):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets = [node.target]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            targets = [node.func.value] if node.func.attr in CHANGING else []
        for target in targets:
            holder = target.value if isinstance(target, ast.Subscript) else target
            if isinstance(holder, ast.Attribute) and ast.unparse(holder.value) == "self":
                yield f"line {node.lineno}: {ast.unparse(node)}"


def is_frozen(kind: ast.ClassDef) -> bool:
    return any(
        isinstance(x, ast.Call)
        and ast.unparse(x.func).endswith("dataclass")
        and any(k.arg == "frozen" and ast.unparse(k.value) == "True" for k in x.keywords)
        for x in kind.decorator_list
    )


def test_no_frozen_dataclass_changes_itself() -> None:
    for path in sorted(PACKAGE.rglob("*.py")):
        check_module(path)


def check_module(path: Path) -> None:
    """``object.__setattr__`` is for a value that ``__post_init__`` normalizes, nothing else."""
    tree = ast.parse(path.read_text())
    classes = [x for x in ast.walk(tree) if isinstance(x, ast.ClassDef)]
    changes = [x for kind in classes if is_frozen(kind) for x in changes_of_itself(kind)]
    assert changes == [], path
    starts = [
        x for x in ast.walk(tree) if isinstance(x, ast.FunctionDef) and x.name == "__post_init__"
    ]
    normalizing = {id(node) for start in starts for node in ast.walk(start)}
    bypasses = [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr == "__setattr__"
        and ast.unparse(node) == "object.__setattr__"
        and id(node) not in normalizing
    ]
    assert bypasses == [], path
