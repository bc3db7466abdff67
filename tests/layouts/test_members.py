"""Experts of a stack, or parts of a fused layer, that are stored unlike each other.

Codes of all are moved into the smallest group and the widest code; what has no codes that fit is
encoded with 8 bits while the others are moved. The referee is arithmetic over the source's own
triples, member by member.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from pytest import MonkeyPatch

import requant
from tests.support.conversions import convert
from tests.support.families import small_config
from tests.support.hub_forms import FORMS
from tests.support.layers import packers
from tests.support.mlx_lm_conversion import class_checkpoint
from tests.support.mlx_reference import affine, float_values
from tests.support.plan_texts import note_texts, reason_text
from tests.support.safetensors_files import read_folder, write_file

pytestmark = pytest.mark.sweep(1)

ROLES = ("weight", "scales", "biases")
UP = "model.layers.0.mlp.experts.{}.up_proj"
STACK = "model.layers.0.mlp.switch_mlp.up_proj"
Spec = tuple[int, int, str, mx.Dtype] | None  # bits, group, mode, dtype; None is dense


def moe(folder: Path, specs: Mapping[int, Spec], dense: mx.Dtype = mx.bfloat16) -> Path:
    """A qwen3_moe of MLX's triples, a layer for itself each; up projections as ``specs`` say."""
    config = small_config("qwen3_moe")
    class_checkpoint(folder, config)
    weights = FORMS["qwen3_moe"](mx.load(str(folder / "model.safetensors")))
    block: dict[str, Any] = {"group_size": 64, "bits": 4}
    made: dict[str, mx.array] = {}
    for name, array in weights.items():
        path = name.removesuffix(".weight")
        number = next((n for n in specs if path == UP.format(n)), None)
        spec: Spec = (4, 64, "affine", mx.bfloat16) if number is None else specs[number]
        if not path.endswith("_proj") or spec is None:
            made[name] = array.astype(dense if number is not None else mx.bfloat16)
            if number is not None:
                block[path] = False
            continue
        bits, group, mode, dtype = spec
        parts = mx.quantize(array.astype(dtype), group_size=group, bits=bits, mode=mode)
        made |= {f"{path}.{role}": part for role, part in zip(ROLES, parts, strict=False)}
        block[path] = {"group_size": group, "bits": bits, "mode": mode}
    mx.save_safetensors(str(folder / "model.safetensors"), made, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps({**config, "quantization": block}))
    return folder


def wanted(source: Mapping[str, np.ndarray], path: str, spec: Spec) -> Any:
    """The values of one member, in float64."""
    if spec is None:
        return source[f"{path}.weight"].astype(np.float64)
    bits, group, mode, _ = spec
    if mode == "affine":
        return affine(source, path, group, bits).values
    return float_values(source, path, {"bits": bits, "group_size": group, "mode": mode})


def stacked(folder: Path, path: str = STACK) -> tuple[Any, dict[str, Any]]:
    """The values of a stack in an output, and how it is stored."""
    weights, config = read_folder(folder), json.loads((folder / "config.json").read_text())
    block = config["quantization"]
    spec = block.get(path, {key: block[key] for key in ("group_size", "bits", "mode")})
    if spec["mode"] != "affine":
        return float_values(weights, path, spec), spec
    return affine(weights, path, spec["group_size"], spec["bits"]).values, spec


B, H, F = mx.bfloat16, mx.float16, mx.float32
EXACT: dict[str, tuple[list[Spec], tuple[int, int, str, str]]] = {
    "groups": (
        [(4, 64, "affine", B), (4, 32, "affine", B), (4, 128, "affine", B), (4, 64, "affine", B)],
        (4, 32, "affine", "BF16"),
    ),
    "bits": (
        [(4, 64, "affine", B), (2, 64, "affine", B), (3, 64, "affine", B), (6, 64, "affine", B)],
        (6, 64, "affine", "BF16"),
    ),
    "both, in unlike members": (
        [(8, 128, "affine", B), (1, 32, "affine", B), (5, 64, "affine", B), (2, 128, "affine", B)],
        (8, 32, "affine", "BF16"),
    ),
    "dtypes of scales": (
        [(4, 64, "affine", B), (4, 64, "affine", H), (4, 64, "affine", B), (4, 64, "affine", H)],
        (4, 64, "affine", "F32"),
    ),
    "dtypes, groups and bits": (
        [(4, 64, "affine", B), (3, 128, "affine", H), (4, 64, "affine", F), (2, 32, "affine", H)],
        (4, 32, "affine", "F32"),
    ),
    "mxfp4 and mxfp8": (
        [(4, 32, "mxfp4", B), (8, 32, "mxfp8", B), (4, 32, "mxfp4", B), (4, 32, "mxfp4", B)],
        (8, 32, "mxfp8", "U8"),
    ),
}


