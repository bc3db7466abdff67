"""``export`` to GGUF: values, codes and metadata, read by the ``gguf`` package and by requant."""

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import pytest

import requant
from requant.execution.executor import Progress
from requant.gguf.config_metadata import WRITTEN
from tests.support.checkpoints import model
from tests.support.fixture_folders import fixture
from tests.support.gguf_files import llama_cpp_name, permuted, write_gguf
from tests.support.gguf_models import ALL, model_of
from tests.support.safetensors_files import read_folder

FAMILIES = [case for case, (kind, _) in ALL.items() if kind in WRITTEN and "vl" not in case]
OWN_KEYS = ("general.", "GGUF.")


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metadata, and tensors by name."""
    reader = gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    return fields, {tensor.name: tensor for tensor in reader.tensors}


def decoded(tensor: Any) -> np.ndarray:
    values: np.ndarray = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    return values


def values_of(folder: Path, into: Path) -> dict[str, np.ndarray]:
    """What the reader of the ``gguf`` package should find, in float32."""
    requant.convert(folder, into, dequantize=True, dtype="float32", layout="keep")
    config = json.loads((folder / "config.json").read_text())
    found = {}
    for name, values in read_folder(into).items():
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
        role = name.split(".")[-2]
        if config["model_type"] == "llama" and role in heads:
            values = permuted(values, config[heads[role]])
        found[llama_cpp_name(name, config)] = values
    return found


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether float32 values are equal; a block without ``m`` may have -0 for 0."""
    return a.dtype == b.dtype == np.float32 and np.array_equal(a.ravel(), b.ravel())


@pytest.mark.parametrize(
    ("name", "options", "types"),
    [
        ("micro-llama", {"bits": 4}, {"Q4_1"}),
        ("micro-llama", {"bits": 2, "group_size": 128}, {"Q4_0", "Q4_1"}),
        ("micro-llama", {"bits": 3, "group_size": 32}, {"Q4_0", "Q4_1"}),
        ("micro-llama", {"bits": 5}, {"Q5_1"}),
        ("micro-llama", {"mode": "mxfp4"}, {"MXFP4"}),
        ("micro-moe", {"bits": 4}, {"Q4_1"}),
    ],
)
def test_values(name: str, options: dict[str, Any], types: set[str], tmp_path: Path) -> None:
    """Every tensor of an MLX folder has the same float32 values, and layers keep their codes."""
    requant.convert(model(name), tmp_path / "mlx", **options)
    report = requant.export(tmp_path / "mlx", tmp_path / "m.gguf", to="gguf")
    kept = [layer for layer in report.plan.layers if layer.treatment == "kept"]
    assert {layer.exactness for layer in kept} == {"exact"} and len(kept) >= 29
    assert {layer.target for layer in kept} <= types
    expected = values_of(tmp_path / "mlx", tmp_path / "dense")
    _, tensors = read(tmp_path / "m.gguf")
    assert tensors.keys() == expected.keys()
    for key, values in expected.items():
        assert same(decoded(tensors[key]), values), key
        assert tensors[key].shape.tolist()[::-1] == list(values.shape), key
    assert sorted(tmp_path.iterdir()) == sorted(tmp_path / x for x in ("dense", "m.gguf", "mlx"))


@pytest.mark.parametrize("max_memory", [None, 84_200_000])
def test_round_trip(max_memory: int | None, tmp_path: Path) -> None:
    """``convert`` of the file gives the same codes, in groups of 32, whatever the chunks."""
    requant.convert(model("micro-llama"), tmp_path / "mlx", bits=4, dtype="float16")
    requant.export(tmp_path / "mlx", tmp_path / "m.gguf", to="gguf", max_memory=max_memory)
    requant.convert(tmp_path / "m.gguf", tmp_path / "back")
    original, found = read_folder(tmp_path / "mlx"), read_folder(tmp_path / "back")
    assert original.keys() == found.keys()
    for name, expected in original.items():
        if name.endswith((".scales", ".biases")):
            expected = np.repeat(expected, 2, axis=-1)
        assert np.array_equal(found[name], expected), name


