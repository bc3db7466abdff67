"""compressed-tensors by hand: worked vectors, and every layout in any shape."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.checkpoints import write_quantized
from tests.support.conversions import convert, dequantized
from tests.support.layers.compressed_tensors import block, pack, packed
from tests.support.mlx_reference import affine, float_values
from tests.support.number_formats import BF16, E4M3, e4m3
from tests.support.plan_texts import reason_text


# -- worked vectors --------------------------------------------------------------------------
def test_symmetric_word(tmp_path: Path) -> None:
    """Codes -8 -7 -1 0 1 2 6 7 are the word fea98710, in MLX too; 0.1 is 3dcd, its bias bf4d."""
    tensors = {
        "up.weight_packed": np.full((1, 4), 0xFEA98710, np.uint32).view(np.int32),
        "up.weight_scale": np.array([[0.1]], BF16),
        "up.weight_shape": np.array([1, 32]),
    }
    out, _ = convert(write_quantized(tmp_path / "s", tensors, block(group_size=32)), tmp_path / "o")
    assert out["up.weight"].tolist() == [[0xFEA98710] * 4]
    assert out["up.scales"].view(np.uint16).tolist() == [[0x3DCD]]
    assert out["up.biases"].view(np.uint16).tolist() == [[0xBF4D]]
    steps = affine(out, "up", 32, 4).values[0, :8] / np.float64(np.array(0.1, BF16))
    assert steps.tolist() == [-8, -7, -1, 0, 1, 2, 6, 7]


@pytest.mark.parametrize(
    ("bits", "dense", "padded"),
    [
        (3, [0x88FAC688, 0xC688FAC6, 0xFAC688FA], [0x08FAC688, 0x1A23EB1A, 0x2C688FAC]),
        (5, [0x8A418820, 0xC5A92839, 0xCA307B9A], [0x0A418820, 0x16A4A0E6, 0x2307B9AC]),
        (6, [0x440C2040, 0xA2481C61, 0x3CE34C2C], [0x040C2040, 0x09207185, 0x0E34C2CA]),
    ],
)
def test_words_of_odd_widths(bits: int, dense: list[int], padded: list[int], tmp_path: Path):
    """Codes 0, 1, 2, ... in both layouts; MLX's words are the dense ones."""
    codes = (np.arange(64) % (1 << bits)).reshape(1, 64)
    assert pack(codes, bits).view(np.uint32)[0, :3].tolist() == dense
    assert pack(codes, bits, padded=True).view(np.uint32)[0, :3].tolist() == padded
    signed = codes - (1 << (bits - 1))
    for how in (False, True):
        tensors = packed(signed, bits, np.ones((1, 1), BF16), padded=how)
        folder = write_quantized(tmp_path / f"s{how}", tensors, block(num_bits=bits, group_size=64))
        out, report = convert(folder, tmp_path / f"o{how}")
        assert out["up.weight"][0, :3].tolist() == dense
        assert report.plan.layers[0].exactness.value == "exact"


def test_zero_points_of_the_document(tmp_path: Path) -> None:
    """Column 0: -8 -7 0 1 2 3 4 7, column 1: 3 4 5 6 7 -8 -7 -6, as fcba9810 210fedcb."""
    zeros = np.array([[-8, -7, 0, 1, 2, 3, 4, 7], [3, 4, 5, 6, 7, -8, -7, -6]]).T
    tensors = packed(np.zeros((8, 64), int), 4, np.ones((8, 2), BF16), zeros)
    words = tensors["up.weight_zero_point"].view(np.uint32)
    assert words.tolist() == [[0xFCBA9810, 0x210FEDCB]]
    folder = write_quantized(tmp_path / "s", tensors, block(group_size=32, symmetric=False))
    out, _ = convert(folder, tmp_path / "o")
    assert out["up.biases"].astype(int).tolist() == (-(zeros + 8)).tolist()


