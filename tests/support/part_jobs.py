"""Conversions that are run in parts and compared with one process: a source and options each."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from requant.importance.reader import LayerStatistics, write_statistics
from tests.support.checkpoints import MICRO_LLAMA
from tests.support.fixture_folders import fixture
from tests.support.published_models import published

Job = tuple[Path, dict[str, Any]]
KEEP_4_BITS: dict[str, Any] = {"bits": 4, "layout": "keep"}


def gptq_job(tmp_path: Path) -> Job:
    file, random_values = tmp_path / "s.safetensors", np.random.default_rng(0)
    x = random_values.normal(0, 1, (300, 128))
    hessian = (x.T @ x / 300).astype(np.float32)
    names = [f"model.layers.{n}.self_attn.{x}_proj" for n in range(4) for x in "qkv"]
    layers = {n: LayerStatistics(np.diag(hessian).copy(), np.ones(1)) for n in names}
    write_statistics(file, layers, {n: lambda _: hessian for n in names})
    return MICRO_LLAMA, {**KEEP_4_BITS, "gptq": True, "statistics": file}


def computed_job(tmp_path: Path) -> Job:
    """A model of which mlx-lm computes tensors from values."""
    published(tmp_path / "m", "deepseek_v3")
    return tmp_path / "m", {"bits": 4, "group_size": 32, "layout": "mlx-lm"}


JOBS: dict[str, Callable[[Path], Job]] = {
    "dense": lambda _: (MICRO_LLAMA, KEEP_4_BITS),
    "AWQ": lambda _: (fixture("awq-gemm-g64-skip") / "checkpoint", {"layout": "keep"}),
    "FP8": lambda _: (fixture("fp8-block-llama") / "checkpoint", KEEP_4_BITS),
    "recipe": lambda _: (MICRO_LLAMA, {"recipe": "mixed_3_6", "layout": "keep"}),
    "GGUF": lambda _: (fixture("gguf-q4_k_m") / "checkpoint" / "model.gguf", {"layout": "keep"}),
    "budget": lambda _: (MICRO_LLAMA, {"budget": 4.5, "layout": "keep"}),
    "GPTQ": gptq_job,
    "computed": computed_job,
}
