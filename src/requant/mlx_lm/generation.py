"""Generate text with a loaded model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from requant.errors import BackendError, UsageError
from requant.mlx_lm.loading import Loaded
from requant.reports.report import Report


@dataclass(frozen=True, slots=True)
class Generation:
    """A generated text and the speed of its generation.

    Attributes:
        text: The continuation.
        prompt_tokens: Tokens of the prompt, including those of the chat template.
        prompt_tokens_per_s: Tokens of the prompt processed per second.
        tokens: Generated tokens.
        tokens_per_s: Tokens generated per second.
        finish_reason: "stop" if the model ended the text, "length" at ``max_tokens``.
        load_s: Seconds for conversion and loading.
        report: The report of the conversion.
    """

    text: str
    prompt_tokens: int
    prompt_tokens_per_s: float
    tokens: int
    tokens_per_s: float
    finish_reason: str
    load_s: float
    report: Report

    def to_dict(self) -> dict[str, Any]:
        """The generation as JSON data."""
        return {
            "source": self.report.plan.source,
            "bits_per_weight": self.report.bits_per_weight,
            "text": self.text,
            "prompt_tokens": self.prompt_tokens,
            "prompt_tokens_per_s": self.prompt_tokens_per_s,
            "tokens": self.tokens,
            "tokens_per_s": self.tokens_per_s,
            "finish_reason": self.finish_reason,
            "load_s": self.load_s,
            "notes": [note.text for note in self.report.plan.notes],
        }


def generate(
    loaded: Loaded,
    prompt: str,
    *,
    max_tokens: int = 100,
    raw: bool = False,
    on_text: Callable[[str], None] | None = None,
) -> Generation:
    """Continue a prompt with the most likely token at each step.

    Args:
        loaded: The model.
        prompt: The prompt, put into the chat template if the tokenizer has one.
        max_tokens: Most tokens to generate.
        raw: Do not use the chat template.
        on_text: Called with each piece of text when it is generated.

    Raises:
        UsageError: An empty prompt without a template.
        BackendError: MLX cannot run the model on this machine.
    """
    from mlx_lm import stream_generate

    tokens = _tokens(loaded.tokenizer, prompt, raw)
    responses = stream_generate(loaded.model, loaded.tokenizer, tokens, max_tokens=max_tokens)
    return collect_text(responses, loaded, on_text)


def collect_text(
    responses: Iterable[Any], loaded: Any, on_text: Callable[[str], None] | None
) -> Generation:
    """Join the pieces of text that a library's ``stream_generate`` yields.

    Args:
        responses: What it yields.
        loaded: The model, with ``load_s`` and ``report``.
        on_text: Called with each piece.

    Raises:
        BackendError: MLX cannot run the model on this machine.
    """
    pieces: list[str] = []
    last: Any = None
    try:
        for last in responses:
            pieces.append(last.text)
            if on_text is not None:
                on_text(last.text)
    except (RuntimeError, ValueError) as error:
        raise BackendError(f"MLX cannot run this model here: {error}") from error
    return Generation(
        text="".join(pieces),
        prompt_tokens=last.prompt_tokens,
        prompt_tokens_per_s=last.prompt_tps,
        tokens=last.generation_tokens,
        tokens_per_s=last.generation_tps,
        finish_reason=last.finish_reason,
        load_s=loaded.load_s,
        report=loaded.report,
    )


def _tokens(tokenizer: Any, prompt: str, raw: bool) -> list[int]:
    if not raw and tokenizer.has_chat_template:
        messages = [{"role": "user", "content": prompt}]
        encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    else:
        encoded = tokenizer.encode(prompt)
    tokens = [int(token) for token in encoded]
    if not tokens:
        raise UsageError("the prompt holds no token to continue")
    return tokens
