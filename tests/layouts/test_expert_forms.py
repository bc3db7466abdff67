"""Experts in every published form, for every class of mlx-lm that has experts.

A checkpoint is built from a class's own parameters: its other tensors as they are published
(``hub_forms``), its experts in a form that this class need not know. What comes out must be the
class's own stacks again, byte for byte, and next to them what mlx-lm makes of the published form.
"""

import importlib
import inspect
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import requant
from requant.layouts.any_form import layout_in_any_form
from requant.layouts.conversion_trace import Shown
from requant.layouts.expert_forms import FORMS as EVERY_FORM
from requant.layouts.expert_forms import Reader
from requant.libraries import MLX_LM, LayoutError, Request
from tests.support.families import model_types, small_config
from tests.support.hub_forms import FORMS
from tests.support.mlx_lm_conversion import (
    NEW_FORMS,
    Source,
    Weights,
    carry_out,
    class_checkpoint,
    convert_with_mlx_lm,
    load_config,
    write_mlx_checkpoint,
)
from tests.support.mlx_reference import as_bytes
from tests.support.plan_texts import note_texts

pytestmark = pytest.mark.sweep(1)

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
# Families whose experts are not stacks in the class, or are called like nobody else's.
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
    names: dict[str, str], weight: str = "", bias: str = "_bias", transposed: bool = False
) -> Callable[[str, Experts, bool], Weights]:
    def form(prefix: str, experts: Experts, in_turns: bool) -> Weights:
        result: Weights = {}
        for (role, part), array in joined(experts, in_turns).items():
            if transposed and part == "weight":
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
    "transposed": fused(FUSED, transposed=True),
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
        The experts of the class by name, and the tensors next to experts as they are published.
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
    published = FORMS[family](dict(weights))
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
    write_mlx_checkpoint(folder / "source", config, made)
    return stacks, published


def families_and_forms() -> list[tuple[str, str]]:
    """Every form of classes with places or rows of their own; of others every second, in turn."""
    found = []
    for number, family in enumerate(expert_families()):
        forms = list(SOURCE_FORMS)
        own = family in PLACES or family in IN_TURNS
        found += [(family, form) for form in (forms if own else forms[number % 2 :: 2])]
    return found


@pytest.mark.parametrize(("family", "form"), families_and_forms())
def test_every_class_gets_its_own_stacks(family: str, form: str, tmp_path: Path) -> None:
    built = stored_as(family, form, tmp_path)
    if built is None:
        pytest.fail("no experts found in its published form")
    stacks, published = built
    source = Source(tmp_path / "source")
    with mx.stream(mx.cpu):
        layout, _ = layout_in_any_form(
            MLX_LM, Shown(load_config(tmp_path / "source"), source.infos), Request()
        )
        made = carry_out(layout, source)
    wrong = [n for n in stacks if n not in made or as_bytes(made[n]) != as_bytes(stacks[n])]
    assert wrong == []
    write_mlx_checkpoint(
        tmp_path / "published", small_config(family) | CONFIGS.get(family, {}), published
    )
    wanted, _ = convert_with_mlx_lm(tmp_path / "published", None)
    assert made.keys() == wanted.keys()
    others = wanted.keys() - stacks.keys()
    assert [n for n in others if as_bytes(made[n]) != as_bytes(wanted[n])] == []


# -- through a whole conversion ----------------------------------------------------------------

# Classes that take fused stacks, fused and transposed ones, ones that take turns, single experts;
# the first is the cheapest.
CLASSES = ("qwen3_next", "qwen3_5_moe", "qwen3_vl_moe", "llama4", "gpt_oss", "mixtral")


@pytest.mark.parametrize("form", ["single", "fused", "transposed", "vllm"])
@pytest.mark.parametrize("family", CLASSES)
def test_a_request_for_bits_reaches_the_experts(family: str, form: str, tmp_path: Path) -> None:
    """Each stack is MLX's own quantization of the class's weights, and mlx-lm loads all of it."""
    from mlx_lm.utils import load_model

    built = stored_as(family, form, tmp_path)
    assert built is not None
    report = requant.convert(tmp_path / "source", tmp_path / "out", bits=8, group_size=32)
    assert report.plan.layout == "mlx-lm" and report.plan.loads
    made = mx.load(str(tmp_path / "out" / "model.safetensors"))
    for name, stack in built[0].items():
        if name.endswith(".bias"):
            assert as_bytes(made[name]) == as_bytes(stack)
            continue
        path = name.removesuffix(".weight")
        parts = mx.quantize(stack, 32, 8, stream=mx.cpu)
        for role, part in zip(("weight", "scales", "biases"), parts, strict=True):
            assert as_bytes(made[f"{path}.{role}"]) == as_bytes(part), f"{path}.{role}"
    load_model(tmp_path / "out", strict=True)


