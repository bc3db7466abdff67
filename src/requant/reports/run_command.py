"""The command that generates text with an output, printed after a conversion."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from typing import Any

from requant.planning.plan import Plan

# Architectures without a head that predicts tokens: encoders, embedding and reward models.
_HEADLESS = (
    "Model",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForMaskedLM",
    "Encoder",
)
_GENERATES = ("LMHeadModel",)
_TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tiktoken.model",
)


def generates_text(config: Mapping[str, Any], files: Iterable[str]) -> bool:
    """Return whether a model predicts tokens and has a tokenizer among its ``files``."""
    files = {*files}
    named = config.get("architectures")
    names = [str(name) for name in named] if isinstance(named, list) else []
    if names and all(x.endswith(_HEADLESS) and not x.endswith(_GENERATES) for x in names):
        return False
    return "modules.json" not in files and not files.isdisjoint(_TOKENIZERS)


def command_of(plan: Plan, output: str) -> str:
    """The command that generates text with the folder ``output``; "" if there is none."""
    place = shlex.quote(f"./{output}" if output.startswith("-") else output)
    if plan.layout == "mlx-vlm" and plan.loads:
        return f'mlx_vlm.generate --model {place} --prompt "Hello"'
    if plan.layout not in ("mlx-lm", "keep") or not generates_text(plan.config, plan.side_files):
        return ""
    if plan.loads:
        return f'mlx_lm.generate --model {place} --prompt "Hello"'
    if plan.rotated and plan.layout == "mlx-lm" and not plan.load_error:
        return f'requant generate {place} --prompt "Hello"'
    return ""
