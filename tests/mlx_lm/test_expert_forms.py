"""Experts in every published form, for every class of mlx-lm that has experts.

A checkpoint is built from a class's own parameters: its other tensors as they are published
(``hub_forms``), its experts in a form that this class need not know. What comes out must be the
class's own stacks again, byte for byte, and beside them what mlx-lm makes of the published form.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

from requant.mlx_lm_layout import layout_in_any_form
from tests.mlx_lm.checks import (
    NEW_FORMS,
    Source,
    Weights,
    as_bytes,
    carry_out,
    class_checkpoint,
    convert_with_mlx_lm,
    load_config,
    write_folder,
)
from tests.mlx_lm.families import model_types, small_config
from tests.mlx_lm.hub_forms import FORMS

# The stacks of a class, and how published experts are found: a regex up to what holds them.
STACKS = re.compile(
    r"(?P<head>.*?\.(?:layers|blocks|h)\.)(?P<layer>\d+)\.(?P<module>.*)\."
    r"(?P<proj>gate_proj|up_proj|down_proj|fc1|fc2)\.(?P<part>weight|bias)"
)
PUBLISHED = re.compile(
    r"(?P<prefix>.*?\.(?:layers|blocks|h)\.(?P<layer>\d+)\.(?:.*\.)?experts)\."
    r"(?:\d+\.\w+\.(?:weight|bias)|(?:gate_up|gate|up|down)_proj(?:[._]?(?:weight|bias))?)"
)
# nemotron_h: two matrices an expert, called otherwise in the class.
ROLES = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "fc1": "up", "fc2": "down"}
IN_TURNS = {"gpt_oss"}
# Where authors would put experts that their published form holds in another way.
PLACES = {
    "granitemoe": "model.layers.{}.block_sparse_moe.experts",
    "granitemoehybrid": "model.layers.{}.block_sparse_moe.experts",
    "step3p5": "model.layers.{}.moe.experts",
}
OTHERWISE = re.compile(
    r".*\.(moe\.(gate|up|down)_proj|block_sparse_moe\.(in|out)put_linear)\.weight"
)
CONFIGS = {"afmoe": {"num_dense_layers": 1}}
WRAPPERS = {"gemma4", "kimi_k25", "kimi_vl", "minimax_m3_vl", "qwen3_5_moe", "qwen3_vl_moe"}
# Families whose experts are no stacks in the class, or are called like nobody else's.
NOT_HERE = {"dbrx", "phixtral"}

Experts = dict[tuple[str, str], mx.array]  # (role, part) -> (experts, out, in)


def single(names: dict[str, str]) -> Callable[[str, Experts, bool], Weights]:
    def form(prefix: str, experts: Experts, in_turns: bool) -> Weights:
        return {
            f"{prefix}.{e}.{names[role]}.{part}": array[e]
            for (role, part), array in experts.items()
            for e in range(array.shape[0])
        }

    return form


def joined(experts: Experts, in_turns: bool) -> Experts:
    made = dict(experts)
    for part in ("weight", "bias"):
        if ("gate", part) in made:
            gate, up = made.pop(("gate", part)), made.pop(("up", part))
            if in_turns:
                both = mx.stack([gate, up], axis=2)
                made["gate_up", part] = both.reshape(gate.shape[0], -1, *gate.shape[2:])
            else:
                made["gate_up", part] = mx.concatenate([gate, up], axis=1)
    return made


def fused(
    names: dict[str, str], weight: str = "", bias: str = "_bias", turned: bool = False
) -> Callable[[str, Experts, bool], Weights]:
    def form(prefix: str, experts: Experts, in_turns: bool) -> Weights:
        result: Weights = {}
        for (role, part), array in joined(experts, in_turns).items():
            if turned and part == "weight":
                array = mx.contiguous(array.swapaxes(1, 2))
            result[f"{prefix}.{names[role]}{weight if part == 'weight' else bias}"] = array
        return result

    return form


PLAIN = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
FUSED = PLAIN | {"gate_up": "gate_up_proj"}
VLLM = {"gate_up": "w13", "down": "w2", "up": "w3"}
SOURCE_FORMS = {
    "single": single(PLAIN),
    "single w123": single({"gate": "w1", "up": "w3", "down": "w2"}),
    "fused": fused(FUSED),
    "fused .weight": fused(FUSED, ".weight", ".bias"),
    "turned": fused(FUSED, turned=True),
    "vllm": fused(VLLM, "_weight"),
}


def expert_families() -> list[str]:
    """Families whose published form has experts under a name that is known."""
    known = [name for name in FORMS if name in model_types() and name not in NEW_FORMS]
    with_experts = []
    for name in known:
        if name in NOT_HERE:
            continue
        text = inspect.getsource(importlib.import_module(f"mlx_lm.models.{name}"))
        if "SwitchGLU" in text or "SwitchMLP" in text or name in WRAPPERS:
            with_experts.append(name)
    return with_experts


def stored_as(family: str, form: str, folder: Path) -> tuple[Weights, Weights] | None:
    """Write a checkpoint with experts in a form; what its class must get, or None without experts.

    Returns:
        The experts of the class by name, and the tensors beside experts as they are published.
    """
    config = small_config(family) | CONFIGS.get(family, {})
    class_checkpoint(folder / "class", config)
    weights = mx.load(str(folder / "class" / "model.safetensors"))
    mx.eval(weights)
    stacks = {
        name: array
        for name, array in weights.items()
        if (match := STACKS.fullmatch(name))
        and array.ndim == (3 if match["part"] == "weight" else 2)
        and not re.search(r"shared|embed_q|unembed", name)
    }
    published = FORMS[family][0](dict(weights))
    places = {m["layer"]: m["prefix"] for name in published if (m := PUBLISHED.fullmatch(name))}
    layers = {match["layer"] for name in stacks if (match := STACKS.fullmatch(name))}
    if family in PLACES:
        places = {layer: PLACES[family].format(layer) for layer in layers}
    if not stacks or not places:
        return None
    rest = {
        name: array
        for name, array in published.items()
        if not PUBLISHED.fullmatch(name) and not (family in PLACES and OTHERWISE.fullmatch(name))
    }
    by_layer: dict[str, Experts] = {}
    for name, array in stacks.items():
        match = STACKS.fullmatch(name)
        assert match is not None
        by_layer.setdefault(match["layer"], {})[ROLES[match["proj"]], match["part"]] = array
    made = dict(rest)
    for layer, experts in by_layer.items():
        made |= SOURCE_FORMS[form](places[layer], experts, family in IN_TURNS)
    write_folder(folder / "source", config, made)
    return stacks, published


@pytest.mark.parametrize("form", SOURCE_FORMS)
@pytest.mark.parametrize("family", expert_families())
def test_every_class_gets_its_own_stacks(family: str, form: str, tmp_path: Path) -> None:
    built = stored_as(family, form, tmp_path)
    if built is None:
        pytest.fail("no experts found in its published form")
    stacks, published = built
    source = Source(tmp_path / "source")
    with mx.stream(mx.cpu):
        layout, _ = layout_in_any_form(load_config(tmp_path / "source"), source.infos)
        made = carry_out(layout, source)
    wrong = [n for n in stacks if n not in made or as_bytes(made[n]) != as_bytes(stacks[n])]
    assert wrong == []
    write_folder(tmp_path / "published", small_config(family) | CONFIGS.get(family, {}), published)
    wanted, _ = convert_with_mlx_lm(tmp_path / "published", None)
    assert made.keys() == wanted.keys()
    others = wanted.keys() - stacks.keys()
    assert [n for n in others if as_bytes(made[n]) != as_bytes(wanted[n])] == []
