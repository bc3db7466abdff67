"""``generation_config.json`` from a GGUF file's metadata: tokens that end a text, and sampling."""

from __future__ import annotations

from typing import Any

from requant.gguf.metadata import Metadata
from requant.gguf.special_tokens import special_ids

_SAMPLING = {  # ``general.sampling.*`` -> the name in generation_config.json
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}
_WHOLE = ("top_k",)


def generation_config(metadata: Metadata) -> dict[str, Any]:
    """What the file says about generation; empty where it says nothing."""
    found: dict[str, Any] = special_ids(metadata)
    sampling: dict[str, Any] = {}
    for key, name in _SAMPLING.items():
        full = f"general.sampling.{key}"
        value = metadata.find_int(full) if key in _WHOLE else metadata.find_float(full)
        if value is not None:
            sampling[name] = value
    if sampling:
        found |= {"do_sample": sampling.get("temperature") != 0.0, **sampling}
    suppressed = metadata.numbers("tokenizer.ggml.suppress_tokens")
    if suppressed is not None and suppressed.size:
        found["suppress_tokens"] = [int(x) for x in suppressed]
    return found
