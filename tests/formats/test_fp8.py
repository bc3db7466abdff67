"""FP8 by hand: vectors, every kind of scale, any shape, and folders that must be rejected."""

import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import requant
from tests.support.checkpoints import write_quantized
from tests.support.conversions import convert, rejection
from tests.support.damage import damage, damages
from tests.support.mlx_reference import float_values
from tests.support.number_formats import BF16, E4M3, E8M0, e4m3
from tests.support.plan_texts import note_texts
from tests.support.safetensors_files import read_folder

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
MXFP8 = {"group_size": 32, "bits": 8, "mode": "mxfp8"}


def dense(folder: Path, output: Path, dtype: str = "float32") -> dict[str, np.ndarray]:
    requant.convert(folder, output, layout="keep", dequantize=True, dtype=dtype)
    return read_folder(output)


def test_deepseeks_own_numbers(tmp_path: Path) -> None:
    """Byte 0x3a is 1.25; times 0.0123 it is 0.015375 in float32, 0x3c7c in bfloat16."""
    tensors = {
        "up.weight": np.full((1, 32), 0x3A, np.uint8).view(E4M3),
        "up.weight_scale_inv": np.array([[0x3C4985F0]], np.uint32).view(np.float32),
    }
    folder = write_quantized(tmp_path / "source", tensors, FP8)
    assert dense(folder, tmp_path / "a")["up.weight"][0, 0] == np.float32(1.25) * np.float32(0.0123)
    in_bf16 = dense(folder, tmp_path / "b", "bfloat16")["up.weight"]
    assert in_bf16.view(np.uint16).tolist() == [[0x3C7C] * 32]


@pytest.mark.parametrize(
    ("shape", "scale", "name"),
    [
        ((6, 64), (), "weight_scale"),
        ((6, 64), (1,), "weight_scale"),
        ((6, 64), (6, 1), "weight_scale"),
        ((6, 64), (6,), "weight_scale"),
        ((6, 64), (1, 1), "weight_scale_inv"),
        ((6, 64), (1, 1), "scale"),
        ((6, 64), (1,), "qscale_weight"),
        ((3, 6, 64), (3, 1, 1), "weight_scale_inv"),
        ((3, 6, 64), (3,), "weight_scale_inv"),
        ((3, 6, 64), (3, 6, 1), "weight_scale"),
        ((3, 6, 64), (), "weight_scale"),
        ((3, 130, 200), (3, 2, 2), "weight_scale_inv"),
    ],
)
def test_every_place_of_a_scale(
    shape: tuple[int, ...], scale: tuple[int, ...], name: str, tmp_path: Path
) -> None:
    """Every factor is distinct: a scale on the wrong row, tile or expert shows."""
    factors = 0.01 + 0.003 * np.arange(np.prod(scale, dtype=int), dtype=np.float32).reshape(scale)
    weight = e4m3(*shape)
    folder = write_quantized(
        tmp_path / "source", {"up.weight": weight, f"up.{name}": np.float32(factors)}, FP8
    )
    spread: Any = factors
    if len(scale) == 3 and scale[-1] == 2:
        spread = factors.repeat(128, axis=1)[:, :130].repeat(128, axis=2)[:, :, :200]
    elif scale in ((6,), (3,)):
        spread = factors.reshape(*scale, *[1] * (len(shape) - 1))
    expected = weight.astype(np.float32) * spread
    assert np.array_equal(dense(folder, tmp_path / "out")["up.weight"], expected)


def test_fbgemm_experts_keep_name_and_shape(tmp_path: Path) -> None:
    """Llama 4: [experts, in, out]; both of fbgemm's places for a scale an output."""
    weights = {"gate_up_proj": e4m3(2, 32, 6), "down_proj": e4m3(2, 64, 5, seed=1)}
    scales = {
        "gate_up_proj": 0.1 + np.arange(12, dtype=np.float32).reshape(2, 1, 6),
        "down_proj": 0.1 + np.arange(10, dtype=np.float32).reshape(2, 5, 1),
    }
    tensors = {f"experts.{name}": array for name, array in weights.items()}
    tensors |= {f"experts.{name}_scale": array for name, array in scales.items()}
    folder = write_quantized(tmp_path / "source", tensors, {"quant_method": "fbgemm_fp8"})
    out = dense(folder, tmp_path / "out")
    for name, weight in weights.items():
        expected = weight.astype(np.float32) * scales[name].reshape(2, 1, -1)
        assert np.array_equal(out[f"experts.{name}"], expected)


