"""Two formats in one folder: each layer is read by what its tensors are."""

from pathlib import Path

import numpy as np
import pytest

import requant
from requant.quantization.config import Quantization
from tests.support.conversions import convert, rejection
from tests.support.format_folders import SOURCES, Source, Tensors
from tests.support.layers import packers
from tests.support.number_formats import BF16, e4m3
from tests.support.plan_texts import note_texts
from tests.support.safetensors_files import read_folder

pytestmark = pytest.mark.sweep(2)

# Whose tensors leave one reading without a word of the config.
TELLING = [
    "awq",
    "ct-int4",
    "ct-fp8",
    "ct-nvfp4",
    "fp8",
    "modelopt-fp8",
    "modelopt-nvfp4",
    "modelopt-mxfp8",
    "mxfp4",
    "hqq",
    "bnb-nf4",
    "bnb-int8",
    "quark",
    "torchao",
]
# And whose do not: how zeros are stored, what a scale does, bits or group, a rotation.
SILENT = ["gptq", "auto-round", "paroquant", "bitnet", "mlx", "metal", "fp-quant"]
# Layers of the second kind that the first reads itself, by its own config.
SHARED = {
    **{"gptq": ("auto-round",), "auto-round": ("gptq",), "awq": ("paroquant",)},
    **{"mlx": ("metal",), "metal": ("mlx",)},
}


def siblings(first: Source, second: Source) -> Source:
    """A folder with the config of the first, and the layers of both."""
    tensors = dict(first.tensors)
    for name in second.parts:
        tensors[f"other.{name}"] = second.tensors[name]
    values = dict(first.values)
    for path, array in second.values.items():
        if path not in ("head", "norm"):
            values[f"other.{path}"] = array
    metadata = dict(first.metadata)
    metadata |= {f"other.{k}": v for k, v in second.metadata.items() if k != "tensor_names"}
    return Source(tensors, values, first.config, metadata)


def dense_of(folder: Path, output: Path) -> tuple[Tensors, requant.Report]:
    return convert(folder, output, dequantize=True, dtype="float32")


def check_values(made: Tensors, values: dict[str, np.ndarray]) -> None:
    for path, wanted in values.items():
        got = made.get(f"{path}.weight", made.get(path))
        assert got is not None, f"{path} is gone: {sorted(made)}"
        assert np.array_equal(got, wanted), path


@pytest.mark.parametrize("second", TELLING)
@pytest.mark.parametrize("first", sorted(SOURCES))
def test_both_are_read(first: str, second: str, tmp_path: Path) -> None:
    source = siblings(SOURCES[first](), SOURCES[second]())
    if (first, second) == ("ct-int4", "quark"):  # a config that demands zeros of every layer
        folder = source.write(tmp_path / "source")
        assert "other.up: has no weight_zero_point" in rejection(folder, tmp_path / "out", bits=8)
        return
    made, _ = dense_of(source.write(tmp_path / "source"), tmp_path / "out")
    check_values(made, source.values)


UNREADABLE = [
    (first, second)
    for first in sorted(SOURCES)
    for second in SILENT
    if second not in (first, *SHARED.get(first, ()))
]


@pytest.mark.parametrize(("first", "second"), UNREADABLE)
def test_what_has_several_readings_is_rejected_by_name(first: str, second: str, tmp_path: Path):
    folder = siblings(SOURCES[first](), SOURCES[second]()).write(tmp_path / "source")
    assert "other.up" in rejection(folder, tmp_path / "out", bits=8)


FIRSTS = ("gptq", "fp8", "modelopt-nvfp4", "mlx")


@pytest.mark.parametrize("second", TELLING)
def test_the_second_is_what_it_is_in_a_folder_of_its_own(second: str, tmp_path: Path) -> None:
    """Codes, scales and biases, next to one format or another."""
    other = SOURCES[second]()
    source = siblings(SOURCES[FIRSTS[TELLING.index(second) % len(FIRSTS)]](), other)
    made = []
    for name, each in (("both", source), ("alone", other)):
        folder = each.write(tmp_path / name)
        requant.convert(folder, tmp_path / f"{name}-out", layout="keep", bits=8, group_size=64)
        made.append(read_folder(tmp_path / f"{name}-out"))
    both, alone = made
    names = [name for name in alone if not name.startswith(("head", "norm"))]
    assert names
    for name in names:
        assert both[f"other.{name}"].dtype == alone[name].dtype, name
        assert both[f"other.{name}"].tobytes() == alone[name].tobytes(), name