def test_int8_word(tmp_path: Path) -> None:
    """-128 -1 0 127 become 00 7f 80 ff: the word ff807f00."""
    signed = np.tile(np.array([-128, -1, 0, 127], np.int8), (2, 8))
    tensors = {"up.weight": signed, "up.weight_scale": np.array([[0.5], [2]], BF16)}
    folder = write_quantized(
        tmp_path / "s", tensors, block("int-quantized", num_bits=8, strategy="channel")
    )
    out, _ = convert(folder, tmp_path / "o")
    assert out["up.weight"].tolist() == [[0xFF807F00] * 8] * 2
    assert out["up.biases"].astype(int).tolist() == [[-64], [-256]]


def test_fp6_bytes(tmp_path: Path) -> None:
    """0.125, 7.5, -0.125, 1.0 are the bytes c1 17 22; every E2M3 element keeps its value."""
    first = np.frombuffer(bytes.fromhex("c11722"), np.uint8)
    rows = np.concatenate([np.tile(first, 16), pack(np.arange(64)[None], 6).view(np.uint8)[0]])
    tensors = {
        "up.weight_packed": rows.reshape(2, 48),
        "up.weight_scale": np.array([[127, 126], [0, 140]], np.uint8),
    }
    config = block("mxfp6-pack-quantized", num_bits=6, type="float", group_size=32)
    out, report = convert(write_quantized(tmp_path / "s", tensors, config), tmp_path / "o")
    assert report.plan.layers[0].exactness.value == "exact"
    values = float_values(out, "up", {"group_size": 32, "bits": 8, "mode": "mxfp8"})
    assert values[0, :4].tolist() == [0.125, 7.5, -0.125, 1.0]
    assert values[0, 32:36].tolist() == [0.0625, 3.75, -0.0625, 0.5]
    positive = [m / 8 for m in range(8)] + [
        (1 + m / 8) * 2.0**e for e in range(3) for m in range(8)
    ]
    expected = np.array(positive + [-v for v in positive])
    scales = np.repeat([2.0**-127, 2.0**13], 32)
    assert np.array_equal(values[1], expected * scales)


def test_nvfp4_element(tmp_path: Path) -> None:
    """Scale 0x76 (224), element 7 (6.0), tensor scale 2688: 0.5."""
    tensors = {
        "up.weight_packed": np.full((2, 16), 0x77, np.uint8),
        "up.weight_scale": np.full((2, 2), 0x76, np.uint8).view(E4M3),
        "up.weight_global_scale": np.array([2688], np.float32),
    }
    config = block("nvfp4-pack-quantized", type="float", strategy="tensor_group", group_size=16)
    folder = write_quantized(tmp_path / "s", tensors, config)
    out = dequantized(folder, tmp_path / "o")
    assert out["up.weight"].tolist() == [[0.5] * 32] * 2
    out, report = convert(folder, tmp_path / "kept")
    assert report.plan.layers[0].target == "affine 8-bit g32"
    assert "tensor scale" in reason_text(report.plan.layers[0])


@pytest.mark.parametrize("divisor", [1.0, 0.25, 16.0])
def test_nvfp4_folds_where_every_scale_stays_e4m3(divisor: float, tmp_path: Path) -> None:
    scales = np.array([[0x40, 0x48], [0x30, 0x00]], np.uint8).view(E4M3)
    tensors = {
        "up.weight_packed": np.arange(32, dtype=np.uint8).reshape(2, 16) * 7,
        "up.weight_scale": scales,
        "up.weight_global_scale": np.array([divisor], np.float32),
    }
    config = block("nvfp4-pack-quantized", type="float", strategy="tensor_group", group_size=16)
    out, report = convert(write_quantized(tmp_path / "s", tensors, config), tmp_path / "o")
    assert report.plan.layers[0].exactness.value == "exact"
    assert out["up.weight"].tobytes() == tensors["up.weight_packed"].tobytes()
    folded = out["up.scales"].view(E4M3).astype(np.float32)
    assert np.array_equal(folded, scales.astype(np.float32) / divisor)


