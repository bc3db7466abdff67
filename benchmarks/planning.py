"""Time and memory of planning the largest checkpoints: headers and small tensors in sparse files.

Models by the shapes that are published: DeepSeek-V3 in FP8 (92,000 tensors), Kimi-K2 in 4-bit
compressed-tensors (208,000) and in FP8 (139,000), a dense Llama of 405 B, and a mixture of experts
of 1 T parameters in GGUF, in 24 files. The shards have their full size, and holes where the weights
are: only headers and the tensors of ``weight_shape`` are written. Every number is that of a process
of its own, relative to one that only parses the same headers with ``json`` (for GGUF, that starts
Python): no planner can be faster than that. "growth" compares with the model of half the layers:
time and memory that grow with the tensors grow by as much as these.

    python benchmarks/planning.py                        all models, and halves of them
    python benchmarks/planning.py --models kimi-k2 --halves 0
    python benchmarks/planning.py --against OTHER/src    next to another version of requant
    python benchmarks/planning.py --make FOLDER --models kimi-k2     only write one
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))

from gguf_files import KINDS
from make_checkpoint import Tensors

SIZES = {"BF16": 2, "F8_E4M3": 1, "F32": 4, "I32": 4}
SHARD_BYTES = 10 << 30
FLOOR = """
import json, os, struct, sys
tensors = {}
for name in sorted(os.listdir(sys.argv[1])):
    if name.endswith(".safetensors"):
        with open(os.path.join(sys.argv[1], name), "rb", buffering=0) as file:
            length, = struct.unpack("<Q", file.read(8))
            tensors |= json.loads(file.read(length))
"""
PLAN = """
import sys, requant
bits = int(sys.argv[3]) or None  # 0: the codes of the source
plan = requant.plan(sys.argv[1], layout=sys.argv[2], bits=bits)
"""
HASH = PLAN + "plan.hash\n"
MEMORY = """
with open("/proc/self/status") as file:
    print([line.split()[1] for line in file if line.startswith("VmHWM")][0], file=sys.stderr)
"""


class Model(NamedTuple):
    """The sizes of a model."""

    layers: int
    dense_layers: int  # of them, the first ones, which have no experts
    experts: int
    hidden: int
    intermediate: int
    expert_intermediate: int
    heads: int
    vocabulary: int


MODELS = {
    "deepseek-v3": Model(61, 3, 256, 7168, 18432, 2048, 128, 129280),
    "kimi-k2": Model(61, 1, 384, 7168, 18432, 2048, 64, 163840),
    "kimi-k2-fp8": Model(61, 1, 384, 7168, 18432, 2048, 64, 163840),
    "llama-405b": Model(126, 126, 0, 16384, 53248, 0, 128, 128256),
    "gguf-1t": Model(61, 0, 384, 7168, 0, 2048, 64, 151936),
}
FP8 = ("deepseek-v3", "kimi-k2-fp8")
GGUF_SPLITS = 24


def attention(name: str, model: Model) -> dict[str, tuple[int, ...]]:
    """Shapes of the matrices of one layer's attention, by name."""
    if name == "llama-405b":
        kv = 8 * 128
        return {
            "q_proj": (model.hidden, model.hidden),
            "k_proj": (kv, model.hidden),
            "v_proj": (kv, model.hidden),
            "o_proj": (model.hidden, model.hidden),
        }
    return {
        "q_a_proj": (1536, model.hidden),
        "q_b_proj": (model.heads * 192, 1536),
        "kv_a_proj_with_mqa": (576, model.hidden),
        "kv_b_proj": (model.heads * 256, 512),
        "o_proj": (model.hidden, model.heads * 128),
    }


