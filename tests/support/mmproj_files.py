"""Vision parts (mmproj) as GGUF files, written with the gguf package by llama.cpp's rules.

``mmproj_records/llama-cpp.json`` records what its converter makes of the same weights.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from tests.support.gguf_files import add_key, permuted

_RECORDS = Path(__file__).parent / "mmproj_records" / "llama-cpp.json"
_NAMES = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, 8)
_KINDS = gguf.GGMLQuantizationType
_TEXT = ("language_model.", "model.language_model.", "model.text_model.", "lm_head.")
_PROJECTORS = {
    "gemma3": "gemma3",
    "idefics3": "idefics3",
    "internvl": "internvl",
    "internvl_chat": "internvl",
    "llava": "mlp",
    "llava_next": "mlp",
    "mistral3": "pixtral",
    "pixtral": "pixtral",
    "qwen2_vl": "qwen2vl_merger",
    "qwen2_5_vl": "qwen2.5vl_merger",
    "qwen3_vl": "qwen3vl_merger",
    "qwen3_vl_moe": "qwen3vl_merger",
}
FAMILIES = tuple(family for family in _PROJECTORS if "llava" not in family)


@cache
def records() -> dict[str, Any]:
    """What the converter made of each family."""
    found: dict[str, Any] = json.loads(_RECORDS.read_text())
    return found


def values(name: str, shape: list[int]) -> np.ndarray:
    """Multiples of 2**-14 that depend on the name, as those of the fixture."""
    count = np.arange(int(np.prod(shape)), dtype=np.uint32)
    mixed = (count * np.uint32(2654435761) + np.uint32(zlib.crc32(name.encode()))) >> np.uint32(17)
    made: np.ndarray = ((mixed % 4096).astype(np.float32) / 2**14 - 0.125).reshape(shape)
    return made


def recorded_weights(family: str) -> dict[str, np.ndarray]:
    """The checkpoint that the converter read."""
    return {name: values(name, shape) for name, shape in records()[family]["weights"].items()}


def is_text(name: str) -> bool:
    """Whether a tensor is of the language model."""
    is_flat = name.startswith(("model.layers.", "model.embed_tokens.", "model.norm."))
    return is_flat or name.startswith(_TEXT)


def as_published(family: str, weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The weights under the names of transformers' published checkpoints.

    The converter knows InternVL's tower by the names of Intern-S1 alone.
    """
    if family != "internvl":
        return dict(weights)
    return {name.removeprefix("model."): array for name, array in weights.items()}


def write_mmproj(
    path: Path,
    family: str,
    weights: Mapping[str, np.ndarray],
    metadata: Mapping[str, Any],
    kind: str = "F16",
    more: Mapping[str, Any] | None = None,
    extra: Mapping[str, np.ndarray] | None = None,
    without: tuple[str, ...] = (),
) -> None:
    """Write a vision part.

    Args:
        path: The file to be.
        family: ``model_type`` of the model.
        weights: The names of the fixture -> float32.
        metadata: Its keys.
        kind: How matrices are stored.
        more: Further keys; None removes one.
        extra: Further tensors by their names in the file.
        without: Tensors of the file to leave out.
    """
    writer = gguf.GGUFWriter(path, "clip")
    for key, value in {**metadata, **(more or {})}.items():
        if key != "general.architecture" and value is not None:
            add_key(writer, key, value)
    for name, array in tensors_of(family, weights, metadata).items():
        if name not in without:
            wanted = stored_kind(family, name, array, kind)
            writer.add_tensor(name, gguf.quantize(array, wanted), raw_dtype=wanted)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def stored_kind(family: str, name: str, array: np.ndarray, kind: str) -> gguf.GGMLQuantizationType:
    """How the converter stores a tensor where matrices are stored as ``kind``."""
    is_embedding = name.startswith(("v.patch_embd", "v.position_embd"))
    if array.ndim <= 1 or not name.endswith((".weight", ".weight.1")) or "position_embd" in name:
        return _KINDS.F32
    if is_embedding and family in ("gemma3", "idefics3"):
        return _KINDS.F32
    if name == "mm.input_projection.weight":
        return _KINDS.F16
    if name.startswith("v.patch_embd") or "patch_merger" in name:
        return _KINDS.F16 if kind == "F16" else _KINDS.F32
    return _KINDS[kind]


