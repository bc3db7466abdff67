"""torchao by hand: every type of tensor, swizzled scales, and folders that must be rejected."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import requant
from tests.support.checkpoints import write_quantized
from tests.support.conversions import dequantized, rejection
from tests.support.damage import damage, damages
from tests.support.mlx_reference import affine, float_values
from tests.support.number_formats import BF16, E2M1, E4M3, E8M0, e4m3
from tests.support.safetensors_files import read_folder, write_file

BLOCK = {"quant_method": "torchao"}
MX = ("MXTensor", {"block_size": 32})


def source(
    folder: Path,
    parts: dict[str, np.ndarray],
    kind: str,
    data: dict[str, Any] | None = None,
    block: Any = BLOCK,
) -> Path:
    """A folder with one weight ``up``, split, and the metadata that describes it."""
    tensors = {f"up._weight_{role}": array for role, array in parts.items()}
    write_quantized(folder, tensors, block)
    declared = {"_type": kind, "_data": data or {}, "_tensor_data_names": list(parts)}
    metadata = {"up.weight": json.dumps(declared), "tensor_names": '["up.weight"]'}
    write_file(folder / "model.safetensors", tensors, metadata)
    return folder


def dense(folder: Path, output: Path) -> np.ndarray:
    return dequantized(folder, output, chunk_bytes=3000)["up.weight"]


def converted(folder: Path, output: Path, **options: Any) -> tuple[dict[str, np.ndarray], Any]:
    report = requant.convert(folder, output, layout="keep", chunk_bytes=3000, **options)
    return read_folder(output), report.plan.layers[0]


def swizzle(scales: np.ndarray) -> np.ndarray:
    """Tiles of 128 x 4 as 32 x 16 bytes, written element by element from the description."""
    rows, groups = scales.shape
    down, across = -(-rows // 128), -(-groups // 4)
    tiles = np.zeros((down * across, 32, 16), scales.dtype)
    for r in range(rows):
        for c in range(groups):
            tile = r // 128 * across + c // 4
            tiles[tile, r % 32, 4 * (r // 32 % 4) + c % 4] = scales[r, c]
    return tiles.reshape(32 * down, 16 * across)


@pytest.mark.slow
@settings(max_examples=30)
@given(
    rows=st.integers(1, 300),
    groups=st.integers(1, 9),
    bits=st.sampled_from([4, 8]),
    swizzled=st.booleans(),
)
def test_mx_of_any_shape(rows: int, groups: int, bits: int, swizzled: bool, tmp_path_factory: Any):
    tmp_path = tmp_path_factory.mktemp("mx")
    random = np.random.default_rng(rows)
    exponents = random.integers(100, 140, (rows, groups), np.uint8).view(E8M0)
    codes = e4m3(rows, 32 * groups) if bits == 8 else random.integers(0, 256, (rows, 16 * groups))
    codes = codes if bits == 8 else codes.astype(np.uint8)
    stored = swizzle(exponents.view(np.uint8)).view(E8M0) if swizzled else exponents
    parts = {"qdata": codes, "scale": stored}
    folder = source(tmp_path / "source", parts, "MXTensor", {"is_swizzled_scales": swizzled})
    made, layer = converted(folder, tmp_path / "out")
    assert layer.exactness == "exact"
    assert np.array_equal(made["up.scales"], exponents.view(np.uint8))
    spec = {"group_size": 32, "bits": bits, "mode": f"mxfp{bits}"}
    values = float_values(made, "up", spec)
    assert np.array_equal(dense(folder, tmp_path / "dense"), values)
    assert made["up.weight"].tobytes() == codes.tobytes()


@pytest.mark.parametrize("swizzled", [False, True])
@pytest.mark.parametrize("factor", [None, 0.25, 0.3])
def test_nvfp4(swizzled: bool, factor: float | None, tmp_path: Path) -> None:
    """A tensor scale of 1/4 folds; 0.3 does not."""
    random = np.random.default_rng(1)
    packed = random.integers(0, 256, (130, 32), np.uint8)
    scales = random.uniform(1, 4, (130, 4)).astype(E4M3)
    stored = swizzle(scales.view(np.uint8)).view(E4M3) if swizzled else scales
    parts = {"qdata": packed, "scale": stored, "act_per_tensor_scale": np.float32([2])}
    if factor is not None:
        parts["per_tensor_scale"] = np.array(factor, np.float32)
    data = {"is_swizzled_scales": swizzled, "block_size": 16}
    folder = source(tmp_path / "source", parts, "NVFP4Tensor", data)
    pairs = np.stack([packed & 15, packed >> 4], axis=-1).reshape(130, 64)
    each = scales.astype(np.float32) * np.float32(1 if factor is None else factor)
    values = E2M1[pairs] * each.repeat(16, axis=1)
    assert np.array_equal(dense(folder, tmp_path / "dense"), values)
    made, layer = converted(folder, tmp_path / "out")
    if factor == 0.3:
        assert layer.exactness == "re-encoded"
    else:
        spec = {"group_size": 16, "bits": 4, "mode": "nvfp4"}
        assert np.array_equal(float_values(made, "up", spec), values)
        assert layer.exactness == "exact"
    assert not any("act_per_tensor_scale" in name for name in made)


def test_int4_with_zeros_in_weight_units(tmp_path: Path) -> None:
    """Low nibble first, two's complement; scales and zeros are [groups, out]."""
    random = np.random.default_rng(2)
    packed = random.integers(-128, 128, (6, 64)).astype(np.int8)
    scales = random.uniform(0.1, 1, (4, 6)).astype(BF16)
    zeros = random.uniform(-1, 1, (4, 6)).astype(BF16)
    parts = {"qdata": packed, "scale": scales, "zero_point": zeros}
    folder = source(tmp_path / "source", parts, "Int4Tensor", {"block_size": [1, 32]})
    low = packed.view(np.uint8) & 15
    codes = np.stack([low, packed.view(np.uint8) >> 4], axis=-1).reshape(6, 128)
    signed = np.where(codes > 7, codes.astype(int) - 16, codes).astype(np.float32)
    spread = [x.T.astype(np.float32).repeat(32, axis=1) for x in (scales, zeros)]
    values = signed * spread[0] + spread[1]
    assert np.array_equal(dense(folder, tmp_path / "dense"), values)
    made, layer = converted(folder, tmp_path / "out")
    got = affine(made, "up", 32, 4)
    assert np.array_equal(got.codes, codes ^ 8)
    biases = spread[1] - 8 * spread[0]
    assert np.array_equal(got.biases, biases.astype(BF16).astype(np.float64))
    assert layer.bound == "biases rounded to bfloat16, relative error at most 0.0039"