def test_fbgemm_linear(tmp_path: Path) -> None:
    tensors = {"up.weight": e4m3(4, 32), "up.weight_scale": np.full((4, 1), 0.3, np.float32)}
    folder = write_quantized(tmp_path / "source", tensors, {"quant_method": "fbgemm_fp8"})
    expected = tensors["up.weight"].astype(np.float32) * np.float32(0.3)
    assert np.array_equal(dense(folder, tmp_path / "out")["up.weight"], expected)


def test_stacked_experts_without_a_dot(tmp_path: Path) -> None:
    """transformers' gate_up_proj next to gate_up_proj_scale_inv is [experts, out, in]."""
    scales = np.array([0.1, 0.2], np.float32).reshape(2, 1, 1)
    tensors = {"experts.gate_up_proj": e4m3(2, 6, 64), "experts.gate_up_proj_scale_inv": scales}
    folder = write_quantized(tmp_path / "source", tensors, FP8)
    expected = tensors["experts.gate_up_proj"].astype(np.float32) * scales
    assert np.array_equal(dense(folder, tmp_path / "out")["experts.gate_up_proj"], expected)


def test_fnuz_bytes(tmp_path: Path) -> None:
    """AMD's variant: half of the value that the same byte has in E4M3FN."""
    import ml_dtypes

    codes = e4m3(2, 32).view(np.uint8)
    codes[codes == 0x80] = 0
    four = np.array([4.0], np.float32)
    tensors = {"up.weight": codes.view(ml_dtypes.float8_e4m3fnuz), "up.weight_scale": four}
    folder = write_quantized(tmp_path / "source", tensors, {"quant_method": "fp8"})
    expected = codes.view(E4M3).astype(np.float32) / 2 * 4
    assert np.array_equal(dense(folder, tmp_path / "out")["up.weight"], expected)
    assert "no mode of MLX" in rejection(folder, tmp_path / "kept")


