"""Loss gap to the dense model with scale search, relative to the gap with mx.quantize.

    python benchmarks/quality.py MODEL --text held-out.txt
    python benchmarks/quality.py MODEL --text held-out.jsonl --tokens 8192 --specs 3 4:32 mxfp4

MODEL is a dense folder that mlx-lm loads; conversions go to a temporary folder. Nothing is
calibrated on the text. `gap` is the mean next-token loss in nats above the dense model's, `share`
that gap divided by the gap with mx.quantize at the same spec and size, with its standard error over
the windows of text.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import requant
from requant.mlx_lm.evaluation import load_as_stored, losses, read_tokens


def options_of(spec: str) -> dict[str, Any]:
    """``4``, ``4:32`` or a mode as keyword arguments."""
    if not spec[0].isdigit():
        return {"mode": spec}
    bits, _, group_size = spec.partition(":")
    return {"bits": int(bits), "group_size": int(group_size or 64)}


def share_of(gaps: np.ndarray, baseline: np.ndarray) -> tuple[float, float]:
    """Ratio of the mean gaps, and its standard error by leaving out one window at a time."""
    n = len(gaps)
    without = (gaps.sum() - gaps) / (baseline.sum() - baseline)
    spread = float(np.sqrt((n - 1) / n * ((without - without.mean()) ** 2).sum()))
    return float(gaps.sum() / baseline.sum()), spread


def converted_losses(source: Path, ids: np.ndarray, **options: Any) -> np.ndarray:
    """Losses of the model that ``requant.convert`` writes with these options."""
    with tempfile.TemporaryDirectory() as folder:
        requant.convert(source, Path(folder) / "out", **options)
        return losses(load_as_stored(Path(folder) / "out")[0], ids)


def main() -> None:
    """Parse the arguments and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--specs", nargs="+", default=["4", "3", "2", "mxfp4", "nvfp4"])
    args = parser.parse_args()
    dense_model, tokenizer = load_as_stored(args.model)
    ids = read_tokens(args.text, tokenizer, args.tokens, args.window)
    dense = losses(dense_model, ids)
    print(f"{args.model.name}, {ids.size} tokens, dense loss {dense.mean():.4f} nats")
    print(f"{'spec':8}{'search':>8}{'gap':>9}{'share':>8}{'+-':>8}")
    for spec in args.specs:
        baseline = np.zeros(0)
        for search in ("off", "fast", "best"):
            gaps = converted_losses(args.model, ids, search=search, **options_of(spec)) - dense
            baseline = gaps if search == "off" else baseline
            share, spread = share_of(gaps, baseline)
            print(f"{spec:8}{search:>8}{gaps.mean():9.4f}{share:8.3f}{spread:8.3f}", flush=True)


if __name__ == "__main__":
    main()