@pytest.mark.parametrize("bits", range(1, 9))
def test_signed_bytes_of_every_width(bits: int, tmp_path: Path) -> None:
    """int1 to int8 with zeros that are not 0: codes kept, 7 bits in 8 and 1 in 2."""
    random = np.random.default_rng(bits)
    half = 1 << (bits - 1)
    codes = random.integers(-half, half, (6, 64)).astype(np.int8)
    zeros = random.integers(-half, half, (6, 2)).astype(np.int8)
    zeros[0] = -half  # never all 0
    scales = random.uniform(0.1, 1, (6, 2)).astype(BF16)
    data = {"target_dtype": {"_type": "torch.dtype", "_data": f"int{bits}"}}
    parts = {"qdata": codes, "scale": scales, "zero_point": zeros}
    folder = source(tmp_path / "source", parts, "IntxUnpackedToInt8Tensor", data)
    steps = codes.astype(np.float32) - zeros.repeat(32, axis=1)
    values = steps * scales.astype(np.float32).repeat(32, axis=1)
    assert np.array_equal(dense(folder, tmp_path / "dense"), values)
    made, layer = converted(folder, tmp_path / "out")
    got = affine(made, "up", 32, {1: 2, 7: 8}.get(bits, bits)).codes
    assert np.array_equal(got, codes.astype(int) + half)
    assert layer.exactness == "rounded"


def test_scaled_activations_are_folded(tmp_path: Path) -> None:
    codes = e4m3(4, 64).view(np.uint8).view(np.int8)
    inputs = np.linspace(0.5, 2, 64).astype(BF16).reshape(1, 64)
    parts = {"qdata": codes, "scale": np.ones((4, 1), np.float32), "act_pre_scale": inputs}
    folder = source(tmp_path / "source", parts, "Int8Tensor")
    expected = codes.astype(np.float32) * inputs.astype(np.float32)
    assert np.array_equal(dense(folder, tmp_path / "dense"), expected)
    _, layer = converted(folder, tmp_path / "out")
    assert layer.exactness == "re-encoded"


def test_without_a_config_the_metadata_tells(tmp_path: Path) -> None:
    parts = {"qdata": e4m3(4, 64), "scale": np.full((4, 2), 127, np.uint8).view(E8M0)}
    _, layer = converted(source(tmp_path / "source", parts, *MX, block=None), tmp_path / "out")
    assert layer.source == "mxfp8"


