"""What runs an output: the command that is printed after a conversion, and on a model card."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from typing import Any

from requant.planning.plan import Plan

# Architectures without a head that predicts tokens: encoders, embedding and reward models.
_SILENT = ("Model", "ForSequenceClassification", "ForTokenClassification", "ForMaskedLM", "Encoder")
_NOT_SILENT = ("LMHeadModel",)
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
    """Whether a model predicts tokens, and has a tokenizer to generate text with.

    Args:
        config: Its config.json.
        files: The files next to its weights.
    """
    files = {*files}
    named = config.get("architectures")
    names = [str(name) for name in named] if isinstance(named, list) else []
    silent = [x for x in names if x.endswith(_SILENT) and not x.endswith(_NOT_SILENT)]
    if names and len(silent) == len(names):
        return False
    return "modules.json" not in files and not files.isdisjoint(_TOKENIZERS)


def command_of(plan: Plan, output: str) -> str:
    """The command that lets an output generate text; "" where none is known to.

    Args:
        plan: What was written.
        output: Its folder, as the user named it.
    """
    if not generates_text(plan.config, plan.side_files):
        return ""
    place = shlex.quote(f"./{output}" if output.startswith("-") else output)
    if plan.loads:
        return f'mlx_lm.generate --model {place} --prompt "Hello"'
    if plan.rotated and plan.layout == "mlx-lm" and not plan.load_error:
        return f'requant generate {place} --prompt "Hello"'
    return ""
