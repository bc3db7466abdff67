"""The trace: which results of a function are bytes of its inputs, and which are computed."""

import random

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from requant.layouts import tracer as tracing
from requant.layouts.byte_moves import BYTE_MOVE_RULES, MAX_PIECES, Traced
from requant.layouts.outputs import Extent
from requant.layouts.tracer import trace
from tests.support.mlx_reference import as_bytes


def put_together(traced: Traced, arrays: dict[str, mx.array]) -> bytes:
    """The bytes that the pieces name."""
    assert traced.pieces is not None
    data = {name: as_bytes(array) for name, array in arrays.items()}
    return b"".join(data[p.tensor][start:stop] for p in traced.pieces for start, stop in p.ranges)


def test_untouched_and_renamed():
    a = mx.zeros((2, 3), mx.float32)
    result = trace(lambda w: {"x": w["a"], "y": w["b"]}, {"a": a, "b": mx.zeros((4,), mx.uint8)})
    assert result["x"].pieces == (Extent("a", 0, 24),)
    assert result["y"] == Traced((4,), mx.uint8, (Extent("b", 0, 4),), ("b",))


def test_stacked_and_split_by_hand():
    """Two tensors of 2 x 4 bytes; rows of 4."""
    arrays = {"a": mx.zeros((2, 4), mx.uint8), "b": mx.zeros((2, 4), mx.uint8)}

    def rule(w):
        stack = mx.stack([w["b"], w["a"]])
        return {
            "stack": stack,
            "second rows": mx.contiguous(stack[:, 1:]),
            "joined columns": mx.concatenate([w["a"], w["b"]], axis=1),
        }

    result = trace(rule, arrays)
    assert result["stack"].pieces == (Extent("b", 0, 8), Extent("a", 0, 8))
    assert result["second rows"].pieces == (Extent("b", 4, 8), Extent("a", 4, 8))
    assert result["joined columns"].pieces == (
        Extent("a", 0, 4),
        Extent("b", 0, 4),
        Extent("a", 4, 8),
        Extent("b", 4, 8),
    )


@pytest.mark.parametrize(
    "rule",
    [
        lambda a: a + 1,
        lambda a: a.T,
        lambda a: a.astype(mx.float16),
        lambda a: a[::-1],
        lambda a: mx.take(a, mx.array([1, 0]), axis=0),
        lambda a: mx.broadcast_to(a[:1], (4, 8)),
        lambda a: mx.pad(a, 1),
        lambda a: mx.from_fp8(a.view(mx.uint8), mx.bfloat16),
        lambda a: mx.quantize(a.reshape(1, 32), group_size=32, bits=4)[0],
        lambda a: a * mx.zeros((4, 8)),
        lambda a: mx.sort(a),
        lambda a: mx.where(a > 0, a, a),
    ],
)
def test_computed(rule):
    traced = trace(lambda w: {"x": rule(w["a"])}, {"a": mx.zeros((4, 8)), "b": mx.zeros(3)})["x"]
    assert traced.pieces is None
    assert traced.sources == ("a",)


def test_a_constant_needs_nothing():
    traced = trace(lambda w: {"x": mx.array([1.0, 2.0])}, {"a": mx.zeros(3)})["x"]
    assert (traced.pieces, traced.sources) == (None, ())


def test_looking_at_values_is_an_error():
    with pytest.raises(ValueError, match="not allowed"):
        trace(lambda w: {"x": w["a"] if w["a"][0].item() else -w["a"]}, {"a": mx.zeros(3)})


def test_an_error_of_the_rule_comes_through_and_leaves_mlx_whole():
    contiguous, from_fp8 = mx.contiguous, mx.from_fp8
    with pytest.raises(KeyError, match="absent"):
        trace(lambda w: {"x": w["absent"]}, {"a": mx.zeros(3)})
    assert (mx.contiguous, mx.from_fp8) == (contiguous, from_fp8)


def test_too_many_pieces_are_computed():
    arrays = {"a": mx.zeros((MAX_PIECES + 1, 4), mx.uint8)}
    result = trace(lambda w: {"x": w["a"][:, :2], "y": w["a"][1:, :2]}, arrays)
    assert result["x"].pieces is None
    assert result["x"].sources == ("a",)
    assert result["y"].pieces is not None and len(result["y"].pieces) == MAX_PIECES


def test_many_whole_tensors_are_not_too_many():
    arrays = {f"e{i}": mx.zeros((2,), mx.uint8) for i in range(MAX_PIECES + 5)}
    traced = trace(lambda w: {"x": mx.stack(list(w.values()))}, arrays)["x"]
    assert traced.pieces is not None and len(traced.pieces) == MAX_PIECES + 5


