"""Sums over the inputs of linear layers, collected while a model runs.

The layers are observed through their classes' ``__call__``: MLX's ``Linear``, the libraries'
``SwitchLinear`` (experts, each by its own tokens) and the embedding where it is the head. Sums are
of float64, Hessians of float32; their size does not depend on the length of the text.

On a CPU the observed layers can be multiplied by NumPy, whose BLAS is many times faster there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from requant.importance.layer_names import layer_key, same_input
from requant.importance.reader import LayerStatistics
from requant.libraries import LIBRARIES

if TYPE_CHECKING:
    import mlx.core as mx
    from mlx.nn.layers.base import Module

    from requant.calibration.text_model import TextModel


def hessian_bytes(matrices: int, n_in: int) -> int:
    """Bytes of the Hessians of a layer's matrices."""
    return 4 * matrices * n_in * n_in


class Sums:
    """Sums over the inputs of one layer, or of a stack of experts."""

    def __init__(self, experts: int, n_in: int, with_hessian: bool, stacked: bool) -> None:
        self.stacked = stacked
        self.count = np.zeros(experts, np.float64)
        self.squares = np.zeros((experts, n_in), np.float64)
        self.absolutes = np.zeros((experts, n_in), np.float64)
        self.products = np.zeros((experts, n_in, n_in), np.float32) if with_hessian else None

    def add(self, x: np.ndarray, expert: int = 0) -> None:
        """Add inputs, float32 ``(tokens, in)``, of one matrix."""
        self.count[expert] += len(x)
        self.squares[expert] += np.einsum("ti,ti->i", x, x, dtype=np.float64)
        self.absolutes[expert] += np.abs(x).sum(0, dtype=np.float64)
        if self.products is not None:
            self.products[expert] += x.T @ x

    def are_finite(self) -> bool:
        """Whether none is NaN or infinite."""
        return bool(np.isfinite(self.squares).all())

    def statistics(self) -> LayerStatistics:
        """The means; zeros where nothing was seen."""
        over = np.maximum(self.count, 1.0)[:, None]
        means = [(sums / over).astype(np.float32) for sums in (self.squares, self.absolutes)]
        if not self.stacked:
            means = [mean[0] for mean in means]
        return LayerStatistics(means[0], self.count, means[1])

    def hessian(self) -> np.ndarray:
        """The mean of ``x x^T``, symmetric."""
        assert self.products is not None
        means = self.products / np.maximum(self.count, 1.0).astype(np.float32)[:, None, None]
        return means if self.stacked else means[0]

    @property
    def hessian_shape(self) -> tuple[int, ...]:
        """Shape of what ``hessian`` gives."""
        experts, n_in = self.squares.shape
        return (experts, n_in, n_in) if self.stacked else (n_in, n_in)


@dataclass(frozen=True, slots=True)
class _Note:
    """An input of a layer; not evaluated yet."""

    path: str
    x: mx.array
    experts: mx.array | None
    matrices: int


class Collector:
    """Observes layers, and sums over their inputs."""

    def __init__(
        self,
        paths: Mapping[int, str],
        with_hessians: bool,
        most_hessian_bytes: int,
        *,
        with_numpy: bool = False,
    ) -> None:
        """Watch the layers of ``paths``: ``id`` of a module -> its path.

        ``with_numpy``: evaluate at once, and multiply by NumPy, what is float32.
        """
        self.with_numpy = with_numpy
        self.paths, self.with_hessians, self.most = paths, with_hessians, most_hessian_bytes
        self.sums: dict[str, Sums] = {}  # of layers that read one input, the first represents all
        self.too_wide: set[str] = set()  # layers whose Hessian is more than ``most_hessian_bytes``
        self.called: set[str] = set()
        self._notes: list[_Note] = []

    @contextmanager
    def observing(self) -> Iterator[None]:
        """Note the inputs of the layers inside the context."""
        from mlx.nn.layers.embedding import Embedding
        from mlx.nn.layers.linear import Linear

        kinds: tuple[tuple[type, str, Callable[..., mx.array | None]], ...] = (
            (Linear, "__call__", self._linear),
            *((kind, "__call__", self._experts) for kind in _expert_layers()),
            (Embedding, "as_linear", self._head),
        )
        before = [getattr(kind, name) for kind, name, _ in kinds]
        try:
            for (kind, name, watch), original in zip(kinds, before, strict=True):
                setattr(kind, name, _watched(original, watch))
            yield
        finally:
            for (kind, name, _), original in zip(kinds, before, strict=True):
                setattr(kind, name, original)

    def _head(self, layer: Module, x: mx.array) -> None:
        path = self.paths.get(id(layer))
        if path is not None:
            self._note(_Note(path, x, None, 1))

    def _linear(self, layer: Module, x: mx.array) -> mx.array | None:
        self._head(layer, x)
        return _product(layer, x) if self._multiplies(layer) else None

    def _experts(
        self, layer: Module, x: mx.array, indices: mx.array, *_: Any, **__: Any
    ) -> mx.array | None:
        path = self.paths.get(id(layer))
        if path is not None:
            self._note(_Note(path, x, indices, layer.weight.shape[0]))
        return _products(layer, x, indices) if self._multiplies(layer) else None

    def _multiplies(self, layer: Module) -> bool:
        import mlx.core as mx

        return self.with_numpy and id(layer) in self.paths and layer.weight.dtype == mx.float32

    def _note(self, note: _Note) -> None:
        self.called.add(note.path)
        if not any(_share(note, other) for other in self._notes):
            self._notes.append(note)

    def flush(self, *others: mx.array) -> None:
        """Evaluate the noted inputs together with ``others``, and add them to the sums."""
        import mlx.core as mx

        arrays = [a for note in self._notes for a in (note.x, note.experts) if a is not None]
        mx.eval(*arrays, *others)
        for note in self._notes:
            self._add(note)
        self._notes.clear()

    def _add(self, note: _Note) -> None:
        import mlx.core as mx

        n_in = note.x.shape[-1]
        if note.path not in self.sums:
            wide = hessian_bytes(note.matrices, n_in) > self.most
            if self.with_hessians and wide:
                self.too_wide.add(note.path)
            wanted = self.with_hessians and not wide
            stacked = note.experts is not None
            self.sums[note.path] = Sums(note.matrices, n_in, wanted, stacked)
        sums = self.sums[note.path]
        if note.experts is None:
            sums.add(np.array(note.x.astype(mx.float32), copy=False).reshape(-1, n_in))
            return
        x = _rows_of_experts(note.x, note.experts)
        for expert, places in _by_expert(note.x, note.experts):
            sums.add(x[places], expert)


