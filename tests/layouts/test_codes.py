"""Quantized sources under mlx-lm's layout: the codes come through, or the report says why not.

The referee is the layout of the same model dequantized, which ``test_families`` holds
against mlx-lm itself: values that codes represent are moved as the codes are.
"""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from requant.api.convert import convert, plan
from requant.errors import OutOfRangeError, UsageError
from requant.execution.resources import BASE_MEMORY_BYTES, MLX_LM_MEMORY_BYTES, plan_resources
from requant.formats.base import RowRange, SourceLayer
from requant.layouts.row_ranges import stacked_global_scales
from requant.sources.open import read_checkpoint
from tests.support.families import model_types, small_config
from tests.support.hub_forms import FORMS
from tests.support.mlx_lm_conversion import (
    MLX_LM,
    NEW_FORMS,
    class_checkpoint,
    write_mlx_checkpoint,
)
from tests.support.mlx_reference import as_bytes, load
from tests.support.plan_texts import note_texts, reason_text
from tests.support.published_models import as_awq, published

pytestmark = pytest.mark.sweep(1)

# Families whose rule decodes or transposes a layer that could be quantized.
REENCODED = {
    "bailing_hybrid": {"embed_q"},
    "bailing_moe_v3": {"embed_q"},
    "deepseek_v3": {"embed_q"},
    "deepseek_v32": {"embed_q"},
    # Every projection times a multiplier of the config.
    "falcon_h1": {
        *("embed_tokens", "lm_head", "in_proj", "out_proj", "q_proj", "k_proj"),
        *("o_proj", "gate_proj", "down_proj"),
    },
    "glm4_moe_lite": {"embed_q"},
    "glm_moe_dsa": {"embed_q"},
    "gpt2": {"c_attn", "c_fc", "c_proj"},
    "kimi_k25": {"embed_q"},
    "longcat_flash": {"embed_q"},
    "longcat_flash_ngram": {"embed_q"},
    "mistral4": {"embed_q"},
}


# minimax is published in FP8, which is not a dense form.
@pytest.mark.parametrize(
    "model_type", [t for t in FORMS if t in model_types() and t != "minimax" and t not in NEW_FORMS]
)
def test_codes_come_through(model_type: str, tmp_path: Path) -> None:
    """keep, then mlx-lm, then dense, gives what keep, then dense, then mlx-lm gives."""
    published(tmp_path / "m", model_type)
    convert(tmp_path / "m", tmp_path / "q", bits=4, group_size=32, layout="keep")
    report = convert(tmp_path / "q", tmp_path / "qm", layout="mlx-lm")
    convert(tmp_path / "qm", tmp_path / "qmd", dequantize=True, layout="keep")
    convert(tmp_path / "q", tmp_path / "qd", dequantize=True, layout="keep")
    convert(tmp_path / "qd", tmp_path / "qdm", dequantize=True, layout="mlx-lm")
    ours, expected = load(tmp_path / "qmd"), load(tmp_path / "qdm")
    assert ours.keys() == expected.keys()
    reencoded = {x.layer for x in report.plan.layers if x.exactness == "re-encoded"}
    different = {name for name in expected if as_bytes(ours[name]) != as_bytes(expected[name])}
    assert different <= {f"{layer}.weight" for layer in reencoded}
    kinds = {layer.rpartition(".")[2] for layer in reencoded}
    assert kinds == REENCODED.get(model_type, set())
    assert set(report.errors) == reencoded
    assert all(0 < error.relative_rms < 0.2 for error in report.errors.values())

    from mlx_lm.utils import load_model

    load_model(tmp_path / "qm")  # strict: every name and shape is the class's
    assert any(x.treatment == "kept" for x in report.plan.layers)


# -- sources that take other ways --------------------------------------------------------------
@pytest.mark.parametrize("options", [{}, {"bits": 8}, {"mode": "mxfp4"}, {"dequantize": True}])
def test_packed_experts_are_stacked(options: dict, tmp_path: Path) -> None:
    """AutoAWQ experts go straight into a stack, as by way of a folder under their own names."""
    published(tmp_path / "awq", "qwen3_moe")
    as_awq(tmp_path / "awq")
    convert(tmp_path / "awq", tmp_path / "kept", layout="keep", **options)
    convert(tmp_path / "kept", tmp_path / "expected", layout="mlx-lm", **options)
    report = convert(tmp_path / "awq", tmp_path / "ours", layout="mlx-lm", threads=2, **options)
    ours, expected = load(tmp_path / "ours"), load(tmp_path / "expected")
    assert ours.keys() == expected.keys()
    assert [name for name in ours if as_bytes(ours[name]) != as_bytes(expected[name])] == []
    blocks = [
        json.loads((tmp_path / who / "config.json").read_text()).get("quantization")
        for who in ("ours", "expected")
    ]
    assert blocks[0] == blocks[1]
    stacked = [x for x in report.plan.layers if "switch_mlp" in x.layer]
    assert {x.source for x in stacked} == {"awq gemm 4-bit g32"}
    own_group = "no group size was asked for: keeps its codes in groups of 32"
    assert {reason_text(x) for x in stacked} == {own_group if "bits" in options else ""}


