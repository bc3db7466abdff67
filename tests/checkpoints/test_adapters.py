"""Adapters: a folder of one, one next to a model, one inside a model; each with its way out."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import requant
from requant.checkpoints.adapters import problems_in
from requant.errors import CheckpointError
from requant.sources.open import read_checkpoint
from tests.support.checkpoints import write_folder
from tests.support.hub_commands import Call
from tests.support.hub_server import Hub, serving
from tests.support.number_formats import bf16
from tests.support.safetensors_files import write_file

MICRO = Path(__file__).parents[2] / "examples" / "micro-llama"
LAYER = "model.layers.0.self_attn.q_proj"
WEIGHT = ("BF16", [2, 3])
PEFT = f"base_model.model.{LAYER}"


def peft(part: str) -> dict[str, Any]:
    return {"adapter_model.safetensors": {f"{PEFT}.{part}": WEIGHT}}


# What a folder without a model holds -> words of the message.
ONLY: dict[str, tuple[dict[str, Any], dict[str, Any] | None, str]] = {
    "LoRA of PEFT": (
        peft("lora_A.weight"),
        {"peft_type": "LORA", "base_model_name_or_path": "org/base"},
        "holds a LoRA adapter of PEFT for 'org/base'",
    ),
    "DoRA of PEFT": (
        peft("lora_magnitude_vector"),
        {"peft_type": "LORA", "use_dora": True},
        "holds a DoRA adapter of PEFT",
    ),
    "IA3 of PEFT": (peft("ia3_l"), {"peft_type": "IA3"}, "holds a IA3 adapter of PEFT"),
    "a pickle of PEFT": (
        {"adapter_model.bin": b"x"},
        {"peft_type": "LORA"},
        "holds a LoRA adapter of PEFT",
    ),
    "prompts of PEFT": (
        {"adapter_model.safetensors": {"prompt_embeddings": WEIGHT}},
        {"peft_type": "PROMPT_TUNING"},
        "cannot be merged",
    ),
    "mlx-lm": (
        {"adapters.safetensors": {f"{LAYER}.lora_a": WEIGHT}},
        {"fine_tune_type": "lora", "num_layers": 2, "model": "org/base"},
        "mlx_lm.fuse --model org/base --adapter-path ",
    ),
    "mlx-lm, while it trains": (
        {"0000100_adapters.safetensors": {f"{LAYER}.lora_a": WEIGHT}},
        {"fine_tune_type": "dora"},
        "holds a DoRA adapter of mlx-lm",
    ),
    "mlx-lm, whole layers": (
        {"adapters.safetensors": {f"{LAYER}.weight": WEIGHT}},
        {"fine_tune_type": "full"},
        "holds fine-tuned layers as an adapter of mlx-lm",
    ),
    "only its config came": ({}, {"peft_type": "LORA"}, "holds a LoRA adapter of PEFT"),
    "no config": (peft("lora_A.weight"), None, "holds an adapter (LoRA or a relative)"),
    "kohya": (
        {
            "style.safetensors": {
                "lora_unet_up.lora_down.weight": WEIGHT,
                "lora_unet_up.lora_up.weight": WEIGHT,
                "lora_unet_up.alpha": ("F32", []),
            }
        },
        None,
        "holds an adapter (LoRA or a relative)",
    ),
    "LyCORIS": (
        {"x.safetensors": {"up.hada_w1_a": WEIGHT, "up.hada_w2_b": WEIGHT, "up.alpha": WEIGHT}},
        None,
        "holds an adapter (LoRA or a relative)",
    ),
}


def only_problem(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(folder)
    (problem,) = caught.value.problems
    return str(problem)


@pytest.mark.parametrize("with_config", [False, True])
@pytest.mark.parametrize("case", ONLY)
def test_a_folder_with_an_adapter_is_said_to_be_one(tmp_path: Path, case: str, with_config: bool):
    files, described, words = ONLY[case]
    folder = write_folder(tmp_path, files, config={"model_type": "llama"} if with_config else None)
    if described is not None:
        (folder / "adapter_config.json").write_text(json.dumps(described))
    problem = only_problem(folder)
    assert problem.startswith(f"{folder}: ")
    assert words in problem
    with pytest.raises(CheckpointError, match="adapter"):
        requant.inspect(folder)


# Parts of names that only adapters have, of every tool: one of each.
PARTS = [
    "lora_A",
    "lora_a",
    "lora_B.weight",
    "lora_E",
    "lora_embedding_A",
    "lora_magnitude_vector",
    "lora_down.weight",
    "lora_up",
    "lora_mid",
    "lora_bias",
    "base_layer.weight",
    "base_layer.qweight",
    "modules_to_save.default",
    "original_module",
    "dora_scale",
    "hada_w1",
    "hada_w2_a",
    "hada_t1",
    "lokr_w1",
    "lokr_w2_b",
    "lokr_t2",
    "oft_r",
    "oft_R",
    "oft_blocks",
    "oft_diag",
    "boft_R",
    "boft_s",
    "ia3_l",
    "vera_lambda_b",
    "vera_lambda_d",
    "vblora_logits_A",
    "fourierft_spectrum",
    "hra_u",
    "randlora_lambda",
    "trainable_tokens_delta",
]


@pytest.mark.parametrize("part", PARTS)
def test_every_part_of_an_adapter_is_found_inside_a_model(part: str) -> None:
    names = ["model.norm.weight", f"{LAYER}.{part}", f"{LAYER}.bias"]
    (problem,) = problems_in(names)
    assert problem.where == f"{LAYER}.{part}"
    assert part.partition(".")[0] in problem.message


@pytest.mark.parametrize(
    "name", ["soft_oft_rows.weight", "oft_rows.weight", f"{LAYER}.base_layer.alpha", "lora.weight"]
)
def test_names_that_resemble_those_of_adapters_are_a_models_own(name: str) -> None:
    assert problems_in(["model.norm.weight", name]) == []


# -- next to a model ------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "adapters.safetensors", "adapter_model.bin"]
)
@pytest.mark.parametrize("index", [False, True])
def test_an_adapter_next_to_a_model(tmp_path: Path, name: str, index: bool) -> None:
    weight_map = {"a.weight": "model.safetensors"} if index else None
    files = {"model.safetensors": {"a.weight": WEIGHT}, name: {"a.lora_A.weight": WEIGHT}}
    folder = write_folder(tmp_path, files, weight_map=weight_map)
    (folder / "adapter_config.json").write_text("{}")
    problem = only_problem(folder)
    assert problem.startswith(f"{name}: is an adapter (LoRA or a relative) next to a whole model")
    moved = re.search(r"without it, move (.*) out of the folder", problem)
    assert moved is not None
    for file in moved[1].split(", "):  # as the message says
        (folder / file).unlink()
    assert list(read_checkpoint(folder).tensors) == ["a.weight"]


def test_the_config_of_an_adapter_that_was_merged_is_left_out(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, {"model.safetensors": {"a.weight": WEIGHT}})
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    checkpoint = read_checkpoint(folder)
    assert checkpoint.left_out == (
        ("adapter_config.json", "describes an adapter, which is not here"),
    )


# -- inside a model --------------------------------------------------------------------------
INSIDE = [
    "lora_A.weight",
    "lora_B.default.weight",
    "lora_a",
    "lora_magnitude_vector.default.weight",
    "lora_embedding_A.default",
    "base_layer.weight",
    "base_layer.qweight",
    "modules_to_save.default.weight",
    "original_module.weight",
    "ia3_l.default",
    "lora_down.weight",
    "hada_w1_a",
    "lokr_w2",
    "oft_r.default",
    "boft_R.default",
    "vera_lambda_b.default",
    "dora_scale",
]


@pytest.mark.parametrize("suffix", INSIDE)
def test_a_model_that_was_not_merged_is_rejected_by_name(tmp_path: Path, suffix: str) -> None:
    tensors = {"model.norm.weight": WEIGHT, f"{LAYER}.weight": WEIGHT, f"{LAYER}.{suffix}": WEIGHT}
    problem = only_problem(write_folder(tmp_path, {"model.safetensors": tensors}))
    assert problem.startswith(f"{LAYER}.{suffix}: is a tensor of an adapter that was not merged")
    assert "merge_and_unload" in problem and "mlx_lm.fuse" in problem


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.attn.w_lora.lora.0.weight",  # RWKV
        "model.layers.0.self_attn.kv_a_proj_with_mqa.weight",
        "model.layers.0.shared_transformer.linear_q_adapter_list.0.0.weight",  # Zamba 2
        "base_layer.0.weight",  # convolutional networks
        "visual.merger.base_layers.weight",
    ],
)
def test_names_of_models_are_not_adapters(tmp_path: Path, name: str) -> None:
    folder = write_folder(tmp_path, {"model.safetensors": {name: WEIGHT, "x.weight": WEIGHT}})
    assert name in read_checkpoint(folder).tensors


# -- the ways out are followed ----------------------------------------------------------------
def run(line: str, folder: Path, path: Path | None = None) -> None:
    """What a message says to type, in a shell; ``python`` is this one."""
    bin_folder = folder / "bin"
    bin_folder.mkdir(exist_ok=True)
    for name, words in {
        "python": f'exec {shlex.quote(sys.executable)} "$@"',
        "mlx_lm.fuse": f'exec {shlex.quote(sys.executable)} -m mlx_lm fuse "$@"',
    }.items():
        (bin_folder / name).write_text(f"#!/bin/sh\n{words}\n")
        (bin_folder / name).chmod(0o755)
    found = os.pathsep.join(filter(None, [str(path or ""), os.environ.get("PYTHONPATH", "")]))
    env = os.environ | {
        "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": found,
    }
    done = subprocess.run(line, shell=True, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_an_adapter_of_mlx_lm_is_fused_as_the_message_says(tmp_path: Path) -> None:
    pytest.importorskip("mlx_lm")
    adapter = tmp_path / "my adapter"
    adapter.mkdir()
    random = np.random.default_rng(0)
    layer = "model.layers.0.self_attn.q_proj"
    tensors = {
        f"{layer}.lora_a": random.standard_normal((128, 4)).astype(np.float32),
        f"{layer}.lora_b": random.standard_normal((4, 128)).astype(np.float32),
    }
    save_file(tensors, adapter / "adapters.safetensors")
    parameters = {"rank": 4, "scale": 2.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]}
    described = {
        "fine_tune_type": "lora",
        "num_layers": -1,
        "lora_parameters": parameters,
        "model": str(MICRO),
    }
    (adapter / "adapter_config.json").write_text(json.dumps(described))
    line = re.search(r"mlx_lm\.fuse .*(?=; then)", only_problem(adapter))
    assert line is not None
    run(line[0], tmp_path)
    requant.convert(tmp_path / "fused", tmp_path / "out", dequantize=True, layout="keep")
    base = load_file(MICRO / "model.safetensors")[f"{layer}.weight"].astype(np.float32)
    ours = load_file(tmp_path / "out" / "model.safetensors")[f"{layer}.weight"].astype(np.float32)
    change = 2.0 * (tensors[f"{layer}.lora_a"] @ tensors[f"{layer}.lora_b"]).T
    assert np.abs(ours - (base + change)).max() < 0.02 * np.abs(change).max()


# PEFT needs torch: this replaces the two calls that the message writes out.
STAND_IN = """
import json, shutil
import ml_dtypes
from pathlib import Path
import numpy as np
from safetensors.numpy import load_file, save_file

