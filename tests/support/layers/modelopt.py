"""Quantization blocks of ModelOpt."""

from typing import Any


def block(algorithm: str | None, **more: Any) -> dict[str, Any]:
    return {"quant_method": "modelopt", "quant_algo": algorithm} | more
