"""Recognize adapters (LoRA and its relatives), and say how to merge them into a model.

An adapter holds changes to the weights of a base model. Without the base it is not a model, and the
base without the changes is another model: neither is converted.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from requant.errors import Problem
from requant.text import format_value, join_first, pluralize

ADAPTER_CONFIG = "adapter_config.json"  # of PEFT, unsloth and mlx-lm

_FILES = re.compile(
    r"(?:adapter_model(?:-[0-9]+-of-[0-9]+)?\.(?:safetensors|bin)"  # PEFT, unsloth
    r"|(?:[0-9]+_)?adapters\.(?:safetensors|npz)"  # mlx-lm, and what it saves while it trains
    r"|pytorch_lora_weights\.(?:safetensors|bin))"  # diffusers
)
# Parts of tensors' names that adapters have; ``base_layer`` counts only before certain suffixes.
_PARTS = re.compile(
    r"(?:^|\.)(?P<part>lora_(?:[aAbBE]|embedding_[AB]|magnitude_vector|down|up|mid|bias)"
    r"|base_layer(?=\.(?:weight|bias|qweight|weight_packed|scales)$)"
    r"|modules_to_save|original_module|dora_scale"
    r"|(?:hada_(?:w[12]|t[12])|lokr_(?:w[12]|t2))(?:_[ab])?"  # LoHa and LoKr
    r"|oft_(?:r|R|blocks|diag)|boft_[Rs]|ia3_l|vera_lambda_[bd]|vblora_\w+|fourierft_spectrum"
    r"|hra_u|randlora_\w+|trainable_tokens_delta)(?=\.|$)"
)
# What each of these parts begins with.
_STARTS = (
    *("lora_", "base_layer", "modules_to_save", "original_module", "dora_scale", "hada_", "lokr_"),
    *("oft_", "boft_", "ia3_l", "vera_lambda_", "vblora_", "fourierft_spectrum", "hra_u"),
    *("randlora_", "trainable_tokens_delta"),
)
_WRAPPED = {"base_layer", "original_module"}  # the model's own weights, inside an adapter's layer
# PEFT's kinds that add tokens or inputs of their own: nothing can be added to the weights.
_PROMPTS = {"PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING"}
_PROMPTS |= {"ADAPTION_PROMPT", "CPT", "XLORA", "POLY"}
_WORDS = {x.upper(): x for x in ("LoRA", "AdaLoRA", "LoHa", "LoKr", "LyCORIS")}


def is_adapter_file(name: str) -> bool:
    """Whether a file has the name under which tools save adapters."""
    return _FILES.fullmatch(name.rpartition("/")[2]) is not None


def _adapter_parts(tensors: Iterable[str]) -> dict[str, re.Match[str]]:
    """Name -> where it has a part that only adapters have, for the tensors that have one."""
    names = tuple(tensors)
    text = ".".join(("", *names))  # searched at once, which is much faster
    if not any(f".{start}" in text for start in _STARTS):
        return {}
    return {name: match for name in names if (match := _PARTS.search(name))}


def holds_only_an_adapter(tensors: Collection[str]) -> bool:
    """Whether all tensors belong to an adapter, in the names of PEFT, mlx-lm or LyCORIS."""
    found = _adapter_parts(tensors)
    if not found or any(match["part"] in _WRAPPED for match in found.values()):
        return False
    scales = {f"{name[: match.start()]}.alpha" for name, match in found.items()}
    return all(
        name in found or name in scales or name.startswith("base_model.model.") for name in tensors
    )


def describe_adapter(where: str, config: Mapping[str, Any], remote: bool = False) -> str:
    """Describe an adapter, and how to merge it into a model that can be converted.

    ``where`` is its folder, or a repository (``remote``); ``config`` its adapter_config.json, empty
    where there is none.
    """
    if "peft_type" in config:
        return _describe_peft(where, config)
    if "fine_tune_type" in config or "lora_parameters" in config or "adapter_path" in config:
        return _describe_mlx(where, config, remote)
    return (
        "holds an adapter (LoRA or a relative), which is changes to a model and no model: merge "
        "it into its base model with the tool that made it, then convert the merged model"
    )


def describe_adapter_next_to(names: Collection[str]) -> str:
    """Say what to do about adapter files in the folder of a whole model."""
    files = sorted({*names, ADAPTER_CONFIG})
    return (
        "is an adapter (LoRA or a relative) next to a whole model, and whether it is to be applied "
        f"is not known. To convert the model without it, move {join_first(files)} out of the "
        "folder; to convert both, merge it first (PEFT: merge_and_unload; mlx-lm: mlx_lm.fuse) and "
        "convert what comes of it"
    )


def problems_in(tensors: Iterable[str]) -> list[Problem]:
    """One problem about all tensors of adapters among those of a model."""
    part_of = {name: match["part"] for name, match in _adapter_parts(tensors).items()}
    if not part_of:
        return []
    first = next(iter(part_of))
    parts = join_first(sorted(set(part_of.values())), 4)
    held = pluralize(len(part_of), "tensor")
    message = (
        f"is a tensor of an adapter that was not merged into the model ({held} of this kind: "
        f"{parts}). MLX's loaders would leave it out: merge first (PEFT: load with PeftModel, then "
        "merge_and_unload and save_pretrained; mlx-lm: mlx_lm.fuse) and convert what comes of it"
    )
    return [Problem(first, message)]


def _describe_peft(where: str, config: Mapping[str, Any]) -> str:
    kind = str(config["peft_type"]).upper()
    base = config.get("base_model_name_or_path")
    of = f" for {format_value(base)}" if isinstance(base, str) and base else ""
    if kind in _PROMPTS:
        return (
            f"holds {format_value(kind)} of PEFT{of}, an adapter that adds inputs and no weights: "
            "it cannot be merged, and MLX has nothing that runs it; convert its base model alone"
        )
    word = "DoRA" if config.get("use_dora") else _WORDS.get(kind, kind)
    code = (
        "from peft import AutoPeftModelForCausalLM as Model; "
        f"Model.from_pretrained({json.dumps(where, ensure_ascii=False)})"
        '.merge_and_unload().save_pretrained("merged")'
    )
    return (
        f"holds a {word} adapter of PEFT{of}, which is changes to a model and no model. Merge it "
        f"first: python -c {shlex.quote(code)} and copy the tokenizer files of the base model "
        "there; then convert the folder merged"
    )


def _describe_mlx(where: str, config: Mapping[str, Any], remote: bool) -> str:
    base = config.get("model")
    base = base if isinstance(base, str) and base else "BASE"
    words = {"dora": "a DoRA", "full": "fine-tuned layers as an"}
    word = words.get(str(config.get("fine_tune_type")), "a LoRA")
    folder = where.rpartition("/")[2] if remote else where
    first = f"hf download {where} --local-dir {folder}, then " if remote else ""
    known = "" if base != "BASE" else " with the base model for BASE"
    return (
        f"holds {word} adapter of mlx-lm, which is changes to a model and no model. Fuse it "
        f"first{known}: {first}mlx_lm.fuse --model {shlex.quote(base)} --adapter-path "
        f"{shlex.quote(folder)} --save-path fused; then convert the folder fused"
    )
