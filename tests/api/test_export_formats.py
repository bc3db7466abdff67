"""``export`` to every format: values, codes and configs, from MLX folders and from fixtures."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import requant
from tests.support.checkpoints import write_checkpoint
from tests.support.fixture_folders import fixture
from tests.support.mlx_folders import PROJ, affine, bf16, folder, same_bits
from tests.support.safetensors_files import read_folder

Arrays = dict[str, np.ndarray]
INTEGERS = ("compressed-tensors", "gptq", "awq")


def values(source: Path, into: Path) -> Arrays:
    """All weights in float32."""
    requant.convert(source, into, dequantize=True, dtype="float32", layout="keep")
    return read_folder(into)


def config_of(folder: Path) -> dict[str, Any]:
    """The ``quantization_config`` of a folder."""
    block: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return block


def assert_same_values(source: Path, report: requant.Report, tmp_path: Path) -> None:
    """All tensors have the same names, and layers that are called exact the same float32 values."""
    expected, found = values(source, tmp_path / "a"), values(Path(report.output), tmp_path / "b")
    assert expected.keys() == found.keys()
    exact = [x for x in report.plan.layers if x.exactness == "exact" and x.is_weight]
    assert exact
    for layer in exact:
        name = f"{layer.layer}.weight"
        assert np.array_equal(found[name], expected[name]), name


def whole(layer: Arrays) -> Arrays:
    """The layer with scales of which no multiple rounds in bfloat16."""
    zeros = np.rint(-layer["biases"].astype(np.float32) / layer["scales"].astype(np.float32))
    scales = np.exp2(np.random.default_rng(5).integers(-8, -2, zeros.shape)).astype(np.float32)
    return {**layer, "scales": bf16(scales), "biases": bf16(-zeros * scales)}


# A format can hold what the fixture's tool wrote: codes, scales and zero points.
HELD = {
    "awq-gemm-g64-bias": INTEGERS,
    "awq-gemm-g64-skip": ("compressed-tensors", "gptq"),
    "awq-gemv-g128": INTEGERS,
    "auto-round-native-w4g64": INTEGERS,
    "auto-round-native-w2g32-asym": ("gptq",),
    "bitnet-autobitlinear": ("gptq",),
    "ct-int-quantized": ("compressed-tensors", "gptq"),
    "ct-mxfp4-pack": ("compressed-tensors", "mxfp4"),
    "ct-mxfp8": ("compressed-tensors",),
    "ct-pack-int3-g64": ("gptq",),
    "ct-pack-int4-asym-g32": INTEGERS,
    "ct-pack-int4-sym-g128": INTEGERS,
    "ct-pack-int8-channel": ("compressed-tensors", "gptq"),
    "gguf-q4_0": INTEGERS,
    "gguf-q8_0": ("compressed-tensors", "gptq"),
    "gptq-b2-g64-asym-v1": ("gptq",),
    "gptq-b3-g64-planar": ("gptq",),
    "gptq-b4-g128-asym-v2": INTEGERS,
    "gptq-b4-g64-asym-v1": INTEGERS,
    "gptq-b8-gm1-asym-v2": ("compressed-tensors", "gptq"),
    "gptq-dynamic-mixed-v1": ("compressed-tensors", "gptq"),
    "torchao-int8-weight-only": ("compressed-tensors", "gptq"),
    "torchao-intx-w4g32": INTEGERS,
}


def source_of(name: str) -> Path:
    """The checkpoint of a fixture."""
    found = fixture(name) / "checkpoint"
    return found if found.exists() else next(fixture(name).glob("*.gguf"))


@pytest.mark.parametrize(("name", "to"), [(name, to) for name, x in HELD.items() for to in x])
def test_values_of_fixtures(name: str, to: str, tmp_path: Path) -> None:
    """What a tool wrote has the same values in another format, and its plan says exact."""
    report = requant.export(source_of(name), tmp_path / "out", to=to)
    kept = [x for x in report.plan.layers if x.treatment == "kept"]
    assert len(kept) >= 7 and {x.exactness for x in kept} == {"exact"}
    assert config_of(tmp_path / "out")
    assert_same_values(source_of(name), report, tmp_path)


@pytest.mark.parametrize("name", ["gguf-q5_0", "gptq-b5-g64-planar"])
def test_widened_fixtures(name: str, tmp_path: Path) -> None:
    """Codes of 5 bits in 8 have the same values."""
    with pytest.raises(requant.CheckpointError, match="5 bits, gptq holds 2, 3, 4 or 8"):
        requant.export(source_of(name), tmp_path / "out", to="gptq")
    report = requant.export(source_of(name), tmp_path / "out", to="gptq", otherwise="widen")
    kept = [x for x in report.plan.layers if x.treatment == "kept"]
    assert {(x.exactness, x.reason_code) for x in kept} == {("exact", "codes_widened")}
    assert_same_values(source_of(name), report, tmp_path)


# Formats come back as they were: the tensors that the same tool wrote, by fixture.
SAME_TENSORS = {
    "gptq-b3-g64-asym-v2": ("gptq", ("qweight", "qzeros", "scales", "g_idx")),
    "gptq-b4-g128-asym-v2": ("gptq", ("qweight", "scales", "g_idx")),  # all fields less one
    "gptq-b4-g128-sym-v1": ("gptq", ("qweight", "qzeros", "scales", "g_idx")),
    "gptq-b8-g64-sym-v1": ("gptq", ("qweight", "qzeros", "scales", "g_idx")),
    "awq-gemm-g32": ("awq", ("qweight", "qzeros", "scales")),
    "awq-gemm-g64-bias": ("awq", ("qweight", "qzeros", "scales", "bias")),
    "awq-gemm-g128": ("awq", ("qweight", "qzeros", "scales")),
    "ct-mxfp4-pack": ("mxfp4", ("weight_packed", "weight_scale")),
    "ct-mxfp8": ("compressed-tensors", ("weight", "weight_scale")),
}


@pytest.mark.parametrize("through_mlx", [False, True])
@pytest.mark.parametrize("name", SAME_TENSORS)
def test_fixtures_come_back(name: str, through_mlx: bool, tmp_path: Path) -> None:
    """Tensors of the tool, exported to its own format, directly and through an MLX folder."""
    to, roles = SAME_TENSORS[name]
    source = source_of(name)
    if through_mlx:
        requant.convert(source, tmp_path / "mlx", layout="keep")
        source = tmp_path / "mlx"
    requant.export(source, tmp_path / "out", to=to)
    original, written = read_folder(source_of(name)), read_folder(tmp_path / "out")
    assert original.keys() == written.keys()
    for key, expected in original.items():
        if key.rpartition(".")[2] in roles:
            assert same_bits(written[key], expected), key


@pytest.mark.parametrize(
    ("name", "to"), [("gguf-q8_0", "gptq"), ("gptq-b4-g64-asym-v1", "awq"), ("bnb-nf4", "gptq")]
)
def test_exports_are_verified(name: str, to: str, tmp_path: Path) -> None:
    """``verify`` repeats an export of any source, and finds a byte that changed."""
    source, output = source_of(name), tmp_path / "out"
    requant.export(source, output, to=to, otherwise="widen")
    assert requant.verify(source, output).problems == ()
    with (output / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read()[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))
    assert requant.verify(source, output).problems


@pytest.mark.parametrize("to", INTEGERS)
@pytest.mark.parametrize("max_memory", [None, 84_200_000])  # one chunk, and a few rows each
def test_mlx_round_trip(to: str, max_memory: int | None, tmp_path: Path) -> None:
    """Codes and values of an MLX folder come back, whatever the chunks."""
    layers = {PROJ: affine(64, 5), "model.layers.0.mlp.down_proj": affine(96, 3, seed=1)}
    source = folder(tmp_path / "mlx", layers, {"model.norm.weight": bf16(np.ones(8))})
    report = requant.export(source, tmp_path / "out", to=to, max_memory=max_memory)
    assert {x.exactness for x in report.plan.layers} == {"exact"}
    requant.convert(tmp_path / "out", tmp_path / "back", layout="keep", dtype="bfloat16")
    expected, found = read_folder(source), read_folder(tmp_path / "back")
    for name, array in expected.items():
        if name.endswith("biases"):  # 0 may come back as -0
            array, found[name] = array + 0, found[name] + 0
        assert same_bits(found[name], array), name
    assert requant.verify(source, tmp_path / "out").problems == ()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_tensors_of_an_mlx_layer(bits: int, tmp_path: Path) -> None:
    """Each tensor by the documented formula: codes down the inputs, zeros along the outputs."""
    layer = affine(32, 2, bits=bits, group=64)
    layer["biases"] = np.where(layer["biases"] == 0, -layer["scales"], layer["biases"])
    source = folder(tmp_path / "mlx", {PROJ: layer}, {}, block={"bits": bits, "group_size": 64})
    requant.export(source, tmp_path / "out", to="gptq")
    written = read_folder(tmp_path / "out")
    block = config_of(tmp_path / "out")
    assert (block["bits"], block["group_size"], block["desc_act"]) == (bits, 64, False)
    assert (block["sym"], block["checkpoint_format"]) == (False, "gptq")

    def stream(words: np.ndarray) -> list[int]:
        number = sum(int(word) << 32 * n for n, word in enumerate(words.view(np.uint32)))
        count = words.size * 32 // bits
        return [number >> bits * n & (1 << bits) - 1 for n in range(count)]

    for row in range(32):
        assert stream(written[f"{PROJ}.qweight"][:, row]) == stream(layer["weight"][row])
    scales = layer["scales"].astype(np.float32)
    zeros = np.rint(-layer["biases"].astype(np.float32) / scales)
    for group in range(2):
        fields = [int(zero) - 1 for zero in zeros[:, group]]
        assert stream(written[f"{PROJ}.qzeros"][group]) == fields
    assert same_bits(written[f"{PROJ}.scales"], scales.T.astype(np.float16))
    assert written[f"{PROJ}.g_idx"].tolist() == [0] * 64 + [1] * 64


def test_a_zero_point_of_zero_is_not_less_one(tmp_path: Path) -> None:
    """One zero point of 0 makes all fields those of gptq_v2; zeros in the middle are symmetric."""
    layer, even = affine(32), affine(32, seed=3)
    layer["biases"][4, 1] = 0
    even["biases"] = -8 * even["scales"]
    source = folder(tmp_path / "mlx", {PROJ: layer, "a.down_proj": even}, {})
    requant.export(source, tmp_path / "out", to="gptq")
    block, written = config_of(tmp_path / "out"), read_folder(tmp_path / "out")
    assert (block["checkpoint_format"], block["sym"]) == ("gptq_v2", False)
    assert written["a.down_proj.qzeros"].view(np.uint32).tolist() == [[0x88888888] * 4] * 2
    alone = folder(tmp_path / "even", {PROJ: even}, {})
    requant.export(alone, tmp_path / "sym", to="gptq")
    block, written = config_of(tmp_path / "sym"), read_folder(tmp_path / "sym")
    assert (block["checkpoint_format"], block["sym"]) == ("gptq", True)
    assert written[f"{PROJ}.qzeros"].view(np.uint32).tolist() == [[0x77777777] * 4] * 2


def test_awq_words_written_by_hand(tmp_path: Path) -> None:
    """Eight outputs that hold 0 to 7: AutoAWQ stores them as 0x75316420, zero points likewise."""
    rows = np.arange(8, dtype=np.uint32)[:, None]
    layer = {
        "weight": np.repeat(rows * np.uint32(0x11111111), 4, axis=1),
        "scales": bf16(np.full((8, 1), 0.5)),
        "biases": bf16(-0.5 * rows),
    }
    source = folder(tmp_path / "mlx", {PROJ: layer}, {})
    requant.export(source, tmp_path / "out", to="awq")
    written = read_folder(tmp_path / "out")
    assert written[f"{PROJ}.qweight"].view(np.uint32).tolist() == [[0x75316420]] * 32
    assert written[f"{PROJ}.qzeros"].view(np.uint32).tolist() == [[0x75316420]]
    assert same_bits(written[f"{PROJ}.scales"], np.full((1, 8), 0.5, np.float16))
    block = config_of(tmp_path / "out")
    assert block["quant_method"] == "awq" and block["version"] == "gemm" and block["zero_point"]


def test_awq_has_one_group_size(tmp_path: Path) -> None:
    """A group of 64 becomes two of 32 with the same scale and zero point."""
    layers = {PROJ: whole(affine(64, 2, group=64)), "a.down_proj": whole(affine(64, 3))}
    block = {PROJ: {"bits": 4, "group_size": 64}}
    source = folder(tmp_path / "mlx", layers, {}, block=block)
    report = requant.export(source, tmp_path / "out", to="awq")
    assert {x.target for x in report.plan.layers} == {"awq 4-bit g32"}
    assert config_of(tmp_path / "out")["group_size"] == 32
    assert_same_values(source, report, tmp_path)


@pytest.mark.parametrize("to", ["compressed-tensors", "gptq"])
def test_zero_points_below_zero_are_moved(to: str, tmp_path: Path) -> None:
    """Widened to 8 bits, codes and zero point of a group go up together: the same values."""
    layer = whole(affine(32))
    layer["biases"][5, 1] = 3 * layer["scales"][5, 1]
    layer["biases"][6, 0] = -21 * layer["scales"][6, 0]
    source = folder(tmp_path / "mlx", {PROJ: layer}, {})
    with pytest.raises(requant.CheckpointError, match="2 have a zero point outside 0 to 15"):
        requant.export(source, tmp_path / "out", to=to)
    report = requant.export(source, tmp_path / "out", to=to, otherwise="widen")
    assert [(x.target, x.exactness) for x in report.plan.layers] == [(f"{to} 8-bit g32", "exact")]
    assert_same_values(source, report, tmp_path)
    with pytest.raises(requant.CheckpointError, match="2 have a zero point outside 0 to 15"):
        requant.export(source, tmp_path / "awq", to="awq", otherwise="widen")


@pytest.mark.parametrize(
    ("mode", "bits", "group", "formats"),
    [
        ("mxfp4", 4, 32, ("mxfp4", "compressed-tensors")),
        ("nvfp4", 4, 16, ("nvfp4", "compressed-tensors")),
        ("mxfp8", 8, 32, ("compressed-tensors",)),
    ],
)
def test_modes_of_floats(
    mode: str, bits: int, group: int, formats: tuple[str, ...], tmp_path: Path
) -> None:
    """Elements and scales are the same bytes, and come back as they were."""
    weight = bf16(np.random.default_rng(0).normal(size=(48, 96)))
    dense = folder(tmp_path / "dense", {}, {f"{PROJ}.weight": weight})
    requant.convert(dense, tmp_path / "mlx", bits=bits, mode=mode, layout="keep")
    before = read_folder(tmp_path / "mlx")
    for to in formats:
        report = requant.export(tmp_path / "mlx", tmp_path / to, to=to)
        assert [x.exactness for x in report.plan.layers] == ["exact"]
        written = read_folder(tmp_path / to)
        role = "weight" if mode == "mxfp8" else "weight_packed"
        assert written[f"{PROJ}.{role}"].tobytes() == before[f"{PROJ}.weight"].tobytes()
        scales = written[f"{PROJ}.weight_scale"]
        assert scales.shape == (48, 96 // group)
        assert scales.tobytes() == before[f"{PROJ}.scales"].tobytes()
        if mode == "nvfp4":
            assert written[f"{PROJ}.weight_global_scale"].tolist() == [1.0]
        requant.convert(tmp_path / to, tmp_path / f"back-{to}", layout="keep")
        back = read_folder(tmp_path / f"back-{to}")
        assert all(same_bits(back[name], x) for name, x in before.items() if "weight" in name)
        assert back[f"{PROJ}.scales"].tobytes() == before[f"{PROJ}.scales"].tobytes()
    with pytest.raises(requant.CheckpointError, match=f"its mode is {mode}, gptq holds affine"):
        requant.export(tmp_path / "mlx", tmp_path / "gptq", to="gptq")


def test_scales_that_float16_does_not_hold(tmp_path: Path) -> None:
    """Beyond its range they are an error; small ones are rounded, and said so."""
    layer = affine(32)
    layer["scales"][0, 0], layer["biases"][0, 0] = 2.0**17, 0
    source = folder(tmp_path / "large", {PROJ: layer}, {})
    with pytest.raises(requant.CheckpointError, match="beyond the range of F16"):
        requant.export(source, tmp_path / "out", to="gptq")
    layer["scales"][0, 0] = bf16(2.0**-23 * 1.25)
    source = folder(tmp_path / "small", {PROJ: layer}, {})
    report = requant.export(source, tmp_path / "out", to="gptq")
    assert report.plan.layers[0].exactness == "rounded"
    assert "scales rounded to float16" in report.plan.layers[0].bound


def write_moe(path: Path) -> Path:
    """A qwen3_moe model of one layer with four experts, under transformers' names."""
    random, layer = np.random.default_rng(0), "model.layers.0"
    shapes = {"model.embed_tokens": (64, 64), "lm_head": (64, 64), f"{layer}.mlp.gate": (4, 64)}
    shapes |= {f"{layer}.self_attn.{x}_proj": (64, 64) for x in "qkvo"}
    for expert in range(4):
        experts = f"{layer}.mlp.experts.{expert}"
        shapes |= {f"{experts}.{x}_proj": (96, 64) for x in ("gate", "up")}
        shapes[f"{experts}.down_proj"] = (64, 96)
    tensors = {f"{name}.weight": bf16(random.normal(size=x)) for name, x in shapes.items()}
    for name, size in (("self_attn.q_norm", 32), ("self_attn.k_norm", 32)):
        tensors[f"{layer}.{name}.weight"] = bf16(np.ones(size))
    for name in (f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm", "model.norm"):
        tensors[f"{name}.weight"] = bf16(np.ones(64))
    sizes = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 96}
    counts = {"num_hidden_layers": 1, "num_experts": 4, "num_experts_per_tok": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}
    config = {"model_type": "qwen3_moe", "vocab_size": 64, "decoder_sparse_step": 1}
    config |= {"mlp_only_layers": [], "norm_topk_prob": True, "rms_norm_eps": 1e-6}
    config |= {"rope_theta": 10000.0, "tie_word_embeddings": False}
    config |= {"max_position_embeddings": 128, **sizes, **counts, **heads}
    return write_checkpoint(path, tensors, config, metadata={"format": "pt"})


