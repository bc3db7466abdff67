"""Tensors that files fuse, and scales of whole tensors."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import requant
from requant.errors import CheckpointError
from tests.support.gguf_files import ARCHITECTURES, write_gguf
from tests.support.gguf_models import ALL, TOKENS, output_of, sharp, tiny, values, weights_of
from tests.support.plan_texts import note_texts
from tests.support.safetensors_files import read_folder

pytestmark = pytest.mark.sweep(2)

QuantizationType = gguf.GGMLQuantizationType
Tensors = dict[str, tuple[np.ndarray, QuantizationType]]


def tensors_of(path: Path) -> Tensors:
    reader = gguf.GGUFReader(path)
    return {t.name: (np.array(t.data), t.tensor_type) for t in reader.tensors}


def rewrite(path: Path, target: Path, tensors: Tensors) -> None:
    """The same metadata over other tensors."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for key, found in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            sub = found.types[1] if len(found.types) > 1 else None
            writer.add_key_value(key, found.contents(), found.types[0], sub)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def fuse(tensors: Tensors, into: str, roles: list[str], axis: int = -2) -> Tensors:
    """Tensors of every block joined along their rows, as the converter's options do."""
    found = dict(tensors)
    for block in range(8):
        for suffix, rows in (("weight", axis), ("bias", -1)):
            names = [f"blk.{block}.{role}.{suffix}" for role in roles]
            if all(name in found for name in names):
                parts = [found.pop(name) for name in names]
                joined = np.concatenate([data for data, _ in parts], axis=rows)
                found[f"blk.{block}.{into}.{suffix}"] = (joined, parts[0][1])
    return found


GATE_UP = ("ffn_gate_up_exps", ["ffn_gate_exps", "ffn_up_exps"])
QKV = ("attn_qkv", ["attn_q", "attn_k", "attn_v"])
EXPERTS = ("llama/mixtral", "qwen2moe", "qwen3moe", "gpt-oss", "qwen3vlmoe")
FUSED = [(case, GATE_UP) for case in EXPERTS]
FUSED += [(case, QKV) for case in ALL if case != "phi3"]  # whose own are fused


def written(case: str, path: Path, kind: str) -> tuple[Any, dict[str, Any]]:
    model_type, architecture = ALL[case]
    changes = {} if model_type in ("llama", "qwen2") else {"tie_word_embeddings": False}
    made, config = sharp(model_type, **changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ARCHITECTURES, model_type, architecture)
        write_gguf(path, weights_of(made), config, kind)
    return made, config


# Floats and blocks for every architecture, of two kinds each in turn.
KINDS = (("F32", "Q8_0"), ("BF16", "Q4_0"))


@pytest.mark.parametrize(
    ("case", "fused", "kind"),
    [(*each, kind) for number, each in enumerate(FUSED) for kind in KINDS[number % 2]],
)
def test_fused_tensors_are_those_that_they_are_fused_of(
    case: str, fused: tuple[str, list[str]], kind: str, tmp_path: Path
) -> None:
    """Every byte of the output is what it is from the file that has them apart."""
    written(case, tmp_path / "apart.gguf", kind)
    separate = tensors_of(tmp_path / "apart.gguf")
    tensors = fuse(separate, *fused)
    assert len(tensors) < len(separate)
    rewrite(tmp_path / "apart.gguf", tmp_path / "fused.gguf", tensors)
    for name in ("apart", "fused"):
        report = requant.convert(
            tmp_path / f"{name}.gguf", tmp_path / name, bits=8 if kind == "BF16" else None
        )
        assert not any(
            "no name" in note or "no place" in note for note in note_texts(report.plan.notes)
        )
    one, other = read_folder(tmp_path / "apart"), read_folder(tmp_path / "fused")
    assert one.keys() == other.keys()
    assert [name for name in one if one[name].tobytes() != other[name].tobytes()] == []
    configs = [(tmp_path / name / "config.json").read_text() for name in ("apart", "fused")]
    assert configs[0] == configs[1]
    assert requant.verify(tmp_path / "fused.gguf", tmp_path / "fused").ok


@pytest.mark.parametrize(("case", "fused"), [("qwen3moe", GATE_UP), ("llama", QKV)])
def test_logits_of_fused_tensors(case: str, fused: tuple[str, list[str]], tmp_path: Path) -> None:
    made, _ = written(case, tmp_path / "apart.gguf", "F32")
    tensors = fuse(tensors_of(tmp_path / "apart.gguf"), *fused)
    rewrite(tmp_path / "apart.gguf", tmp_path / "m.gguf", tensors)
    requant.convert(tmp_path / "m.gguf", tmp_path / "out", dequantize=True, dtype="float32")
    expected = np.array(made(TOKENS))
    room = 1e-4 * np.abs(expected).max()
    np.testing.assert_allclose(output_of(tmp_path / "out"), expected, atol=room)


@pytest.mark.parametrize("name", ["attn_qkv", "ffn_gate_up_exps"])
def test_rows_that_do_not_sum(name: str, tmp_path: Path) -> None:
    written("qwen3moe", tmp_path / "apart.gguf", "F32")
    tensors = fuse(tensors_of(tmp_path / "apart.gguf"), *(QKV if "qkv" in name else GATE_UP))
    found, kind = tensors[f"blk.0.{name}.weight"]
    tensors[f"blk.0.{name}.weight"] = (np.ascontiguousarray(found[..., :-1, :]), kind)
    rewrite(tmp_path / "apart.gguf", tmp_path / "m.gguf", tensors)
    with pytest.raises(
        CheckpointError, match=rf"blk\.0\.{name}\.weight: F32 .*, expected \d+ rows"
    ):
        requant.plan(tmp_path / "m.gguf")