@pytest.mark.parametrize("second", [name for name in TELLING if name != "torchao"])
def test_in_memory(second: str, tmp_path: Path) -> None:
    first = FIRSTS[(TELLING.index(second) + 1) % 3]  # not MLX's own: it has no block
    source = siblings(SOURCES[first](), SOURCES[second]())
    folder = source.write(tmp_path / "source")
    otherwise = Quantization.affine(64, 8)
    block = source.config["quantization_config"]
    made, quantization = requant.transform_weights(source.tensors, block, otherwise=otherwise)
    dense, _ = dense_of(folder, tmp_path / "dense")
    for path, values in source.values.items():
        if f"{path}.scales" not in made:
            continue
        own = quantization.quantization_for(path)
        assert own is not None
        again = requant.dequantize_weights(
            {k: v for k, v in made.items() if k.startswith(f"{path}.")},
            requant.PerLayerQuantization(own),
        )
        got = again[f"{path}.weight"].astype(np.float32)
        assert np.abs(got - values).max() <= 0.05 * np.abs(values).max(), path
    assert dense.keys() == {f"{path}.weight" for path in source.values}


# -- one tool, several kinds, and what the config says of them ------------------------------------
HEADS = ("head", "norm")


def notes_of(folder: Path) -> str:
    return "\n".join(note_texts(requant.plan(folder, layout="keep", dequantize=True).notes))


def gptq_layer(version: int, symmetric: bool = True, bits: int = 4) -> tuple[Tensors, np.ndarray]:
    """A layer ``other``; in version 1 zeros are stored less one."""
    random = np.random.default_rng(5)
    codes = random.integers(0, 1 << bits, (64, 128))
    zeros = np.full((64, 4), 1 << (bits - 1))
    if not symmetric:
        zeros = random.integers(1, (1 << bits) - 1, (64, 4))
    scales = (random.integers(1, 9, (64, 4)) / 64).astype(np.float16)
    parts = packers.gptq(codes, zeros, scales, bits, stored_minus=version == 1)
    values = (codes - zeros.repeat(32, 1)) * scales.astype(np.float32).repeat(32, 1)
    return {f"other.{role}": array for role, array in parts.items()}, values.astype(np.float32)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("first", ["fp8", "modelopt-nvfp4", "ct-fp8", "awq", "mlx", "hqq"])
def test_symmetric_zeros_tell_the_version(first: str, version: int, bits: int, tmp_path: Path):
    source = SOURCES[first]()
    tensors, values = gptq_layer(version, bits=bits)
    source.tensors |= tensors
    folder = source.write(tmp_path / "source")
    made, _ = dense_of(folder, tmp_path / "out")
    check_values(made, source.values | {"other": values})
    assert "other" in notes_of(folder)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("first", ["fp8", "modelopt-nvfp4", "ct-fp8"])
def test_zeros_that_vary_need_a_word_of_the_config(first: str, version: int, tmp_path: Path):
    """The rejection says which, and what it says works."""
    source = SOURCES[first]()
    tensors, values = gptq_layer(version, symmetric=False)
    source.tensors |= tensors
    text = rejection(source.write(tmp_path / "source"), tmp_path / "out", bits=8)
    assert "other: is laid out as gptq, 4-bit codes in groups of 32" in text
    assert text.count("other") == 1
    assert '"checkpoint_format": "gptq" (version 1, less one) or "gptq_v2" (as they are)' in text
    source.config["quantization_config"]["checkpoint_format"] = ("gptq", "gptq_v2")[version - 1]
    made, _ = dense_of(source.write(tmp_path / "declared"), tmp_path / "dense")
    check_values(made, source.values | {"other": values})


