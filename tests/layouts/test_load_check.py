"""Whether mlx-lm loads an output, from its names and shapes alone."""

from collections.abc import Mapping
from dataclasses import replace

import mlx.core as mx
import pytest

from requant.core.dtypes import TensorInfo
from requant.layouts.load_check import why_unloadable
from requant.layouts.tracer import run_without_values
from requant.sources.open import read_checkpoint
from tests.support.checkpoints import MICRO_LLAMA

NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def infos() -> dict[str, TensorInfo]:
    return {name: x.info for name, x in read_checkpoint(MICRO_LLAMA).tensors.items()}


def why(infos: Mapping[str, TensorInfo]) -> str:
    return why_unloadable(dict(read_checkpoint(MICRO_LLAMA).config), infos)


def test_a_model_as_its_class_has_it_loads(infos: dict[str, TensorInfo]) -> None:
    assert why(infos) == ""


def test_names_and_shapes_are_compared(infos: dict[str, TensorInfo]) -> None:
    rows, columns = infos[NAME].shape
    shape = replace(infos[NAME], shape=(rows + 1, columns))
    assert f"({rows + 1}, {columns})" in why(infos | {NAME: shape})
    assert f"without a tensor of the source: {NAME}" in why(
        {name: x for name, x in infos.items() if name != NAME}
    )
    assert "has no place for 1 tensor: further.weight" in why(infos | {"further.weight": shape})


def test_one_placeholder_has_many_names() -> None:
    seen: list[dict[str, mx.array]] = []
    names = {f"layers.{n}": n % 2 for n in range(1000)}
    run_without_values(seen.append, names, {n: mx.zeros((n + 1, 4)) for n in range(2)})
    (weights,) = seen
    assert [weights[f"layers.{n}"].shape for n in range(4)] == [(1, 4), (2, 4)] * 2
    assert len({id(x) for x in weights.values()}) == 2


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -3])
def test_stacks_have_their_shape(axis: int) -> None:
    shapes: list[tuple[int, ...]] = []

    def stack(weights: dict[str, mx.array]) -> None:
        one, other = weights["a"], weights["b"]
        shapes.extend(mx.stack(x, axis).shape for x in ([one] * 3, [one, other, one]))

    run_without_values(stack, {"a": 0, "b": 1}, {0: mx.zeros((2, 4)), 1: mx.zeros((2, 4))})
    assert shapes == [mx.stack([mx.zeros((2, 4))] * 3, axis).shape] * 2


def test_values_cannot_be_looked_at() -> None:
    with pytest.raises(ValueError, match="function transformations"):
        run_without_values(lambda weights: weights["a"].item(), {"a": 0}, {0: mx.zeros(1)})
