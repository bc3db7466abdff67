"""Stacks of experts in every format that has them, under every name that tools give them.

A stack holds what as many single layers hold: its values are computed here with NumPy from the
description of the format, and its codes are those of the single layers, bit for bit.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import requant
from requant.quantization.config import Quantization
from tests.support.checkpoints import write_quantized
from tests.support.conversions import convert, dequantized
from tests.support.fixture_checks import same_in_memory
from tests.support.layers import compressed_tensors as ct_layers
from tests.support.layers import packers
from tests.support.layers.quark import block as quark_block
from tests.support.layers.quark import pack_words
from tests.support.layers.stacks import EXPERTS, IN, OUT, PLACE, small_e4m3
from tests.support.number_formats import BF16, E2M1, E8M0, e4m3, nibbles
from tests.support.safetensors_files import read_folder

pytestmark = pytest.mark.sweep(2)

Parts = dict[str, np.ndarray]


# -- names -------------------------------------------------------------------------------------
def dotted(role: str) -> str:
    return f"{PLACE}.gate_up_proj.{role}"


def transformers(role: str) -> str:
    """A parameter of the module of all experts, its scales joined to its name."""
    end = "" if role == "weight" else f"_{role.removeprefix('weight_')}"
    return f"{PLACE}.gate_up_proj{end}"


def modelopt(role: str) -> str:
    """As ``transformers``, with "weight" between the path and the word."""
    return f"{PLACE}.gate_up_proj" if role == "weight" else f"{PLACE}.gate_up_proj_{role}"


def vllm(role: str) -> str:
    return f"{PLACE}.w13_{role}"


NAMINGS: dict[str, tuple[Callable[[str], str], str, str]] = {
    # name of a role -> tensor; path of the output's layer; its dense weight
    "dotted": (dotted, f"{PLACE}.gate_up_proj", f"{PLACE}.gate_up_proj.weight"),
    "transformers": (transformers, f"{PLACE}.gate_up_proj", f"{PLACE}.gate_up_proj"),
    "modelopt": (modelopt, f"{PLACE}.gate_up_proj", f"{PLACE}.gate_up_proj"),
    "vllm": (vllm, f"{PLACE}.w13", f"{PLACE}.w13_weight"),
}


def test_names() -> None:
    assert transformers("weight") == f"{PLACE}.gate_up_proj"
    assert transformers("weight_packed") == f"{PLACE}.gate_up_proj_packed"
    assert transformers("weight_scale_inv") == f"{PLACE}.gate_up_proj_scale_inv"
    assert transformers("qzeros") == f"{PLACE}.gate_up_proj_qzeros"
    assert modelopt("weight_scale_2") == f"{PLACE}.gate_up_proj_weight_scale_2"
    assert vllm("weight_packed") == f"{PLACE}.w13_weight_packed"


# -- formats -----------------------------------------------------------------------------------
@dataclass
class Stack:
    """A stack of one format.

    Attributes:
        block: The ``quantization_config``.
        parts: Role -> tensor of the stack.
        values: What it represents, float32.
        single: Of an expert: role -> tensor of a layer of its own; None where a single layer
            has no such form.
        options: What is asked for where codes cannot stay.
        transposed: Whether it is stored ``(experts, in, out)``.
    """

    block: dict[str, Any]
    parts: Parts
    values: np.ndarray
    single: Callable[[int], Parts] | None
    options: dict[str, Any] = field(default_factory=dict)
    transposed: bool = False


def random(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def of_experts(parts: Parts) -> Callable[[int], Parts]:
    return lambda expert: {role: part[expert].copy() for role, part in parts.items()}


# Shapes of scales with one number for all, an expert, gate and up of an expert, or a row; each
# with the shape that a single layer's scale then has.
SCALES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "()": ((), (1, 1, 1)),
    "(1,)": ((1,), (1, 1, 1)),
    "(E,)": ((EXPERTS,), (EXPERTS, 1, 1)),
    "(E, 1)": ((EXPERTS, 1), (EXPERTS, 1, 1)),
    "(E, 1, 1)": ((EXPERTS, 1, 1), (EXPERTS, 1, 1)),
    "(E, 2)": ((EXPERTS, 2), (EXPERTS, 2, 1)),
    "(E, out)": ((EXPERTS, OUT), (EXPERTS, OUT, 1)),
    "(E, out, 1)": ((EXPERTS, OUT, 1), (EXPERTS, OUT, 1)),
}


def scales_of(shape: str) -> tuple[np.ndarray, np.ndarray]:
    """Scales as stored, and one a row: ``(E, out, 1)``. No two are alike, none a power of 2."""
    stored, grid = SCALES[shape]
    count = int(np.prod(grid))
    numbers = (0.011 + 0.001 * np.arange(count)).astype(np.float32)
    rows = numbers.reshape(grid).repeat(OUT // grid[1], axis=1)
    return numbers.reshape(stored), np.broadcast_to(rows, (EXPERTS, OUT, 1))


def rows_of(parts: Parts, rows: np.ndarray, *own: str) -> Callable[[int], Parts]:
    """Single layers with a scale a row, which each way to share one comes to."""
    return lambda expert: {
        **{role: parts[role][expert].copy() for role in own},
        "weight_scale": rows[expert].copy(),
    }


def fp8(scale: str, name: str = "weight_scale_inv") -> Stack:
    stored, rows = scales_of(scale)
    parts = {"weight": e4m3(EXPERTS, OUT, IN), name: stored}
    values = parts["weight"].astype(np.float32) * rows
    single = rows_of(parts, rows, "weight")
    return Stack({"quant_method": "fp8"}, parts, values, single, {"bits": 8})


def fp8_blocks() -> Stack:
    grid = random().uniform(0.01, 0.1, (EXPERTS, 3, 2)).astype(np.float32)
    parts = {"weight": e4m3(EXPERTS, OUT, IN), "weight_scale_inv": grid}
    spread = grid.repeat(24, axis=1)[:, :OUT].repeat(96, axis=2)[:, :, :IN]
    values = parts["weight"].astype(np.float32) * spread
    block = {"quant_method": "fp8", "weight_block_size": [24, 96]}
    return Stack(block, parts, values, of_experts(parts), {"bits": 8})


def in_folder_of(stack: Stack, block: dict[str, Any]) -> Stack:
    stack.block = block
    return stack


CT_FLOAT = ct_layers.block("float-quantized", num_bits=8, type="float", strategy="channel")
CT_NVFP4 = ct_layers.block("nvfp4-pack-quantized", type="float", group_size=16)
CT_MXFP4 = ct_layers.block("mxfp4-pack-quantized", type="float", group_size=32)
MODELOPT = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}


def ct_int(scale: str, packed: bool) -> Stack:
    stored, rows = scales_of(scale)
    bits = 4 if packed else 8
    codes = random(1).integers(-(1 << bits - 1), 1 << bits - 1, (EXPERTS, OUT, IN))
    how = "pack-quantized" if packed else "int-quantized"
    words = ct_layers.pack(codes + 8, 4) if packed else codes.astype(np.int8)
    role = "weight_packed" if packed else "weight"
    parts = {role: words, "weight_scale": stored}
    block = ct_layers.block(how, num_bits=bits, strategy="channel")
    values = codes.astype(np.float32) * rows
    return Stack(block, parts, values, rows_of(parts, rows, role))


def ct_groups(asymmetric: bool = False, act_order: bool = False, transposed: bool = False) -> Stack:
    codes = random(2).integers(-8, 8, (EXPERTS, OUT, IN))
    scales = random(3).uniform(0.01, 0.1, (EXPERTS, OUT, IN // 32)).astype(BF16)
    zeros = random(4).integers(-8, 8, scales.shape) if asymmetric else np.zeros(scales.shape, int)
    of = np.tile(np.arange(IN) // 32, (EXPERTS, 1))
    if act_order:
        of = np.stack([random(expert).permutation(row) for expert, row in enumerate(of)])
    index = np.broadcast_to(of[:, None], codes.shape)
    spread, zero = (
        np.take_along_axis(x, index, axis=2) for x in (scales.astype(np.float32), zeros)
    )
    parts = {"weight_packed": ct_layers.pack(codes + 8, 4), "weight_scale": scales}
    if asymmetric:
        along = ct_layers.pack(np.swapaxes(zeros + 8, 1, 2), 4)
        parts["weight_zero_point"] = np.ascontiguousarray(np.swapaxes(along, 1, 2))
    if act_order:
        parts["weight_g_idx"] = of.astype(np.int32)
    block = ct_layers.block(
        group_size=32, symmetric=not asymmetric, actorder="group" if act_order else None
    )
    single = of_experts(dict(parts))
    if transposed:
        parts = {role: np.ascontiguousarray(np.swapaxes(x, 1, 2)) for role, x in parts.items()}
    values = (codes - zero).astype(np.float32) * spread
    return Stack(block, parts, values, single, transposed=transposed)


FACTORS = {name: SCALES[name] for name in ("()", "(1,)", "(E,)", "(E, 1)", "(E, 1, 1)", "(E, 2)")}


def nvfp4(factor: str, tool: str, transposed: bool = False) -> Stack:
    packed = random(5).integers(0, 256, (EXPERTS, OUT, IN // 2), np.uint8)
    scale = small_e4m3(EXPERTS, OUT, IN // 16)
    wide = scale.astype(np.float32)
    codes, second, block = "weight", "weight_scale_2", MODELOPT
    if tool == "ct":
        codes, second, block = "weight_packed", "weight_global_scale", CT_NVFP4
    parts = {codes: packed, "weight_scale": scale}
    single = None
    if factor:
        stored, rows = scales_of(factor)
        wide = wide / rows if tool == "ct" else wide * rows
        parts[second] = stored
    if factor not in ("", "(E, 2)"):
        single = of_experts({codes: packed, "weight_scale": scale, second: rows[:, :1, 0].copy()})

    if transposed:
        for role in (codes, "weight_scale"):
            parts[role] = np.ascontiguousarray(np.swapaxes(parts[role], 1, 2))
    values = E2M1[nibbles(packed)] * wide.repeat(16, axis=2)
    return Stack(block, parts, np.asarray(values, np.float32), single, transposed=transposed)


def mx_codes(
    bits: int, block: dict[str, Any], role: str = "weight", transposed: bool = False
) -> Stack:
    scale = random(6).integers(100, 140, (EXPERTS, OUT, IN // 32), np.uint8)
    codes: np.ndarray = e4m3(EXPERTS, OUT, IN, seed=6)
    elements = codes.astype(np.float32)
    if bits == 4:
        codes = random(8).integers(0, 256, (EXPERTS, OUT, IN // 2), np.uint8)
        elements = E2M1[nibbles(codes)]
    parts = {role: codes, "weight_scale": scale}
    single = of_experts(dict(parts))
    if transposed:
        parts = {name: np.ascontiguousarray(np.swapaxes(x, 1, 2)) for name, x in parts.items()}
    values = elements * scale.view(E8M0).astype(np.float32).repeat(32, axis=2)
    return Stack(block, parts, values, single, transposed=transposed)


def modelopt_int4() -> Stack:
    codes = random(9).integers(-8, 8, (EXPERTS, OUT, IN))
    scales = random(9).uniform(0.01, 0.1, (EXPERTS, OUT, IN // 32)).astype(np.float32)
    pairs = (codes & 15).astype(np.uint8)
    parts = {"weight": pairs[:, 0::2] | pairs[:, 1::2] << 4, "weight_scale": scales}
    values = codes.astype(np.float32) * scales.repeat(32, axis=2)
    return Stack(MODELOPT, parts, values, of_experts(parts))


def modelopt_int8(scale: str) -> Stack:
    made = ct_int(scale, packed=False)
    rows = scales_of(scale)[1]
    codes = made.parts["weight"]
    made.single = lambda expert: {
        "weight": codes[expert].copy(),
        "weight_scale": rows[expert, :, 0].copy(),
    }
    return in_folder_of(made, MODELOPT)


def qweights(pack: Callable[..., Parts], block: dict[str, Any], act_order: bool = False) -> Stack:
    """AWQ's and GPTQ's: ``[experts, in, ...]``, scales and zeros ``[experts, groups, out]``."""
    codes = random(10).integers(0, 16, (EXPERTS, OUT, IN))
    zeros = random(11).integers(0, 16, (EXPERTS, OUT, IN // 32))
    scales = random(12).uniform(0.01, 0.1, zeros.shape).astype(np.float16)
    of = np.tile(np.arange(IN) // 32, (EXPERTS, 1))
    if act_order:
        of = np.stack([random(expert).permutation(row) for expert, row in enumerate(of)])
    each = [pack(codes[e], zeros[e], scales[e]) for e in range(EXPERTS)]
    parts = {role: np.stack([one[role] for one in each]) for role in each[0]}
    if act_order:
        parts["g_idx"] = of.astype(np.int32)
    index = np.broadcast_to(of[:, None], codes.shape)
    spread, zero = (
        np.take_along_axis(x, index, axis=2) for x in (scales.astype(np.float32), zeros)
    )
    values = (codes - zero).astype(np.float32) * spread
    return Stack(block, parts, values, of_experts(parts))


def gptq(codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray) -> Parts:
    return packers.gptq(codes, zeros, scales, 4)


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
GPTQ = {
    **{"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False},
    "checkpoint_format": "gptq_v2",
}
AUTO_ROUND = {
    **{"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": False},
    "packing_format": "auto_round",
}


def quark_channels() -> Stack:
    codes = random(13).integers(-128, 128, (EXPERTS, OUT, IN))
    scales = random(13).uniform(0.01, 0.1, (EXPERTS, OUT)).astype(np.float32)
    parts = {"weight": codes.astype(np.int8), "weight_scale": scales}
    values = codes.astype(np.float32) * scales[:, :, None]
    return Stack(quark_block("int8", "per_channel"), parts, values, of_experts(parts))


def quark_groups() -> Stack:
    codes = random(14).integers(0, 16, (EXPERTS, IN, OUT))
    zeros = random(15).integers(0, 16, (EXPERTS, IN // 32, OUT))
    scales = random(14).uniform(0.01, 0.1, zeros.shape).astype(np.float16)
    parts = {
        "weight": pack_words(codes, "reorder"),
        "weight_scale": scales,
        "weight_zero_point": pack_words(zeros, "reorder"),
    }
    steps = (codes - zeros.repeat(32, axis=1)).astype(np.float32)
    values = np.swapaxes(steps * scales.astype(np.float32).repeat(32, axis=1), 1, 2)
    block = quark_block("uint4", pack="reorder")
    return Stack(block, parts, np.ascontiguousarray(values), of_experts(parts))


def quark_nvfp4(factor: str) -> Stack:
    return in_folder_of(nvfp4(factor, "modelopt"), quark_block([{"dtype": "fp4"}] * 2))


STACKS: dict[str, Callable[[], Stack]] = {
    **{f"fp8 {scale}": lambda scale=scale: fp8(scale) for scale in SCALES},
    "fp8 blocks": fp8_blocks,
    "fp8 weight_scale": lambda: fp8("(E, out)", "weight_scale"),
    **{
        f"ct fp8 {scale}": lambda scale=scale: in_folder_of(fp8(scale, "weight_scale"), CT_FLOAT)
        for scale in SCALES
    },
    "ct fp8 scale_inv": lambda: in_folder_of(fp8("(E, out, 1)"), CT_FLOAT),
    **{
        f"modelopt fp8 {scale}": lambda scale=scale: in_folder_of(fp8(scale), MODELOPT)
        for scale in SCALES
    },
    "quark fp8": lambda: in_folder_of(fp8("(E,)"), quark_block("fp8_e4m3", "per_tensor")),
    **{f"ct int4 {scale}": lambda scale=scale: ct_int(scale, True) for scale in SCALES},
    **{f"ct int8 {scale}": lambda scale=scale: ct_int(scale, False) for scale in SCALES},
    "ct int4 groups": ct_groups,
    "ct int4 asymmetric": lambda: ct_groups(asymmetric=True),
    "ct int4 act-order": lambda: ct_groups(act_order=True),
    "ct int4 transposed": lambda: ct_groups(transposed=True),
    **{
        f"ct nvfp4 {factor}": lambda factor=factor: nvfp4(factor, "ct") for factor in ("", *FACTORS)
    },
    **{
        f"modelopt nvfp4 {factor}": lambda factor=factor: nvfp4(factor, "modelopt")
        for factor in ("", *FACTORS)
    },
    "modelopt nvfp4 transposed": lambda: nvfp4("()", "modelopt", transposed=True),
    "modelopt nvfp4 transposed, a factor each": lambda: nvfp4("(E,)", "modelopt", transposed=True),
    "quark nvfp4": lambda: quark_nvfp4("(E,)"),
    "quark nvfp4 without a factor": lambda: quark_nvfp4(""),
    "mxfp4": lambda: mx_codes(4, {"quant_method": "mxfp4"}),
    "mxfp4 packed": lambda: mx_codes(4, {"quant_method": "mxfp4"}, "weight_packed"),
    "mxfp4 transposed": lambda: mx_codes(4, {"quant_method": "mxfp4"}, transposed=True),
    "ct mxfp4": lambda: mx_codes(4, CT_MXFP4, "weight_packed"),
    "ct mxfp8": lambda: mx_codes(8, ct_layers.block("mxfp8-quantized", num_bits=8, type="float")),
    "fp8 mxfp8": lambda: mx_codes(8, {"quant_method": "mxfp8"}),
    "modelopt mxfp4": lambda: mx_codes(4, MODELOPT),
    "modelopt mxfp4 transposed": lambda: mx_codes(4, MODELOPT, transposed=True),
    "modelopt mxfp8": lambda: mx_codes(8, MODELOPT),
    "modelopt mxfp8 transposed": lambda: mx_codes(8, MODELOPT, transposed=True),
    "quark mxfp4": lambda: mx_codes(4, quark_block("fp4")),
    "modelopt int4": modelopt_int4,
    **{f"modelopt int8 {scale}": lambda scale=scale: modelopt_int8(scale) for scale in SCALES},
    "awq": lambda: qweights(packers.gemm, AWQ),
    "gptq": lambda: qweights(gptq, GPTQ),
    "gptq act-order": lambda: qweights(gptq, GPTQ, act_order=True),
    "auto-round": lambda: qweights(gptq, AUTO_ROUND),
    "quark int8": quark_channels,
    "quark uint4": quark_groups,
}


def named(parts: Mapping[str, np.ndarray], name: Callable[[str], str]) -> Parts:
    return {name(role): part for role, part in parts.items()}


def cases() -> list[Any]:
    """Every format under vLLM's names, and under the others once for each kind of codes."""
    seen, found = set[str](), []
    for key, make in STACKS.items():
        kind = key.partition(" (")[0]
        for naming in NAMINGS if kind not in seen else ["vllm"]:
            if naming == "modelopt" and is_external(make()):
                continue  # test_stack_names.py
            found.append(pytest.param(make, naming, id=f"{key}-{naming}"))
        seen.add(kind)
    return found


