"""compressed-tensors by hand: worked vectors, every layout in any shape, damaged folders."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import requant
from requant.errors import Problem
from requant.formats.ct_config import CtConfig
from requant.formats.declared import Declared
from tests.formats.folders import BF16, E4M3, e4m3, refusal, write
from tests.formats.harness import affine, float_values, read_folder

Tensors = dict[str, np.ndarray]


def block(format: str = "pack-quantized", **weights: Any) -> dict[str, Any]:
    """A quantization_config with one group for all Linear layers."""
    settings = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"} | weights
    group = {"targets": ["Linear"], "weights": settings, "format": format}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def pack(codes: np.ndarray, bits: int, padded: bool = False) -> np.ndarray:
    """Unsigned codes along the last axis as compressed-tensors packs them; written apart."""
    *leading, count = codes.shape
    if padded:
        per = 32 // bits
        room = np.zeros((*leading, -(-count // per) * per), np.uint64)
        room[..., :count] = codes
        fields = room.reshape(*leading, -1, per) << (
            np.arange(per, dtype=np.uint64) * np.uint64(bits)
        )
        return fields.sum(-1, dtype=np.uint64).astype(np.uint32).view(np.int32)
    one_by_one = (codes[..., None].astype(np.uint8) >> np.arange(bits, dtype=np.uint8)) & 1
    stream = one_by_one.reshape(*leading, -1)
    room = np.zeros((*leading, -(-stream.shape[-1] // 32) * 32), np.uint8)
    room[..., : stream.shape[-1]] = stream
    return np.packbits(room, axis=-1, bitorder="little").view(np.int32)


def packed(
    signed: np.ndarray, bits: int, scale: np.ndarray, zeros: np.ndarray | None = None, **how: bool
) -> Tensors:
    """The tensors of one pack-quantized layer ``up``."""
    middle = 1 << (bits - 1)
    tensors = {
        "up.weight_packed": pack(signed + middle, bits, **how),
        "up.weight_scale": scale,
        "up.weight_shape": np.array(signed.shape[-2:], np.int64),
    }
    if zeros is not None:
        along = np.swapaxes(zeros + middle, -1, -2)
        tensors["up.weight_zero_point"] = np.ascontiguousarray(
            np.swapaxes(pack(along, bits, **how), -1, -2)
        )
    return tensors


def convert(folder: Path, output: Path, **wishes: Any) -> tuple[Tensors, requant.Report]:
    report = requant.convert(folder, output, **{"layout": "keep"} | wishes)
    return read_folder(output), report


# -- worked vectors --------------------------------------------------------------------------


def test_symmetric_word(tmp_path: Path) -> None:
    """Codes -8 -7 -1 0 1 2 6 7 are the word fea98710, in MLX too; 0.1 is 3dcd, its bias bf4d."""
    tensors = {
        "up.weight_packed": np.full((1, 4), 0xFEA98710, np.uint32).view(np.int32),
        "up.weight_scale": np.array([[0.1]], BF16),
        "up.weight_shape": np.array([1, 32]),
    }
    out, _ = convert(write(tmp_path / "s", tensors, block(group_size=32)), tmp_path / "o")
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
def test_words_of_odd_widths(
    bits: int, dense: list[int], padded: list[int], tmp_path: Path
) -> None:
    """Codes 0, 1, 2, ... in both layouts; MLX's words are the dense ones."""
    codes = (np.arange(64) % (1 << bits)).reshape(1, 64)
    assert pack(codes, bits).view(np.uint32)[0, :3].tolist() == dense
    assert pack(codes, bits, padded=True).view(np.uint32)[0, :3].tolist() == padded
    signed = codes - (1 << (bits - 1))
    for how in (False, True):
        tensors = packed(signed, bits, np.ones((1, 1), BF16), padded=how)
        folder = write(tmp_path / f"s{how}", tensors, block(num_bits=bits, group_size=64))
        out, report = convert(folder, tmp_path / f"o{how}")
        assert out["up.weight"][0, :3].tolist() == dense
        assert report.plan.layers[0].exactness.value == "exact"