def tensors_of(
    family: str, weights: Mapping[str, np.ndarray], metadata: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """The tensors of the file, as float32."""
    made: dict[str, np.ndarray] = {}
    heads = metadata["clip.vision.attention.head_count"]
    for name, array in weights.items():
        if is_text(name):
            continue
        for part, rows in _parts(family, name, array):
            new = _name_in_file(family, part)
            if _PROJECTORS[family] == "pixtral" and new.split(".")[-2] in ("attn_q", "attn_k"):
                rows = permuted(rows, heads)
            made[new] = rows + np.float32(1) if "soft_emb_norm" in new else rows
    return made


def _parts(family: str, name: str, array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """A tensor, or what the converter cuts it into."""
    if ".qkv." in name and not family.startswith("qwen3"):
        for letter, rows in zip("qkv", np.split(array, 3), strict=True):
            chat = f"self_attn.{letter}_proj"
            yield (
                name.replace("attn.qkv", chat if family == "internvl_chat" else f"attn.{letter}"),
                rows,
            )
    elif array.ndim == 5:
        yield "v.patch_embd.weight", array[:, :, 0]
        yield "v.patch_embd.weight.1", array[:, :, 1]
    else:
        yield name, array


def _name_in_file(family: str, name: str) -> str:
    if name.startswith("v."):
        return name
    if family.startswith("llava"):
        return _legacy_name(name)
    name = name.replace("model.visual.", "visual.").replace(
        "projection_weight", "projection.weight"
    )
    if "merger" in name and family.startswith("qwen3"):
        return _merger_name(family, name)
    if family == "internvl":
        for number, layer in (("0", "layer_norm"), ("1", "linear_1"), ("3", "linear_2")):
            name = name.replace(f"model.multi_modal_projector.{layer}", f"mlp1.{number}")
    if family == "internvl_chat" and name.startswith("vision_model."):
        name = f"vision_tower.{name}"
    if family.startswith("internvl") and not name.endswith((".weight", ".bias")):
        name += "" if name.endswith(("cls_token", "class_embedding")) else ".weight"
    found = _NAMES.get_name(name, try_suffixes=(".weight", ".bias"))
    assert found is not None, name
    return found


def _merger_name(family: str, name: str) -> str:
    """Qwen 3's mergers: the last by the names of Qwen 2's, others by the number of their block."""
    layer, suffix = name.split(".")[-2:]
    if "deepstack" not in name:
        return (
            f"{ {'norm': 'v.post_ln', 'linear_fc1': 'mm.0', 'linear_fc2': 'mm.2'}[layer] }.{suffix}"
        )
    blocks = records()[family]["config"]["vision_config"]["deepstack_visual_indexes"]
    return f"v.deepstack.{blocks[int(name.split('.')[2])]}.{layer.removeprefix('linear_')}.{suffix}"


def _legacy_name(name: str) -> str:
    """The older converter of LLaVA's towers calls what goes up down, and the reverse."""
    if name == "image_newline":
        return "model.image_newline"
    name = name.replace("multi_modal_projector.linear_1", "mm.0")
    name = name.replace("multi_modal_projector.linear_2", "mm.2")
    name = name.replace("vision_tower.vision_model.", "v.").replace("encoder.layers", "blk")
    for old, new in {
        "embeddings.": "",
        "embedding": "embd",
        "self_attn.": "attn_",
        "_proj": "",
        "layer_norm": "ln",
        "layernorm": "ln",
        "layrnorm": "ln",
        "mlp.fc1": "ffn_down",
        "mlp.fc2": "ffn_up",
    }.items():
        name = name.replace(old, new)
    return name