def test_packed_rows_that_are_computed(tmp_path: Path) -> None:
    """DeepSeek's kv_b_proj from AutoAWQ: one half keeps its codes, the other is re-encoded."""
    published(tmp_path / "awq", "deepseek_v3")
    as_awq(tmp_path / "awq")
    report = convert(tmp_path / "awq", tmp_path / "ours", layout="mlx-lm")
    layers = {x.layer.rpartition(".")[2]: x for x in report.plan.layers}
    assert layers["embed_q"].exactness == "re-encoded"
    assert layers["embed_q"].treatment == "requantized"
    assert layers["unembed_out"].treatment == "kept"
    assert any("embed_q" in note for note in note_texts(report.plan.notes))


def test_experts_of_several_encodings_keep_their_codes(tmp_path: Path) -> None:
    published(tmp_path / "m", "qwen3_moe")
    convert(
        tmp_path / "m",
        tmp_path / "q",
        bits=4,
        layout="keep",
        overrides=[r"experts\.1\.up_proj=6:32"],
    )
    report = convert(tmp_path / "q", tmp_path / "qm", layout="mlx-lm")
    mixed = [x for x in report.plan.layers if x.layer.endswith("switch_mlp.up_proj")]
    assert {x.target for x in mixed} == {"affine 6-bit g32"}
    assert {x.exactness for x in mixed} == {"exact"}
    assert {x.source for x in mixed} == {"affine 4-bit g64 and affine 6-bit g32"}
    convert(tmp_path / "qm", tmp_path / "ours", dequantize=True, layout="keep")
    convert(tmp_path / "q", tmp_path / "dense", dequantize=True, layout="keep")
    ours, dense = load(tmp_path / "ours"), load(tmp_path / "dense")
    for name in (name for name in ours if "switch_mlp.up_proj" in name):
        pre = name.partition("switch_mlp")[0]
        parts = [dense[f"{pre}experts.{e}.up_proj.weight"] for e in range(ours[name].shape[0])]
        assert mx.array_equal(ours[name], mx.stack(parts))


@pytest.mark.parametrize("spec", [{"bits": 2}, {"bits": 3, "group_size": 32}, {"mode": "nvfp4"}])
def test_what_the_rule_computes_on_values_gets_8_bits(spec: dict[str, Any], tmp_path: Path) -> None:
    """Nobody asked for new codes: fewer than 8 bits would lose what the source has not lost."""
    published(tmp_path / "m", "deepseek_v3")
    convert(tmp_path / "m", tmp_path / "q", layout="keep", **{"group_size": None} | spec)
    layers = plan(tmp_path / "q", layout="mlx-lm").layers
    requantized = [x for x in layers if x.treatment == "requantized"]
    assert requantized
    assert {x.target for x in requantized} == {"affine 8-bit g32"}
    assert {x.exactness for x in layers if x.treatment == "kept"} == {"exact"}


def test_bits_on_a_quantized_source_are_mlx_lm_s_choice(tmp_path: Path) -> None:
    """A layer takes what mlx-lm would choose in a dense source, whatever it was before."""
    published(tmp_path / "m", "qwen3_moe")
    convert(tmp_path / "m", tmp_path / "q", bits=4, layout="keep")
    made = plan(tmp_path / "q", bits=8, layout="mlx-lm", overrides=["down_proj=skip"])
    by_layer = {x.layer: x for x in made.layers}
    assert by_layer["model.layers.1.mlp.switch_mlp.up_proj"].target == "affine 8-bit g64"
    assert by_layer["model.layers.1.mlp.switch_mlp.down_proj"].treatment == "kept"
    gate = by_layer["model.layers.1.mlp.gate"]
    assert (gate.treatment, gate.target) == ("quantized", "affine 8-bit g64")
    assert any("model.layers.1.mlp.gate" in note for note in note_texts(made.notes))


