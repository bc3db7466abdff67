"""Names of published conversions: what the source is called, and what its layers became."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import requant
from requant.reports.repository_name import repository_name, source_name

MICRO = Path(__file__).parents[2] / "examples" / "micro-llama"
RECIPE = """
[[rules]]
match = "mlp"
spec = 3
"""


@pytest.mark.parametrize(
    ("options", "suffix"),
    [
        ({"bits": 4}, "4bit"),
        ({"bits": 6}, "6bit"),
        ({"bits": 8, "group_size": 32}, "8bit"),
        ({"bits": 3, "search": "fast"}, "3bit"),
        ({"mode": "mxfp4"}, "mxfp4"),
        ({"mode": "mxfp8"}, "mxfp8"),
        ({"mode": "nvfp4"}, "nvfp4"),
        ({"dequantize": True}, "bf16"),
        ({"dequantize": True, "dtype": "float16"}, "fp16"),
        ({"dequantize": True, "dtype": "float32"}, "fp32"),
        ({"recipe": "mixed_3_6"}, "mixed_3_6"),
        ({"recipe": "ends-8", "bits": 4}, "ends-8"),
        ({"bits": 4, "overrides": ["embed_tokens=8"]}, "4bit"),
        ({"bits": 8, "overrides": ["_proj=5"]}, "5bit"),
        ({"bits": 4, "overrides": ["_proj=mxfp8"]}, "mxfp8"),
        ({"bits": 6, "only": ["down_proj"]}, "6bit"),
    ],
)
def test_what_is_quantized_gives_the_suffix(options: dict[str, Any], suffix: str) -> None:
    plan = requant.plan(MICRO, layout="keep", **options)
    name = repository_name("Llama-3.2-1B", plan.config, plan.layers, options.get("recipe"))
    assert name == f"Llama-3.2-1B-{suffix}"


def test_a_budget_and_a_recipe_file(tmp_path: Path) -> None:
    plan = requant.plan(MICRO, layout="keep", bits=4)
    bits = {"4": "4.0", "4.5": "4.5", "3.25": "3.25", f"{plan.parameters}B": "8.0"}
    for budget, text in bits.items():
        name = repository_name("m", plan.config, plan.layers, "chosen", budget)
        assert name == f"m-{text}bit"
    recipe = tmp_path / "mine.toml"
    recipe.write_text(RECIPE)
    plan = requant.plan(MICRO, layout="keep", bits=4, recipe=recipe)
    assert repository_name("m", plan.config, plan.layers, str(recipe)) == "m-mine"


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("Qwen3-8B", "Qwen3-8B"),
        ("Qwen3-8B-AWQ", "Qwen3-8B"),
        ("Qwen2.5-7B-Instruct-GPTQ-Int4", "Qwen2.5-7B-Instruct"),
        ("Llama-2-7B-GPTQ-4bit-128g", "Llama-2-7B"),
        ("Qwen3-235B-A22B-FP8", "Qwen3-235B-A22B"),
        ("Llama-3.3-70B-Instruct-FP8-dynamic", "Llama-3.3-70B-Instruct"),
        ("Meta-Llama-3.1-8B-Instruct-quantized.w4a16", "Meta-Llama-3.1-8B-Instruct"),
        ("Foo-W4A16-G128", "Foo"),
        ("DeepSeek-R1-NVFP4", "DeepSeek-R1"),
        ("gpt-oss-20b", "gpt-oss-20b"),
        ("gpt-oss-20b-MXFP4-Q8", "gpt-oss-20b"),
        ("gemma-3-4b-it-qat-q4_0-unquantized", "gemma-3-4b-it-qat"),
        ("Llama-3.2-1B-Instruct-unsloth-bnb-4bit", "Llama-3.2-1B-Instruct"),
        ("Llama-3.2-1B-Instruct-UD-Q4_K_XL", "Llama-3.2-1B-Instruct"),
        ("Foo-i1-GGUF", "Foo"),
        ("Llama-3.2-1B-IQ4_XS", "Llama-3.2-1B"),
        ("Qwen3-4B-MLX-4bit", "Qwen3-4B"),
        ("Llama-3.2-1B-6bit", "Llama-3.2-1B"),
        ("phi-4-bf16", "phi-4"),
        ("Qwen3-30B-A3B-mixed-3-6bit", "Qwen3-30B-A3B"),
        ("Qwen3-1.7B-4bit-DWQ-053125", "Qwen3-1.7B"),
        ("Foo-int4-AutoRound", "Foo"),
        ("Phi-3-mini-128k-instruct", "Phi-3-mini-128k-instruct"),
        ("TinyLlama-1.1B-Chat-v1.0", "TinyLlama-1.1B-Chat-v1.0"),
        ("4bit", "4bit"),
        ("my model (new)", "my-model-new"),
    ],
)
def test_a_suffix_of_the_source_is_replaced(source: str, name: str) -> None:
    assert repository_name(source, {}, [], "mixed_4_6") == f"{name}-mixed_4_6"


def test_the_name_of_a_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "Llama-3.2-1B"
    model.mkdir()
    cached = tmp_path / "hub" / "models--org--Qwen3-8B" / "snapshots" / ("0" * 40)
    monkeypatch.chdir(model)
    sources = {
        "org/Qwen3-8B": "Qwen3-8B",
        "org/Llama-3.2-1B-GGUF:Q4_K_M": "Llama-3.2-1B-GGUF",
        ".": "Llama-3.2-1B",
        f"{model}/": "Llama-3.2-1B",
        str(model / "gemma-2b.Q8_0-00001-of-00003.gguf"): "gemma-2b.Q8_0",
        str(cached): "Qwen3-8B",
    }
    assert {source: source_name(source) for source in sources} == sources
