"""The trained models through requant and through mlx-lm's own converter, bit for bit."""

import json
import re
from pathlib import Path

import mlx.core as mx
import pytest

from requant.api.convert import convert
from tests.support.checkpoints import model, tree
from tests.support.mlx_reference import by_mlx_lm, load, same

pytestmark = pytest.mark.sweep(1)

BITS = (2, 3, 4, 5, 6, 8)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", ["micro-llama", "qwen3-16m"])
def test_every_tensor_is_what_mlx_lm_writes(name: str, bits: int, tmp_path: Path) -> None:
    expected = by_mlx_lm(model(name), tmp_path / "theirs", quantize=True, q_bits=bits)
    convert(model(name), tmp_path / "ours", bits=bits)
    ours = load(tmp_path / "ours")
    assert ours.keys() == expected.keys()
    assert [key for key in ours if not same(ours[key], expected[key])] == []
    configs = [
        json.loads((tmp_path / who / "config.json").read_text()) for who in ("ours", "theirs")
    ]
    for key in ("quantization", "quantization_config"):
        assert configs[0][key] == configs[1][key]
    indexes = [
        json.loads((tmp_path / who / "model.safetensors.index.json").read_text())
        for who in ("ours", "theirs")
    ]
    assert indexes[0] == indexes[1]


@pytest.mark.parametrize(
    ("name", "bits"), [("micro-llama", 2), ("micro-llama", 8), ("qwen3-16m", 3), ("qwen3-16m", 4)]
)
def test_mlx_lm_loads_and_generates(name: str, bits: int, tmp_path: Path) -> None:
    import mlx_lm

    convert(model(name), tmp_path / "ours", bits=bits)
    loaded, tokenizer = mlx_lm.load(str(tmp_path / "ours"))
    text = mlx_lm.generate(loaded, tokenizer, prompt="The file", max_tokens=4)
    assert isinstance(text, str)
    assert text


@pytest.mark.parametrize("bits", BITS)
def test_moe_experts_stacked_are_what_mlx_lm_writes(bits: int, tmp_path: Path) -> None:
    source = model("micro-moe")
    expected = by_mlx_lm(source, tmp_path / "theirs", quantize=True, q_bits=bits)
    convert(source, tmp_path / "ours", bits=bits, layout="keep")
    ours = load(tmp_path / "ours")
    compared = 0
    for name, array in expected.items():
        match = re.fullmatch(r"(.*\.mlp)\.switch_mlp\.(\w+)\.(\w+)", name)
        if match:
            prefix, projection, part = match.groups()
            experts = [ours[f"{prefix}.experts.{n}.{projection}.{part}"] for n in range(8)]
            assert same(mx.stack(experts), array), name
            compared += 1
        elif not re.search(r"mlp\.gate\.", name):
            assert same(ours[name], array), name
    assert compared == 4 * 3 * 3  # layers, projections, parts


@pytest.mark.parametrize(
    ("name", "bits"), list(zip(["micro-llama", "micro-moe", "qwen3-16m"] * 2, BITS, strict=True))
)
def test_back_to_dense_is_mx_dequantize(name: str, bits: int, tmp_path: Path) -> None:
    convert(model(name), tmp_path / "quantized", bits=bits, layout="keep")
    convert(tmp_path / "quantized", tmp_path / "dense", dequantize=True, layout="keep")
    packed, dense = load(tmp_path / "quantized"), load(tmp_path / "dense")
    assert dense.keys() == load(model(name)).keys()
    for key, array in dense.items():
        path = key.removesuffix(".weight")
        if f"{path}.scales" in packed:
            triple = [packed[f"{path}.{role}"] for role in ("weight", "scales", "biases")]
            assert same(array, mx.dequantize(*triple, group_size=64, bits=bits)), key
        else:
            assert same(array, packed[key]), key


@pytest.mark.slow
@pytest.mark.parametrize("name", ["micro-llama", "micro-moe", "qwen3-16m"])
def test_same_bytes_for_any_threads_and_chunks(name: str, tmp_path: Path) -> None:
    convert(model(name), tmp_path / "reference", bits=4, threads=1)
    expected = tree(tmp_path / "reference")
    for threads, chunk_bytes in ((1, 8 << 10), (2, 8 << 10), (2, 1 << 20), (2, 1 << 30)):
        output = tmp_path / f"{threads}-{chunk_bytes}"
        convert(model(name), output, bits=4, threads=threads, chunk_bytes=chunk_bytes)
        assert tree(output) == expected
