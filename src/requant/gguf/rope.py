"""``rope_scaling`` of config.json from a GGUF file: linear, YaRN, long factors, Llama 3.

The facts are those of llama.cpp (src/llama-model.cpp, llama-context.cpp, conversion/base.py) and
of transformers (modeling_rope_utils.py).
"""

from __future__ import annotations

from math import inf, isfinite, log, sqrt
from typing import Any

import numpy as np

from requant.gguf.settings import ADVICE, Settings
from requant.text import format_value, join_or

_TYPE = "rope.scaling.type"
_FACTOR = "rope.scaling.factor"
_OLD_FACTOR = "rope.scale_linear"
_ORIGINAL = "rope.scaling.original_context_length"
_ATTENTION = "rope.scaling.attn_factor"
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3_CONTEXT = 8192
_TOLERANCE = 1e-4


def rope_scaling(settings: Settings, model_type: str, rotary: int) -> dict[str, Any] | None:
    """The scaling of positions; None where there is none.

    ``rotary`` is the number of values of a head that are rotated.
    """
    kind = settings.word(_TYPE)
    name = "rope_freqs.weight"
    factors = settings.read_small(name) if settings.has(name) else None
    if factors is not None and kind in ("yarn", "longrope") and (factors != 1).any():
        message = f"holds factors next to the scaling {format_value(kind)}; {ADVICE}"
        settings.metadata.report("rope_freqs.weight", message)
    if factors is not None and kind in ("", "none", "linear"):
        found, where = _llama3(settings), "rope_freqs.weight"
    elif settings.has("rope_factors_long.weight") or kind == "longrope":
        found, where = _longrope(settings, model_type, rotary), "rope_factors_long.weight"
    elif kind in ("", "none", "linear"):
        found, where = _linear(settings, kind), settings.prefix + _factor_key(settings)
    elif kind == "yarn":
        found, where = _yarn(settings), settings.prefix + _TYPE
    else:
        settings.report(_TYPE, f"is {format_value(kind)}, known are none, linear, yarn, longrope")
        return None
    if found is None or found["type"] in settings.support.scalings:
        return found
    if found["type"] == "yarn" and found["factor"] == 1.0:
        return None
    kinds = sorted(settings.support.scalings)
    settings.metadata.report(
        where,
        f"is the setting {found['type']} of rope_scaling, but mlx-lm's class for {model_type} "
        f"knows {join_or(kinds) if kinds else 'none'} and would compute something else; {ADVICE}",
    )
    return None


def _factor_key(settings: Settings) -> str:
    """The key that says how far positions are stretched; old files have another."""
    is_old = settings.prefix + _FACTOR not in settings.metadata.values
    return _OLD_FACTOR if is_old else _FACTOR


def _linear(settings: Settings, kind: str) -> dict[str, Any] | None:
    factor = settings.find_float(_factor_key(settings))
    if kind == "none" or factor in (None, 0.0, 1.0):
        return None
    return {"rope_type": "linear", "type": "linear", "factor": factor}


def _mscale(factor: float, times: float = 1.0) -> float:
    """The factor by which YaRN multiplies queries and keys."""
    return 1.0 if factor <= 1 else 0.1 * times * log(factor) + 1.0


def _yarn(settings: Settings) -> dict[str, Any]:
    factor = settings.find_float(_factor_key(settings)) or 1.0
    original = settings.find_int(_ORIGINAL) or settings.need_int("context_length")
    found: dict[str, Any] = {
        "rope_type": "yarn",
        "type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
    }
    for key in ("beta_fast", "beta_slow"):
        value = settings.find_float(f"rope.scaling.yarn_{key}")
        if value is not None:
            found[key] = value
    extrapolation = settings.find_float("rope.scaling.yarn_ext_factor")
    if extrapolation is not None and extrapolation != 1.0 and extrapolation >= 0:
        message = f"is {extrapolation:g}, but config.json can only say 1; {ADVICE}"
        settings.report("rope.scaling.yarn_ext_factor", message)
    return found | _attention(settings, factor)


