"""Products by NumPy, held against MLX's own; and that they replace those of MLX only there."""

import threading
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.switch_layers import SwitchGLU
from pytest import MonkeyPatch

from requant.nn import blas_products as blas


@pytest.fixture
def counted(monkeypatch: MonkeyPatch) -> Iterator[list[str]]:
    """Names of the functions that computed something."""
    called: list[str] = []
    for name in ("_linear", "_experts", "_attention"):
        original = getattr(blas, name)

        def call(*args: Any, name: str = name, original: Any = original, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            called.extend([name] * (result is not None))
            return result

        monkeypatch.setattr(blas, name, call)
    yield called


def same(a: mx.array, b: mx.array) -> None:
    """Up to the rounding of sums, whose terms are as large as the largest results."""
    ours, theirs = np.array(a), np.array(b)
    assert ours.shape == theirs.shape
    largest = np.abs(theirs[np.isfinite(theirs)]).max(initial=0.0)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6 * largest)


def normal(seed: int, *shape: int) -> mx.array:
    return mx.array(np.random.default_rng(seed).normal(size=shape), mx.float32)


@pytest.mark.parametrize("tokens", [5, 100])  # mlx-lm sorts rows by expert from 64 on
def test_layers(tokens: int, counted: list[str]) -> None:
    """With and without bias; the fourth expert is never asked."""
    rng = np.random.default_rng(tokens)
    glu, linear = SwitchGLU(16, 24, 4, bias=tokens == 5), nn.Linear(16, 8, bias=tokens == 5)
    head = nn.Embedding(12, 16)
    glu.apply(lambda p: mx.array(rng.normal(size=p.shape), mx.float32))
    x = normal(tokens, 1, tokens, 16)
    chosen = mx.array([[rng.permutation(3)[:2].tolist() for _ in range(tokens)]], mx.uint32)
    plain = glu(x, chosen), linear(x), head.as_linear(x)
    with blas.blas_products():
        made = glu(x, chosen), linear(x), head.as_linear(x)
    assert counted == ["_experts"] * 3 + ["_linear"] * 2
    for ours, theirs in zip(made, plain, strict=True):
        same(ours, theirs)


def test_what_is_not_float32_is_left_to_mlx(counted: list[str]) -> None:
    """So is everything after the context, and on a GPU."""
    linear, x = nn.Linear(16, 8), normal(1, 3, 16)
    linear.set_dtype(mx.bfloat16)
    q = normal(2, 1, 2, 3, 4).astype(mx.bfloat16)
    with blas.blas_products():
        assert linear(x.astype(mx.bfloat16)).dtype == mx.bfloat16
        assert linear(x).dtype == mx.float32
        mx.fast.scaled_dot_product_attention(q, q, q, scale=1.0)
    nn.Linear(16, 8)(x)
    assert counted == []


def test_nothing_is_replaced_on_a_gpu(counted: list[str], monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(blas, "on_cpu", lambda: False)
    with blas.blas_products():
        nn.Linear(16, 8)(normal(1, 3, 16))
    assert counted == []


@pytest.mark.parametrize("queries", [1, 130, 300])  # one block of queries, and several
@pytest.mark.parametrize("mask", ["none", "causal", "window", "added", "heads"])
@pytest.mark.parametrize("sinks", [False, True])
def test_attention(queries: int, mask: str, sinks: bool, counted: list[str]) -> None:
    """Two heads of queries a head of keys; 20 keys come before the first query."""
    keys = queries + 20
    q, k, v = normal(1, 2, 4, queries, 8), normal(2, 2, 2, keys, 8), normal(3, 2, 2, keys, 6)
    rows, columns = np.arange(queries)[:, None] + 20, np.arange(keys)
    given: Any = {
        "none": None,
        "causal": "causal",
        "window": mx.array((columns <= rows) & (columns > rows - 9)),
        "added": normal(4, queries, keys),
        "heads": normal(5, 1, 4, queries, keys),
    }[mask]
    options = {"scale": 0.3, "mask": given, "sinks": normal(6, 4) if sinks else None}
    plain = mx.fast.scaled_dot_product_attention(q, k, v, **options)
    with blas.blas_products():
        made = mx.fast.scaled_dot_product_attention(q, k, v, **options)
    assert counted == ["_attention"]
    same(made, plain)


def test_a_query_that_sees_nothing() -> None:
    q = normal(1, 1, 1, 2, 4)
    mask = mx.array([[False, False], [True, True]])
    for given in (mask, mx.where(mask, 0.0, -np.inf)):
        plain = mx.fast.scaled_dot_product_attention(q, q, q, scale=1.0, mask=given)
        with blas.blas_products():
            made = mx.fast.scaled_dot_product_attention(q, q, q, scale=1.0, mask=given)
        same(made, plain)


def test_threads_change_no_bit(monkeypatch: MonkeyPatch) -> None:
    """Of products of several pieces."""
    linear, x = nn.Linear(64, 4100), normal(1, 1, 300, 64)
    q = normal(2, 1, 3, 300, 64)
    made = []
    for threads in (1, 4):
        monkeypatch.setattr("os.cpu_count", lambda threads=threads: threads)
        with blas.blas_products():
            attended = mx.fast.scaled_dot_product_attention(q, q, q, scale=0.1, mask="causal")
            made.append((np.array(linear(x)), np.array(attended)))
    for one, four in zip(*made, strict=True):
        assert one.tobytes() == four.tobytes()


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_are_limited(threads: int) -> None:
    """By the outermost context, also where products are inside another one."""
    seen: set[int] = set()
    ready = threading.Barrier(threads)

    def compute(number: int) -> None:
        seen.add(threading.get_ident())
        if number < threads:  # each thread takes one of these
            ready.wait(30)

    with blas.product_threads(threads), blas.blas_products():
        blas.in_parallel(compute, range(20))
    assert len(seen) == threads
    assert threading.get_ident() not in seen