class AutoPeftModelForCausalLM:
    @classmethod
    def from_pretrained(cls, folder):
        self = cls()
        self.config = json.loads((Path(folder) / "adapter_config.json").read_text())
        self.adapter = load_file(Path(folder) / "adapter_model.safetensors")
        self.base = Path(self.config["base_model_name_or_path"])
        return self

    def merge_and_unload(self):
        self.weights = load_file(self.base / "model.safetensors")
        for name, a in self.adapter.items():
            if ".lora_A." in name:
                key = name.removeprefix("base_model.model.").replace(".lora_A", "")
                change = self.adapter[name.replace("lora_A", "lora_B")] @ a
                self.weights[key] = (self.weights[key] + change).astype(self.weights[key].dtype)
        return self

    def save_pretrained(self, folder):
        Path(folder).mkdir()
        shutil.copy(self.base / "config.json", folder)
        save_file(self.weights, Path(folder) / "model.safetensors")
"""


@pytest.mark.sweep(1)
@pytest.mark.parametrize("name", ["adapter", "an adapter", "it's"])
def test_an_adapter_of_peft_is_merged_as_the_message_says(tmp_path: Path, name: str) -> None:
    base, adapter = tmp_path / "base", tmp_path / name
    weight = bf16(64, 64)
    write_folder(base, {})
    write_file(base / "model.safetensors", {"up.weight": weight})
    write_folder(adapter, {}, config=None)
    a, b = (np.full(shape, 0.5, np.float32) for shape in ((2, 64), (64, 2)))
    pair = {"base_model.model.up.lora_A.weight": a, "base_model.model.up.lora_B.weight": b}
    write_file(adapter / "adapter_model.safetensors", pair)
    described = {"peft_type": "LORA", "base_model_name_or_path": str(base)}
    (adapter / "adapter_config.json").write_text(json.dumps(described))
    line = re.search(r"python -c .*(?= and copy)", only_problem(adapter))
    assert line is not None
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "peft.py").write_text(STAND_IN)
    run(line[0], tmp_path, modules)
    requant.convert(tmp_path / "merged", tmp_path / "out", dequantize=True, layout="keep")
    ours = load_file(tmp_path / "out" / "model.safetensors")["up.weight"]
    assert (ours == (weight + b @ a).astype(ml_dtypes.bfloat16)).all()


# -- on the hub --------------------------------------------------------------------------------
@pytest.fixture
def hub() -> Iterator[Hub]:
    pytest.importorskip("huggingface_hub")
    described = {
        "org/peft": {"peft_type": "LORA", "base_model_name_or_path": "org/base"},
        "org/mlx": {"fine_tune_type": "lora", "model": "org/base"},
    }
    files = {"adapter_model.safetensors": b"x", "adapter_model.bin": b"x", "optimizer.pt": b"x"}
    held = {
        k: files | {"adapter_config.json": json.dumps(v).encode()} for k, v in described.items()
    }
    with serving(Hub(held)) as running:
        yield running


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("org/peft", 'Model.from_pretrained("org/peft").merge_and_unload()'),
        ("org/mlx", "hf download org/mlx --local-dir mlx, then mlx_lm.fuse --model org/base "),
    ],
)
@pytest.mark.parametrize("command", ["plan", "inspect"])
def test_a_repository_with_an_adapter(
    hub: Hub, tmp_path: Path, name: str, words: str, command: str
) -> None:
    done = Call(hub, tmp_path)(command, name)
    assert done.returncode == 1
    assert words in done.stderr
