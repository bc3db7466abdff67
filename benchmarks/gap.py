"""Loss gaps of quantized forms of a dense model, by a forward pass in NumPy: no mlx-lm, no GPU.

For models like Qwen 3 and Llama (grouped attention, rotary positions, gated MLP). Weights
are decoded to float32; a gap is the mean next-token loss above the dense model's on a text, window
by window, with the standard error over windows.

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

import ml_dtypes
import numpy as np
from tokenizers import Tokenizer

import requant
from requant.mlx_lm.evaluation import read_documents

Weights = dict[str, np.ndarray]
_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


def read_weights(folder: Path) -> Weights:
    """Read every tensor of a dense folder as float32."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        raw = file.read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:start])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            first, last = (start + x for x in entry["data_offsets"])
            array = np.frombuffer(raw[first:last], _DTYPES[entry["dtype"]])
            found[name] = array.reshape(entry["shape"]).astype(np.float32)
    return found


class Model:
    """The forward pass."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.width = config.get("head_dim") or config["hidden_size"] // self.heads
        self.blocks, self.epsilon = config["num_hidden_layers"], config["rms_norm_eps"]
        theta = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
        self.frequencies = theta ** (-np.arange(0, self.width, 2) / self.width)

    def losses(self, weights: Weights, windows: np.ndarray) -> np.ndarray:
        """Mean next-token loss of each window, in nats."""
        head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
        return np.array([self._loss(weights, head, row) for row in windows])

    def _loss(self, weights: Weights, head: np.ndarray, row: np.ndarray) -> float:
        logits = self._hidden(weights, row)[:-1] @ head.T
        most = logits.max(-1, keepdims=True)
        norm = np.log(np.exp(logits - most).sum(-1)) + most[:, 0]
        return float((norm - logits[np.arange(len(row) - 1), row[1:]]).mean(dtype=np.float64))

    def _norm(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.epsilon) * weight

    def _heads(
        self, weights: Weights, path: str, x: np.ndarray, count: int, transposed: bool
    ) -> np.ndarray:
        """Queries, keys or values: ``(heads, tokens, width)``."""
        made = (x @ weights[f"{path}_proj.weight"].T).reshape(len(x), count, self.width)
        if not transposed:
            return made.transpose(1, 0, 2)
        if f"{path}_norm.weight" in weights:
            made = self._norm(made, weights[f"{path}_norm.weight"])
        angles = np.arange(len(x))[:, None, None] * self.frequencies
        cos, sin = (
            np.concatenate([f(angles)] * 2, -1).astype(np.float32) for f in (np.cos, np.sin)
        )
        half = self.width // 2
        other = np.concatenate([-made[..., half:], made[..., :half]], -1)
        return (made * cos + other * sin).transpose(1, 0, 2)

    def _hidden(self, weights: Weights, row: np.ndarray) -> np.ndarray:
        """The input of the head."""
        x = weights["model.embed_tokens.weight"][row]
        later = np.triu(np.full((len(row), len(row)), -1e9, np.float32), 1)
        share = self.heads // self.kv_heads
        for number in range(self.blocks):
            path = f"model.layers.{number}"
            h = self._norm(x, weights[f"{path}.input_layernorm.weight"])
            q = self._heads(weights, f"{path}.self_attn.q", h, self.heads, True)
            k = self._heads(weights, f"{path}.self_attn.k", h, self.kv_heads, True)
            v = self._heads(weights, f"{path}.self_attn.v", h, self.kv_heads, False)
            scores = q @ k.repeat(share, 0).transpose(0, 2, 1) * np.float32(self.width**-0.5)
            scores = np.exp(scores + later - (scores + later).max(-1, keepdims=True))
            mixed = scores / scores.sum(-1, keepdims=True) @ v.repeat(share, 0)
            joined = mixed.transpose(1, 0, 2).reshape(len(row), -1)
            x = x + joined @ weights[f"{path}.self_attn.o_proj.weight"].T
            h = self._norm(x, weights[f"{path}.post_attention_layernorm.weight"])
            gate, up = (h @ weights[f"{path}.mlp.{name}_proj.weight"].T for name in ("gate", "up"))
            x = x + (gate / (1 + np.exp(-gate)) * up) @ weights[f"{path}.mlp.down_proj.weight"].T
        return self._norm(x, weights["model.norm.weight"])


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
    dense = model.losses(read_weights(args.model), windows)
    print(f"{windows.size:,} tokens, dense loss {dense.mean():.4f}", flush=True)
    baseline = 0.0
    for name, options in forms(args.bits, args.statistics):
        with tempfile.TemporaryDirectory() as folder:
            path, values = Path(folder) / "made", Path(folder) / "values"
            began = time.perf_counter()
            requant.convert(args.model, path, layout="keep", **options)
            took = time.perf_counter() - began
            requant.convert(path, values, dequantize=True, dtype="float32", layout="keep")
            gaps = model.losses(read_weights(values), windows) - dense
        gap, error = gaps.mean(), gaps.std(ddof=1) / len(gaps) ** 0.5
        baseline = gap if name.endswith("mx.quantize") else baseline
        print(
            f"{name:26} gap {gap:.4f} +- {error:.4f}, share {gap / baseline:.2f}, {took:.1f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