def feed_forward(hidden: int, intermediate: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the three matrices of a feed-forward network."""
    return {
        "gate_proj": (intermediate, hidden),
        "up_proj": (intermediate, hidden),
        "down_proj": (hidden, intermediate),
    }


def linear(name: str, path: str, shape: tuple[int, ...], is_expert: bool) -> Tensors:
    """The tensors of one matrix, as the model stores it."""
    rows, columns = shape
    if name in FP8:
        scales = (-(-rows // 128), -(-columns // 128))
        return {
            f"{path}.weight": ("F8_E4M3", shape),
            f"{path}.weight_scale_inv": ("F32", scales),
        }
    if name == "kimi-k2" and is_expert:
        return {
            f"{path}.weight_packed": ("I32", (rows, columns // 8)),
            f"{path}.weight_scale": ("BF16", (rows, columns // 32)),
            f"{path}.weight_shape": ("I32", (2,)),
        }
    return {f"{path}.weight": ("BF16", shape)}


def layers(name: str, model: Model) -> Iterator[Tensors]:
    """The tensors of the model, a layer at a time."""
    hidden = model.hidden
    matrix: tuple[str, tuple[int, ...]] = ("BF16", (model.vocabulary, hidden))
    yield {"model.embed_tokens.weight": matrix}
    for number in range(
        model.layers + (name == "deepseek-v3")
    ):  # the last predicts a further token
        path = f"model.layers.{number}"
        tensors: Tensors = {}
        for part, shape in attention(name, model).items():
            tensors |= linear(name, f"{path}.self_attn.{part}", shape, False)
        norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
        if name != "llama-405b":
            norms |= {"self_attn.q_a_layernorm": 1536, "self_attn.kv_a_layernorm": 512}
        tensors |= {f"{path}.{norm}.weight": ("BF16", (size,)) for norm, size in norms.items()}
        if number < model.dense_layers:
            for part, shape in feed_forward(hidden, model.intermediate).items():
                tensors |= linear(name, f"{path}.mlp.{part}", shape, False)
        else:
            shapes = feed_forward(hidden, model.expert_intermediate)
            tensors[f"{path}.mlp.gate.weight"] = ("BF16", (model.experts, hidden))
            tensors[f"{path}.mlp.gate.e_score_correction_bias"] = ("F32", (model.experts,))
            for part, shape in shapes.items():
                tensors |= linear(name, f"{path}.mlp.shared_experts.{part}", shape, False)
            for expert in range(model.experts):
                for part, shape in shapes.items():
                    tensors |= linear(name, f"{path}.mlp.experts.{expert}.{part}", shape, True)
        yield tensors
    yield {"model.norm.weight": ("BF16", (hidden,)), "lm_head.weight": matrix}


def config(name: str, model: Model) -> dict[str, Any]:
    """The model's config.json."""
    common = {
        "hidden_size": model.hidden,
        "intermediate_size": model.intermediate,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "vocab_size": model.vocabulary,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "rope_theta": 50000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    if name == "llama-405b":
        return common | {"model_type": "llama", "num_key_value_heads": 8, "head_dim": 128}
    common |= {
        "model_type": "deepseek_v3" if name in FP8 else "kimi_k2",
        "num_key_value_heads": model.heads,
        "moe_intermediate_size": model.expert_intermediate,
        "first_k_dense_replace": model.dense_layers,
        "moe_layer_freq": 1,
        "n_group": 8 if name == "deepseek-v3" else 1,
        "topk_group": 4 if name == "deepseek-v3" else 1,
        "n_routed_experts": model.experts,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
    }
    if name in FP8:
        block: dict[str, Any] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
        }
        further = int(name == "deepseek-v3")  # layers that predict a further token
        return common | {"num_nextn_predict_layers": further, "quantization_config": block}
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": 32,
        "dynamic": False,
    }
    ignore = [r"re:.*self_attn.*", r"re:.*shared_experts.*", "lm_head"]
    ignore.append(r"re:.*mlp\.(gate|up|gate_up|down)_proj.*")
    block = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ignore,
    }
    return common | {"quantization_config": block}