def _attention(settings: Settings, factor: float) -> dict[str, float]:
    """YaRN's factor for attention, in the terms of transformers and of mlx-lm.

    transformers takes ``attention_factor`` as it is; mlx-lm computes it from two others.
    """
    all_dim = settings.find_float("rope.scaling.yarn_log_multiplier") or 0.0
    stated = settings.find_float("rope.scaling.yarn_attn_factor")
    times = settings.find_float(_ATTENTION)
    usual = _mscale(factor)
    if stated is not None and all_dim:
        message = f"is {all_dim:g} next to rope.scaling.yarn_attn_factor, which says it otherwise"
        settings.report("rope.scaling.yarn_log_multiplier", f"{message}; {ADVICE}")
    if stated is None and times in (None, 1.0):
        return {"mscale": 1.0, "mscale_all_dim": all_dim} if all_dim else {}
    of_all_dim = _mscale(factor, all_dim)
    wanted = stated if stated is not None else usual / of_all_dim if of_all_dim else inf
    wanted = float(f"{wanted * (1.0 if times is None else times):.8g}")
    if abs(wanted - usual) <= _TOLERANCE * usual:
        return {"attention_factor": wanted}
    if factor <= 1 or not isfinite(wanted):
        key = _ATTENTION if stated is None else "rope.scaling.yarn_attn_factor"
        settings.report(
            key, f"has no place in config.json where YaRN's factor is {factor:g}; {ADVICE}"
        )
        return {}
    mscale = (wanted - 1) / (0.1 * log(factor))
    return {"attention_factor": wanted, "mscale": mscale, "mscale_all_dim": 0.0}


def _longrope(settings: Settings, model_type: str, rotary: int) -> dict[str, Any] | None:
    """Phi 3's factors, one for each pair of values of a head."""
    found: dict[str, Any] = {"type": "longrope", "rope_type": "longrope"}
    for end in ("long", "short"):
        name = f"rope_factors_{end}.weight"
        if not settings.has(name):
            settings.report(_TYPE, f"is longrope, but its factors, {name}, are missing; {ADVICE}")
            return None
        factors = settings.read_small(name).reshape(-1)
        if factors.size != rotary // 2:
            message = f"has {factors.size:,} values, expected {rotary // 2:,}: half of a head's"
            settings.metadata.report(name, message)
        found[f"{end}_factor"] = [float(str(x)) for x in factors]
    kind = settings.word(_TYPE)
    if kind not in ("", "longrope"):
        message = f"is {format_value(kind)}, but the file has the factors of longrope; {ADVICE}"
        settings.report(_TYPE, message)
    context = settings.need_int("context_length")
    original = settings.find_int(_ORIGINAL) or context
    usual = 1.0
    if context > original > 1:
        usual = sqrt(1 + log(context / original) / log(original))
    declared = settings.find_float(_ATTENTION)
    if abs((1.0 if declared is None else declared) - usual) > _TOLERANCE * usual:
        is_declared = "is missing, which means 1" if declared is None else f"is {declared:g}"
        message = f"{is_declared}, but longrope of {original:,} to {context:,} gives {usual:.4f}"
        settings.report(_ATTENTION, f"{message}; {ADVICE}")
    if model_type != "phi3":
        found["original_max_position_embeddings"] = original
        found["factor"] = context / original
    return found


def _llama3(settings: Settings) -> dict[str, Any] | None:
    """The setting that ``rope_freqs`` was computed from; it holds the factor of each frequency."""
    key = _factor_key(settings)
    factor = settings.find_float(key)
    if settings.word(_TYPE) != "none" and factor not in (None, 0.0, 1.0):
        message = f"is {factor:g}, and rope_freqs.weight has factors of its own; {ADVICE}"
        settings.report(key, message)
    stored = settings.read_small("rope_freqs.weight").reshape(-1).astype(np.float64)
    base = settings.find_float("rope.freq_base") or 10000.0
    if (stored == 1).all():
        return None
    factor = float(stored.max(initial=1.0))
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    waves = 2 * np.pi * base ** (np.arange(stored.size) / max(stored.size, 1))
    smooth = np.clip((_LLAMA3_CONTEXT / waves - low) / (high - low), 0, 1)
    if not np.allclose(stored, 1 / ((1 - smooth) / factor + smooth), rtol=1e-4):
        settings.metadata.report(
            "rope_freqs.weight",
            "holds factors that no setting of Llama 3 gives; --config-from takes the config "
            "of the original model",
        )
        return None
    return {
        "rope_type": "llama3",
        "type": "llama3",
        "factor": factor,
        **_LLAMA3,
        "original_max_position_embeddings": _LLAMA3_CONTEXT,
    }