@pytest.mark.parametrize("family", [x for x in CLASSES if x != "mixtral"])
def test_codes_of_single_experts_move(family: str, tmp_path: Path) -> None:
    """Experts that were quantized one by one are stacked code by code, in every class."""
    built = stored_as(family, "single", tmp_path)
    assert built is not None
    kept = {"layout": "keep", "only": [r"experts\.\d+"]}
    requant.convert(tmp_path / "source", tmp_path / "kept", bits=4, group_size=32, **kept)
    report = requant.convert(tmp_path / "kept", tmp_path / "out", layout="mlx-lm")
    made = mx.load(str(tmp_path / "out" / "model.safetensors"))
    exactness = {x.layer: x.exactness for x in report.plan.layers}
    for name, stack in built[0].items():
        path = name.removesuffix(".weight")
        if path == name:
            continue
        assert exactness[path] == "exact"
        parts = mx.quantize(stack, 32, 4, stream=mx.cpu)
        for role, part in zip(("weight", "scales", "biases"), parts, strict=True):
            assert as_bytes(made[f"{path}.{role}"]) == as_bytes(part), f"{path}.{role}"


@pytest.mark.parametrize("form", ["fused", "transposed", "fused .weight"])
@pytest.mark.parametrize("family", [*CLASSES, "mistral4", "deepseek_v3"])
def test_fp8_stacks_reach_the_class_under_their_own_names(family: str, form: str, tmp_path: Path):
    """One scale an expert, as Mistral 4 is published.

    The values are those of a dense counterpart.
    """
    built = stored_as(family, form, tmp_path)
    assert built is not None
    weights = mx.load(str(tmp_path / "source" / "model.safetensors"))
    mx.eval(weights)
    stored, counterpart = dict(weights), dict(weights)
    for name, array in weights.items():
        if array.ndim != 3 or "experts" not in name:
            continue
        codes = mx.to_fp8(array.astype(mx.float32) * 100, stream=mx.cpu)
        scales = mx.full((array.shape[0], 1, 1), 0.0123, mx.float32)
        stored[name], stored[f"{name}_scale_inv"] = codes, scales
        if family == "mistral4" and form == "fused":
            stored[f"{name}_activation_scale"] = mx.array(0.5)
        values = np.array(mx.from_fp8(codes, mx.float32, stream=mx.cpu)) * np.float32(0.0123)
        counterpart[name] = mx.array(values).astype(mx.bfloat16)
    config = small_config(family) | {"torch_dtype": "bfloat16"}
    write_mlx_checkpoint(tmp_path / "counterpart", config, counterpart)
    block = {"quant_method": "fp8", "activation_scheme": "static"}
    write_mlx_checkpoint(tmp_path / "fp8", config | {"quantization_config": block}, stored)
    for options in (
        {"dequantize": True},
        {"bits": 8, "group_size": 32, "only": [r"\.experts|switch"]},
    ):
        out, wanted = tmp_path / "out", tmp_path / "wanted"
        requant.convert(tmp_path / "fp8", out, layout="mlx-lm", force=True, **options)
        requant.convert(tmp_path / "counterpart", wanted, layout="mlx-lm", force=True, **options)
        made, due = (mx.load(str(x / "model.safetensors")) for x in (out, wanted))
        assert made.keys() == due.keys()
        assert [name for name in due if as_bytes(made[name]) != as_bytes(due[name])] == []


# -- what cannot be ----------------------------------------------------------------------------
SINGLE = [
    f"model.layers.{n}.mlp.experts.{e}.{role}_proj.weight"
    for n, e, role in product(range(2), range(2), ("gate", "up", "down"))
]
OTHERS = [f"model.layers.{n}.mlp.gate.weight" for n in range(2)]


@pytest.mark.parametrize(
    ("names", "class_names", "tries"),
    [
        (SINGLE, ["model.layers.0.mlp.switch_mlp.up_proj.weight"], 5),
        (SINGLE, ["model.layers.0.block_sparse_moe.switch_mlp.up_proj.weight"], 5 + 6),
        (["model.layers.0.mlp.experts.gate_up_proj"], ["model.layers.0.mlp.experts.up_proj"], 6),
        (["a.layers.0.moe.experts.0.w1.weight"], ["a.layers.0.mlp.experts.up_proj.weight"], 5 + 6),
        ([*SINGLE, "model.layers.5.moe.experts.0.w1.weight"], ["model.layers.0.mlp.x"], 6 + 6),
    ],
)
def test_no_form_is_tried_twice(names: list[str], class_names: list[str], tries: int) -> None:
    reader = Reader(in_turns=False, hidden=64)
    assert len(list(reader.forms(class_names, names))) == tries


@pytest.mark.parametrize("parent", ["mlp", "feed_forward"])
def test_the_forms_that_are_left_out_change_nothing(parent: str) -> None:
    """What they make has the names of the source, or of a form that is tried."""
    reader = Reader(in_turns=False, hidden=64)
    names = [name.replace(".mlp.", f".{parent}.") for name in (*SINGLE, *OTHERS)]
    weights = {name: mx.zeros((32, 64) if "down" not in name else (64, 32)) for name in names}
    tried = list(reader.forms([f"model.layers.0.{parent}.x"], names))
    shapes = [shapes_of(weights), *(shapes_of(reader.adapter(x)(weights)) for x in tried)]
    assert len({frozenset(x.items()) for x in shapes}) == len(shapes)
    for form in EVERY_FORM:
        for module in ("", parent):
            made = shapes_of(reader.adapter(replace(form, parent=module))(weights))
            assert form.in_turns or made in shapes