def test_every_rule_agrees_with_this_mlx():
    """The trials remove no rule, and each rule has a trial that moves bytes."""
    assert tracing._verified_rules() == BYTE_MOVE_RULES
    a = mx.arange(72, dtype=mx.uint32).reshape(3, 4, 6)
    for name, trial in tracing._TRIALS.items():
        result = trace(
            lambda w, trial=trial: {str(i): x for i, x in enumerate(trial(w["a"]))}, {"a": a}
        )
        moved = [x.pieces is not None for x in result.values()]
        assert any(moved) or name == "AsType", name
    assert tracing._TRIALS.keys() == BYTE_MOVE_RULES.keys()


def test_a_wrong_rule_is_removed(monkeypatch):
    wrong = BYTE_MOVE_RULES | {"Slice": BYTE_MOVE_RULES["Reshape"]}

    def lying(arguments, inputs, outputs):
        (value,), (output,) = inputs, outputs
        return [(Extent(value.pieces[0].tensor, 0, output.nbytes),)]

    wrong["Slice"] = lying
    monkeypatch.setattr(tracing, "BYTE_MOVE_RULES", wrong)
    assert "Slice" not in tracing._verified_rules.__wrapped__()


OPERATIONS = [
    lambda r, x: x.reshape(-1, x.shape[-1]),
    lambda r, x: x.reshape(2, -1) if x.size % 2 == 0 else x,
    lambda r, x: x[r.randrange(max(1, x.shape[0] - 1)) :],
    lambda r, x: x[..., : max(1, x.shape[-1] // 2)],
    lambda r, x: x[:: r.choice([1, 2])],
    lambda r, x: x[..., ::2],
    lambda r, x: x[None],
    lambda r, x: x[:, None],
    lambda r, x: x.squeeze(),
    lambda r, x: mx.contiguous(x),
    lambda r, x: mx.moveaxis(x, 0, -1),
    lambda r, x: mx.swapaxes(x, 0, -1),
    lambda r, x: mx.stack([x, x], axis=r.randrange(x.ndim + 1)),
    lambda r, x: mx.concatenate([x, x], axis=r.randrange(x.ndim)),
    lambda r, x: mx.split(x, [max(1, x.shape[0] // 2)], axis=0)[0],
    lambda r, x: mx.split(x, [max(1, x.shape[-1] // 2)], axis=-1)[0],
    lambda r, x: mx.flatten(x, 0, 1) if x.ndim > 1 else x,
    lambda r, x: x.view(mx.uint8),
]


@pytest.mark.parametrize("seed", range(60))
def test_chains_of_operations(seed):
    """Whatever is called moved is what MLX computes, for random chains."""
    arrays = {
        name: mx.array(np.random.default_rng(seed + i).integers(0, 1 << 16, (4, 3, 8)), mx.uint16)
        for i, name in enumerate("ab")
    }

    def rule(weights):
        r = random.Random(seed)
        x = mx.concatenate([weights["b"], weights["a"][1:3]], axis=0)
        made = {}
        for step in range(6):
            if x.ndim == 0 or x.size == 0 or x.size > 4096:
                break
            x = r.choice(OPERATIONS)(r, x)
            made[str(step)] = x
        return made

    expected = rule(arrays)
    for name, traced in trace(rule, arrays).items():
        assert (tuple(expected[name].shape), expected[name].dtype) == (traced.shape, traced.dtype)
        if traced.pieces is not None:
            assert put_together(traced, arrays) == as_bytes(expected[name]), f"seed {seed}: {name}"
            assert set(traced.sources) == {piece.tensor for piece in traced.pieces}
        else:
            assert set(traced.sources) <= {"a", "b"} and traced.sources


@given(
    st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5)),
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 4), st.integers(0, 5), st.integers(1, 3)),
        max_size=4,
    ),
    st.booleans(),
)
def test_any_slices_of_slices(
    shape: tuple[int, int, int], cuts: list[tuple[int, int, int, int]], joined: bool
):
    """Strided pieces are cut, joined and cut again as MLX does it."""
    arrays = {"a": mx.array(np.arange(np.prod(shape), dtype=np.uint8).reshape(shape))}

    def rule(weights):
        whole = array = weights["a"]
        for axis, start, length, step in cuts:
            chosen = [slice(None)] * 3
            chosen[axis] = slice(start, start + length, step)
            array = array[tuple(chosen)]
        if joined and array.size:
            array = mx.concatenate([array, whole[:, : array.shape[1], : array.shape[2]]])
        return {"x": array}

    assume(rule(arrays)["x"].size)
    traced = trace(rule, arrays)["x"]
    assert put_together(traced, arrays) == as_bytes(rule(arrays)["x"])


def test_every_other_row_is_one_piece():
    arrays = {"a": mx.zeros((3, 2 * MAX_PIECES, 4), mx.uint8)}
    result = trace(lambda w: {"x": w["a"][:, 1::2], "y": w["a"][..., ::2, :][1:2]}, arrays)
    assert result["x"].pieces == (Extent("a", 4, 8, 8, 3 * MAX_PIECES),)
    assert result["y"].pieces == (Extent("a", 8 * MAX_PIECES, 8 * MAX_PIECES + 4, 8, MAX_PIECES),)
