"""The metadata of a GGUF file from ``config.json``, the inverse of ``model_config``.

What is written is read back by ``model_config``: a config that does not come back as it was has a
setting that the file cannot say, and is a problem. The facts are those of llama.cpp's converter
(ggml-org/llama.cpp convert_hf_to_gguf.py, conversion/).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import isclose, log, pi, sqrt
from typing import Any, Final

import numpy as np

from requant.errors import Problem
from requant.gguf.architectures import Architecture
from requant.gguf.metadata import Metadata
from requant.gguf.model_config import make_config
from requant.gguf.settings import Settings
from requant.gguf.writer import Value
from requant.text import format_value

Config = Mapping[str, Any]

# Key below the architecture's prefix -> the settings that say it; the first that is there counts.
_INTEGERS: Final = {
    "context_length": ("max_position_embeddings",),
    "embedding_length": ("hidden_size",),
    "block_count": ("num_hidden_layers",),
    "feed_forward_length": ("intermediate_size",),
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads", "num_attention_heads"),
    "vocab_size": ("vocab_size",),
}
_FLOATS: Final = {"attention.layer_norm_rms_epsilon": ("rms_norm_eps",)}
_EXPERTS: Final = {
    "expert_count": ("num_experts", "num_local_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_feed_forward_length": ("moe_intermediate_size", "intermediate_size"),
}
_WINDOW: Final = {"attention.sliding_window": ("sliding_window",)}
_SOFT_CAPS: Final = {
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
}
_GRANITE: Final = {
    "attention.scale": ("attention_multiplier",),
    "embedding_scale": ("embedding_multiplier",),
    "residual_scale": ("residual_multiplier",),
    "logit_scale": ("logits_scaling",),
}


@dataclass(frozen=True, slots=True)
class _Own:
    """What a family has next to the settings of all."""

    integers: Mapping[str, tuple[str, ...]] | None = None
    floats: Mapping[str, tuple[str, ...]] | None = None


_FAMILIES: Final = {  # model_type of a family -> its own settings; others are not written
    **dict.fromkeys(("llama", "qwen2", "qwen3", "gemma", "smollm3", "seed_oss", "olmo2"), _Own()),
    "mixtral": _Own({key: _EXPERTS[key] for key in ("expert_count", "expert_used_count")}),
    "qwen3_moe": _Own(_EXPERTS),
    "qwen2_moe": _Own(
        _EXPERTS | {"expert_shared_feed_forward_length": ("shared_expert_intermediate_size",)}
    ),
    "gemma2": _Own(_WINDOW, _SOFT_CAPS),
    "gemma3_text": _Own(_WINDOW),
    "phi3": _Own(_WINDOW),
    "gpt_oss": _Own(
        _WINDOW
        | {key: _EXPERTS[key] for key in ("expert_count", "expert_used_count")}
        | {"expert_feed_forward_length": ("intermediate_size",)}
    ),
    "granite": _Own(None, _GRANITE),
    "olmo3": _Own(_WINDOW),
}
WRITTEN: Final = tuple(sorted({*_FAMILIES, "mistral"}))
"""Values of ``model_type`` of which files are written."""

# Settings that a file does not say and that change nothing, or that are compared apart.
_NOT_COMPARED: Final = frozenset(
    {
        *("architectures", "model_type", "hidden_act", "hidden_activation", "rope_scaling"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "rope_theta", "intermediate_size"),
        *("rope_parameters", "original_max_position_embeddings"),
    }
)
# Settings that switch something on which no family of a file knows: the values that mean off.
_OFF: Final[Mapping[str, tuple[Any, ...]]] = {
    "use_sliding_window": (False,),
    "clip_qkv": (),
}
_LLAMA3_CONTEXT: Final = 8192


@dataclass(frozen=True, slots=True)
class Described:
    """The metadata of a model, and the tensors that are settings."""

    values: Mapping[str, Value]
    factors: Mapping[str, tuple[float, ...]]  # name -> float32 numbers


def rope_of(config: Config) -> dict[str, Any]:
    """The scaling of positions with ``rope_theta``, from either way in which configs have it."""
    found = dict(config.get("rope_scaling") or {})
    parameters = config.get("rope_parameters")
    if isinstance(parameters, Mapping):
        found = {**parameters, **found}
    kind = found.get("rope_type", found.get("type", "default"))
    theta = config.get("rope_theta", found.get("rope_theta", 10000.0))
    return {**found, "rope_type": kind, "rope_theta": theta}


def describe(
    config: Config, architecture: str, family: Architecture, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[Described, list[Problem]]:
    """The metadata of a config, and what of it a file cannot say.

    Args:
        config: ``config.json``.
        architecture: ``general.architecture``.
        family: Its names.
        shapes: Name in the file -> shape.
    """
    problems: list[Problem] = []
    values: dict[str, Value] = {}
    own = _FAMILIES[family.model_type]
    for table, kind in (
        (_INTEGERS, int),
        (own.integers, int),
        (_FLOATS, float),
        (own.floats, float),
    ):
        for key, names in (table or {}).items():
            found = next((config[x] for x in names if config.get(x) is not None), None)
            if isinstance(found, (int, float)) and not isinstance(found, bool):
                values[f"{architecture}.{key}"] = kind(found)
    heads = config.get("num_attention_heads") or 1
    width = config.get("head_dim") or int(config.get("hidden_size", 0)) // heads
    rotary = int(width * float(config.get("partial_rotary_factor") or 1.0))
    values |= {f"{architecture}.attention.{x}_length": width for x in ("key", "value")}
    values[f"{architecture}.rope.dimension_count"] = rotary
    if family.model_type == "olmo3" and isinstance(kinds := config.get("layer_types"), list):
        sliding = np.array([kind == "sliding_attention" for kind in kinds])
        values[f"{architecture}.attention.sliding_window_pattern"] = sliding
    rope, factors = _rope(config, rotary, problems)
    values |= {f"{architecture}.rope.{key}": value for key, value in rope.items()}
    if family.model_type == "gemma3_text" and (local := config.get("rope_local_base_freq")):
        values[f"{architecture}.rope.freq_base_swa"] = float(local)
    if family.model_type == "phi3" and (original := config.get("original_max_position_embeddings")):
        values[f"{architecture}.rope.scaling.original_context_length"] = int(original)
    described = Described({"general.architecture": architecture, **values}, factors)
    problems += _off_problems(config, has_windows=_WINDOW.items() <= (own.integers or {}).items())
    problems += _read_back(config, described, family, shapes)
    return described, problems


def _rope(
    config: Config, rotary: int, problems: list[Problem]
) -> tuple[dict[str, Value], dict[str, tuple[float, ...]]]:
    """Keys below ``rope.``, and the tensors of factors."""
    rope, factors = rope_of(config), {}
    values: dict[str, Value] = {"freq_base": float(rope["rope_theta"])}
    kind, factor = rope["rope_type"], rope.get("factor")
    context = int(config.get("max_position_embeddings") or 0)
    original = rope.get("original_max_position_embeddings") or config.get(
        "original_max_position_embeddings"
    )
    if kind == "linear" and factor is not None:
        values |= {"scaling.type": "linear", "scaling.factor": float(factor)}
    elif kind == "llama3":
        factors["rope_freqs.weight"] = _llama3(rope, rotary)
    elif kind == "yarn":
        values |= _yarn(rope, int(original or context))
    elif kind in ("longrope", "su"):
        for end in ("long", "short"):
            factors[f"rope_factors_{end}.weight"] = tuple(rope.get(f"{end}_factor", ()))
        start = int(original or context)
        attention = 1.0
        if context > start > 1:
            attention = sqrt(1 + log(context / start) / log(start))
        values |= {"scaling.original_context_length": start, "scaling.attn_factor": attention}
    elif kind not in ("default", "mrope", None):
        message = f"is {format_value(kind)}; GGUF files say linear, llama3, longrope and yarn"
        problems.append(Problem("config.json: rope_scaling", message))
    return values, factors


def _yarn(rope: Config, original: int) -> dict[str, Value]:
    values: dict[str, Value] = {
        "scaling.type": "yarn",
        "scaling.factor": float(rope.get("factor") or 1.0),
        "scaling.original_context_length": original,
    }
    for key in ("beta_fast", "beta_slow"):
        if rope.get(key) is not None:
            values[f"scaling.yarn_{key}"] = float(rope[key])
    if rope.get("attention_factor") is not None:
        values["scaling.yarn_attn_factor"] = float(rope["attention_factor"])
    elif rope.get("mscale_all_dim"):
        values["scaling.yarn_log_multiplier"] = float(rope["mscale_all_dim"])
    return values


def _llama3(rope: Config, rotary: int) -> tuple[float, ...]:
    """Divisors of the frequencies: 1 for short waves, ``factor`` for long ones, between them both.

    They depend on ``original_max_position_embeddings``, as transformers computes them.
    """
    factor = float(rope.get("factor", 8.0))
    low, high = float(rope.get("low_freq_factor", 1.0)), float(rope.get("high_freq_factor", 4.0))
    original = float(rope.get("original_max_position_embeddings", _LLAMA3_CONTEXT))
    half = rotary // 2
    waves = 2 * pi * float(rope["rope_theta"]) ** (np.arange(half) / half)
    smooth = np.clip((original / waves - low) / (high - low), 0, 1)
    return tuple((1 / ((1 - smooth) / factor + smooth)).tolist())


def _off_problems(config: Config, *, has_windows: bool) -> Iterator[Problem]:
    """Settings that would be lost."""
    for key, off in _OFF.items():
        if config.get(key) not in (*off, None):
            message = (
                f"is {format_value(config[key])}, for which GGUF files of this model have no key"
            )
            yield Problem(f"config.json: {key}", message)
    kinds, window = config.get("layer_types") or (), config.get("sliding_window")
    is_mistral = config.get("model_type") == "mistral" and window
    if not has_windows and ("sliding_attention" in kinds or is_mistral):
        found = format_value(window)
        message = f"is {found}, and llama.cpp lets every block of this model see the whole text"
        yield Problem("config.json: sliding_window", message)
    rope = config.get("rope_parameters") or {}
    if any(isinstance(part, Mapping) for part in rope.values()) and not config.get("rope_theta"):
        message = "has settings for each kind of block, of which only rope_theta at the top is read"
        yield Problem("config.json: rope_parameters", message)


def _read_back(
    config: Config,
    described: Described,
    family: Architecture,
    shapes: Mapping[str, tuple[int, ...]],
) -> Iterator[Problem]:
    """The settings that the reader of files makes something else of."""
    metadata = Metadata("metadata", described.values)
    factors = {name: np.array(x, np.float32) for name, x in described.factors.items()}
    known = {**shapes, **{name: x.shape for name, x in factors.items()}}
    settings = Settings(metadata, known, factors.__getitem__, family.support)
    found = make_config(settings, family.model_type, family.cls, family.configure)
    for problem in metadata.problems:
        yield Problem(f"config.json, as {problem.where}", problem.message)
    for key, value in found.items():
        given = config.get(key)
        if given is not None and key not in _NOT_COMPARED and not _equal(given, value):
            meant = format_value(value)
            message = f"is {format_value(given)}, where files of this architecture mean {meant}"
            yield Problem(f"config.json: {key}", message)
    before, after = rope_of(config), rope_of(found)
    kinds = {"default": "default", "mrope": "default", "su": "longrope"}
    given, written = (kinds.get(x["rope_type"], x["rope_type"]) for x in (before, after))
    same = given == written and all(
        _equal(before[key], after[key])
        for key in ("rope_theta", "factor", "original_max_position_embeddings")
        if before.get(key) is not None and after.get(key) is not None
    )
    if not same and not metadata.problems:
        message = f"is {format_value(before)}, where the file would mean {format_value(after)}"
        yield Problem("config.json: rope_scaling", message)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return isclose(a, b, rel_tol=1e-6)
    return bool(a == b)