def observed_layers(model: TextModel) -> dict[int, str]:
    """``id`` -> path of the layers to watch; embeddings too, since one may be the head."""
    from mlx.nn.layers.linear import Linear

    kinds = (Linear, *_expert_layers())
    layers = {id(m): path for path, m in model.named_modules() if isinstance(m, kinds)}
    return layers | embedding_layers(model)


def embedding_layers(model: TextModel) -> dict[int, str]:
    """``id`` -> path of the embeddings."""
    from mlx.nn.layers.embedding import Embedding

    return {id(m): path for path, m in model.named_modules() if isinstance(m, Embedding)}


def unobserved_layers(model: TextModel) -> list[str]:
    """Layers of other classes that are quantized all the same."""
    watched = observed_layers(model)
    return [
        path
        for path, m in model.named_modules()
        if hasattr(m, "to_quantized") and id(m) not in watched
    ]


def _expert_layers() -> list[type]:
    """The classes for stacks of experts, of the libraries that are imported."""
    names = [f"{x.package}.models.switch_layers" for x in LIBRARIES.values()]
    return [sys.modules[name].SwitchLinear for name in names if name in sys.modules]


def _share(note: _Note, other: _Note) -> bool:
    """Whether two layers read one input, and are found under each other's names."""
    if note.x is not other.x or note.experts is not other.experts:
        return False
    mine, theirs = layer_key(note.path), layer_key(other.path)
    return mine is not None and theirs is not None and theirs in same_input(mine)


def _watched(
    original: Callable[..., Any], watch: Callable[..., mx.array | None]
) -> Callable[..., Any]:
    def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
        output = watch(layer, *args, **kwargs)
        return original(layer, *args, **kwargs) if output is None else output

    return call


def _batch(x: mx.array, indices: mx.array) -> tuple[int, ...]:
    """Shape of the places that select an expert: ``(..., rows, in)`` broadcast with indices."""
    return np.broadcast_shapes(x.shape[:-2], indices.shape)


def _rows_of_experts(x: mx.array, indices: mx.array) -> np.ndarray:
    """Float32 ``(places * rows, in)``: the input of each place to the expert that it selects."""
    import mlx.core as mx

    spread = mx.broadcast_to(x, (*_batch(x, indices), *x.shape[-2:]))
    return np.array(spread.astype(mx.float32)).reshape(-1, x.shape[-1])


def _by_expert(x: mx.array, indices: mx.array) -> Iterator[tuple[int, np.ndarray]]:
    """Each selected expert, and the indices of its rows."""
    places = np.broadcast_to(np.array(indices), _batch(x, indices))
    asked = np.repeat(places.reshape(-1), x.shape[-2])
    order = np.argsort(asked, kind="stable")
    experts, starts = np.unique(asked[order], return_index=True)
    for expert, rows in zip(experts, np.split(order, starts[1:]), strict=True):
        yield int(expert), rows


def _product(layer: Any, x: mx.array) -> mx.array:
    import mlx.core as mx

    rows = np.array(x.astype(mx.float32), copy=False).reshape(-1, x.shape[-1])
    product = rows @ np.array(layer.weight, copy=False).T
    if "bias" in layer:
        product += np.array(layer.bias, copy=False)
    return mx.array(product.reshape(*x.shape[:-1], -1))


def _products(layer: Any, x: mx.array, indices: mx.array) -> mx.array:
    import mlx.core as mx

    rows, weight = _rows_of_experts(x, indices), np.array(layer.weight, copy=False)
    product = np.empty((len(rows), weight.shape[1]), np.float32)
    for expert, places in _by_expert(x, indices):
        product[places] = rows[places] @ weight[expert].T
        if "bias" in layer:
            product[places] += np.array(layer.bias, copy=False)[expert]
    return mx.array(product.reshape(*_batch(x, indices), x.shape[-2], -1))