def test_nvfp4_does_not_fold_where_a_scale_is_lost(tmp_path: Path) -> None:
    """2^-9 is E4M3's smallest number: half of it is none."""
    tensors = {
        "up.weight_packed": np.full((1, 16), 0x77, np.uint8),
        "up.weight_scale": np.array([[0x40, 0x01]], np.uint8).view(E4M3),
        "up.weight_global_scale": np.array([2], np.float32),
    }
    config = block("nvfp4-pack-quantized", type="float", strategy="tensor_group", group_size=16)
    _, report = convert(write_quantized(tmp_path / "s", tensors, config), tmp_path / "o")
    assert report.plan.layers[0].exactness.value == "re-encoded"


# -- any shape -------------------------------------------------------------------------------
def exact_values(signed: np.ndarray, scale: np.ndarray, zeros: Any, group: int) -> np.ndarray:
    """``(code - zero) * scale`` in float32, scale and zero repeated over groups."""
    n_in = signed.shape[-1]
    wide = np.float32(scale).repeat(group, axis=-1)[..., :n_in]
    shift = np.float32(zeros).repeat(group, axis=-1)[..., :n_in] if np.ndim(zeros) else zeros
    return (np.float32(signed) - shift) * wide


@pytest.mark.slow
@settings(max_examples=60)
@given(
    bits=st.integers(1, 8),
    padded=st.booleans(),
    n_out=st.integers(1, 70),
    groups=st.integers(1, 4),
    group=st.sampled_from([8, 16, 32, 64, 128, 192, 256]),
    ragged=st.integers(0, 7),
    asymmetric=st.sampled_from(["", "packed", "signed"]),
    experts=st.integers(0, 2),
    seed=st.integers(0, 99),
)
def test_packed_layers_of_any_shape(
    bits: int,
    padded: bool,
    n_out: int,
    groups: int,
    group: int,
    ragged: int,
    asymmetric: str,
    experts: int,
    seed: int,
) -> None:
    """Values bit for bit; and where MLX holds the codes, the codes."""
    rng = np.random.default_rng(seed)
    n_in = max(groups * group - ragged, 32)
    groups = -(-n_in // group)
    leading = (experts,) if experts else ()
    low, high = -(1 << (bits - 1)), 1 << (bits - 1)
    signed = rng.integers(low, high, (*leading, n_out, n_in))
    scale = rng.uniform(0.01, 0.02, (*leading, n_out, groups)).astype(BF16)
    zeros = rng.integers(low, high, scale.shape) if asymmetric else None
    tensors = packed(signed, bits, scale, zeros if asymmetric == "packed" else None, padded=padded)
    if asymmetric == "signed":
        tensors["up.weight_zero_point"] = zeros.astype(np.int8)
    config = block(num_bits=bits, group_size=group, symmetric=not asymmetric)
    config["version"] = "0.17.1" if padded else "0.18.0"
    expected = exact_values(signed, scale, 0 if zeros is None else zeros, group)
    with tempfile.TemporaryDirectory() as place:
        folder = write_quantized(Path(place) / "s", tensors, config)
        options = {"dequantize": True, "dtype": "float32", "chunk_bytes": 3000, "threads": 2}
        out, _ = convert(folder, Path(place) / "dense", **options)
        assert np.array_equal(out["up.weight"], expected)
        out, report = convert(folder, Path(place) / "kept", chunk_bytes=3000)
    layer = report.plan.layers[0]
    if n_in % 32 or (group % 32 and groups > 1):
        assert layer.exactness.value in ("re-encoded", "rounded")
        return
    assert layer.exactness.value == ("rounded" if asymmetric else "exact")
    spec = report.plan.quantization.quantization
    assert spec.bits == {1: 2, 7: 8}.get(bits, bits)
    found = affine(out, "up", spec.group_size, spec.bits)
    assert np.array_equal(found.codes, signed + high)
    step = np.abs(found.scales)
    assert (np.abs(found.values - expected) <= 2**-8 * (2**bits - 1) * step).all()


@pytest.mark.sweep(6)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("strategy", ["tensor", "channel", "group"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_plain_integers(bits: int, strategy: str, symmetric: bool, tmp_path: Path) -> None:
    """int8 bytes, W4A8's 4-bit codes among them."""
    rng = np.random.default_rng(bits)
    high = 1 << (bits - 1)
    signed = rng.integers(-high, high, (3, 6, 64)).astype(np.int8)
    shape = {"tensor": (1,), "channel": (3, 6, 1), "group": (3, 6, 2)}[strategy]
    group = 32 if strategy == "group" else 64
    scale = rng.uniform(0.01, 0.02, shape).astype(np.float16)
    tensors = {"up.weight": signed, "up.weight_scale": scale}
    zeros: Any = 0
    if not symmetric:
        zeros = rng.integers(-high, high, shape).astype(np.int8)
        tensors["up.weight_zero_point"] = zeros
        zeros = zeros.reshape(1, 1, 1) if strategy == "tensor" else zeros
    config = block(
        "int-quantized",
        num_bits=bits,
        strategy=strategy,
        symmetric=symmetric,
        group_size=32 if strategy == "group" else None,
    )
    folder = write_quantized(tmp_path / "s", tensors, config)
    out = dequantized(folder, tmp_path / "dense")
    wide = scale.reshape(1, 1, 1) if strategy == "tensor" else scale
    assert np.array_equal(out["up.weight"], exact_values(signed, wide, zeros, group))
    out, report = convert(folder, tmp_path / "kept")
    assert report.plan.layers[0].exactness.value == ("exact" if symmetric else "rounded")
    found = affine(out, "up", report.plan.quantization.quantization.group_size, bits)
    assert np.array_equal(found.codes, signed.astype(int) + high)


def test_order_of_inputs(tmp_path: Path) -> None:
    """A g_idx that shuffles decides the scale of each input; a trivial or unset one does not."""
    rng = np.random.default_rng(3)
    signed = rng.integers(-8, 8, (5, 96))
    scale = rng.uniform(0.01, 0.02, (5, 3)).astype(BF16)
    order = rng.permutation(np.arange(96) // 32).astype(np.int32)
    config = block(group_size=32, actorder="group")
    for name, index in (
        ("shuffled", order),
        ("trivial", (np.arange(96) // 32).astype(np.int32)),
        ("unset", np.full(96, -1, np.int32)),
    ):
        tensors = packed(signed, 4, scale) | {"up.weight_g_idx": index}
        folder = write_quantized(tmp_path / name, tensors, config)
        out, report = convert(folder, tmp_path / f"dense {name}", dequantize=True, dtype="float32")
        of = index if name == "shuffled" else np.arange(96) // 32
        assert np.array_equal(out["up.weight"], np.float32(signed) * np.float32(scale)[:, of])
        _, report = convert(folder, tmp_path / f"kept {name}")
        wanted = "re-encoded" if name == "shuffled" else "exact"
        assert report.plan.layers[0].exactness.value == wanted


def test_mxfp8_and_mxfp4_bytes(tmp_path: Path) -> None:
    fp8, fp4 = e4m3(3, 64), np.random.default_rng(0).integers(0, 256, (3, 32), np.uint8)
    scale = np.random.default_rng(1).integers(100, 140, (3, 2), np.uint8)
    for name, tensors, spec in (
        ("mxfp8-quantized", {"up.weight": fp8}, {"bits": 8, "mode": "mxfp8"}),
        ("mxfp4-pack-quantized", {"up.weight_packed": fp4}, {"bits": 4, "mode": "mxfp4"}),
    ):
        config = block(name, num_bits=spec["bits"], type="float", group_size=32)
        folder = write_quantized(tmp_path / name, tensors | {"up.weight_scale": scale}, config)
        out, _ = convert(folder, tmp_path / f"o {name}")
        assert out["up.weight"].tobytes() == next(iter(tensors.values())).tobytes()
        assert out["up.scales"].tobytes() == scale.tobytes()
        dense = dequantized(folder, tmp_path / f"d {name}")
        values = float_values(out, "up", {"group_size": 32} | spec)
        assert np.array_equal(dense["up.weight"], values)
