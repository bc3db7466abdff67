"""Stacks and scales by name: folders without a config, other spellings, and what is rejected."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import requant
from requant.checkpoints.checkpoint import StoredTensor
from requant.core.dtypes import TensorInfo
from requant.formats.expert_shapes import Orientation
from requant.formats.layer_names import layer_names
from tests.support.checkpoints import write_quantized
from tests.support.conversions import dequantized, rejection
from tests.support.damage import damage, damages
from tests.support.layers import compressed_tensors as ct_layers
from tests.support.layers.quark import block as quark_block
from tests.support.layers.stacks import EXPERTS, IN, OUT, PLACE, small_e4m3
from tests.support.number_formats import E2M1, E4M3, e4m3, nibbles
from tests.support.plan_texts import note_texts
from tests.support.safetensors_files import read_folder

pytestmark = pytest.mark.sweep(3)

FP8 = {"quant_method": "fp8"}
MIXED = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}
CT = ct_layers.block("float-quantized", num_bits=8, type="float", strategy="channel")
Tensors = dict[str, np.ndarray]


def stored(**infos: tuple[str, tuple[int, ...]]) -> dict[str, StoredTensor]:
    return {
        name: StoredTensor(name, TensorInfo(dtype, shape), "f", 0)
        for name, (dtype, shape) in infos.items()
    }


def names_of(**infos: tuple[str, tuple[int, ...]]) -> dict[str, str]:
    """Name -> the name of a part of a layer, where it is another."""
    found = layer_names({n.replace("__", "."): t for n, t in stored(**infos).items()})
    own = {tensor.name.replace("__", "."): part for part, tensor in found.tensors.items()}
    return {name: part for name, part in own.items() if name != part}


def test_parts_of_layers_by_name() -> None:
    three = (2, 8, 4)
    assert names_of(up_packed=("I32", three), up_scale=("BF16", three), up_shape=("I64", (3,))) == {
        "up_packed": "up.weight_packed",
        "up_scale": "up.weight_scale",
        "up_shape": "up.weight_shape",
    }
    assert names_of(
        w2_qweight=("I32", three), w2_scales=("F16", three), w2_g_idx=("I32", (2, 8))
    ) == {"w2_qweight": "w2.qweight", "w2_scales": "w2.scales", "w2_g_idx": "w2.g_idx"}
    assert names_of(w13_weight=("U8", three), w13_weight_global_scale=("F32", (2, 2))) == {}
    # No stack: no scale next to it, a matrix, plain floats; and a scale is not a stack of its own.
    assert names_of(up=("U8", three), up_bias=("BF16", (2, 8))) == {}
    assert names_of(up=("U8", (8, 4)), up_scale=("F32", (8, 1))) == {}
    assert names_of(up=("BF16", three), up_scale=("F32", (8, 1))) == {}
    found = names_of(
        up=("U8", three), up_weight_scale=("U8", three), up_weight_scale_2=("F32", (2,))
    )
    assert found["up"] == "up.weight" and found["up_weight_scale"] == "up.weight_scale"


def test_two_scales_of_one_layer(tmp_path: Path) -> None:
    scale = np.full((OUT, 1), 0.01, np.float32)
    tensors = {"up.weight": e4m3(OUT, IN), "up.weight_scale": scale, "up.weight_scale_inv": scale}
    for block in (FP8, MIXED, CT, quark_block("fp8_e4m3", "per_channel")):
        source = write_quantized(tmp_path / str(block["quant_method"]), tensors, block)
        text = rejection(source, tmp_path / "out", bits=8)
        assert "up.weight_scale_inv: represents the same part of a layer as up.weight_scale" in text


SPELLINGS = ("weight_scale", "weight_scale_inv", "scale", "scale_inv")
FOLDERS = {
    "fp8": FP8,
    "compressed-tensors": CT,
    "modelopt": MIXED,
    "modelopt FP8_BLOCK_SCALES": {"quant_method": "modelopt", "quant_algo": "FP8_BLOCK_SCALES"},
    "modelopt FP8_PB_WO": {"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"},
    "quark": quark_block("fp8_e4m3", "per_channel"),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("shape", [(), (OUT, 1), (1, 1)], ids=str)
def test_a_scale_of_fp8_by_any_name(
    folder: str, spelling: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    """A layer's scale is the same factor whatever it is called, in the folder of any tool."""
    codes = e4m3(OUT, IN)
    scale = (0.01 + 0.001 * np.arange(np.prod(shape, dtype=int))).astype(np.float32).reshape(shape)
    tensors = {"up.weight": codes, f"up.{spelling}": scale}
    source = write_quantized(tmp_path / "source", tensors, FOLDERS[folder])
    made = dequantized(source, tmp_path / "out")
    assert made.keys() == {"up.weight"}
    assert np.array_equal(made["up.weight"], codes.astype(np.float32) * scale)


