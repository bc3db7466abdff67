"""Write a Llama-shaped bfloat16 checkpoint of random values, streamed, in several shards.

python benchmarks/make_checkpoint.py FOLDER                  about 1 B parameters, 2.1 GB
python benchmarks/make_checkpoint.py FOLDER --layers 2       smaller
python benchmarks/make_checkpoint.py FOLDER --one-tensor 6   one tensor of 6 GiB
"""

from __future__ import annotations

import argparse
import json
import shutil
from math import prod
from pathlib import Path

import numpy as np

EXAMPLE = Path(__file__).parents[1] / "examples" / "micro-llama"
HIDDEN, INTERMEDIATE, VOCABULARY, HEADS, KV_HEADS = 2048, 8192, 32000, 32, 8
_BLOCK = 4 << 20  # values made at once


def llama_shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes in the order in which such files hold them."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    kv = HIDDEN * KV_HEADS // HEADS
    for n in range(layers):
        layer = f"model.layers.{n}"
        shapes |= {
            f"{layer}.input_layernorm.weight": (HIDDEN,),
            f"{layer}.mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
            f"{layer}.mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
            f"{layer}.mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
            f"{layer}.post_attention_layernorm.weight": (HIDDEN,),
            f"{layer}.self_attn.k_proj.weight": (kv, HIDDEN),
            f"{layer}.self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            f"{layer}.self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            f"{layer}.self_attn.v_proj.weight": (kv, HIDDEN),
        }
    return shapes | {"model.norm.weight": (HIDDEN,)}


def write(folder: Path, shapes: dict[str, tuple[int, ...]], shard_bytes: int, layers: int) -> None:
    """Write shards, index, config and a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        if shards[-1] and filled + 2 * prod(shape) > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += 2 * prod(shape)
    rng = np.random.default_rng(0)
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        header, stop = {}, 0
        for name in names:
            start, stop = stop, stop + 2 * prod(shapes[name])
            header[name] = {
                "dtype": "BF16",
                "shape": list(shapes[name]),
                "data_offsets": [start, stop],
            }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                left = prod(shapes[name])
                while left:
                    count = min(left, _BLOCK)
                    values = rng.standard_normal(count, dtype=np.float32) * np.float32(0.02)
                    out.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())
                    left -= count
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((EXAMPLE / "config.json").read_text()) | {
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HIDDEN // HEADS,
        "vocab_size": VOCABULARY,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    for file in EXAMPLE.glob("token*"):
        shutil.copyfile(file, folder / file.name)


def main() -> None:
    """Parse the arguments and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--shard-gb", type=float, default=1.0)
    parser.add_argument("--one-tensor", type=int, metavar="GIB")
    args = parser.parse_args()
    shapes = llama_shapes(args.layers)
    if args.one_tensor:
        shapes = {"model.huge.weight": ((args.one_tensor << 30) // 2 // 8192, 8192)}
    write(args.folder, shapes, int(args.shard_gb * 1e9), args.layers)


if __name__ == "__main__":
    main()
