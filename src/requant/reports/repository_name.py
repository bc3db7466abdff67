"""The name under which a conversion is published: ``NAME-4bit``, ``-bf16``, ``-mxfp4``, ..."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path, PurePath
from typing import Any

from requant.checkpoints.folder_files import is_repository_id
from requant.planning.plan import LayerPlan, Treatment
from requant.quantization.size_budget import parse_budget
from requant.reports.record_summary import LayerSummary

_DTYPES = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}
_DENSE = (Treatment.DENSE, Treatment.DEQUANTIZED)

# What names of sources end in to say how they are quantized; details only after such a word.
_DETAIL = r"(?:[-_.](?:dynamic|static|block|kv|sym|asym|mixed|gs?\d+|\d+g))*"
_SUFFIXES = re.compile(
    r"(?<=[^-_.])(?:[-_.]+(?:"
    r"\d+(?:\.\d+)?-?bits?|b?fp?16|fp?32|(?:b?float)(?:16|32)|(?:mx|nv)?fp[48](?:a16)?|int[2348]"
    r"|w\d+a\d+|(?:ud-)?i?q\d(?:_[0-9k])?(?:_[a-z]+)?|mixed[-_]\d[-_]\d(?:-?bit)?"
    r"|awq|gptq|hqq|(?:unsloth-)?bnb|(?:i1-)?gguf|mlx|auto-?round|(?:un)?quantized|dwq(?:-\d+)?"
    rf"){_DETAIL})+$",
    re.IGNORECASE,
)
_PART = re.compile(r"-\d{5,6}-of-\d{5,6}")


def source_name(source: str | os.PathLike[str]) -> str:
    """The name of a source: of its repository, its folder or its GGUF file.

    Args:
        source: ``org/name``, ``org/name:Q4_K_M`` or a path; a folder of the hub's cache has the
            name of its repository.

    Example:
        >>> source_name("org/Llama-3.2-1B-GGUF:Q4_K_M"), source_name("models/Llama-3.2-1B/")
        ('Llama-3.2-1B-GGUF', 'Llama-3.2-1B')
    """
    text = os.fspath(source)
    if is_repository_id(text):
        return text.partition(":")[0].rpartition("/")[2]
    path = Path(os.path.abspath(text))  # noqa: PTH100  # links keep their names
    if path.suffix == ".gguf":
        return _PART.sub("", path.stem)
    cached = path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--")
    return path.parent.parent.name.rpartition("--")[2] if cached else path.name


def repository_name(
    source: str,
    config: Mapping[str, Any],
    layers: Iterable[LayerPlan | LayerSummary],
    recipe: str | None = None,
    budget: str | None = None,
) -> str:
    """The name of a conversion's repository, without its namespace.

    What the source's name says of its own quantization is replaced. The suffix is

    * with a budget, its bits per weight: ``-4.5bit``;
    * with a recipe, the recipe's name: ``-mixed_3_6``;
    * else what most weights have: ``-4bit`` (affine), ``-mxfp4``, ``-mxfp8``, ``-nvfp4``, and if
      no layer is quantized ``-bf16``, ``-fp16`` or ``-fp32``.

    Args:
        source: The source's name.
        config: The ``config.json`` of the output.
        layers: The layers of its plan or record.
        recipe: Name or path of the recipe.
        budget: The budget as it was given.

    Returns:
        The name; characters that a repository cannot have are dashes. Empty if none are left.

    Example:
        >>> repository_name("Qwen3-8B-AWQ", {}, [], recipe="mixed_3_6")
        'Qwen3-8B-mixed_3_6'
    """
    layers = list(layers)
    name = f"{_SUFFIXES.sub('', source)}-{_suffix(config, layers, recipe, budget)}"
    name = re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII)
    return re.sub(r"\.{2,}", ".", re.sub(r"-{2,}", "-", name)).strip("-.")


def _suffix(
    config: Mapping[str, Any],
    layers: list[LayerPlan | LayerSummary],
    recipe: str | None,
    budget: str | None,
) -> str:
    parameters = [prod(layer.shape) for layer in layers]
    if budget is not None:
        total = max(sum(parameters), 1)
        bits = f"{8 * parse_budget(budget).limit(total) / total:.2f}".removesuffix("0")
        return f"{bits}bit"
    if recipe is not None:
        return PurePath(recipe).name.removesuffix(".toml")
    quantized, dense = Counter[str](), Counter[str]()
    default = config.get("quantization")
    block: dict[str, Any] = default if isinstance(default, dict) else {}
    for layer, size in zip(layers, parameters, strict=True):
        if layer.treatment in _DENSE:
            dense[_DTYPES.get(layer.target, "")] += size
            continue
        own = block.get(layer.layer)
        entry = own if isinstance(own, dict) else block
        mode = entry.get("mode", "affine")
        quantized[f"{entry.get('bits')}bit" if mode == "affine" else str(mode)] += size
    del dense[""]
    return (quantized or dense or Counter({"mlx": 1})).most_common(1)[0][0]
