"""``--quality`` and ``--calibrate``: which search, statistics and compensation they stand for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from requant.errors import UsageError
from requant.quantization.config import Quantization, QuantMode


@dataclass(frozen=True, slots=True)
class Quality:
    """What a quality stands for."""

    search: str  # level of the scale search
    calibrates: bool  # statistics of the inputs are collected, unless a file of them is given
    gptq: bool  # errors are propagated, in the layers with affine targets


# "fast" is what was best of all that takes no data (benchmarks/quality.md).
QUALITIES: Mapping[str, Quality] = {
    "fast": Quality(search="best", calibrates=False, gptq=False),
    "balanced": Quality(search="best", calibrates=True, gptq=False),
    "best": Quality(search="best", calibrates=True, gptq=True),
}


def with_quality(values: Mapping[str, Any]) -> dict[str, Any]:
    """Options with what their quality stands for: ``search``, ``calibrate`` and ``gptq``.

    Args:
        values: Options by name, of which the target is known. A quality of the recipe holds where
            the options name none.

    Raises:
        UsageError: Options contradict each other.
    """
    recipe, texts = values.get("recipe"), values.get("calibrate")
    named = values.get("quality") or (recipe.quality if recipe is not None else None) or None
    if named is None and texts is None:
        return dict(values)
    quality = QUALITIES[named or "best"]
    _check(values, named, quality)
    target: Quantization | None = values.get("quantization")
    is_affine = target is None or target.mode is QuantMode.AFFINE
    statistics = values.get("statistics")
    if quality.calibrates and statistics is None and texts is None:
        texts = ()
    search = values.get("search", "off")
    return {
        **values,
        "quality": named,
        "search": quality.search if search == "off" else search,
        "calibrate": texts,
        "gptq": values.get("gptq", False) or (quality.gptq and is_affine),
    }


def _check(values: Mapping[str, Any], named: str | None, quality: Quality) -> None:
    given = f"--quality {named}" if named is not None else "--calibrate"
    if values.get("dequantize"):
        raise UsageError(f"choose one: --dequantize or {given}")
    if values.get("calibrate") is None:
        return
    if not quality.calibrates:
        raise UsageError(f"--quality {named} takes no text: leave --calibrate out")
    if values.get("statistics") is not None:
        raise UsageError("choose one: --calibrate collects statistics, --imatrix reads them")