@pytest.mark.parametrize("name", EXACT)
def test_codes_of_all_members_are_moved(name: str, tmp_path: Path) -> None:
    specs, (bits, group, mode, dtype) = EXACT[name]
    source = moe(tmp_path / "source", dict(enumerate(specs)))
    report = requant.convert(source, tmp_path / "out", layout="mlx-lm")
    layer = next(x for x in report.plan.layers if x.layer == STACK)
    assert (layer.exactness, layer.treatment) == ("exact", "kept")
    found, spec = stacked(tmp_path / "out")
    assert spec == {"group_size": group, "bits": bits, "mode": mode}
    before = read_folder(source)
    for number, own in enumerate(specs):
        assert np.array_equal(found[number], wanted(before, UP.format(number), own)), number
    scales = read_folder(tmp_path / "out")[f"{STACK}.scales"]
    assert scales.dtype.name == {"BF16": "bfloat16", "F32": "float32", "U8": "uint8"}[dtype]
    assert {x.exactness for x in report.plan.layers} == {"exact"}
    for number, chunk in enumerate((1, 3000)):
        again = tmp_path / f"again{number}"
        requant.convert(source, again, layout="mlx-lm", chunk_bytes=chunk, threads=3)
        for file in (tmp_path / "out").glob("*.safetensors"):
            assert file.read_bytes() == (again / file.name).read_bytes()
    assert not requant.verify(source, tmp_path / "out").problems


MIXED: dict[str, tuple[list[Spec], tuple[int, int], list[int]]] = {
    # The encoding that is due, and the members whose codes it holds.
    "a dense member": (
        [(4, 64, "affine", B), None, (4, 64, "affine", B), (4, 64, "affine", B)],
        (8, 64),
        [0, 2, 3],
    ),
    "a dense member among groups of 32": (
        [(4, 32, "affine", B), (3, 128, "affine", B), None, (4, 64, "affine", B)],
        (8, 32),
        [0, 1, 3],
    ),
    "mxfp4 and affine": (
        [(4, 32, "mxfp4", B), (4, 64, "affine", B), (4, 64, "affine", B), (6, 64, "affine", B)],
        (8, 32),
        [1, 2, 3],
    ),
    "nvfp4 and mxfp4": (
        [(4, 16, "nvfp4", B), (4, 32, "mxfp4", B), (4, 16, "nvfp4", B), (4, 16, "nvfp4", B)],
        (8, 32),
        [],
    ),
}


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("dense", [mx.bfloat16, mx.float16], ids=["bf16", "f16"])
def test_what_must_be_encoded_again_gets_8_bits(name: str, dense: mx.Dtype, tmp_path: Path) -> None:
    specs, (bits, group), moved = MIXED[name]
    source = moe(tmp_path / "source", dict(enumerate(specs)), dense)
    report = requant.convert(source, tmp_path / "out", layout="mlx-lm")
    layer = next(x for x in report.plan.layers if x.layer == STACK)
    assert (layer.exactness, layer.treatment) == ("re-encoded", "requantized")
    assert "8 bits" in reason_text(layer)
    assert any(STACK in note and "8 bits" in note for note in note_texts(report.plan.notes))
    found, spec = stacked(tmp_path / "out")
    assert spec == {"group_size": group, "bits": bits, "mode": "affine"}
    before = read_folder(source)
    for number, own in enumerate(specs):
        values = wanted(before, UP.format(number), own)
        if number in moved:
            assert np.array_equal(found[number], values), number
        else:
            error = np.sqrt(((found[number] - values) ** 2).mean() / (values**2).mean())
            assert 0 < error < 0.012, number


def test_a_request_moves_what_it_holds_and_encodes_the_rest(tmp_path: Path) -> None:
    specs: list[Spec] = [(4, 64, "affine", B), (2, 64, "affine", B), None, (3, 128, "affine", B)]
    source = moe(tmp_path / "source", dict(enumerate(specs)))
    report = requant.convert(source, tmp_path / "out", layout="mlx-lm", bits=3, group_size=64)
    layer = next(x for x in report.plan.layers if x.layer == STACK)
    assert (layer.exactness, layer.target) == ("re-encoded", "affine 3-bit g64")
    found, _ = stacked(tmp_path / "out")
    before = read_folder(source)
    for number in (1, 3):
        assert np.array_equal(found[number], wanted(before, UP.format(number), specs[number]))
    for number in (0, 2):
        assert not np.array_equal(found[number], wanted(before, UP.format(number), specs[number]))
    requant.convert(source, tmp_path / "dense", layout="mlx-lm", dequantize=True, dtype="float32")
    values = read_folder(tmp_path / "dense")[f"{STACK}.weight"]
    own, _ = convert(source, tmp_path / "own", dequantize=True, dtype="float32")
    assert np.array_equal(values, np.stack([own[f"{UP.format(n)}.weight"] for n in range(4)]))