@pytest.mark.parametrize(
    ("algorithm", "kind"),
    [
        ("INT4_AWQ", "int4"),
        ("W4A8_AWQ", "int4"),
        ("MXFP4", "mxfp4"),
        ("W4A8_MXFP4_FP8", "mxfp4"),
        ("MXFP8", "mxfp8"),
    ],
)
def test_names_of_modelopt_s_algorithms(algorithm: str, kind: str, tmp_path: Path) -> None:
    exponents = np.full((OUT, IN // 32), 120, np.uint8)
    parts = {
        "int4": (np.zeros((OUT // 2, IN), np.uint8), np.ones((OUT, IN // 32), np.float32)),
        "mxfp4": (np.zeros((OUT, IN // 2), np.uint8), exponents),
        "mxfp8": (e4m3(OUT, IN), exponents),
    }[kind]
    tensors = dict(zip(("up.weight", "up.weight_scale"), parts, strict=True))
    block = {"quant_method": "modelopt", "quant_algo": algorithm}
    report = requant.convert(
        write_quantized(tmp_path / "s", tensors, block), tmp_path / "o", layout="keep"
    )
    assert [layer.treatment for layer in report.plan.layers] == ["kept"]


# -- folders without a config ------------------------------------------------------------------
def unnamed() -> dict[str, tuple[Tensors, np.ndarray]]:
    packed = np.random.default_rng(1).integers(0, 256, (EXPERTS, OUT, IN // 2), np.uint8)
    elements = E2M1[nibbles(packed)]
    codes, scale = e4m3(EXPERTS, OUT, IN), np.full((EXPERTS, OUT, 1), 0.3, np.float32)
    groups = small_e4m3(EXPERTS, OUT, IN // 16)
    exponents = np.full((EXPERTS, OUT, IN // 32), 120, np.uint8)
    return {
        "fp8": ({"weight": codes, "weight_scale": scale}, codes.astype(np.float32) * scale),
        "mxfp4": ({"weight": packed, "weight_scale": exponents}, elements * np.float32(2.0**-7)),
        "nvfp4": (
            {"weight": packed, "weight_scale": groups},
            elements * groups.astype(np.float32).repeat(16, axis=2),
        ),
        "packed nvfp4": (
            {"weight_packed": packed, "weight_scale": groups},
            elements * groups.astype(np.float32).repeat(16, axis=2),
        ),
        "packed mxfp4": (
            {"weight_packed": packed, "weight_scale": exponents},
            elements * np.float32(2.0**-7),
        ),
    }


@pytest.mark.parametrize("kind", unnamed())
@pytest.mark.parametrize("path", ["w13", "w2"])
def test_stacks_without_a_block(kind: str, path: str, tmp_path: Path) -> None:
    parts, values = unnamed()[kind]
    tensors = {f"{PLACE}.{path}_{role}": part for role, part in parts.items()}
    tensors["model.norm.weight"] = np.ones(IN, np.float32)
    source = write_quantized(tmp_path / "source", tensors, None, model_type="some_moe")
    made = dequantized(source, tmp_path / "out")
    assert made.keys() == {"model.norm.weight", f"{PLACE}.{path}_weight"}
    assert np.array_equal(made[f"{PLACE}.{path}_weight"], values)


# -- which way matrices lie --------------------------------------------------------------------
@pytest.mark.parametrize(
    ("stacks", "config", "transposed"),
    [
        ({"gate_up_proj": (4, 64, 32), "down_proj": (4, 32, 32)}, {}, False),
        ({"gate_up_proj": (4, 32, 64), "down_proj": (4, 32, 32)}, {}, True),
        ({"gate_up_proj": (4, 96, 32), "down_proj": (4, 32, 48)}, {}, False),
        ({"gate_up_proj": (4, 32, 96), "down_proj": (4, 48, 32)}, {}, True),
        ({"w1": (4, 48, 32), "w2": (4, 32, 48)}, {}, False),
        ({"w1": (4, 32, 32), "w2": (4, 32, 32)}, {"hidden_size": 32}, False),
        ({"down_proj": (4, 32, 48)}, {"hidden_size": 32}, False),
        ({"down_proj": (4, 48, 32)}, {"text_config": {"hidden_size": 32}}, True),
        ({"gate_up_proj": (4, 96, 32)}, {"text_config": {"hidden_size": 32}}, False),
        ({"gate_up_proj": (4, 32, 96)}, {"hidden_size": 32}, True),
        ({"gate_up_proj": (4, 32, 96)}, {}, False),
    ],
)
def test_orientation(stacks: dict[str, Any], config: dict[str, Any], transposed: bool) -> None:
    found = Orientation(config, {f"{PLACE}.{name}": shape for name, shape in stacks.items()})
    for name, shape in stacks.items():
        assert found.is_transposed(f"{PLACE}.{name}", shape) is transposed, name


@pytest.mark.parametrize("block", [FP8, MIXED, CT, quark_block("fp8_e4m3", "per_tensor")])
@pytest.mark.parametrize("shape", [(), (EXPERTS,), (EXPERTS, 1, 1), (EXPERTS, 1, 0)], ids=str)
def test_fp8_that_is_stored_transposed(
    block: dict[str, Any], shape: tuple[int, ...], tmp_path: Path
) -> None:
    """ModelOpt's Llama 4: ``(experts, in, out)``, detected from gate and down together.

    And by scales.

    Dense, they keep their names and the way they lie.

    A 0 means the last axis of the stack.
    """
    tensors: Tensors = {}
    expected: Tensors = {}
    for name, size in (("gate_up_proj", (EXPERTS, IN, 2 * OUT)), ("down_proj", (EXPERTS, OUT, IN))):
        grid = tuple(n or size[-1] for n in shape)
        scale = (0.01 + 0.001 * np.arange(np.prod(grid, dtype=int))).astype(np.float32)
        codes = e4m3(*size, seed=len(name))
        tensors[f"{PLACE}.{name}"] = codes
        word = "weight_scale" if block is MIXED else "scale"
        tensors[f"{PLACE}.{name}_{word}"] = scale.reshape(grid)
        factor = scale.reshape(-1, 1, 1) if grid == (EXPERTS,) else scale.reshape(grid)
        expected[f"{PLACE}.{name}"] = codes.astype(np.float32) * factor
    source = write_quantized(tmp_path / "source", tensors, block, model_type="some_moe")
    made = dequantized(source, tmp_path / "out", chunk_bytes=5000)
    assert made.keys() == expected.keys()
    for name, values in expected.items():
        assert made[name].tobytes() == values.tobytes(), name


# -- what is left out, and what is rejected -----------------------------------------------------
@pytest.mark.parametrize("joint", ["w13", "gate_up_proj"])
@pytest.mark.parametrize("word", ["input_scale", "activation_scale", "input_global_scale"])
def test_scales_of_activations_are_left_out(joint: str, word: str, tmp_path: Path) -> None:
    name = f"{PLACE}.{joint}" + ("_weight" if joint == "w13" else "")
    scale = np.ones(EXPERTS, np.float32)
    tensors = {
        name: e4m3(EXPERTS, OUT, IN),
        f"{name}_scale": scale,
        f"{PLACE}.{joint}_{word}": scale,
    }
    source = write_quantized(tmp_path / "source", tensors, FP8, model_type="some_moe")
    report = requant.convert(source, tmp_path / "out", layout="keep", dequantize=True)
    assert read_folder(tmp_path / "out").keys() == {name}
    assert any(f"{joint}_{word}" in note for note in note_texts(report.plan.notes))


def bare_nvfp4(high: int = 0x77, experts: int = EXPERTS) -> Tensors:
    shape = (experts, OUT) if experts else (OUT,)
    scales = np.full((*shape, IN // 16), 0x38, np.uint8)
    scales.reshape(-1)[-1] = high
    return {"weight": np.zeros((*shape, IN // 2), np.uint8), "weight_scale": scales.view(E4M3)}


NVFP4_FOLDERS = {
    "modelopt": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "weight_scale_2"),
    "ct": (ct_layers.block("nvfp4-pack-quantized", type="float", group_size=16), "weight_global"),
    "quark": (quark_block([{"dtype": "fp4"}] * 2), "weight_scale_2"),
}


def in_nvfp4_folder(folder: str, parts: Tensors, path: str, joint: str) -> Tensors:
    codes = "weight_packed" if folder == "ct" else "weight"
    roles = {"weight": codes}
    return {f"{path}{joint}{roles.get(role, role)}": part for role, part in parts.items()}


@pytest.mark.parametrize("folder", NVFP4_FOLDERS)
def test_a_tensor_scale_that_is_missing(folder: str, tmp_path: Path) -> None:
    """A stack has none if nothing contradicts it: 448, other layers, not being a stack do."""
    block, missing = NVFP4_FOLDERS[folder]
    stack = in_nvfp4_folder(folder, bare_nvfp4(), f"{PLACE}.w13", "_")
    report = requant.convert(
        write_quantized(tmp_path / "bare", stack, block, model_type="moe"),
        tmp_path / "made",
        layout="keep",
    )
    assert {layer.exactness for layer in report.plan.layers} == {"exact"}
    assert any("have no tensor scale" in note for note in note_texts(report.plan.notes))
    largest = in_nvfp4_folder(folder, bare_nvfp4(0x7E), f"{PLACE}.w13", "_")
    source = write_quantized(tmp_path / "largest", largest, block, model_type="moe")
    text = rejection(source, tmp_path / "out")
    assert missing in text and "448" in text and f"{PLACE}.w13" in text
    matrix = in_nvfp4_folder(folder, bare_nvfp4(experts=0), "up", ".")
    source = write_quantized(tmp_path / "matrix", stack | matrix, block, model_type="moe")
    assert missing in rejection(source, tmp_path / "out")
    whole = in_nvfp4_folder(folder, bare_nvfp4(experts=0), "up", ".")
    second = "weight_global_scale" if folder == "ct" else "weight_scale_2"
    whole[f"up.{second}"] = np.array([0.3], np.float32)
    source = write_quantized(tmp_path / "others", stack | whole, block, model_type="moe")
    text = rejection(source, tmp_path / "out")
    assert f"other layers have theirs (up.{second})" in text and f"{PLACE}.w13: has" in text


def wrong(parts: Tensors, **changed: np.ndarray) -> Tensors:
    return {f"{PLACE}.w13_{role}": part for role, part in (parts | changed).items()}


GPTQ: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}
GPTQ_PARTS = {
    "qweight": np.zeros((EXPERTS, IN // 8, OUT), np.int32),
    "qzeros": np.zeros((EXPERTS, IN // 32, OUT // 8), np.int32),
    "scales": np.ones((EXPERTS, IN // 32, OUT), np.float16),
}
FP8_PARTS = {"weight": e4m3(EXPERTS, OUT, IN)}
CT_PARTS = {"weight_packed": np.zeros((EXPERTS, OUT, IN // 8), np.int32)}
CT_INT = ct_layers.block(group_size=32)
Make = Callable[[], tuple[dict[str, Any], Tensors]]


KINDS = {
    "gptq": (GPTQ, GPTQ_PARTS),
    "fp8": (FP8, FP8_PARTS),
    "mixed": (MIXED, FP8_PARTS),
    "ct": (CT_INT, CT_PARTS),
    "mxfp4": ({"quant_method": "mxfp4"}, {"weight": np.zeros((EXPERTS, OUT, IN // 2), np.uint8)}),
}
DAMAGED = """
gptq; scales = F16 [2, 4, 64] 1
    w13_scales: F16 [2, 4, 64], expected 3 experts on its first axis
gptq; g_idx = I32 [3, 128] 9 -> w13_g_idx: holds group 9
gptq; qzeros = I32 [3, 4, 9] -> w13
fp8; weight_scale = F32 [2, 1, 1] 1 -> w13_weight_scale: F32 [2, 1, 1] fits no tiling
mixed; weight_scale_inv = F32 [3, 5] 1 -> w13_weight_scale_inv: F32 [3, 5] fits no tiling
ct; weight_scale = F32 [3, 64, 3] 1 -> w13_weight_scale: F32 [3, 64, 3], expected [3, 64, 4]
mxfp4; weight_scale = U8 [3, 64, 3] -> w13_weight_scale: U8 [3, 64, 3], expected U8 [3, 64, 4]
mxfp4; nothing -> w13_weight: U8 [3, 64, 64] holds codes, but has no scale next to it
"""


@pytest.mark.parametrize(("changes", "words"), damages(DAMAGED))
def test_stacks_that_do_not_fit(changes: str, words: list[str], tmp_path: Path):
    kind, _, changes = changes.partition("; ")
    block, parts = KINDS[kind]
    tensors = dict(parts)
    damage(changes, tensors)
    tensors = {f"{PLACE}.w13_{role}": part for role, part in tensors.items()}
    source = write_quantized(tmp_path / "source", tensors, block, model_type="some_moe")
    text = rejection(source, tmp_path / "out", bits=8)
    assert all(word in text for word in words), text
