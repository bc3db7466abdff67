"""Models as GGUF files, written with the gguf package the way llama.cpp's converter does it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from requant.kernels.gguf import BlockType

ARCHITECTURES = {  # model_type -> llama.cpp's name
    **{"llama": "llama", "mixtral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"},
    **{"qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe", "gemma": "gemma", "gemma2": "gemma2"},
    **{"gemma3_text": "gemma3", "phi3": "phi3", "gpt_oss": "gpt-oss", "ministral3": "mistral3"},
    **{"smollm3": "smollm3", "granite": "granite", "seed_oss": "seed_oss", "olmo2": "olmo2"},
    "olmo3": "olmo2",
}
PERMUTED = ("llama", "mistral3", "smollm3", "granite")  # rows of q and k, by the converter
WINDOWED = ("gemma2", "gemma3_text", "phi3", "gpt_oss", "olmo3")
_EXPERTS = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
_KINDS = gguf.GGMLQuantizationType


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of the rows of q and k: halves of a head become neighbours."""
    shape = rows.shape
    split = rows.reshape(heads, 2, shape[0] // heads // 2, *shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(shape)


def llama_cpp_name(name: str, config: Mapping[str, Any]) -> str:
    """What the converter calls a tensor that mlx-lm calls ``name``."""
    architecture = ARCHITECTURES[config["model_type"]]
    number = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == architecture)
    names = gguf.get_tensor_name_map(number, config["num_hidden_layers"])
    hf = name.replace("block_sparse_moe.switch_mlp.", "block_sparse_moe.experts.")
    hf = hf.replace("mlp.switch_mlp.", "mlp.experts.")
    if "block_sparse_moe.experts." in hf:
        for role, old in _EXPERTS.items():
            hf = hf.replace(f"experts.{role}", f"experts.{old}")
    if hf.endswith("sinks"):
        hf += ".weight"
    found = names.get_name(hf, try_suffixes=(".weight", ".bias"))
    assert found is not None, name
    return found


def write_gguf(
    path: Path,
    weights: Mapping[str, np.ndarray],
    config: Mapping[str, Any],
    kind: str = "F32",
    *,
    kinds: Mapping[str, str] | None = None,
    tokenizer: Path | None = None,
    split_tensors: int = 0,
    extra: Mapping[str, np.ndarray] | None = None,
    more: Mapping[str, Any] | None = None,
) -> None:
    """Write a model.

    Args:
        path: The file to be; parts get numbers.
        weights: mlx-lm's names -> float32.
        config: config.json.
        kind: How matrices are stored; vectors are F32, as the converter keeps them.
        kinds: GGUF name -> another type.
        tokenizer: A folder with tokenizer.json of byte-level BPE.
        split_tensors: Tensors of one part; 0 for one file.
        extra: Further tensors by their GGUF names.
        more: Further settings by key, without the architecture; after a ``!`` as it is.
    """
    architecture = ARCHITECTURES[config["model_type"]]
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=split_tensors)
    _settings(writer, config, more or {})
    if tokenizer is not None:
        _tokenizer(writer, tokenizer)
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads", heads)
    for name, array in weights.items():
        values = np.asarray(array, np.float32)
        if architecture in PERMUTED and ".self_attn.q_proj." in name:
            values = permuted(values, heads)
        if architecture in PERMUTED and ".self_attn.k_proj." in name:
            values = permuted(values, kv_heads)
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            values = values + np.float32(1)
        if "shared_expert_gate" in name:
            values = values.reshape(-1)
        _add(writer, llama_cpp_name(name, config), values, kind, kinds or {})
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(
    writer: gguf.GGUFWriter, name: str, values: np.ndarray, kind: str, kinds: Mapping[str, str]
) -> None:
    wanted = _KINDS[kinds.get(name, kind if values.ndim > 1 and "bias" not in name else "F32")]
    writer.add_tensor(name, gguf.quantize(values, wanted), raw_dtype=wanted)


