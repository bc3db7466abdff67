"""Evaluate models on a text: losses and next-token distributions of two models.

Needs mlx-lm. On a CPU, where MLX multiplies bfloat16 and packed codes slowly, the model is
evaluated in float32 from the exact values that its files represent; on a GPU as it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import exp
from pathlib import Path
from typing import Any

import numpy as np

from requant.errors import BackendError, UsageError
from requant.mlx_lm.documents import read_documents
from requant.nn.blas_products import blas_products
from requant.text import one_line, pluralize

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
    def of_percentile(windows: Sequence[np.ndarray], percent: float) -> Estimate:
        """A percentile of a number for each token, ``(tokens,)`` a window.

        The error is the spread over samples of the windows, drawn with replacement.
        """
        draws = np.random.default_rng(0).integers(0, len(windows), (_SAMPLES, len(windows)))
        samples = (np.concatenate([windows[number] for number in drawn]) for drawn in draws)
        spread = np.std([np.percentile(sample, percent) for sample in samples])
        return Estimate(float(np.percentile(np.concatenate(windows), percent)), float(spread))

    def raised(self) -> Estimate:
        """The exponential: the perplexity of a loss, with its error to first order."""
        return Estimate(exp(self.value), exp(self.value) * self.error)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt about images, as a processor gives it.

    Attributes:
        ids: Token ids, int64 ``(tokens,)``, with placeholders for the images.
        inputs: The processor's other arrays: pixels, mask, grids.
        is_text: ``(tokens,)``: whether a token is not a placeholder.
    """

    ids: np.ndarray
    inputs: Mapping[str, Any]
    is_text: np.ndarray

    @property
    def digest(self) -> bytes:
        """Hash of all of its arrays."""
        sha = hashlib.sha256(self.ids.tobytes())
        for name, x in sorted(self.inputs.items()):
            sha.update(f"{name} {getattr(x, 'dtype', '')} {getattr(x, 'shape', '')}".encode())
            sha.update(memoryview(x) if hasattr(x, "dtype") else repr(x).encode())
        return sha.digest()


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The evaluation of two models on one text.

    Attributes:
        tokens: Tokens of the text that were predicted; places of images do not count.
        windows: Pieces that the text was cut into, and prompts about images; each starts without
            context.
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
    return np.array([_loss(log_probabilities(model, row), row[1:]) for row in ids])


def evaluate(
    model_a: Any,
    model_b: Any,
    windows: Sequence[np.ndarray | Prompt],
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Compare two models on windows of token ids, and on prompts about images.

    Args:
        model_a: The reference model.
        model_b: The other model, with the same vocabulary.
        windows: At least two: token ids ``(window,)``, at least two each, or prompts; the models
            take the ``inputs`` of a prompt after its ids.
        progress: Called with windows done and windows in all.

    Raises:
        UsageError: The models predict different numbers of tokens.
        BackendError: MLX cannot run one of them on this machine.
    """
    return evaluate_against(
        lambda n: log_probabilities(model_a, windows[n]), model_b, windows, progress
    )


def evaluate_against(
    reference: Callable[[int], Any],
    model_b: Any,
    windows: Sequence[np.ndarray | Prompt],
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """The same with what the reference model predicts in place of itself.

    ``reference`` gives ``log_probabilities`` of A for the number of a window.

    Raises:
        UsageError, BackendError: As ``evaluate``.
    """
    import mlx.core as mx

    means = np.empty((len(windows), 3))
    divergences: list[np.ndarray] = []
    for number, window in enumerate(windows):
        a, b = reference(number), log_probabilities(model_b, window)
        if a.shape != b.shape:
            raise UsageError(
                f"vocabularies differ: {a.shape[-1]:,} and {b.shape[-1]:,} tokens; "
                "compare --text is for two forms of one model"
            )
        following = _following(window)
        divergences.append(np.array((mx.exp(a) * (a - b)).sum(-1)))
        same = float((a.argmax(-1) == b.argmax(-1)).astype(mx.float32).mean())
        means[number] = _loss(a, following), _loss(b, following), same
        if progress is not None:
            progress(number + 1, len(windows))
    loss_a, loss_b = Estimate.of(means[:, 0]), Estimate.of(means[:, 1])
    return Evaluation(
        tokens=sum(map(len, divergences)),
        windows=len(windows),
        loss_a=loss_a,
        loss_b=loss_b,
        gap=Estimate.of(means[:, 1] - means[:, 0]),
        perplexity_a=loss_a.raised(),
        perplexity_b=loss_b.raised(),
        divergence=Estimate.of(np.array([x.mean() for x in divergences])),
        divergence_median=Estimate.of_percentile(divergences, 50),
        divergence_p99=Estimate.of_percentile(divergences, 99),
        same_top=Estimate.of(means[:, 2]),
    )


def _following(window: np.ndarray | Prompt) -> np.ndarray:
    """The tokens that are predicted: all after the first that are not places of images."""
    return window.ids[1:][window.is_text[1:]] if isinstance(window, Prompt) else window[1:]


def log_probabilities(model: Any, window: np.ndarray | Prompt) -> Any:
    """Float32 ``(tokens, vocabulary)`` for the tokens of a window that are predicted.

    Raises:
        BackendError: MLX cannot run the model on this machine.
    """
    import mlx.core as mx

    with as_backend_errors(), blas_products():
        if isinstance(window, Prompt):
            logits = model(mx.array(window.ids[None]), window.inputs)[0, :-1]
            logits = logits[mx.array(np.flatnonzero(window.is_text[1:]))]
        else:
            logits = model(mx.array(window[None, :-1]))[0]
        logits = logits.astype(mx.float32)
        result = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        mx.eval(result)
    return result


def _loss(log_probabilities: Any, following: np.ndarray) -> float:
    import mlx.core as mx

    picked = mx.take_along_axis(log_probabilities, mx.array(following[:, None]), axis=-1)
    return -float(picked.mean())