def is_external(stack: Stack) -> bool:
    """Whether only the names of ModelOpt say how a stack is stored, in another folder."""
    bare = {"weight", "weight_scale"} <= stack.parts.keys()
    return bare and stack.block.get("quant_method") != "modelopt"


@pytest.mark.parametrize("key", [key for key, make in STACKS.items() if is_external(make())])
def test_loader_stacks(key: str, tmp_path: Path) -> None:
    """Rejected by name; under the name that the message gives they are read."""
    stack = STACKS[key]()
    source = write_quantized(
        tmp_path / "source", named(stack.parts, modelopt), stack.block, model_type="moe"
    )
    with pytest.raises(requant.CheckpointError) as error:
        requant.plan(source, layout="keep", dequantize=True)
    (problem,) = error.value.problems
    assert problem.where == f"{PLACE}.gate_up_proj"
    assert f"{PLACE}.gate_up_proj_weight_scale next to it" in problem.message
    assert problem.message.endswith(f"call the scale {PLACE}.gate_up_proj_scale")


@pytest.mark.parametrize(("make", "naming"), cases())
def test_values(make: Callable[[], Stack], naming: str, tmp_path: Path) -> None:
    """Decoded in float32 a stack is what NumPy makes of its description, to the last bit."""
    stack, (name, path, dense) = make(), NAMINGS[naming]
    source = write_quantized(
        tmp_path / "source", named(stack.parts, name), stack.block, model_type="moe"
    )
    made = dequantized(source, tmp_path / "out", chunk_bytes=3000)
    assert list(made) == [f"{path}.weight" if stack.transposed else dense]
    (found,) = made.values()
    assert found.shape == stack.values.shape
    assert found.tobytes() == stack.values.astype(np.float32).tobytes()


