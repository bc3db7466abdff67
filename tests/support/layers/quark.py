"""Quantization blocks and packed words of Quark."""

from typing import Any

import numpy as np

ORDERS = {"order": range(8), "reorder": (0, 2, 4, 6, 1, 3, 5, 7)}


def block(dtype: Any, qscheme: str = "per_group", pack: str = "order", **more: Any) -> Any:
    weight = {"dtype": dtype, "qscheme": qscheme} if isinstance(dtype, str) else dtype
    return {
        "quant_method": "quark",
        "global_quant_config": {"weight": weight},
        "export": {"pack_method": pack},
    } | more


def pack_words(codes: np.ndarray, order: str) -> np.ndarray:
    """Eight codes of 4 bits a word along the last axis: nibble i holds code ORDERS[i]."""
    eights = codes.reshape(*codes.shape[:-1], -1, 8).astype(np.uint32) & 15
    shifts = 4 * np.arange(8, dtype=np.uint32)
    return (eights[..., list(ORDERS[order])] << shifts).sum(-1, dtype=np.uint32).view(np.int32)
