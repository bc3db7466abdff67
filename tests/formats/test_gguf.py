"""GGUF fixtures: values of the gguf package, codes as codes; logits of the dense weights."""

import json
from pathlib import Path

import gguf
import mlx.core as mx
import numpy as np
import pytest

import requant
from requant.errors import CheckpointError
from requant.kernels.gguf import TYPES, BlockType
from tests.support.conversions import convert, dequantized
from tests.support.fixture_checks import Checked, check_values
from tests.support.fixture_folders import fixture
from tests.support.gguf_files import permuted, random_blocks
from tests.support.logits import logits
from tests.support.mlx_reference import affine
from tests.support.plan_texts import reason_text
from tests.support.safetensors_files import read_file, read_folder

pytestmark = pytest.mark.sweep(2)

EXACT = ("F32", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4")
CLASSES = {"Q4_K": "rounded", "Q6_K": "re-encoded"}
NAMES = ["mxfp4", "q4_0", "q4_1", "q4_k_m", "q5_0", "q5_1", "q6_k", "q8_0"]
# Scale (at most 15 steps) and bias (up to some hundred steps), each rounded once.
BOUND = 0.05


def restored(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q and k as Hugging Face has them."""
    order = np.argsort(permuted(np.arange(len(rows))[:, None], heads)[:, 0])
    return rows[order]


def expected_of(name: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Values by Hugging Face's path, and the type of each."""
    meta = json.loads((fixture(name) / "meta.json").read_text())
    fields = gguf.GGUFReader(fixture(name) / "checkpoint" / "model.gguf").fields
    heads = int(fields["llama.attention.head_count"].contents())
    kv_heads = int(fields["llama.attention.head_count_kv"].contents())
    values, kinds = {}, {}
    for key, array in read_file(fixture(name) / "expected.safetensors").items():
        path = meta["hf_names"][key].removesuffix(".weight")
        if key in meta["permuted"]:
            array = restored(array, heads if "attn_q" in key else kv_heads)
        values[path], kinds[path] = array, meta["types"][key]
    return values, kinds


@pytest.mark.parametrize("dtype", [None, "float32"])
@pytest.mark.parametrize("name", NAMES)
def test_fixture(name: str, dtype: str | None, tmp_path: Path) -> None:
    name = f"gguf-{name}"
    source = fixture(name) / "checkpoint" / "model.gguf"
    expected, kinds = expected_of(name)
    out, report = convert(source, tmp_path / "out", dtype=dtype)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    checked = Checked(source, tmp_path / "out", report, out, config, expected)
    stated = {layer.layer: layer.exactness for layer in report.plan.layers}
    for path, values in expected.items():
        wanted = "exact" if kinds[path] in EXACT else CLASSES[kinds[path]]
        wide = wanted == "rounded" and dtype == "float32"
        assert stated[path] == ("exact" if wide else wanted), path
        # K types: the package rounds the product d * scale * code, which float32 does not hold.
        room = 1e-6 if wide else 0.0
        check_values(checked, path, values, wanted, 0.0 if wide else BOUND, 0.01, room)
    small = {"layout": "keep", "dtype": dtype, "chunk_bytes": 2048, "threads": 3}
    requant.convert(source.parent, tmp_path / "small", **small)
    assert (tmp_path / "small" / "model.safetensors").read_bytes() == (
        tmp_path / "out" / "model.safetensors"
    ).read_bytes()
    dense = dequantized(source, tmp_path / "dense")
    for path, values in expected.items():
        assert np.array_equal(dense[f"{path}.weight"], values), path


@pytest.mark.parametrize("name", NAMES)
def test_logits(name: str, tmp_path: Path) -> None:
    """mlx-lm on the result, and on the package's own dense weights."""
    name = f"gguf-{name}"
    source = fixture(name) / "checkpoint" / "model.gguf"
    expected, kinds = expected_of(name)
    requant.convert(source, tmp_path / "out", dtype="float32")
    requant.convert(source, tmp_path / "dense", dequantize=True, dtype="float32", layout="keep")
    weights = mx.load(str(tmp_path / "dense" / "model.safetensors"))
    weights |= {f"{path}.weight": mx.array(values) for path, values in expected.items()}
    mx.save_safetensors(str(tmp_path / "dense" / "model.safetensors"), weights)
    found, wanted = logits(tmp_path / "out"), logits(tmp_path / "dense")
    largest = 0.03 if "Q6_K" in kinds.values() else 2e-5
    assert np.abs(found - wanted).max() <= largest * np.abs(wanted).max()


def test_inspect_and_plan_say_what_is_stored() -> None:
    source = fixture("gguf-q4_k_m") / "checkpoint" / "model.gguf"
    inspection = requant.inspect(source)
    assert inspection.format == "gguf"
    assert inspection.evidence == "model.gguf: architecture 'llama'"
    assert set(inspection.encodings) == {"gguf Q4_K", "gguf Q5_0", "gguf Q6_K", "gguf Q8_0", "F32"}
    layers = {layer.layer: layer for layer in requant.plan(source).layers}
    assert layers["lm_head"].target == "affine 8-bit g32"
    assert "covers fewer values" in reason_text(layers["lm_head"])
    assert "relative error at most 0.00049" in layers["model.embed_tokens"].bound


def write(path: Path, tensors: dict[str, tuple[np.ndarray, str]]) -> Path:
    """A file of no known architecture: tensors keep their names."""
    writer = gguf.GGUFWriter(path, "other")
    for name, (array, kind) in tensors.items():
        raw = None if array.dtype.kind == "f" else gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, array, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def nvfp4(rows: int, byte: int) -> np.ndarray:
    blocks = np.random.default_rng(1).integers(0, 256, (rows, 36), np.uint8)
    blocks[:, :4] = byte
    return blocks


def test_nvfp4_keeps_its_codes(tmp_path: Path) -> None:
    """Also with the scale byte that the two sides read differently, and a scale of one."""
    one = np.ones(1, np.float32)
    blocks = np.concatenate([nvfp4(2, 0x38), nvfp4(2, 0x7F)])
    source = write(tmp_path / "m.gguf", {"w.weight": (blocks, "NVFP4"), "w.scale": (one, "F32")})
    report = requant.convert(source, tmp_path / "out")
    assert [str(layer.exactness) for layer in report.plan.layers] == ["exact"]
    out = read_folder(tmp_path / "out")
    spec = {"group_size": 16, "bits": 4, "mode": "nvfp4"}
    got = mx.dequantize(
        mx.array(out["w.weight"]), mx.array(out["w.scales"]), **spec, dtype=mx.float32
    )
    expected = gguf.dequantize(blocks, gguf.GGMLQuantizationType.NVFP4)
    assert np.array_equal(np.array(got), expected)


def test_nvfp4_with_a_scale_over_the_tensor(tmp_path: Path) -> None:
    blocks, scale = nvfp4(4, 0x38), np.array([0.75], np.float32)
    tensors = {"w.weight": (blocks, "NVFP4"), "w.scale": (scale, "F32")}
    tensors["w.input_scale"] = (scale, "F32")
    source = write(tmp_path / "m.gguf", tensors)
    report = requant.convert(source, tmp_path / "out", dequantize=True, dtype="float32")
    expected = gguf.dequantize(blocks, gguf.GGMLQuantizationType.NVFP4) * np.float32(0.75)
    assert np.array_equal(read_folder(tmp_path / "out")["w.weight"], expected)
    assert report.plan.dropped == (("w.input_scale", "MLX does not quantize activations"),)
    kept = requant.plan(source).layers[0]
    assert (kept.target, str(kept.exactness)) == ("affine 8-bit g32", "re-encoded")


@pytest.mark.parametrize(
    ("kind", "byte", "words"),
    [("NVFP4", 0xB8, "16 scale bytes are negative"), ("MXFP4", 255, "4 scale bytes are 255")],
)
def test_scale_bytes_that_no_writer_makes(kind: str, byte: int, words: str, tmp_path: Path) -> None:
    blocks = nvfp4(4, byte) if kind == "NVFP4" else np.full((4, 17), byte, np.uint8)
    source = write(tmp_path / "m.gguf", {"w.weight": (blocks, kind)})
    with pytest.raises((CheckpointError, requant.RequantError), match=words):
        requant.convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_scales_beyond_float16_stop_the_run(tmp_path: Path) -> None:
    """d = 60000: the bias -8 d is not a float16 number; bfloat16 holds it."""
    blocks = np.zeros((2, 18), np.uint8)
    blocks[:, :2] = np.array([60000], np.float16).view(np.uint8)
    source = write(tmp_path / "m.gguf", {"w.weight": (blocks, "Q4_0")})
    with pytest.raises(CheckpointError, match="--dtype bfloat16 holds them"):
        requant.convert(source, tmp_path / "out")
    requant.convert(source, tmp_path / "out", dtype="bfloat16")


# Section 6 of the format's document, row by row: type -> target, class in float16.
TABLE = {
    "Q4_0": ("affine 4-bit g32", "exact"),
    "Q4_1": ("affine 4-bit g32", "exact"),
    "Q5_0": ("affine 5-bit g32", "exact"),
    "Q5_1": ("affine 5-bit g32", "exact"),
    "Q8_0": ("affine 8-bit g32", "exact"),
    "Q4_K": ("affine 4-bit g32", "rounded"),
    "Q5_K": ("affine 5-bit g32", "rounded"),
    "IQ4_NL": ("affine 8-bit g32", "exact"),
    "IQ4_XS": ("affine 8-bit g32", "rounded"),
    "IQ3_S": ("affine 4-bit g32", "rounded"),
    "IQ3_XXS": ("affine 6-bit g32", "rounded"),
    "IQ2_XXS": ("affine 8-bit g32", "rounded"),
    "IQ1_S": ("affine 2-bit g32", "rounded"),
    "TQ1_0": ("affine 2-bit g128", "exact"),
    "TQ2_0": ("affine 2-bit g128", "exact"),
    "Q1_0": ("affine 2-bit g128", "exact"),
    "MXFP4": ("mxfp4 4-bit g32", "exact"),
    "NVFP4": ("nvfp4 4-bit g16", "exact"),
    "Q2_K": ("affine 8-bit g32", "re-encoded"),
    "Q3_K": ("affine 8-bit g32", "re-encoded"),
    "Q6_K": ("affine 8-bit g32", "re-encoded"),
    "IQ2_XS": ("affine 8-bit g32", "re-encoded"),
    "IQ2_S": ("affine 8-bit g32", "re-encoded"),
    "IQ1_M": ("affine 8-bit g32", "re-encoded"),
}
ONE_BIT = np.array([0.5], np.float16).tobytes() + bytes(range(16))


def blocks_of(kind: BlockType) -> tuple[np.ndarray, np.ndarray]:
    """Three rows of 512 values, and what they represent."""
    if kind.name == "Q1_0":  # the package has no decoder for it
        raw = np.frombuffer(ONE_BIT, np.uint8)
        signs = np.unpackbits(raw[2:], bitorder="little") * 1.0 - 0.5
        return np.tile(raw, (3, 4)), np.tile(signs.astype(np.float32), (3, 4))
    blocks = random_blocks(kind, 3, 512 // kind.elements, kind.number)
    if kind.name == "MXFP4":
        blocks[:, :: kind.nbytes] = 120
    if kind.name == "NVFP4":
        blocks.reshape(3, -1, kind.nbytes)[:, :, :4] &= 0x7F
    return blocks, gguf.dequantize(blocks, gguf.GGMLQuantizationType[kind.name])


def test_the_table_holds_every_type() -> None:
    assert {kind.name for kind in TYPES.values() if not kind.dtype} == TABLE.keys()


@pytest.mark.parametrize("name", TABLE)
def test_the_table_of_exactness(name: str, tmp_path: Path) -> None:
    """Target, class, and the values that MLX's formula gives for the codes."""
    kind = next(kind for kind in TYPES.values() if kind.name == name)
    blocks, values = blocks_of(kind)
    source = write(tmp_path / "m.gguf", {"w.weight": (blocks, name)})
    target, exactness = TABLE[name]
    made = {}
    for dtype in ("float32", "float16"):
        report = requant.convert(source, tmp_path / dtype, dtype=dtype)
        (layer,) = report.plan.layers
        full = exactness == "rounded" and dtype == "float32"
        assert (layer.target, str(layer.exactness)) == (target, "exact" if full else exactness)
        config = json.loads((tmp_path / dtype / "config.json").read_text())
        out = read_folder(tmp_path / dtype)
        made[dtype] = Checked(source, tmp_path / dtype, report, out, config, {"w": values})
        if exactness != "rounded":
            check_values(made[dtype], "w", values, exactness, 0.0, 0.02, 0.0)
    if exactness != "rounded":
        return
    # The package rounds d * scale * code, which float32 does not hold.
    check_values(made["float32"], "w", values, "exact", 0.0, 0.0, 1e-6)
    spec = made["float32"].spec("w")
    assert spec is not None
    wide, narrow = (
        affine(made[dtype].weights, "w", spec["group_size"], spec["bits"])
        for dtype in ("float32", "float16")
    )
    assert np.array_equal(narrow.codes, wide.codes)
    # As the plan states it; the last term is half of float16's smallest number.
    for role, times in (("scales", 1), ("biases", 2)):
        exact = getattr(wide, role)
        error = np.abs(getattr(narrow, role) - exact)
        assert (error <= times * (2**-11 * np.abs(exact) + 128 * 2**-25)).all(), role


def test_every_type_of_blocks_is_converted(tmp_path: Path) -> None:
    """One file of all types: each is kept or requantized, and decodes to the package's values."""
    tensors, expected = {}, {}
    for kind in TYPES.values():
        if kind.dtype or kind.name == "Q1_0":
            continue
        count = 512 // kind.elements
        blocks = random_blocks(kind, 3, count, kind.number)
        if kind.name == "MXFP4":
            blocks[:, :: kind.nbytes] = 120
        name = f"{kind.name.lower()}.weight"
        tensors[name] = (blocks, kind.name)
        expected[name] = gguf.dequantize(blocks, gguf.GGMLQuantizationType[kind.name])
    source = write(tmp_path / "m.gguf", tensors)
    requant.convert(source, tmp_path / "dense", dequantize=True, dtype="float32")
    dense = read_folder(tmp_path / "dense")
    assert dense.keys() == expected.keys()
    for name, values in expected.items():
        assert np.array_equal(dense[name], values), name
    layers = {layer.layer: layer for layer in requant.plan(source).layers}
    requantized = {
        name.upper() for name, layer in layers.items() if layer.treatment == "requantized"
    }
    assert requantized == {"Q2_K", "Q3_K", "Q6_K", "IQ2_XS", "IQ2_S", "IQ1_M"}
