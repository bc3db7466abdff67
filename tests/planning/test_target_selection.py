"""The precedence of everything that decides what a layer becomes."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from requant.checkpoints.checkpoint import Checkpoint, StoredTensor
from requant.core.dtypes import TensorInfo
from requant.core.reasons import Reason, ReasonCode
from requant.formats import SourceLayer, SourceLayout
from requant.formats.base import DefaultPolicy, dense_layer
from requant.layouts.relayout import Relayout
from requant.planning.target_selection import RULES, LayerDecision, TargetSelector
from requant.quantization.config import SKIP, Quantization, QuantMode
from requant.quantization.options import ConvertOptions
from requant.quantization.recipes import Recipe, Rule
from requant.sources.open import read_checkpoint
from tests.support.checkpoints import write_folder

Q, UP, NORM = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj", "model.norm"
ROUTER, TOWER, ODD = "model.layers.0.mlp.gate", "vision_tower.layers.0.q_proj", "model.odd_proj"
SHAPES = {Q: (64, 128), UP: (512, 128), NORM: (128,), ROUTER: (8, 128), TOWER: (64, 128)}
SHAPES |= {ODD: (64, 96)}
FOUR, EIGHT, THREE = (Quantization.affine(64, bits) for bits in (4, 8, 3))
MXFP4 = Quantization(32, 4, QuantMode.MXFP4)
CODES = ReasonCode


def dense(path: str) -> SourceLayer:
    info = TensorInfo("BF16", SHAPES[path])
    return dense_layer(StoredTensor(f"{path}.weight", info, "model.safetensors", 0))


def quantized(path: str) -> SourceLayer:
    return replace(dense(path), encoding=FOUR)


def act_order(path: str) -> SourceLayer:
    """Codes that MLX cannot hold, and what becomes of them if nothing is requested."""
    return replace(
        dense(path),
        stored_description="gptq 4-bit act-order",
        policy=DefaultPolicy(fallback=EIGHT, act_order=True),
    )


def recipe(spec: str, **conditions: Any) -> Recipe:
    return Recipe("mine", rules=(Rule(spec, **conditions),), is_builtin=False)


def options(target: Quantization | None = FOUR, **others: Any) -> ConvertOptions:
    return ConvertOptions(quantization=target, **others)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    tensors = {f"{UP}.weight": ("BF16", [512, 128])}
    return read_checkpoint(write_folder(tmp_path / "source", {"model.safetensors": tensors}))


def decide(
    checkpoint: Checkpoint,
    layer: SourceLayer,
    asked: ConvertOptions,
    relayout: Relayout | None = None,
    format_name: str = "dense",
) -> LayerDecision:
    """The decision about a layer next to a large one that is stored alike."""
    large = replace(dense(UP), encoding=layer.encoding)
    layout = SourceLayout((layer, large))
    selector = TargetSelector(checkpoint, format_name, layout, asked, relayout)
    return selector.decide(layer)


AT_8, SKIPS = (("q_proj", EIGHT),), (("q_proj", SKIP),)
NAMED, COUNTS = recipe("8", match="q_proj"), recipe("8", first=1)
DEQUANTIZE = options(None, dequantize=True)
DENSE = {
    "the default": (Q, options(), FOUR, None),
    "an override over the default": (Q, options(overrides=AT_8), EIGHT, None),
    "the last override": (Q, options(overrides=(("q_proj", SKIP), ("q_proj", EIGHT))), EIGHT, None),
    "an override that skips": (Q, options(overrides=SKIPS), None, CODES.SKIPPED_BY_OVERRIDE),
    "not finite over an override": (
        Q,
        options(overrides=AT_8, nonfinite_layers=frozenset({Q})),
        None,
        CODES.NONFINITE,
    ),
    "an override over only": (Q, options(overrides=AT_8, only=("mlp",)), EIGHT, None),
    "an override over dequantize": (Q, options(None, overrides=AT_8, dequantize=True), EIGHT, None),
    "only over dequantize": (
        Q,
        options(None, only=("mlp",), dequantize=True),
        None,
        CODES.NOT_IN_ONLY,
    ),
    "only over a recipe": (Q, options(only=("mlp",), recipe=NAMED), None, CODES.NOT_IN_ONLY),
    "a recipe that skips": (
        Q,
        options(recipe=recipe("skip", match="q_proj")),
        None,
        CODES.SKIPPED_BY_RECIPE,
    ),
    "a recipe over the default": (Q, options(recipe=NAMED), EIGHT, None),
    "an override over a recipe": (
        Q,
        options(recipe=NAMED, overrides=(("q_proj", THREE),)),
        THREE,
        None,
    ),
    "a vector": (NORM, options(), None, None),
    "a router": (ROUTER, options(), None, CODES.ROUTER),
    "a router that a recipe means": (
        ROUTER,
        options(recipe=recipe("8", roles=("router",))),
        EIGHT,
        None,
    ),
    "a recipe that only counts blocks": (ROUTER, options(recipe=COUNTS), None, CODES.ROUTER),
    "a tower": (TOWER, options(), None, CODES.TOWER),
    "a tower under an override": (TOWER, options(overrides=(("tower", EIGHT),)), EIGHT, None),
    "a tower that a recipe names": (TOWER, options(recipe=recipe("8", match="tower")), EIGHT, None),
    "a tower that a recipe has by its role": (
        TOWER,
        options(recipe=recipe("8", roles=("q_proj",))),
        None,
        CODES.TOWER,
    ),
    "a tower that only names": (TOWER, options(only=("tower",)), FOUR, None),
    "a group that does not divide": (
        ODD,
        options(),
        Quantization.affine(32, 4),
        CODES.SMALLER_GROUP_SIZE,
    ),
}


@pytest.mark.parametrize("case", DENSE)
def test_a_dense_layer(checkpoint: Checkpoint, case: str) -> None:
    path, asked, target, code = DENSE[case]
    made = decide(checkpoint, dense(path), asked)
    assert (made.target, made.reason_code, made.problem) == (target, code, None)


QUANTIZED = {
    "nothing requested": (options(None), FOUR, None),
    "more bits": (options(EIGHT), EIGHT, None),
    "another mode": (options(MXFP4), MXFP4, None),
    "its own group": (options(Quantization.affine(128, 8), bits=8), EIGHT, CODES.SOURCE_GROUP_SIZE),
    "only": (options(EIGHT, only=("mlp",)), FOUR, CODES.NOT_IN_ONLY),
    "only over dequantize": (
        options(None, only=("mlp",), dequantize=True),
        FOUR,
        CODES.NOT_IN_ONLY,
    ),
    "dequantize": (DEQUANTIZE, None, None),
    "a skip keeps codes": (options(EIGHT, overrides=SKIPS), FOUR, CODES.SKIPPED_BY_OVERRIDE),
    "a recipe's skip keeps codes": (
        options(EIGHT, recipe=recipe("skip", match="q_proj")),
        FOUR,
        CODES.SKIPPED_BY_RECIPE,
    ),
    "not finite keeps codes": (
        options(EIGHT, nonfinite_layers=frozenset({Q})),
        FOUR,
        CODES.NONFINITE,
    ),
}


@pytest.mark.parametrize("case", QUANTIZED)
def test_a_quantized_layer(checkpoint: Checkpoint, case: str) -> None:
    asked, target, code = QUANTIZED[case]
    made = decide(checkpoint, quantized(Q), asked, format_name="mlx")
    assert (made.target, made.reason_code, made.problem) == (target, code, None)


@pytest.mark.parametrize(
    ("asked", "target"),
    [
        (options(None), EIGHT),
        (options(None, act_order="dense"), None),
        (options(FOUR, act_order="dense"), FOUR),
    ],
)
def test_an_act_order_layer(
    checkpoint: Checkpoint, asked: ConvertOptions, target: Quantization | None
) -> None:
    assert decide(checkpoint, act_order(Q), asked, format_name="gptq").target == target


def mlx_lm(targets: dict[str, Quantization], *, able: bool = True, extra: bool = False) -> Relayout:
    """What mlx-lm decides; no more of a ``Relayout`` than decisions read."""
    name, reason = f"{Q}.weight", Reason(CODES.DENSE_BY_LIBRARY, "dense in this model")
    layout = SimpleNamespace(
        targets=targets,
        dense_reasons={} if targets else {Q: reason},
        quantizable=frozenset({Q} if able else ()),
        tensors={} if extra else {name: None},
        dtypes={},
        library=SimpleNamespace(recipes=frozenset()),
    )
    shown = {name: dense(Q)}
    made = SimpleNamespace(
        layout=layout, source_layers=shown, extra_tensors=(name,) if extra else ()
    )
    return cast(Relayout, made)


UNUSED = mlx_lm({}, extra=True)
MLX_LM = {
    "its choice": (mlx_lm({Q: FOUR}), options(), FOUR, None),
    "its choice of a dense layer": (mlx_lm({}), options(), None, CODES.DENSE_BY_LIBRARY),
    "a recipe over its choice": (mlx_lm({Q: FOUR}), options(recipe=NAMED), EIGHT, None),
    "a recipe that means what it leaves dense": (mlx_lm({}), options(recipe=NAMED), EIGHT, None),
    "a recipe that counts blocks, of what it leaves dense": (
        mlx_lm({}),
        options(recipe=COUNTS),
        None,
        CODES.DENSE_BY_LIBRARY,
    ),
    "an override over its choice": (mlx_lm({Q: FOUR}), options(overrides=AT_8), EIGHT, None),
    "only over its choice": (mlx_lm({Q: FOUR}), options(only=("mlp",)), None, CODES.NOT_IN_ONLY),
    "what it has no use for": (UNUSED, options(), None, CODES.UNUSED_BY_CLASS),
    "what it has no use for, over only": (
        UNUSED,
        options(only=("mlp",)),
        None,
        CODES.UNUSED_BY_CLASS,
    ),
    "an override of what it has no use for": (UNUSED, options(overrides=AT_8), EIGHT, None),
    "dequantize over what it has no use for": (UNUSED, DEQUANTIZE, None, None),
}


@pytest.mark.parametrize("case", MLX_LM)
def test_a_layer_in_mlx_lm_s_layout(checkpoint: Checkpoint, case: str) -> None:
    relayout, asked, target, code = MLX_LM[case]
    made = decide(checkpoint, dense(Q), asked, relayout)
    assert (made.target, made.reason_code, made.problem) == (target, code, None)


def test_what_the_class_holds_dense_is_dense_and_an_override_is_a_problem(checkpoint: Checkpoint):
    asked = options(overrides=AT_8)
    made = decide(checkpoint, dense(Q), asked, mlx_lm({}, able=False))
    assert (made.target, made.reason_code) == (None, CODES.DENSE_IN_CLASS)
    assert made.problem is not None
    assert "--layout keep does not ask it" in made.problem.message


@pytest.mark.parametrize(
    ("path", "words"),
    [(NORM, "a vector is not quantized"), (ODD, "not a multiple of group size 64")],
)
def test_an_override_that_cannot_be_met_exactly(checkpoint: Checkpoint, path: str, words: str):
    made = decide(checkpoint, dense(path), options(overrides=((path, EIGHT),)))
    assert made.problem is not None
    assert words in made.problem.message


def test_an_override_of_a_part_of_a_model_leaves_out_its_norms(checkpoint: Checkpoint) -> None:
    asked = options(overrides=(("model", EIGHT),))
    layout = SourceLayout((dense(Q), dense(NORM)))
    selector = TargetSelector(checkpoint, "dense", layout, asked)
    matrix, norm = selector.select()
    assert (matrix.target, norm.target) == (EIGHT, None)
    assert matrix.problem is None
    assert norm.problem is None


def test_every_rule_says_what_it_decides() -> None:
    """``RULES`` and these sentences are what maintainers read."""
    assert len({rule.__doc__ for rule in RULES}) == len(RULES)
    assert all(rule.__doc__ for rule in RULES)
