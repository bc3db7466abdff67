"""Time to convert GGUF files, against the time to copy them.

Each round converts and copies the same file one after another; printed are medians,
and medians of the ratios within a round. The copy reads the source and writes as many bytes,
with fsync.

    python benchmarks/gguf_files.py  Q4_0, Q4_K and Q8_0 of a Llama of 1 B parameters
    python benchmarks/gguf_files.py Q6_K --layers 8  half of one; Q6_K is requantized
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import struct
import sys
import tempfile
from collections.abc import Iterator
from math import prod
from pathlib import Path

import numpy as np
from convert import floor, measure

HIDDEN, INTERMEDIATE, VOCABULARY, HEADS, KV_HEADS, HEAD = 2048, 8192, 128256, 32, 8, 64
# Number of the type, values and bytes of a block, places of its float16 numbers.
KINDS = {
    "F32": (0, 1, 4, ()),
    "Q4_0": (2, 32, 18, (0,)),
    "Q5_0": (6, 32, 22, (0,)),
    "Q8_0": (8, 32, 34, (0,)),
    "Q4_K": (12, 256, 144, (0, 2)),
    "Q5_K": (13, 256, 176, (0, 2)),
    "Q6_K": (14, 256, 210, (208,)),
    "MXFP4": (39, 32, 17, ()),
}
_ALIGNMENT = 32


def model(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor, outermost axis first."""
    yield "token_embd.weight", (VOCABULARY, HIDDEN)
    for number in range(layers):
        block = f"blk.{number}"
        yield f"{block}.attn_norm.weight", (HIDDEN,)
        yield f"{block}.attn_q.weight", (HEADS * HEAD, HIDDEN)
        yield f"{block}.attn_k.weight", (KV_HEADS * HEAD, HIDDEN)
        yield f"{block}.attn_v.weight", (KV_HEADS * HEAD, HIDDEN)
        yield f"{block}.attn_output.weight", (HIDDEN, HEADS * HEAD)
        yield f"{block}.ffn_norm.weight", (HIDDEN,)
        yield f"{block}.ffn_gate.weight", (INTERMEDIATE, HIDDEN)
        yield f"{block}.ffn_up.weight", (INTERMEDIATE, HIDDEN)
        yield f"{block}.ffn_down.weight", (HIDDEN, INTERMEDIATE)
    yield "output_norm.weight", (HIDDEN,)


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def _settings(layers: int) -> list[bytes]:
    numbers = {
        "block_count": layers,
        "embedding_length": HIDDEN,
        "feed_forward_length": INTERMEDIATE,
        "context_length": 8192,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
    }
    keys = [_string("general.architecture") + struct.pack("<I", 8) + _string("llama")]
    keys += [_string(f"llama.{k}") + struct.pack("<II", 4, v) for k, v in numbers.items()]
    epsilon = _string("llama.attention.layer_norm_rms_epsilon")
    return [*keys, epsilon + struct.pack("<If", 6, 1e-5)]


def _blocks(kind: str) -> bytes:
    """Some megabytes of random blocks whose scales are small and finite."""
    _, _, nbytes, halves = KINDS[kind]
    rng = np.random.default_rng(0)
    if kind == "F32":
        return rng.standard_normal(1 << 20).astype(np.float32).tobytes()
    blocks = rng.integers(0, 256, ((8 << 20) // nbytes, nbytes), np.uint8)
    for at in halves:
        scales = (rng.standard_normal(len(blocks)) * 1e-3).astype(np.float16)
        blocks[:, at : at + 2] = scales[:, None].view(np.uint8)
    if kind == "MXFP4":
        blocks[:, 0] = 120
    return blocks.tobytes()


def write(path: Path, kind: str, layers: int) -> int:
    """Write a file; returns its bytes."""
    path.parent.mkdir(parents=True)
    table, data, at = [], [], 0
    for name, shape in model(layers):
        stored = kind if len(shape) > 1 else "F32"
        number, elements, nbytes, _ = KINDS[stored]
        axes = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        table.append(_string(name) + axes + struct.pack("<IQ", number, at))
        size = prod(shape) // elements * nbytes
        data.append((stored, size))
        at += -(-size // _ALIGNMENT) * _ALIGNMENT
    keys = _settings(layers)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(table), len(keys)) + b"".join((*keys, *table))
    random = {name: _blocks(name) for name in ("F32", kind)}
    with path.open("wb") as file:
        file.write(head + bytes(-len(head) % _ALIGNMENT))
        for stored, size in data:
            left = size
            while left:
                left -= file.write(random[stored][:left])
            file.write(bytes(-size % _ALIGNMENT))
        file.flush()
        os.fsync(file.fileno())  # or its pages would still be written while the first run is timed
    return path.stat().st_size


def compare(kind: str, layers: int, rounds: int, place: Path) -> None:
    """Convert and copy in turns, and print the times."""
    source, output, copy = place / kind / "model.gguf", place / "out", place / "copy"
    nbytes = write(source, kind, layers)
    convert = [sys.executable, "-m", "requant", "convert", str(source), str(output)]
    convert += ["--layout", "keep", "--quiet"]
    runs = []
    for _ in range(rounds):
        run = measure(convert)
        shutil.rmtree(output)
        bare = measure(floor(source.parent, copy, nbytes))
        copy.unlink()
        runs.append((run, bare))
    walls = [statistics.median(pair[n].wall_s for pair in runs) for n in (0, 1)]
    ratio = statistics.median(bare.wall_s / run.wall_s for run, bare in runs)
    cpu = statistics.median(run.cpu_s for run, _ in runs)
    peak = max(run.anonymous_mb for run, _ in runs)
    print(
        f"{kind}: {nbytes / 1e9:.2f} GB converted in {walls[0]:.2f} s ({cpu:.2f} s of CPU), copied "
        f"in {walls[1]:.2f} s: {ratio:.2f} of the copy's speed; peak {peak:.0f} MB",
        flush=True,
    )
    shutil.rmtree(source.parent)


def main() -> None:
    """Parse the arguments and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("types", nargs="*", default=["Q4_0", "Q4_K", "Q8_0"])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        for kind in args.types:
            compare(kind, args.layers, args.rounds, Path(place))


if __name__ == "__main__":
    main()