def write(folder: Path, name: str, halved: int = 0) -> int:
    """Write a model with its layers halved ``halved`` times; returns how many tensors it has."""
    whole = MODELS[name]
    model = whole._replace(layers=max(whole.layers >> halved, whole.dense_layers >> halved, 2))
    folder.mkdir(parents=True)
    if name == "gguf-1t":
        return write_gguf(folder, model)
    (folder / "config.json").write_text(json.dumps(config(name, model), indent=2))
    shards: list[Tensors] = [{}]
    held = 0
    for tensors in layers(name, model):
        nbytes = sum(SIZES[dtype] * prod(shape) for dtype, shape in tensors.values())
        if shards[-1] and held + nbytes > SHARD_BYTES:
            shards.append({})
            held = 0
        shards[-1] |= tensors
        held += nbytes
    shard_of: dict[str, str] = {}
    for number, tensors in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):06d}.safetensors"
        write_shard(folder / file, tensors)
        shard_of |= dict.fromkeys(tensors, file)
    index = {"metadata": {}, "weight_map": dict(sorted(shard_of.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return len(shard_of)


def gguf_tensors(model: Model) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Name, kind and shape of every tensor, outermost axis first."""
    hidden, inner, heads = model.hidden, model.expert_intermediate, model.heads * 128
    yield "token_embd.weight", "Q4_K", (model.vocabulary, hidden)
    for number in range(model.layers):
        for part, shape in {
            "attn_q": (heads, hidden),
            "attn_k": (1024, hidden),
            "attn_v": (1024, hidden),
            "attn_output": (hidden, heads),
            "ffn_gate_exps": (model.experts, inner, hidden),
            "ffn_up_exps": (model.experts, inner, hidden),
            "ffn_down_exps": (model.experts, hidden, inner),
        }.items():
            yield f"blk.{number}.{part}.weight", "Q4_K", shape
        for part, width in {"attn": hidden, "ffn": hidden, "attn_q": 128, "attn_k": 128}.items():
            yield f"blk.{number}.{part}_norm.weight", "F32", (width,)
        yield f"blk.{number}.ffn_gate_inp.weight", "F32", (model.experts, hidden)
    yield "output_norm.weight", "F32", (hidden,)
    yield "output.weight", "Q4_K", (model.vocabulary, hidden)


def write_gguf(folder: Path, model: Model) -> int:
    """Write Qwen 3's kind of mixture of experts as llama.cpp splits it; the count of tensors."""
    settings = {
        "block_count": model.layers,
        "embedding_length": model.hidden,
        "feed_forward_length": model.intermediate or model.expert_intermediate,
        "expert_feed_forward_length": model.expert_intermediate,
        "expert_count": model.experts,
        "expert_used_count": 8,
        "context_length": 131072,
        "attention.head_count": model.heads,
        "attention.head_count_kv": 8,
        "attention.key_length": 128,
        "attention.value_length": 128,
    }
    keys = [_string("general.architecture") + struct.pack("<I", 8) + _string("qwen3moe")]
    keys += [_string(f"qwen3moe.{k}") + struct.pack("<II", 4, v) for k, v in settings.items()]
    keys.append(_string("qwen3moe.attention.layer_norm_rms_epsilon") + struct.pack("<If", 6, 1e-6))
    tensors = list(gguf_tensors(model))
    each = -(-len(tensors) // GGUF_SPLITS)
    for split in range(GGUF_SPLITS):
        table, at = [], 0
        for tensor, kind, shape in tensors[split * each : (split + 1) * each]:
            number, values, nbytes, _ = KINDS[kind]
            axes = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
            table.append(_string(tensor) + axes + struct.pack("<IQ", number, at))
            at += -(-prod(shape) // values * nbytes // 32) * 32
        own = [
            _string("split.no") + struct.pack("<IH", 2, split),
            _string("split.count") + struct.pack("<IH", 2, GGUF_SPLITS),
            _string("split.tensors.count") + struct.pack("<Ii", 5, len(tensors)),
        ]
        own = [*(keys if split == 0 else ()), *own]
        head = b"GGUF" + struct.pack("<IQQ", 3, len(table), len(own)) + b"".join((*own, *table))
        head += bytes(-len(head) % 32)
        with open(folder / f"model-{split + 1:05d}-of-{GGUF_SPLITS:05d}.gguf", "wb") as file:
            file.write(head)
            file.truncate(len(head) + at)
    return len(tensors)


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def write_shard(path: Path, tensors: Tensors) -> None:
    """Write a header, the values of ``weight_shape``, and holes where the weights are."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    shapes: list[tuple[int, bytes]] = []
    # As the safetensors library orders them: wider dtypes first, then by name.
    for name in sorted(tensors, key=lambda x: (-SIZES[tensors[x][0]], x)):
        dtype, shape = tensors[name]
        stop = offset + SIZES[dtype] * prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, stop]}
        if name.endswith(".weight_shape"):
            rows, words = tensors[f"{name.removesuffix('shape')}packed"][1]
            shapes.append((offset, struct.pack("<2i", rows, words * 8)))
        offset = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for start, values in shapes:
            file.seek(8 + len(text) + start)
            file.write(values)
        file.truncate(8 + len(text) + offset)


class Run(NamedTuple):
    """Time and memory of a finished process."""

    cpu_s: float
    peak_mb: float


def measure(code: str, *arguments: str, src: str | None = None) -> Run:
    """Run Python code in a process; the peak is the largest resident set after its start."""
    env = os.environ | ({} if src is None else {"PYTHONPATH": src})
    command = [sys.executable, "-c", f"import sys\n{code}{MEMORY}", *arguments]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=env, text=True
    )
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(errors)
    return Run(usage.ru_utime + usage.ru_stime, int(errors.split()[-1]) / 1024)


def printed(*arguments: str) -> str:
    """Python code that runs the command line and throws its output away."""
    words = ", ".join(map(repr, arguments))
    return (
        "from requant.cli import run\n"
        "bits = [] if sys.argv[3] == '0' else ['--bits', sys.argv[3]]\n"
        f"try:\n    run(['plan', sys.argv[1], '--layout', sys.argv[2], *bits, {words}])\n"
        "except SystemExit as end:\n    assert not end.code, end\n"
    )


def main() -> None:
    """Parse the arguments, write each model and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, help="where to work; needs sparse files")
    parser.add_argument("--make", type=Path, help="write the models below this folder, and stop")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--halves", type=int, default=2, help="how often to halve the layers")
    parser.add_argument("--layout", default="keep")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--against", metavar="SRC", help="the src of another version of requant")
    args = parser.parse_args()
    if args.make is not None:
        for name in args.models:
            print(f"{name}: {write(args.make / name, name):,} tensors")
        return
    contenders = {"plan": PLAN, "plan and hash": HASH, "plan --json": printed("--json")}
    print(f"load {os.getloadavg()[0]:.1f}; medians of {args.runs}, seconds of processor time")
    for name in args.models:
        bits = "0" if name in ("kimi-k2", "gguf-1t") else "4"  # MLX has no mode for FP8's blocks
        larger: dict[str, Run] = {}
        of_larger = 0
        for halved in range(args.halves + 1):
            with tempfile.TemporaryDirectory(dir=args.dir) as scratch:
                source = Path(scratch) / "model"
                count = write(source, name, halved)
                print(f"{name}, {count:,} tensors")
                versions = (
                    {"": None} if args.against is None else {"": None, " before": args.against}
                )
                rounds: dict[str, list[Run]] = {}
                for _ in range(args.runs):
                    rounds.setdefault("json", []).append(measure(FLOOR, str(source)))
                    for words, code in contenders.items():
                        for version, src in versions.items():
                            run = measure(code, str(source), args.layout, bits, src=src)
                            rounds.setdefault(words + version, []).append(run)
                floor = statistics.median(run.cpu_s for run in rounds["json"])
                medians: dict[str, Run] = {}
                for words, runs in rounds.items():
                    cpu_s = statistics.median(run.cpu_s for run in runs)
                    peak = statistics.median(run.peak_mb for run in runs)
                    medians[words] = Run(cpu_s, peak)
                    line = f"  {words:22} {cpu_s:7.2f} s {cpu_s / floor:6.1f} x {peak:7.0f} MB"
                    if words in larger:
                        time, memory = larger[words].cpu_s / cpu_s, larger[words].peak_mb / peak
                        line += f"   growth: tensors {of_larger / count:.2f}, time {time:.2f}, "
                        line += f"memory {memory:.2f}"
                    print(line, flush=True)
                larger, of_larger = medians, count


if __name__ == "__main__":
    main()
