"""The text of a calibration: windows of token ids, drawn from text files by a seed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from requant.core.types import Source
from requant.errors import UsageError
from requant.mlx_lm.documents import read_documents
from requant.text import os_error_text

_ASSETS = Path(__file__).parent / "assets"
# Documentation and source code; and short pieces on many subjects in many languages.
DEFAULT_TEXTS = (_ASSETS / "calibration.txt", _ASSETS / "calibration.jsonl")
_PIECE_CHARS = 1 << 18  # of a longer text, pieces are drawn
_READ_AHEAD = 8  # times the tokens wanted are read, for windows from all over the text


def texts_of(text: Source | Sequence[Source] | None) -> list[Path]:
    """The files named, or the texts that come with requant."""
    if text is None:
        return [*DEFAULT_TEXTS]
    named = [text] if isinstance(text, str | os.PathLike) else list(text)
    return [Path(one) for one in named] or [*DEFAULT_TEXTS]


def windows_of(
    tokenizer: Any,
    texts: Sequence[Path],
    tokens: int,
    window: int,
    seed: int,
    *,
    may_be_empty: bool = False,
) -> np.ndarray:
    """Token ids, int64 ``(windows, window)``: windows from all over the texts, in their order.

    ``may_be_empty``: Whether texts without a document, such as rows about images, are none.

    Raises:
        UsageError: The texts do not fill one window, or cannot be read.
    """
    ids: list[int] = []
    for number, path in enumerate(texts, 1):
        most = _READ_AHEAD * tokens * number // len(texts)  # each file has its share
        try:
            for piece in _pieces(path, seed):
                if len(ids) >= most:
                    break
                ids += tokenizer.encode(piece)
        except OSError as error:
            raise UsageError(f"--text {path}: {os_error_text(error)}") from error
    count = len(ids) // window
    if not count and (ids or not may_be_empty):
        names = ", ".join(map(str, texts))
        raise UsageError(
            f"{names}: {len(ids):,} tokens do not fill one window of "
            f"{window:,}: give more text, or a lower --window"
        )
    cut = np.array(ids[: count * window], np.int64).reshape(count, window)
    wanted = min(tokens // window, count)
    return cut[np.sort(np.random.default_rng(seed).permutation(count)[:wanted])]


def _pieces(path: Path, seed: int) -> Iterator[str]:
    """The documents of a file in random order; long ones in pieces."""
    pieces = [
        document[start : start + _PIECE_CHARS]
        for document in read_documents(path)
        for start in range(0, len(document), _PIECE_CHARS)
    ]
    for number in np.random.default_rng(seed).permutation(len(pieces)):
        yield pieces[number]
