"""Files of llama.cpp's own converter: every tensor and setting is that of the original model.

``tests/support/gguf_records`` holds the files, and how they were made.
"""

import importlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_model

import requant
from requant.errors import CheckpointError
from requant.gguf.families import family_of
from requant.gguf.metadata import Metadata
from tests.support.gguf_files import add_key
from tests.support.gguf_records import RECORDS, record, write_record
from tests.support.gguf_records.make import values
from tests.support.safetensors_files import read_folder

pytestmark = pytest.mark.sweep(2)

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


def with_factors(weights: dict[str, np.ndarray], config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Falcon H1's weights times the factors that its class multiplies their outputs with."""
    inner, groups = config["mamba_d_ssm"], config["mamba_n_groups"] * config["mamba_d_state"]
    sizes = (inner, inner, groups, groups, config["mamba_n_heads"])
    parts = np.repeat(np.array(config["ssm_multipliers"], np.float32), sizes)[:, None]
    gate, down = config["mlp_multipliers"]
    entry = config["attention_in_multiplier"]
    factors: dict[str, Any] = {
        "embed_tokens": config["embedding_multiplier"],
        "lm_head": config["lm_head_multiplier"],
        **{"q_proj": entry, "v_proj": entry, "k_proj": entry * config["key_multiplier"]},
        **{"o_proj": config["attention_out_multiplier"], "gate_proj": gate, "down_proj": down},
        **{
            "out_proj": config["ssm_out_multiplier"],
            "in_proj": config["ssm_in_multiplier"] * parts,
        },
    }
    return {
        key: np.float32(factors.get(key.split(".")[-2], 1.0)) * array
        for key, array in weights.items()
    }


def counterpart(name: str) -> Any:
    """mlx-lm's model of the original, with its weights as mlx-lm's own loader arranges them."""
    config = settings_of(name)
    module = importlib.import_module(
        f"mlx_lm.models.{MODULES.get(config['model_type'], config['model_type'])}"
    )
    stored = published(name)
    if name == "falcon_h1":
        stored = with_factors(stored, config)
        config |= {key: 1.0 for key in config if key.endswith("_multiplier")}
        config |= {"mlp_multipliers": [1.0] * 2, "ssm_multipliers": [1.0] * 5}
    made = module.Model(module.ModelArgs.from_dict(config))
    weights = {key: mx.array(array) for key, array in stored.items()}
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
    return name != "jina_bert" and record(name)["config"]["model_type"] not in NO_CLASS


@pytest.mark.parametrize("name", RECORDS)
def test_every_tensor_is_the_original(name: str, tmp_path: Path) -> None:
    """Bit for bit, under the names of mlx-lm's class; where there is none, of transformers'."""
    path = write_record(name, tmp_path)
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


def rewrite(source: Path, target: Path, kind: str | None) -> None:
    """The same file with matrices as blocks; with None as the numbers that blocks of Q8_0 hold."""
    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, architecture)
    for key, found in reader.fields.items():
        if key.startswith(f"{architecture}."):
            sub_type = found.types[-1] if len(found.types) > 1 else None
            writer.add_key_value(key, found.contents(), found.types[0], sub_type)
    q8 = gguf.GGMLQuantizationType.Q8_0
    for tensor in reader.tensors:
        array = np.array(tensor.data)
        small = (
            array.ndim < 2 or array.shape[-1] % 32 or re.search("norm|conv|ssm_[ad]", tensor.name)
        )
        if small or not tensor.name.endswith(".weight"):
            writer.add_tensor(tensor.name, array)
            continue
        blocks = gguf.quantize(array, q8)
        if kind is None:
            writer.add_tensor(tensor.name, gguf.dequantize(blocks, q8))
        else:
            writer.add_tensor(tensor.name, blocks, raw_dtype=q8)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    "name", ["deepseek_v2", "deepseek_v3", "qwen3_5", "falcon", "granitemoehybrid", "gemma4_moe"]
)
def test_codes_move_as_values_do(name: str, tmp_path: Path) -> None:
    """Rows, inputs and halves of a tensor change places with their codes, scales and biases."""
    path = write_record(name, tmp_path)
    rewrite(path, tmp_path / "q8.gguf", "Q8_0")
    rewrite(path, tmp_path / "values.gguf", None)
    options: dict[str, Any] = {"layout": "keep", "dtype": "float32"}
    report = requant.convert(tmp_path / "q8.gguf", tmp_path / "codes", **options)
    kept = [layer for layer in report.plan.layers if layer.treatment == "kept"]
    assert len(kept) > 8
    requant.convert(tmp_path / "codes", tmp_path / "decoded", dequantize=True, **options)
    requant.convert(tmp_path / "values.gguf", tmp_path / "values", dequantize=True, **options)
    requant.convert(tmp_path / "q8.gguf", tmp_path / "direct", dequantize=True, **options)
    decoded, wanted = read_folder(tmp_path / "decoded"), read_folder(tmp_path / "values")
    direct = read_folder(tmp_path / "direct")
    assert sorted(decoded) == sorted(direct) == sorted(wanted)
    for key, array in wanted.items():
        assert np.array_equal(direct[key], array), key
        if "kv_b_proj" in key:  # groups of its keys run along the outputs: encoded again
            assert np.abs(decoded[key] - array).max() < 0.001
        else:
            assert np.array_equal(decoded[key], array), key


