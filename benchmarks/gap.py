"""Loss gaps of quantized forms of a dense model, by a forward pass in NumPy: no mlx-lm, no GPU.

Weights are decoded to float32; a gap is the mean next-token loss above the dense model's on a text,
window by window, with the standard error over windows.

    python benchmarks/gap.py MODEL --text eval.jsonl --bits 4 3 2
    python benchmarks/gap.py MODEL --text eval.jsonl --bits 4 3 2 --statistics stats.safetensors
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy_model import Model, Weights, read_weights
from tokenizers import Tokenizer

import requant
from requant.mlx_lm.evaluation import read_documents


def losses(model: Model, weights: Weights, windows: np.ndarray) -> np.ndarray:
    """Mean next-token loss of each window, in nats."""
    head = model.head(weights)
    return np.array(
        [_loss(model.hidden(weights, row[None])[0, :-1] @ head.T, row) for row in windows]
    )


def _loss(logits: np.ndarray, row: np.ndarray) -> float:
    most = logits.max(-1, keepdims=True)
    norm = np.log(np.exp(logits - most).sum(-1)) + most[:, 0]
    return float((norm - logits[np.arange(len(row) - 1), row[1:]]).mean(dtype=np.float64))


def forms(bits: list[int], statistics: Path | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """The forms to compare at each number of bits; ``mx.quantize`` comes first."""
    for width in bits:
        ways: dict[str, dict[str, Any]] = {
            "mx.quantize": {},
            "fast": {"search": "fast"},
            "best": {"search": "best"},
        }
        if statistics is not None:
            ways["best, statistics"] = {"statistics": statistics}
            ways["gptq"] = {"statistics": statistics, "gptq": True}
        for name, options in ways.items():
            yield f"{width} bits, {name}", {"bits": width, **options}


def main() -> None:
    """Convert, decode, run, print a line for each form."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=12_288)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--statistics", type=Path)
    args = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    ids: list[int] = []
    for document in read_documents(args.text):
        ids += tokenizer.encode(document).ids
        if len(ids) >= args.tokens:
            break
    count = min(args.tokens, len(ids)) // args.window
    windows = np.array(ids[: count * args.window]).reshape(count, args.window)
    model = Model(json.loads((args.model / "config.json").read_text()))
    dense = losses(model, read_weights(args.model), windows)
    print(f"{windows.size:,} tokens, dense loss {dense.mean():.4f}", flush=True)
    baseline = 0.0
    for name, options in forms(args.bits, args.statistics):
        with tempfile.TemporaryDirectory() as folder:
            path, values = Path(folder) / "made", Path(folder) / "values"
            began = time.perf_counter()
            requant.convert(args.model, path, layout="keep", **options)
            took = time.perf_counter() - began
            requant.convert(path, values, dequantize=True, dtype="float32", layout="keep")
            gaps = losses(model, read_weights(values), windows) - dense
        gap, error = gaps.mean(), gaps.std(ddof=1) / len(gaps) ** 0.5
        baseline = gap if name.endswith("mx.quantize") else baseline
        print(
            f"{name:26} gap {gap:.4f} +- {error:.4f}, share {gap / baseline:.2f}, {took:.1f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
