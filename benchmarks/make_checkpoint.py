"""Write a Llama-shaped checkpoint of random values, streamed, in several shards.

python benchmarks/make_checkpoint.py FOLDER                  about 1 B parameters, 2.1 GB
python benchmarks/make_checkpoint.py FOLDER --layers 2       smaller
python benchmarks/make_checkpoint.py FOLDER --one-tensor 6   one tensor of 6 GiB
python benchmarks/make_checkpoint.py FOLDER --fp8            linear layers as DeepSeek's FP8
"""

from __future__ import annotations

import argparse
import json
import shutil
from math import prod
from pathlib import Path

import ml_dtypes
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


Tensors = dict[str, tuple[str, tuple[int, ...]]]
"""Name -> header dtype and shape."""
_SIZE = {"BF16": 2, "F8_E4M3": 1, "F32": 4}


def stored(shapes: dict[str, tuple[int, ...]], fp8: bool) -> Tensors:
    """How the values are stored: bfloat16, or FP8 with a float32 scale for 128x128."""
    tensors: Tensors = {}
    for name, shape in shapes.items():
        if fp8 and len(shape) == 2 and "embed" not in name:
            tensors[name] = ("F8_E4M3", shape)
            tensors[f"{name}_scale_inv"] = ("F32", (-(-shape[0] // 128), -(-shape[1] // 128)))
        else:
            tensors[name] = ("BF16", shape)
    return tensors


def values(rng: np.random.Generator, dtype: str, count: int) -> bytes:
    """Random numbers: normal values, factors around 1e-4, or their FP8 codes."""
    if dtype == "F32":
        return rng.uniform(1e-4, 2e-4, count).astype(np.float32).tobytes()
    if dtype == "F8_E4M3":
        normal = rng.standard_normal(count, dtype=np.float32) * np.float32(100)
        return normal.clip(-448, 448).astype(ml_dtypes.float8_e4m3fn).tobytes()
    normal = rng.standard_normal(count, dtype=np.float32) * np.float32(0.02)
    return (normal.view(np.uint32) >> 16).astype(np.uint16).tobytes()


def write(folder: Path, tensors: Tensors, shard_bytes: int, layers: int) -> None:
    """Write shards, index, config and a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    nbytes = {name: _SIZE[dtype] * prod(shape) for name, (dtype, shape) in tensors.items()}
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in nbytes.items():
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    rng = np.random.default_rng(0)
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        header, stop = {}, 0
        for name in names:
            start, stop = stop, stop + nbytes[name]
            header[name] = {
                "dtype": tensors[name][0],
                "shape": list(tensors[name][1]),
                "data_offsets": [start, stop],
            }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                dtype, shape = tensors[name]
                left = prod(shape)
                while left:
                    count = min(left, _BLOCK)
                    out.write(values(rng, dtype, count))
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
    if any(dtype == "F8_E4M3" for dtype, _ in tensors.values()):
        block = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
        config |= {"quantization_config": block}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    for file in EXAMPLE.glob("token*"):
        shutil.copyfile(file, folder / file.name)


def main() -> None:
    """Parse the arguments and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--shard-gb", type=float, default=1.0)
    parser.add_argument("--fp8", action="store_true", help="DeepSeek's FP8, 128x128 blocks")
    parser.add_argument("--one-tensor", type=int, metavar="GIB")
    args = parser.parse_args()
    shapes = llama_shapes(args.layers)
    if args.one_tensor:
        shapes = {"model.huge.weight": ((args.one_tensor << 30) // 2 // 8192, 8192)}
    write(args.folder, stored(shapes, args.fp8), int(args.shard_gb * 1e9), args.layers)


if __name__ == "__main__":
    main()
