"""A folder converted by requant and by an MLX library's own convert, and how the two differ."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import mlx.core as mx
import mlx.nn as nn

import requant
from requant.checkpoints.checkpoint import ComputedTensor
from requant.libraries import Library, Request
from tests.support.class_models import quiet
from tests.support.mlx_reference import differences, load

CONFIG = "config.json"


@dataclass
class Compared:
    """What came of a conversion both ways.

    Attributes:
        library_error: Why the library does not convert the folder; "" where it does.
        requant_error: Why requant does not.
        different: Tensors and settings that are not the same.
        moved: Tensors that requant moves.
        computed: Tensors that it computes by the library's rule.
        tensors: Tensors of the output.
        load_error: Why the library does not load requant's output strictly.
        own_load_error: Why it does not load its own.
    """

    library_error: str = ""
    requant_error: str = ""
    different: list[str] = field(default_factory=list)
    moved: int = 0
    computed: int = 0
    tensors: int = 0
    load_error: str = ""
    own_load_error: str = ""


def convert_both_ways(
    library: Library,
    source: Path,
    work: Path,
    quantization: requant.Quantization | None,
    recipe: str | None = None,
) -> Compared:
    """Convert a folder both ways, compare every byte, and load the result.

    Args:
        library: The library.
        source: The folder.
        work: An empty folder for the outputs.
        quantization: The target; None for a dense output.
        recipe: One of the library's recipes.
    """
    result = Compared()
    theirs, ours = work / "theirs" / source.name, work / "ours" / source.name
    try:
        with quiet():
            library.convert(source, theirs, Request(quantization, recipe))
    except (Exception, SystemExit) as error:
        result.library_error = first_line(error)
    options: dict[str, Any] = {"layout": library.name}
    if quantization is None:
        options["dequantize"] = True
    elif recipe is not None:
        options |= {"recipe": recipe, "group_size": quantization.group_size}
    else:
        options["quantization"] = quantization
    try:
        plan = requant.plan(source, **options)
        requant.convert(source, ours, **options)
    except requant.RequantError as error:
        result.requant_error = first_line(error)
        return result
    inputs = {t.name: t for step in plan.steps for t in step.inputs.values()}
    result.computed = sum(isinstance(t, ComputedTensor) for t in inputs.values())
    result.moved = len(inputs) - result.computed
    if result.library_error:
        return result
    result.different = differences(load(ours), load(theirs))
    configs = [(folder / CONFIG).read_text() for folder in (ours, theirs)]
    result.different += setting_differences(*map(json.loads, configs))
    if not result.different and configs[0] != configs[1] + "\n":  # requant ends every line
        result.different.append("config: other text")
    result.tensors = len(load(ours))
    result.load_error = load_error(library, ours)
    if result.load_error:
        result.own_load_error = load_error(library, theirs)
    return result


def setting_differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Settings of config.json that differ."""
    keys = sorted(ours.keys() | theirs.keys())
    missing = object()
    return [f"config: {key}" for key in keys if ours.get(key, missing) != theirs.get(key, missing)]


class _LoadedError(BaseException):
    """The weights are in the model."""


def loaded(library: Library, folder: Path, only_weights: bool = False) -> nn.Module:
    """The model that a library's own loader makes of a folder, strictly.

    Args:
        library: The library.
        folder: The folder.
        only_weights: End when the weights are loaded, before a tokenizer is looked for.

    Raises:
        ValueError: A parameter gets no tensor, or a tensor has no parameter or another shape.
    """
    filled: list[nn.Module] = []
    load_weights = nn.Module.load_weights

    def strictly(model: nn.Module, weights: Any, strict: bool = True) -> Any:
        given = dict(mx.load(weights) if isinstance(weights, str) else weights)
        load_weights(model, list(given.items()), not filled or strict)
        filled.append(model)
        if only_weights:
            raise _LoadedError
        return model

    config = json.loads((folder / CONFIG).read_text())
    with quiet(), mock.patch.object(nn.Module, "load_weights", strictly):
        try:
            if library.name == "mlx-audio":
                assert library.folder is not None
                domain = library.arguments(library.folder, config)["model_domain"]
                utils = importlib.import_module(f"{library.package}.{domain}.utils")
                utils.load_model(folder, strict=True)
            else:
                utils = importlib.import_module(f"{library.package}.utils")
                named = {"path_to_repo": str(folder)} if library.name == "mlx-embeddings" else {}
                utils.load_model(folder, **named)
        except _LoadedError:
            pass
        mx.eval(filled[0].parameters())
    return filled[0]


def load_error(library: Library, folder: Path) -> str:
    """Why a library does not load a folder strictly; "" where it does."""
    try:
        loaded(library, folder, only_weights=True)
    except (Exception, SystemExit) as error:
        return first_line(error)
    return ""


def first_line(error: BaseException) -> str:
    """The text of an error on one line, without paths."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:200]
