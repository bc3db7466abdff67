"""Run gptq, awq or dwq of mlx-lm over a given text, in place of the one that it downloads.

python benchmarks/mlx_lm_tools.py gptq TEXT TOKENS --model DENSE --mlx-path OUT --bits 4
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from requant.mlx_lm.documents import read_documents

# What makes the sizes equal: no layer has other bits or another group.
EQUAL = {
    "gptq": ("--fallback-bits", "--fallback-group-size"),
    "awq": ("--embed-bits", "--embed-group-size"),
    "dwq": (),
}
LENGTH = 512
VALIDATION = 8


def main() -> None:
    """Patch the tool's text, and pass the other arguments on."""
    tool, text, tokens, *rest = sys.argv[1:]
    module: Any = importlib.import_module(f"mlx_lm.quant.{tool}")
    count = int(tokens) // LENGTH

    def rows_of(tokenizer: Any, wanted: int) -> np.ndarray:
        documents = read_documents(Path(text))
        ids = np.concatenate([tokenizer.encode(x) for x in documents])
        rows = ids[: ids.size // LENGTH * LENGTH].reshape(-1, LENGTH)
        return np.random.default_rng(0).permutation(rows)[:wanted]

    def load_data(tokenizer: Any, *rest: Any) -> Any:
        """As the tool's own: windows of tokens; for dwq pairs with offsets, and validation."""
        if tool != "dwq":
            return mx.array(rows_of(tokenizer, count))
        pairs = [(row.tolist(), 0) for row in rows_of(tokenizer, count + VALIDATION)]
        return pairs[VALIDATION:], pairs[:VALIDATION]

    module.load_data = load_data
    bits, group_size = (rest[rest.index(x) + 1] for x in ("--bits", "--group-size"))
    for name, value in zip(EQUAL[tool], (bits, group_size), strict=False):
        rest += [name, value]
    if tool == "dwq":
        rest += ["--learning-rate", "1e-5"]
    sys.argv = [tool, *rest]
    module.main()


if __name__ == "__main__":
    main()
