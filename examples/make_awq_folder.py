"""Make a small AutoAWQ folder of a dense one, for the other examples; 4 bits, groups of 64.

    python examples/make_awq_folder.py examples/micro-llama micro-llama-awq

Weights are rounded without AWQ's search for scales: the example is about how codes are stored.
"""

import json
import shutil
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np

GROUP = 64
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble n of a word holds column ORDER[n] of eight


def pack(codes: np.ndarray) -> np.ndarray:
    """Pack codes 0 to 15 ``(rows, n)`` into AutoAWQ's words ``(rows, n / 8)``."""
    eights = codes.reshape(codes.shape[0], -1, 8)[..., ORDER].astype(np.uint32)
    return (eights << np.arange(0, 32, 4, dtype=np.uint32)).sum(-1, dtype=np.uint32).view(np.int32)


def quantize(weight: np.ndarray) -> dict[str, mx.array]:
    """Quantize a weight ``(out, in)`` into AutoAWQ's three tensors, stored as ``(in, out)``."""
    groups = weight.T.reshape(-1, GROUP, weight.shape[0])
    low, high = groups.min(1).clip(max=0), groups.max(1).clip(min=0)
    scales = ((high - low) / 15).clip(min=1e-6).astype(np.float16)
    zeros = np.rint(-low / scales).clip(0, 15)
    codes = (np.rint(groups / scales[:, None]) + zeros[:, None]).clip(0, 15)
    return {
        "qweight": mx.array(pack(codes.reshape(-1, weight.shape[0]))),
        "qzeros": mx.array(pack(zeros)),
        "scales": mx.array(scales),
    }


def main(source: Path, output: Path) -> None:
    """Write ``output``: projections as AWQ, everything else float16."""
    weights = {}
    for name, array in mx.load(str(source / "model.safetensors")).items():
        if name.endswith("_proj.weight"):
            dense = np.array(array.astype(mx.float32))
            layer = name.removesuffix(".weight")
            weights |= {f"{layer}.{part}": array for part, array in quantize(dense).items()}
        else:
            weights[name] = array.astype(mx.float16)
    output.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(output / "model.safetensors"), weights)
    block = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}
    block["zero_point"] = True
    config = json.loads((source / "config.json").read_text())
    config |= {"quantization_config": block, "torch_dtype": "float16"}
    (output / "config.json").write_text(json.dumps(config, indent=2))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, output / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
