"""Evaluate models on a text: losses and next-token distributions of two models.

Needs mlx-lm. On a CPU, where MLX multiplies bfloat16 and packed codes slowly, the model is
evaluated in float32 from the exact values that its files represent; on a GPU as it is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import exp
from pathlib import Path
from typing import Any

import numpy as np

from requant.errors import BackendError, ParseError, UsageError
from requant.nn.blas_products import blas_products
from requant.text import format_value, one_line, pluralize, utf8_error

DEFAULT_TOKENS = 8192
DEFAULT_WINDOW = 256
_SAMPLES = 200  # of the windows, for the error of a percentile


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over windows of text with its standard error."""

    value: float
    error: float

    @staticmethod
    def of(windows: np.ndarray) -> Estimate:
        """The mean of one number for each window; windows count as independent."""
        spread = float(windows.std(ddof=1)) / len(windows) ** 0.5
        return Estimate(float(windows.mean()), spread)

    @staticmethod
    def of_percentile(tokens: np.ndarray, percent: float) -> Estimate:
        """A percentile of a number for each token, ``(windows, tokens)``.

        The error is the spread over samples of the windows, drawn with replacement.
        """
        draws = np.random.default_rng(0).integers(0, len(tokens), (_SAMPLES, len(tokens)))
        spread = np.std([np.percentile(tokens[drawn], percent) for drawn in draws])
        return Estimate(float(np.percentile(tokens, percent)), float(spread))

    def raised(self) -> Estimate:
        """The exponential: the perplexity of a loss, with its error to first order."""
        return Estimate(exp(self.value), exp(self.value) * self.error)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The evaluation of two models on one text.

    Attributes:
        tokens: Tokens of the text that were predicted.
        windows: Pieces that the text was cut into; each starts without context.
        loss_a: Mean next-token loss of A in nats.
        loss_b: The same of B.
        gap: B's loss minus A's, window by window.
        perplexity_a: ``e`` to A's loss.
        perplexity_b: The same of B.
        divergence: Mean Kullback-Leibler divergence of B's next-token distribution from A's,
            in nats: the sum over tokens of ``p_A * (log p_A - log p_B)``.
        divergence_median: The median of it over the predicted tokens.
        divergence_p99: The 99th percentile of it.
        same_top: Share of tokens for which both predict the same token as most likely.
    """

    tokens: int
    windows: int
    loss_a: Estimate
    loss_b: Estimate
    gap: Estimate
    perplexity_a: Estimate
    perplexity_b: Estimate
    divergence: Estimate
    divergence_median: Estimate
    divergence_p99: Estimate
    same_top: Estimate


def read_documents(path: Path) -> Iterator[str]:
    """The documents of a text file: the whole file, or one a line of a ``.jsonl``.

    A line of JSON is a string, or an object with the string ``text``.

    Raises:
        ParseError: A line is neither, or the file is not UTF-8.
    """
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ParseError(f"{path}: {utf8_error(error)}") from error
    if path.suffix != ".jsonl":
        yield text
        return
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ParseError(f"{path}: line {number} is not valid JSON: {error}") from error
        found = document.get("text") if isinstance(document, dict) else document
        if not isinstance(found, str):
            raise ParseError(
                f"{path}: line {number} is {format_value(document)}, expected a string "
                'or an object with a string "text"'
            )
        yield found


def read_tokens(path: Path, tokenizer: Any, most: int, window: int) -> np.ndarray:
    """Token ids of a text, cut into windows.

    Args:
        path: A text or ``.jsonl`` file.
        tokenizer: As ``mlx_lm.load`` gives it.
        most: Read no more tokens than this.
        window: Tokens of a window; what does not fill the last one is left out.

    Returns:
        ``(windows, window)``, int64.

    Raises:
        ParseError: The file is not such a text.
        UsageError: It is too short for two windows.
    """
    if window < 2 or most < 2 * window:
        raise UsageError(
            f"{most:,} tokens in windows of {window:,}: two windows of 2 are the least"
        )
    ids: list[int] = []
    for document in read_documents(path):
        ids += tokenizer.encode(document)
        if len(ids) >= most:
            break
    whole = min(len(ids), most) // window
    if whole < 2:
        raise UsageError(
            f"{path}: has {pluralize(len(ids), 'token')}; a standard error needs two windows of "
            f"{window:,}: take a longer text, or a lower --window"
        )
    return np.array(ids[: whole * window]).reshape(whole, window)


@contextmanager
def as_backend_errors() -> Iterator[None]:
    """Raise what MLX and the code of a library's class raise as BackendError."""
    try:
        yield
    except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError) as e:
        raise BackendError(f"MLX cannot run this model here: {one_line(e)}") from e