def test_a_layer_that_the_class_holds_dense_is_decoded(tmp_path: Path) -> None:
    """DeepSeek's router is not a linear layer: codes there could not be loaded."""
    published(tmp_path / "m", "deepseek_v3")
    gate = "model.layers.1.mlp.gate"
    convert(tmp_path / "m", tmp_path / "q", bits=4, group_size=32, layout="keep",
            overrides=[f"{gate}$=8:32"])  # fmt: skip
    made = plan(tmp_path / "q", layout="mlx-lm")
    found = next(x for x in made.layers if x.layer == gate)
    assert (found.treatment, found.target) == ("dequantized", "BF16")
    assert gate not in made.config["quantization"]
    assert any(gate in note and "dequantized" in note for note in note_texts(made.notes))
    with pytest.raises(UsageError, match=r"holds model\.layers\.1\.mlp\.gate dense"):
        plan(tmp_path / "q", layout="mlx-lm", overrides=[f"{gate}$=8"])


@pytest.mark.skipif(MLX_LM < (0, 32), reason="mlx-lm has no global scales before 0.32")
def test_nvfp4_global_scales(tmp_path: Path) -> None:
    """A stack with one scale an expert keeps both through another run of the layout."""
    from mlx.utils import tree_flatten
    from mlx_lm.utils import load_model, quantize_model, save_config

    class_checkpoint(tmp_path / "m", small_config("qwen3_moe"))
    model, config = load_model(tmp_path / "m")
    model, config = quantize_model(model, config, 16, 4, mode="nvfp4", global_scale=True)
    weights = dict(tree_flatten(model.parameters()))
    write_mlx_checkpoint(tmp_path / "q", config, weights)
    save_config(config, tmp_path / "q" / "config.json")
    report = convert(tmp_path / "q", tmp_path / "ours", layout="mlx-lm")
    ours = load(tmp_path / "ours")
    assert ours.keys() == weights.keys()
    assert [name for name in ours if as_bytes(ours[name]) != as_bytes(weights[name])] == []
    assert {x.exactness for x in report.plan.layers} == {"exact"}
    load_model(tmp_path / "ours")


def test_global_scales_of_stacked_and_split_matrices(tmp_path: Path) -> None:
    scales = {f"{n}.global_scale": mx.array([float(n)]) for n in range(2)}
    scales["two.global_scale"] = mx.array([5.0, 6.0])
    write_mlx_checkpoint(tmp_path / "s", {"model_type": "llama"}, scales)
    tensors = read_checkpoint(tmp_path / "s").tensors

    def layer(name: str, *shape: int) -> SourceLayer:
        return SourceLayer(
            path=name,
            parts={"global_scale": tensors[f"{name}.global_scale"]},
            encoding=None,
            shape=shape,
            dtype="F32",
        )

    zero, one, two = layer("0", 4, 16), layer("1", 4, 16), layer("two", 2, 4, 16)

    def read(shape: tuple[int, ...], *runs: RowRange) -> list[float] | None:
        made = stacked_global_scales("x", shape, runs)
        if made is None:
            return None
        data = b"".join(
            (tmp_path / "s" / r.file).read_bytes()[r.offset : r.offset + r.nbytes]
            for r in made.ranges
        )
        assert made.info.nbytes == len(data)
        return np.frombuffer(data, np.float32).tolist()

    assert read((2, 4, 16), RowRange(zero, 0, 4), RowRange(one, 0, 4)) == [0, 1]
    assert read((2, 2, 16), RowRange(zero, 2, 2), RowRange(one, 0, 2)) == [0, 1]
    assert read((2, 2, 16), RowRange(zero, 0, 4)) == [0, 0]
    assert read((8, 16), RowRange(zero, 0, 4), RowRange(one, 0, 4)) is None
    assert read((2, 4, 16), RowRange(two, 0, 8)) == [5, 6]
    assert read((2, 16), RowRange(two, 5, 2)) == [6]
    assert read((4, 16), RowRange(two, 2, 4)) is None


@pytest.mark.slow
@pytest.mark.skipif(bool(NEW_FORMS), reason="mlx-lm rejects this form before 0.32")
def test_the_memory_of_computed_tensors_is_in_the_budget(tmp_path: Path) -> None:
    """A fused stack is transposed whole: its values and those of the result are held at once."""
    text = small_config("qwen3_vl_moe")["text_config"] | {"num_experts": 512}
    published(tmp_path / "m", "qwen3_vl_moe", {"model_type": "qwen3_vl_moe", "text_config": text})
    made = plan(tmp_path / "m", bits=4, group_size=32, layout="mlx-lm")
    kept = plan(tmp_path / "m", bits=4, group_size=32, layout="keep")
    stack = 2 * 512 * 64 * 128  # bytes of one projection of all experts; two are stored fused
    siblings = plan_resources(made, 1).peak_bytes - plan_resources(kept, 1).peak_bytes
    assert siblings == MLX_LM_MEMORY_BYTES + min(2 * (2 * 3 + 2) * stack, 64 << 20)
    more = plan_resources(made, 3).overhead_bytes - plan_resources(made, 1).overhead_bytes
    assert more == 2 * stack
    least = plan_resources(made, 1, 10**9).overhead_bytes + BASE_MEMORY_BYTES
    with pytest.raises(OutOfRangeError, match="mlx-lm and the tensors that it computes"):
        plan_resources(made, 1, least)
    assert plan_resources(made, 8, least + stack + (1 << 20)).threads == 2


