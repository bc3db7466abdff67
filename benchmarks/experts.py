"""Memory of a MoE under mlx-lm's layout: requant against mlx_lm.convert and the largest tensor.

Two forms of the same experts: one tensor for each expert (Qwen3-MoE), which the layout stacks by
moving bytes; and a fused, transposed stack for each layer (Qwen3-VL-MoE), which mlx-lm's class
computes. The baseline only imports mlx-lm, which both contenders do too.

    python benchmarks/experts.py                 two layers of 64 experts, 0.6 GB each form
    python benchmarks/experts.py --layers 8      mlx-lm's memory grows, requant's does not
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from math import prod
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from convert import report, requant, rounds
from make_checkpoint import EXAMPLE, write

EXPERTS, HIDDEN, INTERMEDIATE, HEADS, HEAD_DIM, VOCABULARY = 64, 1024, 768, 8, 64, 4096
FORMS = ("one by one", "fused")


def config(layers: int) -> dict[str, Any]:
    """The config of a Qwen3-MoE of these sizes."""
    return {
        "model_type": "qwen3_moe",
        "torch_dtype": "bfloat16",
        "decoder_sparse_step": 1,
        "head_dim": HEAD_DIM,
        "hidden_size": HIDDEN,
        "intermediate_size": HIDDEN,
        "max_position_embeddings": 512,
        "mlp_only_layers": [],
        "moe_intermediate_size": INTERMEDIATE,
        "norm_topk_prob": True,
        "num_attention_heads": HEADS,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "num_hidden_layers": layers,
        "num_key_value_heads": HEADS,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000.0,
        "tie_word_embeddings": False,
        "vocab_size": VOCABULARY,
    }


def shapes(layers: int, form: str) -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes."""
    pre = "model" if form == "one by one" else "model.language_model"
    head = (VOCABULARY, HIDDEN)
    found: dict[str, tuple[int, ...]] = {f"{pre}.embed_tokens.weight": head}
    for n in range(layers):
        layer, square = f"{pre}.layers.{n}", (HEADS * HEAD_DIM, HIDDEN)
        found |= {f"{layer}.self_attn.{p}_proj.weight": square for p in "qkv"}
        found |= {
            f"{layer}.self_attn.o_proj.weight": square[::-1],
            f"{layer}.self_attn.q_norm.weight": (HEAD_DIM,),
            f"{layer}.self_attn.k_norm.weight": (HEAD_DIM,),
            f"{layer}.input_layernorm.weight": (HIDDEN,),
            f"{layer}.post_attention_layernorm.weight": (HIDDEN,),
            f"{layer}.mlp.gate.weight": (EXPERTS, HIDDEN),
        }
        if form == "fused":
            found[f"{layer}.mlp.experts.gate_up_proj"] = (EXPERTS, HIDDEN, 2 * INTERMEDIATE)
            found[f"{layer}.mlp.experts.down_proj"] = (EXPERTS, INTERMEDIATE, HIDDEN)
            continue
        for e in range(EXPERTS):
            expert = f"{layer}.mlp.experts.{e}"
            found |= {f"{expert}.{p}_proj.weight": (INTERMEDIATE, HIDDEN) for p in ("gate", "up")}
            found[f"{expert}.down_proj.weight"] = (HIDDEN, INTERMEDIATE)
    return found | {f"{pre}.norm.weight": (HIDDEN,), "lm_head.weight": head}


def make(folder: Path, layers: int, form: str) -> None:
    """Write one form of the model."""
    write(folder, shapes(layers, form), 10**9, layers)
    declared = config(layers)
    if form == "fused":
        declared = {
            "model_type": "qwen3_vl_moe",
            "torch_dtype": "bfloat16",
            "text_config": declared,
        }
    (folder / "config.json").write_text(json.dumps(declared))
    for file in EXAMPLE.glob("token*"):
        shutil.copyfile(file, folder / file.name)


def main() -> None:
    """Parse the arguments, make both forms, and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, help="where to work")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.dir) as name:
        for form in FORMS:
            source = Path(name) / "source"
            make(source, args.layers, form)
            sizes = sorted(2 * prod(shape) for shape in shapes(args.layers, form).values())
            stack = 2 * EXPERTS * HIDDEN * INTERMEDIATE
            if not args.json:
                print(
                    f"experts {form}: {sum(sizes) / 1e6:,.0f} MB, largest source tensor "
                    f"{sizes[-1] / 1e6:,.0f} MB, largest stack {stack / 1e6:,.0f} MB dense and "
                    f"{stack / 1e6 * 4.5 / 16:,.0f} MB in 4 bits"
                )
            contenders = {
                "requant": lambda out, source=source: [
                    *requant(source, out, "--bits", "4", "--layout", "mlx-lm")
                ],
                "mlx_lm.convert": lambda out, source=source: [
                    sys.executable, "-m", "mlx_lm", "convert", "--hf-path", str(source),
                    "--mlx-path", str(out), "-q", "--q-bits", "4",
                ],
                "import mlx_lm": lambda out: [sys.executable, "-c", "import mlx_lm"],
            }  # fmt: skip
            report(rounds(contenders, Path(name), args.runs), "requant", args.json)
            shutil.rmtree(source)


if __name__ == "__main__":
    main()