def test_without_any_block_the_advice_is_a_whole_one(tmp_path: Path) -> None:
    """FP8 that its tensors determine, next to GPTQ that they do not."""
    source = SOURCES["fp8"]()
    source.config.clear()
    tensors, values = gptq_layer(1, symmetric=False)
    source.tensors |= tensors
    text = rejection(source.write(tmp_path / "source"), tmp_path / "out", bits=8)
    assert 'write {"quant_method": "gptq", "sym": false, "checkpoint_format": "gptq"' in text
    block = {"quant_method": "gptq", "sym": False, "checkpoint_format": "gptq"}
    source.config["quantization_config"] = block
    made, _ = dense_of(source.write(tmp_path / "declared"), tmp_path / "dense")
    check_values(made, source.values | {"other": values})


def test_two_versions_in_one_folder_are_certain_of_neither(tmp_path: Path) -> None:
    source = SOURCES["fp8"]()
    for version in (1, 2):
        tensors, _ = gptq_layer(version)
        source.tensors |= {name.replace("other", f"v{version}"): a for name, a in tensors.items()}
    text = rejection(source.write(tmp_path / "source"), tmp_path / "out", bits=8)
    assert "v1: " in text
    assert "v2: " in text


@pytest.mark.parametrize(
    "packing", ["auto_round:auto_gptq", "auto_round:fp8", "auto_round:llm_compressor", "auto_round"]
)
def test_auto_round_next_to_fp8(packing: str, tmp_path: Path) -> None:
    """Integers and blocks of FP8, which the config describes layer by layer, or not at all."""
    for number, extra in enumerate(
        (
            None,
            {"up": {"bits": 16}},
            {"up": {"bits": 8, "data_type": "fp", "group_size": [128, 128]}},
        )
    ):
        source = SOURCES["fp8"]()
        tensors, values = gptq_layer(2 if packing == "auto_round" else 1)
        source.tensors |= tensors
        block = {"quant_method": "auto-round", "packing_format": packing, "sym": True}
        block |= {"bits": 4, "group_size": 32, "data_type": "int", "extra_config": extra}
        source.config["quantization_config"] = block
        folder = source.write(tmp_path / f"source{number}")
        made, _ = dense_of(folder, tmp_path / f"out{number}")
        check_values(made, source.values | {"other": values})
        named = ("up): read by what the tensors are", "extra_config calls 'up' dense", "")[number]
        assert named in notes_of(folder)
        assert ("(up)" in notes_of(folder)) is (number < 2)


def test_an_export_of_auto_round_that_is_fp8_alone(tmp_path: Path) -> None:
    source = SOURCES["fp8"]()
    source.config["quantization_config"] = {
        "quant_method": "auto_round:fp8",
        "bits": 8,
        "data_type": "fp",
        "group_size": [128, 128],
    }
    made, _ = dense_of(source.write(tmp_path / "source"), tmp_path / "out")
    check_values(made, source.values)


def test_a_mixed_config_of_modelopt(tmp_path: Path) -> None:
    """Algorithms by layer; one of them wrong, which a note says."""
    source = SOURCES["modelopt-nvfp4"]()
    fp8 = SOURCES["modelopt-fp8"]()
    layers = {"up": {"quant_algo": "NVFP4"}, "other.up": {"quant_algo": "FP8"}}
    block = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}
    source.config["quantization_config"] = block | {"quantized_layers": layers}
    both = siblings(source, fp8)
    folder = both.write(tmp_path / "source")
    made, _ = dense_of(folder, tmp_path / "out")
    check_values(made, both.values)
    assert "believed" not in notes_of(folder)
    layers["other.up"]["quant_algo"] = "NVFP4"
    folder = both.write(tmp_path / "wrong")
    made, _ = dense_of(folder, tmp_path / "wrong-out")
    check_values(made, both.values)
    assert "other.up: is stored as fp8, but config.json" in notes_of(folder)
    assert "are believed" in notes_of(folder)


