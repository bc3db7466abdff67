"""Time and memory of laying out a mixture of experts of some 19,000 tensors, from headers alone.

48 layers of 128 experts, one tensor each, in files without data: mlx-lm's qwen3_moe and mlx-vlm's
qwen3_vl_moe. Each run is a process of its own, which imports the library. Printed are seconds
of CPU for the import, which the library's own convert needs too, the layout and the whole plan.

    python benchmarks/layout.py                  three runs each
    python benchmarks/layout.py --layers 12      smaller
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

EXPERTS = 128
FAMILIES = {"mlx-lm": "qwen3_moe", "mlx-vlm": "qwen3_vl_moe"}
# Imports, then lays out and plans; seconds and megabytes as JSON.
_RUN = """
import importlib, json, resource, sys, time
from pathlib import Path
import requant
from requant.layouts.layout import library_layout
from requant.layouts.conversion_trace import Shown
from requant.libraries import LIBRARIES, Request
from requant.quantization.config import Quantization
from requant.sources.open import read_checkpoint

def mb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

library, folder, family = LIBRARIES[sys.argv[1]], Path(sys.argv[2]), sys.argv[3]
clock = time.process_time
began = clock()
importlib.import_module(f"{library.package}.convert")
importlib.import_module(f"{library.package}.models.{family}")
imported, before = clock(), mb()
checkpoint = read_checkpoint(folder)
infos = {name: tensor.info for name, tensor in checkpoint.tensors.items()}
target = Quantization.affine(64, 4)
read = clock()
library_layout(library, Shown(checkpoint.config, infos), Request(target))
laid_out = clock()
requant.plan(folder, layout=library.name, quantization=target)
planned = clock()
print(json.dumps({"import": imported - began, "layout": laid_out - read, "plan": planned - laid_out,
                  "mb": mb() - before, "tensors": len(infos)}))
"""


def config(library: str, layers: int) -> dict[str, Any]:
    """The config of a Qwen3 MoE of these sizes, with a small tower for images if it sees."""
    from tests.support.class_models import merged, small_config

    from requant.libraries import LIBRARIES

    text = {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 8,
        "vocab_size": 151936,
        "mlp_only_layers": [],
        "decoder_sparse_step": 1,
    }
    family = FAMILIES[library]
    package = f"{LIBRARIES[library].package}.models.{family}"
    small = small_config(LIBRARIES[library], package)
    if "text_config" not in small:
        return small | text
    vision = {"out_hidden_size": 2048, "deepstack_visual_indexes": [0, 1]}
    return merged(small, {"text_config": text, "vision_config": vision})


def make(library: str, folder: Path, layers: int) -> int:
    """Write a folder whose weight file is a header and a hole; how many tensors it has."""
    from mlx.utils import tree_flatten
    from tests.support.class_models import class_model

    from requant.checkpoints.safetensors_header import build_header
    from requant.core.dtypes import TensorInfo
    from requant.libraries import LIBRARIES

    declared = config(library, layers)
    infos = {}
    for name, array in tree_flatten(class_model(LIBRARIES[library], declared, folder).parameters()):
        before, stacked, after = name.partition(".switch_mlp.")
        if not stacked:
            infos[name] = TensorInfo("BF16", tuple(array.shape))
            continue
        for expert in range(EXPERTS):
            info = TensorInfo("BF16", tuple(array.shape[1:]))
            infos[f"{before}.experts.{expert}.{after}"] = info
    (folder / "config.json").write_text(json.dumps(declared))
    header = build_header(infos, {"format": "pt"})[0]
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(x.nbytes for x in infos.values()))
    return len(infos)


def main() -> None:
    """Parse the arguments, make the files, and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    print("| library, class | tensors | import | layout | plan | MB beyond the import |")
    print("|---|---:|---:|---:|---:|---:|")
    for library, family in FAMILIES.items():
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / family
            tensors = make(library, folder, args.layers)
            command = [sys.executable, "-c", _RUN, library, str(folder), family]
            results = []
            for _ in range(args.runs):
                run = subprocess.run(command, capture_output=True, text=True, check=True)
                results.append(json.loads(run.stdout.splitlines()[-1]))
        middle = {key: statistics.median(x[key] for x in results) for key in results[0]}
        times = " | ".join(f"{middle[key]:.2f} s" for key in ("import", "layout", "plan"))
        print(f"| {library}, {family} | {tensors:,} | {times} | {middle['mb']:.0f} |")


if __name__ == "__main__":
    main()