def losses(model: Any, ids: np.ndarray) -> np.ndarray:
    """Mean next-token loss of each window of ``ids``, in nats: ``(windows,)``."""
    return np.array([_loss(log_probabilities(model, row), row) for row in ids])


def evaluate(
    model_a: Any, model_b: Any, ids: np.ndarray, progress: Callable[[int, int], None] | None = None
) -> Evaluation:
    """Compare two models on windows of token ids.

    Args:
        model_a: The reference model.
        model_b: The other model, with the same vocabulary.
        ids: ``(windows, window)``, at least two of each.
        progress: Called with windows done and windows in all.

    Raises:
        UsageError: The models predict different numbers of tokens.
        BackendError: MLX cannot run one of them on this machine.
    """
    return evaluate_against(lambda n: log_probabilities(model_a, ids[n]), model_b, ids, progress)


def evaluate_against(
    reference: Callable[[int], Any],
    model_b: Any,
    ids: np.ndarray,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """The same with what the reference model predicts in place of itself.

    ``reference`` gives ``log_probabilities`` of A for the number of a window.

    Raises:
        UsageError, BackendError: As ``evaluate``.
    """
    import mlx.core as mx

    means = np.empty((len(ids), 3))
    divergences = np.empty((len(ids), ids.shape[1] - 1))
    for number, row in enumerate(ids):
        a, b = reference(number), log_probabilities(model_b, row)
        if a.shape != b.shape:
            raise UsageError(
                f"vocabularies differ: {a.shape[-1]:,} and {b.shape[-1]:,} tokens; "
                "compare --text is for two forms of one model"
            )
        divergences[number] = np.array((mx.exp(a) * (a - b)).sum(-1))
        same = float((a.argmax(-1) == b.argmax(-1)).astype(mx.float32).mean())
        means[number] = _loss(a, row), _loss(b, row), same
        if progress is not None:
            progress(number + 1, len(ids))
    loss_a, loss_b = Estimate.of(means[:, 0]), Estimate.of(means[:, 1])
    return Evaluation(
        tokens=ids.size - len(ids),
        windows=len(ids),
        loss_a=loss_a,
        loss_b=loss_b,
        gap=Estimate.of(means[:, 1] - means[:, 0]),
        perplexity_a=loss_a.raised(),
        perplexity_b=loss_b.raised(),
        divergence=Estimate.of(divergences.mean(1)),
        divergence_median=Estimate.of_percentile(divergences, 50),
        divergence_p99=Estimate.of_percentile(divergences, 99),
        same_top=Estimate.of(means[:, 2]),
    )


def log_probabilities(model: Any, row: np.ndarray) -> Any:
    """Float32 ``(window - 1, vocabulary)`` for the tokens after the first of a window.

    Raises:
        BackendError: MLX cannot run the model on this machine.
    """
    import mlx.core as mx

    with as_backend_errors(), blas_products():
        logits = model(mx.array(row[None, :-1]))[0].astype(mx.float32)
        result = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        mx.eval(result)
    return result


def _loss(log_probabilities: Any, row: np.ndarray) -> float:
    import mlx.core as mx

    picked = mx.take_along_axis(log_probabilities, mx.array(row[1:, None]), axis=-1)
    return -float(picked.mean())