def test_quark_with_fp8_kept(tmp_path: Path) -> None:
    """Layers of the original that Quark left as they were, by its list or by no word."""
    for exclude in ([], ["other.*"]):
        source = siblings(SOURCES["quark"](), SOURCES["fp8"]())
        source.config["quantization_config"]["exclude"] = exclude
        folder = source.write(tmp_path / f"source{len(exclude)}")
        made, _ = dense_of(folder, tmp_path / f"out{len(exclude)}")
        check_values(made, source.values)
        assert "other.up" in notes_of(folder)


def test_nvfp4_experts_next_to_fp8(tmp_path: Path) -> None:
    """Of an FP8 folder: attention in blocks, experts NVFP4 under either tool's names."""
    source = SOURCES["fp8"]()
    for number, name in enumerate(("modelopt-nvfp4", "ct-nvfp4")):
        expert = SOURCES[name]()
        path = f"model.layers.0.mlp.experts.{number}.up_proj"
        source.tensors |= {
            part.replace("up.", f"{path}."): expert.tensors[part] for part in expert.parts
        }
        source.values[path] = expert.values["up"]
    made, _ = dense_of(source.write(tmp_path / "source"), tmp_path / "out")
    check_values(made, source.values)


def test_a_block_of_another_kind_altogether(tmp_path: Path) -> None:
    """The config names a format of which no layer is there."""
    source = SOURCES["fp8"]()
    source.config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    folder = source.write(tmp_path / "source")
    made, _ = dense_of(folder, tmp_path / "out")
    check_values(made, source.values)
    assert "quantization_config says nothing (up)" in notes_of(folder)