def test_zero_points_of_the_document(tmp_path: Path) -> None:
    """Column 0: -8 -7 0 1 2 3 4 7, column 1: 3 4 5 6 7 -8 -7 -6, as fcba9810 210fedcb."""
    zeros = np.array([[-8, -7, 0, 1, 2, 3, 4, 7], [3, 4, 5, 6, 7, -8, -7, -6]]).T
    tensors = packed(np.zeros((8, 64), int), 4, np.ones((8, 2), BF16), zeros)
    words = tensors["up.weight_zero_point"].view(np.uint32)
    assert words.tolist() == [[0xFCBA9810, 0x210FEDCB]]
    folder = write(tmp_path / "s", tensors, block(group_size=32, symmetric=False))
    out, _ = convert(folder, tmp_path / "o")
    assert out["up.biases"].astype(int).tolist() == (-(zeros + 8)).tolist()


def test_int8_word(tmp_path: Path) -> None:
    """-128 -1 0 127 become 00 7f 80 ff: the word ff807f00."""
    signed = np.tile(np.array([-128, -1, 0, 127], np.int8), (2, 8))
    tensors = {"up.weight": signed, "up.weight_scale": np.array([[0.5], [2]], BF16)}
    folder = write(tmp_path / "s", tensors, block("int-quantized", num_bits=8, strategy="channel"))
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
    out, report = convert(write(tmp_path / "s", tensors, config), tmp_path / "o")
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
    folder = write(tmp_path / "s", tensors, config)
    out, _ = convert(folder, tmp_path / "o", dequantize=True, dtype="float32")
    assert out["up.weight"].tolist() == [[0.5] * 32] * 2
    out, report = convert(folder, tmp_path / "kept")
    assert report.plan.layers[0].target == "affine 8-bit g32"
    assert "tensor scale" in report.plan.layers[0].reason


@pytest.mark.parametrize("divisor", [1.0, 0.25, 16.0])
def test_nvfp4_folds_where_every_scale_stays_e4m3(divisor: float, tmp_path: Path) -> None:
    scales = np.array([[0x40, 0x48], [0x30, 0x00]], np.uint8).view(E4M3)
    tensors = {
        "up.weight_packed": np.arange(32, dtype=np.uint8).reshape(2, 16) * 7,
        "up.weight_scale": scales,
        "up.weight_global_scale": np.array([divisor], np.float32),
    }
    config = block("nvfp4-pack-quantized", type="float", strategy="tensor_group", group_size=16)
    folder = write(tmp_path / "s", tensors, config)
    out, report = convert(folder, tmp_path / "o")
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
    _, report = convert(write(tmp_path / "s", tensors, config), tmp_path / "o")
    assert report.plan.layers[0].exactness.value == "re-encoded"


# -- any shape -------------------------------------------------------------------------------


def exact_values(signed: np.ndarray, scale: np.ndarray, zeros: Any, group: int) -> np.ndarray:
    """``(code - zero) * scale`` in float32, scale and zero repeated over groups."""
    n_in = signed.shape[-1]
    wide = np.float32(scale).repeat(group, axis=-1)[..., :n_in]
    shift = np.float32(zeros).repeat(group, axis=-1)[..., :n_in] if np.ndim(zeros) else zeros
    return (np.float32(signed) - shift) * wide


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
        folder = write(Path(place) / "s", tensors, config)
        wishes = {"dequantize": True, "dtype": "float32", "chunk_bytes": 3000, "threads": 2}
        out, _ = convert(folder, Path(place) / "dense", **wishes)
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
    folder = write(tmp_path / "s", tensors, config)
    out, _ = convert(folder, tmp_path / "dense", dequantize=True, dtype="float32")
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
        folder = write(tmp_path / name, tensors, config)
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
        folder = write(tmp_path / name, tensors | {"up.weight_scale": scale}, config)
        out, _ = convert(folder, tmp_path / f"o {name}")
        assert out["up.weight"].tobytes() == next(iter(tensors.values())).tobytes()
        assert out["up.scales"].tobytes() == scale.tobytes()
        dense, _ = convert(folder, tmp_path / f"d {name}", dequantize=True, dtype="float32")
        values = float_values(out, "up", {"group_size": 32} | spec)
        assert np.array_equal(dense["up.weight"], values)


# -- the config ------------------------------------------------------------------------------


def two_layers() -> Tensors:
    """``a.q_proj`` of 4 bits, ``a.k_proj`` of 8 bits, ``norm`` dense."""
    four = packed(np.arange(-8, 8).repeat(16).reshape(4, 64), 4, np.ones((4, 1), BF16))
    eight = packed(np.arange(-128, 128).reshape(4, 64), 8, np.ones((4, 1), BF16))
    tensors = {name.replace("up", "a.q_proj"): array for name, array in four.items()}
    tensors |= {name.replace("up", "a.k_proj"): array for name, array in eight.items()}
    return tensors | {"norm.weight": np.ones(64, BF16)}