@pytest.mark.parametrize("make", STACKS.values(), ids=STACKS)
def test_a_stack_is_its_experts_bit_for_bit(make: Callable[[], Stack], tmp_path: Path) -> None:
    """And in memory, of either library of arrays, it is what the folder gives."""
    stack, (name, path, _) = make(), NAMINGS["vllm"]
    whole = write_quantized(
        tmp_path / "whole", named(stack.parts, name), stack.block, model_type="moe"
    )
    requant.convert(whole, tmp_path / "stack", layout="keep", chunk_bytes=3000, **stack.options)
    same_in_memory(whole, tmp_path / "stack", Quantization.affine(64, 8) if stack.options else None)
    if stack.single is None:
        return
    made, separate = read_folder(tmp_path / "stack"), Parts()
    for expert in range(EXPERTS):
        parts = stack.single(expert)
        separate |= {f"{PLACE}.{expert}.up.{role}": part for role, part in parts.items()}
    single = write_quantized(tmp_path / "apart", separate, stack.block, model_type="moe")
    each, _ = convert(single, tmp_path / "single", **stack.options)
    assert len(each) == EXPERTS * len(made)
    for role in (key.rpartition(".")[2] for key in made):
        for expert, matrix in enumerate(made[f"{path}.{role}"]):
            wanted = each[f"{PLACE}.{expert}.up.{role}"]
            assert (matrix.dtype, matrix.shape) == (wanted.dtype, wanted.shape)
            assert matrix.tobytes() == wanted.tobytes(), (role, expert)