def test_act_order_is_not_moved_past_a_layer_of_another_kind(tmp_path: Path) -> None:
    """A gate in FP8 works on the hidden vector too: its rows change places with up's, or none."""
    source = SOURCES["fp8"]()
    random = np.random.default_rng(0)
    groups = random.permutation(np.arange(64) // 32).astype(np.int32)
    for name, (out, n_in) in {"up_proj": (64, 128), "down_proj": (128, 64)}.items():
        codes, zeros = random.integers(0, 16, (out, n_in)), np.full((out, n_in // 32), 8)
        scales = (random.integers(1, 9, (out, n_in // 32)) / 64).astype(np.float16)
        parts = packers.gptq(codes, zeros, scales, 4, stored_minus=1)
        in_order = np.arange(n_in, dtype=np.int32) // 32
        parts["g_idx"] = groups if name == "down_proj" else in_order
        source.tensors |= {f"mlp.{name}.{role}": array for role, array in parts.items()}
    source.tensors["mlp.gate_proj.weight"] = source.tensors.pop("up.weight")
    source.tensors["mlp.gate_proj.weight_scale_inv"] = source.tensors.pop("up.weight_scale_inv")
    block = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True, "sym": True}
    source.config["quantization_config"] = block
    folder = source.write(tmp_path / "source")
    made, _ = convert(folder, tmp_path / "out", overrides=["gate_proj=8"])
    wanted, _ = dense_of(folder, tmp_path / "dense")
    order = np.argsort(groups, kind="stable")
    config = requant.parse_quantization((tmp_path / "out" / "config.json").read_text())
    assert config is not None
    again = requant.dequantize_weights(made, config)
    moved = not np.allclose(
        again["mlp.up_proj.weight"].astype(np.float32), wanted["mlp.up_proj.weight"], atol=0.01
    )
    rows = order if moved else np.arange(64)
    for name in ("gate_proj", "up_proj"):
        got = again[f"mlp.{name}.weight"].astype(np.float32)
        want = wanted[f"mlp.{name}.weight"][rows]
        assert np.abs(got - want).max() <= 0.02 * np.abs(want).max(), name


# -- bits, groups and blocks ----------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "keys", "value"),
    [
        ("gptq", ("bits",), 8),
        ("gptq", ("group_size",), 64),
        ("gptq", ("group_size",), -1),
        ("gptq", ("dynamic",), {"+:up": {"bits": 8, "group_size": 128}}),
        ("awq", ("bits",), 8),
        ("awq", ("group_size",), 128),
        ("awq", ("version",), "gemv"),
        ("auto-round", ("bits",), 2),
        ("auto-round", ("extra_config",), {"up": {"bits": 8, "group_size": 128}}),
        ("ct-int4", ("config_groups", "group_0", "weights", "num_bits"), 8),
        ("ct-int4", ("config_groups", "group_0", "weights", "group_size"), 64),
        ("modelopt-nvfp4", ("quant_algo",), "FP8"),
        ("modelopt-fp8", ("quant_algo",), "W4A16_AWQ"),
        ("hqq", ("quant_config", "weight_quant_params", "group_size"), 64),
        ("quark", ("global_quant_config", "weight", "dtype"), "uint4"),
        ("fp-quant", ("forward_dtype",), "nvfp4"),
    ],
)
def test_shapes_are_believed_over_the_config(
    name: str, keys: tuple[str, ...], value: object, tmp_path: Path
) -> None:
    """With a note of both, or, where shapes do not determine everything, a rejection of both."""
    source = SOURCES[name]()
    part = source.config["quantization_config"]
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = value
    folder = source.write(tmp_path / "source")
    if name == "fp-quant":
        assert "up.scales" in rejection(folder, tmp_path / "out")
        return
    made, _ = dense_of(folder, tmp_path / "out")
    check_values(made, source.values)
    assert "up" in notes_of(folder)


@pytest.mark.parametrize("first", ["fp8", "gptq"])
def test_a_grid_that_is_not_of_the_blocks_that_the_config_names(first: str, tmp_path: Path) -> None:
    source = SOURCES["fp8"]()
    random = np.random.default_rng(0)
    codes, grid = e4m3(256, 256), random.uniform(0.5, 2, (2, 2)).astype(np.float32)
    source.tensors |= {"up.weight": codes, "up.weight_scale_inv": grid}
    source.values["up"] = codes.astype(np.float32) * grid.repeat(128, 0).repeat(128, 1)
    block = source.config["quantization_config"] | {"weight_block_size": [64, 64]}
    source.config["quantization_config"] = block | {"quant_method": first}
    folder = source.write(tmp_path / "source")
    made, _ = dense_of(folder, tmp_path / "out")
    check_values(made, source.values)
    assert "weight_block_size is not the blocks of up" in notes_of(folder)


@pytest.mark.parametrize("first", ["gptq", "modelopt-nvfp4"])
def test_a_grid_of_which_one_number_is_left_is_not_read(first: str, tmp_path: Path) -> None:
    source, other = SOURCES[first](), SOURCES["fp8"]()
    other.tensors["up.weight"] = e4m3(256, 256)
    both = siblings(source, other)
    assert "other.up" in rejection(both.write(tmp_path / "source"), tmp_path / "out", bits=8)


def test_plain_bytes_are_not_fp8_where_fp8_has_its_name(tmp_path: Path) -> None:
    source = SOURCES["fp8"]()
    bytes_of = np.random.default_rng(0).integers(0, 120, (16, 128), np.uint8)
    source.tensors |= {"gate.weight": bytes_of, "gate.weight_scale": np.ones(1, BF16)}
    text = rejection(source.write(tmp_path / "source"), tmp_path / "out", bits=8)
    assert "gate.weight: U8 [16, 128] next to gate.weight_scale may be anything but FP8" in text


@pytest.mark.parametrize("method", ["fp8", "bitnet", "compressed-tensors"])
def test_plain_bytes_of_mx_load(method: str) -> None:
    """In memory FP8 has no name: the config's word decides."""
    codes = e4m3(64, 128)
    weights = {
        "up.weight": codes.view(np.uint8),
        "up.weight_scale": np.full((64, 1), 0.375, np.float32),
    }
    block: dict[str, object] = {"quant_method": method}
    if method == "compressed-tensors":
        group = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float"}}
        block["config_groups"] = {"group_0": group}
    if method == "bitnet":
        with pytest.raises(requant.CheckpointError, match=r"up\.weight"):
            requant.transform_weights(weights, block, otherwise="dense")
        return
    made, _ = requant.transform_weights(weights, block, otherwise="dense")
    wanted = (codes.astype(np.float32) * np.float32(0.375)).astype(made["up.weight"].dtype)
    assert np.array_equal(made["up.weight"], wanted)
