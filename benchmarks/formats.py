"""Time to convert folders of other tools, against the time to copy them.

Each round converts and copies the same source one after another; printed are medians,
and medians of the ratios within a round. The copy reads the source and writes as many bytes,
with fsync.

    python benchmarks/formats.py                      7 B-shaped AWQ and GPTQ folders
    python benchmarks/formats.py awq --layers 8       a quarter of one
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
from convert import floor, measure

HIDDEN, INTERMEDIATE, VOCABULARY, GROUP = 4096, 11008, 32000, 128
_ITEM = {"I32": 4, "F16": 2}
_BLOCK = 8 << 20
Shapes = dict[str, tuple[str, tuple[int, ...]]]


def awq(out: int, n_in: int) -> Shapes:
    """The tensors of a linear layer in AutoAWQ gemm."""
    return {
        "qweight": ("I32", (n_in, out // 8)),
        "qzeros": ("I32", (n_in // GROUP, out // 8)),
        "scales": ("F16", (n_in // GROUP, out)),
    }


def gptq(out: int, n_in: int) -> Shapes:
    """The tensors of a linear layer in GPTQ v2 with 4 bits, without act-order."""
    return {
        "qweight": ("I32", (n_in // 8, out)),
        "qzeros": ("I32", (n_in // GROUP, out // 8)),
        "scales": ("F16", (n_in // GROUP, out)),
    }


@dataclass(frozen=True)
class Kind:
    """A format: its tensors of a linear layer, and its block in config.json."""

    tensors: Callable[[int, int], Shapes]
    block: dict[str, object]


KINDS = {
    "awq": Kind(awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}),
    "gptq": Kind(
        gptq,
        {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": GROUP,
            "sym": False,
            "checkpoint_format": "gptq_v2",
        },
    ),
}


def model(kind: Kind, layers: int) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Name, dtype and shape of every tensor of a Llama of 7 B parameters."""
    yield "model.embed_tokens.weight", "F16", (VOCABULARY, HIDDEN)
    for number in range(layers):
        layer = f"model.layers.{number}"
        linear = {f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"}
        linear |= {f"mlp.{name}_proj": (INTERMEDIATE, HIDDEN) for name in ("gate", "up")}
        linear["mlp.down_proj"] = (HIDDEN, INTERMEDIATE)
        for name, (out, n_in) in linear.items():
            for role, (dtype, shape) in kind.tensors(out, n_in).items():
                yield f"{layer}.{name}.{role}", dtype, shape
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{layer}.{norm}.weight", "F16", (HIDDEN,)
    yield "model.norm.weight", "F16", (HIDDEN,)
    yield "lm_head.weight", "F16", (VOCABULARY, HIDDEN)


def write(folder: Path, kind: Kind, layers: int) -> int:
    """Write the folder with random codes and small finite scales; returns its bytes."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 2**32, _BLOCK // 4, np.uint32).tobytes()
    floats = (rng.standard_normal(_BLOCK // 2) * 0.01).astype(np.float16).tobytes()
    header: dict[str, object] = {}
    tensors = list(model(kind, layers))
    stop = 0
    for name, dtype, shape in tensors:
        start, stop = stop, stop + _ITEM[dtype] * prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for _, dtype, shape in tensors:
            left = _ITEM[dtype] * prod(shape)
            while left:
                data = (codes if dtype == "I32" else floats)[:left]
                left -= out.write(data)
        out.flush()
        os.fsync(out.fileno())  # or its pages would still be written while the first run is timed
    config = {"model_type": "llama", "dtype": "float16", "quantization_config": kind.block}
    (folder / "config.json").write_text(json.dumps(config))
    return stop


def compare(name: str, layers: int, rounds: int, place: Path) -> None:
    """Convert and copy in turns, and print the times."""
    source, output, copy = place / name, place / "out", place / "copy"
    nbytes = write(source, KINDS[name], layers)
    convert = [sys.executable, "-m", "requant", "convert", str(source), str(output)]
    convert += ["--layout", "keep", "--quiet"]
    runs = []
    for _ in range(rounds):
        run = measure(convert)
        shutil.rmtree(output)
        bare = measure(floor(source, copy, nbytes))
        copy.unlink()
        runs.append((run, bare))
    walls = [statistics.median(pair[n].wall_s for pair in runs) for n in (0, 1)]
    ratio = statistics.median(bare.wall_s / run.wall_s for run, bare in runs)
    peak = max(run.peak_mb for run, _ in runs)
    print(
        f"{name}: {nbytes / 1e9:.2f} GB converted in {walls[0]:.2f} s, copied in {walls[1]:.2f} s: "
        f"{ratio:.2f} of the copy's speed; peak {peak:.0f} MB"
    )
    shutil.rmtree(source)


def main() -> None:
    """Parse the arguments and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("formats", nargs="*", default=list(KINDS))
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        for name in args.formats:
            compare(name, args.layers, args.rounds, Path(place))


if __name__ == "__main__":
    main()