def groups(*entries: tuple[list[str], int]) -> dict[str, Any]:
    config = block()
    config["config_groups"] = {
        f"group_{n}": {"targets": targets, "weights": {"num_bits": bits, "strategy": "channel"}}
        for n, (targets, bits) in enumerate(entries)
    }
    return config


@pytest.mark.parametrize(
    "entries",
    [
        [(["Linear"], 4), (["a.k_proj"], 8)],  # a name beats a class, whatever the order
        [(["a.k_proj"], 8), (["Linear"], 4)],
        [(["re:.*k_proj"], 8), (["Linear"], 4)],  # a pattern beats a class
        [(["re:.*"], 4), (["a.k_proj"], 8)],  # a name beats a pattern
        [(["re:a.k"], 8), (["re:a.q"], 4)],  # open at the end
        [(["re:.*q"], 4), (["re:a.*"], 8)],  # of two patterns the one that sorts first
        [(["re:k_proj"], 4), (["Linear"], 8), (["re:.*q_proj"], 4)],  # anchored at the start
        [(["a.k_proj"], 4), (["a.k_proj"], 8), (["Linear"], 4)],  # the last group of a target
    ],
)
def test_schemes_resolve_as_the_peers_loader_does(
    entries: list[tuple[list[str], int]], tmp_path: Path
) -> None:
    """A wrong scheme would take the 8-bit layer's words for 4 bits, and be refused."""
    folder = write(tmp_path / "s", two_layers(), groups(*entries))
    _, report = convert(folder, tmp_path / "o")
    targets = {layer.layer: layer.target for layer in report.plan.layers}
    assert targets["a.q_proj"] == "affine 4-bit g64"
    assert targets["a.k_proj"] == "affine 8-bit g64"


def test_presets_and_the_old_key(tmp_path: Path) -> None:
    config = {
        "format": "pack-quantized",
        "config_groups": {"W4A16": ["re:.*q"], "W8A16": ["a.k_proj"]},
    }
    folder = write(tmp_path / "s", two_layers(), None, compression_config=config)
    assert requant.inspect(folder).format == "compressed-tensors"
    out, _ = convert(folder, tmp_path / "o")
    assert out["a.k_proj.weight"].shape == (4, 16)
    assert not json.loads((tmp_path / "o" / "config.json").read_text()).get("compression_config")


def test_every_preset_of_the_peer() -> None:
    """All names of compressed-tensors 0.20.0, and what each says of a weight."""
    widths = {"UNQUANTIZED": None, "INT8": 8, "W4AFP8": 4, "W4A16_ASYM": 4, "MXFP4XFP8": 4}
    for bits in range(2, 9):
        widths |= {f"W{bits}A{n}": bits for n in (4, 8, 16) if n >= bits}
    widths |= dict.fromkeys(("FP8", "FP8_DYNAMIC", "FP8_BLOCK", "MXFP8", "MXFP8A16"), 8)
    widths |= dict.fromkeys(("NVFP4", "NVFP4A16", "MXFP4", "MXFP4A16"), 4)
    widths |= dict.fromkeys(("MXFP6A16", "MXFP6A8"), 6)
    for name, bits in widths.items():
        problems: list[Problem] = []
        found = Declared("here", {"config_groups": {name.lower(): ["Linear"]}})
        scheme = CtConfig(found, problems).of("a.b")
        assert (scheme.bits, problems) == (bits, []), name
        assert bits is None or scheme.kind == ("float" if "FP" in name[:4] else "int"), name
        assert scheme.symmetric is (None if bits is None else name != "W4A16_ASYM"), name


def test_without_a_config_the_tensors_tell(tmp_path: Path) -> None:
    folder = write(tmp_path / "s", two_layers(), None)
    out, _ = convert(folder, tmp_path / "o")
    assert out["a.q_proj.weight"].shape == (4, 8)
    assert out["a.k_proj.weight"].shape == (4, 16)


