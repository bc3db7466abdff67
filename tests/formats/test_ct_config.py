"""compressed-tensors' config: which scheme a layer has, presets, what is left out."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import requant
from requant.errors import Problem
from requant.formats.compressed_tensors_config import CtConfig
from requant.formats.quantization_block import QuantizationBlock
from tests.support.checkpoints import write_quantized
from tests.support.conversions import convert
from tests.support.layers.compressed_tensors import Tensors, block, packed
from tests.support.number_formats import BF16, e4m3
from tests.support.plan_texts import note_texts


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
    """A wrong scheme would take the 8-bit layer's words for 4 bits, and be rejected."""
    folder = write_quantized(tmp_path / "s", two_layers(), groups(*entries))
    _, report = convert(folder, tmp_path / "o")
    targets = {layer.layer: layer.target for layer in report.plan.layers}
    assert targets["a.q_proj"] == "affine 4-bit g64"
    assert targets["a.k_proj"] == "affine 8-bit g64"


def test_presets_and_the_old_key(tmp_path: Path) -> None:
    config = {
        "format": "pack-quantized",
        "config_groups": {"W4A16": ["re:.*q"], "W8A16": ["a.k_proj"]},
    }
    folder = write_quantized(tmp_path / "s", two_layers(), None, compression_config=config)
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
        block = QuantizationBlock("here", {"config_groups": {name.lower(): ["Linear"]}})
        scheme = CtConfig(block, problems).of("a.b")
        assert (scheme.bits, problems) == (bits, []), name
        assert bits is None or scheme.kind == ("float" if "FP" in name[:4] else "int"), name
        assert scheme.symmetric is (None if bits is None else name != "W4A16_ASYM"), name


def test_without_a_config_the_tensors_tell(tmp_path: Path) -> None:
    out, _ = convert(write_quantized(tmp_path / "s", two_layers(), None), tmp_path / "o")
    assert out["a.q_proj.weight"].shape == (4, 8)
    assert out["a.k_proj.weight"].shape == (4, 16)


def test_cache_scales_are_left_out_with_a_note(tmp_path: Path) -> None:
    one = np.ones(1, BF16)
    tensors = two_layers() | {"a.k_scale": one, "a.v_scale": one, "a.q_proj.input_scale": one}
    config = groups((["re:.*q"], 4), (["re:.*k"], 8)) | {"kv_cache_scheme": {"num_bits": 8}}
    out, report = convert(write_quantized(tmp_path / "s", tensors, config), tmp_path / "o")
    assert not [name for name in out if name.endswith("_scale")]
    notes = " ".join(note_texts(report.plan.notes))
    assert "a.k_scale, a.v_scale, each a scale of the key and value cache" in notes
    assert "a.q_proj.input_scale, a scale of activations" in notes


def test_offline_transforms_are_in_the_weights(tmp_path: Path) -> None:
    use = {"targets": ["Linear"], "location": "weight_input"}
    config = groups((["re:.*q"], 4), (["re:.*k"], 8)) | {
        "transform_config": {"config_groups": {"u": {"type": "hadamard", "apply": [use]}}}
    }
    convert(write_quantized(tmp_path / "s", two_layers(), config), tmp_path / "o")


def test_in_memory(tmp_path: Path) -> None:
    """Both libraries give the folder's bytes; MLX's plain bytes represent float8."""
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
    folder = write_quantized(tmp_path / "s", tensors, config)
    out, _ = convert(folder, tmp_path / "o")
    made, _ = requant.transform_weights(tensors, config)
    assert {name: array.tobytes() for name, array in made.items()} == {
        name: array.tobytes() for name, array in out.items()
    }
    by_mlx, _ = requant.transform_weights(mx.load(str(folder / "model.safetensors")), config)
    for name, wanted in mx.load(str(tmp_path / "o" / "model.safetensors")).items():
        assert mx.array_equal(by_mlx[name].view(mx.uint8), wanted.view(mx.uint8)), name
