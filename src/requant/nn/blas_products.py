"""Matrix products of float32 layers through NumPy's BLAS, where MLX computes on a CPU.

MLX's own products on a CPU take tens of times longer (``benchmarks/cpu_products.py``). Inside
``blas_products`` these are computed by NumPy at once, and no longer lazily:

- ``Linear`` and ``Embedding.as_linear`` of mlx, and the libraries' ``SwitchLinear`` (experts);
- ``mx.fast.scaled_dot_product_attention``, through which the libraries' classes compute attention.

Whatever is not float32, and all of it on a GPU, is left to MLX. Results differ by rounding.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from requant.libraries import LIBRARIES
from requant.libraries.surroundings import replaced

if TYPE_CHECKING:
    import mlx.core as mx

_QUERIES = 128  # queries of causal attention at a time; keys after the last of them are skipped


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
    import mlx.core as mx
    from mlx.nn.layers.embedding import Embedding
    from mlx.nn.layers.linear import Linear

    if not on_cpu():
        yield
        return
    replacements: list[tuple[Any, str, Callable[..., mx.array | None]]] = [
        (Linear, "__call__", _linear),
        (Embedding, "as_linear", _linear),
        *((kind, "__call__", _experts) for kind in expert_layers()),
        (mx.fast, "scaled_dot_product_attention", _attention),
    ]
    with ExitStack() as stack:
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
    product = _view(x).reshape(-1, x.shape[-1]) @ _view(layer.weight).T
    if "bias" in layer:
        product += _view(layer.bias)
    return mx.array(product.reshape(*x.shape[:-1], -1))


def _experts(layer: Any, x: mx.array, indices: mx.array, *_: Any, **__: Any) -> mx.array | None:
    import mlx.core as mx

    if not _are_float32(x, layer.weight):
        return None
    rows, weight = _view(rows_of_experts(x, indices)), _view(layer.weight)
    product = np.empty((len(rows), weight.shape[1]), np.float32)
    for expert, places in by_expert(x, indices):
        product[places] = rows[places] @ weight[expert].T
        if "bias" in layer:
            product[places] += _view(layer.bias)[expert]
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
    grouped = _view(q).reshape(*shape, queries, dims) * np.float32(scale)
    keys_t, values = _view(k).swapaxes(-1, -2)[:, :, None], _view(v)[:, :, None]
    output = np.empty((*shape, queries, v.shape[-1]), np.float32)
    causal, added = isinstance(mask, str), None
    if not (causal or mask is None):
        added = _scores_of_mask(mask, (batch, heads, queries, keys)).reshape(*shape, queries, keys)
    sink = None if sinks is None else np.asarray(_view(sinks), np.float32)
    for start in range(0, queries, _QUERIES):
        stop = min(start + _QUERIES, queries)
        # The last query sees all keys, one before it one key less, and so on.
        most = keys - queries + stop if causal else keys
        scores = grouped[..., start:stop, :] @ keys_t[..., :most]
        if causal:
            later = np.triu(np.full((stop - start, stop - start), -np.inf, np.float32), 1)
            scores[..., most - (stop - start) :] += later
        elif added is not None:
            scores += added[..., start:stop, :]
        weights = _softmax(scores, None if sink is None else sink.reshape(1, *shape[1:], 1, 1))
        np.matmul(weights, values[..., :most, :], out=output[..., start:stop, :])
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