def test_cache_scales_are_left_out_with_a_note(tmp_path: Path) -> None:
    one = np.ones(1, BF16)
    tensors = two_layers() | {"a.k_scale": one, "a.v_scale": one, "a.q_proj.input_scale": one}
    config = groups((["re:.*q"], 4), (["re:.*k"], 8)) | {"kv_cache_scheme": {"num_bits": 8}}
    out, report = convert(write(tmp_path / "s", tensors, config), tmp_path / "o")
    assert not [name for name in out if name.endswith("_scale")]
    notes = " ".join(report.plan.notes)
    assert "a.k_scale, a.v_scale, each a scale of the key and value cache" in notes
    assert "a.q_proj.input_scale, a scale of activations" in notes


def test_offline_transforms_are_in_the_weights(tmp_path: Path) -> None:
    use = {"targets": ["Linear"], "location": "weight_input"}
    config = groups((["re:.*q"], 4), (["re:.*k"], 8)) | {
        "transform_config": {"config_groups": {"u": {"type": "hadamard", "apply": [use]}}}
    }
    convert(write(tmp_path / "s", two_layers(), config), tmp_path / "o")


def test_in_memory(tmp_path: Path) -> None:
    """Both libraries give the folder's bytes; MLX's plain bytes stand for float8."""
    tensors = packed(np.arange(-8, 8).repeat(16).reshape(4, 64), 4, np.ones((4, 1), BF16))
    tensors |= {
        "down.weight_packed": np.arange(64, dtype=np.uint8).reshape(2, 32),
        "down.weight_scale": e4m3(2, 4),
        "down.weight_global_scale": np.ones(1, np.float32),
        "norm.weight": np.ones(64, BF16),
    }
    tensors["down.weight_scale"].view(np.uint8)[:] &= 0x7F
    config = block(group_size=64)
    config["config_groups"]["nv"] = {"targets": ["down"], "weights": {"num_bits": 4}}
    folder = write(tmp_path / "s", tensors, config)
    out, _ = convert(folder, tmp_path / "o")
    made, _ = requant.transform_weights(tensors, config)
    assert {name: array.tobytes() for name, array in made.items()} == {
        name: array.tobytes() for name, array in out.items()
    }
    loaded = mx.load(str(folder / "model.safetensors"))
    by_mlx, _ = requant.transform_weights(loaded, config)
    for name, wanted in mx.load(str(tmp_path / "o" / "model.safetensors")).items():
        assert mx.array_equal(by_mlx[name].view(mx.uint8), wanted.view(mx.uint8)), name


# -- what must be refused --------------------------------------------------------------------


def good() -> Tensors:
    zeros = np.zeros((8, 2), int)
    return packed(np.zeros((8, 64), int), 4, np.ones((8, 2), BF16), zeros) | {
        "norm.weight": np.ones(64, BF16)
    }


def without(*names: str) -> Callable[[Tensors, dict[str, Any]], None]:
    def change(tensors: Tensors, config: dict[str, Any]) -> None:
        for name in names:
            del tensors[name]

    return change


def with_tensor(name: str, array: np.ndarray) -> Callable[[Tensors, dict[str, Any]], None]:
    def change(tensors: Tensors, config: dict[str, Any]) -> None:
        tensors[name] = array

    return change


def with_key(*path: str, value: Any) -> Callable[[Tensors, dict[str, Any]], None]:
    def change(tensors: Tensors, config: dict[str, Any]) -> None:
        *outer, last = path
        for key in outer:
            config = config[key]
        config[last] = value

    return change


def rotates(tensors: Tensors, config: dict[str, Any]) -> None:
    use = {"targets": ["Linear"], "location": "input"}
    config["transform_config"] = {"config_groups": {"v": {"type": "hadamard", "apply": [use]}}}