def shapes_of(weights: Weights) -> dict[str, tuple[int, ...]]:
    return {name: tuple(array.shape) for name, array in weights.items()}


def test_shapes_that_fit_no_form_are_rejected_as_they_are(tmp_path: Path) -> None:
    """Gate and up of one width, down of another: nothing is guessed."""
    stored_as("qwen3_moe", "fused", tmp_path)
    weights = dict(mx.load(str(tmp_path / "source" / "model.safetensors")))
    mx.eval(weights)
    name = next(name for name in weights if name.endswith("experts.down_proj"))
    weights[name] = mx.zeros((4, 96, 96), mx.bfloat16)
    write_mlx_checkpoint(tmp_path / "source", small_config("qwen3_moe"), weights)
    source = Source(tmp_path / "source")
    with pytest.raises(LayoutError, match=r"no place for .*experts\.down_proj"):
        layout_in_any_form(MLX_LM, Shown(load_config(tmp_path / "source"), source.infos), Request())


def test_an_expert_that_is_missing_is_not_made_up(tmp_path: Path) -> None:
    stored_as("qwen3_5_moe", "single", tmp_path)
    weights = dict(mx.load(str(tmp_path / "source" / "model.safetensors")))
    mx.eval(weights)
    gone = next(name for name in weights if ".experts.2.up_proj" in name)
    del weights[gone]
    write_mlx_checkpoint(tmp_path / "source", small_config("qwen3_5_moe"), weights)
    source = Source(tmp_path / "source")
    with pytest.raises(LayoutError):
        layout_in_any_form(MLX_LM, Shown(load_config(tmp_path / "source"), source.infos), Request())


@pytest.mark.slow
def test_experts_that_no_class_takes_stop_the_conversion(tmp_path: Path) -> None:
    """Most of the weights would stay 16 bits: that is said, and --layout keep does it knowingly."""
    stored_as("qwen3_5_moe", "fused", tmp_path)
    config = small_config("qwen3_5_moe")
    text = config["text_config"] | {"num_hidden_layers": 7}  # the class wants other layers
    weights = dict(mx.load(str(tmp_path / "source" / "model.safetensors")))
    mx.eval(weights)
    big = {name: mx.zeros((4, 512, 128), mx.bfloat16) for name in weights if "gate_up" in name}
    write_mlx_checkpoint(tmp_path / "source", config | {"text_config": text}, weights | big)
    with pytest.raises(requant.CheckpointError, match=r"\d\d% of the weights would stay BF16"):
        requant.plan(tmp_path / "source", bits=8, group_size=32)
    plan = requant.plan(tmp_path / "source", bits=8, group_size=32, layout="keep")
    first = note_texts(plan.notes)[0]
    assert re.search(r"\d\d% of the weights stay BF16: 6 tensors not named \.weight", first)
    assert "no library takes them" in first and "--layout mlx-lm gives" not in first


def test_a_note_advises_a_layout_that_works(tmp_path: Path) -> None:
    """Under kept names fused stacks stay dense; the note's advice is followed."""
    stored_as("gpt_oss", "transposed", tmp_path)
    plan = requant.plan(tmp_path / "source", bits=8, layout="keep", group_size=32)
    assert "--layout mlx-lm gives them such names and quantizes them" in note_texts(plan.notes)[0]
    followed = requant.plan(tmp_path / "source", bits=8, layout="mlx-lm", group_size=32)
    assert "another form for mlx-lm" in " ".join(note_texts(followed.notes))
    assert not [
        x
        for x in followed.layers
        if "experts" in x.layer and x.treatment == "dense" and x.is_weight
    ]


@pytest.mark.parametrize(("family", "loads"), [("qwen3_5_moe", False), ("qwen2_moe", True)])
def test_a_note_says_whether_mlx_lm_loads_kept_experts(family: str, loads: bool, tmp_path: Path):
    """Some classes stack codes too, others only dense weights; the loader is asked."""
    from mlx_lm.utils import load_model

    stored_as(family, "single", tmp_path)
    options = {"bits": 8, "group_size": 32, "layout": "keep"}
    report = requant.convert(tmp_path / "source", tmp_path / "out", **options)
    notes = [note for note in note_texts(report.plan.notes) if note.startswith("Experts keep")]
    assert len(notes) == (0 if loads else 1)
    if loads:
        load_model(tmp_path / "out", strict=True)
        return
    with pytest.raises(ValueError):
        load_model(tmp_path / "out", strict=True)
    assert "--layout mlx-lm stacks them" in notes[0]
    requant.convert(tmp_path / "source", tmp_path / "out2", **options | {"layout": "mlx-lm"})
    load_model(tmp_path / "out2", strict=True)