@pytest.mark.parametrize("case", FAMILIES)
def test_families_come_back(case: str, tmp_path: Path) -> None:
    """A file of each family, as llama.cpp's converter writes it, has the same tensors and keys."""
    model_type, _ = ALL[case]
    weights, config = model_of(model_type)
    source, output = tmp_path / "in.gguf", tmp_path / "out.gguf"
    write_gguf(source, weights, config)
    requant.export(source, output, to="gguf")
    (before, tensors), (after, found) = read(source), read(output)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        wide = found[name].tensor_type.name != "BF16"
        expected = decoded(tensor)
        if not wide:
            rounded = mx.array(expected).astype(mx.bfloat16).astype(mx.float32)
            expected = np.array(rounded)
        assert same(decoded(found[name]), expected), name
        assert found[name].shape.tolist() == tensor.shape.tolist()
    for key, value in before.items():
        if not key.startswith(OWN_KEYS):
            assert after[key] == value, key
    assert after["general.architecture"] == before["general.architecture"]


BLOCKS = ("gguf-mxfp4", "gguf-q4_0", "gguf-q4_1", "gguf-q5_0", "gguf-q5_1", "gguf-q8_0")


@pytest.mark.parametrize("through_mlx", [False, True])
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_come_back(name: str, through_mlx: bool, tmp_path: Path) -> None:
    """Blocks that another program wrote are the same bytes, directly and through an MLX folder."""
    source = next((fixture(name) / "checkpoint").glob("*.gguf"))
    given: Path = source
    if through_mlx:
        given = tmp_path / "mlx"
        requant.convert(source, given)
    requant.export(given, tmp_path / "out.gguf", to="gguf")
    (_, original), (_, found) = read(source), read(tmp_path / "out.gguf")
    assert original.keys() == found.keys()
    blocks = [x for x in original.values() if x.tensor_type.name not in ("F32", "F16", "BF16")]
    assert len(blocks) >= 7
    for tensor in blocks:
        if tensor.tensor_type.name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4"):
            assert found[tensor.name].tensor_type == tensor.tensor_type, tensor.name
            assert np.array_equal(found[tensor.name].data, tensor.data), tensor.name


def test_encoded_again(tmp_path: Path) -> None:
    """8 bits with biases do not fit Q8_0: an error, then new codes and their error."""
    requant.convert(model("micro-llama"), tmp_path / "mlx", bits=8)
    with pytest.raises(requant.CheckpointError, match="its 8-bit groups have biases; Q8_0") as info:
        requant.export(tmp_path / "mlx", tmp_path / "m.gguf", to="gguf")
    assert len(info.value.problems) == 29 and not (tmp_path / "m.gguf").exists()
    report = requant.export(tmp_path / "mlx", tmp_path / "m.gguf", to="gguf", otherwise="widen")
    expected = values_of(tmp_path / "mlx", tmp_path / "dense")
    _, tensors = read(tmp_path / "m.gguf")
    names = {
        layer.layer: llama_cpp_name(f"{layer.layer}.weight", CONFIG) for layer in again(report)
    }
    assert len(names) == 29
    for layer, name in names.items():
        block = expected[name].reshape(-1, 32)
        assert np.array_equal(tensors[name].data, gguf.quants.quantize(expected[name], Q8_0))
        error = decoded(tensors[name]).reshape(-1, 32) - block
        rms = float(np.sqrt((error**2).sum() / (block**2).sum()))
        assert report.errors[layer].relative_rms == pytest.approx(rms, rel=1e-4)


Q8_0 = gguf.GGMLQuantizationType.Q8_0
CONFIG = json.loads((model("micro-llama") / "config.json").read_text())


def again(report: requant.Report) -> list[Any]:
    return [layer for layer in report.plan.layers if layer.exactness == "re-encoded"]


def test_dense(tmp_path: Path) -> None:
    """--otherwise dense decodes to the dtype of the model; a dense folder is written as it is."""
    requant.convert(model("micro-llama"), tmp_path / "mlx", mode="mxfp8")
    requant.export(tmp_path / "mlx", tmp_path / "a.gguf", to="gguf", otherwise="dense")
    requant.export(model("micro-llama"), tmp_path / "b.gguf", to="gguf")
    expected = [
        values_of(x, tmp_path / f"d{x.name}") for x in (tmp_path / "mlx", model("micro-llama"))
    ]
    for name, values in zip("ab", expected, strict=True):
        _, tensors = read(tmp_path / f"{name}.gguf")
        assert {x.tensor_type.name for x in tensors.values()} == {"BF16", "F32"}
        for key, found in tensors.items():
            wide = mx.array(values[key]).astype(mx.bfloat16).astype(mx.float32)
            assert same(decoded(found), np.array(wide)), key


