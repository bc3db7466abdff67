"""``compare_outputs``: hold several outputs against one dense model on a text, in one run.

The dense model runs once, block by block; its hidden states are on the disk, and may be kept for
further runs. Then one output after the other is in memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from requant.calibration.predictions import DensePredictions
from requant.calibration.text_model import load_as_stored, plan_text_model
from requant.core.types import Source
from requant.errors import UsageError, error_action
from requant.mlx_lm import load_tokenizer
from requant.mlx_lm.evaluation import (
    DEFAULT_TOKENS,
    DEFAULT_WINDOW,
    Evaluation,
    evaluate_against,
    read_tokens,
)
from requant.nn.blas_products import product_threads
from requant.planning.planner import make_plan
from requant.quantization.options import ConvertOptions
from requant.sources.hub_repository import find_repository
from requant.sources.open import read_checkpoint


@dataclass(frozen=True, slots=True)
class OutputScore:
    """One output against the dense model.

    Attributes:
        output: As it was named.
        nbytes: Bytes of its tensors.
        bits_per_weight: As in ``report``.
        evaluation: Losses and divergence on the text; A is the dense model.
    """

    output: str
    nbytes: int
    bits_per_weight: float
    evaluation: Evaluation


@dataclass(frozen=True, slots=True)
class OutputScores:
    """Several outputs against one dense model.

    Attributes:
        dense: The dense model.
        nbytes: Bytes of its tensors.
        text: Name of the text's file.
        text_sha256: Hash of the token ids.
        scores: The outputs, in the order in which they were given.
    """

    dense: str
    nbytes: int
    text: str
    text_sha256: str
    scores: tuple[OutputScore, ...]

    def to_dict(self) -> dict[str, Any]:
        """The scores as JSON data."""
        return asdict(self)


@error_action("compared")
def compare_outputs(
    dense: Source,
    outputs: Sequence[Source],
    text: Source,
    *,
    tokens: int = DEFAULT_TOKENS,
    window: int = DEFAULT_WINDOW,
    cache: Source | None = None,
    threads: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> OutputScores:
    """Measure how far the predictions of outputs diverge from those of a dense model.

    Args:
        dense: The reference, usually the source of the outputs.
        outputs: Folders or GGUF files of the same model.
        text: A text or ``.jsonl`` file, not one that an output was calibrated on.
        tokens: Most tokens of it to read.
        window: Tokens per window; each window starts without context.
        cache: Folder in which what the dense model predicts is kept, and found by later calls with
            the same model and text: 4 bytes times tokens times width of the model. None keeps
            nothing.
        threads: Threads that decode the sources, and that compute on a CPU.
        progress: Called with what is at hand, how much is done, and of how much.

    Returns:
        By output its size, and its evaluation with standard errors.

    Raises:
        CheckpointError: A model cannot be read, or no library takes it.
        UsageError: No output, a repository on the hub, or a text that is too short.
        ParseError: The text is not valid UTF-8 or JSON.
        OutputError: The cache cannot be written.
        OSError: The text cannot be read.

    Example:
        >>> found = compare_outputs("Llama", ["4bit", "3bit"], "held-out.txt")  # doctest: +SKIP
        >>> [score.evaluation.divergence.value for score in found.scores]  # doctest: +SKIP
    """
    if not outputs:
        raise UsageError("name the outputs to compare with the dense model")
    Path(text).open("rb").close()  # fail before the long work
    sizes = [_size(source) for source in (dense, *outputs)]
    ids = read_tokens(Path(text), load_tokenizer(dense, plan_text_model(dense)), tokens, window)
    scores = []
    with TemporaryDirectory() as temporary, product_threads(threads):
        folder = Path(temporary if cache is None else cache)
        predictions = DensePredictions(dense, ids, folder, threads, progress)
        for output, (nbytes, bits) in zip(outputs, sizes[1:], strict=True):
            model, _ = load_as_stored(output, threads=threads)
            count = None if progress is None else partial(progress, f"window of text, {output}")
            evaluation = evaluate_against(predictions, model, list(ids), count)
            scores.append(OutputScore(str(output), nbytes, bits, evaluation))
            del model
    return OutputScores(
        dense=str(dense),
        nbytes=sizes[0][0],
        text=Path(text).name,
        text_sha256=hashlib.sha256(ids.tobytes()).hexdigest(),
        scores=tuple(scores),
    )


def _size(source: Source) -> tuple[int, float]:
    """Bytes of a model's tensors, and bits per weight."""
    if find_repository(source, None) is not None:
        raise UsageError(f"compare reads folders and GGUF files; download {source} first")
    options = ConvertOptions.from_arguments(dequantize=True, layout="keep")
    plan = make_plan(read_checkpoint(source), options)
    return plan.bytes_in, plan.bits_per_weight_in
