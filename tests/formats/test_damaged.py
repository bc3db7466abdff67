"""Each tensor of a layer missing, cut, transposed or of another kind, in all float formats.

A damage must be rejected with the layer's name, or leave a layer that means one thing only: those
few are listed with the reason, and hold the rest to be rejected.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import requant
from requant.errors import CheckpointError
from tests.support.checkpoints import write_quantized
from tests.support.fixture_folders import fixture
from tests.support.layers import fp_quant, metal, quark
from tests.support.number_formats import BF16
from tests.support.plan_texts import note_texts
from tests.support.safetensors_files import read_file, write_file

pytestmark = pytest.mark.sweep(1)

FIXTURES = [
    "bitnet-autobitlinear",
    "bitnet-bitlinear",
    "ct-float-fp8-block",
    "ct-float-fp8-channel",
    "ct-float-fp8-tensor",
    "ct-int-quantized",
    "ct-mixed-precision",
    "ct-mxfp4-pack",
    "ct-mxfp8",
    "ct-naive-fp8-tensor",
    "ct-nvfp4-pack",
    "ct-pack-int3-g64",
    "ct-pack-int4-actorder-group",
    "ct-pack-int4-asym-g32",
    "ct-pack-int8-channel",
    "fp8-block-deepseek-edge",
    "fp8-block-llama",
    "fp8-block-ue8m0",
    "modelopt-fp8",
    "modelopt-nvfp4",
    "mxfp4-gpt-oss",
    "torchao-fp8-weight-only",
    "torchao-int8-weight-only",
    "torchao-intx-w4g32",
]


def damages(array: np.ndarray) -> Iterator[tuple[str, np.ndarray | None]]:
    yield "missing", None
    yield "an axis more", array[None]
    yield "int64", np.zeros(array.shape, np.int64)
    yield "float64", np.ones(array.shape, np.float64)
    if array.ndim:
        yield "empty", array[..., :0]
        yield "twice", np.concatenate([array, array])
        yield "a column less", array[..., :-1]
    if array.ndim > 1:
        yield "a row less", array[..., :-1, :]
        if array.shape[-1] != array.shape[-2]:
            yield "transposed", np.swapaxes(array, -1, -2)


def is_harmless(role: str, made: np.ndarray | None, layer: dict[str, np.ndarray]) -> bool:
    """Whether a layer with ``made`` in place of the tensor ``role`` still means one thing only."""
    if role in ("input_scale", "act_global_scale"):  # of activations: dropped, whatever it holds
        return True
    if made is None:  # the words and the config say the same
        return role in ("weight_shape", "forward_hadamard_matrix")
    if role in ("weight", "_weight_qdata"):
        scale = next(array for name, array in layer.items() if "scale" in name)
        return made.dtype == layer[role].dtype and tiles(made, layer[role], scale)
    if "scale" not in role:
        return False
    before = layer[role]
    if made.dtype == np.float64:  # a wider number of the same kind
        return made.shape == before.shape and str(before.dtype) in ("float32", "bfloat16")
    return before.size == made.size == 1 and made.dtype == before.dtype


def tiles(weight: np.ndarray, before: np.ndarray, scale: np.ndarray) -> bool:
    """Whether the scales tile the weight as they tiled it before; one scale holds for any shape."""
    if scale.size == 1:
        return bool(weight.size)
    if weight.ndim != 2:
        return False
    grid = scale.reshape(scale.shape[0], -1).shape
    high = 1 if grid[0] == before.shape[0] else 128
    wide = 32 if high == 1 else 128
    if grid[1] == 1 and high == 1:
        return weight.shape[0] == grid[0]
    return (-(-weight.shape[0] // high), -(-weight.shape[1] // wide)) == grid


def metadata_of(folder: Path) -> dict[str, str]:
    raw = (folder / "model.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    found: dict[str, str] = header.get("__metadata__", {})
    return found


def by_hand(name: str, folder: Path) -> Path:
    """A folder of a format without a fixture."""
    if name == "metal":
        return write_quantized(folder, metal.layer(8, 128, 4, 64)[0], metal.block())
    if name.startswith("fp-quant"):
        nvfp4 = name.endswith("nvfp4")
        tensors, _ = fp_quant.layer(1, nvfp4)
        return write_quantized(folder, tensors, fp_quant.block("nvfp4" if nvfp4 else "mxfp4"))
    random, dtype = np.random.default_rng(0), name.removeprefix("quark-")
    if dtype == "uint4":
        words = random.integers(0, 1 << 31, (64, 2)).astype(np.int32)
        zeros = random.integers(0, 1 << 31, (2, 2)).astype(np.int32)
        scales = np.ones((2, 16), BF16)
        tensors = {"up.weight": words, "up.weight_scale": scales, "up.weight_zero_point": zeros}
        scheme = {"dtype": dtype, "qscheme": "per_group", "group_size": 32}
        return write_quantized(folder, tensors, quark.block(scheme))
    codes = random.integers(0, 256, (16, 48), np.uint8)
    exponents = np.full((16, 3 if dtype == "fp4" else 2), 127, np.uint8)
    return write_quantized(
        folder, {"up.weight": codes, "up.weight_scale": exponents}, quark.block(dtype)
    )


BY_HAND = [
    "metal",
    "fp-quant-mxfp4",
    "fp-quant-nvfp4",
    "quark-uint4",
    "quark-fp4",
    "quark-fp6_e3m2",
]


@pytest.mark.parametrize("name", [*FIXTURES, *BY_HAND])
def test_a_damaged_tensor_is_named(name: str, tmp_path: Path) -> None:
    folder = by_hand(name, tmp_path / "whole") if name in BY_HAND else fixture(name) / "checkpoint"
    tensors = read_file(folder / "model.safetensors")
    first = requant.plan(folder, bits=8, layout="keep")
    path = next(layer.layer for layer in first.layers if layer.treatment in ("kept", "requantized"))
    stems = (f"{path}.", f"{path}_")
    own = {n: a for n, a in tensors.items() if n.startswith(stems) and not n.endswith("bias")}
    own_roles = {n[len(path) + 1 :]: a for n, a in own.items()}
    assert len(own) > 1
    seen = 0
    for tensor, array in own.items():
        for damage, made in damages(array):
            source = tmp_path / "source"
            shutil.rmtree(source, ignore_errors=True)
            source.mkdir()
            for file in folder.glob("*.json"):
                shutil.copy(file, source)
            rest = {n: a for n, a in tensors.items() if n != tensor}
            if made is not None:
                rest[tensor] = np.ascontiguousarray(made).reshape(made.shape)
            write_file(source / "model.safetensors", rest, metadata_of(folder))
            role = tensor[len(path) + 1 :]
            case = f"{tensor}: {damage}"
            try:
                plan = requant.plan(source, bits=8, layout="keep")
            except CheckpointError as error:
                assert path in str(error), f"{case}: {error}"
                seen += 1
                continue
            layer = next(layer for layer in plan.layers if layer.layer == path)
            if damage == "twice" and any("are believed" in note for note in note_texts(plan.notes)):
                continue  # as if the layer had as many inputs, which a note says
            assert is_harmless(role, made, own_roles), f"{case} became {layer}"
    assert seen >= 7, seen