# -- rows that are interleaved -----------------------------------------------------------------
def gpt_oss(folder: Path, coded: bool) -> None:
    """A gpt-oss folder whose gate and up rows alternate, more of them than are listed singly."""
    experts, inner = 5, 224
    config = small_config("gpt_oss") | {"num_local_experts": experts, "intermediate_size": inner}
    hidden = config["hidden_size"]
    class_checkpoint(folder, config)
    weights = {k: v for k, v in load(folder).items() if ".experts." not in k}
    mx.eval(weights)
    rng = np.random.default_rng(5)
    for n in range(config["num_hidden_layers"]):
        pre = f"model.layers.{n}.mlp.experts"
        for name, rows, columns in (
            ("gate_up_proj", 2 * inner, hidden),
            ("down_proj", hidden, inner),
        ):
            bias = rng.standard_normal((experts, rows)).astype(np.float32)
            weights[f"{pre}.{name}_bias"] = mx.array(bias).astype(mx.bfloat16)
            if not coded:
                dense = rng.standard_normal((experts, rows, columns)).astype(np.float32)
                weights[f"{pre}.{name}.weight"] = mx.array(dense).astype(mx.bfloat16)
                continue
            blocks = rng.integers(0, 256, (experts, rows, columns // 32, 16)).astype(np.uint8)
            scales = rng.integers(110, 130, (experts, rows, columns // 32)).astype(np.uint8)
            weights[f"{pre}.{name}_blocks"] = mx.array(blocks)
            weights[f"{pre}.{name}_scales"] = mx.array(scales)
    block = {"quantization_config": {"quant_method": "mxfp4"}} if coded else {}
    write_mlx_checkpoint(folder, config | block | {"torch_dtype": "bfloat16"}, weights)


@pytest.mark.parametrize("coded", [True, False])
def test_alternating_rows_are_mlx_lm_s(coded: bool, tmp_path: Path) -> None:
    """gpt-oss stores gate and up row by row in turns; the codes of each stay as they are."""
    from mlx.utils import tree_flatten
    from mlx_lm.utils import load_model

    gpt_oss(tmp_path / "m", coded)
    expected = dict(tree_flatten(load_model(tmp_path / "m")[0].parameters()))
    convert_options: dict[str, Any] = {} if coded else {"dequantize": True}
    for options in ({}, {"threads": 2, "chunk_bytes": 3000}):
        report = convert(
            tmp_path / "m",
            tmp_path / "ours",
            layout="mlx-lm",
            force=True,
            **convert_options,
            **options,
        )
        ours = load(tmp_path / "ours")
        assert ours.keys() == expected.keys()
        assert [name for name in ours if as_bytes(ours[name]) != as_bytes(expected[name])] == []
        assert {x.exactness for x in report.plan.layers} == {"exact"}


@pytest.mark.parametrize("options", [{"bits": 4}, {"dequantize": True}])
def test_alternating_rows_are_decoded_as_they_are_kept(options: dict, tmp_path: Path) -> None:
    gpt_oss(tmp_path / "m", coded=True)
    convert(tmp_path / "m", tmp_path / "kept", layout="mlx-lm")
    convert(tmp_path / "kept", tmp_path / "expected", layout="mlx-lm", **options)
    convert(tmp_path / "m", tmp_path / "ours", layout="mlx-lm", chunk_bytes=20000, **options)
    ours, expected = load(tmp_path / "ours"), load(tmp_path / "expected")
    assert ours.keys() == expected.keys()
    assert [name for name in ours if as_bytes(ours[name]) != as_bytes(expected[name])] == []


def test_a_pattern_on_the_source_s_names_is_advised_to_keep(tmp_path: Path) -> None:
    published(tmp_path / "m", "qwen3_moe")
    with pytest.raises(UsageError, match=r"experts\.0\..* --layout keep"):
        plan(tmp_path / "m", bits=4, overrides=[r"experts\.0\.up_proj=8"])