@pytest.mark.parametrize(
    "tile", [(1, 32), (32, 32), (128, 128), (1, 160), (200, 160)], ids=lambda t: f"{t[0]}x{t[1]}"
)
@pytest.mark.parametrize("stored", ["F32", "BF16", "E8M0", "U8"])
def test_powers_of_two_are_mxfp8(tile: tuple[int, int], stored: str, tmp_path: Path) -> None:
    """Whatever the tile and dtype: the same bytes, and scales repeated over the tile."""
    weight = e4m3(200, 160)
    high, wide = tile
    grid = (-(-200 // high), -(-160 // wide))
    exponents = np.random.default_rng(1).integers(90, 140, grid).astype(np.uint8)
    as_stored = {
        "F32": np.ldexp(np.float32(1), exponents.astype(np.int32) - 127),
        "BF16": np.ldexp(np.float32(1), exponents.astype(np.int32) - 127).astype(BF16),
        "E8M0": exponents.view(E8M0),
        "U8": exponents,
    }[stored]
    tensors = {"up.weight": weight, "up.weight_scale_inv": as_stored}
    block = {"quant_method": "mxfp8"} if tile == (1, 32) else FP8
    if grid == (1, 1):  # of a whole matrix: no block is named
        block = {"quant_method": "fp8"}
    folder = write_quantized(tmp_path / "source", tensors, block)
    report = requant.convert(folder, tmp_path / "out", layout="keep")
    assert report.plan.layers[0].exactness.value == "exact"
    out = read_folder(tmp_path / "out")
    assert out["up.weight"].tobytes() == weight.tobytes()
    spread = exponents.repeat(high, axis=0)[:200].repeat(wide // 32, axis=1)[:, :5]
    assert np.array_equal(out["up.scales"], spread)
    factors = np.ldexp(np.float32(1), spread.repeat(32, axis=1).astype(np.int32) - 127)
    assert np.array_equal(float_values(out, "up", MXFP8), weight.astype(np.float32) * factors)


def test_one_other_scale_and_the_layer_is_not_mxfp8(tmp_path: Path) -> None:
    scales = np.full((2, 2), 0.5, np.float32)
    scales[1, 1] = np.nextafter(np.float32(0.5), np.float32(1))
    tensors = {"up.weight": e4m3(200, 160), "up.weight_scale_inv": scales}
    assert "--bits 4" in rejection(
        write_quantized(tmp_path / "source", tensors, FP8), tmp_path / "out"
    )


def test_fp4_experts_in_int8(tmp_path: Path) -> None:
    """DeepSeek V4: codes 0 to 15 in bytes 10 32 54 76 98 ba dc fe, as MLX's words hold them."""
    codes = np.tile(np.array([0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE], np.uint8), (3, 2))
    tensors = {
        "experts.0.w1.weight": codes.view(np.int8),
        "experts.0.w1.scale": np.array([[0x7F], [0x80], [0x7A]], np.uint8).view(E8M0),
    }
    folder = write_quantized(tmp_path / "source", tensors, FP8 | {"expert_dtype": "fp4"})
    out, _ = convert(folder, tmp_path / "out")
    assert out["experts.0.w1.weight"][0].tolist() == [0x76543210, 0xFEDCBA98] * 2
    assert out["experts.0.w1.scales"].tolist() == [[0x7F], [0x80], [0x7A]]
    values = float_values(out, "experts.0.w1", {"group_size": 32, "bits": 4, "mode": "mxfp4"})
    assert values[1, :8].tolist() == [0, 1, 2, 3, 4, 6, 8, 12]


def test_runtime_scales_are_left_out_with_a_note(tmp_path: Path) -> None:
    one = np.ones(1, np.float32)
    tensors = {
        "attn.k_proj.weight": e4m3(4, 32),
        "attn.k_proj.weight_scale": one,
        "attn.k_proj.input_scale": one,
        "attn.k_scale": one,
        "attn.v_proj.output_scale": one,
        "norm.weight": np.ones(32, BF16),
    }
    folder = write_quantized(tmp_path / "source", tensors, {"quant_method": "fp8"})
    report = requant.convert(folder, tmp_path / "out", layout="keep")
    assert sorted(read_folder(tmp_path / "out")) == [
        "attn.k_proj.scales",
        "attn.k_proj.weight",
        "norm.weight",
    ]
    left_out = {name for name, _ in report.plan.dropped}
    assert left_out == {"attn.k_proj.input_scale", "attn.k_scale", "attn.v_proj.output_scale"}
    assert any("attn.k_scale" in note and "cache" in note for note in note_texts(report.plan.notes))


def test_without_a_config_the_tensors_tell(tmp_path: Path) -> None:
    tensors = {"up.weight": e4m3(4, 32), "up.weight_scale_inv": np.ones((1, 1), np.float32)}
    folder = write_quantized(tmp_path / "source", tensors, None)
    assert requant.inspect(folder).format == "fp8"
    requant.convert(folder, tmp_path / "out", layout="keep")
    assert read_folder(tmp_path / "out")["up.scales"].tolist() == [[127]] * 4


@pytest.mark.slow
@settings(max_examples=40)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 90),
    high=st.integers(1, 40),
    wide=st.integers(1, 90),
    experts=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_any_shape_and_block(
    rows: int, columns: int, high: int, wide: int, experts: int, seed: int
) -> None:
    shape = (experts, rows, columns) if experts else (rows, columns)
    weight = e4m3(*shape, seed=seed)
    grid = (*shape[:-2], -(-rows // high), -(-columns // wide))
    scales = np.random.default_rng(seed).normal(1, 0.3, grid).astype(np.float32)
    spread = scales.repeat(high, axis=-2)[..., :rows, :].repeat(wide, axis=-1)[..., :columns]
    with tempfile.TemporaryDirectory() as place:
        folder = write_quantized(
            Path(place) / "source",
            {"up.weight": weight, "up.weight_scale_inv": scales},
            {"quant_method": "fp8", "weight_block_size": [high, wide]},
        )
        requant.convert(
            folder,
            Path(place) / "out",
            layout="keep",
            dequantize=True,
            dtype="float32",
            chunk_bytes=2000,
            threads=2,
        )
        out = read_folder(Path(place) / "out")["up.weight"]
    assert np.array_equal(out, weight.astype(np.float32) * spread)


def good() -> dict[str, np.ndarray]:
    return {
        "up.weight": e4m3(130, 160),
        "up.weight_scale_inv": np.full((2, 2), 0.5, np.float32),
        "norm.weight": np.ones(32, BF16),
    }


DAMAGED = """
- up.weight_scale_inv
    up.weight
    has no scale
- up.weight -> up.weight_scale_inv: F32 [2, 2] has no codes next to it
up.weight = BF16 [130, 160] 1 -> up.weight: BF16 [130, 160] is next to up.weight_scale_inv
up.weight_scale_inv = F32 [2, 1] 1
    up.weight_scale_inv: F32 [2, 1] fits no tiling
    expected [2, 2] for 128x128
up.weight = F8_E4M3 [160, 260] 1; up.weight_scale_inv = F32 [3, 2] 1
    F32 [3, 2] fits no tiling of up.weight [160, 260]
    expected [2, 3]
up.weight_scale_inv = I32 [2, 2] 1
    up.weight_scale_inv: I32 [2, 2], expected a scale of dtype F32
up.weight = F8_E5M2 [130, 160]
    up.weight: F8_E5M2
    expected F8_E4M3
up.weight = F8_E4M3 [160] 1; up.weight_scale_inv = F32 [1] 1
    up.weight: F8_E4M3 [160], expected a matrix
up.weight = I8 [4, 16]
    up.weight: I8 [4, 16] is read as packed FP4
    F8_E8M0 [4, 1]
weight_block_size: [128, 0] -> quantization_config.weight_block_size: is [128, 0]
ignored_layers: "lm_head" -> ignored_layers: is 'lm_head', expected a list
up.weight_scale_inv = F8_E8M0 [2, 2] nan
    up.weight_scale_inv: scales hold NaN
    first in row 0
"""


@pytest.mark.parametrize(("changes", "words"), damages(DAMAGED))
def test_corrupted_folders_are_rejected(changes: str, words: list[str], tmp_path: Path) -> None:
    tensors, block = good(), dict(FP8)
    damage(changes, tensors, block)
    text = rejection(write_quantized(tmp_path / "source", tensors, block), tmp_path / "out")
    assert all(word in text for word in words), text


def test_not_a_number_is_found_while_it_is_encoded(tmp_path: Path) -> None:
    tensors = good()
    tensors["up.weight"].view(np.uint8)[77, 3] = 0x7F
    tensors["up.weight_scale_inv"][:] = 0.3
    text = rejection(write_quantized(tmp_path / "source", tensors, FP8), tmp_path / "out", bits=4)
    assert "up.weight: 1 value is NaN or infinite, first in row 77" in text


def test_in_memory_as_mx_load_gives_it(tmp_path: Path) -> None:
    """mx.load knows no float8: weights and power-of-two scales come as plain bytes."""
    tensors = {
        "up.weight": e4m3(130, 160),
        "up.weight_scale_inv": np.full((2, 2), 125, np.uint8).view(E8M0),
    }
    loaded = mx.load(str(write_quantized(tmp_path / "source", tensors, FP8) / "model.safetensors"))
    made, quantization = requant.transform_weights(loaded, FP8)
    assert quantization.quantization == requant.Quantization(32, 8, requant.QuantMode.MXFP8)
    assert np.array_equal(
        np.array(made["up.weight"]), tensors["up.weight"].view(np.uint8).view(np.uint32)
    )
    assert np.array(made["up.scales"]).tolist() == [[125] * 5] * 130
