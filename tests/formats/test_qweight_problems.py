"""Broken AWQ, GPTQ and AutoRound folders: every fault is named, and nothing is written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import requant
from tests.support.fixture_folders import fixture
from tests.support.plan_texts import note_texts
from tests.support.safetensors_files import read_file, write_file

Tensors = dict[str, np.ndarray]
Edit = Callable[[Tensors, dict[str, Any]], None]
DOWN = "model.layers.0.mlp.down_proj"
Q = "model.layers.1.self_attn.q_proj"


def broken(tmp_path: Path, name: str, edit: Edit) -> Path:
    """A fixture with its tensors and quantization block edited."""
    source = fixture(name) / "checkpoint"
    folder = tmp_path / "source"
    shutil.copytree(source, folder)
    for file in ("quantize_config.json", "quantization_config.json"):
        (folder / file).unlink(missing_ok=True)
    tensors = read_file(source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    edit(tensors, config["quantization_config"])
    write_file(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def rejected(tmp_path: Path, name: str, edit: Edit, *words: str) -> None:
    """Both plan and convert say what is wrong and where; there is no output."""
    folder = broken(tmp_path, name, edit)
    with pytest.raises(requant.RequantError) as caught:
        requant.convert(folder, tmp_path / "out", layout="keep")
    message = str(caught.value)
    for word in words:
        assert word in message, message
    assert not (tmp_path / "out").exists()
    assert list(tmp_path.iterdir()) == [folder]


def drop(name: str) -> Edit:
    def edit(tensors: Tensors, _: dict[str, Any]) -> None:
        del tensors[name]

    return edit


def put(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Edit:
    def edit(tensors: Tensors, _: dict[str, Any]) -> None:
        tensors[name] = change(tensors[name])

    return edit


def add(name: str, array: np.ndarray) -> Edit:
    def edit(tensors: Tensors, _: dict[str, Any]) -> None:
        tensors[name] = array

    return edit


def say(**fields: Any) -> Edit:
    return lambda _, block: block.update(fields)


def shuffled(g_idx: np.ndarray) -> np.ndarray:
    """One input moved into a group that is full."""
    changed = g_idx.copy()
    changed[0] = changed[-1]
    return changed


AWQ, GPTQ = "awq-gemm-g64-skip", "gptq-b4-g64-sym-v2"
FAULTS = {
    "missing zeros": (AWQ, drop(f"{DOWN}.qzeros"), (DOWN, "no qzeros")),
    "missing scales": (AWQ, drop(f"{DOWN}.scales"), (DOWN, "no scales")),
    "missing codes": (AWQ, drop(f"{DOWN}.qweight"), (f"{DOWN}.qzeros", "no", "qweight")),
    "scales of another shape": (
        AWQ,
        put(f"{DOWN}.scales", lambda a: np.concatenate([a, a])),
        (DOWN, "6 groups", "192 inputs", "group_size 64"),
    ),
    "zeros of another shape": (
        AWQ,
        put(f"{DOWN}.qzeros", lambda a: a[:2].copy()),
        (f"{DOWN}.qzeros", "I32 [2, 8]", "I32 [3, 8]"),
    ),
    "floats where words are due": (
        AWQ,
        put(f"{DOWN}.qweight", lambda a: a.astype(np.float32)),
        (f"{DOWN}.qweight", "F32 [192, 8]", "I32"),
    ),
    "words where floats are due": (
        GPTQ,
        put(f"{DOWN}.scales", lambda a: a.astype(np.int32)),
        (f"{DOWN}.scales", "I32", "floats"),
    ),
    "an unknown version": (AWQ, say(version="exllama"), ("version", "'exllama'", "gemm")),
    "a group size that is not a number": (GPTQ, say(group_size="64"), ("group_size", "'64'")),
    "no zeros that give the bits, and 0 in the config": (
        GPTQ,
        lambda tensors, block: (
            [tensors.pop(n) for n in list(tensors) if n.endswith((".qzeros", ".g_idx"))],
            block.update({"bits": 0}),
        )[-1],
        (f"{DOWN}: has no qzeros that give its width", "says 0 bits; GPTQ writes 2 to 8"),
    ),
    "bits that are not a number": (GPTQ, say(bits=[4]), ("bits", "[4]")),
    "an unknown checkpoint_format": (
        GPTQ,
        say(checkpoint_format="bitblas", format="bitblas"),
        ("checkpoint_format", "'bitblas'", "gptq_v2"),
    ),
    "v2 zeros called v1": (
        GPTQ,
        say(checkpoint_format="gptq", format="gptq", meta={}),
        ("symmetric", "every zero is 8", "its zeros are 9;"),
    ),
    "g_idx out of range": (
        GPTQ,
        put(f"{DOWN}.g_idx", lambda a: np.where(a == 2, 3, a).astype(np.int32)),
        (f"{DOWN}.g_idx", "group 3", "3 groups"),
    ),
    "g_idx with groups of other sizes": (
        "gptq-b4-g64-actorder-v1",
        put(f"{DOWN}.g_idx", shuffled),
        (f"{DOWN}.g_idx", "inputs into group", "expected 64"),
    ),
    "g_idx of another length": (
        GPTQ,
        put(f"{DOWN}.g_idx", lambda a: a[:100].copy()),
        (DOWN, "100"),
    ),
    "two formats in one folder": (
        GPTQ,
        add(f"{Q}.weight_packed", np.zeros((64, 8), np.int32)),
        (f"{Q}.weight_packed", f"is next to {Q}.qweight", "stale"),
    ),
    "a stale weight": (
        GPTQ,
        add(f"{Q}.weight", np.zeros((64, 64), np.float16)),
        (f"{Q}.weight", "next to", "stale"),
    ),
    "an activation scale": (
        AWQ,
        add("model.layers.0.mlp.act.scales", np.ones(192, np.float16)),
        ("mlp.act.scales", "activation"),
    ),
    "an adapter": (
        GPTQ,
        add(f"{Q}.lora_A", np.zeros((8, 64), np.float16)),
        (f"{Q}.lora_A", "merge"),
    ),
    "an online rotation": (GPTQ, say(rotation="hadamard"), ("rotation", "Hadamard")),
    "a pattern that is none": (GPTQ, say(dynamic={"+:(": {"bits": 8}}), ("dynamic", "'+:('")),
    "codes with three axes": (
        GPTQ,
        put(f"{DOWN}.qweight", lambda a: a[None].copy()),
        (f"{DOWN}.qzeros", f"expected 1 expert on its first axis, as {DOWN}.qweight"),
    ),
    "codes of another tool": (AWQ, put(f"{DOWN}.qweight", lambda a: a[:, :5].copy()), (DOWN,)),
    "an unknown packing": (
        "auto-round-native-w4g64",
        say(packing_format="auto_round:exllamav3"),
        ("packing_format", "exllamav3"),
    ),
}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_fault(fault: str, tmp_path: Path) -> None:
    name, edit, words = FAULTS[fault]
    rejected(tmp_path, name, edit, *words)


# What the config says wrongly, and shapes (and symmetric zeros) tell.
CONTRADICTED = {
    "another version than the tensors": (
        AWQ,
        say(version="gemv"),
        (DOWN, "laid out as gemm", "version", "gemv"),
    ),
    "GPTQ tensors called AWQ": (
        GPTQ,
        say(quant_method="awq", version="gemm", checkpoint_format="gemm", format="gemm"),
        (DOWN, "laid out as gptq", "gemm"),
    ),
    "contradicting bits": (GPTQ, say(bits=8), (DOWN, "4-bit", "8")),
    "contradicting group": (GPTQ, say(group_size=32), (DOWN, "3 groups", "group_size 32")),
    "an impossible group size": (GPTQ, say(group_size=0), ("group_size", "0")),
    "a rule that contradicts the tensors": (
        GPTQ,
        say(dynamic={r"+:.*down_proj": {"bits": 8}}),
        (DOWN, "4-bit", "dynamic", "8"),
    ),
}


@pytest.mark.parametrize("name", list(CONTRADICTED))
def test_the_tensors_are_believed(name: str, tmp_path: Path) -> None:
    """The same output as from the config that is right, and a note with what is wrong."""
    fixed, edit, words = CONTRADICTED[name]
    report = requant.convert(broken(tmp_path, fixed, edit), tmp_path / "out", layout="keep")
    requant.convert(fixture(fixed) / "checkpoint", tmp_path / "plain", layout="keep")
    files = [tmp_path / output / "model.safetensors" for output in ("out", "plain")]
    assert files[0].read_bytes() == files[1].read_bytes()
    notes = [note for note in note_texts(report.plan.notes) if "are believed" in note]
    assert all(any(word in note for note in notes) for word in words), notes


def test_all_faults_in_one_run(tmp_path: Path) -> None:
    def edit(tensors: Tensors, block: dict[str, Any]) -> None:
        del tensors[f"{DOWN}.qzeros"]
        tensors[f"{Q}.weight"] = np.zeros((64, 64), np.float16)
        del tensors["model.layers.1.mlp.up_proj.scales"]

    rejected(tmp_path, AWQ, edit, f"{DOWN}: ", f"{Q}.weight", "model.layers.1.mlp.up_proj")


def test_settings_under_other_names(tmp_path: Path) -> None:
    """llm-awq's and older AutoGPTQ's keys, and a side file instead of config.json."""
    source = fixture(AWQ) / "checkpoint"
    folder = tmp_path / "source"
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    side = {"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"}
    (folder / "quant_config.json").write_text(json.dumps(side))
    requant.convert(folder, tmp_path / "out", layout="keep")
    requant.convert(source, tmp_path / "plain", layout="keep")
    files = [tmp_path / name / "model.safetensors" for name in ("out", "plain")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert not (tmp_path / "out" / "quant_config.json").exists()
