"""Files of llama.cpp's own converter: every tensor and setting is that of the original model.

``tests/support/gguf_records`` holds the files, and how they were made.
"""

import base64
import importlib
import json
import lzma
import re
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_model

import requant
from tests.support.gguf_records.make import values
from tests.support.safetensors_files import read_folder

pytestmark = pytest.mark.sweep(2)

RECORDS = Path(__file__).parents[1] / "support" / "gguf_records"
NAMES = sorted(path.name.removesuffix(".json.xz") for path in RECORDS.glob("*.json.xz"))
MODULES = {  # model_type -> module of mlx-lm, where they differ
    **{"minimax_m2": "minimax", "falcon_mamba": "mamba"},
    **{"qwen3_5_text": "qwen3_5", "qwen3_5_moe_text": "qwen3_5_moe"},
}
NO_CLASS = ("falcon", "bert", "xlm-roberta", "t5", "nomic_bert")  # none in mlx-lm
DROPPED = re.compile(r"pooler\.dense\..*|rotary_emb\.inv_freq")  # by the converter
# Computed twice in float32: one was added and is subtracted, or exp and log.
COMPUTED = re.compile(r"A_log")
SHIFTED = {"qwen3_5": re.compile(r"norm\.weight")}
TOKENS = mx.array([[1, 5, 9, 63, 31, 7, 9, 2, 40, 3, 11, 50]])


@cache
def record(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(lzma.decompress((RECORDS / f"{name}.json.xz").read_bytes()))
    return found


def write_file(name: str, folder: Path) -> Path:
    path = folder / "m.gguf"
    path.write_bytes(base64.b64decode(record(name)["gguf"]))
    return path


def original(name: str) -> dict[str, np.ndarray]:
    """The weights that the converter read, by Hugging Face's names."""
    return {
        key: values(key, shape)
        for key, shape in record(name)["weights"].items()
        if not DROPPED.search(key)
    }


def settings_of(name: str) -> dict[str, Any]:
    """config.json of the original in the terms that mlx-lm's classes read."""
    config = dict(record(name)["config"])
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]
        config.setdefault("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0))
        if rope.get("rope_type", "default") != "default":
            config["rope_scaling"] = rope
    config.setdefault("rope_scaling", None)
    if "time_step_limit" in config:
        config["time_step_limit"] = (0.0, float("inf"))  # transformers has its own way to say it
    for kind, own in zip(config.get("layer_types") or (), _each_layer(config), strict=False):
        if kind == "full_attention" and own:  # Gemma 4, as published files have it
            config["global_head_dim"] = own["head_dim"]
            config["num_global_key_value_heads"] = own.get("num_key_value_heads")
    return config


def _each_layer(config: dict[str, Any]) -> list[dict[str, Any]]:
    own = config.get("per_layer_config") or {}
    return [own.get(str(number), {}) for number in range(config.get("num_hidden_layers", 0))]


def published(name: str) -> dict[str, np.ndarray]:
    """The weights with the experts of Qwen 3.5 stacked, as published files have them."""
    weights = original(name)
    if name != "qwen3_5_moe":
        return weights
    for path in sorted({key.partition(".experts.")[0] for key in weights if ".experts." in key}):
        parts = {
            role: [weights.pop(f"{path}.experts.{n}.{role}_proj.weight") for n in range(4)]
            for role in ("gate", "up", "down")
        }
        fused = [np.concatenate(pair) for pair in zip(parts["gate"], parts["up"], strict=True)]
        weights[f"{path}.experts.gate_up_proj"] = np.stack(fused)
        weights[f"{path}.experts.down_proj"] = np.stack(parts["down"])
    return weights


def counterpart(name: str) -> Any:
    """mlx-lm's model of the original, with its weights as mlx-lm's own loader arranges them."""
    config = settings_of(name)
    module = importlib.import_module(
        f"mlx_lm.models.{MODULES.get(config['model_type'], config['model_type'])}"
    )
    made = module.Model(module.ModelArgs.from_dict(config))
    weights = {key: mx.array(array) for key, array in published(name).items()}
    if hasattr(made, "sanitize"):
        weights = made.sanitize(weights)
    made.load_weights(list(weights.items()), strict=True)
    return made, {key: np.array(array) for key, array in weights.items()}


def assert_equal(name: str, found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert sorted(found) == sorted(wanted)
    shifted = SHIFTED.get(name.removesuffix("_moe"))
    for key, array in wanted.items():
        assert found[key].shape == array.shape, key
        if COMPUTED.search(key) or (shifted and shifted.search(key)):
            np.testing.assert_allclose(found[key], array, rtol=0, atol=2.0**-23, err_msg=key)
        else:
            assert np.array_equal(found[key], array), key


def has_class(name: str) -> bool:
    return record(name)["config"]["model_type"] not in NO_CLASS


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_is_the_original(name: str, tmp_path: Path) -> None:
    """Bit for bit, under the names of mlx-lm's class; where there is none, of transformers'."""
    path = write_file(name, tmp_path)
    layout = "mlx-lm" if has_class(name) else "keep"
    requant.convert(path, tmp_path / "out", dequantize=True, layout=layout, dtype="float32")
    found = read_folder(tmp_path / "out")
    if not has_class(name):
        wanted = original(name)
        if name == "xlm_roberta":  # its positions begin behind the number of the padding token
            positions = "embeddings.position_embeddings.weight"
            wanted[positions] = wanted[positions][2:]
        assert_equal(name, found, wanted)
        return
    made, wanted = counterpart(name)
    assert_equal(name, found, wanted)
    loaded, _ = load_model(tmp_path / "out", strict=True)
    np.testing.assert_allclose(np.array(loaded(TOKENS)), np.array(made(TOKENS)), atol=1e-5)
