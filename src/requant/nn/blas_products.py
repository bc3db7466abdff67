"""Matrix products of float32 layers through NumPy's BLAS, where MLX computes on a CPU.

MLX's own products on a CPU take tens of times longer (``benchmarks/cpu_products.py``). Inside
``blas_products`` these are computed by NumPy at once, and no longer lazily:

- ``Linear`` and ``Embedding.as_linear`` of mlx, and the libraries' ``SwitchLinear`` (experts);
- ``mx.fast.scaled_dot_product_attention``, through which the libraries' classes compute attention.

Whatever is not float32, and all of it on a GPU, is left to MLX. Results differ by rounding.

Products are cut into pieces of fixed sizes, each computed by one thread: the number of threads
changes no bit, and threads do not wait for each other inside BLAS.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import product as pairs
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from requant.kernels.blas_threads import one_blas_thread
from requant.libraries import LIBRARIES
from requant.libraries.surroundings import replaced

if TYPE_CHECKING:
    import mlx.core as mx

_QUERIES = 128  # queries of causal attention at a time; keys after the last of them are skipped
_ROWS, _COLUMNS = 256, 4096  # of the product of a layer that one thread computes
_T = TypeVar("_T")
_pool: ThreadPoolExecutor | None = None  # threads of the outermost ``product_threads``


def on_cpu() -> bool:
    """Return whether MLX computes on a CPU."""
    import mlx.core as mx

    return bool(mx.default_device() == mx.Device(mx.cpu))


def expert_layers() -> list[type]:
    """The classes for stacks of experts, of the libraries that are imported."""
    names = [f"{x.package}.models.switch_layers" for x in LIBRARIES.values()]
    return [sys.modules[name].SwitchLinear for name in names if name in sys.modules]


@contextmanager
def blas_products() -> Iterator[None]:
    """Compute products of this thread by NumPy inside the context; nothing changes on a GPU."""
    if not on_cpu():
        yield
        return
    with product_threads(), _replaced_products():
        yield


@contextmanager
def product_threads(threads: int | None = None) -> Iterator[None]:
    """How many threads compute the products inside the context; one a processor by default.

    Each takes one thread of BLAS. Inside another such context nothing changes.
    """
    global _pool
    if _pool is not None:
        yield
        return
    with one_blas_thread(), ThreadPoolExecutor(threads or os.cpu_count() or 1) as _pool:
        try:
            yield
        finally:
            _pool = None


def in_parallel(function: Callable[[_T], object], items: Sequence[_T]) -> None:
    """Call a function of NumPy for each item: inside ``blas_products`` on several threads."""
    if _pool is None or len(items) < 2:
        for item in items:
            function(item)
    else:
        list(_pool.map(function, items))


@contextmanager
def _replaced_products() -> Iterator[None]:
    import mlx.core as mx
    from mlx.nn.layers.embedding import Embedding
    from mlx.nn.layers.linear import Linear

    replacements: list[tuple[Any, str, Callable[..., mx.array | None]]] = [
        (Linear, "__call__", _linear),
        (Embedding, "as_linear", _linear),
        *((kind, "__call__", _experts) for kind in expert_layers()),
        (mx.fast, "scaled_dot_product_attention", _attention),
    ]
    with ExitStack() as stack:
        # Compiled functions are traced, and a tracer has no values for NumPy.
        mx.disable_compile()
        if not os.environ.get("MLX_DISABLE_COMPILE"):
            stack.callback(mx.enable_compile)
        for owner, name, function in replacements:
            original = getattr(owner, name)
            stack.enter_context(replaced(owner, name, _or_original(function, original)))
        yield


def _or_original(
    function: Callable[..., mx.array | None], original: Callable[..., mx.array]
) -> Callable[..., mx.array]:
    """``function``, or the original where it returns None."""

    def call(*args: Any, **kwargs: Any) -> mx.array:
        result = function(*args, **kwargs)
        return original(*args, **kwargs) if result is None else result

    return call


def _are_float32(*arrays: mx.array) -> bool:
    import mlx.core as mx

    return all(array.dtype == mx.float32 for array in arrays)


def _view(x: mx.array) -> np.ndarray:
    """Evaluate an array; its values without a copy."""
    return np.array(x, copy=False)


# -- layers ----------------------------------------------------------------------------------


def _linear(layer: Any, x: mx.array) -> mx.array | None:
    import mlx.core as mx

    if not _are_float32(x, layer.weight):
        return None
    product = _product(_view(x).reshape(-1, x.shape[-1]), _view(layer.weight))
    if "bias" in layer:
        product += _view(layer.bias)
    return mx.array(product.reshape(*x.shape[:-1], -1))


def _product(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """``x @ weight.T``."""
    result = np.empty((len(x), len(weight)), np.float32)

    def compute(start: tuple[int, int]) -> None:
        rows, columns = slice(start[0], start[0] + _ROWS), slice(start[1], start[1] + _COLUMNS)
        result[rows, columns] = x[rows] @ weight[columns].T

    in_parallel(compute, [*pairs(range(0, len(x), _ROWS), range(0, len(weight), _COLUMNS))])
    return result


def _experts(layer: Any, x: mx.array, indices: mx.array, *_: Any, **__: Any) -> mx.array | None:
    import mlx.core as mx

    if not _are_float32(x, layer.weight):
        return None
    rows, weight = _view(rows_of_experts(x, indices)), _view(layer.weight)
    product = np.empty((len(rows), weight.shape[1]), np.float32)
    bias = _view(layer.bias) if "bias" in layer else None

    def compute(selected: tuple[int, np.ndarray]) -> None:
        expert, places = selected
        product[places] = rows[places] @ weight[expert].T
        if bias is not None:
            product[places] += bias[expert]

    in_parallel(compute, [*by_expert(x, indices)])
    return mx.array(product.reshape(*_batch(x, indices), x.shape[-2], -1))


def rows_of_experts(x: mx.array, indices: mx.array) -> mx.array:
    """The input of each place to the expert that it selects, ``(places * rows, in)``.

    Args:
        x: ``(..., rows, in)``; its axes before the last two are broadcast with ``indices``.
        indices: Numbers of experts.
    """
    import mlx.core as mx

    spread = mx.broadcast_to(x, (*_batch(x, indices), *x.shape[-2:]))
    return spread.reshape(-1, x.shape[-1])


def by_expert(x: mx.array, indices: mx.array) -> Iterator[tuple[int, np.ndarray]]:
    """Each selected expert, and the indices of its rows in ``rows_of_experts``."""
    places = np.broadcast_to(np.array(indices), _batch(x, indices))
    asked = np.repeat(places.reshape(-1), x.shape[-2])
    order = np.argsort(asked, kind="stable")
    experts, starts = np.unique(asked[order], return_index=True)
    for expert, rows in zip(experts, np.split(order, starts[1:]), strict=True):
        yield int(expert), rows


def _batch(x: mx.array, indices: mx.array) -> tuple[int, ...]:
    """Shape of the places that select an expert."""
    return np.broadcast_shapes(x.shape[:-2], indices.shape)


# -- attention -------------------------------------------------------------------------------


def _attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    scale: float,
    mask: mx.array | str | None = None,
    sinks: mx.array | None = None,
    **_: Any,
) -> mx.array | None:
    """Attention of ``q`` ``(batch, heads, queries, dims)``, as MLX's function documents it.

    ``k`` and ``v`` have ``(batch, kv_heads, keys, dims)``; a head of theirs serves
    ``heads / kv_heads`` heads of queries. ``mask`` is "causal", boolean (False: left out) or
    added to the scores; ``sinks`` ``(heads,)`` takes part in each softmax.
    """
    import mlx.core as mx

    if not _are_float32(q, k, v):
        return None
    batch, heads, queries, dims = q.shape
    kv_heads, keys = k.shape[1:3]
    shape = (batch, kv_heads, heads // kv_heads)
    grouped = _view(q).reshape(*shape, queries, dims)
    keys_of, values_of = _view(k), _view(v)
    output = np.empty((*shape, queries, v.shape[-1]), np.float32)
    is_causal = isinstance(mask, str)
    added = None
    if not (is_causal or mask is None):
        added = _scores_of_mask(mask, (batch, heads, queries, keys)).reshape(*shape, queries, keys)
    sink = None if sinks is None else _view(sinks.astype(mx.float32)).reshape(kv_heads, -1, 1, 1)

    def compute(part: tuple[int, int, int]) -> None:
        entry, head, start = part
        stop = min(start + _QUERIES, queries)
        # The last query sees all keys, one before it one key less, and so on.
        most = keys - queries + stop if is_causal else keys
        scaled = grouped[entry, head, :, start:stop] * np.float32(scale)
        scores = scaled @ keys_of[entry, head, :most].T
        if is_causal:
            later = np.triu(np.full((stop - start, stop - start), -np.inf, np.float32), 1)
            scores[..., most - (stop - start) :] += later
        elif added is not None:
            scores += added[entry, head, :, start:stop]
        weights = _softmax(scores, None if sink is None else sink[head])
        output[entry, head, :, start:stop] = weights @ values_of[entry, head, :most]

    parts = pairs(range(batch), range(kv_heads), range(0, queries, _QUERIES))
    in_parallel(compute, [*parts])
    return mx.array(output.reshape(batch, heads, queries, -1))


def _scores_of_mask(mask: Any, shape: tuple[int, ...]) -> np.ndarray:
    """A mask as float32 scores to add; where it is False the lowest finite one, as in MLX."""
    import mlx.core as mx

    if mask.dtype == mx.bool_:
        scores = np.where(_view(mask), np.float32(0.0), np.finfo(np.float32).min)
    else:
        scores = _view(mask.astype(mx.float32))
    return np.broadcast_to(scores, shape)


def _softmax(scores: np.ndarray, sink: np.ndarray | None) -> np.ndarray:
    """The softmax of each row, in place; ``sink`` is one more score, whose share is left out.

    A row whose scores are all -inf gives NaN, as in MLX.
    """
    highest = scores.max(-1, keepdims=True)
    if sink is not None:
        np.maximum(highest, sink, out=highest)
    with np.errstate(invalid="ignore"):
        scores -= highest
        np.exp(scores, out=scores)
        total = scores.sum(-1, keepdims=True)
        if sink is not None:
            total += np.exp(sink - highest)
        scores /= total
    return scores
