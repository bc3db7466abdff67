"""The methods of `real_models.py`: each makes the weights of a model, and says how large it is.

Methods of requant, of the quantizers of the `gguf` package, of mlx-lm (`mlx_lm.gptq`, `mlx_lm.awq`,
`mlx_lm.dwq`, which need a GPU to end soon) and of llama.cpp (`--llama-quantize`). Every result is
decoded to float32.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy_model import Weights, read_tensors, read_weights

import requant
from requant.kernels.quantize import QuantizedTensors, dequantize
from requant.quantization.config import Quantization

RECIPES = ("mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6")
TOOLS = Path(__file__).parent / "mlx_lm_tools.py"


class Made(NamedTuple):
    """What a method made."""

    weights: Weights  # float32; may lack tensors that stay what they are
    nbytes: int  # of all tensors as they are stored


class Task:
    """A dense model, and the calibration text of its methods."""

    def __init__(self, folder: Path, cache: Path, args: argparse.Namespace) -> None:
        self.folder, self.cache = folder, cache
        self.text: Path | None = args.calibration
        self.tokens: int = args.calibration_tokens
        self.llama_quantize: Path | None = args.llama_quantize
        self.parameters = sum(array.size for _, array in read_tensors(folder))

    @property
    def calibration(self) -> Path:
        """The calibration text."""
        if self.text is None:
            sys.exit("rows with data need --calibration TEXT")
        return self.text

    @cached_property
    def statistics(self) -> Path:
        """Statistics of the model on the calibration text, with Hessians; made once."""
        name = f"{self.folder.name}-{self.calibration.stem}-{self.tokens}.safetensors"
        file = self.cache / name
        if not file.exists():
            options: dict[str, Any] = {"hessian": True, "tokens": self.tokens}
            requant.calibrate(self.folder, file, text=[self.calibration], **options)
        return file


def options_of(task: Task, spec: str) -> dict[str, Any]:
    """``4:64``, a mode, a recipe, or ``=`` and one of these, as keyword arguments."""
    if spec.startswith("="):
        plan = requant.plan(task.folder, layout="keep", **options_of(task, spec[1:]))
        return {"budget": f"{plan.bytes_out}B"}
    if spec.startswith("mixed_"):
        return {"recipe": spec}
    if not spec[0].isdigit():
        return {"mode": spec}
    bits, _, group_size = spec.partition(":")
    return {"bits": int(bits), "group_size": int(group_size or 64)}


def of_requant(has_data: bool = False, **options: Any) -> Callable[[Task, str, Path], Made]:
    """A conversion by requant."""

    def make(task: Task, spec: str, scratch: Path) -> Made:
        asked = options | options_of(task, spec)
        if has_data:
            asked["statistics"] = task.statistics
        requant.convert(task.folder, scratch / "out", layout="keep", **asked)
        return read_output(scratch / "out")

    return make


def read_output(folder: Path) -> Made:
    """The values of a quantized folder, without the rounding of a 16-bit result."""
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
    return Made(found, sum(array.nbytes for array in stored.values()))


def of_gguf(task: Task, spec: str, scratch: Path) -> Made:
    """The quantizers of the `gguf` package, all matrices in one type."""
    from gguf import GGMLQuantizationType, quants

    kind = GGMLQuantizationType[spec]
    found: Weights = {}
    nbytes = 0
    for name, array in read_tensors(task.folder):
        wide = array.astype(np.float32)
        if wide.ndim < 2:
            found[name], nbytes = wide, nbytes + array.nbytes
            continue
        blocks = quants.quantize(wide, kind)
        nbytes += blocks.nbytes
        found[name] = quants.dequantize(blocks, kind)
    return Made(found, nbytes)


def of_mlx_lm(tool: str) -> Callable[[Task, str, Path], Made]:
    """A tool of `mlx_lm.quant` on the calibration text."""

    def make(task: Task, spec: str, scratch: Path) -> Made:
        bits, _, group_size = spec.partition(":")
        command = [sys.executable, str(TOOLS), tool, str(task.calibration), str(task.tokens)]
        command += ["--model", str(task.folder), "--mlx-path", str(scratch / "out")]
        subprocess.run([*command, "--bits", bits, "--group-size", group_size or "64"], check=True)
        return read_output(scratch / "out")

    return make


# Of llama.cpp's tensors of a block, the layers that have the same input.
LLAMA_NAMES = {
    "self_attn.q_proj": ("attn_q", "attn_k", "attn_v"),
    "self_attn.o_proj": ("attn_output",),
    "mlp.gate_proj": ("ffn_gate", "ffn_up"),
    "mlp.down_proj": ("ffn_down",),
}


def write_imatrix(task: Task, file: Path) -> None:
    """The statistics in llama.cpp's form."""
    from gguf import GGUFWriter

    writer = GGUFWriter(file, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", [task.calibration.name])
    writer.add_uint32("imatrix.chunk_count", max(task.tokens // 512, 1))
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, array in read_tensors(task.statistics):
        layer, _, role = name.rpartition(".")
        block, _, kind = layer.removeprefix("model.layers.").partition(".")
        for other in LLAMA_NAMES.get(kind, ()) if role == "mean_square" else ():
            writer.add_tensor(f"blk.{block}.{other}.weight.in_sum2", array[None] * task.tokens)
            count = np.full((1, 1), task.tokens, np.float32)
            writer.add_tensor(f"blk.{block}.{other}.weight.counts", count)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def of_llama(has_data: bool) -> Callable[[Task, str, Path], Made]:
    """llama.cpp's tool, on the published file whose values are the dense model."""

    def make(task: Task, spec: str, scratch: Path) -> Made:
        if task.llama_quantize is None:
            sys.exit("rows of llama need --llama-quantize TOOL")
        options: list[str] = []
        if has_data:
            write_imatrix(task, scratch / "imatrix.gguf")
            options = ["--imatrix", str(scratch / "imatrix.gguf")]
        source, made = task.cache / f"{task.folder.name}.gguf", scratch / "made.gguf"
        command = [str(task.llama_quantize), "--allow-requantize", *options]
        subprocess.run([*command, str(source), str(made), spec], check=True, capture_output=True)
        plan = requant.plan(made, layout="keep")
        requant.convert(made, scratch / "out", dequantize=True, dtype="float32", layout="keep")
        return Made(read_weights(scratch / "out"), plan.bytes_in)

    return make


METHODS: dict[str, Callable[[Task, str, Path], Made]] = {
    "rule": of_requant(),
    "fast": of_requant(search="fast"),
    "best": of_requant(search="best"),
    "imatrix": of_requant(has_data=True, search="best"),
    "gptq": of_requant(has_data=True, search="best", gptq=True),
    "gguf": of_gguf,
    "mlx_lm.gptq": of_mlx_lm("gptq"),
    "mlx_lm.awq": of_mlx_lm("awq"),
    "mlx_lm.dwq": of_mlx_lm("dwq"),
    "llama": of_llama(has_data=False),
    "llama-imatrix": of_llama(has_data=True),
}