def test_members_in_more_bits_than_any_has(tmp_path: Path) -> None:
    specs: list[Spec] = [(4, 64, "affine", B), (2, 128, "affine", B)] * 2
    source = moe(tmp_path / "source", dict(enumerate(specs)))
    report = requant.convert(source, tmp_path / "out", layout="mlx-lm", bits=8, group_size=32)
    assert {x.exactness for x in report.plan.layers if "_proj" in x.layer} == {"exact"}
    found, _ = stacked(tmp_path / "out")
    before = read_folder(source)
    for number, own in enumerate(specs):
        assert np.array_equal(found[number], wanted(before, UP.format(number), own))


def test_in_memory_as_in_a_folder(tmp_path: Path) -> None:
    from requant.mlx_lm import load_weights

    specs: list[Spec] = [(4, 64, "affine", B), (2, 128, "affine", B), None, (3, 32, "affine", B)]
    source = moe(tmp_path / "source", dict(enumerate(specs)))
    requant.convert(source, tmp_path / "out", bits=8, group_size=32)
    held, _ = load_weights(source, bits=8, group_size=32)
    for name, array in mx.load(str(tmp_path / "out" / "model.safetensors")).items():
        assert mx.array_equal(held[name], array), name


# -- another tool's members ------------------------------------------------------------------
def gptq_moe(folder: Path, rules: Mapping[int, dict[str, Any]]) -> dict[int, np.ndarray]:
    """A qwen3_moe whose experts are GPTQ's, each by its own rule; the values of each up_proj."""
    config = small_config("qwen3_moe")
    class_checkpoint(folder, config)
    weights = FORMS["qwen3_moe"](mx.load(str(folder / "model.safetensors")))
    rng, tensors, values = np.random.default_rng(3), {}, {}
    for name, array in weights.items():
        path = name.removesuffix(".weight")
        if not path.endswith("_proj"):
            tensors[name] = np.array(array.astype(mx.float16))
            continue
        number = int(path.split(".experts.")[1].split(".")[0]) if ".experts." in path else -1
        rule = {"bits": 4, "group_size": 32, "sym": True} | rules.get(number, {})
        bits, (n_out, n_in) = rule["bits"], array.shape
        group = min(rule["group_size"], n_in)
        codes = rng.integers(0, 1 << bits, (n_out, n_in)).astype(np.int64)
        zeros = rng.integers(0, 1 << bits, (n_out, n_in // group)).astype(np.int64)
        if rule["sym"]:
            zeros[:] = 1 << (bits - 1)
        scales = (2.0 ** rng.integers(-9, -6, zeros.shape)).astype(np.float16)
        packed = packers.gptq(codes, zeros, scales, bits)
        of = np.arange(n_in) // group
        if rule.get("desc_act"):
            of = rng.permutation(of)
        packed["g_idx"] = of.astype(np.int32)
        tensors |= {f"{path}.{role}": part for role, part in packed.items()}
        if path == UP.format(number):
            values[number] = (codes - zeros[:, of]) * scales[:, of].astype(np.float64)
    dynamic = {rf"+:.*experts\.{n}\..*": rule for n, rule in rules.items()}
    config |= {"torch_dtype": "float16"}
    config["quantization_config"] = {
        "quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True,
        "desc_act": any(x.get("desc_act") for x in rules.values()),
        "checkpoint_format": "gptq_v2", "dynamic": dynamic,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    write_file(folder / "model.safetensors", tensors)
    return values


RULES: dict[str, tuple[dict[int, dict[str, Any]], dict[str, Any]]] = {
    "group": ({2: {"group_size": 64}}, {"bits": 4, "group_size": 32}),
    "group of a whole row": ({1: {"group_size": 128}}, {"bits": 4, "group_size": 32}),
    "bits": ({1: {"bits": 8}, 3: {"bits": 2}}, {"bits": 8, "group_size": 32}),
    "zeros": ({0: {"sym": False}}, {"bits": 4, "group_size": 32}),
    "all": (
        {0: {"sym": False}, 1: {"bits": 3}, 2: {"group_size": 64, "bits": 8}},
        {"bits": 8, "group_size": 32},
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_members_by_dynamic_rules(name: str, tmp_path: Path) -> None:
    rules, due = RULES[name]
    values = gptq_moe(tmp_path / "source", rules)
    report = requant.convert(tmp_path / "source", tmp_path / "out", chunk_bytes=5000)
    layer = next(x for x in report.plan.layers if x.layer == STACK)
    # Zeros times scales are biases that float16 may round, though not these.
    symmetric = all(rule.get("sym", True) for rule in rules.values())
    assert layer.exactness == ("exact" if symmetric else "rounded")
    assert layer.treatment == "kept"
    found, spec = stacked(tmp_path / "out")
    assert spec == due | {"mode": "affine"}
    for number, own in values.items():
        assert np.array_equal(found[number], own), number


def test_a_member_in_act_order_gets_8_bits_and_leaves_the_others_alone(tmp_path: Path) -> None:
    values = gptq_moe(tmp_path / "source", {1: {"desc_act": True}, 2: {"group_size": 64}})
    report = requant.convert(tmp_path / "source", tmp_path / "out")
    layer = next(x for x in report.plan.layers if x.layer == STACK)
    assert (layer.exactness, layer.target) == ("re-encoded", "affine 8-bit g32")
    found, _ = stacked(tmp_path / "out")
    for number in (0, 2, 3):
        assert np.array_equal(found[number], values[number]), number
    # The order of down_proj's inputs was moved into the rows here.
    stored = read_folder(tmp_path / "source")
    order = np.argsort(stored["model.layers.0.mlp.experts.1.down_proj.g_idx"], kind="stable")
    own = values[1][order]
    assert 0 < np.sqrt(((found[1] - own) ** 2).mean() / (own**2).mean()) < 0.012
    with pytest.raises(requant.UsageError, match="--act-order"):
        requant.plan(tmp_path / "source", act_order="refuse")


# -- fused layers ----------------------------------------------------------------------------
@pytest.mark.parametrize("by_head", [False, True], ids=["in blocks", "head by head"])
def test_parts_of_a_fused_projection(by_head: bool, tmp_path: Path, monkeypatch: MonkeyPatch):
    """A class that joins q, k and v: their codes stay, whatever each part's width and group."""
    from mlx_lm.models import phi3

    def sanitize(self: Any, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        made = dict(weights)
        for name in weights:
            if name.endswith("q_proj.weight"):
                parts = [
                    made.pop(name.replace("q_proj", x)) for x in ("q_proj", "k_proj", "v_proj")
                ]
                if by_head:
                    parts = [x.reshape(2, -1, x.shape[-1]) for x in parts]
                joined = mx.concatenate(parts, axis=1 if by_head else 0)
                made[name.replace("q_proj", "qkv_proj")] = joined.reshape(-1, joined.shape[-1])
        return made

    monkeypatch.setattr(phi3.Model, "sanitize", sanitize, raising=False)
    config = small_config("phi3")
    class_checkpoint(tmp_path / "source", config)
    weights = mx.load(str(tmp_path / "source" / "model.safetensors"))
    specs = {"q_proj": (4, 64), "k_proj": (3, 32), "v_proj": (8, 128)}
    block: dict[str, Any] = {"group_size": 64, "bits": 4}
    made: dict[str, mx.array] = {}
    path = "model.layers.0.self_attn"
    for name, array in weights.items():
        if not name.endswith("qkv_proj.weight"):
            made[name] = array
            continue
        head = config["hidden_size"] // config["num_attention_heads"]
        ends = [head * config["num_attention_heads"]]
        ends.append(ends[0] + head * config["num_key_value_heads"])
        for (part, (bits, group)), rows in zip(specs.items(), mx.split(array, ends), strict=True):
            own = name.replace("qkv_proj.weight", part)
            block[own] = {"group_size": group, "bits": bits}
            parts = mx.quantize(rows, group_size=group, bits=bits)
            made |= {f"{own}.{role}": x for role, x in zip(ROLES, parts, strict=True)}
    mx.save_safetensors(str(tmp_path / "source/model.safetensors"), made, {"format": "mlx"})
    (tmp_path / "source/config.json").write_text(json.dumps({**config, "quantization": block}))
    report = requant.convert(tmp_path / "source", tmp_path / "out", layout="mlx-lm")
    assert {x.exactness for x in report.plan.layers} == {"exact"}
    found, spec = stacked(tmp_path / "out", f"{path}.qkv_proj")
    assert spec == {"group_size": 32, "bits": 8, "mode": "affine"}
    before = read_folder(tmp_path / "source")
    parts = [affine(before, f"{path}.{x}", g, b).values for x, (b, g) in specs.items()]
    if by_head:
        parts = [x.reshape(2, -1, x.shape[-1]) for x in parts]
    joined = np.concatenate(parts, axis=1 if by_head else 0)
    assert np.array_equal(found, joined.reshape(found.shape))