# A line names the type; the changes are to the parts of the weight and to its own data.
DAMAGED = """
Int4TilePackedTo4dTensor: 0 -> codes in the order of a GPU kernel, not read
Int4PlainInt32Tensor: 0 -> codes in the order of a GPU kernel, not read
AffineQuantizedTensor: 0 -> is of type 'AffineQuantizedTensor'; known are Int8Tensor
- qdata -> up._weight_scale: F32 [4, 1] has no codes next to it
- scale -> up: has no up._weight_scale
qdata = U8 [4, 64] -> up._weight_qdata: U8 [4, 64], expected I8 codes
scale = F32 [4, 3] 1 -> up._weight_scale: F32 [4, 3], expected floats [4, groups]
zero_point = I8 [4] -> up._weight_zero_point: I8 [4], expected I8 [4, 1]
IntxUnpackedToInt8Tensor: 0; target_dtype: "int9"
    has target_dtype 'int9', expected int1 to int8
IntxUnpackedToInt8Tensor: 0; target_dtype: "int2"; qdata = I8 [4, 64] 9 -> its codes are 9, but
Float8Tensor: 0 -> up._weight_qdata: I8 [4, 64], expected F8_E4M3 codes
NVFP4Tensor: 0 -> up._weight_qdata: I8 [4, 64], expected U8
MXTensor: 0; qdata = F8_E4M3 [4, 64] 1; block_size: 16 -> has blocks of 16; MLX's are of 32
MXTensor: 0; qdata = F8_E4M3 [4, 64] 1; scale = U8 [2, 2]
    up._weight_scale: U8 [2, 2], expected [4, 2]
MXTensor: 0; qdata = F8_E4M3 [4, 64] 1; scale = U8 [4, 2]; is_swizzled_scales: true
    up._weight_scale: U8 [4, 2], expected [32, 16], swizzled
act_pre_scale = F32 [63] 1
    up._weight_act_pre_scale: F32 [63], expected one float for each of 64 inputs
"""


@pytest.mark.parametrize(("changes", "words"), damages(DAMAGED))
def test_damaged_folders_are_rejected(changes: str, words: list[str], tmp_path: Path) -> None:
    parts = {"qdata": np.zeros((4, 64), np.int8), "scale": np.ones((4, 1), np.float32)}
    data: dict[str, Any] = {}
    damage(changes, parts, data)
    kind = next((name for name in data if name.endswith("Tensor")), "Int8Tensor")
    data.pop(kind, None)
    text = rejection(source(tmp_path / "source", parts, kind, data), tmp_path / "out")
    assert all(word in text for word in words), text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{oops", "metadata: up.weight: does not describe a tensor"),
        ("{}", "has no _type and _data"),
        (
            '{"_type": "Int8Tensor", "_tensor_data_names": ["zero_point"]}',
            "names 'zero_point', but up._weight_zero_point is missing",
        ),
        ('{"_type": "Int8Tensor", "_tensor_data_names": [["scale"]]}', "names a list of 1, but"),
        (None, "has no metadata that gives its type"),
    ],
)
def test_metadata_that_does_not_fit(text: str | None, words: str, tmp_path: Path) -> None:
    tensors = {
        "up._weight_qdata": np.zeros((4, 64), np.int8),
        "up._weight_scale": np.ones((4, 1), np.float32),
    }
    folder = write_quantized(tmp_path / "source", tensors, BLOCK)
    metadata = {} if text is None else {"up.weight": text}
    write_file(folder / "model.safetensors", tensors, metadata)
    assert words in rejection(folder, tmp_path / "out")


def test_zeros_that_the_config_denies_are_rejected(tmp_path: Path) -> None:
    scheme = {"_type": "IntxWeightOnlyConfig", "_data": {"mapping_type": {"_data": "SYMMETRIC"}}}
    parts = {
        "qdata": np.zeros((4, 64), np.int8),
        "scale": np.ones((4, 2), np.float32),
        "zero_point": np.ones((4, 2), np.int8),
    }
    block = BLOCK | {"quant_type": {"default": scheme}}
    folder = source(tmp_path / "source", parts, "IntxUnpackedToInt8Tensor", None, block)
    assert "the config calls the layer symmetric" in rejection(folder, tmp_path / "out")


def test_codes_that_are_not_weights_are_rejected(tmp_path: Path) -> None:
    tensors = {"experts._gate_up_proj_qdata": np.zeros((2, 4, 64), np.int8)}
    folder = write_quantized(tmp_path / "source", tensors, BLOCK)
    assert "experts._gate_up_proj_qdata: I8 [2, 4, 64] holds codes, but has no scale" in rejection(
        folder, tmp_path / "out"
    )


def test_layers_that_are_absent_are_rejected(tmp_path: Path) -> None:
    parts = {"qdata": np.zeros((4, 64), np.int8), "scale": np.ones((4, 1), np.float32)}
    folder = source(tmp_path / "a", parts, "Int8Tensor", block=BLOCK)
    tensors = {f"up._weight_{role}": array for role, array in parts.items()}
    declared = {"up.weight": '{"_type": "Int8Tensor"}', "gate.weight": '{"_type": "Int8Tensor"}'}
    write_file(
        folder / "model.safetensors", tensors, declared | {"norm.weight": '{"_type": "Tensor"}'}
    )
    text = rejection(folder, tmp_path / "out")
    assert "metadata: gate.weight: describes its Int8Tensor, but gate._weight_qdata is miss" in text