def _settings(writer: gguf.GGUFWriter, config: Mapping[str, Any], more: Mapping[str, Any]) -> None:
    writer.add_context_length(config.get("max_position_embeddings", 512))
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config.get("num_key_value_heads", config["num_attention_heads"]))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    is_ministral = config["model_type"] == "ministral3"
    writer.add_rope_freq_base((config["rope_parameters"] if is_ministral else config)["rope_theta"])
    rope = config.get("rope_parameters" if is_ministral else "rope_scaling") or {}
    if rope.get("rope_type") == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
        writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
        if "attention_factor" in rope:
            writer.add_rope_scaling_yarn_attn_factor(rope["attention_factor"])
    if is_ministral:
        writer.add_rope_scaling_yarn_log_mul(rope["mscale_all_dim"])
        writer.add_attn_temperature_scale(rope["llama_4_scaling_beta"])
    if config["model_type"] == "granite":
        writer.add_attention_scale(config["attention_multiplier"])
        writer.add_embedding_scale(config["embedding_multiplier"])
        writer.add_residual_scale(config["residual_multiplier"])
        writer.add_logit_scale(config["logits_scaling"])
    if config.get("head_dim"):
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    experts = config.get("num_experts") or config.get("num_local_experts")
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config["num_experts_per_tok"])
    if config["model_type"] in WINDOWED and config.get("sliding_window"):
        writer.add_sliding_window(config["sliding_window"])
    if config["model_type"] == "olmo3":
        kinds = config["layer_types"]
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in kinds])
    for key, value in more.items():
        key = key[1:] if key.startswith("!") else f"{writer.arch}.{key}"
        if key in writer.kv_data[0]:
            del writer.kv_data[0][key]
        add_key(writer, key, value)


def add_key(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Add a setting with the type of its value."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    else:
        writer.add_float32(key, value)


def _tokenizer(writer: gguf.GGUFWriter, folder: Path) -> None:
    described = json.loads((folder / "tokenizer.json").read_text())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    vocabulary = described["model"]["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    special = {token["content"] for token in described["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    merges = described["model"]["merges"]
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_bos_token_id(vocabulary[settings["bos_token"]])
    writer.add_eos_token_id(vocabulary[settings["eos_token"]])
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")


# Offsets of the float16 numbers of a block; IQ1_M's is spread over four bytes.
HALVES = {
    **{"Q4_1": (0, 2), "Q5_1": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2)},
    **{"Q5_K": (0, 2), "Q6_K": (208,), "TQ1_0": (52,), "TQ2_0": (64,), "MXFP4": (), "NVFP4": ()},
    "IQ1_M": (),
}


def random_blocks(kind: BlockType, rows: int, count: int, seed: int) -> np.ndarray:
    """Blocks of random bytes whose scales are numbers, of either sign."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (rows * count, kind.nbytes), np.uint8)
    for at in HALVES.get(kind.name, (0,)):
        scales = rng.uniform(-2, 2, len(blocks)) * 2.0 ** rng.integers(-24, 4, len(blocks))
        blocks[:, at : at + 2] = scales.astype(np.float16)[:, None].view(np.uint8)
    if kind.name == "IQ1_M":
        blocks[:, 55] &= 0xBF  # the exponent is not all ones
    if kind.name == "NVFP4":
        blocks[:, :4] &= 0x7F
    if kind.name == "MXFP4":
        blocks[:, 0] = np.minimum(blocks[:, 0], 254)
    return blocks.reshape(rows, -1)


ONE_BLOCK = {
    **{"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1},
    **{"num_attention_heads": 2, "num_key_value_heads": 2},
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "vocab_size": 64,
}


def gguf_file(place: Path) -> Path:
    """A small model with codes, in a folder."""
    rng = np.random.default_rng(5)
    names = {"embed_tokens": (64, 64), "layers.0.mlp.up_proj": (96, 64)}
    weights = {
        f"model.{name}.weight": rng.standard_normal(shape).astype(np.float32)
        for name, shape in names.items()
    }
    weights["model.norm.weight"] = np.ones(64, np.float32)
    write_gguf(place / "model.gguf", weights, ONE_BLOCK, "Q8_0")
    return place / "model.gguf"