WEIGHTS = ("config_groups", "group_0", "weights")
CORRUPTIONS: dict[str, tuple[Callable[[Tensors, dict[str, Any]], None], tuple[str, ...]]] = {
    "no scale": (
        without("up.weight_scale"),
        ("up: up.weight_packed has no weight_scale beside it",),
    ),
    "no codes": (
        without("up.weight_packed"),
        ("up: has ", "but neither weight_packed nor weight"),
    ),
    "no zero points": (
        without("up.weight_zero_point"),
        ("up: has no weight_zero_point", "group_0.weights is not symmetric"),
    ),
    "a word short": (
        with_tensor("up.weight_packed", np.zeros((8, 7), np.int32)),
        ("up.weight_packed: I32 [8, 7]: 7 words do not hold 64 inputs of 4 bits, expected 8",),
    ),
    "another width": (
        with_key(*WEIGHTS, "num_bits", value=8),
        ("up.weight_packed: I32 [8, 8]: 8 words do not hold 64 inputs of 8 bits, expected 16",),
    ),
    "shape of another layer": (
        with_tensor("up.weight_shape", np.array([16, 64])),
        ("up.weight_shape: says [16, 64], but up.weight_packed is I32 [8, 8]",),
    ),
    "shape that is none": (
        with_tensor("up.weight_shape", np.array([8, 64, 8, 64])),
        ("up.weight_shape: I64 [4], expected two whole numbers",),
    ),
    "shape of another kind": (
        with_tensor("up.weight_shape", np.ones(1, np.float32)),
        ("up.weight_shape: F32 [1], expected two whole numbers",),
    ),
    "scale of another group": (
        with_tensor("up.weight_scale", np.ones((8, 4), BF16)),
        ("up.weight_scale: BF16 [8, 4], expected [8, 2]", "group_size 32"),
    ),
    "scale of another layer": (
        with_tensor("up.weight_scale", np.ones((4, 2), BF16)),
        ("up.weight_scale: BF16 [4, 2], expected [8, 2]",),
    ),
    "integer scale": (
        with_tensor("up.weight_scale", np.ones((8, 2), np.int32)),
        ("up.weight_scale: I32 [8, 2], expected floats",),
    ),
    "no shape, and a width of 0": (
        lambda tensors, config: (
            tensors.pop("up.weight_shape"),
            config["config_groups"]["group_0"]["weights"].update({"num_bits": 0}),
        )[-1],
        ("up: has no weight_shape, and the config does not tell its inputs",),
    ),
    "zero points of another width": (
        with_tensor("up.weight_zero_point", np.zeros((2, 2), np.int32)),
        ("up.weight_zero_point: I32 [2, 2], expected I32 [1, 2] or I8 [8, 2] for 4 bits",),
    ),
    "g_idx short": (
        with_tensor("up.weight_g_idx", np.zeros(63, np.int32)),
        ("up.weight_g_idx: I32 [63], expected I32 [64]",),
    ),
    "g_idx beyond the groups": (
        with_tensor("up.weight_g_idx", np.arange(64, dtype=np.int32)),
        ("up.weight_g_idx: names groups 0 to 63, but there are 2",),
    ),
    "two copies": (
        with_tensor("up.weight", np.ones((8, 64), BF16)),
        ("up: has both weight_packed and weight",),
    ),
    "never compressed": (
        with_tensor("down.weight_scale", np.ones((8, 1), BF16)),
        ("down: has down.weight_scale, but neither",),
    ),
    "ignored, yet quantized": (
        with_key("ignore", value=["re:u"]),
        ("up: is named dense by config.json: quantization_config.ignore ('re:u')",),
    ),
    "named, yet dense": (
        lambda tensors, config: (
            tensors.update({"a.b.weight": np.ones((4, 64), BF16)}),
            config["config_groups"].update({"g": {"targets": ["a.b"], "weights": {"num_bits": 4}}}),
        )[-1],
        ("a.b: is quantized by config.json: quantization_config.config_groups.g.weights",),
    ),
    "unknown format": (
        with_key("format", value="pack-quantised"),
        ("quantization_config.format: is 'pack-quantised'; known are dense",),
    ),
    "marlin-24": (
        with_key("format", value="marlin-24"),
        ("quantization_config.format: is 'marlin-24': 2:4-sparse",),
    ),
    "marlin-24 tensors": (
        with_tensor("down.scale_packed", np.ones((2, 8), np.float16)),
        ("down.scale_packed: is a part of marlin-24",),
    ),
    "sparse": (
        with_key("sparsity_config", value={"format": "sparse-24-bitmask"}),
        ("sparsity_config.format: is 'sparse-24-bitmask': values without their zeros",),
    ),
    "online rotation": (
        rotates,
        ("transform_config.config_groups.v: rotates at location 'input'",),
    ),
    "pattern that is none": (
        with_key("ignore", value=["re:(["]),
        ("ignore: '([' is no regular expression",),
    ),
    "preset that is none": (
        lambda tensors, config: config["config_groups"].update({"w4a99x": ["Linear"]}),
        ("config_groups.w4a99x: 'w4a99x' is no preset", "correct the name, or give the scheme"),
    ),
    "bits that are none": (
        with_key(*WEIGHTS, "num_bits", value="four"),
        ("group_0.weights.num_bits: is 'four', expected a whole number",),
    ),
    "block that is none": (
        with_key(*WEIGHTS, "block_structure", value="128by128"),
        ("block_structure: is '128by128', expected [rows, columns]",),
    ),
    "fp8 without a scale": (
        with_tensor("down.weight", e4m3(4, 32)),
        ("down.weight: F8_E4M3 [4, 32] has no down.weight_scale",),
    ),
    "fp4 that is neither": (
        lambda tensors, config: tensors.update(
            {
                "down.weight_packed": np.zeros((4, 32), np.uint8),
                "down.weight_scale": np.zeros((4, 3), np.uint8),
            }
        ),
        ("down.weight_packed: U8 [4, 32] with a weight_scale U8 [4, 3] is neither nvfp4",),
    ),
    "nvfp4 without its tensor scale": (
        lambda tensors, config: tensors.update(
            {
                "down.weight_packed": np.zeros((4, 32), np.uint8),
                "down.weight_scale": e4m3(4, 4),
            }
        ),
        ("down: has E4M3 scales of NVFP4, but no weight_global_scale",),
    ),
    "nvfp4 with a tensor scale of 0": (
        lambda tensors, config: tensors.update(
            {
                "down.weight_packed": np.zeros((4, 32), np.uint8),
                "down.weight_scale": e4m3(4, 4),
                "down.weight_global_scale": np.zeros(1, np.float32),
            }
        ),
        ("down.weight_global_scale: holds 0.0, expected a finite number above 0",),
    ),
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corrupted_folders_are_refused(name: str, tmp_path: Path) -> None:
    change, words = CORRUPTIONS[name]
    tensors, config = good(), block(group_size=32, symmetric=False)
    change(tensors, config)
    text = refusal(write(tmp_path / "source", tensors, config), tmp_path / "out")
    for word in words:
        assert word in text


def test_the_folder_before_it_was_corrupted(tmp_path: Path) -> None:
    convert(write(tmp_path / "s", good(), block(group_size=32, symmetric=False)), tmp_path / "o")


def test_layouts_that_only_the_version_tells(tmp_path: Path) -> None:
    """60 inputs of 3 bits are six words in both layouts."""
    signed = (np.arange(60) % 8 - 4).reshape(1, 60)
    for padded, version in ((True, "0.9.4"), (False, "0.20.0")):
        tensors = packed(signed, 3, np.ones((1, 1), BF16), padded=padded)
        assert tensors["up.weight_packed"].shape == (1, 6)
        config = block(num_bits=3, strategy="channel")
        folder = write(tmp_path / f"s{padded}", tensors, config)
        text = refusal(folder, tmp_path / "none")
        assert "up.weight_packed: I32 [1, 6] may hold 60 inputs of 3 bits" in text
        folder = write(tmp_path / version, tensors, config | {"version": version})
        out, _ = convert(folder, tmp_path / f"o{padded}")
        assert out["up.weight"].astype(int).tolist() == signed.tolist()


def test_codes_beyond_their_width(tmp_path: Path) -> None:
    tensors = {"up.weight": np.full((2, 64), 9, np.int8), "up.weight_scale": np.ones((2, 1), BF16)}
    config = block("int-quantized", num_bits=4, strategy="channel")
    text = refusal(write(tmp_path / "source", tensors, config), tmp_path / "out")
    assert "up: its codes are 9, but the config says 4 bits: -8 to 7" in text


def test_weights_that_were_never_compressed(tmp_path: Path) -> None:
    tensors = {"up.weight": np.ones((2, 64), BF16), "up.weight_scale": np.ones((2, 1), BF16)}
    config = block("int-quantized", num_bits=8) | {"quantization_status": "frozen"}
    text = refusal(write(tmp_path / "source", tensors, config), tmp_path / "out")
    assert "up.weight: BF16 [2, 64] beside a weight_scale" in text
    assert "quantization_status is 'frozen'" in text


def test_every_problem_is_named_at_once(tmp_path: Path) -> None:
    tensors = good()
    del tensors["up.weight_scale"]
    tensors["down.weight"] = e4m3(4, 32)
    text = refusal(write(tmp_path / "source", tensors, block(format="x")), tmp_path / "out")
    assert all(word in text for word in ("up: ", "down.weight: ", ".format: is 'x'"))