def test_experts_fused_and_apart_at_once(tmp_path: Path) -> None:
    written("qwen3moe", tmp_path / "apart.gguf", "F32")
    separate = tensors_of(tmp_path / "apart.gguf")
    rewrite(tmp_path / "apart.gguf", tmp_path / "m.gguf", fuse(separate, *GATE_UP) | separate)
    with pytest.raises(CheckpointError, match=r"would be named .*gate_proj"):
        requant.plan(tmp_path / "m.gguf")


# -- scales of whole tensors -----------------------------------------------------------------
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("role", ["attn_q", "attn_v", "ffn_down"])
def test_scales_are_multiplied_in(role: str, kind: str, tmp_path: Path) -> None:
    """llama.cpp multiplies what a matrix gives by X.scale, whatever its type."""
    written("llama", tmp_path / "plain.gguf", kind)
    tensors = tensors_of(tmp_path / "plain.gguf")
    scale = np.array([0.75], np.float32)
    tensors[f"blk.1.{role}.scale"] = (scale, QuantizationType.F32)
    tensors[f"blk.1.{role}.input_scale"] = (np.array([0.5], np.float32), QuantizationType.F32)
    rewrite(tmp_path / "plain.gguf", tmp_path / "m.gguf", tensors)
    for name in ("plain", "m"):
        out = tmp_path / name
        requant.convert(tmp_path / f"{name}.gguf", out, dequantize=True, dtype="float32")
    plain, found = read_folder(tmp_path / "plain"), read_folder(tmp_path / "m")
    assert found.keys() == plain.keys()
    changed = [name for name in plain if not np.array_equal(plain[name], found[name])]
    path = {"attn_q": "self_attn.q_proj", "attn_v": "self_attn.v_proj", "ffn_down": "mlp.down_proj"}
    assert changed == [f"model.layers.1.{path[role]}.weight"]
    assert np.array_equal(found[changed[0]], plain[changed[0]] * scale)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_scales_of_experts(kind: str, count: int, fused: bool, tmp_path: Path) -> None:
    """One for all, or one for each; of fused experts both halves have them."""
    written("qwen3moe", tmp_path / "plain.gguf", kind)
    tensors = tensors_of(tmp_path / "plain.gguf")
    if fused:
        tensors = fuse(tensors, *GATE_UP)
    scales = np.linspace(0.5, 2, count, dtype=np.float32)
    name = "ffn_gate_up_exps" if fused else "ffn_up_exps"
    tensors[f"blk.0.{name}.scale"] = (scales, QuantizationType.F32)
    rewrite(tmp_path / "plain.gguf", tmp_path / "m.gguf", tensors)
    for stem in ("plain", "m"):
        source = tmp_path / f"{stem}.gguf"
        requant.convert(source, tmp_path / stem, dequantize=True, dtype="float32")
    plain, found = read_folder(tmp_path / "plain"), read_folder(tmp_path / "m")
    changed = sorted(name for name in plain if not np.array_equal(plain[name], found[name]))
    path = "model.layers.0.mlp.switch_mlp"
    assert changed == [f"{path}.{p}_proj.weight" for p in (["gate", "up"] if fused else ["up"])]
    for name in changed:
        assert np.array_equal(found[name], plain[name] * scales[:, None, None])


def test_scales_of_nvfp4_under_known_names(tmp_path: Path) -> None:
    """Names change, and the scale goes with its matrix."""
    made, config = tiny("llama")
    write_gguf(tmp_path / "dense.gguf", values(made), config)
    tensors = tensors_of(tmp_path / "dense.gguf")
    rng = np.random.default_rng(3)
    blocks = rng.integers(0, 256, (128, 2 * 36), dtype=np.uint8)
    blocks.reshape(128, 2, 36)[:, :, :4] = rng.integers(0x20, 0x50, (128, 2, 4))
    tensors["blk.0.ffn_gate.weight"] = (blocks, QuantizationType.NVFP4)
    tensors["blk.0.ffn_gate.scale"] = (np.array([0.25], np.float32), QuantizationType.F32)
    rewrite(tmp_path / "dense.gguf", tmp_path / "m.gguf", tensors)
    requant.convert(tmp_path / "m.gguf", tmp_path / "out", dequantize=True, dtype="float32")
    found = read_folder(tmp_path / "out")["model.layers.0.mlp.gate_proj.weight"]
    wanted = gguf.dequantize(blocks, QuantizationType.NVFP4) * np.float32(0.25)
    assert np.array_equal(found, wanted)


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("blk.0.attn_output.scale", np.ones(3, np.float32), "expected F32 with one number"),
        ("blk.7.attn_q.scale", np.ones(1, np.float32), "is a scale, but 'blk.7.attn_q.weight'"),
        ("blk.0.attn_norm.scale", np.full(1, 2, np.float32), None),
    ],
)
def test_scales_that_scale_nothing(name: str, data: np.ndarray, words: str | None, tmp_path: Path):
    written("gemma", tmp_path / "plain.gguf", "F32")
    tensors = tensors_of(tmp_path / "plain.gguf") | {name: (data, QuantizationType.F32)}
    rewrite(tmp_path / "plain.gguf", tmp_path / "m.gguf", tensors)
    with pytest.raises(CheckpointError, match=words or "such a scale is not known"):
        requant.plan(tmp_path / "m.gguf")