@pytest.mark.parametrize("to", INTEGERS)
def test_experts_of_mlx_lm(to: str, tmp_path: Path) -> None:
    """Stacks of mlx-lm become the experts of the original, and come back with their codes."""
    source = write_moe(tmp_path / "source")
    converted = requant.convert(source, tmp_path / "mlx", bits=4, group_size=32)
    assert converted.plan.layout == "mlx-lm"
    report = requant.export(tmp_path / "mlx", tmp_path / "out", to=to)
    experts = [x.layer for x in report.plan.layers if ".experts." in x.layer]
    assert len(experts) == 12 and not any("switch_mlp" in x.layer for x in report.plan.layers)
    assert values(tmp_path / "out", tmp_path / "dense").keys() == read_folder(source).keys()
    requant.convert(tmp_path / "out", tmp_path / "back", dtype="bfloat16")
    before, back = read_folder(tmp_path / "mlx"), read_folder(tmp_path / "back")
    codes = [name for name in back if back[name].dtype == np.uint32]
    assert sum("switch_mlp" in name for name in codes) == 3
    for name in codes:
        assert same_bits(back[name], before[name]), name
        scales = name.replace("weight", "scales")
        assert same_bits(back[scales], before[scales]), name


@pytest.mark.parametrize(
    ("name", "to"),
    [
        ("gguf-q4_1", "compressed-tensors"),
        ("hqq-b4-g64", "gptq"),
        ("bnb-nf4", "compressed-tensors"),
        ("gptq-b4-g64-actorder-v1", "gptq"),
        ("ct-mxfp4-pack", "gptq"),
    ],
)
def test_codes_that_are_made_again(name: str, to: str, tmp_path: Path) -> None:
    """With widen, layers whose codes do not fit get 8 bits, and the report has their error."""
    source = source_of(name)
    with pytest.raises(requant.CheckpointError, match="--otherwise widen"):
        requant.export(source, tmp_path / "out", to=to)
    report = requant.export(source, tmp_path / "out", to=to, otherwise="widen")
    again = {x.layer: x for x in report.plan.layers if x.treatment == "requantized"}
    assert again and {x.exactness for x in again.values()} == {"re-encoded"}
    expected, found = values(source, tmp_path / "a"), values(tmp_path / "out", tmp_path / "b")
    errors = {layer: x.relative_rms for layer, x in report.errors.items()}
    assert errors.keys() == again.keys()
    for layer, error in errors.items():
        wide, made = (x[f"{layer}.weight"].astype(np.float64) for x in (expected, found))
        relative = np.linalg.norm(made - wide) / np.linalg.norm(wide)
        assert error == pytest.approx(relative, rel=1e-4) and error < 0.01
    with pytest.raises(requant.CheckpointError, match="the format has no more bits for it"):
        requant.export(source, tmp_path / "awq", to="awq", otherwise="widen")