# -- what a file cannot say ------------------------------------------------------------------------


def changed(tmp_path: Path, file: str, **changes: Any) -> Path:
    """micro-llama with other settings; None removes one."""
    folder = tmp_path / "changed"
    shutil.copytree(model("micro-llama"), folder)
    settings = json.loads((folder / file).read_text())
    for key, value in changes.items():
        settings[key] = value
    kept = {key: value for key, value in settings.items() if value is not None}
    (folder / file).write_text(json.dumps(kept))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "model_type: is 'mamba', of which no GGUF file is written"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "is 'dynamic'; GGUF files say"),
        ({"num_attention_heads": 3}, r"\[128, 128\] is not a multiple of twice 3 heads"),
        ({"attention_bias": True}, "attention_bias: is true, where files of this architecture"),
        ({"model_type": "mistral", "sliding_window": 64}, "sliding_window: is 64, and llama.cpp"),
        ({"vocab_size": 600}, "vocab_size: is 600, where files of this architecture mean 512"),
    ],
)
def test_settings_without_a_key(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    """A config that does not come back from the metadata is an error."""
    with pytest.raises(requant.CheckpointError, match=message):
        requant.export(changed(tmp_path, "config.json", **changes), tmp_path / "m.gguf", to="gguf")
    assert not (tmp_path / "m.gguf").exists()


LLAMA_3 = {
    **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 8192,
}
YARN = {
    **{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256},
    **{"beta_fast": 32.0, "beta_slow": 1.0},
}


@pytest.mark.parametrize("scaling", [LLAMA_3, YARN, {"rope_type": "linear", "factor": 2.0}])
def test_scaled_positions(scaling: dict[str, Any], tmp_path: Path) -> None:
    """``rope_scaling`` comes back from the keys, or from the tensor of factors."""
    source = changed(
        tmp_path, "config.json", rope_scaling=scaling, rope_parameters=None, rope_theta=5e5
    )
    requant.export(source, tmp_path / "m.gguf", to="gguf")
    requant.convert(tmp_path / "m.gguf", tmp_path / "back")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["rope_theta"] == 5e5
    assert {key: config["rope_scaling"][key] for key in scaling} == scaling
    _, tensors = read(tmp_path / "m.gguf")
    assert ("rope_freqs.weight" in tensors) == (scaling is LLAMA_3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"type": "Unigram"}}, "is of kind 'Unigram', known is BPE"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "splits words by 'Whitespace'"),
        ({"normalizer": {"type": "NFKC"}}, "normalizes texts by 'NFKC', known is NFC"),
        ({"added_tokens": [{"id": 600, "content": "x"}]}, "has token 600, but the embeddings have"),
        (
            {
                "pre_tokenizer": {
                    "type": "Sequence",
                    "pretokenizers": [
                        {"type": "Split", "pattern": {"Regex": "a+"}, "behavior": "Isolated"},
                        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
                    ],
                }
            },
            "no known name in tokenizer.ggml.pre: ",
        ),
    ],
)
def test_tokenizers_without_a_name(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    """A tokenizer that the keys cannot describe is an error."""
    with pytest.raises(requant.CheckpointError, match=f"tokenizer.json: .*{message}"):
        source = changed(tmp_path, "tokenizer.json", **changes)
        requant.export(source, tmp_path / "m.gguf", to="gguf")


def test_output_is_a_file(tmp_path: Path) -> None:
    """An existing file is replaced on request only, and nothing but a GGUF file is."""
    output, other = tmp_path / "m.gguf", tmp_path / "other.gguf"
    requant.export(model("micro-llama"), output, to="gguf")
    before = output.read_bytes()
    with pytest.raises(requant.OutputError, match=r"m.gguf exists; --force replaces it"):
        requant.export(model("micro-llama"), output, to="gguf")
    requant.export(model("micro-llama"), output, to="gguf", force=True)
    assert output.read_bytes() == before
    other.write_text("kept")
    with pytest.raises(requant.OutputError, match="is not a GGUF file, which --force"):
        requant.export(model("micro-llama"), other, to="gguf", force=True)
    assert other.read_text() == "kept"
    with pytest.raises(requant.UsageError, match=r"folder: .*name a file that ends in \.gguf"):
        requant.export(model("micro-llama"), tmp_path / "folder", to="gguf")


# -- other sources ---------------------------------------------------------------------------------

SOURCES = {  # fixture -> the types of its layers, and whether their values are exact
    "gptq-b4-g128-sym-v1": ("Q4_0", "exact"),
    "gptq-b8-g64-sym-v1": ("Q8_0", "exact"),
    "ct-pack-int4-sym-g128": ("Q4_0", "exact"),
    "ct-mxfp4-pack": ("MXFP4", "exact"),
    "awq-gemm-g64-bias": ("Q4_1", "rounded"),
    "gptq-b3-g64-asym-v2": ("Q4_0", "exact"),
}


@pytest.mark.parametrize("name", SOURCES)
def test_other_sources(name: str, tmp_path: Path) -> None:
    """Codes of other tools move into blocks, with rows of q and k in llama.cpp's order."""
    kind, exactness = SOURCES[name]
    source = fixture(name) / "checkpoint"
    report = requant.export(source, tmp_path / "m.gguf", to="gguf")
    kept = [layer for layer in report.plan.layers if layer.treatment == "kept"]
    assert len(kept) >= 7
    assert {layer.target for layer in kept} == {kind}
    assert {layer.exactness for layer in kept} == {exactness}
    given = source
    if exactness == "rounded":  # as MLX's biases are in the same dtype
        given = tmp_path / "mlx"
        requant.convert(source, given, dtype="float16", layout="keep")
    expected = values_of(given, tmp_path / "dense")
    _, tensors = read(tmp_path / "m.gguf")
    config = json.loads((source / "config.json").read_text())
    for layer in kept:
        key = llama_cpp_name(f"{layer.layer}.weight", config)
        assert same(decoded(tensors[key]), expected[key]), key


def test_damaged_scales(tmp_path: Path) -> None:
    """A scale that is not a number is named, and nothing is written."""
    requant.convert(model("micro-llama"), tmp_path / "mlx", bits=4)
    weights = mx.load(str(tmp_path / "mlx" / "model.safetensors"))
    weights["model.layers.1.mlp.up_proj.scales"][3, 1] = float("nan")
    mx.save_safetensors(str(tmp_path / "mlx" / "model.safetensors"), weights, {"format": "mlx"})
    with pytest.raises(requant.CheckpointError, match=r"layers.1.mlp.up_proj: 1 scale or bias is"):
        requant.export(tmp_path / "mlx", tmp_path / "m.gguf", to="gguf", otherwise="widen")
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.parametrize("scale", [2.0**-30, 2.0**17])
def test_scales_beyond_float16(scale: float, tmp_path: Path) -> None:
    """Scales that float16 does not hold are an error; decoded, the values are the same."""
    requant.convert(model("micro-llama"), tmp_path / "mlx", bits=4)
    weights = mx.load(str(tmp_path / "mlx" / "model.safetensors"))
    path = "model.layers.1.mlp.up_proj"
    for role in ("scales", "biases"):
        ones = mx.ones_like(weights[f"{path}.scales"])
        weights[f"{path}.{role}"] = ones * scale * (1 if role == "scales" else -3)
    mx.save_safetensors(str(tmp_path / "mlx" / "model.safetensors"), weights, {"format": "mlx"})
    with pytest.raises(requant.CheckpointError, match="scales or biases beyond float16"):
        requant.export(tmp_path / "mlx", tmp_path / "m.gguf", to="gguf")
    report = requant.export(tmp_path / "mlx", tmp_path / "m.gguf", to="gguf", otherwise="dense")
    expected = values_of(tmp_path / "mlx", tmp_path / "dense")
    _, tensors = read(tmp_path / "m.gguf")
    assert same(decoded(tensors["blk.1.ffn_up.weight"]), expected["blk.1.ffn_up.weight"])
    dense = [x.layer for x in report.plan.layers if x.treatment == "dequantized"]
    assert dense == [path]


def test_a_stopped_export_resumes(tmp_path: Path) -> None:
    """The same bytes as without a stop, and nothing under the output's name before the end."""
    source = model("micro-llama")
    small: dict[str, Any] = {"to": "gguf", "max_memory": 84_200_000, "threads": 1}
    requant.export(source, tmp_path / "whole.gguf", **small)

    def stop(progress: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        requant.export(source, tmp_path / "m.gguf", **small, progress=stop)
    assert not (tmp_path / "m.gguf").exists()
    requant.export(source, tmp_path / "m.gguf", **small)
    assert (tmp_path / "m.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf", "whole.gguf"]