def from_record(name: str, folder: Path, more: Mapping[str, Any], drop: str = "^$") -> Path:
    """A record's file with other settings and tensors: those that ``more`` has by name."""
    reader = gguf.GGUFReader(write_record(name, folder))
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(folder / "other.gguf", architecture)
    for key, found in reader.fields.items():
        if key.startswith(f"{architecture}.") and key.partition(".")[2] not in more:
            sub_type = found.types[-1] if len(found.types) > 1 else None
            writer.add_key_value(key, found.contents(), found.types[0], sub_type)
    for key, value in more.items():
        if not isinstance(value, np.ndarray):
            add_key(writer, f"{architecture}.{key}", value)
    kept = [t for t in reader.tensors if not re.search(drop, t.name) and t.name not in more]
    for tensor in kept:
        writer.add_tensor(tensor.name, np.array(tensor.data))
    for key, value in more.items():
        if isinstance(value, np.ndarray):
            writer.add_tensor(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "other.gguf"


@pytest.mark.parametrize("name", ["qwen3_5", "glm4_moe", "deepseek_v3"])
def test_blocks_that_predict_further_tokens_are_left_out(name: str, tmp_path: Path) -> None:
    """MLX's classes have no such blocks: the others make the same model."""
    path = write_record(name, tmp_path)
    plain = requant.plan(path, layout="keep")
    blocks = record(name)["config"]["num_hidden_layers"]
    further = {
        f"blk.{blocks}.{role}.weight": np.ones((64, 64), np.float32)
        for role in ("attn_q", "nextn.eh_proj", "nextn.shared_head_norm")
    }
    more = {"block_count": blocks + 1, "nextn_predict_layers": 1, **further}
    plan = requant.plan(from_record(name, tmp_path, more), layout="keep")
    assert plan.config == plain.config
    assert plan.layers == plain.layers
    assert sorted(dropped for dropped, _ in plan.dropped if dropped in further) == sorted(further)


def test_norms_of_each_head(tmp_path: Path) -> None:
    """StableLM 2 12B has a norm a head; files hold those of a block in one tensor."""
    rows = {
        f"blk.{block}.attn_{part}_norm.weight": values(f"{block}{part}", [heads, 16])
        for block in range(2)
        for part, heads in (("q", 4), ("k", 2))
    }
    more = {"use_parallel_residual": True, **rows}
    path = from_record("stablelm", tmp_path, more, drop="ffn_norm")
    requant.convert(path, tmp_path / "out", dequantize=True, layout="mlx-lm", dtype="float32")
    out = read_folder(tmp_path / "out")
    load_model(tmp_path / "out", strict=True)
    for name, array in rows.items():
        _, block, role, _ = name.split(".")
        for head, row in enumerate(array):
            key = f"model.layers.{block}.self_attn.{role[5]}_layernorm.norms.{head}.weight"
            assert np.array_equal(out[key], row)


@pytest.mark.parametrize(
    ("name", "more", "drop", "words"),
    [
        ("stablelm", {"use_parallel_residual": True}, "^$", "is true, but blocks have an ffn_norm"),
        ("falcon", {"tensor_data_layout": "other"}, "^$", "is 'other', known is jploski"),
        ("qwen3_5", {"ssm.time_step_rank": 3}, "^$", "is 3, not a multiple of ssm.group_count, 2"),
        ("qwen3_5", {"full_attention_interval": 2}, "^$", "recurrent_layers: is not every block"),
        ("falcon", {"attention.head_count": 6}, "^$", "has 128 rows, which no heads of this"),
        ("bert", {"attention.causal": True}, "^$", "is not false, and this class looks at a whole"),
        ("deepseek_v2", {"expert_gating_func": 4}, "^$", "expert_gating_func: is 4: that changes"),
        (
            "granitemoehybrid",
            {},
            "blk.0.ffn_up_shexp",
            r"blk.0.ffn_gate_shexp.weight F32 \[48, 64\]: expected blk.0.ffn_gate_shexp.weight and",
        ),
        ("gemma4", {"feed_forward_length": [96, 96, 80, 96, 192, 192]}, "^$", "has 80 next to 96"),
        ("lfm2", {"attention.head_count_kv": [0, 2]}, "^$", "expected a whole number for each of"),
    ],
)
def test_what_does_not_fit(
    name: str, more: dict[str, Any], drop: str, words: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=words):
        requant.plan(from_record(name, tmp_path, more, drop))


def test_which_deepseek_it_is() -> None:
    """Files of GLM 4.7 Flash do not say how experts are chosen; llama.cpp knows it by its size."""
    values_ = {"general.architecture": "deepseek2", "deepseek2.vocab_size": 154_880}
    family = family_of(Metadata("m.gguf", values_))
    assert family is not None and family.model_type == "glm4_moe_lite"
